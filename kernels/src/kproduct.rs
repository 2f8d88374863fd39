//! The product of the K formats over sixteen rows on x86-64: `scalar` specifies it, this is written once over [`Dot`] and compiled
//! for each set. A super-block's weights are unpacked 16 values at a time and multiplied with all activation rows in hand.

use std::ops::Range;

use crate::activation::{QBlockK, k_blocks_per_row};
use crate::format::{ROW_GROUP, for_kquant};
use crate::kquant::{GROUPS, KQuant, NIBBLE_BYTES};
use crate::matrix::Matrix;
use crate::simd::Dot;

/// Activation rows in hand at once, so that weights are unpacked once for them.
const ROWS_AT_ONCE: usize = 4;

/// How far ahead of its use a tile is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 4096;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// `Kernels::matmul` for rows in K blocks.
#[inline(always)]
pub(crate) fn product<S: Dot>(s: S, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlockK], n: usize, out: &mut [f32]) {
    for_kquant!(
        w.format(),
        groups_product(s, w, groups, x, n, out),
        unreachable!("no K matrix in a product of K blocks")
    );
}

#[inline(always)]
fn groups_product<Q: KQuant>(
    s: impl Dot,
    w: &Matrix<'_>,
    groups: Range<usize>,
    x: &[QBlockK],
    n: usize,
    out: &mut [f32],
) {
    let row = k_blocks_per_row(w.cols());
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    if n == 0 {
        return;
    }
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        let tiles = w.group(group);
        let mut t = 0;
        while t + ROWS_AT_ONCE <= n {
            rows::<Q, _, ROWS_AT_ONCE>(s, tiles, std::array::from_fn(|i| &x[(t + i) * row..][..row]), &mut out[t..]);
            t += ROWS_AT_ONCE;
        }
        while t < n {
            rows::<Q, _, 1>(s, tiles, [&x[t * row..][..row]], &mut out[t..]);
            t += 1;
        }
    }
}

/// `T` activation rows against one row group.
#[inline(always)]
fn rows<Q: KQuant, S: Dot, const T: usize>(s: S, tiles: &[u8], x: [&[QBlockK]; T], out: &mut [[f32; ROW_GROUP]]) {
    let mut acc = [s.splat(0.0); T];
    for (index, tile) in tiles.chunks_exact(Q::TILE_BYTES).enumerate() {
        let mut isum = [s.splat_i(0); T];
        for group in 0..GROUPS {
            // Evenly among the multiplications. Past the last row group this points nowhere, which a hint may.
            let lines = (Q::TILE_BYTES / LINE_BYTES).div_ceil(GROUPS);
            for line in group * lines..(group + 1) * lines {
                s.prefetch(tile.as_ptr().wrapping_add(PREFETCH_BYTES + line * LINE_BYTES));
            }
            let mut dots = [s.splat_i(0); T];
            for half in 0..2 {
                let w = unpack::<Q, S>(s, tile, group, half);
                let part = 2 * group + half;
                let scale = if Q::HAS_MIN { group } else { part };
                let scale: &[u8; ROW_GROUP] = vector(tile, Q::SCALE_AT + scale * ROW_GROUP);
                let scale = if Q::HAS_MIN { s.load_u8(scale) } else { s.load_i8(scale) };
                for t in 0..T {
                    let x = &x[t][index];
                    let begin = match (Q::HAS_MIN, half) {
                        (true, 1) if S::MANY_REGISTERS => dots[t],
                        (true, _) => s.splat_i(0),
                        (false, _) => s.splat_i(-32 * i32::from(x.sums[part])),
                    };
                    dots[t] = s.dot16(begin, w, &x.q.as_chunks().0[part]);
                    // Where a group has one scale, its first half waits for the second if there are registers to wait in.
                    if !(Q::HAS_MIN && S::MANY_REGISTERS && half == 0) {
                        isum[t] = s.mul_add_i(dots[t], scale, isum[t]);
                    }
                }
            }
        }
        let d = s.load_f16_bytes(vector(tile, 0));
        for t in 0..T {
            let x = &x[t][index];
            acc[t] = s.fma(s.mul(d, s.splat(x.d)), s.to_f32(isum[t]), acc[t]);
        }
        if Q::HAS_MIN {
            let mut imin = [s.splat_i(0); T];
            for group in 0..GROUPS {
                let min = s.load_u8(vector(tile, Q::MIN_AT + group * ROW_GROUP));
                for t in 0..T {
                    let sums = &x[t][index].sums;
                    let sum = i32::from(sums[2 * group]) + i32::from(sums[2 * group + 1]);
                    imin[t] = s.mul_add_i(min, s.splat_i(sum), imin[t]);
                }
            }
            let dmin = s.load_f16_bytes(vector(tile, 2 * ROW_GROUP));
            for t in 0..T {
                acc[t] = s.fma(s.mul(dmin, s.splat(-x[t][index].d)), s.to_f32(imin[t]), acc[t]);
            }
        }
    }
    for t in 0..T {
        s.store(acc[t], &mut out[t]);
    }
}

/// Values `16 half ..` of a group of 32, as unsigned bytes.
#[inline(always)]
fn unpack<Q: KQuant, S: Dot>(s: S, tile: &[u8], group: usize, half: usize) -> [S::W; 4] {
    // Functions and an array written out: closures over intrinsics may be compiled apart, without the set's instructions.
    [
        unpack_one::<Q, S, 0>(s, tile, group, half),
        unpack_one::<Q, S, 1>(s, tile, group, half),
        unpack_one::<Q, S, 2>(s, tile, group, half),
        unpack_one::<Q, S, 3>(s, tile, group, half),
    ]
}

/// Values `16 half + 4 J ..` of a group.
#[inline(always)]
fn unpack_one<Q: KQuant, S: Dot, const J: usize>(s: S, tile: &[u8], group: usize, half: usize) -> S::W {
    let nibbles = Q::NIBBLES_AT + group * NIBBLE_BYTES;
    let high_at = Q::HIGH_AT + group * Q::HIGH_BYTES;
    let low = s.bits(s.load_w(vector(tile, nibbles + J * 64)), 4 * half as u32, 15);
    match Q::BITS {
        5 => s.join(low, s.bits(s.load_w(vector(tile, high_at)), (4 * half + J) as u32, 1)),
        6 => s.join(low, s.bits(s.load_w(vector(tile, high_at + half * 64)), 2 * J as u32, 3)),
        _ => low,
    }
}

/// `N` bytes at `at`.
#[inline(always)]
fn vector<const N: usize>(tile: &[u8], at: usize) -> &[u8; N] {
    let (bytes, _) = tile[at..at + N].as_chunks::<N>();
    &bytes[0]
}
