//! After "ready" the engine thread and its workers take no memory and free none: counted by the allocator itself, over prefill,
//! decode, a batch, sampling, prefixes found and forgotten, cancelled jobs (running and waiting), a full context, and more jobs than may wait.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::mask::Mask;
use hearth::engine::queue::{EVENT_RING_SLOTS, Event, FinishReason, Job, Rings};
use hearth::engine::sampler::SamplingParams;
use hearth::engine::scheduler::{Peer, WAITING_JOBS};
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use tiny::{SHAPE, Shape};

/// Counts what every thread but the test's own allocates and frees while [`COUNTING`].
struct Counter;

static COUNTING: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if COUNTING.load(Ordering::SeqCst) && !EXEMPT.get() {
        CALLS.fetch_add(1, Ordering::SeqCst);
    }
}

// SAFETY: every call goes on to the system's allocator as it came; counting allocates nothing (an atomic, a constant thread local).
unsafe impl GlobalAlloc for Counter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counter = Counter;

/// More than events may wait: a job whose end is the context cannot get there before its first events were read.
const CTX: usize = EVENT_RING_SLOTS + 255;
const SEQUENCES: usize = 3;

fn job(id: u64, prompt: usize, max_tokens: usize, sampling: SamplingParams) -> Box<Job> {
    let prompt = (0..prompt).map(|i| TokenId((i * 31 + id as usize) as u32 % SHAPE.n_vocab as u32)).collect();
    let cancel = Arc::new(AtomicBool::new(false));
    Box::new(Job {
        id,
        prompt,
        sampling,
        max_tokens,
        ignore_eos: true,
        logits_hash: id.is_multiple_of(2),
        cancel,
        embed: None,
        mask: None,
        peer: Peer::default(),
        logprobs: id.is_multiple_of(3).then_some(5),
    })
}

/// Without the usual harness, whose main thread takes memory when a test is slow.
fn main() {
    EXEMPT.set(true);
    let shape = Shape { n_ctx: CTX, ..SHAPE };
    tiny::with_model(&tiny::model(shape, "Q4_1", 7), 1, |model, _| {
        for kernels in Kernels::supported() {
            let capacity = Capacity {
                ctx: CTX,
                sequences: SEQUENCES,
                max_rows: 64,
                max_outputs: SEQUENCES,
                threads: 2,
                ..Capacity::default()
            };
            let engine = Engine::new(model, kernels, Workers::new(2).unwrap(), capacity, 64, vec![]);
            let calls = live(engine.sharing_prefixes().with_step_budget(std::time::Duration::from_millis(50)));
            assert_eq!(calls, 0, "calls of the allocator with the {} kernels", kernels.name());
        }
    });
    println!("the engine and its workers allocate nothing after ready: ok");
}

/// Runs an engine thread through everything that jobs can do; calls of the allocator on its thread and its workers' meanwhile.
fn live(engine: Engine<'_>) -> u64 {
    let mut rings = Rings::new();
    let (end, link) = rings.split().unwrap();
    let ready = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ready = &ready;
        let thread = scope.spawn(move || {
            ready.store(true, Ordering::SeqCst);
            engine.run(end);
        });
        let mut link = link.bind(thread.thread().clone());
        while !ready.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        CALLS.store(0, Ordering::SeqCst);
        COUNTING.store(true, Ordering::SeqCst);

        let hot = SamplingParams { temperature: 1.2, top_k: 40, top_p: 0.9, seed: 5, ..SamplingParams::default() };
        let endless = job(0, 150, usize::MAX, hot.clone());
        let stop_me = job(1, 20, usize::MAX, SamplingParams::default());
        let waiting = job(4, 20, usize::MAX, hot.clone());
        let (running_cancel, waiting_cancel) = (Arc::clone(&stop_me.cancel), Arc::clone(&waiting.cancel));
        let (mut reasons, mut submitted) = (BTreeMap::new(), 0);
        let everything = SamplingParams {
            typical_p: 0.9,
            min_p: 0.01,
            xtc_probability: 0.5,
            dry_multiplier: 0.8,
            repetition_penalty: 1.1,
            frequency_penalty: 0.1,
            dynatemp_range: 0.5,
            logit_bias: vec![(TokenId(3), 1.0)],
            ..hot.clone()
        };
        let mirostat = SamplingParams { mirostat: 2, top_k: 0, ..everything.clone() };
        let long = |id| job(id, 600, 3, SamplingParams::default());
        let first = [endless, stop_me, job(2, 1, 30, everything), long(3), waiting];
        // The same prompt as 3's again; then more prompts than there are blocks for.
        let others = [3 + SHAPE.n_vocab as u64, 5, 6, 7, 8, 9, 10, 11].map(long);
        let others = others.into_iter().chain([job(12, 9, 40, mirostat)]);
        let mut masked = job(13, 30, 20, hot.clone());
        let (mask, some) = (Arc::new(Mask::new(SHAPE.n_vocab)), vec![0x5555_5555; SHAPE.n_vocab.div_ceil(32)]);
        masked.mask = Some(Arc::clone(&mask));
        mask.publish(0, &some);
        let mut masked_tokens = 0;
        for job in first.into_iter().chain(others).chain([masked]) {
            link.submit(job).unwrap();
            submitted += 1;
        }
        waiting_cancel.store(true, Ordering::Release);
        link.nudge();
        let (mut tokens, mut hits) = (0, 0);
        let mut refused = 0;
        while reasons.len() < submitted {
            link.clear();
            while let Some(event) = link.next_event() {
                match event {
                    Event::Token { id: 1, .. } if tokens > 10 => running_cancel.store(true, Ordering::Release),
                    Event::Token { id: 13, token, .. } => {
                        assert!(token.0.is_multiple_of(2), "the mask has even tokens alone");
                        masked_tokens += 1;
                        mask.publish(masked_tokens, &some);
                        link.nudge();
                    }
                    Event::Token { .. } => tokens += 1,
                    Event::Begun { cached_tokens, .. } => hits += usize::from(cached_tokens > 0),
                    Event::Finished { job, reason, .. } => {
                        reasons.insert(job.id, reason);
                    }
                }
            }
            // Once the first five are under way: more than may wait.
            while refused == 0 && reasons.contains_key(&1) {
                match link.submit(job(100 + submitted as u64, 5, 2, hot.clone())) {
                    Ok(()) => submitted += 1,
                    Err(_) => refused += 1,
                }
            }
            std::thread::yield_now();
        }
        // Idle now; the end of `run` frees everything, and is not counted.
        let counted = link.counted();
        let calls = CALLS.load(Ordering::SeqCst);
        COUNTING.store(false, Ordering::SeqCst);
        link.shutdown();
        assert!(tokens > 100 && submitted > WAITING_JOBS && refused == 1, "{tokens} tokens, {submitted} jobs");
        assert!(counted.steps > 30 && counted.decode_rows > 100 && counted.prefill_rows > 500, "{counted:?}");
        assert!(hits > 0, "no prompt found what another had computed");
        let expected = [FinishReason::Length, FinishReason::Cancelled, FinishReason::Length, FinishReason::Length];
        assert_eq!([0, 1, 2, 3].map(|id| reasons[&id]), expected);
        assert_eq!((masked_tokens, reasons[&13]), (20, FinishReason::Length));
        assert_eq!(reasons[&4], FinishReason::Cancelled, "while it waited or at its first step");
        calls
    })
}
