//! GGUF rows into R16K4 tiles, 16 rows at a time. What comes out is read through `matrix::Matrix`.

use half::{bf16, f16};

use crate::format::{BLOCK, Format, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Quant, ROW_GROUP, TILE_BLOCKS};
use crate::kquant::{self, Q4K, Q5K, Q6K};

/// Magnitudes below this are stored as zero, so that no denormal is born in a product: 2^-100.
const FLUSH_BELOW: f32 = 7.888_609e-31;

/// Why a row group cannot be packed.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum PackError {
    /// Not 1 to 16 rows.
    #[error("{rows} rows in a row group; 1 to 16 are possible")]
    Rows {
        /// Rows given.
        rows: usize,
    },
    /// A quantized row is not whole blocks.
    #[error("{cols} columns of {}: a row must be a multiple of {}", format.name(), format.block_cols())]
    Columns {
        /// Format asked for.
        format: Format,
        /// Columns given.
        cols: usize,
    },
    /// The source is not `rows` rows long.
    #[error("source has {have} bytes, {rows} rows need {need}")]
    SourceLength {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
        /// Rows given.
        rows: usize,
    },
    /// The output is not one row group long.
    #[error("output has {have} bytes, a row group needs {need}")]
    OutputLength {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// A block's scale or minimum is NaN or infinite.
    #[error("row {row}, block {block}: its {what} is {value}, a finite number is needed")]
    BlockNotFinite {
        /// Row within the group.
        row: usize,
        /// Block within the row.
        block: usize,
        /// "scale" or "minimum".
        what: &'static str,
        /// What was found.
        value: f32,
    },
    /// A dense value is NaN or infinite.
    #[error("row {row}, column {col}: {value} is not finite")]
    ValueNotFinite {
        /// Row within the group.
        row: usize,
        /// Column.
        col: usize,
        /// What was found.
        value: f32,
    },
}

/// Packs `rows` (1 to 16) consecutive GGUF rows of `cols` values into one row group, `ceil(cols / 64)` tiles; missing rows
/// and columns become zeros. `src` is `rows × source_row_bytes(cols)` bytes, `out` `packed_bytes(format, 16, cols)`.
pub fn pack_row_group(format: Format, src: &[u8], rows: usize, cols: usize, out: &mut [u8]) -> Result<(), PackError> {
    if rows == 0 || rows > ROW_GROUP {
        return Err(PackError::Rows { rows });
    }
    if !cols.is_multiple_of(format.block_cols()) {
        return Err(PackError::Columns { format, cols });
    }
    let row_bytes = format.source_row_bytes(cols);
    let need = row_bytes.saturating_mul(rows);
    if src.len() != need {
        return Err(PackError::SourceLength { have: src.len(), need, rows });
    }
    let need = cols.div_ceil(format.tile_cols()).saturating_mul(format.tile_bytes());
    if out.len() != need {
        return Err(PackError::OutputLength { have: out.len(), need });
    }
    out.fill(0);
    if row_bytes == 0 {
        return Ok(());
    }
    for (row, src) in src.chunks_exact(row_bytes).enumerate() {
        match format {
            Format::F32 => pack_dense(src, row, out, f32::from_le_bytes)?,
            Format::F16 => pack_dense(src, row, out, |b| f16::from_le_bytes(b).to_f32())?,
            Format::Bf16 => pack_dense(src, row, out, |b| bf16::from_le_bytes(b).to_f32())?,
            Format::Q8_0 => pack_quant::<Q8_0>(src, row, out)?,
            Format::Q4_0 => pack_quant::<Q4_0>(src, row, out)?,
            Format::Q4_1 => pack_quant::<Q4_1>(src, row, out)?,
            Format::Q5_0 => pack_quant::<Q5_0>(src, row, out)?,
            Format::Q5_1 => pack_quant::<Q5_1>(src, row, out)?,
            Format::Q4K => kquant::pack_row::<Q4K>(src, row, out)?,
            Format::Q5K => kquant::pack_row::<Q5K>(src, row, out)?,
            Format::Q6K => kquant::pack_row::<Q6K>(src, row, out)?,
        }
    }
    Ok(())
}

fn pack_dense<const N: usize>(
    src: &[u8],
    row: usize,
    out: &mut [u8],
    value: impl Fn([u8; N]) -> f32,
) -> Result<(), PackError> {
    let (out, _) = out.as_chunks_mut::<N>();
    for (col, bytes) in src.as_chunks::<N>().0.iter().enumerate() {
        let value = value(*bytes);
        if !value.is_finite() {
            return Err(PackError::ValueNotFinite { row, col, value });
        }
        if value.abs() >= FLUSH_BELOW {
            out[col * ROW_GROUP + row] = *bytes;
        }
    }
    Ok(())
}

fn pack_quant<Q: Quant>(src: &[u8], row: usize, out: &mut [u8]) -> Result<(), PackError> {
    let header = if Q::HAS_MIN { 4 } else { 2 };
    let high_bytes = if Q::BITS == 5 { 4 } else { 0 };
    let block_bytes = header + high_bytes + if Q::BITS == 8 { 32 } else { 16 };
    for (block, src) in src.chunks_exact(block_bytes).enumerate() {
        let tile = &mut out[block / TILE_BLOCKS * Q::TILE_BYTES..][..Q::TILE_BYTES];
        let in_tile = block % TILE_BLOCKS;
        let table = (in_tile * ROW_GROUP + row) * 2;
        let finite = |what, bytes: [u8; 2]| {
            let value = f16::from_le_bytes(bytes).to_f32();
            if value.is_finite() { Ok(bytes) } else { Err(PackError::BlockNotFinite { row, block, what, value }) }
        };
        tile[table..table + 2].copy_from_slice(&finite("scale", [src[0], src[1]])?);
        if Q::HAS_MIN {
            let at = Q::MIN_AT + table;
            tile[at..at + 2].copy_from_slice(&finite("minimum", [src[2], src[3]])?);
        }
        if Q::BITS == 5 {
            let high = u32::from_le_bytes([src[header], src[header + 1], src[header + 2], src[header + 3]]);
            let at = Q::HIGH_AT + in_tile * 64 + 4 * row;
            for k in 0..BLOCK {
                let (j, half, b) = ((k % 16) / 4, k / 16, k % 4);
                tile[at + b] |= ((high >> k & 1) as u8) << (4 * half + j);
            }
        }
        let data = &mut tile[Q::DATA_AT + in_tile * Q::BLOCK_VECTORS * 64..];
        for (j, four) in src[header + high_bytes..].chunks_exact(4).enumerate() {
            data[j * 64 + 4 * row..][..4].copy_from_slice(four);
        }
    }
    Ok(())
}
