//! Weight formats and the geometry of a tile (of the K formats: `kquant`). `pack` writes tiles by these numbers, `matrix` and the kernels read them.

use crate::kquant::{KQuant, Q4K, Q5K, Q6K, SUPER_BLOCK};

/// Rows in a row group, the height of a tile.
pub const ROW_GROUP: usize = 16;
/// Columns in a tile.
pub const TILE_K: usize = 64;
/// Columns in a quantization block, of weights and of activations.
pub const BLOCK: usize = 32;
/// Blocks along a tile's row.
pub(crate) const TILE_BLOCKS: usize = TILE_K / BLOCK;

/// How a matrix's numbers are stored; the names and source layouts are GGML's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
    /// Blocks of 32: f16 scale, 32 × i8.
    Q8_0,
    /// Blocks of 32: f16 scale, 32 × 4 bits less 8.
    Q4_0,
    /// Blocks of 32: f16 scale, f16 minimum, 32 × 4 bits.
    Q4_1,
    /// Blocks of 32: f16 scale, 32 × 5 bits less 16.
    Q5_0,
    /// Blocks of 32: f16 scale, f16 minimum, 32 × 5 bits.
    Q5_1,
    /// Blocks of 256: f16 scale and minimum, both times 6 bits for each 32, 256 × 4 bits.
    Q4K,
    /// Blocks of 256: f16 scale and minimum, both times 6 bits for each 32, 256 × 5 bits.
    Q5K,
    /// Blocks of 256: f16 scale times an i8 for each 16, 256 × 6 bits less 32.
    Q6K,
}

/// In which form a product takes its activations, see [`crate::Rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowKind {
    /// f32.
    Dense,
    /// Blocks of 32.
    Quantized,
    /// Blocks of 256.
    QuantizedK,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// GGML's name of the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Which activations products with this format take.
    pub fn row_kind(self) -> RowKind {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => RowKind::Dense,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => RowKind::Quantized,
            Self::Q4K | Self::Q5K | Self::Q6K => RowKind::QuantizedK,
        }
    }

    /// Values in one block; rows are whole blocks.
    pub fn block_cols(self) -> usize {
        match self.row_kind() {
            RowKind::Dense => 1,
            RowKind::Quantized => BLOCK,
            RowKind::QuantizedK => SUPER_BLOCK,
        }
    }

    /// Columns in a tile.
    pub fn tile_cols(self) -> usize {
        if self.row_kind() == RowKind::QuantizedK { SUPER_BLOCK } else { TILE_K }
    }

    /// Bytes of one GGUF row of `cols` values; `cols` must be a multiple of [`Format::block_cols`] (a partial block is not
    /// counted). Saturates at `usize::MAX`.
    pub fn source_row_bytes(self, cols: usize) -> usize {
        (cols / self.block_cols()).saturating_mul(self.source_block_bytes())
    }

    /// Bytes of one packed tile, [`ROW_GROUP`] rows × [`Format::tile_cols`] columns; a multiple of 64.
    pub fn tile_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * ROW_GROUP * TILE_K,
            Self::F16 | Self::Bf16 => 2 * ROW_GROUP * TILE_K,
            Self::Q8_0 => <Q8_0 as Quant>::TILE_BYTES,
            Self::Q4_0 => <Q4_0 as Quant>::TILE_BYTES,
            Self::Q4_1 => <Q4_1 as Quant>::TILE_BYTES,
            Self::Q5_0 => <Q5_0 as Quant>::TILE_BYTES,
            Self::Q5_1 => <Q5_1 as Quant>::TILE_BYTES,
            Self::Q4K => <Q4K as KQuant>::TILE_BYTES,
            Self::Q5K => <Q5K as KQuant>::TILE_BYTES,
            Self::Q6K => <Q6K as KQuant>::TILE_BYTES,
        }
    }

    /// Bytes of one GGUF block of [`Format::block_cols`] values.
    fn source_block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 2 + 32,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 2 + 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 2 + 2 + 4 + 16,
            Self::Q4K => Q4K::SOURCE_BYTES,
            Self::Q5K => Q5K::SOURCE_BYTES,
            Self::Q6K => Q6K::SOURCE_BYTES,
        }
    }
}

/// Bytes of a packed `rows` × `cols` matrix: rows padded to [`ROW_GROUP`], columns to [`Format::tile_cols`]. `None` on overflow.
pub fn packed_bytes(format: Format, rows: usize, cols: usize) -> Option<usize> {
    rows.div_ceil(ROW_GROUP).checked_mul(cols.div_ceil(format.tile_cols()))?.checked_mul(format.tile_bytes())
}

/// A quantized format as constants, so that a kernel is compiled once per format. A tile is, in this order: scales
/// `[2 blocks][16 rows]` f16, minimums likewise (if any), high bits `[2 blocks][64]` (5-bit formats), vectors
/// `[2 blocks][BLOCK_VECTORS][64]`.
///
/// Vector `j`, bytes `4r..4r+4` belong to row `r`. With 8 bits they are values `4j..4j+4`; otherwise the low nibbles are
/// values `4j..4j+4`, the high nibbles values `16+4j..16+4j+4`. The byte of high bits at `4r+b` holds, in bit `j`, the
/// fifth bit of value `4j+b` and, in bit `4+j`, that of value `16+4j+b`: one shift and one mask put it where it belongs.
pub(crate) trait Quant {
    /// Bits of a stored number: 4, 5 or 8.
    const BITS: u32;
    /// What is subtracted from a stored number; 8-bit numbers are signed instead.
    const OFFSET: i32;
    /// Whether blocks have a minimum.
    const HAS_MIN: bool;
    /// Byte offset of the minimums (where the format has them).
    const MIN_AT: usize = TILE_BLOCKS * ROW_GROUP * 2;
    /// Byte offset of the high bits (where the format has them).
    const HIGH_AT: usize = Self::MIN_AT * if Self::HAS_MIN { 2 } else { 1 };
    /// Byte offset of the vectors.
    const DATA_AT: usize = Self::HIGH_AT + if Self::BITS == 5 { TILE_BLOCKS * 64 } else { 0 };
    /// 64-byte vectors a block.
    const BLOCK_VECTORS: usize = if Self::BITS == 8 { 8 } else { 4 };
    /// Bytes of a tile.
    const TILE_BYTES: usize = Self::DATA_AT + TILE_BLOCKS * Self::BLOCK_VECTORS * 64;
}

macro_rules! quant {
    ($($name:ident: $bits:expr, $offset:expr, $min:expr, $tile:expr;)*) => {$(
        #[doc = concat!("[`Format::", stringify!($name), "`] as a type.")]
        #[allow(non_camel_case_types)] // GGML's names
        pub(crate) struct $name;
        impl Quant for $name {
            const BITS: u32 = $bits;
            const OFFSET: i32 = $offset;
            const HAS_MIN: bool = $min;
        }
        const _: () = assert!($name::TILE_BYTES == $tile);
    )*};
}

quant! {
    Q8_0: 8, 0, false, 1088;
    Q4_0: 4, 8, false, 576;
    Q4_1: 4, 0, true, 640;
    Q5_0: 5, 16, false, 704;
    Q5_1: 5, 0, true, 768;
}

/// Calls `$f::<Q>($($arg),*)` with the type of a `$format` in blocks of 32; evaluates `$other` otherwise.
macro_rules! for_quant {
    ($format:expr, $f:ident ( $($arg:expr),* ), $other:expr) => {
        match $format {
            $crate::format::Format::Q8_0 => $f::<$crate::format::Q8_0>($($arg),*),
            $crate::format::Format::Q4_0 => $f::<$crate::format::Q4_0>($($arg),*),
            $crate::format::Format::Q4_1 => $f::<$crate::format::Q4_1>($($arg),*),
            $crate::format::Format::Q5_0 => $f::<$crate::format::Q5_0>($($arg),*),
            $crate::format::Format::Q5_1 => $f::<$crate::format::Q5_1>($($arg),*),
            _ => $other,
        }
    };
}
pub(crate) use for_quant;

/// Calls `$f::<Q>($($arg),*)` with the type of a K `$format`; evaluates `$other` otherwise.
macro_rules! for_kquant {
    ($format:expr, $f:ident ( $($arg:expr),* ), $other:expr) => {
        match $format {
            $crate::format::Format::Q4K => $f::<$crate::kquant::Q4K>($($arg),*),
            $crate::format::Format::Q5K => $f::<$crate::kquant::Q5K>($($arg),*),
            $crate::format::Format::Q6K => $f::<$crate::kquant::Q6K>($($arg),*),
            _ => $other,
        }
    };
}
pub(crate) use for_kquant;
