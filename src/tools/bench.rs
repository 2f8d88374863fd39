//! `hearth bench`: prefill and decode speed of one model on this machine, as one JSON object.
//! Measured like llama-bench: a prompt of N tokens from an empty context, and N tokens generated from an empty context, with
//! `--depth` also from a filled one. What decode reads a second is set beside the most that loads alone reach.
//! Next on the data's way: `engine`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hearth_kernels::{KV_BLOCK, kv_block_len};
use serde::Serialize;

use super::ToolError;
use super::roofline::Roofline;
use super::session::{DEFAULT_MAX_ROWS, MAX_SEQUENCES, ModelArgs, Session, Wanted, with_model};
use crate::engine::Engine;
use crate::engine::queue::{Event, Job};
use crate::engine::sampler::SamplingParams;
use crate::engine::scheduler::Peer;
use crate::model::Model;
use crate::model::hyper::{Hyper, MAX_CONTEXT};
use crate::sys::cpu;
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
    /// Decode again with so many positions in the context, whose prefill is not timed (one sequence); 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: usize,
    /// Sequences decoded together
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Runs of each; the fastest counts
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Passes over the weights in each run and for each way of reading that tell the memory's bandwidth; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 2)]
    reads: usize,
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
    /// Bytes of weights, keys and values read a second while decoding, in 10^9.
    decode_gb_s: f64,
    /// The most that loads of the same weights by the same threads reach in this run, in 10^9 bytes a second: decode's roofline.
    read_gb_s: Option<f64>,
    /// The way of reading that reached it.
    read_plan: Option<String>,
    /// `decode_gb_s` as a share of `read_gb_s`.
    decode_share: Option<f64>,
    /// What decode speed is `depth_decode_tok_s` for.
    depth: usize,
    /// Generated tokens a second from `depth` positions on.
    depth_decode_tok_s: Option<f64>,
    /// As `decode_gb_s`, from `depth` positions on.
    depth_decode_gb_s: Option<f64>,
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
/// Tokens of the run that is hashed.
const HASHED_TOKENS: usize = 32;

/// Runs the tool. `started`: when the process began.
///
/// # Errors
/// The model does not load or a flag is out of range.
pub fn run(args: &BenchArgs, started: Instant) -> Result<(), ToolError> {
    super::check_flag("batch", args.batch, 1, if args.depth > 0 { 1 } else { MAX_SEQUENCES })?;
    super::check_flag("repeat", args.repeat, 1, 1000)?;
    super::check_flag("reads", args.reads, 0, 1000)?;
    super::check_flag("prompt", args.prompt, 1, MAX_CONTEXT)?;
    super::check_flag("gen", args.generate, 1, MAX_CONTEXT)?;
    super::check_flag("depth", args.depth, 0, MAX_CONTEXT)?;
    let ctx = (args.prompt + 1).max(args.depth + args.generate + 1).max(FIRST_TOKEN_PROMPT + 1);
    let wanted = Wanted {
        ctx: Some(ctx),
        sequences: args.batch,
        max_rows: DEFAULT_MAX_ROWS,
        max_outputs: args.batch,
        prefix: 0,
        grammars: 0,
    };
    let result = with_model(&args.model, wanted, |session| measure(args, session, started))?;
    if args.json {
        return super::print_json(&result);
    }
    let of = result.read_gb_s.map_or(String::new(), |read| format!(" of {read:.1}"));
    let deep = result.depth_decode_tok_s.map_or(String::new(), |speed| {
        let (depth, fall) = (result.depth, 100.0 * (1.0 - speed / result.decode_tok_s));
        format!(", {speed:.1} tok/s from {depth} positions on ({fall:.0} % less)")
    });
    super::print_line(&format!(
        "{} threads, {}: prefill {:.1} tok/s, decode {:.1} tok/s ({:.1}{of} GB/s){deep}, first token after {:.0} ms, {:.1} MiB anonymous",
        result.threads,
        result.kernel_set,
        result.prefill_tok_s,
        result.decode_tok_s,
        result.decode_gb_s,
        result.first_token_ms,
        result.anon_bytes as f64 / 1_048_576.0,
    ))
}

fn measure(args: &BenchArgs, session: Session<'_>, started: Instant) -> Result<Bench, ToolError> {
    let Session { model, vocab, kernels, workers, capacity, plan, bytes_per_token, .. } = session;
    let (threads, generate) = (workers.threads(), args.generate);
    workers.pin_caller();
    let mut engine = Engine::new(model, kernels, workers, capacity, capacity.max_rows, vocab.eog_ids().to_vec());
    // As `serve` does it: the kernel's large pages come by this.
    engine.touch();
    let engine = &mut engine;
    run_jobs(engine, model, Run { prompt: FIRST_TOKEN_PROMPT, max_tokens: 1, ..Run::default() })?;
    let first_token = started.elapsed();
    let (mut prefill, mut decode, mut deep) = (Duration::MAX, Duration::MAX, Duration::MAX);
    let mut roofline = Roofline::new(model, usize::MAX);
    let empty = Run { batch: args.batch, max_tokens: generate, ..Run::default() };
    for _ in 0..args.repeat {
        prefill = prefill.min(run_jobs(engine, model, Run { prompt: args.prompt, ..Run::default() })?.0);
        decode = decode.min(run_jobs(engine, model, empty)?.0);
        if args.depth > 0 {
            // The prefill gives the first token; the others are timed.
            let run = Run { prompt: args.depth, max_tokens: generate + 1, from_first_token: true, ..Run::default() };
            deep = deep.min(run_jobs(engine, model, run)?.0);
        }
        // Beside each run, because what else the machine does changes with time.
        roofline.measure(args.reads, kernels, engine.workers());
    }
    // Hashing costs time, so the hash comes from a run of its own.
    let hashed = Run { max_tokens: generate.min(HASHED_TOKENS), hash: true, ..empty };
    let hash = run_jobs(engine, model, hashed)?.1.unwrap_or_default();
    let memory = cpu::resident_memory();
    let gb_s = |time: Duration, batch: usize, depth: usize| {
        // A step reads the weights once, and every sequence's positions, its own included.
        let positions = generate * depth + generate * (generate + 1) / 2;
        let bytes = generate * bytes_per_token + batch * positions * kv_bytes_per_position(&model.hyper);
        bytes as f64 / time.as_secs_f64() / 1e9
    };
    let decode_gb_s = gb_s(decode, args.batch, 0);
    let deep_figure = |figure: f64| (args.depth > 0).then_some(figure);
    let read_gb_s = roofline.gb_s();
    Ok(Bench {
        prefill_tok_s: args.prompt as f64 / prefill.as_secs_f64(),
        decode_tok_s: (generate * args.batch) as f64 / decode.as_secs_f64(),
        decode_gb_s,
        read_gb_s,
        read_plan: roofline.plan().map(|plan| plan.to_string()),
        decode_share: read_gb_s.map(|read| decode_gb_s / read),
        depth: args.depth,
        depth_decode_tok_s: deep_figure(generate as f64 / deep.as_secs_f64()),
        depth_decode_gb_s: deep_figure(gb_s(deep, 1, args.depth)),
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
}

/// Bytes of keys and values that one position adds to what a step reads.
fn kv_bytes_per_position(hyper: &Hyper) -> usize {
    hyper.n_layer * hyper.n_head_kv * kv_block_len(hyper.head_dim) / KV_BLOCK * size_of::<u16>()
}

/// What [`run_jobs`] runs.
#[derive(Clone, Copy)]
struct Run {
    /// Jobs together.
    batch: usize,
    /// Tokens of each one's prompt.
    prompt: usize,
    max_tokens: usize,
    /// Hash the first job's logits.
    hash: bool,
    /// Time what follows the first token alone.
    from_first_token: bool,
}

impl Default for Run {
    fn default() -> Self {
        Self { batch: 1, prompt: 1, max_tokens: 0, hash: false, from_first_token: false }
    }
}

/// Runs jobs to their ends; the time they took and the first one's hash.
fn run_jobs(engine: &mut Engine<'_>, model: &Model<'_>, run: Run) -> Result<(Duration, Option<u64>), ToolError> {
    let n_vocab = u32::try_from(model.hyper.n_vocab).unwrap_or(u32::MAX);
    let mut hash = None;
    let mut begun = Instant::now();
    for id in 0..run.batch as u64 {
        let job = Job {
            id,
            // Tokens spread over the vocabulary, the same for everybody.
            prompt: (0u32..)
                .take(run.prompt)
                .map(|i| TokenId(i.wrapping_mul(7919).wrapping_add(1) % n_vocab))
                .collect(),
            sampling: SamplingParams::default(),
            max_tokens: run.max_tokens,
            ignore_eos: true,
            logits_hash: run.hash,
            cancel: Arc::new(AtomicBool::new(false)),
            embed: None,
            mask: None,
            peer: Peer::default(),
            logprobs: None,
        };
        engine.admit(Box::new(job)).map_err(|refused| ToolError::Usage(refused.to_string()))?;
    }
    let mut is_first_token = run.from_first_token;
    while !engine.is_idle() {
        engine.step(&mut |event| match event {
            Event::Token { .. } if is_first_token => {
                is_first_token = false;
                begun = Instant::now();
            }
            Event::Finished { job, logits_hash, .. } if job.id == 0 => hash = logits_hash,
            _ => {}
        });
    }
    Ok((begun.elapsed(), hash))
}
