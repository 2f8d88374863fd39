//! Which tokens an answer may go on with, where a grammar says so: a bit a token, written by the I/O thread and read by the engine.
//!
//! The grammar is text's matter and stays with the I/O thread; the engine sees bits. They take turns: the engine draws the answer's token
//! number `n` only from a mask that is published for `n`, and the I/O thread publishes the next one only after it was told that token.
//! So neither waits for the other with a lock, and a mask that is being written is never read. Next on the data's way: `engine::sampler`.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// One answer's mask. Taken and given back by the I/O thread, with the job.
#[derive(Debug)]
pub struct Mask {
    /// Bit `t % 32` of word `t / 32` is token `t`.
    words: Box<[AtomicU32]>,
    /// Tokens that the answer had when the mask was published, plus one; 0: it never was.
    published: AtomicUsize,
}

impl Mask {
    /// A mask for a vocabulary, not yet published.
    pub fn new(n_vocab: usize) -> Self {
        let words = (0..n_vocab.div_ceil(32)).map(|_| AtomicU32::new(0)).collect();
        Self { words, published: AtomicUsize::new(0) }
    }

    /// Bytes that one takes.
    pub const fn bytes(n_vocab: usize) -> usize {
        n_vocab.div_ceil(32) * size_of::<AtomicU32>() + size_of::<Self>()
    }

    /// Says which tokens may follow an answer of `tokens` tokens. Bits beyond the vocabulary do not count, missing ones are unset.
    pub fn publish(&self, tokens: usize, allowed: &[u32]) {
        for (index, word) in self.words.iter().enumerate() {
            word.store(allowed.get(index).copied().unwrap_or(0), Ordering::Relaxed);
        }
        self.published.store(tokens + 1, Ordering::Release);
    }

    /// Whether it is there for an answer of `tokens` tokens.
    pub fn is_for(&self, tokens: usize) -> bool {
        self.published.load(Ordering::Acquire) == tokens + 1
    }

    /// Makes what may not follow impossible. `logits`: one a token of the model's, whose head may have rows for which there is none.
    pub fn apply(&self, logits: &mut [f32]) {
        for (index, logits) in logits.chunks_mut(32).enumerate() {
            let word = self.words.get(index).map_or(0, |word| word.load(Ordering::Relaxed));
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_counts_for_the_token_that_it_was_published_for() {
        let mask = Mask::new(40);
        assert!(!mask.is_for(0));
        mask.publish(0, &[0b101, 1 << 7 | 1 << 9]);
        assert!(mask.is_for(0) && !mask.is_for(1));
        let mut logits = vec![1.0; 70];
        mask.apply(&mut logits);
        let left: Vec<usize> = (0..70).filter(|&token| logits[token] == 1.0).collect();
        assert_eq!(left, [0, 2, 39, 41]);
        mask.publish(1, &[2]);
        mask.apply(&mut logits);
        assert!(mask.is_for(1) && logits.iter().all(|&logit| logit == f32::NEG_INFINITY));
    }
}
