//! The product of the K formats over any set's sixteen rows: `scalar` specifies it, this is written once over [`Dot`] and
//! compiled for each set. A super-block's weights are unpacked 16 values at a time and multiplied with all activation rows in hand.

use std::ops::Range;

use crate::activation::{QBlockK, k_blocks_per_row};
use crate::format::{ROW_GROUP, for_kquant};
use crate::kquant::{GROUPS, KQuant, NIBBLE_BYTES};
use crate::matrix::Matrix;
use crate::simd::Dot;

/// Activation rows in hand at once, so that weights are unpacked once for them.
const ROWS_AT_ONCE: usize = 4;

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
            for half in 0..2 {
                let w = unpack::<Q, S>(s, tile, group, half);
                let scale = 32 / Q::SCALE_VALUES * group + half * (32 / Q::SCALE_VALUES - 1);
                let scale: &[u8; ROW_GROUP] = vector(tile, Q::SCALE_AT + scale * ROW_GROUP);
                let scale = if Q::HAS_MIN { s.load_u8(scale) } else { s.load_i8(scale) };
                for t in 0..T {
                    let x = &x[t][index];
                    let part = 2 * group + half;
                    let begin = if Q::HAS_MIN { s.splat_i(0) } else { s.splat_i(-32 * i32::from(x.sums[part])) };
                    let dot = s.dot16(begin, w, &x.q.as_chunks().0[part]);
                    isum[t] = s.mul_add_i(dot, scale, isum[t]);
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
    let nibbles = Q::NIBBLES_AT + group * NIBBLE_BYTES;
    let high_at = Q::HIGH_AT + group * Q::HIGH_BYTES;
    // An array written out: closures over intrinsics may be compiled apart, without the set's instructions.
    let one = |j: usize| -> S::W {
        let low = s.bits(s.load_w(vector(tile, nibbles + j * 64)), 4 * half as u32, 15);
        match Q::BITS {
            5 => s.join(low, s.bits(s.load_w(vector(tile, high_at)), (4 * half + j) as u32, 1)),
            6 => s.join(low, s.bits(s.load_w(vector(tile, high_at + half * 64)), 2 * j as u32, 3)),
            _ => low,
        }
    };
    [one(0), one(1), one(2), one(3)]
}

/// `N` bytes at `at`.
#[inline(always)]
fn vector<const N: usize>(tile: &[u8], at: usize) -> &[u8; N] {
    let (bytes, _) = tile[at..at + N].as_chunks::<N>();
    &bytes[0]
}
