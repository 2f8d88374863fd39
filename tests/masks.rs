//! Masks in the engine: an answer takes what its mask lets through and no token before there is one, nobody else waits for it, and
//! what else is in the batch changes no bit of it.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::mask::Mask;
use hearth::engine::queue::{Event, FinishReason, Job, Rings};
use hearth::engine::sampler::SamplingParams;
use hearth::model::Model;
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use tiny::SHAPE;

const SEQUENCES: usize = 3;

fn with_model(test: impl Fn(&Model<'_>, Kernels)) {
    tiny::with_model(&tiny::model(SHAPE, "Q4_1", 7), 1, |model, _| {
        for kernels in Kernels::supported() {
            test(model, kernels);
        }
    });
}

fn engine<'m>(model: &'m Model<'m>, kernels: Kernels) -> Engine<'m> {
    let sizes = Capacity { ctx: 256, max_rows: 64, max_outputs: SEQUENCES, threads: 1, ..Capacity::default() };
    let capacity = Capacity { sequences: SEQUENCES, ..sizes };
    Engine::new(model, kernels, Workers::new(1).unwrap(), capacity, 64, vec![]).sharing_prefixes()
}

fn job(id: u64, masked: bool) -> Box<Job> {
    let prompt = (0..70).map(|i| TokenId((i * 31 + id as u32) % SHAPE.n_vocab as u32)).collect();
    let sampling = SamplingParams { temperature: 1.0, seed: id, ..SamplingParams::default() };
    let mask = masked.then(|| Arc::new(Mask::new(SHAPE.n_vocab)));
    Box::new(Job { id, prompt, sampling, max_tokens: 12, logits_hash: true, mask, ..Job::default() })
}

/// The tokens that an answer's n-th may be: those that leave this rest by seven.
fn allowed(n: usize) -> Vec<u32> {
    let is_in = |token: usize| token < SHAPE.n_vocab && token % 7 == n % 7;
    (0..SHAPE.n_vocab.div_ceil(32))
        .map(|word| (0..32).fold(0, |bits, bit| bits | u32::from(is_in(word * 32 + bit)) << bit))
        .collect()
}

/// Tokens and logits hash of every job, with masks published `late` steps after they could be.
fn run(
    engine: &mut Engine<'_>,
    masks: &BTreeMap<u64, Arc<Mask>>,
    late: usize,
) -> BTreeMap<u64, (Vec<u32>, Option<u64>)> {
    let mut found: BTreeMap<u64, (Vec<u32>, Option<u64>)> = BTreeMap::new();
    let mut due: Vec<(usize, u64, usize)> = masks.keys().map(|&id| (late, id, 0)).collect();
    let mut step = 0;
    while !engine.is_idle() {
        due.retain(|&(at, id, tokens)| {
            if at <= step {
                masks[&id].publish(tokens, &allowed(tokens));
            }
            at > step
        });
        engine.step(&mut |event| match event {
            Event::Token { id, token, .. } => {
                let answer = &mut found.entry(id).or_default().0;
                answer.push(token.0);
                if masks.contains_key(&id) {
                    due.push((step + 1 + late, id, answer.len()));
                }
            }
            Event::Finished { job, logits_hash, .. } => found.entry(job.id).or_default().1 = logits_hash,
            Event::Begun { .. } => {}
        });
        step += 1;
        assert!(step < 1000, "the engine does not get on: {found:?}");
    }
    found
}

#[test]
fn an_answer_takes_what_its_mask_lets_through_alone_or_beside_others() {
    with_model(|model, kernels| {
        let one = |others: &[u64], late: usize| {
            let mut engine = engine(model, kernels);
            let masked = job(1, true);
            let masks = BTreeMap::from([(1, masked.mask.clone().unwrap())]);
            engine.admit(masked).unwrap();
            for &id in others {
                engine.admit(job(id, false)).unwrap();
            }
            run(&mut engine, &masks, late)
        };
        let alone = one(&[], 0);
        let (tokens, hash) = &alone[&1];
        assert_eq!((tokens.len(), hash.is_some()), (12, true));
        for (n, token) in tokens.iter().enumerate() {
            assert_eq!(*token as usize % 7, n % 7, "token {n}");
        }
        let free = one(&[2, 3], 0);
        for late in [0, 1, 5] {
            let beside = one(&[2, 3], late);
            assert_eq!(beside[&1], alone[&1], "masks {late} steps late");
            assert_eq!((&beside[&2], &beside[&3]), (&free[&2], &free[&3]));
        }
    });
}

#[test]
fn nobody_waits_for_anothers_mask_and_one_that_waits_can_be_cancelled() {
    with_model(|model, kernels| {
        let mut engine = engine(model, kernels);
        let (waits, goes_on) = (job(1, true), job(2, false));
        let cancel = Arc::clone(&waits.cancel);
        engine.admit(waits).unwrap();
        engine.admit(goes_on).unwrap();
        let mut ended = vec![];
        for _ in 0..60 {
            engine.step(&mut |event| match event {
                Event::Finished { job, reason, .. } => ended.push((job.id, reason)),
                Event::Token { id, .. } => assert_eq!(id, 2),
                Event::Begun { .. } => {}
            });
        }
        assert_eq!(ended, [(2, FinishReason::Length)]);
        assert!(engine.step(&mut |_| ()).is_none() && !engine.is_idle(), "nothing to compute until the mask is there");
        cancel.store(true, Ordering::Release);
        engine.step(&mut |event| match event {
            Event::Finished { job, reason, .. } => ended.push((job.id, reason)),
            other => panic!("{other:?}"),
        });
        assert_eq!(ended[1], (1, FinishReason::Cancelled));
        assert!(engine.is_idle());
    });
}

#[test]
fn an_engine_that_waits_for_masks_alone_sleeps_until_one_is_there() {
    with_model(|model, kernels| {
        let engine = engine(model, kernels);
        let mut rings = Rings::new();
        let (end, link) = rings.split().unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || engine.run(end));
            let mut link = link.bind(thread.thread().clone());
            let masked = job(1, true);
            let mask = masked.mask.clone().unwrap();
            link.submit(masked).unwrap();
            let mut tokens = 0;
            let (mut steps_asleep, mut ended) = (None, false);
            while !ended {
                // Time enough for a loop that does not sleep to be seen: an engine that spins would count no step either, but take a core.
                if tokens < 3 {
                    std::thread::sleep(std::time::Duration::from_millis(30));
                    steps_asleep = Some(link.counted().steps);
                }
                mask.publish(tokens, &allowed(tokens));
                link.nudge();
                let before = tokens;
                while tokens == before && !ended {
                    link.clear();
                    while let Some(event) = link.next_event() {
                        match event {
                            Event::Token { .. } => tokens += 1,
                            Event::Finished { .. } => ended = true,
                            Event::Begun { .. } => {}
                        }
                    }
                    std::thread::yield_now();
                }
            }
            assert_eq!(tokens, 12);
            // Two steps at most have the prompt, each token has one: none was made for nothing.
            assert!(
                steps_asleep.unwrap() <= 4 && link.counted().steps <= 2 + 12,
                "{steps_asleep:?} {}",
                link.counted().steps
            );
            link.shutdown();
        });
    });
}
