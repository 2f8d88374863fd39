//! One answer: the logits of small random models in every weight format, hashed, equal to the recorded golden for every kernel
//! set of this CPU × threads × batch × prefill chunk. The same goldens hold on x86-64 and on every emulated Arm core.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::queue::{Event, Job};
use hearth::engine::sampler::SamplingParams;
use hearth::engine::scheduler::Peer;
use hearth::model::reference;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use tiny::{SHAPE, Shape};

/// (format, logits hash of 8 greedy steps after a prompt of 150 tokens)
const GOLDENS: [(&str, u64); 11] = [
    ("F32", 0xfa83_49dd_1d24_40f2),
    ("F16", 0xb70d_c9f0_5d6a_7c4f),
    ("BF16", 0xd756_2cc3_968f_8cb2),
    ("Q4_0", 0xcb70_d34b_5598_6c4a),
    ("Q4_1", 0x80f5_87a0_46e5_1ffd),
    ("Q5_0", 0x7190_464a_6884_b724),
    ("Q5_1", 0x8459_46bd_3fb6_d4ac),
    ("Q8_0", 0xcbfe_c004_7f72_9db7),
    ("Q4_K", 0xb1e6_5625_495f_8f01),
    ("Q5_K", 0x2541_feb9_a195_133c),
    ("Q6_K", 0xb008_477b_83b4_ae1e),
];

const PROMPT_TOKENS: u32 = 150;
const GENERATED: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Settings {
    kernels: Kernels,
    threads: usize,
    batch: usize,
    prefill_chunk: usize,
}

fn job(id: u64, prompt: Vec<TokenId>, sampling: SamplingParams) -> Box<Job> {
    let cancel = Arc::new(AtomicBool::new(false));
    Box::new(Job {
        id,
        prompt,
        sampling,
        max_tokens: GENERATED,
        ignore_eos: true,
        logits_hash: true,
        cancel,
        embed: None,
        mask: None,
        peer: Peer::default(),
        logprobs: None,
    })
}

fn prompt(seed: u32) -> Vec<TokenId> {
    (0..PROMPT_TOKENS).map(|i| TokenId((i * 37 + i * i * seed) % SHAPE.n_vocab as u32)).collect()
}

/// Hash and tokens of the golden prompt, run beside `batch - 1` other prompts.
fn run(file: &[u8], settings: Settings, sampling: &SamplingParams) -> (u64, Vec<TokenId>) {
    let Settings { kernels, threads, batch, prefill_chunk } = settings;
    tiny::with_model(file, threads, |model, workers| {
        let max_rows = prefill_chunk.max(batch);
        let capacity =
            Capacity { ctx: 256, sequences: batch, max_rows, max_outputs: batch, threads, ..Capacity::default() };
        let mut engine = Engine::new(model, kernels, workers, capacity, prefill_chunk, vec![]);
        // Neighbours come first, with other lengths, so that the golden's rows lie in the middle of every step.
        for id in 1..batch as u64 {
            let mut other = prompt(id as u32 + 1);
            other.truncate(20 * id as usize);
            engine.admit(job(id, other, SamplingParams::default())).unwrap();
        }
        engine.admit(job(0, prompt(1), sampling.clone())).unwrap();
        let (mut hash, mut tokens) = (None, vec![]);
        while !engine.is_idle() {
            engine.step(&mut |event| match event {
                Event::Token { id: 0, token, logits_hash, .. } => {
                    tokens.push(token);
                    hash = logits_hash;
                }
                Event::Finished { job, logits_hash, .. } if job.id == 0 => {
                    assert_eq!(hash, logits_hash, "the last token's hash is the answer's");
                }
                _ => (),
            });
        }
        (hash.unwrap(), tokens)
    })
}

#[test]
fn every_format_gives_its_golden_logits_hash_on_every_kernel_set() {
    let mut wrong = vec![];
    for (format, golden) in GOLDENS {
        let file = tiny::model(tiny::shape_for(format), format, 7);
        for kernels in Kernels::supported() {
            let settings = Settings { kernels, threads: 1, batch: 1, prefill_chunk: 64 };
            let (hash, _) = run(&file, settings, &SamplingParams::default());
            if hash != golden {
                wrong.push(format!("(\"{format}\", 0x{hash:016x}), // {}", kernels.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "found:\n{}", wrong.join("\n"));
}

#[test]
fn threads_batch_and_prefill_chunk_never_change_a_bit() {
    let file = tiny::model(SHAPE, "Q4_1", 7);
    let golden = GOLDENS.iter().find(|golden| golden.0 == "Q4_1").unwrap().1;
    for kernels in Kernels::supported() {
        for threads in [1, 2] {
            for batch in [1, 3] {
                for prefill_chunk in [1, 7, 64, 150] {
                    let settings = Settings { kernels, threads, batch, prefill_chunk };
                    let (hash, _) = run(&file, settings, &SamplingParams::default());
                    assert_eq!(hash, golden, "{settings:?}");
                }
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_text_in_any_company() {
    let file = tiny::model(Shape { tied: false, ..SHAPE }, "Q8_0", 3);
    let hot = |seed| SamplingParams { temperature: 1.5, top_p: 0.95, seed, ..SamplingParams::default() };
    let alone = Settings { kernels: Kernels::detect(), threads: 1, batch: 1, prefill_chunk: 150 };
    let company = Settings { threads: 2, batch: 3, prefill_chunk: 7, ..alone };
    for seed in 0..4 {
        assert_eq!(run(&file, alone, &hot(seed)), run(&file, company, &hot(seed)));
    }
    let texts: std::collections::BTreeSet<_> = (0..8).map(|seed| run(&file, alone, &hot(seed)).1).collect();
    assert!(texts.len() > 1, "the seed has an effect");
}

#[test]
fn the_numeric_model_stays_close_to_plain_f32() {
    for (format, _) in GOLDENS {
        let file = tiny::model(tiny::shape_for(format), format, 11);
        tiny::with_model(&file, 1, |model, mut workers| {
            let tokens = prompt(1);
            let n_vocab = model.hyper.n_vocab;
            let exact = reference::logits(model, &tokens);
            let mut cache = hearth::model::kv::KvCache::new(&model.hyper, 3);
            let mut table = [hearth::model::kv::BlockTable::with_capacity(150)];
            assert!(cache.reserve(&mut table[0], 150));
            let mut scratch = hearth::model::scratch::Scratch::new(&model.hyper, 150, 150, 150, 1);
            let rows: Vec<_> = tokens
                .iter()
                .enumerate()
                .map(|(position, &token)| hearth::model::forward::BatchRow {
                    token,
                    sequence: 0,
                    position,
                    logits: true,
                })
                .collect();
            hearth::model::forward::forward(
                model,
                Kernels::detect(),
                &mut cache,
                &table,
                &rows,
                &mut scratch,
                &mut workers,
            );
            let mut row = vec![0.0; n_vocab];
            let (mut error, mut power) = (0.0, 0.0);
            for (position, exact) in exact.chunks_exact(n_vocab).enumerate() {
                scratch.copy_logits(position, &mut row);
                for (a, b) in row.iter().zip(exact) {
                    error += f64::from(a - b).powi(2);
                    power += f64::from(*b).powi(2);
                }
            }
            // Activations in 8 bits cost about half a percent a product; dense formats round nothing but keys and values.
            let relative = (error / power).sqrt();
            let bound = if format.starts_with('Q') { 0.05 } else { 0.002 };
            assert!(relative < bound, "{format}: relative error {relative}");
        });
    }
}
