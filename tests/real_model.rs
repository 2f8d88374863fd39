//! SmolLM2-135M against llama.cpp computing in F32 (tests/data): last-position logits, greedy text, and one logits hash for every
//! kernel set × threads × batch × prefill chunk.
#![allow(clippy::unwrap_used)]

#[path = "common/models.rs"]
mod models;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::queue::{Event, Job};
use hearth::engine::sampler::SamplingParams;
use hearth::engine::scheduler::Peer;
use hearth::model::forward::{BatchRow, forward};
use hearth::model::gguf::Gguf;
use hearth::model::kv::{BlockTable, KvCache};
use hearth::model::scratch::Scratch;
use hearth::model::weights::WeightLayout;
use hearth::model::{Model, arch};
use hearth::sys::map::{Mapping, Region};
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use serde_json::Value;

/// xxh3-64 over the logits of 4 greedy steps after "The capital of France is".
const GOLDEN: u64 = 0xf742_af74_552d_7e7e;
/// Below this lead of the best token over the second, F32 itself is a close call (nats).
const MARGIN: f64 = 0.5;
/// Kullback-Leibler divergence from F32 that each prompt may have (nats).
const MAX_KL: f64 = 0.012;

fn with_smollm2<R>(use_model: impl FnOnce(&Model<'_>) -> R) -> R {
    let mapping = Mapping::open(&models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf")).unwrap();
    let gguf = Gguf::parse(mapping.bytes()).unwrap();
    let hyper = arch::hyper(&gguf).unwrap();
    let layout = WeightLayout::new(&gguf, &hyper).unwrap();
    let mut region = Region::new(layout.region_bytes()).unwrap();
    let mut workers = Workers::new(2).unwrap();
    let model = Model::load(&gguf, hyper, &layout, &mut region, &mut workers, |_| ()).unwrap();
    drop(workers);
    use_model(&model)
}

fn rows(name: &str) -> Vec<Value> {
    let path = format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| TokenId(u32::try_from(id.as_u64().unwrap()).unwrap())).collect()
}

/// Who computes a step, and how its rows are cut.
#[derive(Clone, Copy, Debug)]
struct Settings {
    kernels: Kernels,
    threads: usize,
    batch: usize,
    prefill_chunk: usize,
}

/// Greedy continuation by `batch` copies in one batch, which must agree; tokens and hash.
fn greedy(model: &Model<'_>, settings: Settings, prompt: &[TokenId], max_tokens: usize) -> (Vec<TokenId>, u64) {
    let Settings { kernels, threads, batch, prefill_chunk } = settings;
    let workers = Workers::new(threads).unwrap();
    let max_rows = prefill_chunk.max(batch);
    let capacity =
        Capacity { ctx: 512, sequences: batch, max_rows, max_outputs: batch, threads, ..Capacity::default() };
    let mut engine = Engine::new(model, kernels, workers, capacity, prefill_chunk, vec![]);
    for id in 0..batch as u64 {
        let cancel = Arc::new(AtomicBool::new(false));
        let sampling = SamplingParams::default();
        let job = Job {
            id,
            prompt: prompt.to_vec(),
            sampling,
            max_tokens,
            ignore_eos: true,
            logits_hash: true,
            cancel,
            embed: None,
            mask: None,
            peer: Peer::default(),
            logprobs: None,
        };
        engine.admit(Box::new(job)).unwrap();
    }
    let mut tokens = vec![vec![]; batch];
    let mut hashes = vec![0; batch];
    while !engine.is_idle() {
        engine.step(&mut |event| match event {
            Event::Begun { .. } => {}
            Event::Token { id, token, .. } => tokens[id as usize].push(token),
            Event::Finished { job, logits_hash, .. } => hashes[job.id as usize] = logits_hash.unwrap(),
        });
    }
    assert!(hashes.iter().all(|&hash| hash == hashes[0]) && tokens.iter().all(|copy| *copy == tokens[0]));
    (tokens.swap_remove(0), hashes[0])
}

#[test]
fn one_logits_hash_over_kernels_threads_batches_and_prefill_chunks() {
    let prompt = ids(&rows("greedy_smollm2_f32.jsonl")[0]["prompt_ids"]);
    // Two KV blocks and a bit, through every path of the matrix kernels.
    let long: Vec<TokenId> = prompt.iter().cycle().take(130).copied().collect();
    with_smollm2(|model| {
        let mut long_hash = None;
        for kernels in Kernels::supported() {
            for threads in [1, 2] {
                for batch in [1, 3] {
                    for prefill_chunk in [1, 7, 64, 512] {
                        // The specification is slow: here it meets every setting once, in tests/decode_goldens.rs all of them.
                        if kernels.name() == "scalar" && batch == 3 && (threads, prefill_chunk) != (2, 512) {
                            continue;
                        }
                        let settings = Settings { kernels, threads, batch, prefill_chunk };
                        let (_, hash) = greedy(model, settings, &prompt, 4);
                        assert_eq!(format!("{hash:016x}"), format!("{GOLDEN:016x}"), "{settings:?}");
                        if kernels.name() != "scalar" {
                            let (_, hash) = greedy(model, settings, &long, 4);
                            assert_eq!(*long_hash.get_or_insert(hash), hash, "130 tokens, {settings:?}");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn last_position_logits_are_as_close_to_f32_as_llama_cpp_is() {
    let (mut ours, mut natives) = (vec![], vec![]);
    with_smollm2(|model| {
        let mut workers = Workers::new(2).unwrap();
        for row in rows("logits_smollm2.jsonl") {
            let tokens = ids(&row["ids"]);
            let n = tokens.len();
            let mut cache = KvCache::new(&model.hyper, n.div_ceil(64));
            let mut table = [BlockTable::with_capacity(n)];
            assert!(cache.reserve(&mut table[0], n));
            let mut scratch = Scratch::new(&model.hyper, n, n, 1, 2);
            let batch: Vec<BatchRow> = (0..n)
                .map(|position| BatchRow { token: tokens[position], sequence: 0, position, logits: position + 1 == n })
                .collect();
            forward(model, Kernels::detect(), &mut cache, &table, &batch, &mut scratch, &mut workers);
            let mut logits = vec![0.0; model.hyper.n_vocab];
            scratch.copy_logits(0, &mut logits);
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            let top = row["top50_f32"].as_array().unwrap();
            assert_eq!(best as u64, top[0][0].as_u64().unwrap(), "top 1 of {}", row["prompt"]);
            ours.push(kl_of_top(top, row["logsumexp_f32"].as_f64().unwrap(), &logits));
            natives.push(row["kl_f32_native"].as_f64().unwrap());
        }
    });
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    println!(
        "KL to F32: ours {ours:.5?} mean {:.5}, llama.cpp native {natives:.5?} mean {:.5}",
        mean(&ours),
        mean(&natives)
    );
    assert!(ours.iter().all(|&kl| kl <= MAX_KL), "{ours:?}");
    assert!(mean(&ours) <= mean(&natives), "{ours:?} against {natives:?}");
}

/// KL divergence of F32 from ours, over the top 50 and everything else as one more outcome: a lower bound of the full one that
/// misses only differences within the tail.
fn kl_of_top(top: &[Value], logsumexp: f64, logits: &[f32]) -> f64 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let ours_logsumexp = f64::from(largest) + sum.ln();
    let (mut kl, mut p_rest, mut q_rest) = (0.0, 1.0, 1.0);
    for entry in top {
        let id = usize::try_from(entry[0].as_u64().unwrap()).unwrap();
        let (log_p, log_q) = (entry[1].as_f64().unwrap() - logsumexp, f64::from(logits[id]) - ours_logsumexp);
        kl += log_p.exp() * (log_p - log_q);
        p_rest -= log_p.exp();
        q_rest -= log_q.exp();
    }
    kl + p_rest * (p_rest / q_rest).ln()
}

#[test]
fn greedy_text_is_that_of_f32_up_to_the_first_close_call() {
    let settings = Settings { kernels: Kernels::detect(), threads: 2, batch: 1, prefill_chunk: 128 };
    let mut compared = 0;
    with_smollm2(|model| {
        for row in rows("greedy_smollm2_f32.jsonl") {
            let (prompt, wanted) = (ids(&row["prompt_ids"]), ids(&row["ids"]));
            let margin = |i: usize| row["logprobs"][i].as_f64().unwrap() - row["second_logprobs"][i].as_f64().unwrap();
            let sure = (0..wanted.len()).take_while(|&i| margin(i) > MARGIN).count();
            let (tokens, _) = greedy(model, settings, &prompt, sure.max(1));
            assert_eq!(tokens[..sure], wanted[..sure], "{}", row["prompt"]);
            compared += sure;
        }
    });
    println!("{compared} greedy tokens are those of F32");
    assert!(compared > 20, "only {compared} tokens were compared");
}
