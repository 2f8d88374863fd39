//! The engine: admit → plan → forward → sample → emit, one step at a time, on one thread and its workers.
//!
//! Every buffer is taken by [`Engine::new`]; afterwards a step allocates and frees nothing. A sequence's tokens depend on its own
//! job alone, never on what else is in the step. In reading order: [`queue`] (how jobs come and tokens go) · [`scheduler`] (what
//! a step holds) · [`sampler`] (which token comes next). Next on the data's way: `model::forward`, then `serve`.

pub mod queue;
pub mod sampler;
pub mod scheduler;

use hearth_kernels::Kernels;
use xxhash_rust::xxh3::Xxh3;

use crate::model::Model;
use crate::model::forward::{BatchRow, forward};
use crate::model::hyper::Hyper;
use crate::model::kv::{BlockTable, KvCache, blocks_for};
use crate::model::plan::Capacity;
use crate::model::scratch::Scratch;
use crate::sys::workers::Workers;
use crate::text::TokenId;
use queue::{EngineEnd, Event, FinishReason, Job};
use sampler::Sampler;
use scheduler::{Pending, Share, StepLimits};

/// The engine and everything it owns.
pub struct Engine<'m> {
    model: &'m Model<'m>,
    kernels: Kernels,
    cache: KvCache,
    scratch: Scratch,
    workers: Workers,
    capacity: Capacity,
    limits: StepLimits,
    /// Tokens that end a generation, ascending.
    eog: Vec<TokenId>,
    buffers: EngineBuffers,
    admitted: u64,
}

/// The engine's own tables, one entry a sequence where it says so.
pub struct EngineBuffers {
    /// One a sequence.
    sequences: Vec<Option<Sequence>>,
    /// One a sequence: its blocks in the cache.
    tables: Vec<BlockTable>,
    /// One a sequence: its generated tokens, capacity `ctx`.
    generated: Vec<Vec<TokenId>>,
    pending: Vec<Option<Pending>>,
    shares: Vec<Share>,
    rows: Vec<BatchRow>,
    /// One row of logits.
    logits: Vec<f32>,
    sampler: Sampler,
}

/// One job under way.
struct Sequence {
    job: Box<Job>,
    /// Positions in the cache.
    cached: usize,
    age: u64,
    hash: Option<Xxh3>,
}

/// A job that the engine cannot take; the job comes back.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Every sequence is in use.
    #[error("all sequences are in use")]
    Busy(Box<Job>),
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt(Box<Job>),
    /// The prompt leaves no room for a token.
    #[error("the prompt has {prompt} tokens, the context {ctx} positions")]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt: usize,
        /// Positions a sequence may have.
        ctx: usize,
        /// The job.
        job: Box<Job>,
    },
    /// A token id outside the vocabulary.
    #[error("token id {} is outside the vocabulary of {n_vocab}", token.0)]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Tokens in the vocabulary.
        n_vocab: usize,
        /// The job.
        job: Box<Job>,
    },
}

impl Refused {
    /// The job, given back.
    pub fn into_job(self) -> Box<Job> {
        match self {
            Self::Busy(job) | Self::EmptyPrompt(job) => job,
            Self::PromptTooLong { job, .. } | Self::UnknownToken { job, .. } => job,
        }
    }
}

impl EngineBuffers {
    fn new(hyper: &Hyper, capacity: Capacity) -> Self {
        let sequences = capacity.sequences;
        Self {
            sequences: (0..sequences).map(|_| None).collect(),
            tables: (0..sequences).map(|_| BlockTable::with_capacity(capacity.ctx)).collect(),
            generated: (0..sequences).map(|_| Vec::with_capacity(capacity.ctx)).collect(),
            pending: Vec::with_capacity(sequences),
            shares: Vec::with_capacity(sequences),
            rows: Vec::with_capacity(capacity.max_rows),
            logits: vec![0.0; hyper.n_vocab],
            sampler: Sampler::new(hyper.n_vocab),
        }
    }

    /// Bytes of these tables, and of the hash states of running sequences.
    pub fn bytes(hyper: &Hyper, capacity: Capacity) -> usize {
        let per_sequence = size_of::<Option<Sequence>>()
            + size_of::<BlockTable>()
            + blocks_for(capacity.ctx) * size_of::<u32>()
            + size_of::<Vec<TokenId>>()
            + capacity.ctx * size_of::<TokenId>()
            + size_of::<Option<Pending>>()
            + size_of::<Share>();
        capacity.sequences * per_sequence
            + capacity.max_rows * size_of::<BatchRow>()
            + hyper.n_vocab * size_of::<f32>()
            + Sampler::bytes(hyper.n_vocab)
    }
}

impl<'m> Engine<'m> {
    /// Takes every buffer of the plan. `eog`: tokens that end a generation.
    pub fn new(
        model: &'m Model<'m>,
        kernels: Kernels,
        workers: Workers,
        capacity: Capacity,
        prefill_chunk: usize,
        mut eog: Vec<TokenId>,
    ) -> Self {
        eog.sort_unstable();
        let hyper = &model.hyper;
        Self {
            model,
            kernels,
            cache: KvCache::new(hyper, blocks_for(capacity.ctx) * capacity.sequences),
            scratch: Scratch::new(hyper, capacity.ctx, capacity.max_rows, capacity.max_outputs, workers.threads()),
            workers,
            capacity,
            limits: StepLimits { max_rows: capacity.max_rows, prefill_chunk },
            eog,
            buffers: EngineBuffers::new(hyper, capacity),
            admitted: 0,
        }
    }

    /// Makes the plan's memory resident, so that what was taken is there when a request needs it.
    pub fn touch(&mut self) {
        self.cache.touch();
        self.scratch.touch();
    }

    /// The threads, for something else between two steps.
    pub fn workers(&mut self) -> &mut Workers {
        &mut self.workers
    }

    /// Takes a job.
    ///
    /// # Errors
    /// No sequence is free, or the job can never run; it comes back inside the error.
    pub fn admit(&mut self, job: Box<Job>) -> Result<(), Refused> {
        let (ctx, n_vocab) = (self.capacity.ctx, self.model.hyper.n_vocab);
        let prompt = job.prompt.len();
        if prompt == 0 {
            return Err(Refused::EmptyPrompt(job));
        }
        if prompt > ctx {
            return Err(Refused::PromptTooLong { prompt, ctx, job });
        }
        if let Some(&token) = job.prompt.iter().find(|token| token.index() >= n_vocab) {
            return Err(Refused::UnknownToken { token, n_vocab, job });
        }
        let Some(slot) = self.buffers.sequences.iter().position(Option::is_none) else {
            return Err(Refused::Busy(job));
        };
        let positions = prompt.saturating_add(job.max_tokens).min(ctx);
        if !self.cache.reserve(&mut self.buffers.tables[slot], positions) {
            return Err(Refused::Busy(job));
        }
        self.buffers.generated[slot].clear();
        let hash = job.logits_hash.then(Xxh3::new);
        self.buffers.sequences[slot] = Some(Sequence { job, cached: 0, age: self.admitted, hash });
        self.admitted += 1;
        Ok(())
    }

    /// Sequences that can still be admitted.
    pub fn free_sequences(&self) -> usize {
        self.buffers.sequences.iter().filter(|sequence| sequence.is_none()).count()
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.free_sequences() == self.buffers.sequences.len()
    }

    /// Runs one step: at most two events a sequence go to `emit`.
    pub fn step(&mut self, emit: &mut dyn FnMut(Event)) {
        self.end_cancelled(emit);
        let lent: usize = self.buffers.tables.iter().map(|table| table.blocks().len()).sum();
        assert_eq!(lent + self.cache.free_blocks(), self.cache.blocks(), "KV blocks lent and free");
        self.plan();
        if self.buffers.rows.is_empty() {
            return;
        }
        let EngineBuffers { tables, rows, .. } = &self.buffers;
        forward(self.model, self.kernels, &mut self.cache, tables, rows, &mut self.scratch, &mut self.workers);
        let mut output = 0;
        for index in 0..self.buffers.shares.len() {
            let share = self.buffers.shares[index];
            if let Some(sequence) = &mut self.buffers.sequences[share.sequence] {
                sequence.cached += share.rows;
            }
            if share.last {
                self.sample(share.sequence, output, emit);
                output += 1;
            }
        }
    }

    /// The engine thread's life: takes jobs and steps until told to stop and idle.
    pub fn run(mut self, mut end: EngineEnd<'_>) {
        self.workers.pin_caller();
        let events_a_step = 2 * self.capacity.sequences;
        while !end.abandoned() {
            self.take_jobs(&mut end);
            if self.is_idle() {
                if end.stopping() {
                    return;
                }
                std::thread::park();
                continue;
            }
            if end.event_room() < events_a_step {
                // The I/O thread unparks this one as it drains.
                end.ring();
                std::thread::park_timeout(EVENT_RING_FULL_WAIT);
                continue;
            }
            self.step(&mut |event| {
                // Room for a whole step's events was checked above.
                let _ = end.emit(event);
            });
            end.ring();
        }
    }

    /// Gives back waiting jobs that are no longer wanted, then begins jobs while sequences are free.
    fn take_jobs(&mut self, end: &mut EngineEnd<'_>) {
        let mut given_back = false;
        while end.event_room() > 0 {
            let (job, reason) = match end.next_cancelled() {
                Some(job) => (job, FinishReason::Cancelled),
                None => {
                    if self.free_sequences() == 0 {
                        break;
                    }
                    let Some(job) = end.next_job() else { break };
                    let Err(refused) = self.admit(job) else { continue };
                    log::error!("job refused: {refused}");
                    (refused.into_job(), FinishReason::Refused)
                }
            };
            // Room for it was checked above.
            let _ = end.emit(Event::Finished { job, reason, completion_tokens: 0, logits_hash: None });
            given_back = true;
        }
        if given_back {
            end.ring();
        }
    }

    fn end_cancelled(&mut self, emit: &mut dyn FnMut(Event)) {
        for slot in 0..self.buffers.sequences.len() {
            if self.buffers.sequences[slot].as_ref().is_some_and(|sequence| sequence.job.is_cancelled()) {
                self.finish(slot, FinishReason::Cancelled, emit);
            }
        }
    }

    /// Fills `shares` and `rows` for the next step.
    fn plan(&mut self) {
        let EngineBuffers { sequences, generated, pending, shares, rows, .. } = &mut self.buffers;
        pending.clear();
        pending.extend(sequences.iter().map(|sequence| {
            let sequence = sequence.as_ref()?;
            let left = sequence.job.prompt.len().saturating_sub(sequence.cached);
            Some(Pending { tokens: left.max(1), age: sequence.age })
        }));
        scheduler::plan(pending, self.limits, shares);
        rows.clear();
        for share in shares {
            let Some(state) = &sequences[share.sequence] else { continue };
            let prompt = &state.job.prompt;
            rows.extend((state.cached..state.cached + share.rows).map(|position| BatchRow {
                token:
                    prompt.get(position).copied().unwrap_or_else(|| generated[share.sequence][position - prompt.len()]),
                sequence: share.sequence,
                position,
                logits: share.last && position + 1 == state.cached + share.rows,
            }));
        }
    }

    /// Chooses the next token of a sequence from the step's `output`-th row of logits.
    fn sample(&mut self, slot: usize, output: usize, emit: &mut dyn FnMut(Event)) {
        let EngineBuffers { sequences, generated, logits, sampler, .. } = &mut self.buffers;
        let Some(sequence) = &mut sequences[slot] else { return };
        let generated = &mut generated[slot];
        if sequence.job.max_tokens == 0 {
            return self.finish(slot, FinishReason::Length, emit);
        }
        self.scratch.copy_logits(output, logits);
        if let Some(hash) = &mut sequence.hash {
            update_hash(hash, logits);
        }
        let Some(token) = sampler.sample(&sequence.job.sampling, &sequence.job.prompt, generated, logits) else {
            return self.finish(slot, FinishReason::NonFinite, emit);
        };
        if !sequence.job.ignore_eos && self.eog.binary_search(&token).is_ok() {
            return self.finish(slot, FinishReason::Stop, emit);
        }
        generated.push(token);
        let logits_hash = sequence.hash.as_ref().map(Xxh3::digest);
        emit(Event::Token { id: sequence.job.id, token, logits_hash });
        let positions = sequence.job.prompt.len() + generated.len();
        if generated.len() >= sequence.job.max_tokens || positions >= self.capacity.ctx {
            self.finish(slot, FinishReason::Length, emit);
        }
    }

    fn finish(&mut self, slot: usize, reason: FinishReason, emit: &mut dyn FnMut(Event)) {
        let Some(sequence) = self.buffers.sequences[slot].take() else { return };
        self.cache.release(&mut self.buffers.tables[slot]);
        let completion_tokens = self.buffers.generated[slot].len();
        let logits_hash = sequence.hash.map(|hash| hash.digest());
        emit(Event::Finished { job: sequence.job, reason, completion_tokens, logits_hash });
    }
}

/// How long the engine waits for a full event ring before it looks again.
const EVENT_RING_FULL_WAIT: std::time::Duration = std::time::Duration::from_millis(1);

/// Adds one step's logits, as little-endian f32, to a sequence's hash.
pub fn update_hash(hash: &mut Xxh3, logits: &[f32]) {
    let mut bytes = [0u8; 4096];
    for values in logits.chunks(bytes.len() / 4) {
        for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *to = value.to_le_bytes();
        }
        hash.update(&bytes[..values.len() * 4]);
    }
}
