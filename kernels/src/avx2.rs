//! The AVX2 set (with FMA and F16C): sixteen lanes as two ymm registers, and its products in `avx2/product.rs`.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::activation::QBlock;
use crate::dispatch::simd_set;
use crate::kproduct;
use crate::matrix::Matrix;
use crate::simd::{Dot, LANES, Simd};

mod product;

simd_set! {
    /// For x86-64 CPUs with AVX2, FMA and F16C.
    pub(crate) static AVX2 = "avx2" for token(), features(#[target_feature(enable = "avx2,fma,f16c")]), product::product, kproduct::product;
}

/// The first feature of the set that this CPU misses.
pub(crate) fn missing_feature() -> Option<&'static str> {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return Some("AVX2");
    }
    if !std::arch::is_x86_feature_detected!("fma") {
        return Some("FMA");
    }
    if !std::arch::is_x86_feature_detected!("f16c") {
        return Some("F16C");
    }
    None
}

/// Proof of AVX2, FMA and F16C. Made by [`token`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Callable only where the features are enabled, hence the proof.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn token() -> Avx2 {
    Avx2(())
}

/// Sixteen lanes, the lower eight first.
#[derive(Clone, Copy)]
pub(crate) struct V(__m256, __m256);

/// Evaluates an expression of the set's intrinsics; `$self` is the proof that they exist.
macro_rules! with {
    ($self:ident, $e:expr) => {{
        let _proof: Avx2 = $self;
        // SAFETY: `Avx2` is made where AVX2, FMA and F16C are enabled and nowhere else; pointers come from references to
        // as many values as are read or written.
        unsafe { $e }
    }};
}

use with;

impl Simd for Avx2 {
    type V = V;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        with!(self, V(_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        let p = x.as_ptr();
        with!(self, V(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> V {
        let p = x.as_ptr().cast::<__m128i>();
        with!(self, V(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))))
    }
    #[inline(always)]
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> V {
        let p = x.as_ptr().cast::<f32>();
        with!(self, V(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))))
    }
    #[inline(always)]
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> V {
        let p = x.as_ptr().cast::<__m128i>();
        with!(self, V(_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))))
    }
    #[inline(always)]
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> V {
        let p = x.as_ptr().cast::<__m128i>();
        with!(self, {
            let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
            let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(1)));
            V(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)))
        })
    }
    #[inline(always)]
    fn store(self, x: V, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        with!(self, {
            _mm256_storeu_ps(p, x.0);
            _mm256_storeu_ps(p.add(8), x.1);
        });
    }
    #[inline(always)]
    fn store_f16(self, x: V, out: &mut [u16; LANES]) {
        let p = out.as_mut_ptr().cast::<__m128i>();
        with!(self, {
            _mm_storeu_si128(p, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.0));
            _mm_storeu_si128(p.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.1));
        });
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        with!(self, V(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        with!(self, V(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        with!(self, V(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        with!(self, V(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        with!(self, V(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        with!(self, {
            let sign = _mm256_set1_ps(-0.0);
            V(_mm256_andnot_ps(sign, a.0), _mm256_andnot_ps(sign, a.1))
        })
    }
    #[inline(always)]
    fn xor(self, a: V, b: V) -> V {
        with!(self, V(_mm256_xor_ps(a.0, b.0), _mm256_xor_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        with!(self, V(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, yes: V, no: V) -> V {
        with!(
            self,
            V(
                _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        )
    }
    #[inline(always)]
    fn scale_by_exponent(self, y: V, t: V) -> V {
        with!(self, {
            let one = _mm256_set1_epi32(0x3f80_0000);
            let a = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(t.0)), one);
            let b = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(t.1)), one);
            V(_mm256_mul_ps(y.0, _mm256_castsi256_ps(a)), _mm256_mul_ps(y.1, _mm256_castsi256_ps(b)))
        })
    }
    #[inline(always)]
    fn tree_sum(self, a: V) -> f32 {
        with!(self, {
            let t = _mm256_add_ps(a.0, a.1);
            let u = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
            let v = _mm_add_ps(u, _mm_movehl_ps(u, u));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        with!(self, {
            let t = _mm256_max_ps(a.0, a.1);
            let u = _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps::<1>(t));
            let v = _mm_max_ps(u, _mm_movehl_ps(u, u));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }
    #[inline(always)]
    fn quantize(self, x: V, inv: f32, q: &mut [i8; LANES]) -> i32 {
        with!(self, {
            let inv = _mm256_set1_ps(inv);
            let a = _mm256_cvtps_epi32(_mm256_mul_ps(x.0, inv));
            let b = _mm256_cvtps_epi32(_mm256_mul_ps(x.1, inv));
            // 0 to 3, 8 to 11 | 4 to 7, 12 to 15: put the quarters back in order.
            let ab = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
            let (low, high) = (_mm256_castsi256_si128(ab), _mm256_extracti128_si256::<1>(ab));
            _mm_storeu_si128(q.as_mut_ptr().cast(), _mm_packs_epi16(low, high));
            let t = _mm_madd_epi16(_mm_add_epi16(low, high), _mm_set1_epi16(1));
            let u = _mm_add_epi32(t, _mm_shuffle_epi32::<0b01_00_11_10>(t));
            _mm_cvtsi128_si32(_mm_add_epi32(u, _mm_shuffle_epi32::<0b10_11_00_01>(u)))
        })
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        with!(self, _mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}

impl Dot for Avx2 {
    type W = [__m256i; 2];
    type I = [__m256i; 2];

    #[inline(always)]
    fn load_w(self, w: &[u8; 4 * LANES]) -> Self::W {
        let p = w.as_ptr().cast::<__m256i>();
        with!(self, [_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))])
    }
    #[inline(always)]
    fn bits(self, w: Self::W, shift: u32, mask: u8) -> Self::W {
        // Sixteen bits at a time: the mask takes off what came from the neighbour.
        with!(self, {
            let (count, mask) = (_mm_cvtsi32_si128(shift.cast_signed()), _mm256_set1_epi8(mask.cast_signed()));
            [
                _mm256_and_si256(_mm256_srl_epi16(w[0], count), mask),
                _mm256_and_si256(_mm256_srl_epi16(w[1], count), mask),
            ]
        })
    }
    #[inline(always)]
    fn join(self, low: Self::W, high: Self::W) -> Self::W {
        with!(self, {
            [
                _mm256_or_si256(low[0], _mm256_slli_epi16::<4>(high[0])),
                _mm256_or_si256(low[1], _mm256_slli_epi16::<4>(high[1])),
            ]
        })
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        with!(self, [_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::I {
        let p = x.as_ptr();
        with!(self, {
            [_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()))]
        })
    }
    #[inline(always)]
    fn load_i8(self, x: &[u8; LANES]) -> Self::I {
        let p = x.as_ptr();
        with!(self, {
            [_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))]
        })
    }
    #[inline(always)]
    fn mul_add_i(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        with!(self, {
            [
                _mm256_add_epi32(_mm256_mullo_epi32(a[0], b[0]), c[0]),
                _mm256_add_epi32(_mm256_mullo_epi32(a[1], b[1]), c[1]),
            ]
        })
    }
    /// Pairs of products are at most 2 · 63 · 127, two of them still fit int16.
    #[inline(always)]
    fn dot16(self, acc: Self::I, w: [Self::W; 4], x: &[i8; LANES]) -> Self::I {
        let x = x.as_chunks::<4>().0;
        with!(self, {
            let ones = _mm256_set1_epi16(1);
            let x = [
                _mm256_set1_epi32(i32::from_le_bytes(x[0].map(i8::cast_unsigned))),
                _mm256_set1_epi32(i32::from_le_bytes(x[1].map(i8::cast_unsigned))),
                _mm256_set1_epi32(i32::from_le_bytes(x[2].map(i8::cast_unsigned))),
                _mm256_set1_epi32(i32::from_le_bytes(x[3].map(i8::cast_unsigned))),
            ];
            let mut acc = acc;
            for half in 0..2 {
                let a =
                    _mm256_add_epi16(_mm256_maddubs_epi16(w[0][half], x[0]), _mm256_maddubs_epi16(w[1][half], x[1]));
                let b =
                    _mm256_add_epi16(_mm256_maddubs_epi16(w[2][half], x[2]), _mm256_maddubs_epi16(w[3][half], x[3]));
                let sum = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
                acc[half] = _mm256_add_epi32(acc[half], sum);
            }
            acc
        })
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I) -> V {
        with!(self, V(_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])))
    }
}
