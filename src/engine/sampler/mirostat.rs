//! Mirostat (Basu and others, 2021), versions 1 and 2: cuts the candidates so that the surprise of the text stays near a target.
//! Called by `engine::sampler` in place of the other cuts.

use super::{Candidate, SamplingParams, draw_from, likeliest_first, weight_of};
use crate::text::TokenId;

/// Tokens from which version 1 estimates how steeply probabilities fall.
const ESTIMATE_FROM: usize = 100;
/// `mu` stays below, so that `2^mu` is a number; no token of a vocabulary of 32 bits surprises as much.
const MAX_MU: f64 = 64.0;

/// What mirostat has learnt in one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MirostatState {
    /// Greatest surprise allowed, in bits; `None` before the first token.
    mu: Option<f64>,
}

/// Draws one of the candidates, whose values are their weights with the temperature; none is left out for good.
pub(super) fn draw(
    candidates: &mut Vec<Candidate>,
    params: &SamplingParams,
    state: &mut MirostatState,
    chance: f64,
) -> Option<TokenId> {
    let (tau, eta) = (f64::from(params.mirostat_tau), f64::from(params.mirostat_eta));
    let mu = state.mu.unwrap_or(2.0 * tau);
    candidates.sort_unstable_by(likeliest_first);
    let vocabulary = candidates.len();
    let total = weight_of(candidates);
    let kept = match params.mirostat {
        1 => most_tokens(candidates, total, vocabulary, mu),
        _ => candidates.iter().take_while(|candidate| surprise(candidate, total) <= mu).count(),
    };
    candidates.truncate(kept.max(1));
    let total = weight_of(candidates);
    let chosen = draw_from(candidates, chance)?;
    state.mu = Some((mu - eta * (surprise(chosen, total) - tau)).clamp(-MAX_MU, MAX_MU));
    Some(chosen.token)
}

fn surprise(candidate: &Candidate, total: f64) -> f64 {
    -libm::log2(f64::from(candidate.value) / total)
}

/// Version 1: how many tokens have at most a surprise of `mu`, if probabilities fall as Zipf's law says.
fn most_tokens(candidates: &[Candidate], total: f64, vocabulary: usize, mu: f64) -> usize {
    let (mut above, mut below) = (0.0, 0.0);
    for (i, pair) in candidates.windows(2).take(ESTIMATE_FROM - 1).enumerate() {
        let (first, second) = (f64::from(pair[0].value) / total, f64::from(pair[1].value) / total);
        if second <= 0.0 {
            break;
        }
        let step = libm::log((i + 2) as f64 / (i + 1) as f64);
        above += step * libm::log(first / second);
        below += step * step;
    }
    let exponent = if below > 0.0 { above / below } else { 0.0 };
    let epsilon = exponent - 1.0;
    let most = libm::pow(epsilon * libm::exp2(mu) / (1.0 - libm::pow(vocabulary as f64, -epsilon)), 1.0 / exponent);
    // Not a number where the estimate says nothing: then nothing is cut.
    if most.is_finite() && most >= 0.0 { libm::round(most).min(vocabulary as f64) as usize } else { vocabulary }
}
