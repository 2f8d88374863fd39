//! Weight formats and the geometry of a tile. `pack` writes tiles by these numbers, `matrix` and the kernels read them.

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
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1];

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
        }
    }

    /// Whether products with this format take [`crate::Rows::Quantized`] (else [`crate::Rows::Dense`]).
    pub fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bytes of one GGUF row of `cols` values; a quantized format needs `cols` to be a multiple of [`BLOCK`] (a partial
    /// block is not counted). Saturates at `usize::MAX`.
    pub fn source_row_bytes(self, cols: usize) -> usize {
        match self.source_block_bytes() {
            Some(bytes) => (cols / BLOCK).saturating_mul(bytes),
            None => cols.saturating_mul(self.dense_value_bytes()),
        }
    }

    /// Bytes of one packed tile, [`ROW_GROUP`] rows × [`TILE_K`] columns; a multiple of 64.
    pub fn tile_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * ROW_GROUP * TILE_K,
            Self::F16 | Self::Bf16 => 2 * ROW_GROUP * TILE_K,
            Self::Q8_0 => <Q8_0 as Quant>::TILE_BYTES,
            Self::Q4_0 => <Q4_0 as Quant>::TILE_BYTES,
            Self::Q4_1 => <Q4_1 as Quant>::TILE_BYTES,
            Self::Q5_0 => <Q5_0 as Quant>::TILE_BYTES,
            Self::Q5_1 => <Q5_1 as Quant>::TILE_BYTES,
        }
    }

    /// Bytes of one GGUF block of 32 values; `None` for a dense format.
    pub(crate) fn source_block_bytes(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => None,
            Self::Q8_0 => Some(2 + 32),
            Self::Q4_0 => Some(2 + 16),
            Self::Q4_1 => Some(2 + 2 + 16),
            Self::Q5_0 => Some(2 + 4 + 16),
            Self::Q5_1 => Some(2 + 2 + 4 + 16),
        }
    }

    /// Bytes of one value of a dense format.
    pub(crate) fn dense_value_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// Bytes of a packed `rows` × `cols` matrix: rows padded to [`ROW_GROUP`], columns to [`TILE_K`]. `None` on overflow.
pub fn packed_bytes(format: Format, rows: usize, cols: usize) -> Option<usize> {
    rows.div_ceil(ROW_GROUP).checked_mul(cols.div_ceil(TILE_K))?.checked_mul(format.tile_bytes())
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

/// Calls `$f::<Q>($($arg),*)` with the type of a quantized `$format`; evaluates `$dense` otherwise.
macro_rules! for_quant {
    ($format:expr, $f:ident ( $($arg:expr),* ), $dense:expr) => {
        match $format {
            $crate::format::Format::Q8_0 => $f::<$crate::format::Q8_0>($($arg),*),
            $crate::format::Format::Q4_0 => $f::<$crate::format::Q4_0>($($arg),*),
            $crate::format::Format::Q4_1 => $f::<$crate::format::Q4_1>($($arg),*),
            $crate::format::Format::Q5_0 => $f::<$crate::format::Q5_0>($($arg),*),
            $crate::format::Format::Q5_1 => $f::<$crate::format::Q5_1>($($arg),*),
            $crate::format::Format::F32 | $crate::format::Format::F16 | $crate::format::Format::Bf16 => $dense,
        }
    };
}
pub(crate) use for_quant;
