//! Teacher forcing: a window of known tokens through the model, every wanted row of logits to a closure.
//! What `score` and `perplexity` share. Next on the data's way: `model::forward`, or `model::reference` where asked.

use super::LineError;
use super::session::Session;
use crate::model::forward::{BatchRow, forward};
use crate::model::kv::{BlockTable, KvCache, blocks_for};
use crate::model::reference;
use crate::model::scratch::Scratch;
use crate::text::TokenId;

/// One sequence's cache and buffers, used for window after window.
pub struct Scorer<'m> {
    session: Session<'m>,
    cache: KvCache,
    scratch: Scratch,
    row: Vec<f32>,
    reference: bool,
}

impl<'m> Scorer<'m> {
    /// Takes the buffers. `reference`: compute in plain F32 instead.
    pub fn new(session: Session<'m>, reference: bool) -> Self {
        session.workers.pin_caller();
        let hyper = &session.model.hyper;
        let capacity = session.capacity;
        let cache = KvCache::new(hyper, blocks_for(capacity.ctx));
        let scratch =
            Scratch::new(hyper, capacity.ctx, capacity.max_rows, capacity.max_outputs, session.workers.threads());
        let row = vec![0.0; hyper.n_vocab];
        Self { session, cache, scratch, row, reference }
    }

    /// Runs a window from position 0; calls `each(position, logits)` for every position from `first` on.
    ///
    /// # Errors
    /// The window is longer than the context or holds a token outside the vocabulary.
    pub fn run(
        &mut self,
        tokens: &[TokenId],
        first: usize,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), LineError> {
        let (ctx, n_vocab) = (self.session.capacity.ctx, self.session.model.hyper.n_vocab);
        if tokens.len() > ctx {
            return Err(LineError(format!("{} tokens, the context has {ctx} positions; raise --ctx", tokens.len())));
        }
        if let Some(token) = tokens.iter().find(|token| token.index() >= n_vocab) {
            return Err(LineError(format!("token id {} is outside the vocabulary of {n_vocab}", token.0)));
        }
        if self.reference {
            let logits = reference::logits(self.session.model, tokens);
            for (position, row) in logits.chunks_exact(n_vocab).enumerate().skip(first) {
                each(position, row);
            }
            return Ok(());
        }
        let mut table = [BlockTable::with_capacity(ctx)];
        // The pool was made for `ctx` positions and every earlier window gave its blocks back.
        self.cache.reserve(&mut table[0], tokens.len());
        let chunk = self.scratch.max_rows().min(self.scratch.max_outputs());
        for start in (0..tokens.len()).step_by(chunk) {
            let end = tokens.len().min(start + chunk);
            let rows: Vec<BatchRow> = (start..end)
                .map(|position| BatchRow { token: tokens[position], sequence: 0, position, logits: position >= first })
                .collect();
            let Session { model, kernels, workers, .. } = &mut self.session;
            forward(model, *kernels, &mut self.cache, &table, &rows, &mut self.scratch, workers);
            for (output, position) in (start.max(first)..end).enumerate() {
                self.scratch.copy_logits(output, &mut self.row);
                each(position, &self.row);
            }
        }
        self.cache.release(&mut table[0]);
        Ok(())
    }
}

/// Natural logarithm of the sum of exponentials, in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&logit| libm::exp(f64::from(logit) - f64::from(largest))).sum();
    f64::from(largest) + libm::log(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sum_exp_of_equal_logits_is_the_logit_plus_the_log_of_their_number() {
        assert!((log_sum_exp(&[1000.0; 8]) - (1000.0 + 8f64.ln())).abs() < 1e-9);
        assert!((log_sum_exp(&[0.0, -1.0]) - (1.0 + (-1f64).exp()).ln()).abs() < 1e-12);
    }
}
