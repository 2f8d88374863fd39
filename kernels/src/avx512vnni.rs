//! The AVX-512 set (F, BW, DQ, VL and VNNI, with FMA and F16C, which `half` may use): sixteen lanes as one zmm register, and
//! its products in `avx512vnni/product.rs`.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::activation::QBlock;
use crate::dispatch::simd_set;
use crate::kproduct;
use crate::matrix::Matrix;
use crate::simd::{Dot, LANES, Simd};

mod product;

simd_set! {
    /// For x86-64 CPUs with AVX-512 F, BW, DQ, VL and VNNI.
    pub(crate) static AVX512VNNI = "avx512vnni" for token(),
        features(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]), product::product, kproduct::product;
}

/// The first feature of the set that this CPU misses.
pub(crate) fn missing_feature() -> Option<&'static str> {
    let features = [
        (std::arch::is_x86_feature_detected!("fma"), "FMA"),
        (std::arch::is_x86_feature_detected!("f16c"), "F16C"),
        (std::arch::is_x86_feature_detected!("avx512f"), "AVX-512 F"),
        (std::arch::is_x86_feature_detected!("avx512bw"), "AVX-512 BW"),
        (std::arch::is_x86_feature_detected!("avx512dq"), "AVX-512 DQ"),
        (std::arch::is_x86_feature_detected!("avx512vl"), "AVX-512 VL"),
        (std::arch::is_x86_feature_detected!("avx512vnni"), "AVX-512 VNNI"),
    ];
    features.into_iter().find(|(there, _)| !there).map(|(_, name)| name)
}

/// Proof of the set's features. Made by [`token`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Callable only where the features are enabled, hence the proof.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
fn token() -> Avx512 {
    Avx512(())
}

/// Evaluates an expression of the set's intrinsics; `$self` is the proof that they exist.
macro_rules! with {
    ($self:ident, $e:expr) => {{
        let _proof: Avx512 = $self;
        // SAFETY: `Avx512` is made where the set's features are enabled and nowhere else; pointers come from references to
        // as many values as are read or written.
        unsafe { $e }
    }};
}

use with;

impl Simd for Avx512 {
    type V = __m512;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with!(self, _mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        with!(self, _mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> __m512 {
        with!(self, _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> __m512 {
        with!(self, _mm512_loadu_ps(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> __m512 {
        with!(self, _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> __m512 {
        with!(self, {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32; LANES]) {
        with!(self, _mm512_storeu_ps(out.as_mut_ptr(), x));
    }
    #[inline(always)]
    fn store_f16(self, x: __m512, out: &mut [u16; LANES]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        with!(self, _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtps_ph::<NEAREST>(x)));
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with!(self, _mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with!(self, _mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with!(self, _mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with!(self, _mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with!(self, _mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        with!(self, _mm512_abs_ps(a))
    }
    #[inline(always)]
    fn xor(self, a: __m512, b: __m512) -> __m512 {
        with!(self, _mm512_xor_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with!(self, _mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        with!(self, _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes))
    }
    #[inline(always)]
    fn scale_by_exponent(self, y: __m512, t: __m512) -> __m512 {
        with!(self, {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            let power = _mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000));
            _mm512_mul_ps(y, _mm512_castsi512_ps(power))
        })
    }
    #[inline(always)]
    fn tree_sum(self, a: __m512) -> f32 {
        with!(self, {
            let t = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let u = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
            let v = _mm_add_ps(u, _mm_movehl_ps(u, u));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        with!(self, {
            let t = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let u = _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
            let v = _mm_max_ps(u, _mm_movehl_ps(u, u));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }
    #[inline(always)]
    fn quantize(self, x: __m512, inv: f32, q: &mut [i8; LANES]) -> i32 {
        with!(self, {
            let wide = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inv)));
            let bytes = _mm512_cvtsepi32_epi8(wide);
            _mm_storeu_si128(q.as_mut_ptr().cast(), bytes);
            let t = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), bytes);
            let u = _mm_add_epi32(t, _mm_shuffle_epi32::<0b01_00_11_10>(t));
            _mm_cvtsi128_si32(_mm_add_epi32(u, _mm_shuffle_epi32::<0b10_11_00_01>(u)))
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        with!(self, _mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}

impl Dot for Avx512 {
    type W = __m512i;
    type I = __m512i;

    #[inline(always)]
    fn load_w(self, w: &[u8; 4 * LANES]) -> __m512i {
        with!(self, _mm512_loadu_si512(w.as_ptr().cast()))
    }
    #[inline(always)]
    fn bits(self, w: __m512i, shift: u32, mask: u8) -> __m512i {
        // Sixteen bits at a time: the mask takes off what came from the neighbour.
        with!(self, {
            let shifted = _mm512_srl_epi16(w, _mm_cvtsi32_si128(shift.cast_signed()));
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask.cast_signed()))
        })
    }
    #[inline(always)]
    fn join(self, low: __m512i, high: __m512i) -> __m512i {
        with!(self, _mm512_or_si512(low, _mm512_slli_epi16::<4>(high)))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        with!(self, _mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> __m512i {
        with!(self, _mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> __m512i {
        with!(self, _mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn mul_add_i(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        with!(self, _mm512_add_epi32(_mm512_mullo_epi32(a, b), c))
    }
    #[inline(always)]
    fn dot16(self, acc: __m512i, w: [__m512i; 4], x: &[i8; LANES]) -> __m512i {
        let x = x.as_chunks::<4>().0;
        with!(self, {
            let acc =
                _mm512_dpbusd_epi32(acc, w[0], _mm512_set1_epi32(i32::from_le_bytes(x[0].map(i8::cast_unsigned))));
            let acc =
                _mm512_dpbusd_epi32(acc, w[1], _mm512_set1_epi32(i32::from_le_bytes(x[1].map(i8::cast_unsigned))));
            let acc =
                _mm512_dpbusd_epi32(acc, w[2], _mm512_set1_epi32(i32::from_le_bytes(x[2].map(i8::cast_unsigned))));
            _mm512_dpbusd_epi32(acc, w[3], _mm512_set1_epi32(i32::from_le_bytes(x[3].map(i8::cast_unsigned))))
        })
    }
    #[inline(always)]
    fn to_f32(self, x: __m512i) -> __m512 {
        with!(self, _mm512_cvtepi32_ps(x))
    }
}
