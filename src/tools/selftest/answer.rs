//! The golden answer: what the model says to a fixed question with this machine's kernel set and with the scalar one, which is their
//! specification. Both hash the same, here and on every other machine. On the way, how fast memory is read and tokens are made.
//! Next on the data's way: `engine`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::super::roofline::Roofline;
use super::super::session::{ModelArgs, Session, Wanted, with_model};
use super::super::{LineError, ToolError, detokenize};
use crate::engine::Engine;
use crate::engine::queue::{Event, FinishReason, Job};
use crate::engine::sampler::SamplingParams;
use crate::engine::scheduler::Peer;
use crate::text::TokenId;

/// What is asked, as it is, without a chat template: few tokens, since the scalar set takes its time.
pub const QUESTION: &str = "Name three colours.";
/// Tokens of the answer; it goes on past an end that the model makes.
pub const ANSWER_TOKENS: usize = 8;
/// Positions that both take, where the model has so many.
pub const POSITIONS: usize = 64;
/// Rows in a step.
const MAX_ROWS: usize = 16;
/// Most of the weights that are read for the bandwidth, in bytes: more than any cache holds.
const MOST_READ_BYTES: usize = 256 << 20;

/// An answer, and how it came about.
pub struct Answer {
    /// What it says.
    pub text: String,
    /// xxh3-64 over the logits of every token, 16 hex digits.
    pub logits_hash: String,
    /// The kernel set.
    pub kernels: &'static str,
    /// Threads that computed.
    pub threads: usize,
    /// Tokens a second behind the first.
    pub tok_s: f64,
    /// 10^9 bytes of weights that loads alone read in a second, and the way of reading; where it was measured.
    pub read: Option<(f64, String)>,
}

/// Answers [`QUESTION`] with a kernel set, the best one where none is named; measures the bandwidth where `reads`.
///
/// # Errors
/// The model does not load beside what runs, or computes no finite numbers.
pub fn answer(model: &Path, kernels: Option<&str>, positions: usize, reads: bool) -> Result<Answer, ToolError> {
    let args =
        ModelArgs { model: model.to_owned(), threads: None, threads_batch: None, kernels: kernels.map(str::to_owned) };
    let wanted =
        Wanted { ctx: Some(positions), sequences: 1, max_rows: MAX_ROWS, max_outputs: 1, prefix: 0, grammars: 0 };
    with_model(&args, wanted, |session| {
        let Session { model, vocab, kernels, mut workers, capacity, .. } = session;
        let threads = workers.threads();
        workers.pin_caller();
        let mut roofline = Roofline::new(model, MOST_READ_BYTES);
        roofline.measure(usize::from(reads), kernels, &mut workers);
        let prompt = vocab.encode(QUESTION, true, true).map_err(|error| LineError(error.to_string()))?;
        let job = Job {
            id: 1,
            prompt,
            sampling: SamplingParams::default(),
            max_tokens: ANSWER_TOKENS,
            ignore_eos: true,
            logits_hash: true,
            logprobs: None,
            cancel: Arc::new(AtomicBool::new(false)),
            embed: None,
            mask: None,
            peer: Peer::default(),
        };
        let mut engine = Engine::new(model, kernels, workers, capacity, MAX_ROWS, vocab.eog_ids().to_vec());
        engine.admit(Box::new(job)).map_err(|refused| LineError(refused.to_string()))?;
        let mut ids: Vec<TokenId> = Vec::with_capacity(ANSWER_TOKENS);
        let (mut first, mut hash, mut ended) = (None, 0, None);
        while !engine.is_idle() {
            engine.step(&mut |event| match event {
                Event::Begun { .. } => {}
                Event::Token { token, .. } => {
                    ids.push(token);
                    first = first.or(Some(Instant::now()));
                }
                Event::Finished { reason, logits_hash, .. } => {
                    hash = logits_hash.unwrap_or_default();
                    ended = Some(reason);
                }
            });
        }
        if ended == Some(FinishReason::NonFinite) {
            return Err(LineError("the model computed values that are not finite; its file is damaged".into()).into());
        }
        let time = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
        let read = roofline.gb_s().zip(roofline.plan()).map(|(gb_s, plan)| (gb_s, plan.to_string()));
        Ok(Answer {
            text: detokenize(vocab, &ids),
            logits_hash: format!("{hash:016x}"),
            kernels: kernels.name(),
            threads,
            tok_s: ids.len().saturating_sub(1) as f64 / time.max(1e-9),
            read,
        })
    })
}
