//! Quantized products with AVX-512 VNNI: a register is one 64-byte vector of a tile, `vpdpbusd` multiplies it by four broadcast
//! activations. Weights are its unsigned factor (an 8-bit weight plus 128), so an integer sum starts at what the offset adds
//! up to. One row of activations reads the tiles as they are; several rows share the weights of a block unpacked in registers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Avx512, with};
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS, for_quant};
use crate::matrix::Matrix;
use crate::simd::Simd;

/// How far ahead of its use each row group in hand is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 2048;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// Activation rows that go over a pair of row groups together at most, bytes: a small part of a second-level cache. Unpacking a
/// pair's weights costs a tenth of what they do for 32 rows, so that rows streaming in costs less than another pass.
const ROWS_BYTES: usize = 128 * 1024;
/// Activation rows that go together however long they are.
const MIN_ROWS: usize = 96;
/// Rows that a block's weights meet together: twelve sums in hand, each an addition away from its next, hide what one takes.
const ROWS_AT_ONCE: usize = 6;
/// Row groups that each piece of the activations passes over, one after the other: part of a second-level cache.
const GROUPS_AT_ONCE: usize = 16;
/// Blocks of activations whose [`extra`] is worked out ahead, for all row groups of a call.
const EXTRAS: usize = 4096;

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
    let span = GROUPS_AT_ONCE.saturating_mul(n).saturating_mul(ROW_GROUP);
    for (i, out) in out.chunks_mut(span.max(1)).enumerate() {
        span_product::<Q>(s, w, groups.start + i * GROUPS_AT_ONCE, x, n, out.as_chunks_mut().0);
    }
}

/// As many row groups from `first_group` on as `out` is for.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn span_product<Q: Quant>(
    s: Avx512,
    w: &Matrix<'_>,
    first_group: usize,
    x: &[QBlock],
    n: usize,
    out: &mut [[f32; ROW_GROUP]],
) {
    let row = blocks_per_row(w.cols());
    let group_bytes = row / TILE_BLOCKS * Q::TILE_BYTES;
    if n == 1 {
        let mut group = first_group;
        for out in out.chunks_mut(4) {
            let tiles = |i: usize| w.group(group + i);
            match out.len() {
                4 => gemv::<Q, 4>(s, [tiles(0), tiles(1), tiles(2), tiles(3)], x, out),
                3 => gemv::<Q, 3>(s, [tiles(0), tiles(1), tiles(2)], x, out),
                2 => gemv::<Q, 2>(s, [tiles(0), tiles(1)], x, out),
                _ => gemv::<Q, 1>(s, [tiles(0)], x, out),
            }
            group += out.len();
        }
        return;
    }
    out.fill([0.0; ROW_GROUP]);
    if row == 0 {
        return;
    }
    let chunk = (ROWS_BYTES / (row * size_of::<QBlock>())).clamp(MIN_ROWS, EXTRAS / TILE_BLOCKS);
    let chunk = (chunk / ROWS_AT_ONCE * ROWS_AT_ONCE).min(n);
    let blocks = (EXTRAS / chunk / TILE_BLOCKS * TILE_BLOCKS).min(row);
    let mut extras = [MaybeUninit::uninit(); EXTRAS];
    for first_row in (0..n).step_by(chunk) {
        for first_block in (0..row).step_by(blocks) {
            let part = Part::new::<Q>(x, row, first_row..n.min(first_row + chunk), first_block, blocks, &mut extras);
            let tiles = |group| &w.group(group)[first_block / TILE_BLOCKS * Q::TILE_BYTES..];
            for (i, out) in out.chunks_mut(2 * n).enumerate() {
                let (group, is_pair) = (first_group + 2 * i, out.len() == 2 * n);
                let out = &mut out[first_row..];
                if is_pair {
                    rows_product::<Q, 2>(s, [tiles(group), tiles(group + 1)], group_bytes, &part, n, out);
                } else {
                    rows_product::<Q, 1>(s, [tiles(group)], group_bytes, &part, n, out);
                }
            }
        }
    }
}

/// Some rows of activations, some blocks of each.
struct Part<'a> {
    /// From the first block of the first row on; rows are `stride` blocks apart.
    x: &'a [QBlock],
    stride: usize,
    /// `[rows][blocks]`, all written by [`Part::new`].
    extras: &'a [MaybeUninit<u32>],
    rows: usize,
    blocks: usize,
}

impl<'a> Part<'a> {
    /// At most `blocks` blocks of each of `rows`.
    #[inline(always)]
    fn new<Q: Quant>(
        x: &'a [QBlock],
        row: usize,
        rows: Range<usize>,
        first_block: usize,
        blocks: usize,
        extras: &'a mut [MaybeUninit<u32>; EXTRAS],
    ) -> Self {
        let blocks = blocks.min(row - first_block);
        for (x, extras) in x.chunks_exact(row).skip(rows.start).zip(extras.chunks_exact_mut(blocks)).take(rows.len()) {
            for (x, out) in x[first_block..].iter().zip(extras) {
                out.write(extra::<Q>(x));
            }
        }
        let x = &x[rows.start * row + first_block..];
        Self { x, stride: row, extras: &extras[..rows.len() * blocks], rows: rows.len(), blocks }
    }
}

/// What a block of activations gives besides its values: as f32 bits the factor of the minimums, for a format that has them,
/// otherwise what an integer sum starts at so that the weights' offset comes out.
#[inline(always)]
fn extra<Q: Quant>(x: &QBlock) -> u32 {
    let offset = if Q::BITS == 8 { 128 } else { Q::OFFSET };
    if Q::HAS_MIN { (x.d * x.sum as f32).to_bits() } else { (-offset * x.sum).cast_unsigned() }
}

/// What an integer sum starts at.
#[inline(always)]
fn start<Q: Quant>(s: Avx512, extra: u32) -> __m512i {
    with!(s, if Q::HAS_MIN { _mm512_setzero_si512() } else { _mm512_set1_epi32(extra.cast_signed()) })
}

/// Where what is needed [`PREFETCH_BYTES`] after the byte at `offset` of one of `G` row groups in hand lies, from that byte on: after
/// its own group's last byte come the other groups, which are fetched by themselves, then the first of the next `G`.
#[inline(always)]
fn ahead<const G: usize>(tiles: [&[u8]; G], offset: usize, group_bytes: usize) -> usize {
    PREFETCH_BYTES + if offset + PREFETCH_BYTES < tiles[0].len() { 0 } else { (G - 1) * group_bytes }
}

/// Fetches line `line` of what lies `ahead` of the beginning of `tile`.
#[inline(always)]
fn fetch(s: Avx512, tile: &[u8], ahead: usize, line: usize) {
    // Past the last row group this points nowhere, which a hint may.
    with!(s, _mm_prefetch::<_MM_HINT_T0>(tile.as_ptr().wrapping_add(ahead + line * LINE_BYTES).cast()));
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

/// The weights of a block as unsigned bytes: vector `v` holds values `4 v .. 4 v + 4` of the sixteen rows.
#[inline(always)]
fn unpack<Q: Quant>(s: Avx512, tile: &[u8], block: usize) -> [__m512i; 8] {
    with!(s, {
        let vectors = Q::DATA_AT + block * Q::BLOCK_VECTORS * 64;
        let mut w = [_mm512_setzero_si512(); 8];
        if Q::BITS == 8 {
            for (v, w) in w.iter_mut().enumerate() {
                *w = _mm512_xor_si512(load(s, tile, vectors + v * 64), _mm512_set1_epi8(-128));
            }
            return w;
        }
        let nibble = _mm512_set1_epi8(15);
        for v in 0..4 {
            let packed = load(s, tile, vectors + v * 64);
            let high = _mm512_srli_epi16::<4>(packed);
            (w[v], w[v + 4]) = if Q::BITS == 5 {
                let (low_fifth, high_fifth) = fifth_bits(s, load(s, tile, Q::HIGH_AT + block * 64), v);
                // Nibble bits from the first, the others from the second.
                let low = _mm512_ternarylogic_epi32::<0xca>(nibble, packed, low_fifth);
                (low, _mm512_ternarylogic_epi32::<0xca>(nibble, high, high_fifth))
            } else {
                (_mm512_and_si512(packed, nibble), _mm512_and_si512(high, nibble))
            };
        }
        w
    })
}

/// The fifth bits of vectors `v` and `v + 4` at bit 4 of each byte; bits 5 to 7 are zero, 0 to 3 anything.
#[inline(always)]
fn fifth_bits(s: Avx512, high: __m512i, v: usize) -> (__m512i, __m512i) {
    with!(s, {
        let both = _mm512_and_si512(high, _mm512_set1_epi8(0x11 << v));
        match v {
            0 => (_mm512_slli_epi16::<4>(both), both),
            1 => (_mm512_slli_epi16::<3>(both), _mm512_srli_epi16::<1>(both)),
            2 => (_mm512_slli_epi16::<2>(both), _mm512_srli_epi16::<2>(both)),
            _ => (_mm512_slli_epi16::<1>(both), _mm512_srli_epi16::<3>(both)),
        }
    })
}

/// One row of activations against `G` row groups: four, where there are, since several streams bring memory in faster than one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn gemv<Q: Quant, const G: usize>(s: Avx512, tiles: [&[u8]; G], x: &[QBlock], out: &mut [[f32; ROW_GROUP]]) {
    let mut acc = [s.splat(0.0); G];
    for (i, x) in x.as_chunks::<TILE_BLOCKS>().0.iter().enumerate() {
        let ahead = ahead(tiles, i * Q::TILE_BYTES, tiles[0].len());
        for (tiles, acc) in tiles.iter().zip(&mut acc) {
            let tile = &tiles[i * Q::TILE_BYTES..][..Q::TILE_BYTES];
            for line in 0..Q::TILE_BYTES / LINE_BYTES {
                fetch(s, tile, ahead, line);
            }
            for (block, x) in x.iter().enumerate() {
                let extra = extra::<Q>(x);
                let isum = if Q::BITS == 4 {
                    dot4::<Q>(s, tile, block, x, extra)
                } else {
                    dot_unpacked::<Q>(s, tile, block, x, extra)
                };
                let scale = load_f16(s, tile, 0, block);
                let min = if Q::HAS_MIN { load_f16(s, tile, Q::MIN_AT, block) } else { scale };
                *acc = step::<Q>(s, *acc, isum, scale, min, x.d, extra);
            }
        }
    }
    for (acc, out) in acc.into_iter().zip(out) {
        s.store(acc, out);
    }
}

/// Integer dots of a 4-bit block. The high nibbles stay where they are, sixteen times themselves: one shift of their sum
/// in place of one of each vector.
#[inline(always)]
fn dot4<Q: Quant>(s: Avx512, tile: &[u8], block: usize, x: &QBlock, extra: u32) -> __m512i {
    with!(s, {
        let (low_mask, high_mask) = (_mm512_set1_epi8(15), _mm512_set1_epi8(-16));
        let mut low = start::<Q>(s, extra);
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
fn dot_unpacked<Q: Quant>(s: Avx512, tile: &[u8], block: usize, x: &QBlock, extra: u32) -> __m512i {
    with!(s, {
        let w = unpack::<Q>(s, tile, block);
        let (mut low, mut high) = (start::<Q>(s, extra), _mm512_setzero_si512());
        for v in 0..4 {
            low = _mm512_dpbusd_epi32(low, w[v], four(s, x, v));
            high = _mm512_dpbusd_epi32(high, w[v + 4], four(s, x, v + 4));
        }
        _mm512_add_epi32(low, high)
    })
}

/// One block's step of sixteen accumulators.
#[inline(always)]
fn step<Q: Quant>(s: Avx512, acc: __m512, isum: __m512i, scale: __m512, min: __m512, d: f32, extra: u32) -> __m512 {
    let isum = with!(s, _mm512_cvtepi32_ps(isum));
    let acc = s.fma(s.mul(scale, s.splat(d)), isum, acc);
    if Q::HAS_MIN { s.fma(min, s.splat(f32::from_bits(extra)), acc) } else { acc }
}

/// Adds the part's rows to `G` row groups; row `t` of group `g` is at `out[g * n + t]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn rows_product<Q: Quant, const G: usize>(
    s: Avx512,
    tiles: [&[u8]; G],
    group_bytes: usize,
    part: &Part<'_>,
    n: usize,
    out: &mut [[f32; ROW_GROUP]],
) {
    let Part { x, stride, extras, rows, blocks } = *part;
    assert!(rows != 0 && (rows - 1) * stride + blocks <= x.len() && rows * blocks <= extras.len());
    assert!((G - 1) * n + rows <= out.len());
    for b in 0..blocks {
        // Loops, not closures: the compiler may leave the closure of a `map` a function.
        let mut tile = tiles;
        for tile in &mut tile {
            *tile = &tile[b / TILE_BLOCKS * Q::TILE_BYTES..][..Q::TILE_BYTES];
        }
        let w = Weights::<G>::load::<Q>(s, tile, b % TILE_BLOCKS);
        let next = Next {
            tile,
            ahead: ahead(tiles, b / TILE_BLOCKS * Q::TILE_BYTES, group_bytes),
            line: b % TILE_BLOCKS * Next::<G>::lines::<Q>(),
        };
        // SAFETY: the slices have block `b` of every row and every row of every group, asserted above; `extras` is written.
        unsafe {
            let mut at = Cursor { x: x.as_ptr().add(b), extra: extras.as_ptr().add(b).cast(), out: out.as_mut_ptr() };
            let steps = Steps { stride, blocks, n };
            match rows % ROWS_AT_ONCE {
                1 => w.add_to::<Q, 1>(s, &mut at, &steps, Some(next)),
                2 => w.add_to::<Q, 2>(s, &mut at, &steps, Some(next)),
                3 => w.add_to::<Q, 3>(s, &mut at, &steps, Some(next)),
                4 => w.add_to::<Q, 4>(s, &mut at, &steps, Some(next)),
                5 => w.add_to::<Q, 5>(s, &mut at, &steps, Some(next)),
                _ => (0..8).for_each(|step| next.fetch::<Q>(s, step)),
            }
            for _ in 0..rows / ROWS_AT_ONCE {
                w.add_to::<Q, ROWS_AT_ONCE>(s, &mut at, &steps, None);
            }
        }
    }
}

/// Where a row's numbers of one block are.
struct Cursor {
    x: *const QBlock,
    extra: *const u32,
    out: *mut [f32; ROW_GROUP],
}

/// How far apart rows are, blocks of `x` and entries of `extra`, and groups of `out`.
struct Steps {
    stride: usize,
    blocks: usize,
    n: usize,
}

/// What is fetched while a block is worked on: evenly among the multiplications, since a burst of fetches holds up all that follows
/// until the last of them is under way.
#[derive(Clone, Copy)]
struct Next<'a, const G: usize> {
    tile: [&'a [u8]; G],
    ahead: usize,
    line: usize,
}

impl<const G: usize> Next<'_, G> {
    /// Lines of each row group a block.
    const fn lines<Q: Quant>() -> usize {
        (Q::TILE_BYTES / LINE_BYTES).div_ceil(TILE_BLOCKS)
    }

    /// Fetches the `step`-th eighth.
    #[inline(always)]
    fn fetch<Q: Quant>(&self, s: Avx512, step: usize) {
        for line in (step..Self::lines::<Q>()).step_by(8) {
            for tile in self.tile {
                fetch(s, tile, self.ahead, self.line + line);
            }
        }
    }
}

/// One block of `G` row groups, unpacked: it stays in registers while all activations pass.
struct Weights<const G: usize> {
    w: [[__m512i; 8]; G],
    scale: [__m512; G],
    min: [__m512; G],
}

impl<const G: usize> Weights<G> {
    #[inline(always)]
    fn load<Q: Quant>(s: Avx512, tiles: [&[u8]; G], block: usize) -> Self {
        let zero = s.splat(0.0);
        let mut weights = Self { w: [[with!(s, _mm512_setzero_si512()); 8]; G], scale: [zero; G], min: [zero; G] };
        // A loop: the compiler may leave the closure of `map` a function, and that lacks the set's features.
        for (g, tile) in tiles.into_iter().enumerate() {
            weights.w[g] = unpack::<Q>(s, tile, block);
            weights.scale[g] = load_f16(s, tile, 0, block);
            if Q::HAS_MIN {
                weights.min[g] = load_f16(s, tile, Q::MIN_AT, block);
            }
        }
        weights
    }

    /// Adds the block's part to `T` rows and moves on; `G * T` sums in hand hide the latency of the multiplications.
    ///
    /// # Safety
    /// There are `T` rows at the cursor.
    #[inline(always)]
    unsafe fn add_to<Q: Quant, const T: usize>(
        &self,
        s: Avx512,
        at: &mut Cursor,
        steps: &Steps,
        next: Option<Next<'_, G>>,
    ) {
        // SAFETY: the caller's promise; the last step may leave the slices but is not followed.
        unsafe {
            let x: [&QBlock; T] = std::array::from_fn(|t| &*at.x.add(t * steps.stride));
            let extra: [u32; T] = std::array::from_fn(|t| *at.extra.add(t * steps.blocks));
            let mut isum = [[_mm512_setzero_si512(); G]; T];
            for (isum, extra) in isum.iter_mut().zip(extra) {
                *isum = [start::<Q>(s, extra); G];
            }
            for v in 0..8 {
                if let Some(next) = &next {
                    next.fetch::<Q>(s, v);
                }
                for (isum, x) in isum.iter_mut().zip(x) {
                    let q = four(s, x, v);
                    for (isum, w) in isum.iter_mut().zip(&self.w) {
                        *isum = _mm512_dpbusd_epi32(*isum, w[v], q);
                    }
                }
            }
            for (t, isum) in isum.iter().enumerate() {
                for (g, isum) in isum.iter().enumerate() {
                    let out = &mut *at.out.add(g * steps.n + t);
                    let acc = step::<Q>(s, s.load(out), *isum, self.scale[g], self.min[g], x[t].d, extra[t]);
                    s.store(acc, out);
                }
            }
            at.x = at.x.wrapping_add(T * steps.stride);
            at.extra = at.extra.wrapping_add(T * steps.blocks);
            at.out = at.out.wrapping_add(T);
        }
    }
}
