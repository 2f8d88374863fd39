//! Rotary position embedding (Su et al., 2021, arXiv:2104.09864): angles for a step's rows, and the rotation of adjacent pairs.
//!
//! Angles are computed in f64 by `libm`, software that gives the same bits on every CPU, once a step for all layers; the
//! rotation is plain multiplication and subtraction in f32, which Rust never contracts.
//! Called by `model::forward` on the query and key rows; next on the data's way: `model::kv`.

use crate::model::hyper::Rope;

/// Inverse frequencies of one model: `(dims / 2)` values.
#[derive(Clone, Debug)]
pub struct RopeFrequencies {
    inverse: Vec<f64>,
}

impl RopeFrequencies {
    /// `base^(-2i/dims) / (linear_factor * factors[i])`; `factors` is the tensor `rope_freqs.weight` where a model has one
    /// (llama 3's long-context scaling).
    pub fn new(rope: &Rope, factors: Option<&[f32]>) -> Self {
        let dims = rope.dims as f64;
        let inverse = (0..rope.dims / 2).map(|i| {
            let plain = libm::pow(rope.base, -2.0 * i as f64 / dims);
            let factor = factors.map_or(1.0, |factors| f64::from(factors[i]));
            plain / (rope.linear_factor * factor)
        });
        Self { inverse: inverse.collect() }
    }

    /// Rotated pairs a head.
    pub fn pairs(&self) -> usize {
        self.inverse.len()
    }

    /// Writes `(cos, sin)` of every pair at `position` to `out`, `pairs()` entries.
    pub fn angles(&self, position: usize, out: &mut [[f32; 2]]) {
        for (out, &inverse) in out.iter_mut().zip(&self.inverse) {
            let (sin, cos) = libm::sincos(position as f64 * inverse);
            *out = [cos as f32, sin as f32];
        }
    }
}

/// Rotates the leading pairs of one head. The head's value `k` is at `head[(k / 16) * group_stride + k % 16]`.
pub fn rotate(head: &mut [f32], group_stride: usize, angles: &[[f32; 2]]) {
    for (group, angles) in angles.chunks(hearth_kernels::ROW_GROUP / 2).enumerate() {
        let values = &mut head[group * group_stride..][..2 * angles.len()];
        for (pair, [cos, sin]) in values.chunks_exact_mut(2).zip(angles) {
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = a * sin + b * cos;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PLAIN: Rope = Rope { dims: 64, base: 10_000.0, linear_factor: 1.0 };

    #[test]
    fn position_zero_leaves_a_head_alone_and_rotation_keeps_length() {
        let frequencies = RopeFrequencies::new(&PLAIN, None);
        let mut angles = vec![[0.0; 2]; frequencies.pairs()];
        let head: Vec<f32> = (0..64u8).map(|k| f32::from(k) * 0.25 - 3.0).collect();
        frequencies.angles(0, &mut angles);
        let mut rotated = head.clone();
        rotate(&mut rotated, 16, &angles);
        assert_eq!(rotated, head);

        frequencies.angles(1234, &mut angles);
        rotate(&mut rotated, 16, &angles);
        let square = |v: &[f32]| v.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        assert!((square(&rotated) / square(&head) - 1.0).abs() < 1e-6);
        assert_ne!(rotated, head);
    }

    #[test]
    fn pair_i_turns_by_position_over_base_to_the_2i_over_dims() {
        let frequencies = RopeFrequencies::new(&PLAIN, None);
        let mut angles = vec![[0.0; 2]; 32];
        frequencies.angles(100, &mut angles);
        for (i, [cos, sin]) in angles.iter().enumerate() {
            let angle = 100.0 * 10_000f64.powf(-(i as f64) / 32.0);
            assert!(
                (f64::from(*cos) - angle.cos()).abs() < 1e-6 && (f64::from(*sin) - angle.sin()).abs() < 1e-6,
                "pair {i}"
            );
        }
    }

    #[test]
    fn linear_factor_and_per_pair_factors_slow_the_turn() {
        let plain = RopeFrequencies::new(&PLAIN, None);
        let linear = RopeFrequencies::new(&Rope { linear_factor: 4.0, ..PLAIN }, None);
        let factors = RopeFrequencies::new(&PLAIN, Some(&[4.0; 32]));
        let at = |frequencies: &RopeFrequencies, position| {
            let mut angles = vec![[0.0; 2]; 32];
            frequencies.angles(position, &mut angles);
            angles
        };
        assert_eq!(at(&linear, 400), at(&plain, 100));
        assert_eq!(at(&factors, 400), at(&plain, 100));
    }

    #[test]
    fn strided_heads_rotate_like_contiguous_ones() {
        let frequencies = RopeFrequencies::new(&PLAIN, None);
        let mut angles = vec![[0.0; 2]; 32];
        frequencies.angles(7, &mut angles);
        let mut contiguous: Vec<f32> = (0..64u8).map(f32::from).collect();
        let mut strided = vec![0.0; 4 * 48];
        for k in 0..64 {
            strided[(k / 16) * 48 + k % 16] = contiguous[k];
        }
        rotate(&mut contiguous, 16, &angles);
        rotate(&mut strided, 48, &angles);
        assert!((0..64).all(|k| strided[(k / 16) * 48 + k % 16] == contiguous[k]));
    }
}
