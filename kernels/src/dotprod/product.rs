//! A block's integer sums with `sdot`: a register holds four weights of each of four rows, one instruction adds their products
//! with a group of four activations to four sums. `neon/rows.rs` and `neon/krows.rs` bring the weights and take the sums; several
//! rows of activations pass in `dotprod/pass.rs`.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::loads::{take_block, take_four, zeros};
use super::pass::{group_pass, pass};
use crate::activation::{QBlock, QBlockK};
use crate::format::{Quant, for_kquant, for_quant};
use crate::kquant::KQuant;
use crate::matrix::Matrix;
use crate::neon::krows::{EightRowsK, KDot, groups_product_k};
use crate::neon::rows::{Activations, Dot, EightRows, groups_product};
use crate::neon::{Neon, neon};

/// `Kernels::matmul` for quantized rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn product(_: Neon, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    for_quant!(
        w.format(),
        groups_product(sdot(), w, groups, x, n, out),
        unreachable!("a dense matrix in a quantized product")
    );
}

/// `Kernels::matmul` for rows in K blocks.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) fn product_k(_: Neon, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlockK], n: usize, out: &mut [f32]) {
    for_kquant!(
        w.format(),
        groups_product_k(sdot(), w, groups, x, n, out),
        unreachable!("no K matrix in a product of K blocks")
    );
}

/// Proof of the dotprod feature. Made by [`sdot`] alone.
#[derive(Clone, Copy)]
struct Sdot(());

/// Callable only where the feature is enabled, hence the proof.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot() -> Sdot {
    Sdot(())
}

impl Dot for Sdot {
    const STREAMS: bool = true;

    #[inline(always)]
    fn few_rows(self) -> usize {
        2
    }

    #[inline(always)]
    unsafe fn take_four(self, at: &mut *const u8, _: usize, turn: usize) -> [uint8x16_t; 4] {
        // SAFETY: the caller's promise.
        unsafe { take_four(at, turn) }
    }

    #[inline(always)]
    unsafe fn take_block(self, x: &mut *const QBlock) -> Activations {
        // SAFETY: the caller's promise.
        unsafe { take_block(x) }
    }

    #[inline(always)]
    fn dot<Q: Quant>(self, x: Activations, mut pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2]) -> [int32x4_t; 4] {
        // The offset comes out of where the sums start.
        let mut sum = if Q::OFFSET == 0 { zeros() } else { neon!([vmulq_n_s32(x.sum, -Q::OFFSET); 4]) };
        if Q::BITS != 8 {
            return self.add_nibbles(sum, x.q, pair);
        }
        let [x, y] = x.q;
        let [w, u] = pair(0);
        self.add::<0>(&mut sum, w, x);
        self.add::<1>(&mut sum, u, x);
        let [w, u] = pair(1);
        self.add::<2>(&mut sum, w, x);
        self.add::<3>(&mut sum, u, x);
        let [w, u] = pair(2);
        self.add::<0>(&mut sum, w, y);
        self.add::<1>(&mut sum, u, y);
        let [w, u] = pair(3);
        self.add::<2>(&mut sum, w, y);
        self.add::<3>(&mut sum, u, y);
        sum
    }

    #[inline(always)]
    unsafe fn pass<Q: Quant>(self, w: EightRows, x: *const QBlock, row_bytes: usize, n: usize, sums: *mut [f32; 8]) {
        // SAFETY: `self` proves the feature; the rest is the caller's promise.
        unsafe {
            if Q::HAS_MIN {
                pass::<true>(w, x, row_bytes, n, sums);
            } else {
                pass::<false>(w, x, row_bytes, n, sums);
            }
        }
    }
}

impl KDot for Sdot {
    #[inline(always)]
    fn group<Q: KQuant>(self, x: [int8x16_t; 2], pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2]) -> [int32x4_t; 4] {
        self.add_nibbles(zeros(), x, pair)
    }

    #[inline(always)]
    fn half(self, x: int8x16_t, sum: i16, mut vector: impl FnMut(usize) -> [int8x16_t; 4]) -> [int32x4_t; 4] {
        let mut sums = neon!([vdupq_n_s32(-32 * i32::from(sum)); 4]);
        self.add::<0>(&mut sums, vector(0), x);
        self.add::<1>(&mut sums, vector(1), x);
        self.add::<2>(&mut sums, vector(2), x);
        self.add::<3>(&mut sums, vector(3), x);
        sums
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
        // SAFETY: `self` proves the feature; the rest is the caller's promise.
        unsafe {
            if Q::HAS_MIN {
                group_pass::<true>(w, x, row_bytes, n, isums);
            } else {
                group_pass::<false>(w, x, row_bytes, n, isums);
            }
        }
    }
}

impl Sdot {
    /// All of a block or group whose pairs are low and high nibbles.
    #[inline(always)]
    fn add_nibbles(
        self,
        sum: [int32x4_t; 4],
        [x, y]: [int8x16_t; 2],
        mut pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2],
    ) -> [int32x4_t; 4] {
        let mut sum = sum;
        // Written out, here and elsewhere: the compiler does not unroll loops of this size.
        let [w, u] = pair(0);
        self.add::<0>(&mut sum, w, x);
        self.add::<0>(&mut sum, u, y);
        let [w, u] = pair(1);
        self.add::<1>(&mut sum, w, x);
        self.add::<1>(&mut sum, u, y);
        let [w, u] = pair(2);
        self.add::<2>(&mut sum, w, x);
        self.add::<2>(&mut sum, u, y);
        let [w, u] = pair(3);
        self.add::<3>(&mut sum, w, x);
        self.add::<3>(&mut sum, u, y);
        sum
    }

    #[inline(always)]
    fn add<const J: usize>(self, sum: &mut [int32x4_t; 4], w: [int8x16_t; 4], x: int8x16_t) {
        for r in 0..4 {
            sum[r] = self.by_element::<J>(sum[r], w[r], x);
        }
    }

    /// Adds to each of four sums the products of its four weights with activations `4 J .. 4 J + 4`. As `asm!`, because the
    /// intrinsic is not stable.
    #[inline(always)]
    fn by_element<const J: usize>(self, sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        let mut sum = sum;
        // SAFETY: `self` proves the instruction; it touches nothing but the registers named.
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{j}]",
                sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x, j = const J,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }
}
