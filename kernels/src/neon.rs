//! The NEON set, for any AArch64 CPU: sixteen lanes as four q registers, and its products in `neon/rows.rs`, `neon/krows.rs` and
//! `neon/product.rs`. NEON is part of the architecture's baseline, so its token needs no proof.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use crate::activation::QBlock;
use crate::dispatch::simd_set;
use crate::matrix::Matrix;
use crate::simd::{LANES, Simd};

pub(crate) mod krows;
mod product;
pub(crate) mod rows;
mod unpack;

simd_set! {
    /// For every AArch64 CPU; uses nothing beyond ARMv8.0.
    pub(crate) static NEON = "neon" for Neon, features(#[target_feature(enable = "neon")]), product::product, product::product_k;
}

/// The set's token; NEON is always there.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Sixteen lanes, four a register, in order.
type V = [float32x4_t; 4];

/// Evaluates an expression of NEON intrinsics.
macro_rules! neon {
    ($e:expr) => {{
        // SAFETY: NEON is in the baseline of every AArch64 target; pointers come from references to as many values as are
        // read or written, and byte loads have no alignment.
        unsafe { $e }
    }};
}

pub(crate) use neon;

/// Four f16 to f32. As `asm!`, because the intrinsic's type is not stable.
#[inline(always)]
fn widen_f16(x: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    neon!(asm!("fcvtl {out:v}.4s, {x:v}.4h", out = lateout(vreg) out, x = in(vreg) x, options(pure, nomem, nostack)));
    out
}

/// The upper four of eight f16 to f32.
#[inline(always)]
fn widen_high_f16(x: uint16x8_t) -> float32x4_t {
    let out: float32x4_t;
    neon!(asm!("fcvtl2 {out:v}.4s, {x:v}.8h", out = lateout(vreg) out, x = in(vreg) x, options(pure, nomem, nostack)));
    out
}

/// Four f32 to f16, to nearest even; too large becomes infinite.
#[inline(always)]
fn narrow_f16(x: float32x4_t) -> uint16x4_t {
    let out: uint16x4_t;
    neon!(asm!("fcvtn {out:v}.4h, {x:v}.4s", out = lateout(vreg) out, x = in(vreg) x, options(pure, nomem, nostack)));
    out
}

/// Eight f16 to f32.
#[inline(always)]
fn widen_eight_f16(x: uint8x16_t) -> [float32x4_t; 2] {
    neon!({
        let x = vreinterpretq_u16_u8(x);
        [widen_f16(vget_low_u16(x)), widen_high_f16(x)]
    })
}

#[inline(always)]
fn prefetch(p: *const u8) {
    // SAFETY: a hint; it neither faults nor changes memory, whatever the address.
    unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly)) }
}

impl Simd for Neon {
    type V = V;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        neon!([vdupq_n_f32(x); 4])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        std::array::from_fn(|i| neon!(vld1q_f32(x.as_ptr().add(4 * i))))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> V {
        let p = x.as_ptr().cast::<u8>();
        let ([a, b], [c, d]) = neon!((widen_eight_f16(vld1q_u8(p)), widen_eight_f16(vld1q_u8(p.add(16)))));
        [a, b, c, d]
    }
    #[inline(always)]
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> V {
        std::array::from_fn(|i| neon!(vreinterpretq_f32_u8(vld1q_u8(x.as_ptr().add(16 * i)))))
    }
    #[inline(always)]
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> V {
        let p = x.as_ptr();
        let ([a, b], [c, d]) = neon!((widen_eight_f16(vld1q_u8(p)), widen_eight_f16(vld1q_u8(p.add(16)))));
        [a, b, c, d]
    }
    #[inline(always)]
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> V {
        std::array::from_fn(|i| {
            neon!({
                let four = vreinterpret_u16_u8(vld1_u8(x.as_ptr().add(8 * i)));
                vreinterpretq_f32_u32(vshll_n_u16::<16>(four))
            })
        })
    }
    #[inline(always)]
    fn store(self, x: V, out: &mut [f32; LANES]) {
        for (i, x) in x.into_iter().enumerate() {
            neon!(vst1q_f32(out.as_mut_ptr().add(4 * i), x));
        }
    }
    #[inline(always)]
    fn store_f16(self, x: V, out: &mut [u16; LANES]) {
        for (i, x) in x.into_iter().enumerate() {
            neon!(vst1_u16(out.as_mut_ptr().add(4 * i), narrow_f16(x)));
        }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        std::array::from_fn(|i| neon!(vaddq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        std::array::from_fn(|i| neon!(vsubq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        std::array::from_fn(|i| neon!(vmulq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        std::array::from_fn(|i| neon!(vdivq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        std::array::from_fn(|i| neon!(vmaxq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        std::array::from_fn(|i| neon!(vabsq_f32(a[i])))
    }
    #[inline(always)]
    fn xor(self, a: V, b: V) -> V {
        let bits = |x| neon!(vreinterpretq_u32_f32(x));
        std::array::from_fn(|i| neon!(vreinterpretq_f32_u32(veorq_u32(bits(a[i]), bits(b[i])))))
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| neon!(vfmaq_f32(c[i], a[i], b[i])))
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| neon!(vbslq_f32(vcltq_f32(a[i], b[i]), yes[i], no[i])))
    }
    #[inline(always)]
    fn scale_by_exponent(self, y: V, t: V) -> V {
        std::array::from_fn(|i| {
            neon!({
                let n = vshlq_n_s32::<23>(vreinterpretq_s32_f32(t[i]));
                vmulq_f32(y[i], vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(0x3f80_0000))))
            })
        })
    }
    #[inline(always)]
    fn tree_sum(self, a: V) -> f32 {
        neon!({
            let u = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vpadds_f32(vadd_f32(vget_low_f32(u), vget_high_f32(u)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        neon!(vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))))
    }
    #[inline(always)]
    fn quantize(self, x: V, inv: f32, q: &mut [i8; LANES]) -> i32 {
        let x: [int32x4_t; 4] = std::array::from_fn(|i| neon!(vcvtnq_s32_f32(vmulq_n_f32(x[i], inv))));
        // Within i8, so that the lower parts are all there is.
        neon!({
            let [a, b, c, d] = x.map(|x| vreinterpretq_s16_s32(x));
            let (low, high) = (vuzp1q_s16(a, b), vuzp1q_s16(c, d));
            vst1q_s8(q.as_mut_ptr(), vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
            vaddlvq_s16(vaddq_s16(low, high))
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        prefetch(p.cast());
    }
}
