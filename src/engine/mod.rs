//! The engine: admit → plan → forward → sample → emit, one step at a time, on one thread and its workers.
//!
//! Every buffer is taken by [`Engine::new`]; afterwards a step allocates and frees nothing. A sequence's tokens depend on its own
//! job alone, never on what else is in the step, nor on what the prefix cache holds. In reading order: [`queue`] (how jobs come and
//! tokens go) · [`mask`] (what a grammar lets through) · [`embed`] (what a prompt comes to) · [`scheduler`] (what a step holds) · [`pace`] (how much of it fits the time) · [`prefix`] (what need not be computed)
//! · [`sampler`] (which token comes next) · [`gauges`] (what steps came to). Next on the data's way: `model::forward`, then `serve`.

pub mod capacity;
pub mod embed;
pub mod gauges;
pub mod mask;
pub mod pace;
pub mod prefix;
pub mod queue;
pub mod sampler;
pub mod scheduler;

use std::time::{Duration, Instant};

use hearth_kernels::{KV_BLOCK, Kernels};
use xxhash_rust::xxh3::Xxh3;

use crate::model::Model;
use crate::model::forward::{BatchRow, forward, hidden_state};
use crate::model::hyper::Hyper;
use crate::model::kv::{BlockTable, KvCache, blocks_for};
use crate::model::scratch::Scratch;
use crate::sys::workers::Workers;
use crate::text::TokenId;
use capacity::Capacity;
use gauges::StepReport;
use pace::Pace;
use prefix::{BlockCounts, PrefixCache};
use queue::{EngineEnd, Event, FinishReason, Job};
use sampler::{MirostatState, Sampler};
use scheduler::{Ledger, Pending, Share, StepLimits};

/// The engine and everything it owns.
pub struct Engine<'m> {
    model: &'m Model<'m>,
    kernels: Kernels,
    cache: KvCache,
    scratch: Scratch,
    workers: Workers,
    capacity: Capacity,
    limits: StepLimits,
    pace: Pace,
    /// Prompts share what they begin with.
    shares_prefixes: bool,
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
    ledger: Ledger,
    prefix: PrefixCache,
    /// One row of logits.
    logits: Vec<f32>,
    /// One row that left the last norm, `[n_embd]`.
    hidden: Vec<f32>,
    sampler: Sampler,
}

/// One job under way.
struct Sequence {
    job: Box<Job>,
    /// Positions in the cache.
    cached: usize,
    /// Of these, positions of the prompt that were there before.
    reused: usize,
    /// Its first blocks that the prefix cache knows.
    known_blocks: usize,
    age: u64,
    hash: Option<Xxh3>,
    mirostat: MirostatState,
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

/// A prompt that cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// It can never run.
    #[error("{0}")]
    Refused(String),
    /// There is no room for it beside the sequences.
    #[error("{tokens} tokens or more are to be kept, there is room for {room}")]
    TooLong {
        /// Tokens so far.
        tokens: usize,
        /// Tokens that may be kept.
        room: usize,
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
            ledger: Ledger::with_capacity(sequences),
            prefix: PrefixCache::new(capacity.kv_blocks()),
            logits: vec![0.0; hyper.n_vocab],
            hidden: vec![0.0; hyper.n_embd],
            sampler: Sampler::new(hyper.n_vocab, capacity.ctx),
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
            + Ledger::bytes(capacity.sequences)
            + PrefixCache::bytes(capacity.kv_blocks())
            + (hyper.n_vocab + hyper.n_embd) * size_of::<f32>()
            + Sampler::bytes(hyper.n_vocab, capacity.ctx)
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
            cache: KvCache::new(hyper, capacity.kv_blocks()),
            scratch: Scratch::new(hyper, capacity.ctx, capacity.max_rows, capacity.max_outputs, workers.threads()),
            workers,
            capacity,
            limits: StepLimits { max_rows: capacity.max_rows, prefill_chunk, beside_decode: capacity.max_rows },
            pace: Pace::default(),
            shares_prefixes: false,
            eog,
            buffers: EngineBuffers::new(hyper, capacity),
            admitted: 0,
        }
    }

    /// Prompts use keys and values of those before them that began alike.
    #[must_use]
    pub fn sharing_prefixes(self) -> Self {
        Self { shares_prefixes: true, ..self }
    }

    /// While answers stream, no step takes longer than `budget`, as far as the engine can tell from those before it.
    #[must_use]
    pub fn with_step_budget(self, budget: Duration) -> Self {
        Self { pace: Pace::new(Some(budget)), ..self }
    }

    /// Tokens over which the sampler's DRY sees no repetition, those with a line feed in them for instance.
    #[must_use]
    pub fn with_dry_breakers(mut self, breakers: &[TokenId]) -> Self {
        self.buffers.sampler.set_dry_breakers(breakers);
        self
    }

    /// Computes what `prompts` begin with, in whole blocks, and keeps it for ever; the tokens kept, of all of them. Nothing else may
    /// be under way, and prefixes must be shared.
    ///
    /// # Errors
    /// A prompt cannot run, or is more than the blocks left for it ([`Capacity::prefix`]).
    pub fn pin(&mut self, prompts: &[Vec<TokenId>]) -> Result<usize, PinError> {
        let room = blocks_for(self.capacity.prefix);
        for prompt in prompts {
            let whole = prompt.len() / KV_BLOCK;
            let tokens = &prompt[..whole * KV_BLOCK];
            if tokens.is_empty() {
                continue;
            }
            // One token more than is kept: a sequence computes its last token whatever the cache holds.
            let job = Job { prompt: prompt[..prompt.len().min(tokens.len() + 1)].to_vec(), ..Job::default() };
            self.admit(Box::new(job)).map_err(|refused| PinError::Refused(refused.to_string()))?;
            while !self.is_idle() {
                self.step(&mut |_| ());
            }
            let EngineBuffers { prefix, .. } = &mut self.buffers;
            let mut parent = None;
            for block in tokens.chunks_exact(KV_BLOCK) {
                let Some(found) = prefix.find(parent, block) else { break };
                prefix.pin(found);
                if prefix.pinned() > room {
                    return Err(PinError::TooLong { tokens: prefix.pinned() * KV_BLOCK, room: room * KV_BLOCK });
                }
                parent = Some(found);
            }
        }
        Ok(self.buffers.prefix.pinned() * KV_BLOCK)
    }

    /// Where the KV blocks are.
    pub fn kv_blocks(&self) -> BlockCounts {
        self.buffers.prefix.counts(&self.cache)
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
        self.buffers.generated[slot].clear();
        self.buffers.ledger.enter(job.peer);
        let hash = job.logits_hash.then(Xxh3::new);
        let age = self.admitted;
        let mirostat = MirostatState::default();
        self.buffers.sequences[slot] =
            Some(Sequence { job, cached: 0, reused: 0, known_blocks: 0, age, hash, mirostat });
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

    /// Runs one step: at most [`EVENTS_A_SEQUENCE`] events a sequence go to `emit`. `None`: there was nothing to compute.
    pub fn step(&mut self, emit: &mut dyn FnMut(Event)) -> Option<StepReport> {
        self.end_cancelled(emit);
        self.buffers.prefix.check(&self.cache, &self.buffers.tables);
        if self.shares_prefixes {
            self.find_prefixes();
        }
        self.plan();
        if self.buffers.rows.is_empty() {
            return None;
        }
        let began = Instant::now();
        let EngineBuffers { tables, rows, .. } = &self.buffers;
        forward(self.model, self.kernels, &mut self.cache, tables, rows, &mut self.scratch, &mut self.workers);
        let (mut output, mut decodes, mut prefills, mut first_row) = (0, 0, 0, 0);
        for index in 0..self.buffers.shares.len() {
            let share = self.buffers.shares[index];
            self.embed(share, first_row);
            first_row += share.rows;
            if let Some(sequence) = &mut self.buffers.sequences[share.sequence] {
                if sequence.cached + 1 < sequence.job.prompt.len() {
                    prefills += share.rows;
                    self.buffers.ledger.charge(sequence.job.peer, share.rows);
                } else {
                    decodes += 1;
                }
                sequence.cached += share.rows;
            }
            if self.shares_prefixes {
                self.publish(share.sequence);
            }
            if share.last && self.is_embedding(share.sequence) {
                self.end_embedding(share.sequence, emit);
            } else if share.last {
                self.sample(share.sequence, output, emit);
                output += 1;
            }
        }
        let took = began.elapsed();
        self.pace.record(decodes, prefills, took);
        let sequences = self.buffers.shares.len();
        Some(StepReport { decode_rows: decodes, prefill_rows: prefills, sequences, took })
    }

    /// The engine thread's life: takes jobs and steps until told to stop and idle.
    pub fn run(mut self, mut end: EngineEnd<'_>) {
        self.workers.pin_caller();
        let events_a_step = EVENTS_A_SEQUENCE * self.capacity.sequences;
        while !end.abandoned() {
            self.take_jobs(&mut end);
            end.report(self.kv_blocks());
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
            let step = self.step(&mut |event| {
                // Room for a whole step's events was checked above.
                let _ = end.emit(event);
            });
            end.ring();
            match step {
                Some(step) => end.count(&step),
                // Every sequence waits for its mask; the link unparks this thread when one is there.
                None if !self.is_idle() => std::thread::park(),
                None => {}
            }
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
                    let ledger = &self.buffers.ledger;
                    let Some(job) = end.next_fair_job(|peer| ledger.running(peer)) else { break };
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

    /// Prompts that are at a block's end take over what is known of what comes next. At each step, not only at the beginning: another
    /// sequence may just have computed it. A prompt's last token is always left, because its logits are wanted.
    fn find_prefixes(&mut self) {
        let EngineBuffers { sequences, tables, prefix, .. } = &mut self.buffers;
        for (sequence, table) in sequences.iter_mut().zip(tables) {
            let Some(sequence) = sequence else { continue };
            if sequence.job.embed.is_some() {
                // What is in the cache has no hidden states.
                continue;
            }
            while sequence.cached == table.blocks().len() * KV_BLOCK
                && let Some(tokens) = sequence.job.prompt.get(sequence.cached..sequence.cached + KV_BLOCK)
                && sequence.cached + KV_BLOCK < sequence.job.prompt.len()
                && let Some(block) = prefix.find(table.blocks().last().copied(), tokens)
            {
                prefix.attach(block);
                table.push(block);
                sequence.cached += KV_BLOCK;
                sequence.reused += KV_BLOCK;
                sequence.known_blocks += 1;
            }
        }
    }

    /// Lets others know of a sequence's blocks that have become full.
    fn publish(&mut self, slot: usize) {
        let EngineBuffers { sequences, tables, generated, prefix, .. } = &mut self.buffers;
        let (Some(sequence), table) = (&mut sequences[slot], &mut tables[slot]) else { return };
        while (sequence.known_blocks + 1) * KV_BLOCK <= sequence.cached {
            let index = sequence.known_blocks;
            let tokens: [TokenId; KV_BLOCK] =
                std::array::from_fn(|at| token_at(&sequence.job.prompt, &generated[slot], index * KV_BLOCK + at));
            let parent = index.checked_sub(1).map(|before| table.blocks()[before]);
            let block = prefix.publish(&mut self.cache, parent, table.blocks()[index], &tokens);
            table.replace(index, block);
            sequence.known_blocks += 1;
        }
    }

    /// Fills `shares` and `rows` for the next step, and takes the blocks that they need.
    ///
    /// # Panics
    /// No block is left: the plan has one for every position of every sequence.
    fn plan(&mut self) {
        let EngineBuffers { sequences, tables, generated, pending, shares, rows, ledger, prefix, .. } =
            &mut self.buffers;
        pending.clear();
        pending.extend(sequences.iter().zip(generated.iter()).map(|(sequence, generated)| {
            let sequence = sequence.as_ref()?;
            if sequence.job.mask.as_ref().is_some_and(|mask| !mask.is_for(generated.len())) {
                // The I/O thread is still at it; others go on.
                return None;
            }
            let left = sequence.job.prompt.len().saturating_sub(sequence.cached);
            let peer = sequence.job.peer;
            Some(Pending { tokens: left.max(1), age: sequence.age, peer, spent: ledger.spent(peer) })
        }));
        let beside_decode = self.pace.prefill_rows(self.limits.max_rows);
        scheduler::plan(pending, StepLimits { beside_decode, ..self.limits }, shares);
        rows.clear();
        for share in shares {
            let Some(state) = &sequences[share.sequence] else { continue };
            let table = &mut tables[share.sequence];
            while table.blocks().len() < blocks_for(state.cached + share.rows) {
                let block = prefix.take(&mut self.cache);
                assert!(block.is_some(), "KV blocks: {:?}", prefix.counts(&self.cache));
                table.push(block.unwrap_or_default());
            }
            rows.extend((state.cached..state.cached + share.rows).map(|position| BatchRow {
                token: token_at(&state.job.prompt, &generated[share.sequence], position),
                sequence: share.sequence,
                position,
                logits: share.last && state.job.embed.is_none() && position + 1 == state.cached + share.rows,
            }));
        }
    }

    fn is_embedding(&self, slot: usize) -> bool {
        self.buffers.sequences[slot].as_ref().is_some_and(|sequence| sequence.job.embed.is_some())
    }

    /// Takes the share's rows, the step's from `first_row` on, into its job's embedding, where it is one.
    fn embed(&mut self, share: Share, first_row: usize) {
        let EngineBuffers { sequences, rows, hidden, .. } = &mut self.buffers;
        let Some(sequence) = &mut sequences[share.sequence] else { return };
        let tokens = sequence.job.prompt.len();
        let Some(embed) = &mut sequence.job.embed else { return };
        for row in first_row..first_row + share.rows {
            if embed.wants(rows[row].position, tokens) {
                hidden_state(self.model, self.kernels, &self.scratch, rows.len(), row, hidden);
                embed.add(hidden);
            }
        }
    }

    fn end_embedding(&mut self, slot: usize, emit: &mut dyn FnMut(Event)) {
        if let Some(sequence) = &self.buffers.sequences[slot] {
            emit(Event::Begun { id: sequence.job.id, cached_tokens: 0 });
        }
        self.finish(slot, FinishReason::Stop, emit);
    }

    /// Chooses the next token of a sequence from the step's `output`-th row of logits.
    fn sample(&mut self, slot: usize, output: usize, emit: &mut dyn FnMut(Event)) {
        let EngineBuffers { sequences, generated, logits, sampler, .. } = &mut self.buffers;
        let Some(sequence) = &mut sequences[slot] else { return };
        let generated = &mut generated[slot];
        if generated.is_empty() {
            emit(Event::Begun { id: sequence.job.id, cached_tokens: sequence.reused });
        }
        if sequence.job.max_tokens == 0 {
            return self.finish(slot, FinishReason::Length, emit);
        }
        self.scratch.copy_logits(output, logits);
        if let Some(hash) = &mut sequence.hash {
            update_hash(hash, logits);
        }
        let job = &sequence.job;
        if let Some(mask) = &job.mask {
            mask.apply(logits);
        }
        let chosen = sampler.sample(&job.sampling, &mut sequence.mirostat, &job.prompt, generated, logits);
        let Some(token) = chosen else {
            return self.finish(slot, FinishReason::NonFinite, emit);
        };
        if !sequence.job.ignore_eos && self.eog.binary_search(&token).is_ok() {
            return self.finish(slot, FinishReason::Stop, emit);
        }
        generated.push(token);
        let logits_hash = sequence.hash.as_ref().map(Xxh3::digest);
        let logprobs = sequence.job.logprobs.map(|count| {
            // The sampler has changed the row.
            self.scratch.copy_logits(output, logits);
            sampler::logprobs(logits, token, count)
        });
        emit(Event::Token { id: sequence.job.id, token, logits_hash, logprobs });
        let positions = sequence.job.prompt.len() + generated.len();
        if generated.len() >= sequence.job.max_tokens || positions >= self.capacity.ctx {
            self.finish(slot, FinishReason::Length, emit);
        }
    }

    fn finish(&mut self, slot: usize, reason: FinishReason, emit: &mut dyn FnMut(Event)) {
        let Some(sequence) = self.buffers.sequences[slot].take() else { return };
        self.buffers.prefix.release(&mut self.cache, &mut self.buffers.tables[slot]);
        self.buffers.ledger.leave(sequence.job.peer);
        let completion_tokens = self.buffers.generated[slot].len();
        let logits_hash = sequence.hash.map(|hash| hash.digest());
        emit(Event::Finished { job: sequence.job, reason, completion_tokens, logits_hash });
    }
}

/// A sequence's token at a position.
fn token_at(prompt: &[TokenId], generated: &[TokenId], position: usize) -> TokenId {
    prompt.get(position).copied().unwrap_or_else(|| generated[position - prompt.len()])
}

/// Events of a sequence in one step at most: it begins, has a token, and ends.
pub const EVENTS_A_SEQUENCE: usize = 3;
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
