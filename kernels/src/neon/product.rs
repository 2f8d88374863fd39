//! Quantized products with ARMv8.0 NEON: no dot product instruction, so `smull` and `smlal` of four weights of two rows with
//! a repeated group of four activations. Integer sums are exact: with 4 and 5 bits the eight products of a block fit int16
//! (8 · 31 · 127 = 31,496; with 4 bits even two such lanes, 16 · 15 · 127 = 30,480), with 8 bits two do (2 · 128 · 127).

#![expect(clippy::needless_range_loop, reason = "registers are numbered by row and vector")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::{Neon, neon, prefetch, widen_eight_f16};
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS, for_quant};
use crate::matrix::Matrix;

/// How far ahead of its use a tile is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 1024;
/// Activation rows that go over a row group together at most, bytes: half of a first-level cache of 32 KiB.
const ROWS_BYTES: usize = 16 * 1024;

/// `Kernels::matmul` for quantized rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn product(_: Neon, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    for_quant!(w.format(), groups_product(w, groups, x, n, out), unreachable!("a dense matrix in a quantized product"));
}

#[inline]
#[target_feature(enable = "neon")]
fn groups_product<Q: Quant>(w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    if n == 1 {
        for (group, out) in groups.zip(out) {
            gemv::<Q>(w.group(group), x, out);
        }
        return;
    }
    if n == 0 {
        return;
    }
    let row = blocks_per_row(w.cols());
    // Few rows go through in one piece, so that each weight is read once.
    let chunk = (ROWS_BYTES / (row.max(1) * size_of::<QBlock>())).max(16);
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        out.fill([0.0; ROW_GROUP]);
        if row == 0 {
            continue;
        }
        for (x, out) in x.chunks(chunk * row).zip(out.chunks_mut(chunk)) {
            for (i, tile) in w.group(group).chunks_exact(Q::TILE_BYTES).enumerate() {
                fetch_ahead::<Q>(tile);
                rows_product::<Q>(tile, &x[i * TILE_BLOCKS..], row, out);
            }
        }
    }
}

/// One row of activations against one row group.
#[inline]
#[target_feature(enable = "neon")]
fn gemv<Q: Quant>(tiles: &[u8], x: &[QBlock], out: &mut [f32; ROW_GROUP]) {
    let mut acc = [[vdupq_n_f32(0.0); 2]; 2];
    for (tile, x) in tiles.chunks_exact(Q::TILE_BYTES).zip(x.as_chunks::<TILE_BLOCKS>().0) {
        fetch_ahead::<Q>(tile);
        for (block, x) in x.iter().enumerate() {
            for (half, acc) in acc.iter_mut().enumerate() {
                let w = EightRows::load::<Q>(tile, block, half);
                *acc = w.add_to::<Q>(*acc, x);
            }
        }
    }
    let halves = out.as_chunks_mut::<8>().0;
    store(acc[0], &mut halves[0]);
    store(acc[1], &mut halves[1]);
}

/// Adds one tile's part to every row in `out`; `x` starts at the tile's first block of the first row, rows are `stride`
/// blocks apart. The weights of eight rows of a block stay in sixteen registers while all activations pass.
#[inline]
#[target_feature(enable = "neon")]
fn rows_product<Q: Quant>(tile: &[u8], x: &[QBlock], stride: usize, out: &mut [[f32; ROW_GROUP]]) {
    assert!((out.len() - 1) * stride + TILE_BLOCKS <= x.len());
    for block in 0..TILE_BLOCKS {
        for half in 0..2 {
            let mut w = EightRows::load::<Q>(tile, block, half);
            let mut x = x[block..].as_ptr();
            let mut acc = out.as_flattened_mut()[half * 8..].as_mut_ptr();
            for _ in 0..out.len() {
                w.keep_whole();
                // SAFETY: `x` has a block of every row that `out` has (asserted above), `acc` eight of its sixteen values;
                // both step past their ends only after the last row, and are not read there.
                unsafe {
                    let sum = w.add_to::<Q>([vld1q_f32(acc), vld1q_f32(acc.add(4))], &*x);
                    vst1q_f32(acc, sum[0]);
                    vst1q_f32(acc.add(4), sum[1]);
                }
                x = x.wrapping_add(stride);
                acc = acc.wrapping_add(ROW_GROUP);
            }
        }
    }
}

/// Eight rows of one block, ready to multiply.
struct EightRows {
    /// `[vector][rows 0 to 3, rows 4 to 7]`, a byte a value; vectors as activations: values `4 v .. 4 v + 4`.
    w: [[int8x16_t; 2]; 8],
    scale: [float32x4_t; 2],
    min: [float32x4_t; 2],
}

impl EightRows {
    #[inline(always)]
    fn load<Q: Quant>(tile: &[u8], block: usize, half: usize) -> Self {
        neon!({
            let table = block * 2 * ROW_GROUP + half * 16;
            let vector = |v: usize| -> [uint8x16_t; 2] {
                let at = Q::DATA_AT + (block * Q::BLOCK_VECTORS + v) * 64 + half * 32;
                [bytes(tile, at), bytes(tile, at + 16)]
            };
            let mut w = [[vdupq_n_s8(0); 2]; 8];
            if Q::BITS == 8 {
                for (v, w) in w.iter_mut().enumerate() {
                    *w = vector(v).map(|w| vreinterpretq_s8_u8(w));
                }
            } else {
                let high = if Q::BITS == 5 {
                    let at = Q::HIGH_AT + block * 64 + half * 32;
                    [bytes(tile, at), bytes(tile, at + 16)]
                } else {
                    [vdupq_n_u8(0); 2]
                };
                for v in 0..4 {
                    let packed = vector(v);
                    for rows in 0..2 {
                        let mut low_nibbles = vandq_u8(packed[rows], vdupq_n_u8(15));
                        let mut high_nibbles = vshrq_n_u8::<4>(packed[rows]);
                        if Q::BITS == 5 {
                            low_nibbles = vorrq_u8(low_nibbles, fifth_bits(high[rows], v));
                            high_nibbles = vorrq_u8(high_nibbles, fifth_bits(high[rows], v + 4));
                        }
                        w[v][rows] = vreinterpretq_s8_u8(low_nibbles);
                        w[v + 4][rows] = vreinterpretq_s8_u8(high_nibbles);
                    }
                }
            }
            let zero = [vdupq_n_f32(0.0); 2];
            let min = if Q::HAS_MIN { eight_f16(tile, Q::MIN_AT + table) } else { zero };
            Self { w, scale: eight_f16(tile, table), min }
        })
    }

    /// Hides where the weights come from, once a pass: the compiler would otherwise split every register into two halves
    /// outside the loop, run out of registers and fetch the halves from the stack.
    #[inline(always)]
    fn keep_whole(&mut self) {
        for w in self.w.as_flattened_mut() {
            let mut whole = *w;
            // SAFETY: no instruction at all.
            unsafe { asm!("/* {0:v} */", inout(vreg) whole, options(nomem, nostack, preserves_flags)) }
            *w = whole;
        }
    }

    /// One block's step of the accumulators of eight rows.
    #[inline(always)]
    fn add_to<Q: Quant>(&self, acc: [float32x4_t; 2], x: &QBlock) -> [float32x4_t; 2] {
        neon!({
            let isum = if Q::BITS == 8 { self.dot8(x) } else { self.dot_low::<Q>(x) };
            let offset = vdupq_n_s32(x.sum.wrapping_mul(Q::OFFSET));
            let d_sum = x.d * x.sum as f32;
            std::array::from_fn(|rows| {
                let isum = if Q::OFFSET == 0 { isum[rows] } else { vsubq_s32(isum[rows], offset) };
                let scaled = vfmaq_f32(acc[rows], vmulq_n_f32(self.scale[rows], x.d), vcvtq_f32_s32(isum));
                if Q::HAS_MIN { vfmaq_n_f32(scaled, self.min[rows], d_sum) } else { scaled }
            })
        })
    }

    /// 4 or 5 bits, offset not subtracted.
    #[inline(always)]
    fn dot_low<Q: Quant>(&self, x: &QBlock) -> [int32x4_t; 2] {
        neon!({
            let x = values(x);
            // [rows 0 to 3, 4 to 7][two rows]: four sums of eight products a row.
            let mut sum = [[vdupq_n_s16(0); 2]; 2];
            for v in 0..8 {
                let x = four(x, v);
                for rows in 0..2 {
                    let w = self.w[v][rows];
                    sum[rows][0] = vmlal_s8(sum[rows][0], vget_low_s8(w), vget_low_s8(x));
                    sum[rows][1] = vmlal_high_s8(sum[rows][1], w, x);
                }
            }
            sum.map(|[a, b]| {
                if Q::BITS == 4 { vpaddlq_s16(vpaddq_s16(a, b)) } else { vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b)) }
            })
        })
    }

    /// 8 bits: two products an int16, then on in int32.
    #[inline(always)]
    fn dot8(&self, x: &QBlock) -> [int32x4_t; 2] {
        neon!({
            let x = values(x);
            let mut sum = [[vdupq_n_s32(0); 2]; 2];
            for v in (0..8).step_by(2) {
                let (x, y) = (four(x, v), four(x, v + 1));
                for rows in 0..2 {
                    let (w, u) = (self.w[v][rows], self.w[v + 1][rows]);
                    let low = vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vget_low_s8(u), vget_low_s8(y));
                    let high = vmlal_high_s8(vmull_high_s8(w, x), u, y);
                    sum[rows] = [vpadalq_s16(sum[rows][0], low), vpadalq_s16(sum[rows][1], high)];
                }
            }
            sum.map(|[a, b]| vpaddq_s32(a, b))
        })
    }
}

/// The fifth bits of the values of vector `v` (0 to 3 low nibbles, 4 to 7 high), as 16 or 0 a byte.
#[inline(always)]
fn fifth_bits(high: uint8x16_t, v: usize) -> uint8x16_t {
    neon!({
        let shifted = match v {
            0 => vshlq_n_u8::<4>(high),
            1 => vshlq_n_u8::<3>(high),
            2 => vshlq_n_u8::<2>(high),
            3 => vshlq_n_u8::<1>(high),
            4 => high,
            5 => vshrq_n_u8::<1>(high),
            6 => vshrq_n_u8::<2>(high),
            _ => vshrq_n_u8::<3>(high),
        };
        vandq_u8(shifted, vdupq_n_u8(16))
    })
}

/// Values `4 v .. 4 v + 4`, four times over.
#[inline(always)]
fn four(x: [int32x4_t; 2], v: usize) -> int8x16_t {
    let x = x[v / 4];
    neon!(vreinterpretq_s8_s32(match v % 4 {
        0 => vdupq_laneq_s32::<0>(x),
        1 => vdupq_laneq_s32::<1>(x),
        2 => vdupq_laneq_s32::<2>(x),
        _ => vdupq_laneq_s32::<3>(x),
    }))
}

/// A block's values in two registers: two loads, where a repeating load for every four would need an address each.
#[inline(always)]
fn values(x: &QBlock) -> [int32x4_t; 2] {
    let q = x.q.as_chunks::<16>().0;
    neon!([vreinterpretq_s32_s8(vld1q_s8(q[0].as_ptr())), vreinterpretq_s32_s8(vld1q_s8(q[1].as_ptr())),])
}

#[inline(always)]
fn fetch_ahead<Q: Quant>(tile: &[u8]) {
    for line in (0..Q::TILE_BYTES).step_by(64) {
        // Past the last row group this points nowhere, which a hint may.
        prefetch(tile.as_ptr().wrapping_add(PREFETCH_BYTES + line));
    }
}

/// 16 bytes at `at`.
#[inline(always)]
fn bytes(tile: &[u8], at: usize) -> uint8x16_t {
    let bytes = &tile[at..at + 16];
    neon!(vld1q_u8(bytes.as_ptr()))
}

/// Eight f16 at `at`.
#[inline(always)]
fn eight_f16(tile: &[u8], at: usize) -> [float32x4_t; 2] {
    widen_eight_f16(bytes(tile, at))
}

#[inline(always)]
fn store(x: [float32x4_t; 2], out: &mut [f32; 8]) {
    neon!({
        vst1q_f32(out.as_mut_ptr(), x[0]);
        vst1q_f32(out.as_mut_ptr().add(4), x[1]);
    })
}
