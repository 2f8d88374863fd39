//! A block's integer sums with ARMv8.0 NEON: no dot product instruction, so `smull` and `smlal` of four weights of two rows with
//! a repeated group of four activations. The sums are exact: with 4 and 5 bits the eight products of a block fit int16
//! (8 · 31 · 127 = 31,496; with 4 bits even two such lanes, 16 · 15 · 127 = 30,480, and with five less the offset,
//! 16 · 16 · 127 = 32,512), with 8 bits two do (2 · 128 · 127).
//! `neon/rows.rs` and `neon/krows.rs` bring the weights and take the sums.
//!
//! One order of instructions serves the A53 and the A72. Compiled for the A53, llvm-mca's cycles on it change by 3 % either way for
//! the 4-bit and 8-bit formats, and its model takes a 128-bit load for one issue slot, where the core takes two: what other loads
//! would gain there only a board can show.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::krows::{EightRowsK, KDot, groups_product_k};
use super::rows::{Activations, Dot, EightRows, four_at, groups_product, hidden};
use super::{Neon, neon};
use crate::activation::{QBlock, QBlockK};
use crate::format::{Quant, for_kquant, for_quant};
use crate::kquant::KQuant;
use crate::matrix::Matrix;

/// Activation rows between two steps of the loop's counters.
const UNROLLED: usize = 8;

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

/// `Kernels::matmul` for rows in K blocks.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn product_k(_: Neon, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlockK], n: usize, out: &mut [f32]) {
    for_kquant!(
        w.format(),
        groups_product_k(Smlal, w, groups, x, n, out),
        unreachable!("no K matrix in a product of K blocks")
    );
}

#[derive(Clone, Copy)]
struct Smlal;

impl Dot for Smlal {
    const STREAMS: bool = false;

    #[inline(always)]
    fn few_rows(self) -> usize {
        3
    }

    // Pairs of registers off one pointer: loads of four, as dotprod's, cost an A53 a fifth more in llvm-mca.
    #[inline(always)]
    unsafe fn take_four(self, at: &mut *const u8, offset: usize, _: usize) -> [uint8x16_t; 4] {
        // SAFETY: the caller's promise.
        unsafe { four_at(at.add(offset)) }
    }

    #[inline(always)]
    unsafe fn take_block(self, x: &mut *const QBlock) -> Activations {
        // SAFETY: the caller's promise.
        let block = unsafe { Activations::load(*x) };
        *x = x.wrapping_add(1);
        block
    }

    #[inline(always)]
    fn dot<Q: Quant>(self, x: Activations, pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2]) -> [int32x4_t; 4] {
        let isum = sums::<Q, 4>(x, Q::BITS == 4, pair);
        if Q::OFFSET == 0 {
            return isum;
        }
        let offset = neon!(vmulq_n_s32(x.sum, Q::OFFSET));
        isum.map(|isum| neon!(vsubq_s32(isum, offset)))
    }

    #[inline(always)]
    unsafe fn pass<Q: Quant>(self, w: EightRows, x: *const QBlock, row_bytes: usize, n: usize, sums: *mut [f32; 8]) {
        let (mut w, mut x, mut sums) = (w, x, sums);
        // SAFETY: the caller's promise; `x` and `sums` step past their ends only after the last row, and are not read there.
        unsafe {
            for _ in 0..n / UNROLLED {
                x = add_row::<Q>(&mut w, sums, x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(1), x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(2), x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(3), x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(4), x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(5), x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(6), x, row_bytes);
                x = add_row::<Q>(&mut w, sums.add(7), x, row_bytes);
                sums = sums.add(UNROLLED);
            }
            for _ in 0..n % UNROLLED {
                x = add_row::<Q>(&mut w, sums, x, row_bytes);
                sums = sums.add(1);
            }
        }
    }
}

impl KDot for Smlal {
    #[inline(always)]
    fn group<Q: KQuant>(self, x: [int8x16_t; 2], pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2]) -> [int32x4_t; 4] {
        low_bits(x, Q::BITS == 4, pair)
    }

    #[inline(always)]
    fn half(self, x: int8x16_t, sum: i16, vector: impl FnMut(usize) -> [int8x16_t; 4]) -> [int32x4_t; 4] {
        let offset = neon!(vdupq_n_s32(32 * i32::from(sum)));
        sixteen_values(x, vector).map(|sum| neon!(vsubq_s32(sum, offset)))
    }

    #[inline(always)]
    unsafe fn group_pass<Q: KQuant>(
        self,
        w: EightRowsK,
        x: *const i8,
        row_bytes: usize,
        n: usize,
        isums: *mut [i32; 8],
    ) {
        let (mut w, mut x, mut isums) = (w, x, isums);
        for _ in 0..n {
            keep_whole(&mut w.w);
            // SAFETY: the caller's promise; the pointers pass the last row only after it.
            unsafe {
                let values = [vld1q_s8(x), vld1q_s8(x.add(16))];
                let at: *mut i32 = isums.cast();
                let mut isum = [vld1q_s32(at), vld1q_s32(at.add(4))];
                let parts = if Q::HAS_MIN {
                    [low_bits(values, Q::BITS == 4, |j| [w.w[j], w.w[j + 4]]); 2]
                } else {
                    [sixteen_values(values[0], |j| w.w[j]), sixteen_values(values[1], |j| w.w[j + 4])]
                };
                for (part, scale) in parts.iter().zip(w.scales).take(32 / Q::SCALE_VALUES) {
                    for r in 0..2 {
                        isum[r] = vmlaq_s32(isum[r], part[r], scale[r]);
                    }
                }
                vst1q_s32(at, isum[0]);
                vst1q_s32(at.add(4), isum[1]);
                x = hidden(x.wrapping_add(row_bytes));
                isums = isums.add(1);
            }
        }
    }
}

/// 6 bits, with or without their offset: four products a lane (4 · 63 · 127 = 32,004).
#[inline(always)]
fn sixteen_values<const R: usize>(x: int8x16_t, mut vector: impl FnMut(usize) -> [int8x16_t; R]) -> [int32x4_t; R] {
    let mut sum = neon!([[vdupq_n_s16(0); 2]; R]);
    add_four(&mut sum, vector(0), four::<0>(x));
    add_four(&mut sum, vector(1), four::<1>(x));
    add_four(&mut sum, vector(2), four::<2>(x));
    add_four(&mut sum, vector(3), four::<3>(x));
    sum.map(|[a, b]| {
        neon!(if R == 4 {
            add_pairs(vpaddlq_s16(a), vpaddlq_s16(b))
        } else {
            vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b))
        })
    })
}

#[inline(always)]
fn add_four<const R: usize>(sum: &mut [[int16x8_t; 2]; R], w: [int8x16_t; R], x: int8x16_t) {
    for r in 0..R {
        sum[r] = add_sixteen(sum[r], w[r], x);
    }
}

/// One block's step of one row of activations; the same block of the next row.
///
/// # Safety
/// `sums` points to values that nobody else uses, `x` to a block.
#[inline(always)]
unsafe fn add_row<Q: Quant>(
    w: &mut EightRows,
    acc: *mut [f32; 8],
    x: *const QBlock,
    row_bytes: usize,
) -> *const QBlock {
    keep_whole(&mut w.w);
    // SAFETY: the caller's promise.
    unsafe {
        let (x, next) = (Activations::load(x), hidden(x.wrapping_byte_add(row_bytes)));
        // Without their offset, five bits are as few as four.
        let isum = sums::<Q, 2>(x, Q::BITS == 4 || Q::OFFSET != 0, |j| {
            if Q::BITS == 8 { [w.w[2 * j], w.w[2 * j + 1]] } else { [w.w[j], w.w[j + 4]] }
        });
        let acc: *mut f32 = acc.cast();
        let [low, high] = w.factors.step::<Q>([vld1q_f32(acc), vld1q_f32(acc.add(4))], isum, x);
        vst1q_f32(acc, low);
        vst1q_f32(acc.add(4), high);
        next
    }
}

/// Hides where the weights come from, once a pass: the compiler would otherwise split every register into two halves
/// outside the loop, run out of registers and fetch the halves from the stack.
#[inline(always)]
fn keep_whole(w: &mut [[int8x16_t; 2]; 8]) {
    for w in w.as_flattened_mut() {
        let mut whole = *w;
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {0:v} */", inout(vreg) whole, options(nomem, nostack, preserves_flags)) }
        *w = whole;
    }
}

/// The integer sums of `4 R` rows; `two_fit`: whether two lanes of eight products fit int16.
#[inline(always)]
fn sums<Q: Quant, const R: usize>(
    x: Activations,
    two_fit: bool,
    pair: impl FnMut(usize) -> [[int8x16_t; R]; 2],
) -> [int32x4_t; R] {
    if Q::BITS == 8 { eight_bits(x.q, pair) } else { low_bits(x.q, two_fit, pair) }
}

/// 4 or 5 bits: a lane sums all eight products of a block.
#[inline(always)]
fn low_bits<const R: usize>(
    x: [int8x16_t; 2],
    two_fit: bool,
    mut pair: impl FnMut(usize) -> [[int8x16_t; R]; 2],
) -> [int32x4_t; R] {
    let mut sum = neon!([[vdupq_n_s16(0); 2]; R]);
    // Written out, here and below: the compiler does not unroll loops of this size.
    add_low(&mut sum, pair(0), [four::<0>(x[0]), four::<0>(x[1])]);
    add_low(&mut sum, pair(1), [four::<1>(x[0]), four::<1>(x[1])]);
    add_low(&mut sum, pair(2), [four::<2>(x[0]), four::<2>(x[1])]);
    add_low(&mut sum, pair(3), [four::<3>(x[0]), four::<3>(x[1])]);
    sum.map(|[a, b]| {
        neon!(if two_fit { vpaddlq_s16(vpaddq_s16(a, b)) } else { vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b)) })
    })
}

#[inline(always)]
fn add_low<const R: usize>(sum: &mut [[int16x8_t; 2]; R], [w, u]: [[int8x16_t; R]; 2], [x, y]: [int8x16_t; 2]) {
    add_four(sum, w, x);
    add_four(sum, u, y);
}

#[inline(always)]
fn add_sixteen(sum: [int16x8_t; 2], w: int8x16_t, x: int8x16_t) -> [int16x8_t; 2] {
    neon!([vmlal_s8(sum[0], vget_low_s8(w), vget_low_s8(x)), vmlal_high_s8(sum[1], w, x)])
}

/// 8 bits: two products an int16, then on in int32.
#[inline(always)]
fn eight_bits<const R: usize>(x: [int8x16_t; 2], mut pair: impl FnMut(usize) -> [[int8x16_t; R]; 2]) -> [int32x4_t; R] {
    let mut sum = neon!([[vdupq_n_s32(0); 2]; R]);
    add_eight(&mut sum, pair(0), [four::<0>(x[0]), four::<1>(x[0])]);
    add_eight(&mut sum, pair(1), [four::<2>(x[0]), four::<3>(x[0])]);
    add_eight(&mut sum, pair(2), [four::<0>(x[1]), four::<1>(x[1])]);
    add_eight(&mut sum, pair(3), [four::<2>(x[1]), four::<3>(x[1])]);
    sum.map(|[a, b]| neon!(vpaddq_s32(a, b)))
}

#[inline(always)]
fn add_eight<const R: usize>(sum: &mut [[int32x4_t; 2]; R], [w, u]: [[int8x16_t; R]; 2], [x, y]: [int8x16_t; 2]) {
    for r in 0..R {
        sum[r] = neon!({
            let low = vmlal_s8(vmull_s8(vget_low_s8(w[r]), vget_low_s8(x)), vget_low_s8(u[r]), vget_low_s8(y));
            let high = vmlal_high_s8(vmull_high_s8(w[r], x), u[r], y);
            [vpadalq_s16(sum[r][0], low), vpadalq_s16(sum[r][1], high)]
        });
    }
}

/// Sums of neighbours. As `asm!`, because the compiler makes three instructions of it in [`sixteen_values`] of sixteen rows.
#[inline(always)]
fn add_pairs(a: int32x4_t, b: int32x4_t) -> int32x4_t {
    let sums;
    neon!(asm!("addp {s:v}.4s, {a:v}.4s, {b:v}.4s", s = lateout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
        options(pure, nomem, nostack, preserves_flags)));
    sums
}

/// Values `4 J .. 4 J + 4` of sixteen, four times over.
#[inline(always)]
fn four<const J: i32>(x: int8x16_t) -> int8x16_t {
    neon!(vreinterpretq_s8_s32(vdupq_laneq_s32::<J>(vreinterpretq_s32_s8(x))))
}
