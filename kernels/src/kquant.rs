//! K-quant formats: super-blocks of 256 values with small integer scales inside, their tiles, and the specification of their
//! product. `pack` and `matrix` call what is here for these formats; `kproduct` (x86-64) and `neon/krows.rs` are the fast products over
//! the same tiles.

use half::f16;

use crate::activation::QBlockK;
use crate::format::ROW_GROUP;
use crate::pack::PackError;

/// Values in a super-block, columns in a tile of a K format.
pub const SUPER_BLOCK: usize = 256;
/// Groups of 32 values in a super-block; in a tile each lies as a block of the 4-bit formats does.
pub(crate) const GROUPS: usize = 8;
/// Bytes of the nibbles of one group, `[4 vectors][16 rows][4 values]`.
pub(crate) const NIBBLE_BYTES: usize = 256;

/// One K format as constants. A tile is 16 rows × 256 columns, in this order:
///
/// | part | Q4_K, Q5_K | Q6_K |
/// |---|---|---|
/// | `d` | `[16]` f16 | `[16]` f16, then 32 zeros |
/// | `dmin` | `[16]` f16 | – |
/// | scales | `[8 groups][16]` u8 | `[16 halves of groups][16]` i8 |
/// | minimums | `[8 groups][16]` u8 | – |
/// | high bits | Q5_K: `[8 groups][64]` | `[8 groups][2 halves][64]` |
/// | nibbles | `[8 groups][4 vectors][64]` | the same |
///
/// Nibbles lie as in the other 4-bit formats: byte `4r + b` of vector `j` holds values `4j + b` (low) and `16 + 4j + b` (high) of the
/// group. Q5_K's high bits as Q5_0's. Q6_K's: byte `4r + b` of half `h` holds, in bits `2j` and `2j + 1`, those of value
/// `16h + 4j + b`.
pub(crate) trait KQuant {
    /// Bits of a stored number: 4, 5 or 6.
    const BITS: u32;
    /// Whether there are minimums (else numbers are less 32).
    const HAS_MIN: bool = Self::BITS != 6;
    /// Bytes of a super-block in GGUF.
    const SOURCE_BYTES: usize;
    /// Byte offset of the scales.
    const SCALE_AT: usize = 64;
    /// Values that share a scale.
    const SCALE_VALUES: usize = if Self::HAS_MIN { 32 } else { 16 };
    /// Byte offset of the minimums (where there are any).
    const MIN_AT: usize = Self::SCALE_AT + SUPER_BLOCK / Self::SCALE_VALUES * ROW_GROUP;
    /// Byte offset of the high bits (where there are any).
    const HIGH_AT: usize = Self::MIN_AT + if Self::HAS_MIN { GROUPS * ROW_GROUP } else { 0 };
    /// Bytes of high bits a group.
    const HIGH_BYTES: usize = 64 * (Self::BITS as usize - 4);
    /// Byte offset of the nibbles.
    const NIBBLES_AT: usize = Self::HIGH_AT + GROUPS * Self::HIGH_BYTES;
    /// Bytes of a tile.
    const TILE_BYTES: usize = Self::NIBBLES_AT + GROUPS * NIBBLE_BYTES;
    /// A super-block of GGUF, read: numbers as stored, scales and minimums.
    fn read(block: &[u8]) -> SuperBlock;
}

/// A super-block as GGUF stores it, unpacked.
pub(crate) struct SuperBlock {
    d: [u8; 2],
    dmin: [u8; 2],
    /// One for every `SCALE_VALUES`; bytes of an i8 for Q6_K.
    scales: [u8; 16],
    mins: [u8; 8],
    values: [u8; SUPER_BLOCK],
}

/// [`crate::Format::Q4K`] as a type.
pub(crate) struct Q4K;
/// [`crate::Format::Q5K`] as a type.
pub(crate) struct Q5K;
/// [`crate::Format::Q6K`] as a type.
pub(crate) struct Q6K;

impl KQuant for Q4K {
    const BITS: u32 = 4;
    const SOURCE_BYTES: usize = 144;

    fn read(block: &[u8]) -> SuperBlock {
        let mut out = read_scales(block);
        for (k, value) in out.values.iter_mut().enumerate() {
            *value = block[16 + k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
        }
        out
    }
}

impl KQuant for Q5K {
    const BITS: u32 = 5;
    const SOURCE_BYTES: usize = 176;

    fn read(block: &[u8]) -> SuperBlock {
        let mut out = read_scales(block);
        for (k, value) in out.values.iter_mut().enumerate() {
            let nibble = block[48 + k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
            *value = nibble | (block[16 + k % 32] >> (k / 32) & 1) << 4;
        }
        out
    }
}

impl KQuant for Q6K {
    const BITS: u32 = 6;
    const SOURCE_BYTES: usize = 210;

    fn read(block: &[u8]) -> SuperBlock {
        let mut out = SuperBlock {
            d: [block[208], block[209]],
            dmin: [0; 2],
            scales: [0; 16],
            mins: [0; 8],
            values: [0; SUPER_BLOCK],
        };
        out.scales.copy_from_slice(&block[192..208]);
        for (k, value) in out.values.iter_mut().enumerate() {
            // Two halves of 128; in each, four runs of 32 share the bytes of 64 nibbles and 32 pairs of bits.
            let (half, run, l) = (k / 128, k % 128 / 32, k % 32);
            let nibble = block[half * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
            *value = nibble | (block[128 + half * 32 + l] >> (2 * run) & 3) << 4;
        }
        out
    }
}

const _: () = assert!(Q4K::TILE_BYTES == 2368 && Q5K::TILE_BYTES == 2880 && Q6K::TILE_BYTES == 3392);

/// `d`, `dmin` and the 6-bit scales and minimums of Q4_K and Q5_K, as ggml packs them into twelve bytes.
fn read_scales(block: &[u8]) -> SuperBlock {
    let (mut scales, mut mins) = ([0; 16], [0; 8]);
    let packed = &block[4..16];
    for j in 0..4 {
        scales[j] = packed[j] & 63;
        mins[j] = packed[j + 4] & 63;
        scales[j + 4] = packed[j + 8] & 15 | packed[j] >> 6 << 4;
        mins[j + 4] = packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4;
    }
    SuperBlock { d: [block[0], block[1]], dmin: [block[2], block[3]], scales, mins, values: [0; SUPER_BLOCK] }
}

/// Packs one GGUF row as row `row` of a row group that was zeros; as `crate::pack_row_group`.
pub(crate) fn pack_row<Q: KQuant>(src: &[u8], row: usize, out: &mut [u8]) -> Result<(), PackError> {
    let blocks = src.chunks_exact(Q::SOURCE_BYTES);
    for (index, (block, tile)) in blocks.zip(out.chunks_exact_mut(Q::TILE_BYTES)).enumerate() {
        let block = Q::read(block);
        let finite = |what, bytes: [u8; 2]| {
            let value = f16::from_le_bytes(bytes).to_f32();
            let refused = PackError::BlockNotFinite { row, block: index, what, value };
            if value.is_finite() { Ok(bytes) } else { Err(refused) }
        };
        tile[2 * row..][..2].copy_from_slice(&finite("scale", block.d)?);
        for (j, scale) in block.scales[..SUPER_BLOCK / Q::SCALE_VALUES].iter().enumerate() {
            tile[Q::SCALE_AT + j * ROW_GROUP + row] = *scale;
        }
        if Q::HAS_MIN {
            tile[2 * ROW_GROUP + 2 * row..][..2].copy_from_slice(&finite("minimum", block.dmin)?);
            for (j, min) in block.mins.iter().enumerate() {
                tile[Q::MIN_AT + j * ROW_GROUP + row] = *min;
            }
        }
        for (k, value) in block.values.iter().enumerate() {
            let (group, half, j, b) = (k / 32, k % 32 / 16, k % 16 / 4, k % 4);
            let nibbles = Q::NIBBLES_AT + group * NIBBLE_BYTES;
            tile[nibbles + j * 64 + 4 * row + b] |= (value & 15) << (4 * half);
            let high = Q::HIGH_AT + group * Q::HIGH_BYTES + 4 * row + b;
            match Q::BITS {
                5 => tile[high] |= (value >> 4) << (4 * half + j),
                6 => tile[high + half * 64] |= (value >> 4) << (2 * j),
                _ => (),
            }
        }
    }
    Ok(())
}

/// Value `k` of row `r`, as stored.
fn value<Q: KQuant>(tile: &[u8], r: usize, k: usize) -> i32 {
    let (group, half, j, b) = (k / 32, k % 32 / 16, k % 16 / 4, k % 4);
    let nibble = tile[Q::NIBBLES_AT + group * NIBBLE_BYTES + j * 64 + 4 * r + b] >> (4 * half) & 15;
    let high = Q::HIGH_AT + group * Q::HIGH_BYTES + 4 * r + b;
    let high = match Q::BITS {
        5 => tile[high] >> (4 * half + j) & 1,
        6 => tile[high + half * 64] >> (2 * j) & 3,
        _ => 0,
    };
    i32::from(nibble | high << 4)
}

/// Scale of row `r` for value `k`.
fn scale<Q: KQuant>(tile: &[u8], r: usize, k: usize) -> i32 {
    let byte = tile[Q::SCALE_AT + k / Q::SCALE_VALUES * ROW_GROUP + r];
    if Q::HAS_MIN { i32::from(byte) } else { i32::from(byte.cast_signed()) }
}

fn half_at(tile: &[u8], at: usize, r: usize) -> f32 {
    f16::from_le_bytes([tile[at + 2 * r], tile[at + 2 * r + 1]]).to_f32_const()
}

/// Row `r` of one tile as f32: the operations of ggml's dequantizer.
pub(crate) fn unpack_tile<Q: KQuant>(tile: &[u8], r: usize, out: &mut [f32]) {
    let d = half_at(tile, 0, r);
    for (k, out) in out.iter_mut().enumerate() {
        let scaled = d * scale::<Q>(tile, r, k) as f32;
        *out = if Q::HAS_MIN {
            let min = half_at(tile, 2 * ROW_GROUP, r) * f32::from(tile[Q::MIN_AT + k / 32 * ROW_GROUP + r]);
            scaled * value::<Q>(tile, r, k) as f32 - min
        } else {
            scaled * (value::<Q>(tile, r, k) - 32) as f32
        };
    }
}

/// The specification: one super-block's step of row `r`'s accumulator. Both sums are exact: at most 8 · 63 · 32 · 31 · 127 in
/// magnitude for Q5_K, 16 · 128 · 16 · 32 · 127 for Q6_K, 8 · 63 · 32 · 127 for minimums.
pub(crate) fn step<Q: KQuant>(tile: &[u8], r: usize, x: &QBlockK, acc: f32) -> f32 {
    let offset = if Q::HAS_MIN { 0 } else { 32 };
    let products = x.q.iter().enumerate();
    let isum: i32 =
        products.map(|(k, q)| scale::<Q>(tile, r, k) * (value::<Q>(tile, r, k) - offset) * i32::from(*q)).sum();
    let acc = (half_at(tile, 0, r) * x.d).mul_add(isum as f32, acc);
    if !Q::HAS_MIN {
        return acc;
    }
    let sums = x.sums.as_chunks::<2>().0.iter().map(|[low, high]| i32::from(*low) + i32::from(*high));
    let imin: i32 = sums.enumerate().map(|(j, sum)| i32::from(tile[Q::MIN_AT + j * ROW_GROUP + r]) * sum).sum();
    (half_at(tile, 2 * ROW_GROUP, r) * -x.d).mul_add(imin as f32, acc)
}
