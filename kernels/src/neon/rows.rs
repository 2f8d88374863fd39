//! Quantized products over R16K4 tiles on AArch64, for any way to form a block's integer sums ([`Dot`]): one row of activations
//! over sixteen weight rows at once, several over eight weight rows whose unpacked weights stay in registers.
//! `neon/product.rs` and `dotprod/product.rs` bring the sums.

use std::arch::aarch64::*;
use std::arch::asm;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::unpack::{Masks, signed};
use super::{neon, widen_eight_f16, widen_f16, widen_high_f16};
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS};
use crate::matrix::Matrix;

/// How far ahead of its use a tile is fetched when streaming, bytes.
pub(crate) const PREFETCH_BYTES: usize = 1024;
/// Activation rows that go over a row group together at most: their sums and the cache lines in use stay in a first-level cache
/// (32 KiB at least, 64 on most with dotprod), and unpacking is a hundredth of the work.
pub(crate) const ROWS_AT_ONCE: usize = 128;
/// Forms the integer sums of one block.
pub(crate) trait Dot: Copy {
    /// Rows of activations that go over a row group one by one, unpacking included: so few do not pay for the way that several take
    /// together, unless the weights have fifth bits to unpack.
    fn few_rows(self) -> usize;

    /// Whether taking moves the pointer on. What lies in a tile is then taken in order; otherwise the pointer stays at its start.
    const STREAMS: bool;

    /// Four registers, `offset` bytes into the tile; `turn`, 0 or 1 for vectors, 2 or 3 for tables, says which ones are likely free.
    ///
    /// # Safety
    /// `at` points to a tile's start or, with [`Self::STREAMS`], to byte `offset` of it, which has 64 more.
    unsafe fn take_four(self, at: &mut *const u8, offset: usize, turn: usize) -> [uint8x16_t; 4];

    /// The block at `x`, and past it.
    ///
    /// # Safety
    /// `x` points to a block.
    unsafe fn take_block(self, x: &mut *const QBlock) -> Activations;

    /// `Σ w q` of sixteen rows, the format's offset subtracted. `pair(j)`, called with 0 to 3 in order, gives two unpacked
    /// vectors, four rows a register: with 8 bits those of values `8 j ..` and `8 j + 4 ..`, otherwise of `4 j ..` and `16 + 4 j ..`.
    fn dot<Q: Quant>(self, x: Activations, pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2]) -> [int32x4_t; 4];

    /// One block's step of the accumulators of `n` rows of activations, the first block at `x`, the others `row_bytes` apart.
    ///
    /// # Safety
    /// `x` points to a block in each row; `sums` holds `n` rows.
    unsafe fn pass<Q: Quant>(self, w: EightRows, x: *const QBlock, row_bytes: usize, n: usize, sums: *mut [f32; 8]);
}

/// `Kernels::matmul` for the quantized format `Q`.
#[inline(always)]
pub(crate) fn groups_product<Q: Quant>(
    dot: impl Dot,
    w: &Matrix<'_>,
    groups: Range<usize>,
    x: &[QBlock],
    n: usize,
    out: &mut [f32],
) {
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    let row = blocks_per_row(w.cols());
    if n == 1 {
        let bytes = w.tiles_per_group() * Q::TILE_BYTES;
        return gemv::<Q, _>(dot, &w.tiles()[groups.start * bytes..groups.end * bytes], x, out);
    }
    if n == 0 {
        return;
    }
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        if row == 0 {
            out.fill([0.0; ROW_GROUP]);
        } else if n <= dot.few_rows() && Q::BITS != 5 {
            for (x, out) in x.chunks_exact(row).zip(out.chunks_exact_mut(1)) {
                gemv::<Q, _>(dot, w.group(group), x, out);
            }
        } else {
            for (x, out) in x.chunks(ROWS_AT_ONCE * row).zip(out.chunks_mut(ROWS_AT_ONCE)) {
                rows_product::<Q>(dot, w.group(group), x, row, out);
            }
        }
    }
}

/// One row of activations against row groups that lie back to back.
#[inline(always)]
fn gemv<Q: Quant, D: Dot>(dot: D, tiles: &[u8], x: &[QBlock], out: &mut [[f32; ROW_GROUP]]) {
    assert_eq!(tiles.len(), x.len() / TILE_BLOCKS * Q::TILE_BYTES * out.len());
    let mut at = tiles.as_ptr();
    let masks = Masks::new();
    for out in out {
        let mut acc = neon!([vdupq_n_f32(0.0); 4]);
        let mut x_at = x.as_ptr();
        for _ in 0..x.len() / TILE_BLOCKS {
            // SAFETY: there is a tile for each pair of blocks and each group, asserted above; the pointers pass the last ones only
            // after the loops.
            unsafe {
                fetch_ahead::<Q>(at);
                let tables = Tables::take::<Q, _>(dot, &mut at);
                // Written out: the compiler does not unroll loops of this size.
                acc = sixteen_rows::<Q, _, 0>(dot, masks, &tables, &mut at, &mut x_at, acc);
                (acc, at) = after(acc, at);
                acc = sixteen_rows::<Q, _, 1>(dot, masks, &tables, &mut at, &mut x_at, acc);
                at = hidden(if D::STREAMS { at } else { at.add(Q::TILE_BYTES) });
                x_at = hidden(x_at);
            }
        }
        for (out, acc) in out.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
            neon!(vst1q_f32(out.as_mut_ptr(), acc));
        }
    }
}

/// Block `B` of a tile.
///
/// # Safety
/// `at` points to the tile's start or, with [`Dot::STREAMS`], to the block's vectors; `x` points to a block.
#[inline(always)]
unsafe fn sixteen_rows<Q: Quant, D: Dot, const B: usize>(
    dot: D,
    masks: Masks,
    tables: &Tables,
    at: &mut *const u8,
    x: &mut *const QBlock,
    acc: [float32x4_t; 4],
) -> [float32x4_t; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let vectors = Q::DATA_AT + B * Q::BLOCK_VECTORS * 64;
        let tile = if D::STREAMS { at.sub(vectors) } else { *at };
        let factors = if D::STREAMS { tables.factors(B) } else { Factors::load::<Q>(tile.add(B * 32)) };
        let high = if Q::BITS == 5 { four_at(tile.add(Q::HIGH_AT + B * 64)) } else { [vdupq_n_u8(0); 4] };
        let block = dot.take_block(x);
        let mut vector = |v: usize| dot.take_four(at, vectors + v * 64, v % 2);
        let isum = dot.dot::<Q>(block, |j| {
            if Q::BITS == 8 {
                [vector(2 * j), vector(2 * j + 1)].map(signed)
            } else {
                masks.unpacked::<Q, 4>(vector(j), high, j)
            }
        });
        factors.step::<Q>(acc, isum, block)
    }
}

/// A tile's scales and minimums as they lie there, taken at once where the pointer moves on.
struct Tables {
    scale: [uint8x16_t; 4],
    min: [uint8x16_t; 4],
}

impl Tables {
    /// With [`Dot::STREAMS`], moves `at` to the tile's vectors.
    ///
    /// # Safety
    /// `at` points to a tile.
    #[inline(always)]
    unsafe fn take<Q: Quant, D: Dot>(dot: D, at: &mut *const u8) -> Self {
        let none = neon!([vdupq_n_u8(0); 4]);
        if !D::STREAMS {
            return Self { scale: none, min: none };
        }
        // SAFETY: the caller's promise.
        unsafe {
            let scale = dot.take_four(at, 0, 2);
            let min = if Q::HAS_MIN { dot.take_four(at, Q::MIN_AT, 3) } else { none };
            *at = at.add(Q::DATA_AT - Q::HIGH_AT);
            Self { scale, min }
        }
    }

    #[inline(always)]
    fn factors(&self, block: usize) -> Factors<4> {
        let widen = |table: &[uint8x16_t; 4]| {
            let [[a, b], [c, d]] = [widen_eight_f16(table[2 * block]), widen_eight_f16(table[2 * block + 1])];
            [a, b, c, d]
        };
        Factors { scale: widen(&self.scale), min: widen(&self.min) }
    }
}

/// `out`'s rows of activations against one row group. The weights of eight rows of a block stay in sixteen registers while all
/// activations pass.
#[inline(always)]
fn rows_product<Q: Quant>(dot: impl Dot, tiles: &[u8], x: &[QBlock], row: usize, out: &mut [[f32; ROW_GROUP]]) {
    assert!(out.len() <= ROWS_AT_ONCE && x.len() == out.len() * row);
    let mut sums = [Accumulators::<f32>::new(); 2];
    let [low, high] = sums.each_mut().map(|half| half.zeros(out.len()));
    for (i, tile) in tiles.chunks_exact(Q::TILE_BYTES).enumerate() {
        fetch_ahead::<Q>(tile.as_ptr());
        for (half, sums) in [&mut *low, &mut *high].into_iter().enumerate() {
            for block in 0..TILE_BLOCKS {
                let w = EightRows::new::<Q>(tile, block, half);
                let x = x[i * TILE_BLOCKS + block..].as_ptr();
                // SAFETY: each of `out.len()` rows of `x` has this block, and `sums` as many.
                unsafe { dot.pass::<Q>(w, x, row * size_of::<QBlock>(), out.len(), sums.as_mut_ptr()) };
            }
        }
    }
    store(low, high, out);
}

/// Place for eight values of every row of activations, written where there is a row.
#[derive(Clone, Copy)]
pub(crate) struct Accumulators<T: Copy>([MaybeUninit<[T; 8]>; ROWS_AT_ONCE]);

impl<T: Copy + Default> Accumulators<T> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self([MaybeUninit::uninit(); ROWS_AT_ONCE])
    }

    /// Zeros for the first `n` rows.
    #[inline(always)]
    pub(crate) fn zeros(&mut self, n: usize) -> &mut [[T; 8]] {
        let rows = &mut self.0[..n];
        for row in &mut *rows {
            row.write([T::default(); 8]);
        }
        // SAFETY: all of these were just written.
        unsafe { rows.assume_init_mut() }
    }
}

/// Brings both halves of sixteen rows together.
#[inline(always)]
pub(crate) fn store(low: &[[f32; 8]], high: &[[f32; 8]], out: &mut [[f32; ROW_GROUP]]) {
    // SAFETY: the same slice. Its pointer is hidden because the compiler would otherwise reach it from `low`, too far for a pair.
    let high = unsafe { std::slice::from_raw_parts(hidden(high.as_ptr()), high.len()) };
    for (out, (low, high)) in out.iter_mut().zip(std::iter::zip(low, high)) {
        out[..8].copy_from_slice(low);
        out[8..].copy_from_slice(high);
    }
}

/// One block of activations in registers.
#[derive(Clone, Copy)]
pub(crate) struct Activations {
    pub(crate) q: [int8x16_t; 2],
    /// `d` and `d_sum`.
    pub(crate) factors: float32x4_t,
    /// In every lane.
    pub(crate) sum: int32x4_t,
}

impl Activations {
    /// The block at `x`.
    ///
    /// # Safety
    /// There is one.
    #[inline(always)]
    pub(crate) unsafe fn load(x: *const QBlock) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let q: *const i8 = x.cast();
            let factors = vld1_f32(&raw const (*x).d);
            Self {
                q: [vld1q_s8(q), vld1q_s8(q.add(16))],
                factors: vcombine_f32(factors, factors),
                sum: vld1q_dup_s32(&raw const (*x).sum),
            }
        }
    }
}

/// Scales and minimums of `4 R` rows of one block.
#[derive(Clone, Copy)]
pub(crate) struct Factors<const R: usize> {
    pub(crate) scale: [float32x4_t; R],
    /// Zeros where the format has none.
    pub(crate) min: [float32x4_t; R],
}

impl<const R: usize> Factors<R> {
    /// # Safety
    /// `at` points to the scales of the first row of a block in a tile.
    #[inline(always)]
    unsafe fn load<Q: Quant>(at: *const u8) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                scale: widened(at),
                min: if Q::HAS_MIN { widened(at.add(Q::MIN_AT)) } else { [vdupq_n_f32(0.0); R] },
            }
        }
    }

    /// One block's step of the accumulators.
    #[inline(always)]
    pub(crate) fn step<Q: Quant>(
        &self,
        acc: [float32x4_t; R],
        isum: [int32x4_t; R],
        x: Activations,
    ) -> [float32x4_t; R] {
        std::array::from_fn(|r| {
            neon!({
                let scale = vmulq_laneq_f32::<0>(self.scale[r], x.factors);
                let scaled = vfmaq_f32(acc[r], scale, vcvtq_f32_s32(isum[r]));
                if Q::HAS_MIN { vfmaq_laneq_f32::<1>(scaled, self.min[r], x.factors) } else { scaled }
            })
        })
    }
}

/// Eight rows of one block, unpacked, the format's offset subtracted.
pub(crate) struct EightRows {
    /// `[vector][rows 0 to 3, rows 4 to 7]`, a byte a value; vectors as activations: values `4 v .. 4 v + 4`.
    pub(crate) w: [[int8x16_t; 2]; 8],
    pub(crate) factors: Factors<2>,
}

impl EightRows {
    #[inline(always)]
    fn new<Q: Quant>(tile: &[u8], block: usize, half: usize) -> Self {
        let tile: &[u8] = &tile[..Q::TILE_BYTES];
        let mut w = neon!([[vdupq_n_s8(0); 2]; 8]);
        // SAFETY: within the tile, whose length was just checked, by the layout of `Quant`.
        let factors = unsafe {
            let rows = tile.as_ptr().add(half * 32);
            let vector = |v: usize| two_at(rows.add(Q::DATA_AT + (block * Q::BLOCK_VECTORS + v) * 64));
            let high = if Q::BITS == 5 { two_at(rows.add(Q::HIGH_AT + block * 64)) } else { [vdupq_n_u8(0); 2] };
            for j in 0..4 {
                (w[j], w[j + 4]) = if Q::BITS == 8 {
                    (signed(vector(j)), signed(vector(j + 4)))
                } else {
                    Masks::new()
                        .unpacked::<Q, 2>(vector(j), high, j)
                        .map(|w| w.map(|w| vsubq_s8(w, vdupq_n_s8(Q::OFFSET as i8))))
                        .into()
                };
            }
            Factors::load::<Q>(tile.as_ptr().add(block * 32 + half * 16))
        };
        Self { w, factors }
    }
}

/// Fetches the counterpart of the tile at `p` further on, line by line. Past the last row group it points nowhere, which a hint
/// may.
#[inline(always)]
fn fetch_ahead<Q: Quant>(p: *const u8) {
    prefetch_at::<0>(p);
    prefetch_at::<1>(p);
    prefetch_at::<2>(p);
    prefetch_at::<3>(p);
    prefetch_at::<4>(p);
    prefetch_at::<5>(p);
    prefetch_at::<6>(p);
    prefetch_at::<7>(p);
    prefetch_at::<8>(p);
    if Q::TILE_BYTES > 9 * 64 {
        prefetch_at::<9>(p);
    }
    if Q::TILE_BYTES > 10 * 64 {
        prefetch_at::<10>(p);
    }
    if Q::TILE_BYTES > 11 * 64 {
        prefetch_at::<11>(p);
    }
    if Q::TILE_BYTES > 12 * 64 {
        prefetch_at::<12>(p);
        prefetch_at::<13>(p);
        prefetch_at::<14>(p);
        prefetch_at::<15>(p);
        prefetch_at::<16>(p);
    }
}

/// Fetches the line `LINE` lines past [`PREFETCH_BYTES`]. The offset is part of the instruction: the compiler would otherwise
/// reach the tile's own bytes from the prefetched address, by one subtraction each.
#[inline(always)]
fn prefetch_at<const LINE: usize>(p: *const u8) {
    // SAFETY: a hint; it neither faults nor changes memory, whatever the address.
    unsafe {
        asm!("prfm pldl1keep, [{p}, {offset}]", p = in(reg) p, offset = const PREFETCH_BYTES + 64 * LINE,
            options(nostack, preserves_flags, readonly));
    }
}

/// The same, but what is read through `at` is read only when `acc` is there: two blocks mixed take more registers than there are.
#[inline(always)]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "nothing is read through it here")]
fn after(acc: [float32x4_t; 4], at: *const u8) -> ([float32x4_t; 4], *const u8) {
    let [mut a, mut b, mut c, mut d] = acc;
    let mut at = at;
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} {1:v} {2:v} {3:v} {4:v} */", inout(reg) at, inout(vreg) a, inout(vreg) b, inout(vreg) c, inout(vreg) d,
            options(pure, nomem, nostack, preserves_flags));
    }
    ([a, b, c, d], at)
}

/// The same pointer, of which the compiler knows nothing: it would otherwise keep another one that is better for one of many uses
/// and costs the others an addition each.
#[inline(always)]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "nothing is read through it here")]
pub(crate) fn hidden<T>(p: *const T) -> *const T {
    let mut p = p;
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) }
    p
}

/// Four registers from `at` on, by one instruction.
///
/// # Safety
/// `at` points to 64 bytes.
#[inline(always)]
pub(crate) unsafe fn four_at(at: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: the caller's promise.
    let uint8x16x4_t(a, b, c, d) = unsafe { vld1q_u8_x4(at) };
    [a, b, c, d]
}

/// Two registers from `at` on.
///
/// # Safety
/// `at` points to 32 bytes.
#[inline(always)]
pub(crate) unsafe fn two_at(at: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: the caller's promise.
    unsafe { [vld1q_u8(at), vld1q_u8(at.add(16))] }
}

/// `4 R` f16 from `at` on, as f32.
///
/// # Safety
/// `at` points to them.
#[inline(always)]
pub(crate) unsafe fn widened<const R: usize>(at: *const u8) -> [float32x4_t; R] {
    std::array::from_fn(|r| {
        // SAFETY: the caller's promise.
        let eight = neon!(vreinterpretq_u16_u8(vld1q_u8(at.add(r / 2 * 16))));
        if r % 2 == 0 { neon!(widen_f16(vget_low_u16(eight))) } else { widen_high_f16(eight) }
    })
}
