//! A checked view of packed weights. `dispatch` hands it to the kernels, which rely on what `Matrix::new` proved.

use half::{bf16, f16};

use crate::format::{BLOCK, Format, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Quant, ROW_GROUP, packed_bytes};
use crate::kquant::{Q4K, Q5K, Q6K, unpack_tile};

/// Alignment of packed tiles, bytes.
const TILE_ALIGN: usize = 64;

/// Packed weights: `ceil(rows / 16)` row groups, each `ceil(cols / 64)` tiles, back to back.
///
/// Invariant: `tiles` is 64-byte aligned and exactly `packed_bytes(format, rows, cols)` long.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    tiles: &'a [u8],
}

/// Why bytes cannot be a matrix of the stated shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Shape too large for this address space.
    #[error("a {rows} x {cols} matrix does not fit the address space")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// A quantized row is not whole blocks.
    #[error("{cols} columns of {}: a row must be a multiple of {}", format.name(), format.block_cols())]
    Columns {
        /// Format asked for.
        format: Format,
        /// Columns asked for.
        cols: usize,
    },
    /// Wrong number of bytes.
    #[error("packed matrix has {have} bytes, its shape needs {need}")]
    Length {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// The bytes do not start on a 64-byte boundary.
    #[error("packed matrix starts {offset} bytes past a 64-byte boundary")]
    Alignment {
        /// Distance from the boundary below, bytes.
        offset: usize,
    },
}

impl<'a> Matrix<'a> {
    /// Checks length and alignment of `tiles` against the shape.
    pub fn new(format: Format, rows: usize, cols: usize, tiles: &'a [u8]) -> Result<Self, ShapeError> {
        if !cols.is_multiple_of(format.block_cols()) {
            return Err(ShapeError::Columns { format, cols });
        }
        let need = packed_bytes(format, rows, cols).ok_or(ShapeError::TooLarge { rows, cols })?;
        if tiles.len() != need {
            return Err(ShapeError::Length { have: tiles.len(), need });
        }
        let offset = tiles.as_ptr().addr() % TILE_ALIGN;
        if offset != 0 {
            return Err(ShapeError::Alignment { offset });
        }
        Ok(Self { format, rows, cols, tiles })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Storage format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The packed bytes, row group after row group.
    pub fn tiles(&self) -> &'a [u8] {
        self.tiles
    }

    /// Groups of 16 rows, the last one possibly padded.
    pub fn row_groups(&self) -> usize {
        self.rows.div_ceil(ROW_GROUP)
    }

    /// Tiles along a row group.
    pub(crate) fn tiles_per_group(&self) -> usize {
        self.cols.div_ceil(self.format.tile_cols())
    }

    /// The tiles of one row group, `tiles_per_group() × tile_bytes()` bytes.
    pub(crate) fn group(&self, group: usize) -> &'a [u8] {
        let bytes = self.tiles_per_group() * self.format.tile_bytes();
        &self.tiles[group * bytes..(group + 1) * bytes]
    }

    /// Writes row `row` as f32, `cols` values: the numbers a GGUF dequantizer gives.
    ///
    /// # Panics
    /// If `row >= rows` or `out.len() != cols`.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "unpack_row: output length");
        let tiles = self.group(row / ROW_GROUP).chunks_exact(self.format.tile_bytes());
        for (tile, out) in tiles.zip(out.chunks_mut(self.format.tile_cols())) {
            let r = row % ROW_GROUP;
            match self.format {
                Format::F32 => unpack_dense(tile, r, out, f32::from_le_bytes),
                Format::F16 => unpack_dense(tile, r, out, |b| f16::from_le_bytes(b).to_f32()),
                Format::Bf16 => unpack_dense(tile, r, out, |b| bf16::from_le_bytes(b).to_f32()),
                Format::Q8_0 => unpack_quant::<Q8_0>(tile, r, out),
                Format::Q4_0 => unpack_quant::<Q4_0>(tile, r, out),
                Format::Q4_1 => unpack_quant::<Q4_1>(tile, r, out),
                Format::Q5_0 => unpack_quant::<Q5_0>(tile, r, out),
                Format::Q5_1 => unpack_quant::<Q5_1>(tile, r, out),
                Format::Q4K => unpack_tile::<Q4K>(tile, r, out),
                Format::Q5K => unpack_tile::<Q5K>(tile, r, out),
                Format::Q6K => unpack_tile::<Q6K>(tile, r, out),
            }
        }
    }
}

fn unpack_dense<const N: usize>(tile: &[u8], r: usize, out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (values, _) = tile.as_chunks::<N>();
    for (column, o) in values.chunks_exact(ROW_GROUP).zip(out) {
        *o = value(column[r]);
    }
}

fn unpack_quant<Q: Quant>(tile: &[u8], r: usize, out: &mut [f32]) {
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let d = tile_f16(tile, 0, block, r);
        let m = if Q::HAS_MIN { tile_f16(tile, Q::MIN_AT, block, r) } else { 0.0 };
        for (k, o) in out.iter_mut().enumerate() {
            let w = tile_value::<Q>(tile, block, r, k) as f32;
            *o = if Q::HAS_MIN { w * d + m } else { w * d };
        }
    }
}

/// Row `r`'s f16 of `block` in the table (scales or minimums) at byte `at`.
pub(crate) fn tile_f16(tile: &[u8], at: usize, block: usize, r: usize) -> f32 {
    let at = at + (block * ROW_GROUP + r) * 2;
    f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32_const()
}

/// Value `k` of row `r` in `block`, offset subtracted.
pub(crate) fn tile_value<Q: Quant>(tile: &[u8], block: usize, r: usize, k: usize) -> i32 {
    let vectors = &tile[Q::DATA_AT + block * Q::BLOCK_VECTORS * 64..];
    if Q::BITS == 8 {
        return i32::from(vectors[(k / 4) * 64 + 4 * r + k % 4].cast_signed());
    }
    let (j, half, b) = ((k % 16) / 4, k / 16, k % 4);
    let mut w = vectors[j * 64 + 4 * r + b] >> (4 * half) & 15;
    if Q::BITS == 5 {
        w |= (tile[Q::HIGH_AT + block * 64 + 4 * r + b] >> (4 * half + j) & 1) << 4;
    }
    i32::from(w) - Q::OFFSET
}
