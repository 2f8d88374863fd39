//! The largest of a row of logits, and numbers in [0, 1) from a seed: the ends of every choice. Called by `engine::sampler`.

use crate::text::TokenId;

/// The largest logit's token, of equals the lowest id. `None` where a logit is NaN or the largest is not finite.
pub(super) fn argmax(logits: &[f32]) -> Option<(TokenId, f32)> {
    // Lane by lane, so that the compiler uses vectors. Zero times a number stays zero unless that is NaN or infinite: rare, and
    // then looked at again.
    let (chunks, rest) = logits.as_chunks::<ARGMAX_LANES>();
    let mut lanes = [f32::NEG_INFINITY; ARGMAX_LANES];
    let mut zeros = [0.0f32; ARGMAX_LANES];
    for chunk in chunks {
        for ((lane, zero), logit) in lanes.iter_mut().zip(&mut zeros).zip(chunk) {
            *lane = lane.max(*logit);
            *zero *= logit;
        }
    }
    for ((lane, zero), logit) in lanes.iter_mut().zip(&mut zeros).zip(rest) {
        *lane = lane.max(*logit);
        *zero *= logit;
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let suspect = zeros.into_iter().any(f32::is_nan);
    if !largest.is_finite() || (suspect && logits.iter().any(|logit| logit.is_nan())) {
        return None;
    }
    let holds = |chunk: &&[f32]| chunk.iter().fold(false, |found, logit| found | (*logit == largest));
    let chunk = logits.chunks(ARGMAX_CHUNK).position(|chunk| holds(&chunk))?;
    let first = chunk * ARGMAX_CHUNK;
    let at = first + logits[first..].iter().position(|logit| *logit == largest)?;
    Some((TokenId(u32::try_from(at).ok()?), logits[at]))
}

/// Maxima that are sought side by side.
const ARGMAX_LANES: usize = 32;
/// Logits that are compared with the largest before looking at the answer.
const ARGMAX_CHUNK: usize = 512;

/// A number in [0, 1) from a seed and a step: SplitMix64 (Steele, Lea, Flood, 2014), two rounds apart by seed and step.
pub(super) fn uniform(seed: u64, step: usize) -> f64 {
    let mixed = splitmix64(splitmix64(seed).wrapping_add(step as u64));
    // The top 53 bits are a double's mantissa.
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

pub(super) fn splitmix64(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
