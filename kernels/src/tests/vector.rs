//! exp, quantization, norm and SiLU: close to f64, and the same bits from every set.

use proptest::prelude::*;

use super::{Data, Format, Kernels, Rng, Weights, assert_same_bits, fast_sets, scalar};
use crate::{EXP_MAX, EXP_MIN, QBlock, exp};

/// Distance in units of the last place of `want`.
fn ulps(have: f32, want: f64) -> f64 {
    let nearest = want as f32;
    let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
    (f64::from(have) - want).abs() / ulp
}

#[test]
fn exp_is_within_two_ulp() {
    let mut worst = (0.0, 0.0);
    let steps = 2_000_000;
    for i in 0..=steps {
        let x = EXP_MIN + (EXP_MAX - EXP_MIN) * (i as f32 / steps as f32);
        let x = x.clamp(EXP_MIN, EXP_MAX);
        let error = ulps(exp(x), f64::from(x).exp());
        if error > worst.0 {
            worst = (error, x);
        }
    }
    for i in 0..1_000_000u32 {
        let x = f32::from_bits(0x3000_0000 + i * 290);
        for x in [x, -x] {
            let error = ulps(exp(x), f64::from(x).exp());
            if error > worst.0 {
                worst = (error, x);
            }
        }
    }
    assert!(worst.0 <= 2.0, "{} ulp at {}", worst.0, worst.1);
}

#[test]
fn exp_at_its_ends() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert_eq!(exp(-88.0), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(89.0), f32::INFINITY);
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert!(exp(EXP_MIN).is_normal() && exp(EXP_MAX).is_normal());
}

#[test]
fn every_set_has_the_same_exp() {
    let mut rng = Rng::new(11);
    let mut x: Vec<f32> = (0..100_003).map(|_| 100.0 * rng.unit()).collect();
    x.extend([0.0, -0.0, EXP_MIN, EXP_MAX, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-40]);
    let want: Vec<f32> = x.iter().map(|x| exp(*x)).collect();
    for kernels in Kernels::supported() {
        let mut have = x.clone();
        kernels.exp(&mut have);
        assert_same_bits(&have, &want, || format!("{kernels:?}"));
    }
}

fn quantized(kernels: Kernels, x: &[f32], blocks: usize) -> Vec<QBlock> {
    let mut out = vec![QBlock { q: [77; 32], d: f32::NAN, d_sum: f32::NAN, sum: -1 }; blocks];
    kernels.quantize(x, &mut out);
    out
}

fn check_quantize(x: &[f32]) -> Result<(), TestCaseError> {
    let blocks = x.len().div_ceil(32) + 1;
    let want = quantized(scalar(), x, blocks);
    for (i, block) in want.iter().enumerate() {
        let x: Vec<f32> = x.iter().copied().skip(i * 32).take(32).collect();
        let largest = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        prop_assert_eq!(block.sum, block.q.iter().map(|q| i32::from(*q)).sum::<i32>());
        prop_assert_eq!(block.d_sum.to_bits(), (block.d * block.sum as f32).to_bits());
        prop_assert!(block.q.iter().all(|q| *q >= -127));
        if largest < 2f32.powi(-100) {
            prop_assert_eq!(block, &QBlock::default());
            continue;
        }
        prop_assert_eq!(block.d, largest / 127.0);
        prop_assert!(block.q.iter().any(|q| q.unsigned_abs() == 127));
        for (x, q) in x.iter().zip(block.q) {
            prop_assert!((f64::from(block.d) * f64::from(q) - f64::from(*x)).abs() <= f64::from(block.d) * 0.5001);
        }
    }
    for kernels in fast_sets() {
        let have = quantized(kernels, x, blocks);
        for (have, want) in have.iter().zip(&want) {
            prop_assert_eq!((have.d.to_bits(), have.sum, have.q), (want.d.to_bits(), want.sum, want.q));
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn quantize_is_close_and_the_same_everywhere(
        mut x in prop::collection::vec(-1e3f32..1e3, 1..200),
        exponent in -105..60i32,
    ) {
        x.resize(x.len().next_multiple_of(16), 0.0);
        x.iter_mut().for_each(|x| *x *= 2f32.powi(exponent));
        check_quantize(&x)?;
    }

    #[test]
    fn quantize_rounds_ties_to_even(x in prop::collection::vec(-254i32..=254, 31)) {
        // Halves, in a block whose scale is 1.
        let mut x: Vec<f32> = x.into_iter().map(|x| x as f32 / 2.0).collect();
        x.push(127.0);
        check_quantize(&x)?;
        let block = quantized(scalar(), &x, 1)[0];
        for (x, q) in x.iter().zip(block.q) {
            prop_assert_eq!(x.round_ties_even(), f32::from(q));
        }
    }
}

#[test]
fn not_a_number_does_not_crash() {
    let mut rng = Rng::new(12);
    for kernels in Kernels::supported() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = rng.units(64);
            x[5] = bad;
            x[40] = bad;
            let q = quantized(kernels, &x, 2);
            let w = Weights::new(Format::Q8_0, 16, 64, Data::Extreme, &mut rng);
            let mut out = [0.0; 16];
            kernels.matmul(&w.matrix(), 0..1, crate::Rows::Quantized(&q), 1, &mut out);
            let mut norm = [0.0; 64];
            kernels.rms_norm(&x, 16, &[1.0; 64], 1e-5, &mut norm);
            let mut gate = x.clone();
            kernels.silu_mul(&mut gate, &x);
            kernels.exp(&mut x);
        }
    }
}

#[test]
fn rms_norm_is_close_and_the_same_everywhere() {
    let mut rng = Rng::new(13);
    for len in [1, 15, 16, 31, 64, 576, 577, 1536usize] {
        for stride in [16, 48] {
            let x = rng.units(len.div_ceil(16) * stride);
            let w = rng.units(len);
            let at = |k: usize| f64::from(x[k / 16 * stride + k % 16]);
            let mut want = vec![f32::NAN; len];
            scalar().rms_norm(&x, stride, &w, 1e-5, &mut want);
            let mean = (0..len).map(|k| at(k) * at(k)).sum::<f64>() / len as f64;
            for (k, want) in want.iter().enumerate() {
                let exact = at(k) / (mean + 1e-5).sqrt() * f64::from(w[k]);
                assert!(
                    (f64::from(*want) - exact).abs() <= 1e-6 * exact.abs() + 1e-12,
                    "{len} [{k}]: {want}, not {exact}"
                );
            }
            for kernels in fast_sets() {
                let mut have = vec![f32::NAN; len];
                kernels.rms_norm(&x, stride, &w, 1e-5, &mut have);
                assert_same_bits(&have, &want, || format!("{kernels:?} {len} stride {stride}"));
            }
        }
    }
}

#[test]
fn silu_is_close_and_the_same_everywhere() {
    let mut rng = Rng::new(14);
    for len in [1, 16, 33, 1536] {
        let gate: Vec<f32> = (0..len).map(|_| 20.0 * rng.unit()).collect();
        let up = rng.units(len);
        let mut want = gate.clone();
        scalar().silu_mul(&mut want, &up);
        for k in 0..len {
            let g = f64::from(gate[k]);
            let exact = g / (1.0 + (-g).exp()) * f64::from(up[k]);
            assert!((f64::from(want[k]) - exact).abs() <= 1e-6 * exact.abs(), "{}: {}, not {exact}", gate[k], want[k]);
        }
        for kernels in fast_sets() {
            let mut have = gate.clone();
            kernels.silu_mul(&mut have, &up);
            assert_same_bits(&have, &want, || format!("{kernels:?} {len}"));
        }
    }
}
