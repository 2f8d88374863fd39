//! `hearth generate`: prompts in, continuations and the hash of their logits out, one JSON object a line.
//! The tool that goldens are checked with: `--batch`, `--prefill-chunk`, `--kernels` and `--threads` must not change an answer.
//! Next on the data's way: `engine`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::session::{DEFAULT_CONTEXT, DEFAULT_MAX_ROWS, MAX_SEQUENCES, ModelArgs, Session, Wanted, with_model};
use super::{LineError, ToolError, answer_lines};
use crate::engine::Engine;
use crate::engine::queue::{Event, FinishReason, Job};
use crate::engine::sampler::SamplingParams;
use crate::engine::scheduler::Peer;
use crate::text::TokenId;

/// Continue prompts; JSON lines in and out.
///
/// stdin:  {"prompt": "text"} or {"ids": [1, 2]}, one object a line
/// stdout: {"prompt_ids": [...], "ids": [...], "text": "...", "logits_hash": "16 hex digits", "finish_reason": "stop"}
///         or {"error": {"line", "message"}}; logits_hash is xxh3-64 over the little-endian f32 logits of every generated step
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Positions a sequence
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Seed of the draw where the temperature is above 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Run N copies of each prompt in one batch; fail if they differ
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Rows of a prompt in one step
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_ROWS)]
    prefill_chunk: usize,
    /// Go on past end-of-generation tokens
    #[arg(long)]
    ignore_eos: bool,
}

#[derive(Deserialize)]
struct Request {
    prompt: Option<String>,
    ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Answer {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: String,
    logits_hash: String,
    finish_reason: &'static str,
}

/// One finished copy.
#[derive(Debug, Default, PartialEq, Clone)]
struct Outcome {
    ids: Vec<TokenId>,
    hash: Option<u64>,
    reason: Option<FinishReason>,
}

/// Runs the tool on stdin and stdout.
///
/// # Errors
/// The model does not load, a flag is out of range, or a line could not be answered.
pub fn run(args: &GenerateArgs) -> Result<(), ToolError> {
    super::check_flag("batch", args.batch, 1, MAX_SEQUENCES)?;
    super::check_flag("prefill-chunk", args.prefill_chunk, 1, DEFAULT_CONTEXT * 16)?;
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(ToolError::Usage(format!("--temperature is {}, must be finite and at least 0", args.temperature)));
    }
    let wanted = Wanted {
        ctx: args.ctx,
        sequences: args.batch,
        max_rows: args.prefill_chunk.max(args.batch),
        max_outputs: args.batch,
        prefix: 0,
        grammars: 0,
    };
    with_model(&args.model, wanted, |session| {
        let Session { model, vocab, kernels, workers, capacity, .. } = session;
        workers.pin_caller();
        let mut engine = Engine::new(model, kernels, workers, capacity, args.prefill_chunk, vocab.eog_ids().to_vec());
        answer_lines(|request: Request| {
            let prompt = super::prompt_ids(vocab, request.prompt, request.ids)?;
            let outcome = generate(&mut engine, &prompt, args)?;
            Ok(Answer {
                prompt_ids: prompt.iter().map(|token| token.0).collect(),
                text: super::detokenize(vocab, &outcome.ids),
                ids: outcome.ids.iter().map(|token| token.0).collect(),
                logits_hash: format!("{:016x}", outcome.hash.unwrap_or_default()),
                finish_reason: match outcome.reason {
                    Some(FinishReason::Stop) => "stop",
                    _ => "length",
                },
            })
        })
    })
}

/// Runs `args.batch` copies together.
fn generate(engine: &mut Engine<'_>, prompt: &[TokenId], args: &GenerateArgs) -> Result<Outcome, LineError> {
    let mut outcomes = vec![Outcome::default(); args.batch];
    for id in 0..args.batch {
        let job = Job {
            id: id as u64,
            prompt: prompt.to_vec(),
            sampling: SamplingParams { temperature: args.temperature, seed: args.seed, ..SamplingParams::default() },
            max_tokens: args.max_tokens,
            ignore_eos: args.ignore_eos,
            logits_hash: true,
            cancel: Arc::new(AtomicBool::new(false)),
            embed: None,
            mask: None,
            peer: Peer::default(),
            logprobs: None,
        };
        // A bad prompt is refused at the first copy, so no other copy is left behind in the engine.
        engine.admit(Box::new(job)).map_err(|refused| LineError(refused.to_string()))?;
    }
    while !engine.is_idle() {
        engine.step(&mut |event| match event {
            Event::Begun { .. } => {}
            Event::Token { id, token, .. } => outcomes[id as usize].ids.push(token),
            Event::Finished { job, reason, logits_hash, .. } => {
                let outcome = &mut outcomes[job.id as usize];
                outcome.reason = Some(reason);
                outcome.hash = logits_hash;
            }
        });
    }
    let first = outcomes[0].clone();
    if let Some(copy) = outcomes.iter().position(|outcome| *outcome != first) {
        return Err(LineError(format!("copy {copy} of {} differs from copy 0: this must never happen", args.batch)));
    }
    if first.reason == Some(FinishReason::NonFinite) {
        return Err(LineError("the logits are not finite: the model is damaged".into()));
    }
    Ok(first)
}
