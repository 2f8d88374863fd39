//! The scalar set: the specification of the quantized product, one number at a time. The other sets must give its bits.

use std::ops::Range;

use crate::activation::{QBlock, QBlockK, blocks_per_row, k_blocks_per_row};
use crate::dispatch::simd_set;
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS, for_kquant, for_quant};
use crate::kquant::{self, KQuant};
use crate::matrix::{Matrix, tile_f16, tile_value};
use crate::simd::Portable;

simd_set! {
    /// Plain Rust, for any CPU.
    pub(crate) static SCALAR = "scalar" for Portable, features(), product, product_k;
}

/// The scalar code compiled where fused multiply-add is an instruction and not a library call; the same bits.
#[cfg(target_arch = "x86_64")]
pub(crate) mod with_fma {
    use super::{Matrix, Portable, QBlock, Range, product, product_k, simd_set};

    simd_set! {
        /// [`super::SCALAR`] on a CPU with FMA.
        pub(crate) static SCALAR_FMA = "scalar" for Portable, features(#[target_feature(enable = "fma")]), product, product_k;
    }
}

#[inline(always)]
fn product(_: Portable, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    for_quant!(w.format(), quantized(w, groups, x, n, out), unreachable!("a dense matrix in a quantized product"));
}

#[inline(always)]
fn quantized<Q: Quant>(w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    let row = blocks_per_row(w.cols());
    for (g, group) in groups.enumerate() {
        let tiles = w.group(group);
        for t in 0..n {
            let out = &mut out[(g * n + t) * ROW_GROUP..][..ROW_GROUP];
            out.fill(0.0);
            for (b, x) in x[t * row..][..row].iter().enumerate() {
                let (tile, block) = (&tiles[b / TILE_BLOCKS * Q::TILE_BYTES..][..Q::TILE_BYTES], b % TILE_BLOCKS);
                for (r, acc) in out.iter_mut().enumerate() {
                    let isum: i32 =
                        x.q.iter().enumerate().map(|(k, q)| tile_value::<Q>(tile, block, r, k) * i32::from(*q)).sum();
                    *acc = (tile_f16(tile, 0, block, r) * x.d).mul_add(isum as f32, *acc);
                    if Q::HAS_MIN {
                        *acc = tile_f16(tile, Q::MIN_AT, block, r).mul_add(x.d * x.sum as f32, *acc);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn product_k(_: Portable, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlockK], n: usize, out: &mut [f32]) {
    for_kquant!(w.format(), k_quantized(w, groups, x, n, out), unreachable!("no K matrix in a product of K blocks"));
}

#[inline(always)]
fn k_quantized<Q: KQuant>(w: &Matrix<'_>, groups: Range<usize>, x: &[QBlockK], n: usize, out: &mut [f32]) {
    let row = k_blocks_per_row(w.cols());
    for (g, group) in groups.enumerate() {
        for t in 0..n {
            let out = &mut out[(g * n + t) * ROW_GROUP..][..ROW_GROUP];
            out.fill(0.0);
            for (tile, x) in w.group(group).chunks_exact(Q::TILE_BYTES).zip(&x[t * row..][..row]) {
                for (r, acc) in out.iter_mut().enumerate() {
                    *acc = kquant::step::<Q>(tile, r, x, *acc);
                }
            }
        }
    }
}
