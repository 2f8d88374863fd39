//! Embeddings in the engine: the same bits whatever computes them, in whatever pieces and company, and the cache neither helps nor harms.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::embed::{Embed, Pooling};
use hearth::engine::queue::{Event, FinishReason, Job};
use hearth::model::{Model, reference};
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use tiny::SHAPE;
use xxhash_rust::xxh3::xxh3_64;

const POOLINGS: [Pooling; 3] = [Pooling::Mean, Pooling::Last, Pooling::Cls];
/// xxh3-64 over the three vectors of the prompt of 150 tokens, little-endian; recorded on x86-64.
const GOLDEN: u64 = 0xd60e_56e9_150b_d93f;

fn with_model(test: impl Fn(&Model<'_>)) {
    tiny::with_model(&tiny::model(SHAPE, "Q4_1", 7), 1, |model, _| test(model));
}

fn engine<'m>(model: &'m Model<'m>, kernels: Kernels, threads: usize, chunk: usize) -> Engine<'m> {
    let sizes = Capacity { ctx: 256, sequences: 4, max_rows: 64, max_outputs: 4, ..Capacity::default() };
    let capacity = Capacity { threads, ..sizes };
    Engine::new(model, kernels, Workers::new(threads).unwrap(), capacity, chunk, vec![]).sharing_prefixes()
}

fn prompt(tokens: usize) -> Vec<TokenId> {
    (0..tokens).map(|i| TokenId(((i * 31 + 5) % SHAPE.n_vocab) as u32)).collect()
}

fn job(id: u64, tokens: usize, pooling: Option<Pooling>) -> Box<Job> {
    let embed = pooling.map(|pooling| Box::new(Embed::new(pooling, SHAPE.n_embd)));
    Box::new(Job { id, prompt: prompt(tokens), max_tokens: 20, embed, ..Job::default() })
}

fn run(engine: &mut Engine<'_>, jobs: impl IntoIterator<Item = Box<Job>>) -> BTreeMap<u64, Vec<f32>> {
    jobs.into_iter().for_each(|job| engine.admit(job).unwrap());
    let mut found = BTreeMap::new();
    while !engine.is_idle() {
        engine.step(&mut |event| match event {
            Event::Finished { job, reason, completion_tokens, .. } => {
                if let Some(embed) = &job.embed {
                    assert_eq!((reason, completion_tokens), (FinishReason::Stop, 0));
                    found.insert(job.id, embed.normalized(SHAPE.n_embd).unwrap());
                }
            }
            Event::Token { id, .. } => assert!(id >= 10, "an embedding has no tokens"),
            Event::Begun { .. } => {}
        });
    }
    found
}

#[test]
fn a_vector_has_the_same_bits_on_every_kernel_set_in_any_pieces_and_company() {
    with_model(|model| {
        let all = |engine: &mut Engine<'_>, tokens| {
            run(engine, (0..).zip(POOLINGS).map(|(id, pooling)| job(id, tokens, Some(pooling))))
                .into_values()
                .collect::<Vec<_>>()
        };
        let mut bytes = vec![];
        for kernels in Kernels::supported() {
            let expected = all(&mut engine(model, kernels, 1, 64), 150);
            bytes = expected.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(xxh3_64(&bytes), GOLDEN, "{}: {:#018x}", kernels.name(), xxh3_64(&bytes));
            assert!(expected[0] != expected[1] && expected[1] != expected[2]);
            for (threads, chunk) in [(2, 64), (1, 7), (2, 1)] {
                assert_eq!(
                    all(&mut engine(model, kernels, threads, chunk), 150),
                    expected,
                    "{threads} threads, chunks of {chunk}"
                );
            }
            // The same prompt again, which the cache has now, alone and beside answers that begin alike.
            let mut used = engine(model, kernels, 2, 64);
            let answer = || job(10, 150, None);
            run(&mut used, [answer()]);
            for company in [vec![], vec![answer()], vec![answer(), job(11, 130, None)]] {
                let jobs = company.into_iter().chain([job(0, 150, Some(Pooling::Mean))]);
                assert_eq!(run(&mut used, jobs)[&0], expected[0]);
            }
            // One token, and a prompt that fills the context.
            let one = all(&mut used, 1);
            assert!(one[0] == one[1] && one[1] == one[2]);
            all(&mut used, 256);
        }
        assert!(!bytes.is_empty());
    });
}

#[test]
fn vectors_point_where_those_of_plain_f32_do() {
    with_model(|model| {
        for (kernels, tokens) in Kernels::supported().zip([150, 20, 64, 65]) {
            let rows = reference::hidden_states(model, &prompt(tokens));
            for (id, pooling) in (0..).zip(POOLINGS) {
                let found =
                    run(&mut engine(model, kernels, 1, 64), [job(id, tokens, Some(pooling))]).remove(&id).unwrap();
                let mut wanted = Embed::new(pooling, SHAPE.n_embd);
                for (position, row) in rows.chunks_exact(SHAPE.n_embd).enumerate() {
                    if wanted.wants(position, tokens) {
                        wanted.add(row);
                    }
                }
                let wanted = wanted.normalized(SHAPE.n_embd).unwrap();
                let cosine: f32 = found.iter().zip(&wanted).map(|(a, b)| a * b).sum();
                assert!(cosine > 0.995, "{pooling:?}, {tokens} tokens: cosine {cosine}");
            }
        }
    });
}
