//! `hearth bench`: prefill and decode speed of one model on this machine, as one JSON object.
//! Measured like llama-bench: a prompt of N tokens from an empty context, and N tokens generated from an empty context.
//! Next on the data's way: `engine`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::ToolError;
use super::session::{DEFAULT_MAX_ROWS, MAX_SEQUENCES, ModelArgs, Session, Wanted, with_model};
use crate::engine::Engine;
use crate::engine::queue::{Event, Job};
use crate::engine::sampler::SamplingParams;
use crate::model::Model;
use crate::sys::cpu;
use crate::sys::workers::Workers;
use crate::text::TokenId;

/// Speed of prefill and decode.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt tokens of the prefill run
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens of the decode run
    #[arg(long = "gen", value_name = "N", default_value_t = 128)]
    generate: usize,
    /// Sequences decoded together
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Runs of each; the fastest counts
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The result.
#[derive(Debug, Serialize)]
struct Bench {
    /// Prompt tokens a second.
    prefill_tok_s: f64,
    /// Generated tokens a second, all sequences together.
    decode_tok_s: f64,
    /// Weight bytes streamed a second while decoding, in 10^9 bytes.
    decode_gb_s: f64,
    /// What plain loads of the same weights by the same threads reach in this run, in 10^9 bytes a second: the roofline of decode.
    read_gb_s: f64,
    /// From process start to the first token of a 20-token prompt, in milliseconds.
    first_token_ms: f64,
    /// Peak resident memory, file pages included.
    peak_rss_bytes: u64,
    /// Anonymous memory at the end, when every buffer has been used.
    anon_bytes: u64,
    /// The memory plan's total.
    planned_bytes: u64,
    kernel_set: &'static str,
    threads: usize,
    batch: usize,
    cpu: String,
    /// xxh3-64 over the decode run's logits, 16 hex digits.
    logits_hash: String,
}

/// Prompt of the first-token measurement, in tokens.
const FIRST_TOKEN_PROMPT: usize = 20;

/// Runs the tool. `started`: when the process began.
///
/// # Errors
/// The model does not load or a flag is out of range.
pub fn run(args: &BenchArgs, started: Instant) -> Result<(), ToolError> {
    super::check_flag("batch", args.batch, 1, MAX_SEQUENCES)?;
    super::check_flag("repeat", args.repeat, 1, 1000)?;
    super::check_flag("prompt", args.prompt, 1, crate::model::hyper::MAX_CONTEXT)?;
    super::check_flag("gen", args.generate, 1, crate::model::hyper::MAX_CONTEXT)?;
    let ctx = (args.prompt + 1).max(args.generate + 1).max(FIRST_TOKEN_PROMPT + 1);
    let wanted = Wanted { ctx: Some(ctx), sequences: args.batch, max_rows: DEFAULT_MAX_ROWS, max_outputs: args.batch };
    let result = with_model(&args.model, wanted, |session| -> Result<Bench, ToolError> {
        let Session { model, vocab, kernels, workers, capacity, plan, bytes_per_token, .. } = session;
        let (n_vocab, threads) = (model.hyper.n_vocab, workers.threads());
        workers.pin_caller();
        let mut engine = Engine::new(model, kernels, workers, capacity, capacity.max_rows, vocab.eog_ids().to_vec());
        run_jobs(&mut engine, 1, FIRST_TOKEN_PROMPT, 1, n_vocab, false)?;
        let first_token = started.elapsed();
        let (mut prefill, mut decode, mut hash) = (Duration::MAX, Duration::MAX, 0);
        for _ in 0..args.repeat {
            prefill = prefill.min(run_jobs(&mut engine, 1, args.prompt, 0, n_vocab, false)?.0);
            decode = decode.min(run_jobs(&mut engine, args.batch, 1, args.generate, n_vocab, false)?.0);
        }
        // Hashing costs time, so the hash comes from a run of its own.
        hash = run_jobs(&mut engine, args.batch, 1, args.generate.min(HASHED_TOKENS), n_vocab, true)?.1.unwrap_or(hash);
        let memory = cpu::resident_memory();
        // Last: it brings a mapped model into memory, which the first token must pay for.
        let read_gb_s = read_gb_s(model, &mut engine.into_workers());
        let steps_s = args.generate as f64 / decode.as_secs_f64();
        Ok(Bench {
            prefill_tok_s: args.prompt as f64 / prefill.as_secs_f64(),
            decode_tok_s: steps_s * args.batch as f64,
            decode_gb_s: steps_s * bytes_per_token as f64 / 1e9,
            read_gb_s,
            first_token_ms: first_token.as_secs_f64() * 1e3,
            peak_rss_bytes: memory.peak_rss_bytes,
            anon_bytes: memory.anon_bytes,
            planned_bytes: plan.total_bytes,
            kernel_set: kernels.name(),
            threads,
            batch: args.batch,
            cpu: cpu::cpu_name(),
            logits_hash: format!("{hash:016x}"),
        })
    })?;
    if args.json {
        return super::print_json(&result);
    }
    super::print_line(&format!(
        "{} threads, {}: prefill {:.1} tok/s, decode {:.1} tok/s ({:.1} of {:.1} GB/s), first token after {:.0} ms, {:.1} MiB anonymous",
        result.threads,
        result.kernel_set,
        result.prefill_tok_s,
        result.decode_tok_s,
        result.decode_gb_s,
        result.read_gb_s,
        result.first_token_ms,
        result.anon_bytes as f64 / 1_048_576.0,
    ))
}

/// Bytes that one thread reads at a time when the roofline is measured.
const READ_PIECE_BYTES: usize = 64 * 1024;
/// Passes over the weights when the roofline is measured; the fastest counts, as for the rest.
const READ_PASSES: usize = 5;

/// How fast the workers read the model's matrices when they do nothing else, in 10^9 bytes a second.
fn read_gb_s(model: &Model<'_>, workers: &mut Workers) -> f64 {
    let weights = &model.weights;
    let layers = weights.layers.iter().flat_map(|layer| {
        let [q, k, v] = &layer.qkv;
        [q, k, v, &layer.attn_output, &layer.gate, &layer.up, &layer.down]
    });
    let matrices = layers.chain([&weights.output]);
    let pieces: Vec<&[u8]> = matrices.flat_map(|matrix| matrix.tiles().chunks(READ_PIECE_BYTES)).collect();
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    let (mut sums, mut idle) = (vec![0u64; pieces.len()], vec![(); workers.threads()]);
    let mut fastest = Duration::MAX;
    for _ in 0..READ_PASSES {
        let begun = Instant::now();
        workers.chunks(
            &mut idle,
            &mut sums,
            1,
            |_, _| (),
            |()| (),
            |(), piece, sum| {
                let words = pieces[piece].as_chunks::<8>().0;
                // Several sums, or the chain of additions would be what is measured.
                let mut lanes = [0u64; 32];
                for words in words.chunks(lanes.len()) {
                    for (lane, word) in lanes.iter_mut().zip(words) {
                        *lane = lane.wrapping_add(u64::from_le_bytes(*word));
                    }
                }
                sum[0] = lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane));
            },
        );
        fastest = fastest.min(begun.elapsed());
    }
    // The sums are needed, or the reads would not be.
    std::hint::black_box(&sums);
    bytes as f64 / fastest.as_secs_f64() / 1e9
}

/// Tokens of the run that is hashed.
const HASHED_TOKENS: usize = 32;

/// Runs `batch` jobs of `prompt` tokens to `max_tokens` tokens each; the time they took and the first one's hash.
fn run_jobs(
    engine: &mut Engine<'_>,
    batch: usize,
    prompt: usize,
    max_tokens: usize,
    n_vocab: usize,
    logits_hash: bool,
) -> Result<(Duration, Option<u64>), ToolError> {
    let mut hash = None;
    let begun = Instant::now();
    for id in 0..batch as u64 {
        let job = Job {
            id,
            // Tokens spread over the vocabulary, the same for everybody.
            prompt: (0u32..)
                .take(prompt)
                .map(|i| TokenId((i.wrapping_mul(7919).wrapping_add(1)) % u32::try_from(n_vocab).unwrap_or(u32::MAX)))
                .collect(),
            sampling: SamplingParams::default(),
            max_tokens,
            ignore_eos: true,
            logits_hash,
            cancel: Arc::new(AtomicBool::new(false)),
        };
        engine.admit(Box::new(job)).map_err(|refused| ToolError::Usage(refused.to_string()))?;
    }
    while !engine.is_idle() {
        engine.step(&mut |event| {
            if let Event::Finished { job, logits_hash, .. } = event
                && job.id == 0
            {
                hash = logits_hash;
            }
        });
    }
    Ok((begun.elapsed(), hash))
}
