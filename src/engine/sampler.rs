//! From one row of logits to one token: penalties, temperature, top-k, top-p, min-p, a seeded draw.
//! Every operation is the same on every CPU, so the same seed gives the same text everywhere. Called by `engine` once a sequence
//! and step; next on the data's way: `engine::queue`.

use crate::text::TokenId;

/// How one sequence's tokens are chosen. `Default` is greedy: an appliance repeats itself.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Finite, at least 0.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all. In (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the likeliest; 0 keeps all. In [0, 1].
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of seen tokens; 1 is off. Over 0.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence of a token in the generated text; 0 is off. In [-2, 2].
    pub frequency_penalty: f32,
    /// Subtracted once from every token that occurs in the generated text; 0 is off. In [-2, 2].
    pub presence_penalty: f32,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

/// The memory of sampling, shared by all sequences: one row of candidates.
pub struct Sampler {
    candidates: Vec<Candidate>,
    /// One bit a token: already penalized in this call.
    seen: Vec<u64>,
}

/// A token with its logit, then its weight: `exp(logit - largest)`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: TokenId,
    value: f32,
}

/// Candidates sorted at first where only the most likely ones are wanted; four times as many each time they do not suffice.
const FIRST_SORTED: usize = 256;

impl Sampler {
    /// Takes memory for a vocabulary.
    pub fn new(n_vocab: usize) -> Self {
        Self { candidates: Vec::with_capacity(n_vocab), seen: vec![0; n_vocab.div_ceil(64)] }
    }

    /// Bytes that [`Sampler::new`] takes.
    pub fn bytes(n_vocab: usize) -> usize {
        n_vocab * size_of::<Candidate>() + n_vocab.div_ceil(64) * size_of::<u64>()
    }

    /// Chooses a token from `logits` (changed in place by the penalties). The order is: penalties, temperature, top-k, top-p,
    /// min-p, draw. The draw depends on the seed and the number of generated tokens alone. `None`: a logit is NaN, or none is
    /// finite.
    pub fn sample(
        &mut self,
        params: &SamplingParams,
        prompt: &[TokenId],
        generated: &[TokenId],
        logits: &mut [f32],
    ) -> Option<TokenId> {
        self.penalize(params, prompt, generated, logits);
        let (best, largest) = argmax(logits)?;
        if params.temperature <= 0.0 {
            return Some(best);
        }
        self.candidates.clear();
        self.candidates.extend((0u32..).zip(logits.iter()).map(|(id, &logit)| Candidate {
            token: TokenId(id),
            value: hearth_kernels::exp((logit - largest) / params.temperature),
        }));
        let kept = self.keep(params);
        let threshold = params.min_p;
        let kept = &self.candidates[..kept];
        // The likeliest candidate's weight is exp(0) = 1, so `min_p` compares directly.
        let kept = || kept.iter().filter(move |candidate| candidate.value >= threshold);
        let total: f64 = kept().map(|candidate| f64::from(candidate.value)).sum();
        let mut left = uniform(params.seed, generated.len()) * total;
        let mut chosen = best;
        for candidate in kept() {
            if candidate.value > 0.0 {
                chosen = candidate.token;
            }
            left -= f64::from(candidate.value);
            if left < 0.0 {
                break;
            }
        }
        Some(chosen)
    }

    fn penalize(&mut self, params: &SamplingParams, prompt: &[TokenId], generated: &[TokenId], logits: &mut [f32]) {
        if params.repetition_penalty != 1.0 {
            self.seen.fill(0);
            for &token in prompt.iter().chain(generated) {
                if self.first_sight(token) {
                    let logit = &mut logits[token.index()];
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
            }
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            self.seen.fill(0);
            for &token in generated {
                let presence = if self.first_sight(token) { params.presence_penalty } else { 0.0 };
                logits[token.index()] -= params.frequency_penalty + presence;
            }
        }
    }

    fn first_sight(&mut self, token: TokenId) -> bool {
        let (word, bit) = (&mut self.seen[token.index() / 64], 1u64 << (token.index() % 64));
        let first = *word & bit == 0;
        *word |= bit;
        first
    }

    /// Sorts as many candidates as top-k and top-p need to the front, likeliest first, and returns how many are kept.
    fn keep(&mut self, params: &SamplingParams) -> usize {
        let all = self.candidates.len();
        let top_k = if params.top_k == 0 { all } else { (params.top_k as usize).min(all) };
        if params.top_p >= 1.0 {
            if top_k < all {
                self.sort_front(top_k);
            }
            return top_k;
        }
        let mut sorted = 0;
        let wanted = if top_k < all {
            sorted = top_k;
            self.sort_front(top_k);
            self.weight_of(top_k) * f64::from(params.top_p)
        } else {
            self.weight_of(all) * f64::from(params.top_p)
        };
        let (mut sum, mut kept) = (0.0, 0);
        while kept < top_k {
            if kept == sorted {
                sorted = (sorted * 4).max(FIRST_SORTED).min(all);
                self.sort_front(sorted);
            }
            sum += f64::from(self.candidates[kept].value);
            kept += 1;
            if sum >= wanted {
                break;
            }
        }
        kept
    }

    fn weight_of(&self, count: usize) -> f64 {
        self.candidates[..count].iter().map(|candidate| f64::from(candidate.value)).sum()
    }

    /// Moves the `count` likeliest candidates to the front, in order; of equals the lower id first.
    fn sort_front(&mut self, count: usize) {
        let order = |a: &Candidate, b: &Candidate| b.value.total_cmp(&a.value).then(a.token.cmp(&b.token));
        if count < self.candidates.len() {
            self.candidates.select_nth_unstable_by(count, order);
        }
        self.candidates[..count].sort_unstable_by(order);
    }
}

/// The largest logit's token, of equals the lowest id. `None` where a logit is NaN or the largest is not finite.
fn argmax(logits: &[f32]) -> Option<(TokenId, f32)> {
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
fn uniform(seed: u64, step: usize) -> f64 {
    let mixed = splitmix64(splitmix64(seed).wrapping_add(step as u64));
    // The top 53 bits are a double's mantissa.
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn splitmix64(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sample(params: &SamplingParams, generated: &[TokenId], logits: &[f32]) -> Option<TokenId> {
        Sampler::new(logits.len()).sample(params, &[], generated, &mut logits.to_vec())
    }

    fn ids(generated: &[u32]) -> Vec<TokenId> {
        generated.iter().map(|&id| TokenId(id)).collect()
    }

    /// How often each token is drawn over many seeds.
    fn shares(params: SamplingParams, logits: &[f32]) -> Vec<f64> {
        let draws = 20_000u32;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..u64::from(draws) {
            let params = SamplingParams { seed, ..params.clone() };
            counts[sample(&params, &[], logits).unwrap().index()] += 1.0 / f64::from(draws);
        }
        counts
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equals_the_first() {
        assert_eq!(sample(&SamplingParams::default(), &[], &[0.5, 2.0, 2.0, -1.0]), Some(TokenId(1)));
    }

    #[test]
    fn greedy_agrees_with_a_plain_loop_wherever_the_largest_and_infinities_lie() {
        for len in [1, 31, 32, 33, 511, 512, 513, 1100] {
            for at in [0, len / 3, len - 1] {
                let mut logits: Vec<f32> = (0..len).map(|i| ((i * 7919) % 97) as f32 * -0.5).collect();
                logits[at] = 0.5;
                logits[(at + len / 2) % len] = if len > 1 { f32::NEG_INFINITY } else { 0.5 };
                logits[len - 1] = logits[len - 1].max(if at == len - 1 { 0.5 } else { -1.0 });
                let mut plain = (0, f32::NEG_INFINITY);
                for (i, &logit) in logits.iter().enumerate() {
                    if logit > plain.1 {
                        plain = (i, logit);
                    }
                }
                assert_eq!(argmax(&logits), Some((TokenId(u32::try_from(plain.0).unwrap()), plain.1)), "{len} {at}");
                logits[len / 2] = f32::NAN;
                assert_eq!(argmax(&logits), None, "{len} {at}");
            }
        }
    }

    #[test]
    fn broken_logits_give_no_token() {
        let params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        for logits in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [f32::NEG_INFINITY; 2]] {
            assert_eq!(sample(&SamplingParams::default(), &[], &logits), None, "{logits:?}");
            assert_eq!(sample(&params, &[], &logits), None, "{logits:?}");
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 1.0, 2.0, -30.0];
        let params = SamplingParams { temperature: 2.0, ..SamplingParams::default() };
        let weights: Vec<f64> = logits.iter().map(|&logit: &f32| (f64::from(logit) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (share, weight) in shares(params, &logits).iter().zip(&weights) {
            assert!((share - weight / total).abs() < 0.02, "{share} for {}", weight / total);
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_where_they_say() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
        let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        let drawn = |params: SamplingParams| shares(params, &logits).iter().filter(|&&share| share > 0.0).count();
        assert_eq!(drawn(base.clone()), 4);
        assert_eq!(drawn(SamplingParams { top_k: 2, ..base.clone() }), 2);
        assert_eq!(drawn(SamplingParams { top_p: 0.7, ..base.clone() }), 2);
        assert_eq!(drawn(SamplingParams { top_p: 0.8, ..base.clone() }), 3);
        assert_eq!(drawn(SamplingParams { min_p: 0.25, ..base.clone() }), 3);
        assert_eq!(drawn(SamplingParams { top_k: 3, top_p: 0.5, ..base }), 1);
    }

    #[test]
    fn penalties_are_the_published_formulas() {
        let generated = ids(&[1, 1, 2]);
        let mut sampler = Sampler::new(4);
        let mut logits = vec![1.0, 1.0, -1.0, 1.0];
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        sampler.penalize(&params, &ids(&[3]), &generated, &mut logits);
        assert_eq!(logits, [1.0, 0.5, -2.0, 0.5]);

        let mut logits = vec![1.0; 4];
        let params = SamplingParams { frequency_penalty: 0.25, presence_penalty: 0.5, ..SamplingParams::default() };
        sampler.penalize(&params, &ids(&[3]), &generated, &mut logits);
        assert_eq!(logits, [1.0, 0.0, 0.25, 1.0]);
    }

    proptest! {
        #[test]
        fn the_same_seed_and_step_give_the_same_token_and_it_is_a_kept_one(
            logits in prop::collection::vec(-8.0f32..8.0, 1..600),
            seed: u64, temperature in 0.05f32..3.0, top_k in 0u32..50, top_p in 0.05f32..=1.0, min_p in 0.0f32..0.9,
        ) {
            let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() };
            let token = sample(&params, &[], &logits).unwrap();
            prop_assert_eq!(sample(&params, &[], &logits), Some(token));
            let rank = logits.iter().filter(|&&logit| logit > logits[token.index()]).count();
            prop_assert!(top_k == 0 || rank < top_k as usize);
        }
    }
}
