//! Activation rows as the products take them: blocks of 32 int8 with a scale and a sum, or plain f32. `ops::quantize`
//! fills the blocks, the matrix kernels read them.

use crate::format::{BLOCK, TILE_K};

/// 32 activations, `x ≈ d * q`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(16))]
pub struct QBlock {
    /// Values in [-127, 127].
    pub q: [i8; 32],
    /// Scale; 0 for a block whose largest magnitude is below 2^-100.
    pub d: f32,
    /// `d * sum`, the factor of a minimum; beside `d`, so that one load gives both.
    pub d_sum: f32,
    /// Exact sum of `q`.
    pub sum: i32,
}

const _: () = assert!(size_of::<QBlock>() == 48 && BLOCK == 32);

/// `n` activation rows back to back, matching a matrix of `cols` columns.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// For a quantized format: `n × blocks_per_row(cols)` blocks, those past `cols` zero.
    Quantized(&'a [QBlock]),
    /// For a dense format: `n × padded_cols(cols)` values, those past `cols` zero.
    Dense(&'a [f32]),
}

/// Blocks in a quantized activation row of `cols` values: `2 * ceil(cols / 64)`.
pub const fn blocks_per_row(cols: usize) -> usize {
    cols.div_ceil(TILE_K) * (TILE_K / BLOCK)
}

/// Length of a dense activation row of `cols` values: `cols` rounded up to a multiple of 64.
pub const fn padded_cols(cols: usize) -> usize {
    cols.div_ceil(TILE_K) * TILE_K
}
