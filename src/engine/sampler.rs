//! From one row of logits to one token: penalties, temperature, top-k, top-p, min-p, a seeded draw.

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
