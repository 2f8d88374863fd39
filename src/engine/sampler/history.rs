//! What the text so far costs a token: repetition, frequency and presence penalties, and DRY ("don't repeat yourself", p-e-w 2024), which
//! looks for passages. Called by `engine::sampler`.

use super::SamplingParams;
use crate::text::TokenId;

/// Longest passage whose length still raises the price, in tokens beyond the allowed length.
const MAX_DRY_EXPONENT: u32 = 64;
/// The most that DRY subtracts: far beyond any difference of logits, and far from the end of f32.
const MAX_DRY_PENALTY: f32 = 1.0e6;

/// Tables that the penalties count in, shared by all sequences.
pub(super) struct History {
    /// One bit a token: already penalized in this call.
    seen: Vec<u64>,
    /// One bit a token: a passage does not reach over it.
    breaks: Vec<u64>,
    /// One a position: how long the passage that ends there is equal to the end of the text.
    lengths: Vec<u32>,
    /// One a token: the longest passage that it would continue; 0 between calls.
    longest: Vec<u32>,
}

impl History {
    pub(super) fn new(n_vocab: usize, ctx: usize) -> Self {
        let words = n_vocab.div_ceil(64);
        Self {
            seen: vec![0; words],
            breaks: vec![0; words],
            lengths: Vec::with_capacity(ctx),
            longest: vec![0; n_vocab],
        }
    }

    pub(super) fn set_breakers(&mut self, breakers: &[TokenId]) {
        self.breaks.fill(0);
        for token in breakers {
            if let Some(word) = self.breaks.get_mut(token.index() / 64) {
                *word |= 1u64 << (token.index() % 64);
            }
        }
    }

    pub(super) fn bytes(n_vocab: usize, ctx: usize) -> usize {
        2 * n_vocab.div_ceil(64) * size_of::<u64>() + (ctx + n_vocab) * size_of::<u32>()
    }

    pub(super) fn penalize(
        &mut self,
        params: &SamplingParams,
        prompt: &[TokenId],
        generated: &[TokenId],
        logits: &mut [f32],
    ) {
        if params.repetition_penalty != 1.0 {
            self.seen.fill(0);
            let skipped = (prompt.len() + generated.len()).saturating_sub(params.repeat_last_n);
            for &token in prompt.iter().chain(generated).skip(skipped) {
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

    /// A token that followed an earlier passage costs `multiplier * base^(length - allowed)`, where the passage is as long as it
    /// equals the end of the text and holds no breaker.
    pub(super) fn dry(
        &mut self,
        params: &SamplingParams,
        prompt: &[TokenId],
        generated: &[TokenId],
        logits: &mut [f32],
    ) {
        let all = prompt.len() + generated.len();
        let len = all.min(params.dry_penalty_last_n).min(self.lengths.capacity());
        if params.dry_multiplier <= 0.0 || len <= params.dry_allowed_length {
            return;
        }
        // Counted from the end: 0 is the newest token.
        let at = |back: usize| {
            let position = all - 1 - back;
            prompt.get(position).copied().unwrap_or_else(|| generated[position - prompt.len()])
        };
        let is_break = |token: TokenId| {
            self.breaks.get(token.index() / 64).is_some_and(|word| word >> (token.index() % 64) & 1 == 1)
        };
        let limit = (0..len).position(|back| is_break(at(back))).unwrap_or(len);
        if limit < params.dry_allowed_length.max(1) {
            return;
        }
        // Gusfield's Z algorithm on the reversed text: `lengths[i]` tokens from `i` on equal those from 0 on.
        let lengths = &mut self.lengths;
        lengths.clear();
        lengths.resize(len, 0);
        let (mut left, mut right) = (0, 0);
        for i in 1..len {
            let mut same = if i < right { (lengths[i - left] as usize).min(right - i) } else { 0 };
            while i + same < len && at(same) == at(i + same) {
                same += 1;
            }
            if i + same > right {
                (left, right) = (i, i + same);
            }
            lengths[i] = u32::try_from(same).unwrap_or(u32::MAX);
        }
        for (i, &same) in lengths.iter().enumerate().skip(1) {
            let same = same.min(u32::try_from(limit).unwrap_or(u32::MAX));
            let next = at(i - 1);
            if same as usize >= params.dry_allowed_length.max(1) {
                let longest = &mut self.longest[next.index()];
                *longest = (*longest).max(same);
            }
        }
        for i in 0..len - 1 {
            let token = at(i);
            let longest = std::mem::take(&mut self.longest[token.index()]);
            if longest > 0 && !is_break(token) {
                let over = (longest as usize).saturating_sub(params.dry_allowed_length);
                let over = u32::try_from(over).unwrap_or(u32::MAX).min(MAX_DRY_EXPONENT);
                logits[token.index()] -= price(params.dry_multiplier, params.dry_base, over);
            }
        }
    }

    fn first_sight(&mut self, token: TokenId) -> bool {
        let (word, bit) = (&mut self.seen[token.index() / 64], 1u64 << (token.index() % 64));
        let first = *word & bit == 0;
        *word |= bit;
        first
    }
}

/// `multiplier * base^exponent`, one product after the other: no library's power function, whose last bit differs between systems.
fn price(multiplier: f32, base: f32, exponent: u32) -> f32 {
    (0..exponent).fold(multiplier, |price, _| (price * base).min(MAX_DRY_PENALTY)).min(MAX_DRY_PENALTY)
}
