//! Products of the K formats on AArch64, built as those of the other formats in `neon/rows.rs`: one row of activations over sixteen
//! weight rows at once, several over eight weight rows of a group of 32 values whose unpacked weights stay in registers.
//! `scalar` specifies them; `neon/product.rs` and `dotprod/product.rs` bring the integer sums ([`KDot`]).

use std::arch::aarch64::*;
use std::ops::Range;

use super::rows::{Accumulators, Dot, PREFETCH_BYTES, ROWS_AT_ONCE, four_at, hidden, store, two_at, widened};
use super::unpack::{Masks, signed, upper};
use super::{neon, prefetch};
use crate::activation::{QBlockK, k_blocks_per_row};
use crate::format::ROW_GROUP;
use crate::kquant::{GROUPS, KQuant, NIBBLE_BYTES};
use crate::matrix::Matrix;

/// Forms the integer sums of one group.
pub(crate) trait KDot: Dot {
    /// `Σ w q` of sixteen rows over a group of a format with one scale for it. `pair(j)`, called with 0 to 3 in order, gives the
    /// unpacked vectors of values `4 j ..` and `16 + 4 j ..`, four rows a register.
    fn group<Q: KQuant>(self, x: [int8x16_t; 2], pair: impl FnMut(usize) -> [[int8x16_t; 4]; 2]) -> [int32x4_t; 4];

    /// `Σ (w - 32) q` of sixteen rows over sixteen values, whose sum is `sum`; `vector(j)` as above.
    fn half(self, x: int8x16_t, sum: i16, vector: impl FnMut(usize) -> [int8x16_t; 4]) -> [int32x4_t; 4];

    /// One group's step of the integer sums of `n` rows of activations, the first one's values at `x`, the others' `row_bytes` apart.
    ///
    /// # Safety
    /// `x` points to 32 values in each row; `isums` holds `n` rows.
    unsafe fn group_pass<Q: KQuant>(
        self,
        w: EightRowsK,
        x: *const i8,
        row_bytes: usize,
        n: usize,
        isums: *mut [i32; 8],
    );
}

/// Eight rows of one group, unpacked, the format's offset subtracted.
pub(crate) struct EightRowsK {
    /// `[vector][rows 0 to 3, rows 4 to 7]`; vectors as activations: values `4 v .. 4 v + 4`.
    pub(crate) w: [[int8x16_t; 2]; 8],
    /// Of the first and the second sixteen values.
    pub(crate) scales: [[int32x4_t; 2]; 2],
}

/// `Kernels::matmul` for the K format `Q`.
#[inline(always)]
pub(crate) fn groups_product_k<Q: KQuant>(
    dot: impl KDot,
    w: &Matrix<'_>,
    groups: Range<usize>,
    x: &[QBlockK],
    n: usize,
    out: &mut [f32],
) {
    let out = out.as_chunks_mut::<ROW_GROUP>().0;
    let row = k_blocks_per_row(w.cols());
    if n == 0 {
        return;
    }
    for (group, out) in groups.zip(out.chunks_exact_mut(n)) {
        if row == 0 {
            out.fill([0.0; ROW_GROUP]);
            continue;
        }
        if let [out] = out {
            one_row::<Q>(dot, w.group(group), x, out);
            continue;
        }
        for (x, out) in x.chunks(ROWS_AT_ONCE * row).zip(out.chunks_mut(ROWS_AT_ONCE)) {
            rows_product::<Q>(dot, w.group(group), x, row, out);
        }
    }
}

/// One row of activations against one row group.
#[inline(always)]
fn one_row<Q: KQuant>(dot: impl KDot, tiles: &[u8], x: &[QBlockK], out: &mut [f32; ROW_GROUP]) {
    let masks = Masks::new();
    let mut acc = neon!([vdupq_n_f32(0.0); 4]);
    for (tile, x) in tiles.chunks_exact(Q::TILE_BYTES).zip(x) {
        // SAFETY: within the tile, as long as the zip says, by the layout of `KQuant`.
        unsafe {
            fetch_tables::<Q>(tile);
            let isum = sixteen_rows::<Q, _>(dot, masks, tile.as_ptr(), x);
            let scale = widened::<4>(tile.as_ptr());
            for r in 0..4 {
                acc[r] = vfmaq_f32(acc[r], vmulq_n_f32(scale[r], x.d), vcvtq_f32_s32(isum[r]));
            }
            if Q::HAS_MIN {
                let [a, b] = Minimums::of::<Q>(tile.as_ptr()).sums(x);
                let [c, d] = Minimums::of::<Q>(tile.as_ptr().add(8)).sums(x);
                let min = widened::<4>(tile.as_ptr().add(2 * ROW_GROUP));
                for (r, imin) in [a, b, c, d].into_iter().enumerate() {
                    acc[r] = vfmsq_f32(acc[r], vmulq_n_f32(min[r], x.d), vcvtq_f32_s32(imin));
                }
            }
        }
    }
    for (out, acc) in out.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
        neon!(vst1q_f32(out.as_mut_ptr(), acc));
    }
}

/// The integer sum of sixteen rows over one tile.
///
/// # Safety
/// `tile` points to one.
#[inline(always)]
unsafe fn sixteen_rows<Q: KQuant, D: KDot>(dot: D, masks: Masks, tile: *const u8, x: &QBlockK) -> [int32x4_t; 4] {
    let mut isum = neon!([vdupq_n_s32(0); 4]);
    let groups = x.q.as_chunks::<32>().0.iter().zip(x.sums.as_chunks::<2>().0);
    // SAFETY: the caller's promise: there are eight groups of each in a tile and in `x`.
    unsafe {
        let (mut scales, mut high_at, mut at) = (tile.add(Q::SCALE_AT), tile.add(Q::HIGH_AT), tile.add(Q::NIBBLES_AT));
        for (q, sums) in groups {
            fetch_group(at);
            let values = [vld1q_s8(q.as_ptr()), vld1q_s8(q.as_ptr().add(16))];
            let mut high = || {
                fetch(high_at);
                let high = four_at(high_at);
                high_at = hidden(high_at.add(64));
                high
            };
            if Q::HAS_MIN {
                let high = if Q::BITS == 5 { high() } else { [vdupq_n_u8(0); 4] };
                let pair = |j| masks.k_pair::<Q, 4>(dot.take_four(&mut at, j * 64, j % 2), high, j);
                add_scaled::<Q>(&mut isum, dot.group::<Q>(values, pair), &mut scales);
            } else {
                // One half after the other, though the nibbles are then loaded twice: for both there are too few registers.
                let mut again = at;
                let high_bits = high();
                let low =
                    |j| signed(masks.with_pair(masks.low(dot.take_four(&mut again, j * 64, j % 2)), high_bits, j));
                add_scaled::<Q>(&mut isum, dot.half(values[0], sums[0], low), &mut scales);
                let high_bits = high();
                let upper = |j| signed(masks.with_pair(upper(dot.take_four(&mut at, j * 64, j % 2)), high_bits, j));
                add_scaled::<Q>(&mut isum, dot.half(values[1], sums[1], upper), &mut scales);
            }
            at = hidden(if D::STREAMS { at } else { at.add(NIBBLE_BYTES) });
        }
    }
    isum
}

/// Adds sums times the scales at `at`, and past these.
///
/// # Safety
/// `at` points to the scales of sixteen rows.
#[inline(always)]
unsafe fn add_scaled<Q: KQuant>(isum: &mut [int32x4_t; 4], sums: [int32x4_t; 4], at: &mut *const u8) {
    // SAFETY: the caller's promise.
    let scale = unsafe { sixteen_scales::<Q>(*at) };
    *at = hidden(at.wrapping_add(ROW_GROUP));
    for r in 0..4 {
        isum[r] = neon!(vmlaq_s32(isum[r], sums[r], scale[r]));
    }
}

/// `out`'s rows of activations against one row group.
#[inline(always)]
fn rows_product<Q: KQuant>(dot: impl KDot, tiles: &[u8], x: &[QBlockK], row: usize, out: &mut [[f32; ROW_GROUP]]) {
    assert!(out.len() <= ROWS_AT_ONCE && x.len() == out.len() * row);
    let masks = Masks::new();
    let (mut sums, mut isums) = ([Accumulators::<f32>::new(); 2], Accumulators::<i32>::new());
    let [low, high] = sums.each_mut().map(|half| half.zeros(out.len()));
    let isums = isums.zeros(out.len());
    for (i, tile) in tiles.chunks_exact(Q::TILE_BYTES).enumerate() {
        fetch_tables::<Q>(tile);
        for (half, sums) in [&mut *low, &mut *high].into_iter().enumerate() {
            for group in 0..GROUPS {
                // SAFETY: within the tile by the layout of `KQuant`; each of `out.len()` rows of `x` has this block, and `isums` as
                // many.
                unsafe {
                    let w = EightRowsK::new::<Q>(masks, tile.as_ptr(), group, half);
                    let x = x[i].q.as_ptr().add(group * 32);
                    dot.group_pass::<Q>(w, x, row * size_of::<QBlockK>(), out.len(), isums.as_mut_ptr());
                }
            }
            // SAFETY: as above.
            unsafe { finish::<Q>(tile.as_ptr(), half, x[i..].iter().step_by(row), isums, sums) };
        }
    }
    store(low, high, out);
}

/// One tile's step of the accumulators of eight rows; takes the integer sums and leaves zeros.
///
/// # Safety
/// `tile` points to one.
#[inline(always)]
unsafe fn finish<'a, Q: KQuant>(
    tile: *const u8,
    half: usize,
    x: impl Iterator<Item = &'a QBlockK>,
    isums: &mut [[i32; 8]],
    sums: &mut [[f32; 8]],
) {
    // SAFETY: the caller's promise; the other pointers come from references.
    unsafe {
        let scale = widened::<2>(tile.add(16 * half));
        let min = if Q::HAS_MIN { widened::<2>(tile.add(2 * ROW_GROUP + 16 * half)) } else { scale };
        let minimums =
            if Q::HAS_MIN { Minimums::of::<Q>(tile.add(8 * half)) } else { Minimums([vdupq_n_s16(0); GROUPS]) };
        for ((x, isum), sum) in x.zip(isums).zip(sums) {
            let imin = if Q::HAS_MIN { minimums.sums(x) } else { [vdupq_n_s32(0); 2] };
            for r in 0..2 {
                let (isum, sum) = (isum.as_mut_ptr().add(4 * r), sum.as_mut_ptr().add(4 * r));
                let mut acc = vfmaq_f32(vld1q_f32(sum), vmulq_n_f32(scale[r], x.d), vcvtq_f32_s32(vld1q_s32(isum)));
                if Q::HAS_MIN {
                    acc = vfmsq_f32(acc, vmulq_n_f32(min[r], x.d), vcvtq_f32_s32(imin[r]));
                }
                vst1q_f32(sum, acc);
                vst1q_s32(isum, vdupq_n_s32(0));
            }
        }
    }
}

impl EightRowsK {
    /// # Safety
    /// `tile` points to one.
    #[inline(always)]
    unsafe fn new<Q: KQuant>(masks: Masks, tile: *const u8, group: usize, half: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let rows = tile.add(half * 32);
            let mut high = [[vdupq_n_u8(0); 2]; 2];
            for (h, high) in high[..Q::BITS as usize - 4].iter_mut().enumerate() {
                *high = two_at(rows.add(Q::HIGH_AT + group * Q::HIGH_BYTES + h * 64));
            }
            let mut w = [[vdupq_n_s8(0); 2]; 8];
            for j in 0..4 {
                let packed = two_at(rows.add(Q::NIBBLES_AT + group * NIBBLE_BYTES + j * 64));
                let [low, upper] = if Q::HAS_MIN {
                    masks.k_pair::<Q, 2>(packed, high[0], j)
                } else {
                    let [low, upper] = masks.nibbles(packed);
                    [(low, high[0]), (upper, high[1])].map(|(nibbles, high)| signed(masks.with_pair(nibbles, high, j)))
                };
                let offset = vdupq_n_s8(if Q::HAS_MIN { 0 } else { 32 });
                w[j] = low.map(|w| vsubq_s8(w, offset));
                w[j + 4] = upper.map(|w| vsubq_s8(w, offset));
            }
            let a_group = 32 / Q::SCALE_VALUES;
            let at = tile.add(Q::SCALE_AT + group * a_group * ROW_GROUP + half * 8);
            Self { w, scales: [eight_scales::<Q>(at), eight_scales::<Q>(at.add((a_group - 1) * ROW_GROUP))] }
        }
    }
}

/// Minimums of eight rows, a register a group.
struct Minimums([int16x8_t; GROUPS]);

impl Minimums {
    /// # Safety
    /// `tile` points to one, or as many bytes further as the first of the rows has before it.
    #[inline(always)]
    unsafe fn of<Q: KQuant>(tile: *const u8) -> Self {
        // SAFETY: the caller's promise.
        let group =
            |group: usize| unsafe { vreinterpretq_s16_u16(vmovl_u8(vld1_u8(tile.add(Q::MIN_AT + group * ROW_GROUP)))) };
        Self([group(0), group(1), group(2), group(3), group(4), group(5), group(6), group(7)])
    }

    /// `Σ min (Σ q)`. A group's sum is at most 32 · 127.
    #[inline(always)]
    fn sums(&self, x: &QBlockK) -> [int32x4_t; 2] {
        let [first, second] = [0, 8].map(|at| neon!(vld1q_s16(x.sums[at..at + 8].as_ptr())));
        let groups = neon!(vpaddq_s16(first, second));
        let mut sums = neon!([vdupq_n_s32(0); 2]);
        self.add::<0>(&mut sums, groups);
        self.add::<1>(&mut sums, groups);
        self.add::<2>(&mut sums, groups);
        self.add::<3>(&mut sums, groups);
        self.add::<4>(&mut sums, groups);
        self.add::<5>(&mut sums, groups);
        self.add::<6>(&mut sums, groups);
        self.add::<7>(&mut sums, groups);
        sums
    }

    #[inline(always)]
    fn add<const GROUP: i32>(&self, sums: &mut [int32x4_t; 2], groups: int16x8_t) {
        let min = self.0[GROUP as usize];
        *sums = neon!([
            vmlal_laneq_s16::<GROUP>(sums[0], vget_low_s16(min), groups),
            vmlal_high_laneq_s16::<GROUP>(sums[1], min, groups)
        ]);
    }
}

/// Scales of sixteen rows.
///
/// # Safety
/// `at` points to them.
#[inline(always)]
unsafe fn sixteen_scales<Q: KQuant>(at: *const u8) -> [int32x4_t; 4] {
    // SAFETY: the caller's promise.
    let x = unsafe { vld1q_u8(at) };
    let [low, high] = neon!(if Q::HAS_MIN {
        [vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vreinterpretq_s16_u16(vmovl_high_u8(x))]
    } else {
        let x = vreinterpretq_s8_u8(x);
        [vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)]
    });
    neon!([vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)])
}

/// Scales of eight rows.
///
/// # Safety
/// `at` points to them.
#[inline(always)]
unsafe fn eight_scales<Q: KQuant>(at: *const u8) -> [int32x4_t; 2] {
    // SAFETY: the caller's promise.
    let x = unsafe { vld1_u8(at) };
    let x = neon!(if Q::HAS_MIN { vreinterpretq_s16_u16(vmovl_u8(x)) } else { vmovl_s8(vreinterpret_s8_u8(x)) });
    neon!([vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x)])
}

impl Masks {
    /// Low and high nibbles of vector `j` with their fifth bits, if any.
    #[inline(always)]
    fn k_pair<Q: KQuant, const R: usize>(
        self,
        packed: [uint8x16_t; R],
        high: [uint8x16_t; R],
        j: usize,
    ) -> [[int8x16_t; R]; 2] {
        if Q::BITS == 4 { self.nibbles(packed).map(signed) } else { self.with_fifth_bits(packed, high, j).map(signed) }
    }

    /// Nibbles of vector `j` with bits `2 j` and `2 j + 1` of `high` above them.
    #[inline(always)]
    fn with_pair<const R: usize>(self, nibbles: [uint8x16_t; R], high: [uint8x16_t; R], j: usize) -> [uint8x16_t; R] {
        std::array::from_fn(|r| neon!(vbslq_u8(self.pair, pair_in_place(high[r], j), nibbles[r])))
    }
}

/// Bits `2 j` and `2 j + 1` as bits 4 and 5.
#[inline(always)]
fn pair_in_place(high: uint8x16_t, j: usize) -> uint8x16_t {
    neon!(match j {
        0 => vshlq_n_u8::<4>(high),
        1 => vshlq_n_u8::<2>(high),
        2 => high,
        _ => vshrq_n_u8::<2>(high),
    })
}

/// Fetches what lies before the nibbles in the tile's counterpart further on, high bits excepted.
#[inline(always)]
fn fetch_tables<Q: KQuant>(tile: &[u8]) {
    for at in (0..Q::HIGH_AT).step_by(64) {
        fetch(tile.as_ptr().wrapping_add(at));
    }
}

/// Fetches the counterpart of the nibbles at `at` further on.
#[inline(always)]
fn fetch_group(at: *const u8) {
    fetch(at);
    fetch(at.wrapping_add(64));
    fetch(at.wrapping_add(128));
    fetch(at.wrapping_add(192));
}

/// Fetches a line [`PREFETCH_BYTES`] further on. Past the last row group it points nowhere, which a hint may.
#[inline(always)]
fn fetch(at: *const u8) {
    prefetch(at.wrapping_add(PREFETCH_BYTES));
}
