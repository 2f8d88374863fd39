//! Quantized products with AVX2. One row of activations reads the tiles as they are; several rows share a tile unpacked to
//! bytes. Integer sums are exact: a pair of products fits int16 and so does the sum of the 8 pairs of a 4-bit block
//! (8 · 2 · 15 · 127 = 30,480) or of 4 pairs with 5 bits (4 · 2 · 31 · 127 = 31,496).

#![expect(
    clippy::needless_range_loop,
    reason = "registers are numbered by row, half and vector"
)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::Avx2;
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS, for_quant};
use crate::matrix::Matrix;

/// How far ahead of its use a tile is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 4096;
/// Activation rows that share an unpacked tile at most while it and they stay in the first-level cache, bytes.
const ROWS_BYTES: usize = 24 * 1024;
/// Activation rows of one pass over a tile.
const ROWS_AT_ONCE: usize = 4;

/// `Kernels::matmul` for quantized rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(
    _: Avx2,
    w: &Matrix<'_>,
    groups: Range<usize>,
    x: &[QBlock],
    n: usize,
    out: &mut [f32],
) {
    for_quant!(
        w.format(),
        groups_product(w, groups, x, n, out),
        unreachable!("a dense matrix in a quantized product")
    );
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn groups_product<Q: Quant>(
    w: &Matrix<'_>,
    groups: Range<usize>,
    x: &[QBlock],
    n: usize,
    out: &mut [f32],
) {
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    if n == 1 {
        for (group, out) in groups.zip(out) {
            gemv::<Q>(w.group(group), x, out);
        }
        return;
    }
    if n == 0 {
        return;
    }
    let row = blocks_per_row(w.cols());
    // Few rows go through in one piece, so that each weight is read once.
    let chunk =
        (ROWS_BYTES / (row.max(1) * size_of::<QBlock>())).max(16) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        out.fill([0.0; ROW_GROUP]);
        if row == 0 {
            continue;
        }
        for (x, out) in x.chunks(chunk * row).zip(out.chunks_mut(chunk)) {
            for (i, tile) in w.group(group).chunks_exact(Q::TILE_BYTES).enumerate() {
                let panel = Panel::unpack::<Q>(tile);
                rows_product::<Q>(&panel, &x[i * TILE_BLOCKS..], row, out);
            }
        }
    }
}

/// Loads 32 bytes at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(tile: &[u8], at: usize) -> __m256i {
    debug_assert!(at + 32 <= tile.len());
    // SAFETY: callers pass a whole tile (`chunks_exact` of `TILE_BYTES`) and an offset of one of its vectors.
    unsafe { _mm256_loadu_si256(tile.as_ptr().add(at).cast()) }
}

/// Loads eight f16 at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_f16(tile: &[u8], at: usize) -> __m256 {
    debug_assert!(at + 16 <= tile.len());
    // SAFETY: callers pass a whole tile and an offset of eight of its scales or minimums.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(tile.as_ptr().add(at).cast()) })
}

/// Values `4 v .. 4 v + 4` in every 32-bit lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn four(x: &QBlock, v: usize) -> __m256i {
    let q = x.q.as_chunks::<4>().0[v];
    _mm256_set1_epi32(i32::from_le_bytes(q.map(i8::cast_unsigned)))
}

/// Adds neighbouring int16 into int32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(x: __m256i) -> __m256i {
    _mm256_madd_epi16(x, _mm256_set1_epi16(1))
}

/// The fifth bits of the values in vector `v` of a block (0 to 3 low nibbles, 4 to 7 high), as 16 or 0 a byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth_bits(high: __m256i, v: usize) -> __m256i {
    let shifted = match v {
        0 => _mm256_slli_epi16::<4>(high),
        1 => _mm256_slli_epi16::<3>(high),
        2 => _mm256_slli_epi16::<2>(high),
        3 => _mm256_slli_epi16::<1>(high),
        4 => high,
        5 => _mm256_srli_epi16::<1>(high),
        6 => _mm256_srli_epi16::<2>(high),
        _ => _mm256_srli_epi16::<3>(high),
    };
    _mm256_and_si256(shifted, _mm256_set1_epi8(16))
}

/// Vectors `v` (low nibbles) and `v + 4` (high nibbles) of eight rows, a byte a value, without offset; 4 and 5 bits only.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles<Q: Quant>(tile: &[u8], block: usize, half: usize, v: usize) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(15);
    let packed = load(
        tile,
        Q::DATA_AT + (block * Q::BLOCK_VECTORS + v) * 64 + half * 32,
    );
    let mut low = _mm256_and_si256(packed, mask);
    let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
    if Q::BITS == 5 {
        let bits = load(tile, Q::HIGH_AT + block * 64 + half * 32);
        low = _mm256_or_si256(low, fifth_bits(bits, v));
        high = _mm256_or_si256(high, fifth_bits(bits, v + 4));
    }
    (low, high)
}

/// One row of activations against one row group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn gemv<Q: Quant>(tiles: &[u8], x: &[QBlock], out: &mut [f32; ROW_GROUP]) {
    let mut acc = [_mm256_setzero_ps(); 2];
    for (tile, x) in tiles
        .chunks_exact(Q::TILE_BYTES)
        .zip(x.as_chunks::<TILE_BLOCKS>().0)
    {
        for line in (0..Q::TILE_BYTES).step_by(64) {
            // Past the last row group this points nowhere, which a hint may.
            let ahead = tile.as_ptr().wrapping_add(PREFETCH_BYTES + line);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        }
        for (block, x) in x.iter().enumerate() {
            let d = _mm256_set1_ps(x.d);
            let offset = _mm256_set1_epi32(x.sum.wrapping_mul(Q::OFFSET));
            let d_sum = _mm256_set1_ps(x.d * x.sum as f32);
            for (half, acc) in acc.iter_mut().enumerate() {
                let mut isum = if Q::BITS == 8 {
                    dot8(tile, block, half, x)
                } else {
                    dot_low::<Q>(tile, block, half, x)
                };
                if Q::OFFSET != 0 {
                    isum = _mm256_sub_epi32(isum, offset);
                }
                let table = block * 32 + half * 16;
                *acc = _mm256_fmadd_ps(
                    _mm256_mul_ps(load_f16(tile, table), d),
                    _mm256_cvtepi32_ps(isum),
                    *acc,
                );
                if Q::HAS_MIN {
                    *acc = _mm256_fmadd_ps(load_f16(tile, Q::MIN_AT + table), d_sum, *acc);
                }
            }
        }
    }
    store(acc, out);
}

/// Integer dots of eight rows of a 4- or 5-bit block, offset not subtracted.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_low<Q: Quant>(tile: &[u8], block: usize, half: usize, x: &QBlock) -> __m256i {
    let mut low_sum = _mm256_setzero_si256();
    let mut high_sum = _mm256_setzero_si256();
    for v in 0..4 {
        let (low, high) = nibbles::<Q>(tile, block, half, v);
        low_sum = _mm256_add_epi16(low_sum, _mm256_maddubs_epi16(low, four(x, v)));
        high_sum = _mm256_add_epi16(high_sum, _mm256_maddubs_epi16(high, four(x, v + 4)));
    }
    if Q::BITS == 4 {
        widen(_mm256_add_epi16(low_sum, high_sum))
    } else {
        _mm256_add_epi32(widen(low_sum), widen(high_sum))
    }
}

/// Integer dots of eight rows of an 8-bit block. The weight's sign moves to the activation, so that its magnitude (up to
/// 128) is the unsigned factor: 2 · 128 · 127 = 32,512 fits int16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot8(tile: &[u8], block: usize, half: usize, x: &QBlock) -> __m256i {
    let mut sum = _mm256_setzero_si256();
    for v in 0..8 {
        let w = load(
            tile,
            <crate::format::Q8_0 as Quant>::DATA_AT + (block * 8 + v) * 64 + half * 32,
        );
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(x, v), w));
        sum = _mm256_add_epi32(sum, widen(pairs));
    }
    sum
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(acc: [__m256; 2], out: &mut [f32; ROW_GROUP]) {
    // SAFETY: sixteen values are behind the reference.
    unsafe {
        _mm256_storeu_ps(out.as_mut_ptr(), acc[0]);
        _mm256_storeu_ps(out.as_mut_ptr().add(8), acc[1]);
    }
}

/// Vectors of eight rows in an unpacked block at most: 8, or 16 where an 8-bit number is two nibbles.
const PANEL_VECTORS: usize = 16;

/// A tile unpacked for several rows of activations.
struct Panel {
    /// `[block][half][vector]`: unsigned bytes. An 8-bit number plus 128 is its low nibbles (vectors 0 to 7) and its high
    /// ones (8 to 15), which keeps the sums of a whole block within int16.
    w: [[[__m256i; PANEL_VECTORS]; 2]; TILE_BLOCKS],
    scale: [[__m256; 2]; TILE_BLOCKS],
    min: [[__m256; 2]; TILE_BLOCKS],
}

impl Panel {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn unpack<Q: Quant>(tile: &[u8]) -> Self {
        let mut panel = Self {
            w: [[[_mm256_setzero_si256(); PANEL_VECTORS]; 2]; TILE_BLOCKS],
            scale: [[_mm256_setzero_ps(); 2]; TILE_BLOCKS],
            min: [[_mm256_setzero_ps(); 2]; TILE_BLOCKS],
        };
        for block in 0..TILE_BLOCKS {
            for half in 0..2 {
                let table = block * 32 + half * 16;
                panel.scale[block][half] = load_f16(tile, table);
                if Q::HAS_MIN {
                    panel.min[block][half] = load_f16(tile, Q::MIN_AT + table);
                }
                let w = &mut panel.w[block][half];
                if Q::BITS == 8 {
                    let (bias, mask) = (_mm256_set1_epi8(-128), _mm256_set1_epi8(15));
                    for v in 0..8 {
                        let biased = _mm256_xor_si256(
                            load(tile, Q::DATA_AT + (block * 8 + v) * 64 + half * 32),
                            bias,
                        );
                        w[v] = _mm256_and_si256(biased, mask);
                        w[v + 8] = _mm256_and_si256(_mm256_srli_epi16::<4>(biased), mask);
                    }
                } else {
                    for v in 0..4 {
                        (w[v], w[v + 4]) = nibbles::<Q>(tile, block, half, v);
                    }
                }
            }
        }
        panel
    }
}

/// Adds one tile's part to every row in `out`; `x` starts at the tile's first block of the first row, rows are `stride`
/// blocks apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_product<Q: Quant>(
    panel: &Panel,
    x: &[QBlock],
    stride: usize,
    out: &mut [[f32; ROW_GROUP]],
) {
    let mut row = 0;
    let x = |row: usize| -> &[QBlock; TILE_BLOCKS] { &x[row * stride..].as_chunks().0[0] };
    let mut chunks = out.chunks_exact_mut(ROWS_AT_ONCE);
    for out in &mut chunks {
        micro::<Q, 4>(panel, [x(row), x(row + 1), x(row + 2), x(row + 3)], out);
        row += ROWS_AT_ONCE;
    }
    match chunks.into_remainder() {
        [] => {}
        out @ [_] => micro::<Q, 1>(panel, [x(row)], out),
        out @ [_, _] => micro::<Q, 2>(panel, [x(row), x(row + 1)], out),
        out => micro::<Q, 3>(panel, [x(row), x(row + 1), x(row + 2)], out),
    }
}

/// `T` rows of activations against an unpacked tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn micro<Q: Quant, const T: usize>(
    panel: &Panel,
    x: [&[QBlock; TILE_BLOCKS]; T],
    out: &mut [[f32; ROW_GROUP]],
) {
    for block in 0..TILE_BLOCKS {
        let x = x.map(|x| &x[block]);
        let isum = match Q::BITS {
            4 => dots4(&panel.w[block], x),
            5 => [dots5(&panel.w[block][0], x), dots5(&panel.w[block][1], x)],
            _ => [dots8(&panel.w[block][0], x), dots8(&panel.w[block][1], x)],
        };
        for t in 0..T {
            let d = _mm256_set1_ps(x[t].d);
            let offset = if Q::BITS == 8 { 128 } else { Q::OFFSET };
            let offset = _mm256_set1_epi32(x[t].sum.wrapping_mul(offset));
            let d_sum = _mm256_set1_ps(x[t].d * x[t].sum as f32);
            for half in 0..2 {
                let mut isum = isum[half][t];
                if Q::OFFSET != 0 || Q::BITS == 8 {
                    isum = _mm256_sub_epi32(isum, offset);
                }
                let out = &mut out[t].as_chunks_mut::<8>().0[half];
                // SAFETY: eight values are behind the reference.
                let mut acc = unsafe { _mm256_loadu_ps(out.as_ptr()) };
                let scale = _mm256_mul_ps(panel.scale[block][half], d);
                acc = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(isum), acc);
                if Q::HAS_MIN {
                    acc = _mm256_fmadd_ps(panel.min[block][half], d_sum, acc);
                }
                // SAFETY: as above.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), acc) };
            }
        }
    }
}

/// 16 rows of a 4-bit block × `T`: all eight pairs fit one int16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots4<const T: usize>(w: &[[__m256i; PANEL_VECTORS]; 2], x: [&QBlock; T]) -> [[__m256i; T]; 2] {
    let mut sum = [[_mm256_setzero_si256(); T]; 2];
    for v in 0..8 {
        for t in 0..T {
            let x = four(x[t], v);
            for half in 0..2 {
                sum[half][t] = _mm256_add_epi16(sum[half][t], _mm256_maddubs_epi16(w[half][v], x));
            }
        }
    }
    for half in 0..2 {
        for t in 0..T {
            sum[half][t] = widen(sum[half][t]);
        }
    }
    sum
}

/// 8 rows of a 5-bit block × `T`: four pairs fit one int16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots5<const T: usize>(w: &[__m256i; PANEL_VECTORS], x: [&QBlock; T]) -> [__m256i; T] {
    let mut sum = [[_mm256_setzero_si256(); 2]; T];
    for v in 0..8 {
        for t in 0..T {
            sum[t][v / 4] =
                _mm256_add_epi16(sum[t][v / 4], _mm256_maddubs_epi16(w[v], four(x[t], v)));
        }
    }
    let mut out = [_mm256_setzero_si256(); T];
    for t in 0..T {
        out[t] = _mm256_add_epi32(widen(sum[t][0]), widen(sum[t][1]));
    }
    out
}

/// 8 rows of an 8-bit block, 128 added, × `T`: the high nibbles count sixteen times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots8<const T: usize>(w: &[__m256i; PANEL_VECTORS], x: [&QBlock; T]) -> [__m256i; T] {
    let mut sum = [[_mm256_setzero_si256(); 2]; T];
    for v in 0..8 {
        for t in 0..T {
            let x = four(x[t], v);
            sum[t][0] = _mm256_add_epi16(sum[t][0], _mm256_maddubs_epi16(w[v], x));
            sum[t][1] = _mm256_add_epi16(sum[t][1], _mm256_maddubs_epi16(w[v + 8], x));
        }
    }
    let mut out = [_mm256_setzero_si256(); T];
    for t in 0..T {
        let high = _mm256_madd_epi16(sum[t][1], _mm256_set1_epi16(16));
        out[t] = _mm256_add_epi32(widen(sum[t][0]), high);
    }
    out
}
