//! Sixteen f32 lanes as a proof token plus a vector type. `ops` and `attention` are written once over this trait, so a
//! set differs in instructions only, never in the order of operations.

use half::{bf16, f16};

use crate::math::{EXP_MAX, EXP_MIN, EXP_POLY, LN2_HI, LN2_LO, LOG2_E, ROUND_MAGIC};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// A token that proves an instruction set is there, and its operations on sixteen lanes. Everything is lane by lane in IEEE
/// arithmetic unless it says otherwise.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Whether there are registers for some twenty `V`, not some eight: how many sums are in hand at once, never their order.
    const MANY_REGISTERS: bool = false;
    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn load_f16(self, x: &[u16; LANES]) -> Self::V;
    /// f32 from little-endian bytes, like the two that follow.
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> Self::V;
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V;
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V;
    fn store(self, x: Self::V, out: &mut [f32; LANES]);
    /// As f16 bits, to nearest even; too large becomes infinite.
    fn store_f16(self, x: Self::V, out: &mut [u16; LANES]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// The exclusive or of the bits.
    fn xor(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a < b ? yes : no`.
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// `y * 2^n` where the low bits of `t` hold `n` as `ROUND_MAGIC` leaves it, -126 <= n <= 127.
    fn scale_by_exponent(self, y: Self::V, t: Self::V) -> Self::V;
    /// The fixed tree of the numeric model.
    fn tree_sum(self, a: Self::V) -> f32;
    /// Largest lane.
    fn max_lane(self, a: Self::V) -> f32;
    /// `round_ties_even(x * inv)` as i8, and the sum of the sixteen.
    fn quantize(self, x: Self::V, inv: f32, q: &mut [i8; LANES]) -> i32;
    /// Hints that the cache line at `p` will be read.
    fn prefetch<T>(self, p: *const T);
}

/// A set's integer side, for the K formats' product (AArch64 has its own): products of four unsigned weights below 64 with four
/// activations, sixteen rows at a time.
#[cfg(target_arch = "x86_64")]
pub(crate) trait Dot: Simd {
    /// 64 bytes: four of each of sixteen rows.
    type W: Copy;
    /// Sixteen i32, one a row.
    type I: Copy;
    fn load_w(self, w: &[u8; 4 * LANES]) -> Self::W;
    /// Bits `shift ..` of every byte under `mask`; `shift` is below 8 and a constant where this is inlined.
    fn bits(self, w: Self::W, shift: u32, mask: u8) -> Self::W;
    /// `low | high << 4`, bytes of `high` below 16.
    fn join(self, low: Self::W, high: Self::W) -> Self::W;
    fn splat_i(self, x: i32) -> Self::I;
    fn load_u8(self, x: &[u8; LANES]) -> Self::I;
    fn load_i8(self, x: &[u8; LANES]) -> Self::I;
    /// `a * b + c`.
    fn mul_add_i(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I;
    /// `acc` plus, in each row, the dot product of its four weights and the four of `x`; 16 values, so four calls in a row.
    fn dot16(self, acc: Self::I, w: [Self::W; 4], x: &[i8; LANES]) -> Self::I;
    fn to_f32(self, x: Self::I) -> Self::V;
}

/// `math::exp` over sixteen lanes: the same operations, the limits applied last.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let magic = s.splat(ROUND_MAGIC);
    let t = s.fma(x, s.splat(LOG2_E), magic);
    let n = s.sub(t, magic);
    let r = s.fma(n, s.splat(-LN2_HI), x);
    let r = s.fma(n, s.splat(-LN2_LO), r);
    let mut p = s.splat(EXP_POLY[0]);
    for c in &EXP_POLY[1..] {
        p = s.fma(p, r, s.splat(*c));
    }
    let y = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let y = s.scale_by_exponent(y, t);
    let y = s.select_lt(x, s.splat(EXP_MIN), s.splat(0.0), y);
    s.select_lt(s.splat(EXP_MAX), x, s.splat(f32::INFINITY), y)
}

/// The specification's lanes: an array.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::V {
        x.map(|x| f16::from_bits(x).to_f32_const())
    }
    #[inline(always)]
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> Self::V {
        let values = x.as_chunks::<4>().0;
        std::array::from_fn(|i| f32::from_le_bytes(values[i]))
    }
    #[inline(always)]
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V {
        let values = x.as_chunks::<2>().0;
        std::array::from_fn(|i| f16::from_le_bytes(values[i]).to_f32_const())
    }
    #[inline(always)]
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V {
        let values = x.as_chunks::<2>().0;
        std::array::from_fn(|i| bf16::from_le_bytes(values[i]).to_f32())
    }
    #[inline(always)]
    fn store(self, x: Self::V, out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn store_f16(self, x: Self::V, out: &mut [u16; LANES]) {
        *out = x.map(|x| f16::from_f32(x).to_bits());
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].max(b[i]))
    }
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn xor(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| f32::from_bits(a[i].to_bits() ^ b[i].to_bits()))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn scale_by_exponent(self, y: Self::V, t: Self::V) -> Self::V {
        std::array::from_fn(|i| y[i] * f32::from_bits((t[i].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
    #[inline(always)]
    fn tree_sum(self, a: Self::V) -> f32 {
        let t: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let u: [f32; 4] = std::array::from_fn(|i| t[i] + t[i + 4]);
        let v: [f32; 2] = std::array::from_fn(|i| u[i] + u[i + 2]);
        v[0] + v[1]
    }
    #[inline(always)]
    fn max_lane(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn quantize(self, x: Self::V, inv: f32, q: &mut [i8; LANES]) -> i32 {
        *q = x.map(|x| (x * inv).round_ties_even() as i8);
        q.iter().map(|q| i32::from(*q)).sum()
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
}
