//! Quantized products over R16K4 tiles on AArch64, for any way to form a block's integer sums ([`Dot`]): one row of activations
//! over sixteen weight rows at once, several over eight weight rows whose unpacked weights stay in registers.
//! `neon/product.rs` and `dotprod/product.rs` bring the sums.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::{neon, widen_f16, widen_high_f16};
use crate::activation::{QBlock, blocks_per_row};
use crate::format::{Quant, ROW_GROUP, TILE_BLOCKS};
use crate::matrix::Matrix;

/// How far ahead of its use a tile is fetched when streaming, bytes.
const PREFETCH_BYTES: usize = 1024;
/// Activation rows that go over a row group together at most: their sums and the cache lines in use stay in a first-level cache
/// of 32 KiB, and unpacking is a hundredth of the work.
const ROWS_AT_ONCE: usize = 64;
/// Activation rows between two steps of the loop's counters.
const UNROLLED: usize = 4;

/// Forms the integer sums of one block.
pub(crate) trait Dot: Copy {
    /// `Σ w q` of `4 R` rows, the format's offset subtracted. `pair(j)`, 0 to 3: the unpacked vectors `j` and `j + 4`, four rows
    /// a register, whose bytes meet activations `4 j ..` and `16 + 4 j ..`.
    fn dot<Q: Quant, const R: usize>(self, x: &QBlock, pair: impl Fn(usize) -> [[int8x16_t; R]; 2]) -> [int32x4_t; R];
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
    if n == 1 {
        for (group, out) in groups.zip(out) {
            gemv::<Q>(dot, w.group(group), x, out);
        }
        return;
    }
    if n == 0 {
        return;
    }
    let row = blocks_per_row(w.cols());
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        out.fill([0.0; ROW_GROUP]);
        if row == 0 {
            continue;
        }
        for (x, out) in x.chunks(ROWS_AT_ONCE * row).zip(out.chunks_mut(ROWS_AT_ONCE)) {
            for (i, tile) in w.group(group).chunks_exact(Q::TILE_BYTES).enumerate() {
                fetch_ahead::<Q>(tile);
                rows_product::<Q>(dot, tile, &x[i * TILE_BLOCKS..], row, out);
            }
        }
    }
}

/// One row of activations against one row group.
#[inline(always)]
fn gemv<Q: Quant>(dot: impl Dot, tiles: &[u8], x: &[QBlock], out: &mut [f32; ROW_GROUP]) {
    let mut acc = neon!([vdupq_n_f32(0.0); 4]);
    for (tile, x) in tiles.chunks_exact(Q::TILE_BYTES).zip(x.as_chunks::<TILE_BLOCKS>().0) {
        fetch_ahead::<Q>(tile);
        // Written out, like the unrolled rows below: the compiler does not unroll loops of this size.
        acc = sixteen_rows::<Q>(dot, tile, 0, &x[0], acc);
        acc = sixteen_rows::<Q>(dot, tile, 1, &x[1], acc);
    }
    for (out, acc) in out.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
        neon!(vst1q_f32(out.as_mut_ptr(), acc));
    }
}

#[inline(always)]
fn sixteen_rows<Q: Quant>(
    dot: impl Dot,
    tile: &[u8],
    block: usize,
    x: &QBlock,
    acc: [float32x4_t; 4],
) -> [float32x4_t; 4] {
    let packed = Packed::<Q, 4>::new(tile, block, 0);
    packed.factors().step(acc, dot.dot::<Q, 4>(x, |j| packed.pair(j)), x)
}

/// Adds one tile's part to every row in `out`; `x` starts at the tile's first block of the first row, rows are `stride`
/// blocks apart. The weights of eight rows of a block stay in sixteen registers while all activations pass.
#[inline(always)]
fn rows_product<Q: Quant>(dot: impl Dot, tile: &[u8], x: &[QBlock], stride: usize, out: &mut [[f32; ROW_GROUP]]) {
    assert!((out.len() - 1) * stride + TILE_BLOCKS <= x.len());
    for block in 0..TILE_BLOCKS {
        for half in 0..2 {
            let mut w = EightRows::<Q>::new(tile, block, half);
            let mut x = x[block..].as_ptr();
            let mut acc = out.as_flattened_mut()[half * 8..].as_mut_ptr();
            let mut left = out.len();
            // SAFETY: `x` has a block of every row that `out` has (asserted above), `acc` eight of its sixteen values; both step
            // past their ends only after the last row, and are not read there.
            unsafe {
                while left >= UNROLLED {
                    w.add_to(dot, &mut *acc.cast(), &*x);
                    x = hidden(x.wrapping_add(stride));
                    w.add_to(dot, &mut *acc.add(ROW_GROUP).cast(), &*x);
                    x = hidden(x.wrapping_add(stride));
                    w.add_to(dot, &mut *acc.add(2 * ROW_GROUP).cast(), &*x);
                    x = hidden(x.wrapping_add(stride));
                    w.add_to(dot, &mut *acc.add(3 * ROW_GROUP).cast(), &*x);
                    x = hidden(x.wrapping_add(stride));
                    acc = acc.wrapping_add(UNROLLED * ROW_GROUP);
                    left -= UNROLLED;
                }
                for _ in 0..left {
                    w.add_to(dot, &mut *acc.cast(), &*x);
                    x = x.wrapping_add(stride);
                    acc = acc.wrapping_add(ROW_GROUP);
                }
            }
        }
    }
}

/// `4 R` rows of one block as they lie in a tile.
struct Packed<'a, Q, const R: usize> {
    tile: &'a [u8],
    block: usize,
    /// The first of the rows.
    row: usize,
    /// Fifth bits.
    high: [uint8x16_t; R],
    format: std::marker::PhantomData<Q>,
}

impl<'a, Q: Quant, const R: usize> Packed<'a, Q, R> {
    #[inline(always)]
    fn new(tile: &'a [u8], block: usize, row: usize) -> Self {
        let high =
            if Q::BITS == 5 { registers(tile, Q::HIGH_AT + block * 64 + row * 4) } else { neon!([vdupq_n_u8(0); R]) };
        Self { tile, block, row, high, format: std::marker::PhantomData }
    }

    #[inline(always)]
    fn vector(&self, v: usize) -> [uint8x16_t; R] {
        registers(self.tile, Q::DATA_AT + (self.block * Q::BLOCK_VECTORS + v) * 64 + self.row * 4)
    }

    /// Vectors `j` and `j + 4`, a byte a value.
    #[inline(always)]
    fn pair(&self, j: usize) -> [[int8x16_t; R]; 2] {
        neon!({
            if Q::BITS == 8 {
                return [j, j + 4].map(|v| self.vector(v).map(|w| vreinterpretq_s8_u8(w)));
            }
            let packed = self.vector(j);
            let mut low = packed.map(|w| vandq_u8(w, vdupq_n_u8(15)));
            let mut high = packed.map(|w| vshrq_n_u8::<4>(w));
            if Q::BITS == 5 {
                for r in 0..R {
                    low[r] = vorrq_u8(low[r], fifth_bits(self.high[r], j));
                    high[r] = vorrq_u8(high[r], fifth_bits(self.high[r], j + 4));
                }
            }
            [low, high].map(|w| w.map(|w| vreinterpretq_s8_u8(w)))
        })
    }

    #[inline(always)]
    fn factors(&self) -> Factors<Q, R> {
        let at = self.block * 2 * ROW_GROUP + self.row * 2;
        let min = if Q::HAS_MIN { widened(self.tile, Q::MIN_AT + at) } else { neon!([vdupq_n_f32(0.0); R]) };
        Factors { scale: widened(self.tile, at), min, format: std::marker::PhantomData }
    }
}

/// Scales and minimums of `4 R` rows of one block.
#[derive(Clone, Copy)]
struct Factors<Q, const R: usize> {
    scale: [float32x4_t; R],
    min: [float32x4_t; R],
    format: std::marker::PhantomData<Q>,
}

impl<Q: Quant, const R: usize> Factors<Q, R> {
    /// One block's step of the accumulators.
    #[inline(always)]
    fn step(&self, acc: [float32x4_t; R], isum: [int32x4_t; R], x: &QBlock) -> [float32x4_t; R] {
        neon!({
            // `d` and `d_sum`, one load.
            let factors = vld1_f32(&raw const x.d);
            std::array::from_fn(|r| {
                let scale = vmulq_lane_f32::<0>(self.scale[r], factors);
                let scaled = vfmaq_f32(acc[r], scale, vcvtq_f32_s32(isum[r]));
                if Q::HAS_MIN { vfmaq_lane_f32::<1>(scaled, self.min[r], factors) } else { scaled }
            })
        })
    }
}

/// Eight rows of one block, unpacked.
struct EightRows<Q> {
    /// `[vector][rows 0 to 3, rows 4 to 7]`, a byte a value; vectors as activations: values `4 v .. 4 v + 4`.
    w: [[int8x16_t; 2]; 8],
    factors: Factors<Q, 2>,
}

impl<Q: Quant> EightRows<Q> {
    #[inline(always)]
    fn new(tile: &[u8], block: usize, half: usize) -> Self {
        let packed = Packed::<Q, 2>::new(tile, block, half * 8);
        let mut w = neon!([[vdupq_n_s8(0); 2]; 8]);
        for j in 0..4 {
            [w[j], w[j + 4]] = packed.pair(j);
        }
        Self { w, factors: packed.factors() }
    }

    /// Hides where the weights come from, once a pass: the compiler would otherwise split every register into two halves
    /// outside the loop, run out of registers and fetch the halves from the stack.
    #[inline(always)]
    fn keep_whole(&mut self) {
        for w in self.w.as_flattened_mut() {
            let mut whole = *w;
            // SAFETY: no instruction at all.
            unsafe { asm!("/* {0:v} */", inout(vreg) whole, options(nomem, nostack, preserves_flags)) }
            *w = whole;
        }
    }

    /// One block's step of the accumulators of eight rows.
    #[inline(always)]
    fn add_to(&mut self, dot: impl Dot, acc: &mut [f32; 8], x: &QBlock) {
        self.keep_whole();
        let isum = dot.dot::<Q, 2>(x, |j| [self.w[j], self.w[j + 4]]);
        let [low, high] = acc.as_chunks_mut::<4>().0 else { return };
        neon!({
            let sum = self.factors.step([vld1q_f32(low.as_ptr()), vld1q_f32(high.as_ptr())], isum, x);
            vst1q_f32(low.as_mut_ptr(), sum[0]);
            vst1q_f32(high.as_mut_ptr(), sum[1]);
        });
    }
}

/// A block's values in two registers: two loads, where a repeating load for every four would need an address each.
#[inline(always)]
pub(crate) fn values(x: &QBlock) -> [int8x16_t; 2] {
    let q = x.q.as_chunks::<16>().0;
    neon!([vld1q_s8(q[0].as_ptr()), vld1q_s8(q[1].as_ptr())])
}

/// The fifth bits of the values of vector `v` (0 to 3 low nibbles, 4 to 7 high), as 16 or 0 a byte.
#[inline(always)]
fn fifth_bits(high: uint8x16_t, v: usize) -> uint8x16_t {
    neon!({
        let shifted = match v {
            0 => vshlq_n_u8::<4>(high),
            1 => vshlq_n_u8::<3>(high),
            2 => vshlq_n_u8::<2>(high),
            3 => vshlq_n_u8::<1>(high),
            4 => high,
            5 => vshrq_n_u8::<1>(high),
            6 => vshrq_n_u8::<2>(high),
            _ => vshrq_n_u8::<3>(high),
        };
        vandq_u8(shifted, vdupq_n_u8(16))
    })
}

/// Fetches the tile's counterpart further on, line by line. Past the last row group it points nowhere, which a hint may.
#[inline(always)]
fn fetch_ahead<Q: Quant>(tile: &[u8]) {
    let p = tile.as_ptr();
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

/// The same pointer, of which the compiler knows nothing: it would otherwise keep one for each of the unrolled rows.
#[inline(always)]
fn hidden<T>(p: *const T) -> *const T {
    let mut p = p;
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) }
    p
}

/// `R` registers from byte `at` on.
#[inline(always)]
fn registers<const R: usize>(tile: &[u8], at: usize) -> [uint8x16_t; R] {
    let bytes = tile[at..at + 16 * R].as_chunks::<16>().0;
    std::array::from_fn(|r| neon!(vld1q_u8(bytes[r].as_ptr())))
}

/// `4 R` f16 from byte `at` on, as f32.
#[inline(always)]
fn widened<const R: usize>(tile: &[u8], at: usize) -> [float32x4_t; R] {
    let bytes = tile[at..at + 8 * R].as_chunks::<16>().0;
    std::array::from_fn(|r| {
        let eight = neon!(vreinterpretq_u16_u8(vld1q_u8(bytes[r / 2].as_ptr())));
        if r % 2 == 0 { neon!(widen_f16(vget_low_u16(eight))) } else { widen_high_f16(eight) }
    })
}
