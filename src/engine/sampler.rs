//! From one row of logits to one token, in llama.cpp's order and with its parameters: logit bias, penalties, DRY, top-k, typical,
//! top-p, min-p, XTC, temperature (fixed, or dynamic by entropy), a seeded draw. Mirostat takes the place of everything between DRY
//! and the draw but the temperature. Every operation is the same on every CPU, so the same seed gives the same text everywhere.
//! Called by `engine` once a sequence and step; next on the data's way: `engine::queue`.

mod draw;
mod history;
mod logprobs;
mod mirostat;
#[cfg(test)]
mod tests;

use draw::{argmax, uniform};
use history::History;
pub use logprobs::{MAX_TOP_LOGPROBS, TokenLogprobs, logprobs};
pub use mirostat::MirostatState;

use crate::text::TokenId;

/// How one sequence's tokens are chosen. `Default` is greedy: an appliance repeats itself.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Finite, at least 0.
    pub temperature: f32,
    /// Over 0: the temperature moves by as much to both sides, low where the model is sure.
    pub dynatemp_range: f32,
    /// How steeply it follows the entropy. Over 0.
    pub dynatemp_exponent: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all. In (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the likeliest; 0 keeps all. In [0, 1].
    pub min_p: f32,
    /// Keep the tokens whose surprise is nearest to the entropy, until their probability passes this; 1 keeps all. In (0, 1].
    pub typical_p: f32,
    /// How often XTC drops the likeliest tokens; 0 is never. In [0, 1].
    pub xtc_probability: f32,
    /// XTC drops tokens at least this likely, all but the least likely of them. In [0, 1]; over 0.5 there are no two.
    pub xtc_threshold: f32,
    /// Divides (positive) or multiplies (negative) the logits of seen tokens; 1 is off. Over 0.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence of a token in the generated text; 0 is off. In [-2, 2].
    pub frequency_penalty: f32,
    /// Subtracted once from every token that occurs in the generated text; 0 is off. In [-2, 2].
    pub presence_penalty: f32,
    /// How far back the repetition penalty looks, in tokens of prompt and answer.
    pub repeat_last_n: usize,
    /// DRY: what a token costs that would repeat a passage as long as allowed; 0 is off.
    pub dry_multiplier: f32,
    /// DRY: by how much each further token of the passage multiplies that. At least 1.
    pub dry_base: f32,
    /// DRY: passages shorter than this cost nothing.
    pub dry_allowed_length: usize,
    /// How far back DRY looks, in tokens.
    pub dry_penalty_last_n: usize,
    /// 0 off, 1 or 2: keeps the surprise of the text near `mirostat_tau`.
    pub mirostat: u8,
    /// Surprise aimed at, in bits a token.
    pub mirostat_tau: f32,
    /// How fast mirostat learns.
    pub mirostat_eta: f32,
    /// Added to the logits of these tokens; ids are in the vocabulary.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: usize::MAX,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: usize::MAX,
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// The memory of sampling, shared by all sequences: one row of candidates, and what the penalties count.
pub struct Sampler {
    candidates: Vec<Candidate>,
    history: History,
}

/// A token that is still in the running.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: TokenId,
    /// Its logit less the largest of the row.
    logit: f32,
    /// `exp(logit)`; while typical sorts, the distance from the entropy; at last, with the temperature.
    value: f32,
}

/// Candidates sorted at first where only the most likely ones are wanted; four times as many each time they do not suffice.
const FIRST_SORTED: usize = 256;
/// XTC draws numbers of its own.
const XTC_STREAM: u64 = 0x5854_4300_0000_0001;

impl Sampler {
    /// Takes memory for a vocabulary and a context.
    pub fn new(n_vocab: usize, ctx: usize) -> Self {
        Self { candidates: Vec::with_capacity(n_vocab), history: History::new(n_vocab, ctx) }
    }

    /// Tokens over which DRY sees no repetition.
    pub fn set_dry_breakers(&mut self, breakers: &[TokenId]) {
        self.history.set_breakers(breakers);
    }

    /// Bytes that [`Sampler::new`] takes.
    pub fn bytes(n_vocab: usize, ctx: usize) -> usize {
        n_vocab * size_of::<Candidate>() + History::bytes(n_vocab, ctx)
    }

    /// Chooses a token from `logits` (changed in place). The draw depends on the seed and the number of generated tokens alone,
    /// with mirostat also on `state`, which belongs to the sequence. `None`: a logit is NaN, or none is finite.
    pub fn sample(
        &mut self,
        params: &SamplingParams,
        state: &mut MirostatState,
        prompt: &[TokenId],
        generated: &[TokenId],
        logits: &mut [f32],
    ) -> Option<TokenId> {
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(token.index()) {
                *logit += bias;
            }
        }
        self.history.penalize(params, prompt, generated, logits);
        self.history.dry(params, prompt, generated, logits);
        let (best, largest) = argmax(logits)?;
        if params.temperature <= 0.0 {
            return Some(best);
        }
        self.candidates.clear();
        self.candidates.extend((0u32..).zip(logits.iter()).filter(|(_, logit)| logit.is_finite()).map(
            |(id, &logit)| {
                let logit = logit - largest;
                Candidate { token: TokenId(id), logit, value: hearth_kernels::exp(logit) }
            },
        ));
        let chance = uniform(params.seed, generated.len());
        if params.mirostat > 0 {
            self.heat(params);
            return mirostat::draw(&mut self.candidates, params, state, chance);
        }
        self.top_k(params.top_k as usize);
        self.typical(f64::from(params.typical_p));
        self.top_p(f64::from(params.top_p));
        self.min_p(params.min_p);
        self.xtc(params, generated.len());
        self.heat(params);
        self.draw(chance).or(Some(best))
    }

    fn total(&self) -> f64 {
        weight_of(&self.candidates)
    }

    fn top_k(&mut self, k: usize) {
        if k > 0 && k < self.candidates.len() {
            self.sort_front(k);
            self.candidates.truncate(k);
        }
    }

    /// Sorts only as many candidates as it keeps, about.
    fn top_p(&mut self, p: f64) {
        if p >= 1.0 {
            return;
        }
        let all = self.candidates.len();
        let wanted = self.total() * p;
        let (mut sorted, mut sum, mut kept) = (0, 0.0, 0);
        while kept < all {
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
        self.candidates.truncate(kept);
    }

    fn min_p(&mut self, p: f32) {
        if p > 0.0 {
            let least = self.candidates.iter().fold(0.0, |most: f32, candidate| most.max(candidate.value)) * p;
            self.candidates.retain(|candidate| candidate.value >= least);
        }
    }

    /// Locally typical sampling (Meister and others, 2022).
    fn typical(&mut self, p: f64) {
        if p >= 1.0 {
            return;
        }
        let total = self.total();
        let entropy = self.entropy(total);
        let log_total = libm::log(total);
        let shift = |candidate: &Candidate| (log_total - f64::from(candidate.logit) - entropy).abs();
        self.candidates.sort_unstable_by(|a, b| shift(a).total_cmp(&shift(b)).then(a.token.cmp(&b.token)));
        let (mut sum, mut kept) = (0.0, 0);
        for candidate in &self.candidates {
            sum += f64::from(candidate.value);
            kept += 1;
            if sum > total * p {
                break;
            }
        }
        self.candidates.truncate(kept);
        self.sort_front(kept);
    }

    /// Exclude top choices: of the tokens over the threshold only the least likely stays, now and then.
    fn xtc(&mut self, params: &SamplingParams, step: usize) {
        if params.xtc_probability <= 0.0 || uniform(params.seed ^ XTC_STREAM, step) >= f64::from(params.xtc_probability)
        {
            return;
        }
        let least = self.total() * f64::from(params.xtc_threshold);
        let over = |candidate: &Candidate| f64::from(candidate.value) >= least;
        let rank = |a: &&Candidate, b: &&Candidate| a.value.total_cmp(&b.value).then(b.token.cmp(&a.token));
        if let Some(stays) = self.candidates.iter().filter(|c| over(c)).min_by(rank).map(|stays| stays.token) {
            self.candidates.retain(|candidate| !over(candidate) || candidate.token == stays);
        }
    }

    /// Applies the temperature, that asked for or the one that the entropy says; the largest value is 1 afterwards.
    fn heat(&mut self, params: &SamplingParams) {
        let mut temperature = params.temperature;
        if params.dynatemp_range > 0.0 && self.candidates.len() > 1 {
            let most = libm::log(self.candidates.len() as f64);
            let share = (self.entropy(self.total()) / most).clamp(0.0, 1.0);
            let (low, high) = ((temperature - params.dynatemp_range).max(0.0), temperature + params.dynatemp_range);
            let by = libm::pow(share, f64::from(params.dynatemp_exponent)) as f32;
            temperature = (low + (high - low) * by).max(LEAST_TEMPERATURE);
        }
        let largest = self.candidates.iter().fold(f32::NEG_INFINITY, |most, candidate| most.max(candidate.logit));
        for candidate in &mut self.candidates {
            candidate.value = hearth_kernels::exp((candidate.logit - largest) / temperature);
        }
    }

    /// In nats.
    fn entropy(&self, total: f64) -> f64 {
        let sum: f64 = self.candidates.iter().map(|c| f64::from(c.value) * f64::from(c.logit)).sum();
        libm::log(total) - sum / total
    }

    fn draw(&self, chance: f64) -> Option<TokenId> {
        draw_from(&self.candidates, chance).map(|candidate| candidate.token)
    }

    /// Moves the `count` likeliest candidates to the front, in order; of equals the lower id first.
    fn sort_front(&mut self, count: usize) {
        if count < self.candidates.len() {
            self.candidates.select_nth_unstable_by(count, likeliest_first);
        }
        self.candidates[..count].sort_unstable_by(likeliest_first);
    }
}

/// Where the model is sure, a dynamic temperature ends up at 0; logits are divided by it.
const LEAST_TEMPERATURE: f32 = 0.01;

fn likeliest_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

fn weight_of(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.value)).sum()
}

/// One of them, by its value, in the order in which they stand.
fn draw_from(candidates: &[Candidate], chance: f64) -> Option<&Candidate> {
    let mut left = chance * weight_of(candidates);
    let mut chosen = None;
    for candidate in candidates {
        if candidate.value > 0.0 {
            chosen = Some(candidate);
        }
        left -= f64::from(candidate.value);
        if left < 0.0 {
            break;
        }
    }
    chosen
}
