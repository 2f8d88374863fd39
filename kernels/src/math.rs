//! The scalar exponential and the constants that every set's exponential uses. `simd::exp` is the same over 16 lanes.

/// Below this `exp` is exactly 0 (e^-87.33 is just above the smallest normal number).
pub const EXP_MIN: f32 = -87.33;
/// Above this `exp` is +infinity (the true value overflows from 88.72; 2^127 is the largest scale used here).
pub const EXP_MAX: f32 = 88.37;

pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// 1.5 × 2^23: adding it rounds to an integer, to nearest even, and leaves that integer in the low bits.
pub(crate) const ROUND_MAGIC: f32 = 12_582_912.0;
/// ln 2 in two parts; the product of the first with an integer below 2^14 is exact (Cephes).
pub(crate) const LN2_HI: f32 = 355.0 / 512.0;
pub(crate) const LN2_LO: f32 = -2.121_944_4e-4;
/// (e^r - 1 - r) / r² on |r| ≤ ln 2 / 2, highest power first (Cephes `expf`).
pub(crate) const EXP_POLY: [f32; 6] = [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// e^x, the same bits as every kernel set's; 0 below [`EXP_MIN`], infinite above [`EXP_MAX`], within 2 ulp between.
// Always inlined, so that a kernel compiled with fused multiply-add has it here too and does not call a library.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    if x < EXP_MIN {
        return 0.0;
    }
    if x > EXP_MAX {
        return f32::INFINITY;
    }
    let t = x.mul_add(LOG2_E, ROUND_MAGIC);
    let n = t - ROUND_MAGIC;
    let r = n.mul_add(-LN2_HI, x);
    let r = n.mul_add(-LN2_LO, r);
    let mut p = EXP_POLY[0];
    for c in &EXP_POLY[1..] {
        p = p.mul_add(r, *c);
    }
    let y = p.mul_add(r * r, r) + 1.0;
    y * f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000))
}
