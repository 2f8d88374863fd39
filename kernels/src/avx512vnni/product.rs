//! Quantized products with AVX-512 VNNI: a register is one 64-byte vector of a tile, `vpdpbusd` multiplies it by four broadcast
//! activations. Weights are its unsigned factor (an 8-bit weight plus 128), so an integer sum starts at what the offset adds
//! up to. One row of activations reads the tiles as they are; several rows share the weights of a block unpacked in registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Avx512, with};
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS, for_quant};
use crate::matrix::Matrix;

/// How far ahead of its use a tile is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 4096;
/// Activation rows that go over a pair of row groups together at most, bytes: part of a first-level cache.
const ROWS_BYTES: usize = 32 * 1024;

/// `Kernels::matmul` for quantized rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
pub(super) fn product(s: Avx512, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    for_quant!(
        w.format(),
        groups_product(s, w, groups, x, n, out),
        unreachable!("a dense matrix in a quantized product")
    );
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn groups_product<Q: Quant>(s: Avx512, w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    if n == 0 {
        return;
    }
    if n == 1 {
        for (group, out) in groups.zip(out) {
            gemv::<Q>(s, w.group(group), x, out);
        }
        return;
    }
    let row = blocks_per_row(w.cols());
    out.fill([0.0; ROW_GROUP]);
    if row == 0 {
        return;
    }
    let mut group = groups.start;
    let mut pairs = out.chunks_exact_mut(2 * n);
    for out in &mut pairs {
        rows_product::<Q, 2>(s, [w.group(group), w.group(group + 1)], x, row, out);
        group += 2;
    }
    let rest = pairs.into_remainder();
    if !rest.is_empty() {
        rows_product::<Q, 1>(s, [w.group(group)], x, row, rest);
    }
}

#[inline(always)]
fn fetch_ahead<Q: Quant>(s: Avx512, tile: &[u8]) {
    with!(s, {
        for line in (0..Q::TILE_BYTES).step_by(64) {
            // Past the last row group this points nowhere, which a hint may.
            _mm_prefetch::<_MM_HINT_T0>(tile.as_ptr().wrapping_add(PREFETCH_BYTES + line).cast());
        }
    })
}

/// Loads 64 bytes at `at`.
#[inline(always)]
fn load(s: Avx512, tile: &[u8], at: usize) -> __m512i {
    let bytes = &tile[at..at + 64];
    with!(s, _mm512_loadu_si512(bytes.as_ptr().cast()))
}

/// Loads the sixteen f16 of `block` in the table at `at`.
#[inline(always)]
fn load_f16(s: Avx512, tile: &[u8], at: usize, block: usize) -> __m512 {
    let bytes = &tile[at + block * 2 * ROW_GROUP..][..2 * ROW_GROUP];
    with!(s, _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())))
}

/// Values `4 v .. 4 v + 4` in every 32-bit lane.
#[inline(always)]
fn four(s: Avx512, x: &QBlock, v: usize) -> __m512i {
    let q = x.q.as_chunks::<4>().0[v];
    with!(s, _mm512_set1_epi32(i32::from_le_bytes(q.map(i8::cast_unsigned))))
}

/// What an integer sum over `x` starts at so that the weights' offset comes out.
#[inline(always)]
fn correction<Q: Quant>(s: Avx512, x: &QBlock) -> __m512i {
    let offset = if Q::BITS == 8 { 128 } else { Q::OFFSET };
    with!(s, _mm512_set1_epi32(-offset * x.sum))
}

/// The fifth bits of the values in vector `v` of a block (0 to 3 low nibbles, 4 to 7 high), at bit 4 of each byte; the
/// other bits are anything.
#[inline(always)]
fn fifth_bits(s: Avx512, high: __m512i, v: usize) -> __m512i {
    with!(s, {
        match v {
            0 => _mm512_slli_epi16::<4>(high),
            1 => _mm512_slli_epi16::<3>(high),
            2 => _mm512_slli_epi16::<2>(high),
            3 => _mm512_slli_epi16::<1>(high),
            4 => high,
            5 => _mm512_srli_epi16::<1>(high),
            6 => _mm512_srli_epi16::<2>(high),
            _ => _mm512_srli_epi16::<3>(high),
        }
    })
}

/// The weights of a block as unsigned bytes: vector `v` holds values `4 v .. 4 v + 4` of the sixteen rows.
#[inline(always)]
fn unpack<Q: Quant>(s: Avx512, tile: &[u8], block: usize) -> [__m512i; 8] {
    with!(s, {
        let at = Q::DATA_AT + block * Q::BLOCK_VECTORS * 64;
        let mut w = [_mm512_setzero_si512(); 8];
        if Q::BITS == 8 {
            let bias = _mm512_set1_epi8(-128);
            for (v, w) in w.iter_mut().enumerate() {
                *w = _mm512_xor_si512(load(s, tile, at + v * 64), bias);
            }
            return w;
        }
        let (mask, fifth) = (_mm512_set1_epi8(15), _mm512_set1_epi8(16));
        for v in 0..4 {
            let packed = load(s, tile, at + v * 64);
            w[v] = _mm512_and_si512(packed, mask);
            w[v + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask);
            if Q::BITS == 5 {
                let bits = load(s, tile, Q::HIGH_AT + block * 64);
                // a | b & c
                w[v] = _mm512_ternarylogic_epi32::<0xf8>(w[v], fifth_bits(s, bits, v), fifth);
                w[v + 4] = _mm512_ternarylogic_epi32::<0xf8>(w[v + 4], fifth_bits(s, bits, v + 4), fifth);
            }
        }
        w
    })
}

/// One row of activations against one row group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn gemv<Q: Quant>(s: Avx512, tiles: &[u8], x: &[QBlock], out: &mut [f32; ROW_GROUP]) {
    let mut acc = _mm512_setzero_ps();
    for (tile, x) in tiles.chunks_exact(Q::TILE_BYTES).zip(x.as_chunks::<TILE_BLOCKS>().0) {
        fetch_ahead::<Q>(s, tile);
        for (block, x) in x.iter().enumerate() {
            let isum = if Q::BITS == 4 { dot4::<Q>(s, tile, block, x) } else { dot_unpacked::<Q>(s, tile, block, x) };
            let scale = load_f16(s, tile, 0, block);
            let min = if Q::HAS_MIN { load_f16(s, tile, Q::MIN_AT, block) } else { scale };
            acc = step::<Q>(s, acc, isum, scale, min, x);
        }
    }
    with!(s, _mm512_storeu_ps(out.as_mut_ptr(), acc));
}

/// Integer dots of a 4-bit block. The high nibbles stay where they are, sixteen times themselves: one shift of their sum
/// in place of one of each vector.
#[inline(always)]
fn dot4<Q: Quant>(s: Avx512, tile: &[u8], block: usize, x: &QBlock) -> __m512i {
    with!(s, {
        let (low_mask, high_mask) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-16));
        let mut low = correction::<Q>(s, x);
        let mut high = _mm512_setzero_si512();
        for v in 0..4 {
            let packed = load(s, tile, Q::DATA_AT + (block * Q::BLOCK_VECTORS + v) * 64);
            low = _mm512_dpbusd_epi32(low, _mm512_and_si512(packed, low_mask), four(s, x, v));
            high = _mm512_dpbusd_epi32(high, _mm512_and_si512(packed, high_mask), four(s, x, v + 4));
        }
        _mm512_add_epi32(low, _mm512_srai_epi32::<4>(high))
    })
}

/// Integer dots of a block of any format.
#[inline(always)]
fn dot_unpacked<Q: Quant>(s: Avx512, tile: &[u8], block: usize, x: &QBlock) -> __m512i {
    with!(s, {
        let w = unpack::<Q>(s, tile, block);
        let (mut a, mut b) = (correction::<Q>(s, x), _mm512_setzero_si512());
        for v in 0..4 {
            a = _mm512_dpbusd_epi32(a, w[v], four(s, x, v));
            b = _mm512_dpbusd_epi32(b, w[v + 4], four(s, x, v + 4));
        }
        _mm512_add_epi32(a, b)
    })
}

/// One block's step of sixteen accumulators.
#[inline(always)]
fn step<Q: Quant>(s: Avx512, acc: __m512, isum: __m512i, scale: __m512, min: __m512, x: &QBlock) -> __m512 {
    with!(s, {
        let acc = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.d)), _mm512_cvtepi32_ps(isum), acc);
        if Q::HAS_MIN { _mm512_fmadd_ps(min, _mm512_set1_ps(x.d * x.sum as f32), acc) } else { acc }
    })
}

/// Several rows of activations, `row` blocks each, against `G` row groups; `out`, `[group][row]`, is zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn rows_product<Q: Quant, const G: usize>(
    s: Avx512,
    groups: [&[u8]; G],
    x: &[QBlock],
    row: usize,
    out: &mut [[f32; ROW_GROUP]],
) {
    let n = x.len() / row;
    let chunk = (ROWS_BYTES / (row * size_of::<QBlock>())).max(16);
    for start in (0..n).step_by(chunk) {
        let rows = start..n.min(start + chunk);
        for i in 0..row / TILE_BLOCKS {
            let tiles = groups.map(|group| &group[i * Q::TILE_BYTES..][..Q::TILE_BYTES]);
            for tile in tiles {
                fetch_ahead::<Q>(s, tile);
            }
            for block in 0..TILE_BLOCKS {
                block_product::<Q, G>(s, tiles, block, rows.clone(), &x[i * TILE_BLOCKS + block..], row, out);
            }
        }
    }
}

/// Adds one block's part to the given rows of `out`, `[group][row]`; `x` starts at the block in row 0, rows are `stride`
/// blocks apart. The weights stay in registers while all activations pass.
#[inline(always)]
fn block_product<Q: Quant, const G: usize>(
    s: Avx512,
    tiles: [&[u8]; G],
    block: usize,
    rows: Range<usize>,
    x: &[QBlock],
    stride: usize,
    out: &mut [[f32; ROW_GROUP]],
) {
    let n = out.len() / G;
    assert!(rows.start < rows.end && rows.end <= n && (rows.end - 1) * stride < x.len());
    let w = tiles.map(|tile| unpack::<Q>(s, tile, block));
    let scale = tiles.map(|tile| load_f16(s, tile, 0, block));
    let min = if Q::HAS_MIN { tiles.map(|tile| load_f16(s, tile, Q::MIN_AT, block)) } else { scale };
    for t in rows {
        // SAFETY: `x` has a block of every row, asserted above.
        let x = unsafe { x.get_unchecked(t * stride) };
        let mut isum = [correction::<Q>(s, x); G];
        for v in 0..8 {
            let q = four(s, x, v);
            for g in 0..G {
                isum[g] = with!(s, _mm512_dpbusd_epi32(isum[g], w[g][v], q));
            }
        }
        for g in 0..G {
            // SAFETY: `out` has `n` rows of each group, `t` is below `n`.
            let out = unsafe { out.get_unchecked_mut(g * n + t) };
            let acc = with!(s, _mm512_loadu_ps(out.as_ptr()));
            let acc = step::<Q>(s, acc, isum[g], scale[g], min[g], x);
            with!(s, _mm512_storeu_ps(out.as_mut_ptr(), acc));
        }
    }
}
