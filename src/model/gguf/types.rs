//! The element types of tensors: GGML's, with id, name, values and bytes a block, and the tiles of a packed model.
//! Next on the data's way: the parser checks tensor sizes with it, the model decides which types it can load.

use hearth_kernels::Format;

/// Type ids of a packed model's matrices: this plus the id of the GGML type whose values the tiles hold. GGML numbers its types from
/// 0 and readers refuse ids past their own list, so no other program takes tiles for rows.
pub const TILED_IDS: u32 = 0x4845_0000;

macro_rules! ggml_types {
    ($($id:literal $variant:ident $name:literal $block:literal $bytes:literal;)*) => {
        /// A GGML tensor type, as numbered in GGUF files.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum GgmlType {
            $(#[doc = concat!("`", $name, "`: ", $block, " values in ", $bytes, " bytes")] $variant,)*
            /// R16K4 tiles of a format that has kernels: [`TILED_IDS`] plus its own id.
            Tiled(Format),
            /// An id that is not in the table: shown by `inspect`, refused when its weights are loaded.
            Unknown(u32),
        }

        impl GgmlType {
            /// Every type in the table, by id.
            pub const KNOWN: &'static [GgmlType] = &[$(GgmlType::$variant),*];

            /// The type with this id.
            pub fn from_u32(id: u32) -> Self {
                match id {
                    $($id => Self::$variant,)*
                    other => Self::tiled_from_u32(other).unwrap_or(Self::Unknown(other)),
                }
            }

            /// The id in GGUF files.
            pub fn id(self) -> u32 {
                match self {
                    $(Self::$variant => $id,)*
                    Self::Tiled(format) => TILED_IDS + Self::of(format).id(),
                    Self::Unknown(id) => id,
                }
            }

            /// The name as the field writes it, upper case (`Q4_K`); `R16K4` for tiles, `unknown` for an id not in the table.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Tiled(_) => "R16K4",
                    Self::Unknown(_) => "unknown",
                }
            }

            /// Values in a block of a row; 0 for an unknown type.
            pub fn block_size(self) -> u64 {
                match self {
                    $(Self::$variant => $block,)*
                    Self::Tiled(format) => Self::of(format).block_size(),
                    Self::Unknown(_) => 0,
                }
            }

            /// Bytes in a block; 0 for an unknown type and for tiles, which pad whole matrices.
            pub fn type_size(self) -> u64 {
                match self {
                    $(Self::$variant => $bytes,)*
                    Self::Tiled(_) | Self::Unknown(_) => 0,
                }
            }
        }
    };
}

ggml_types! {
    0 F32 "F32" 1 4;
    1 F16 "F16" 1 2;
    2 Q4_0 "Q4_0" 32 18;
    3 Q4_1 "Q4_1" 32 20;
    4 Q4_2 "Q4_2" 16 10;
    5 Q4_3 "Q4_3" 16 12;
    6 Q5_0 "Q5_0" 32 22;
    7 Q5_1 "Q5_1" 32 24;
    8 Q8_0 "Q8_0" 32 34;
    9 Q8_1 "Q8_1" 32 36;
    10 Q2_K "Q2_K" 256 84;
    11 Q3_K "Q3_K" 256 110;
    12 Q4_K "Q4_K" 256 144;
    13 Q5_K "Q5_K" 256 176;
    14 Q6_K "Q6_K" 256 210;
    15 Q8_K "Q8_K" 256 292;
    16 IQ2_XXS "IQ2_XXS" 256 66;
    17 IQ2_XS "IQ2_XS" 256 74;
    18 IQ3_XXS "IQ3_XXS" 256 98;
    19 IQ1_S "IQ1_S" 256 50;
    20 IQ4_NL "IQ4_NL" 32 18;
    21 IQ3_S "IQ3_S" 256 110;
    22 IQ2_S "IQ2_S" 256 82;
    23 IQ4_XS "IQ4_XS" 256 136;
    24 I8 "I8" 1 1;
    25 I16 "I16" 1 2;
    26 I32 "I32" 1 4;
    27 I64 "I64" 1 8;
    28 F64 "F64" 1 8;
    29 IQ1_M "IQ1_M" 256 56;
    30 BF16 "BF16" 1 2;
    31 Q4_0_4_4 "Q4_0_4_4" 32 18;
    32 Q4_0_4_8 "Q4_0_4_8" 32 18;
    33 Q4_0_8_8 "Q4_0_8_8" 32 18;
    34 TQ1_0 "TQ1_0" 256 54;
    35 TQ2_0 "TQ2_0" 256 66;
    36 IQ4_NL_4_4 "IQ4_NL_4_4" 32 18;
    37 IQ4_NL_4_8 "IQ4_NL_4_8" 32 18;
    38 IQ4_NL_8_8 "IQ4_NL_8_8" 32 18;
    39 MXFP4 "MXFP4" 32 17;
    40 NVFP4 "NVFP4" 64 36;
    41 Q1_0 "Q1_0" 128 18;
    42 Q2_0 "Q2_0" 64 18;
}

impl GgmlType {
    /// The GGML type of a kernel format, found by its name.
    pub fn of(format: Format) -> Self {
        let named = |known: &&Self| known.name() == format.name();
        Self::KNOWN.iter().find(named).copied().unwrap_or(Self::Unknown(u32::MAX))
    }

    /// The kernel format of this type's values, in rows or in tiles; `None` where no kernel reads it.
    pub fn format(self) -> Option<Format> {
        match self {
            Self::Tiled(format) => Some(format),
            rows => Format::ALL.into_iter().find(|format| format.name() == rows.name()),
        }
    }

    fn tiled_from_u32(id: u32) -> Option<Self> {
        let rows = id.checked_sub(TILED_IDS)?;
        let known = Self::KNOWN.iter().find(|known| known.id() == rows)?;
        known.format().map(Self::Tiled)
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tiled(format) => write!(f, "R16K4 {}", format.name()),
            Self::Unknown(id) => write!(f, "unknown({id})"),
            known => f.write_str(known.name()),
        }
    }
}
