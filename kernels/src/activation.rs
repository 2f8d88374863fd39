//! Activation rows as the products take them: blocks of 32 or 256 int8 with a scale and sums, or plain f32. `ops::quantize`
//! fills the blocks, the matrix kernels read them.

use crate::format::{BLOCK, TILE_K};
use crate::kquant::SUPER_BLOCK;

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

/// 256 activations, `x ≈ d * q`, for the K formats.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(16))]
pub struct QBlockK {
    /// Values in [-127, 127].
    pub q: [i8; SUPER_BLOCK],
    /// Exact sum of each 16 of `q`.
    pub sums: [i16; SUPER_BLOCK / 16],
    /// Scale; 0 for a block whose largest magnitude is below 2^-100.
    pub d: f32,
}

impl Default for QBlockK {
    fn default() -> Self {
        Self { q: [0; SUPER_BLOCK], sums: [0; SUPER_BLOCK / 16], d: 0.0 }
    }
}

const _: () = assert!(size_of::<QBlockK>() == 304);

/// `n` activation rows back to back, matching a matrix of `cols` columns.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// For a quantized format: `n × blocks_per_row(cols)` blocks, those past `cols` zero.
    Quantized(&'a [QBlock]),
    /// For a K format: `n × k_blocks_per_row(cols)` blocks.
    QuantizedK(&'a [QBlockK]),
    /// For a dense format: `n × padded_cols(cols)` values, those past `cols` zero.
    Dense(&'a [f32]),
}

/// Blocks in a quantized activation row of `cols` values: `2 * ceil(cols / 64)`.
pub const fn blocks_per_row(cols: usize) -> usize {
    cols.div_ceil(TILE_K) * (TILE_K / BLOCK)
}

/// Blocks in a row of `cols` values for a K format, whose `cols` are a multiple of 256.
pub const fn k_blocks_per_row(cols: usize) -> usize {
    cols / SUPER_BLOCK
}

/// Length of a dense activation row of `cols` values: `cols` rounded up to a multiple of 64.
pub const fn padded_cols(cols: usize) -> usize {
    cols.div_ceil(TILE_K) * TILE_K
}
