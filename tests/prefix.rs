//! The prefix cache in the engine: a hit changes no bit, blocks are neither lost nor lent twice, whatever is cancelled when, and
//! pinned prompts stay.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hearth::engine::capacity::Capacity;
use hearth::engine::queue::{Event, Job};
use hearth::engine::sampler::SamplingParams;
use hearth::engine::scheduler::Peer;
use hearth::engine::{Engine, PinError};
use hearth::model::Model;
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use tiny::SHAPE;

const CTX: usize = 256;
const SEQUENCES: usize = 3;

fn with_model(test: impl Fn(&Model<'_>, Kernels)) {
    tiny::with_model(&tiny::model(SHAPE, "Q4_1", 7), 1, |model, _| {
        for kernels in Kernels::supported() {
            test(model, kernels);
        }
    });
}

fn engine<'m>(model: &'m Model<'m>, kernels: Kernels, prefix: usize) -> Engine<'m> {
    let capacity = Capacity {
        ctx: CTX,
        sequences: SEQUENCES,
        max_rows: 64,
        max_outputs: SEQUENCES,
        threads: 1,
        prefix,
        grammars: 0,
    };
    Engine::new(model, kernels, Workers::new(1).unwrap(), capacity, 64, vec![])
}

/// `common` tokens that all such prompts share, then `own` of this one's.
fn prompt(common: usize, own: usize, number: u64) -> Vec<TokenId> {
    let shared = (0..common).map(|i| i * 31 + 5);
    let ids = shared.chain((0..own).map(|i| i * 17 + 3 * number as usize + 1));
    ids.map(|id| TokenId(u32::try_from(id % SHAPE.n_vocab).unwrap())).collect()
}

fn job(id: u64, prompt: Vec<TokenId>, max_tokens: usize) -> Box<Job> {
    let sampling = SamplingParams { temperature: 1.0, seed: 3, ..SamplingParams::default() };
    let (cancel, peer) = (Arc::new(AtomicBool::new(false)), Peer { id: id % 2, ..Peer::default() });
    Box::new(Job {
        id,
        prompt,
        sampling,
        max_tokens,
        ignore_eos: true,
        logits_hash: true,
        cancel,
        embed: None,
        mask: None,
        peer,
        logprobs: None,
    })
}

/// What a job had: tokens of its prompt that were there, and the hash of its logits.
type Outcome = (usize, Option<u64>);

fn run(engine: &mut Engine<'_>) -> BTreeMap<u64, Outcome> {
    let mut outcomes: BTreeMap<u64, Outcome> = BTreeMap::new();
    while !engine.is_idle() {
        engine.step(&mut |event| match event {
            Event::Begun { id, cached_tokens } => outcomes.entry(id).or_default().0 = cached_tokens,
            Event::Finished { job, logits_hash, .. } => outcomes.entry(job.id).or_default().1 = logits_hash,
            Event::Token { .. } => {}
        });
    }
    outcomes
}

#[test]
fn a_hit_changes_no_bit_and_the_next_turn_finds_the_whole_of_the_last() {
    with_model(|model, kernels| {
        let alone = |prompt: Vec<TokenId>, tokens| {
            let mut engine = engine(model, kernels, 0);
            engine.admit(job(9, prompt, tokens)).unwrap();
            run(&mut engine)[&9]
        };
        let mut shared = engine(model, kernels, 0).sharing_prefixes();
        for (common, own, tokens, cached) in
            [(150, 20, 40, 0), (150, 30, 3, 128), (150, 20, 40, 128), (128, 0, 2, 64), (129, 0, 2, 128), (63, 1, 2, 0)]
        {
            shared.admit(job(9, prompt(common, own, 1), tokens)).unwrap();
            let outcome = run(&mut shared)[&9];
            let (name, hash) = (kernels.name(), alone(prompt(common, own, 1), tokens).1);
            assert_eq!(outcome, (cached, hash), "{common} + {own} tokens, {name}");
        }
    });
}

#[test]
fn an_answer_is_part_of_what_the_next_turn_finds() {
    with_model(|model, kernels| {
        let mut engine = engine(model, kernels, 0).sharing_prefixes();
        let mut history = prompt(100, 0, 0);
        engine.admit(job(1, history.clone(), 60)).unwrap();
        while !engine.is_idle() {
            engine.step(&mut |event| {
                if let Event::Token { token, .. } = event {
                    history.push(token);
                }
            });
        }
        history.extend(prompt(0, 20, 5));
        engine.admit(job(2, history, 2)).unwrap();
        assert_eq!(run(&mut engine)[&2].0, 128, "of 100 tokens asked and 60 answered, in whole blocks");
    });
}

#[test]
fn those_that_come_together_share_as_soon_as_one_has_computed_it() {
    with_model(|model, kernels| {
        let mut engine = engine(model, kernels, 0).sharing_prefixes();
        for id in [2, 4, 6] {
            engine.admit(job(id, prompt(192, 10, id), 2)).unwrap();
        }
        let outcomes = run(&mut engine);
        assert_eq!([2, 4, 6].map(|id| outcomes[&id].0), [0, 192, 192], "one peer's: the oldest goes first");
        let counts = engine.kv_blocks();
        assert_eq!((counts.used, counts.cached, counts.free), (0, 3, 9), "each block once: {counts:?}");
    });
}

#[test]
fn whatever_is_cancelled_when_no_block_is_lost() {
    with_model(|model, kernels| {
        let mut engine = engine(model, kernels, 64).sharing_prefixes();
        let total = 3 * CTX / 64 + 1;
        let mut state = 1u64;
        let mut below = |end: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % end
        };
        for id in 0..150 {
            let common = [0, 70, 140][below(3) as usize];
            let job = job(id, prompt(common, 1 + below(100) as usize, below(4)), 1 + below(20) as usize);
            let cancel = Arc::clone(&job.cancel);
            engine.admit(job).unwrap();
            for _ in 0..below(5) {
                engine.step(&mut |_| ());
            }
            cancel.store(below(2) == 0, Ordering::Release);
            if engine.free_sequences() == 0 {
                run(&mut engine);
            }
        }
        run(&mut engine);
        let counts = engine.kv_blocks();
        assert_eq!((counts.used, counts.free + counts.cached), (0, total), "{counts:?}");
        // Full contexts take every block there is, and find none missing.
        for id in 0..SEQUENCES as u64 {
            engine.admit(job(id, prompt(0, CTX - 3, 50 + 7 * id), 100)).unwrap();
        }
        run(&mut engine);
    });
}

#[test]
fn a_pinned_prompt_stays_whatever_comes_and_one_too_long_is_refused_with_the_numbers() {
    with_model(|model, kernels| {
        let mut pinned = engine(model, kernels, 128).sharing_prefixes();
        assert_eq!(pinned.pin(&[prompt(150, 0, 0)]).unwrap(), 128);
        for id in 0..20 {
            pinned.admit(job(id, prompt(0, CTX - 10, id), 20)).unwrap();
            if id % 3 == 2 {
                run(&mut pinned);
            }
        }
        run(&mut pinned);
        pinned.admit(job(99, prompt(150, 5, 1), 2)).unwrap();
        assert_eq!(run(&mut pinned)[&99].0, 128);
        assert_eq!(pinned.kv_blocks().used, 2);
        let refused = engine(model, kernels, 64).sharing_prefixes().pin(&[prompt(150, 0, 0)]);
        assert!(matches!(refused, Err(PinError::TooLong { tokens: 128, room: 64 })));
    });
}
