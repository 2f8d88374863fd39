//! What the model itself says of a token and of those it liked better: logarithms of the softmax of its logits, before any bias, penalty or
//! cut. Called by `engine` where a job asks for it; next on the data's way: `engine::queue`.

use crate::text::TokenId;

/// Alternatives told of, at most.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// A token's logarithm of its probability, and the likeliest tokens at its place. Of fixed size: it crosses the ring.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub logprob: f32,
    count: usize,
    top: [(TokenId, f32); MAX_TOP_LOGPROBS],
}

impl TokenLogprobs {
    /// The likeliest tokens, likeliest first.
    pub fn top(&self) -> &[(TokenId, f32)] {
        &self.top[..self.count]
    }
}

/// Of `token`, with the `count` likeliest. The logits are as the model gave them; one of them is finite.
pub fn logprobs(logits: &[f32], token: TokenId, count: usize) -> TokenLogprobs {
    let count = count.min(MAX_TOP_LOGPROBS).min(logits.len());
    let mut top = [(TokenId(0), f32::NEG_INFINITY); MAX_TOP_LOGPROBS];
    let mut have = 0;
    let mut largest = f32::NEG_INFINITY;
    for (id, &logit) in (0u32..).zip(logits) {
        largest = largest.max(logit);
        if count > 0 && (have < count || logit > top[count - 1].1) {
            // Of equals the lower id stands first, as it came first.
            let at = top[..have].iter().position(|other| logit > other.1).unwrap_or(have);
            have = (have + 1).min(count);
            top.copy_within(at..have - 1, at + 1);
            top[at] = (TokenId(id), logit);
        }
    }
    let total: f64 = logits.iter().map(|&logit| f64::from(hearth_kernels::exp(logit - largest))).sum();
    let log_total = libm::log(total) + f64::from(largest);
    let of = |logit: f32| (f64::from(logit) - log_total) as f32;
    for entry in &mut top[..have] {
        entry.1 = of(entry.1);
    }
    let logprob = logits.get(token.index()).map_or(f32::NEG_INFINITY, |&logit| of(logit));
    TokenLogprobs { logprob, count: have, top }
}
