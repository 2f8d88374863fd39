//! A block's integer sums with ARMv8.0 NEON: no dot product instruction, so `smull` and `smlal` of four weights of two rows with
//! a repeated group of four activations. The sums are exact: with 4 and 5 bits the eight products of a block fit int16
//! (8 · 31 · 127 = 31,496; with 4 bits even two such lanes, 16 · 15 · 127 = 30,480), with 8 bits two do (2 · 128 · 127).
//! `neon/rows.rs` brings the weights and takes the sums.

use std::arch::aarch64::*;
use std::ops::Range;

use super::rows::{Dot, groups_product, values};
use super::{Neon, neon};
use crate::activation::QBlock;
use crate::format::{Quant, for_quant};
use crate::matrix::Matrix;

/// `Kernels::matmul` for quantized rows.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn product(_: Neon, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    for_quant!(
        w.format(),
        groups_product(Smlal, w, groups, x, n, out),
        unreachable!("a dense matrix in a quantized product")
    );
}

#[derive(Clone, Copy)]
struct Smlal;

impl Dot for Smlal {
    #[inline(always)]
    fn dot<Q: Quant, const R: usize>(self, x: &QBlock, pair: impl Fn(usize) -> [[int8x16_t; R]; 2]) -> [int32x4_t; R] {
        let isum = if Q::BITS == 8 { eight_bits(x, pair) } else { low_bits::<Q, R>(x, pair) };
        if Q::OFFSET == 0 {
            return isum;
        }
        let offset = neon!(vdupq_n_s32(x.sum.wrapping_mul(Q::OFFSET)));
        isum.map(|isum| neon!(vsubq_s32(isum, offset)))
    }
}

/// 4 or 5 bits: a lane sums all eight products of a block.
#[inline(always)]
fn low_bits<Q: Quant, const R: usize>(x: &QBlock, pair: impl Fn(usize) -> [[int8x16_t; R]; 2]) -> [int32x4_t; R] {
    let x = values(x);
    let mut sum = neon!([[vdupq_n_s16(0); 2]; R]);
    // Written out, here and below: the compiler does not unroll loops of this size.
    add_low::<0, R>(&mut sum, pair(0), x);
    add_low::<1, R>(&mut sum, pair(1), x);
    add_low::<2, R>(&mut sum, pair(2), x);
    add_low::<3, R>(&mut sum, pair(3), x);
    sum.map(|[a, b]| {
        neon!(if Q::BITS == 4 { vpaddlq_s16(vpaddq_s16(a, b)) } else { vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b)) })
    })
}

#[inline(always)]
fn add_low<const J: i32, const R: usize>(sum: &mut [[int16x8_t; 2]; R], w: [[int8x16_t; R]; 2], x: [int8x16_t; 2]) {
    let [x, y] = x.map(four::<J>);
    let [w, u] = w;
    for r in 0..R {
        sum[r] = add_sixteen(sum[r], w[r], x);
    }
    for r in 0..R {
        sum[r] = add_sixteen(sum[r], u[r], y);
    }
}

#[inline(always)]
fn add_sixteen(sum: [int16x8_t; 2], w: int8x16_t, x: int8x16_t) -> [int16x8_t; 2] {
    neon!([vmlal_s8(sum[0], vget_low_s8(w), vget_low_s8(x)), vmlal_high_s8(sum[1], w, x)])
}

/// 8 bits: two products an int16, then on in int32.
#[inline(always)]
fn eight_bits<const R: usize>(x: &QBlock, pair: impl Fn(usize) -> [[int8x16_t; R]; 2]) -> [int32x4_t; R] {
    let x = values(x);
    let mut sum = neon!([[vdupq_n_s32(0); 2]; R]);
    add_eight::<0, R>(&mut sum, pair(0), x);
    add_eight::<1, R>(&mut sum, pair(1), x);
    add_eight::<2, R>(&mut sum, pair(2), x);
    add_eight::<3, R>(&mut sum, pair(3), x);
    sum.map(|[a, b]| neon!(vpaddq_s32(a, b)))
}

#[inline(always)]
fn add_eight<const J: i32, const R: usize>(sum: &mut [[int32x4_t; 2]; R], w: [[int8x16_t; R]; 2], x: [int8x16_t; 2]) {
    let [x, y] = x.map(four::<J>);
    let [w, u] = w;
    for r in 0..R {
        sum[r] = neon!({
            let low = vmlal_s8(vmull_s8(vget_low_s8(w[r]), vget_low_s8(x)), vget_low_s8(u[r]), vget_low_s8(y));
            let high = vmlal_high_s8(vmull_high_s8(w[r], x), u[r], y);
            [vpadalq_s16(sum[r][0], low), vpadalq_s16(sum[r][1], high)]
        });
    }
}

/// Values `4 J .. 4 J + 4` of sixteen, four times over.
#[inline(always)]
fn four<const J: i32>(x: int8x16_t) -> int8x16_t {
    neon!(vreinterpretq_s8_s32(vdupq_laneq_s32::<J>(vreinterpretq_s32_s8(x))))
}
