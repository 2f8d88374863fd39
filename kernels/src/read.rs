//! Reading and nothing else: what memory gives a core, the roofline that a product of one row is measured by.
//! Which order and which prefetch distance are the fastest differs from CPU to CPU, so there are several [`ReadPlan`]s and the
//! best of them counts. Called by the benches through `Kernels::read`.

use crate::simd::{LANES, Simd};

/// One way of reading a range once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPlan {
    /// Places in the range that are read in turns: 1, 2, 4 or 8.
    streams: usize,
    /// How far ahead of its loads each stream is prefetched, bytes; 0 leaves it to the CPU.
    ahead_bytes: usize,
}

const STREAMS: [usize; 4] = [1, 2, 4, 8];
const AHEAD_BYTES: [usize; 5] = [0, 1024, 2048, 4096, 8192];
/// What one load brings in, bytes: a cache line on most CPUs.
const LINE: usize = 4 * LANES;
/// Lines of one stream's turn, each with a sum of its own, so that a chain of sums is not what is measured.
const LINES: usize = 4;
const TURN: usize = LINES * LINE;

impl ReadPlan {
    /// Every plan.
    pub fn all() -> impl Iterator<Item = Self> {
        STREAMS.into_iter().flat_map(|streams| AHEAD_BYTES.map(|ahead_bytes| Self { streams, ahead_bytes }))
    }
}

impl std::fmt::Display for ReadPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} streams, prefetch {} bytes ahead", self.streams, self.ahead_bytes)
    }
}

/// The exclusive or of all little-endian words of four bytes, the last one filled up with zeros.
#[inline(always)]
pub(crate) fn read<S: Simd>(s: S, plan: ReadPlan, bytes: &[u8]) -> u32 {
    match plan.streams {
        1 => read_streams::<S, 1>(s, plan.ahead_bytes, bytes),
        2 => read_streams::<S, 2>(s, plan.ahead_bytes, bytes),
        4 => read_streams::<S, 4>(s, plan.ahead_bytes, bytes),
        _ => read_streams::<S, 8>(s, plan.ahead_bytes, bytes),
    }
}

#[inline(always)]
fn read_streams<S: Simd, const STREAMS: usize>(s: S, ahead_bytes: usize, bytes: &[u8]) -> u32 {
    let (turns, tail) = bytes.as_chunks::<TURN>();
    let each = turns.len() / STREAMS;
    let (whole, rest) = turns.split_at(each * STREAMS);
    let streams: [&[[u8; TURN]]; STREAMS] = std::array::from_fn(|i| &whole[i * each..][..each]);
    let mut sums = [s.splat(0.0); LINES];
    for turn in 0..each {
        for stream in streams {
            let bytes = &stream[turn];
            if ahead_bytes > 0 {
                for line in 0..LINES {
                    s.prefetch(bytes.as_ptr().wrapping_add(ahead_bytes + line * LINE));
                }
            }
            add(s, &mut sums, bytes);
        }
    }
    for bytes in rest {
        add(s, &mut sums, bytes);
    }
    let mut last = [0; TURN];
    last[..tail.len()].copy_from_slice(tail);
    add(s, &mut sums, &last);
    let mut lanes = [0.0; LANES];
    s.store(s.xor(s.xor(sums[0], sums[1]), s.xor(sums[2], sums[3])), &mut lanes);
    lanes.iter().fold(0, |all, lane| all ^ lane.to_bits())
}

#[inline(always)]
fn add<S: Simd>(s: S, sums: &mut [S::V; LINES], bytes: &[u8; TURN]) {
    for (sum, line) in sums.iter_mut().zip(bytes.as_chunks::<LINE>().0) {
        *sum = s.xor(*sum, s.load_f32_bytes(line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernels;

    #[test]
    fn every_plan_of_every_set_reads_every_byte_once() {
        let bytes: Vec<u8> = (0..8 * TURN * 3 + TURN + 77).map(|i| (i * 31 % 251) as u8).collect();
        for len in [0, 5, TURN, 8 * TURN, 9 * TURN + 1, bytes.len()] {
            let words = bytes[..len].chunks(4).map(|word| {
                let mut padded = [0; 4];
                padded[..word.len()].copy_from_slice(word);
                u32::from_le_bytes(padded)
            });
            let wanted = words.fold(0, |all, word| all ^ word);
            for set in Kernels::supported() {
                for plan in ReadPlan::all() {
                    assert_eq!(set.read(plan, &bytes[..len]), wanted, "{} {plan} of {len}", set.name());
                }
            }
        }
    }
}
