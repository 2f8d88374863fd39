//! Quantized products with AVX2. One row of activations reads the tiles as they are; several rows share the weights of a
//! block unpacked in registers. Integer sums are exact: a pair of products fits int16 and so does the sum of the 8 pairs of a 4-bit block
//! (8 · 2 · 15 · 127 = 30,480) or of 4 pairs with 5 bits (4 · 2 · 31 · 127 = 31,496).

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Avx2, with};
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS, for_quant};
use crate::matrix::Matrix;

/// How far ahead of its use a tile is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 4096;
/// Activation rows that go over a row group together at most, bytes: part of a first-level cache.
const ROWS_BYTES: usize = 32 * 1024;
/// `Kernels::matmul` for quantized rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(s: Avx2, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    for_quant!(
        w.format(),
        groups_product(s, w, groups, x, n, out),
        unreachable!("a dense matrix in a quantized product")
    );
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn groups_product<Q: Quant>(s: Avx2, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    if n == 1 {
        for (group, out) in groups.zip(out) {
            gemv::<Q>(s, w.group(group), x, out);
        }
        return;
    }
    if n == 0 {
        return;
    }
    let row = blocks_per_row(w.cols());
    // Few rows go through in one piece, so that each weight is read once.
    let chunk = (ROWS_BYTES / (row.max(1) * size_of::<QBlock>())).max(16);
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        out.fill([0.0; ROW_GROUP]);
        if row == 0 {
            continue;
        }
        for (x, out) in x.chunks(chunk * row).zip(out.chunks_mut(chunk)) {
            for (i, tile) in w.group(group).chunks_exact(Q::TILE_BYTES).enumerate() {
                fetch_ahead::<Q>(s, tile);
                rows_product::<Q>(s, tile, &x[i * TILE_BLOCKS..], row, out);
            }
        }
    }
}

#[inline(always)]
fn fetch_ahead<Q: Quant>(s: Avx2, tile: &[u8]) {
    with!(s, {
        for line in (0..Q::TILE_BYTES).step_by(64) {
            // Past the last row group this points nowhere, which a hint may.
            _mm_prefetch::<_MM_HINT_T0>(tile.as_ptr().wrapping_add(PREFETCH_BYTES + line).cast());
        }
    })
}

/// Loads 32 bytes at `at`.
#[inline(always)]
fn load(s: Avx2, tile: &[u8], at: usize) -> __m256i {
    let bytes = &tile[at..at + 32];
    with!(s, _mm256_loadu_si256(bytes.as_ptr().cast()))
}

/// Loads eight f16 at `at`.
#[inline(always)]
fn load_f16(s: Avx2, tile: &[u8], at: usize) -> __m256 {
    let bytes = &tile[at..at + 16];
    with!(s, _mm256_cvtph_ps(_mm_loadu_si128(bytes.as_ptr().cast())))
}

/// Values `4 v .. 4 v + 4` in every 32-bit lane.
#[inline(always)]
fn four(s: Avx2, x: &QBlock, v: usize) -> __m256i {
    with!(s, {
        let q = x.q.as_chunks::<4>().0[v];
        _mm256_set1_epi32(i32::from_le_bytes(q.map(i8::cast_unsigned)))
    })
}

/// Adds neighbouring int16 into int32.
#[inline(always)]
fn widen(s: Avx2, x: __m256i) -> __m256i {
    with!(s, _mm256_madd_epi16(x, _mm256_set1_epi16(1)))
}

/// The fifth bits of the values in vector `v` of a block (0 to 3 low nibbles, 4 to 7 high), as 16 or 0 a byte.
#[inline(always)]
fn fifth_bits(s: Avx2, high: __m256i, v: usize) -> __m256i {
    with!(s, {
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
    })
}

/// Vectors `v` (low nibbles) and `v + 4` (high nibbles) of eight rows, a byte a value, without offset; 4 and 5 bits only.
#[inline(always)]
fn nibbles<Q: Quant>(s: Avx2, tile: &[u8], block: usize, half: usize, v: usize) -> (__m256i, __m256i) {
    with!(s, {
        let mask = _mm256_set1_epi8(15);
        let packed = load(s, tile, Q::DATA_AT + (block * Q::BLOCK_VECTORS + v) * 64 + half * 32);
        let mut low = _mm256_and_si256(packed, mask);
        let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask);
        if Q::BITS == 5 {
            let bits = load(s, tile, Q::HIGH_AT + block * 64 + half * 32);
            low = _mm256_or_si256(low, fifth_bits(s, bits, v));
            high = _mm256_or_si256(high, fifth_bits(s, bits, v + 4));
        }
        (low, high)
    })
}

/// One row of activations against one row group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn gemv<Q: Quant>(s: Avx2, tiles: &[u8], x: &[QBlock], out: &mut [f32; ROW_GROUP]) {
    let mut acc = [_mm256_setzero_ps(); 2];
    for (tile, x) in tiles.chunks_exact(Q::TILE_BYTES).zip(x.as_chunks::<TILE_BLOCKS>().0) {
        fetch_ahead::<Q>(s, tile);
        for (block, x) in x.iter().enumerate() {
            for (half, acc) in acc.iter_mut().enumerate() {
                *acc = if Q::BITS == 8 {
                    let scale = load_f16(s, tile, block * 2 * ROW_GROUP + half * 16);
                    step::<Q>(s, *acc, dot8(s, tile, block, half, x), scale, scale, x)
                } else {
                    EightRows::load::<Q>(s, tile, block, half).add_to::<Q>(s, *acc, x)
                };
            }
        }
    }
    store(s, acc, out);
}

/// Integer dots of eight rows of an 8-bit block. The weight's sign moves to the activation, so that its magnitude (up to
/// 128) is the unsigned factor: 2 · 128 · 127 = 32,512 fits int16.
#[inline(always)]
fn dot8(s: Avx2, tile: &[u8], block: usize, half: usize, x: &QBlock) -> __m256i {
    with!(s, {
        let mut sum = _mm256_setzero_si256();
        for v in 0..8 {
            let w = load(s, tile, <crate::format::Q8_0 as Quant>::DATA_AT + (block * 8 + v) * 64 + half * 32);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(s, x, v), w));
            sum = _mm256_add_epi32(sum, widen(s, pairs));
        }
        sum
    })
}

#[inline(always)]
fn store(s: Avx2, acc: [__m256; 2], out: &mut [f32; ROW_GROUP]) {
    with!(s, {
        _mm256_storeu_ps(out.as_mut_ptr(), acc[0]);
        _mm256_storeu_ps(out.as_mut_ptr().add(8), acc[1]);
    })
}

/// Adds one tile's part to every row in `out`; `x` starts at the tile's first block of the first row, rows are `stride`
/// blocks apart. The weights of eight rows of a block stay in eight registers while all activations pass.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_product<Q: Quant>(s: Avx2, tile: &[u8], x: &[QBlock], stride: usize, out: &mut [[f32; ROW_GROUP]]) {
    assert!((out.len() - 1) * stride + TILE_BLOCKS <= x.len());
    for block in 0..TILE_BLOCKS {
        for half in 0..2 {
            let w = EightRows::load::<Q>(s, tile, block, half);
            let mut x = x[block..].as_ptr();
            let mut acc = out.as_flattened_mut()[half * 8..].as_mut_ptr();
            for _ in 0..out.len() {
                // SAFETY: `x` has a block of every row that `out` has (asserted above), `acc` eight of its sixteen values;
                // both step past their ends only after the last row, and are not read there.
                unsafe {
                    _mm256_storeu_ps(acc, w.add_to::<Q>(s, _mm256_loadu_ps(acc), &*x));
                    x = x.wrapping_add(stride);
                    acc = acc.wrapping_add(ROW_GROUP);
                }
            }
        }
    }
}

/// Eight rows of one block, ready to multiply.
struct EightRows {
    /// Unsigned bytes, vectors as activations: values `4 v .. 4 v + 4`. An 8-bit number plus 128 is its low nibbles here
    /// and its high ones in `high`, which keeps the sums of a whole block within int16.
    w: [__m256i; 8],
    high: [__m256i; 8],
    scale: __m256,
    min: __m256,
}

impl EightRows {
    #[inline(always)]
    fn load<Q: Quant>(s: Avx2, tile: &[u8], block: usize, half: usize) -> Self {
        with!(s, {
            let mut w = [_mm256_setzero_si256(); 8];
            let mut high = w;
            if Q::BITS == 8 {
                let (bias, mask) = (_mm256_set1_epi8(-128), _mm256_set1_epi8(15));
                for v in 0..8 {
                    let biased = _mm256_xor_si256(load(s, tile, Q::DATA_AT + (block * 8 + v) * 64 + half * 32), bias);
                    w[v] = _mm256_and_si256(biased, mask);
                    high[v] = _mm256_and_si256(_mm256_srli_epi16::<4>(biased), mask);
                }
            } else {
                for v in 0..4 {
                    (w[v], w[v + 4]) = nibbles::<Q>(s, tile, block, half, v);
                }
            }
            let table = block * 2 * ROW_GROUP + half * 16;
            let min = if Q::HAS_MIN { load_f16(s, tile, Q::MIN_AT + table) } else { _mm256_setzero_ps() };
            Self { w, high, scale: load_f16(s, tile, table), min }
        })
    }

    /// One block's step of the accumulators of eight rows.
    #[inline(always)]
    fn add_to<Q: Quant>(&self, s: Avx2, acc: __m256, x: &QBlock) -> __m256 {
        with!(s, {
            let low = dot(s, &self.w, x);
            let isum = match Q::BITS {
                4 => widen(s, _mm256_add_epi16(low[0], low[1])),
                5 => _mm256_add_epi32(widen(s, low[0]), widen(s, low[1])),
                _ => {
                    let high = dot(s, &self.high, x);
                    let high = _mm256_madd_epi16(_mm256_add_epi16(high[0], high[1]), _mm256_set1_epi16(16));
                    let biased = _mm256_add_epi32(widen(s, _mm256_add_epi16(low[0], low[1])), high);
                    _mm256_sub_epi32(biased, _mm256_slli_epi32::<7>(_mm256_set1_epi32(x.sum)))
                }
            };
            step::<Q>(s, acc, isum, self.scale, self.min, x)
        })
    }
}

/// One block's step of eight accumulators, from integer dots whose offset is not yet subtracted.
#[inline(always)]
fn step<Q: Quant>(s: Avx2, acc: __m256, isum: __m256i, scale: __m256, min: __m256, x: &QBlock) -> __m256 {
    with!(s, {
        let sum = _mm256_set1_epi32(x.sum);
        let isum = match Q::OFFSET {
            16 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<4>(sum)),
            8 => _mm256_sub_epi32(isum, _mm256_slli_epi32::<3>(sum)),
            _ => isum,
        };
        let d = _mm256_set1_ps(x.d);
        let acc = _mm256_fmadd_ps(_mm256_mul_ps(scale, d), _mm256_cvtepi32_ps(isum), acc);
        if Q::HAS_MIN { _mm256_fmadd_ps(min, _mm256_mul_ps(d, _mm256_cvtepi32_ps(sum)), acc) } else { acc }
    })
}

/// Products of a block's values 0 to 15 and 16 to 31, four pairs an int16 each.
#[inline(always)]
fn dot(s: Avx2, w: &[__m256i; 8], x: &QBlock) -> [__m256i; 2] {
    with!(s, {
        let mut sum = [_mm256_setzero_si256(); 2];
        for v in 0..8 {
            sum[v / 4] = _mm256_add_epi16(sum[v / 4], _mm256_maddubs_epi16(w[v], four(s, x, v)));
        }
        sum
    })
}
