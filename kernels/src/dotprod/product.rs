//! A block's integer sums with `sdot`: a register holds four weights of each of four rows, one instruction adds their products
//! with a group of four activations to four sums. `neon/rows.rs` brings the weights and takes the sums.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use crate::activation::QBlock;
use crate::format::{Quant, for_quant};
use crate::matrix::Matrix;
use crate::neon::rows::{Dot, groups_product, values};
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
    #[inline(always)]
    fn dot<Q: Quant, const R: usize>(self, x: &QBlock, pair: impl Fn(usize) -> [[int8x16_t; R]; 2]) -> [int32x4_t; R] {
        // The offset comes out of where the sums start.
        let start = if Q::OFFSET == 0 { 0 } else { x.sum.wrapping_mul(-Q::OFFSET) };
        let x = values(x);
        let mut sum = neon!([vdupq_n_s32(start); R]);
        // Written out: the compiler does not unroll loops of this size.
        self.add_pair::<0, R>(&mut sum, pair(0), x);
        self.add_pair::<1, R>(&mut sum, pair(1), x);
        self.add_pair::<2, R>(&mut sum, pair(2), x);
        self.add_pair::<3, R>(&mut sum, pair(3), x);
        sum
    }
}

impl Sdot {
    #[inline(always)]
    fn add_pair<const J: usize, const R: usize>(
        self,
        sum: &mut [int32x4_t; R],
        [low, high]: [[int8x16_t; R]; 2],
        [x, y]: [int8x16_t; 2],
    ) {
        for r in 0..R {
            sum[r] = self.by_element::<J>(sum[r], low[r], x);
        }
        for r in 0..R {
            sum[r] = self.by_element::<J>(sum[r], high[r], y);
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
