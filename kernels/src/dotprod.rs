//! The dotprod set, for AArch64 CPUs with the dot product instructions (Cortex-A76, A78AE and later): NEON's lanes and vector
//! operations, and quantized products with `sdot` in `dotprod/product.rs` and `dotprod/pass.rs`.

use std::ops::Range;

use crate::activation::QBlock;
use crate::dispatch::simd_set;
use crate::matrix::Matrix;
use crate::neon::Neon;

mod loads;
mod pass;
mod product;

simd_set! {
    /// For AArch64 CPUs with dotprod.
    pub(crate) static DOTPROD = "dotprod" for Neon, features(#[target_feature(enable = "neon,dotprod")]), product::product, product::product_k;
}

/// What this CPU misses of the set.
pub(crate) fn missing_feature() -> Option<&'static str> {
    (!std::arch::is_aarch64_feature_detected!("dotprod")).then_some("the dotprod instructions")
}
