//! The two bounded rings between the I/O thread and the engine thread. Token ids cross here, text never does.
//!
//! I/O thread: [`EngineLink`] submits jobs and drains events. Engine thread: [`EngineEnd`] takes jobs and emits events.
//! Each side wakes the other: the engine is parked (`std::thread::park`), the I/O thread sleeps in epoll on an eventfd.
//! A job's heap memory is made by the I/O thread and goes back to it in [`Event::Finished`]: the engine frees nothing.
//! A side that goes away without a word, by a panic, is noticed by the other, which ends too.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Thread;

use heapless::Deque;
use heapless::spsc::{Consumer, Producer, Queue};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::embed::Embed;
use super::gauges::{Counted, Gauges, StepReport};
use super::mask::Mask;
use super::prefix::BlockCounts;
use super::sampler::{SamplingParams, TokenLogprobs};
use super::scheduler::{Peer, WAITING_JOBS, next_to_begin};
use crate::text::TokenId;

/// Slots of the ring of jobs; one stays empty.
const COMMAND_RING_SLOTS: usize = WAITING_JOBS + 1;
/// Events that may wait between the engine and the I/O thread (ring slots; one stays empty).
pub const EVENT_RING_SLOTS: usize = 1025;

/// Names one request for the life of the process.
pub type RequestId = u64;

/// One request, as the engine sees it.
#[derive(Debug, Default)]
pub struct Job {
    /// Chosen by the I/O thread, unique for the life of the process.
    pub id: RequestId,
    /// The prompt's tokens; at least one.
    pub prompt: Vec<TokenId>,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// Generation ends after this many tokens (`FinishReason::Length`), or where the context is full.
    pub max_tokens: usize,
    /// Go on past end-of-generation tokens.
    pub ignore_eos: bool,
    /// Hash the logits of every generated step.
    pub logits_hash: bool,
    /// Tell each token's log probability, and those of so many likeliest tokens at its place.
    pub logprobs: Option<usize>,
    /// Set by the I/O thread when the client has gone or a stop string was found.
    pub cancel: Arc<AtomicBool>,
    /// The job wants this filled, and no token: it ends with its prompt ([`FinishReason::Stop`]).
    pub embed: Option<Box<Embed>>,
    /// Which tokens may come next, where a grammar says so; the I/O thread publishes it anew after each token.
    pub mask: Option<Arc<Mask>>,
    /// Who asks: decides whose turn it is, never what the answer is.
    pub peer: Peer,
}

impl Job {
    /// Whether the I/O thread no longer wants this job.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Acquire)
    }
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced an end-of-generation token (it is not emitted).
    Stop,
    /// `max_tokens` were generated, or the context is full.
    Length,
    /// The I/O thread asked for it.
    Cancelled,
    /// The logits were not finite: a damaged model.
    NonFinite,
    /// The engine cannot run the job: its prompt is empty, too long, or not in the vocabulary. The I/O thread checks before it
    /// submits, so this is a defect, and logged as one.
    Refused,
}

/// What the engine tells the I/O thread.
#[derive(Debug)]
pub enum Event {
    /// The prompt is in the cache, the first token comes next.
    Begun {
        /// The job.
        id: RequestId,
        /// Tokens of its prompt whose keys and values were there already.
        cached_tokens: usize,
    },
    /// One generated token.
    Token {
        /// The job it belongs to.
        id: RequestId,
        /// The token.
        token: TokenId,
        /// As in [`Event::Finished`], up to and with this token's step: what the hash is if the answer ends here.
        logits_hash: Option<u64>,
        /// Where the job asked for them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The sequence has ended and its memory is free again.
    Finished {
        /// The job, given back to the thread that allocated it.
        job: Box<Job>,
        /// Why it ended.
        reason: FinishReason,
        /// Tokens generated (end-of-generation token not counted).
        completion_tokens: usize,
        /// xxh3-64 over the little-endian f32 logits of every generated step, where the job asked for it.
        logits_hash: Option<u64>,
    },
}

/// The memory of both rings. Lives in the frame that spawns the threads.
#[derive(Debug, Default)]
pub struct Rings {
    commands: Queue<Box<Job>, COMMAND_RING_SLOTS>,
    events: Queue<Event, EVENT_RING_SLOTS>,
}

/// What both threads see beside the rings: the I/O thread's wake-up, the request to stop, how many jobs wait, and who is gone.
#[derive(Debug)]
struct Bell {
    io: EventFd,
    shutdown: AtomicBool,
    /// Jobs submitted and neither begun nor given back.
    waiting: AtomicUsize,
    /// Free, used and cached KV blocks, of one step or of two that follow one another.
    kv_blocks: [AtomicUsize; 3],
    gauges: Gauges,
    io_gone: AtomicBool,
    engine_gone: AtomicBool,
}

impl Rings {
    /// Two empty rings.
    pub fn new() -> Self {
        Self { commands: Queue::new(), events: Queue::new() }
    }

    /// Splits the rings into the engine's end and a link that becomes usable once the engine thread exists.
    ///
    /// # Errors
    /// The kernel refused an eventfd.
    pub fn split(&mut self) -> Result<(EngineEnd<'_>, UnboundLink<'_>), nix::Error> {
        let bell = Arc::new(Bell {
            io: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            shutdown: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            kv_blocks: Default::default(),
            gauges: Gauges::default(),
            io_gone: AtomicBool::new(false),
            engine_gone: AtomicBool::new(false),
        });
        let (command_tx, command_rx) = self.commands.split();
        let (event_tx, event_rx) = self.events.split();
        Ok((
            EngineEnd { commands: command_rx, line: Deque::new(), events: event_tx, bell: Arc::clone(&bell) },
            UnboundLink { commands: command_tx, events: event_rx, bell },
        ))
    }
}

/// The I/O side before the engine thread was spawned.
pub struct UnboundLink<'r> {
    commands: Producer<'r, Box<Job>>,
    events: Consumer<'r, Event>,
    bell: Arc<Bell>,
}

impl<'r> UnboundLink<'r> {
    /// Binds the link to the thread that is to be unparked.
    pub fn bind(self, engine: Thread) -> EngineLink<'r> {
        EngineLink { commands: self.commands, events: self.events, bell: self.bell, engine }
    }
}

/// The I/O thread's side.
pub struct EngineLink<'r> {
    commands: Producer<'r, Box<Job>>,
    events: Consumer<'r, Event>,
    bell: Arc<Bell>,
    engine: Thread,
}

impl EngineLink<'_> {
    /// Hands a job to the engine.
    ///
    /// # Errors
    /// [`WAITING_JOBS`] wait already: the job comes back; answer 429 / `busy`.
    pub fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        // The engine only lowers the count, so what is seen here is no smaller than the truth.
        if self.waiting() >= WAITING_JOBS {
            return Err(job);
        }
        self.bell.waiting.fetch_add(1, Ordering::Relaxed);
        // The count leaves a free slot in the ring.
        self.commands.enqueue(job)?;
        self.engine.unpark();
        Ok(())
    }

    /// Jobs handed over that have not begun.
    pub fn waiting(&self) -> usize {
        self.bell.waiting.load(Ordering::Relaxed)
    }

    /// Where the KV blocks were after the engine's last step.
    pub fn kv_blocks(&self) -> BlockCounts {
        let [free, used, cached] = std::array::from_fn(|at| self.bell.kv_blocks[at].load(Ordering::Relaxed));
        BlockCounts { free, used, cached }
    }

    /// What the engine's steps came to.
    pub fn counted(&self) -> Counted {
        self.bell.gauges.read()
    }

    /// The next event, if there is one. Call [`EngineLink::clear`] before the first of a round, so that no wake-up is lost.
    pub fn next_event(&mut self) -> Option<Event> {
        let event = self.events.dequeue();
        if event.is_some() {
            self.engine.unpark();
        }
        event
    }

    /// Readable when events may be waiting. Call [`EngineLink::clear`], then drain with [`EngineLink::next_event`].
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.bell.io.as_fd()
    }

    /// Resets the eventfd; call it before draining.
    pub fn clear(&self) {
        let _ = self.bell.io.read();
    }

    /// Wakes the engine after a job's `cancel` was set, or its mask published.
    pub fn nudge(&self) {
        self.engine.unpark();
    }

    /// Tells the engine to stop once it has no sequence left.
    pub fn shutdown(&self) {
        self.bell.shutdown.store(true, Ordering::Release);
        self.engine.unpark();
    }

    /// Whether the engine's thread has ended: no event comes after those that are in the ring now.
    pub fn engine_gone(&self) -> bool {
        self.bell.engine_gone.load(Ordering::Acquire)
    }
}

impl Drop for EngineLink<'_> {
    /// Nobody takes events any more: the engine ends after its step.
    fn drop(&mut self) {
        self.bell.io_gone.store(true, Ordering::Release);
        self.shutdown();
    }
}

/// The engine thread's side.
pub struct EngineEnd<'r> {
    commands: Consumer<'r, Box<Job>>,
    /// Jobs taken from the ring that wait for a sequence, oldest first.
    line: Deque<Box<Job>, WAITING_JOBS>,
    events: Producer<'r, Event>,
    bell: Arc<Bell>,
}

impl EngineEnd<'_> {
    /// The oldest waiting job.
    pub fn next_job(&mut self) -> Option<Box<Job>> {
        self.collect();
        let job = self.line.pop_front()?;
        self.bell.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(job)
    }

    /// The waiting job whose turn it is, where each peer has so many running; see [`next_to_begin`].
    pub fn next_fair_job(&mut self, running: impl Fn(u64) -> usize) -> Option<Box<Job>> {
        self.collect();
        let turn = next_to_begin(self.line.iter().map(|job| job.peer), running)?;
        let mut found = None;
        for place in 0..self.line.len() {
            let Some(job) = self.line.pop_front() else { break };
            if place == turn {
                found = Some(job);
            } else {
                // As many went in as came out.
                let _ = self.line.push_back(job);
            }
        }
        self.bell.waiting.fetch_sub(usize::from(found.is_some()), Ordering::Relaxed);
        found
    }

    /// The oldest waiting job that is no longer wanted: it leaves the line at once, not when its turn comes.
    pub fn next_cancelled(&mut self) -> Option<Box<Job>> {
        self.collect();
        if !self.line.iter().any(|job| job.is_cancelled()) {
            return None;
        }
        let mut found = None;
        for _ in 0..self.line.len() {
            let Some(job) = self.line.pop_front() else { break };
            if found.is_none() && job.is_cancelled() {
                found = Some(job);
            } else {
                // As many went in as came out.
                let _ = self.line.push_back(job);
            }
        }
        self.bell.waiting.fetch_sub(usize::from(found.is_some()), Ordering::Relaxed);
        found
    }

    /// Takes what the I/O thread handed over into the line; `waiting` never lets in more than it holds.
    fn collect(&mut self) {
        while !self.line.is_full() {
            let Some(job) = self.commands.dequeue() else { return };
            let _ = self.line.push_back(job);
        }
    }

    /// Events that fit before the ring is full.
    pub fn event_room(&self) -> usize {
        self.events.capacity() - self.events.len()
    }

    /// Emits one event.
    ///
    /// # Errors
    /// The ring is full and the event comes back; check [`EngineEnd::event_room`] before a step.
    #[expect(clippy::result_large_err, reason = "log probabilities cross the ring without a heap")]
    pub fn emit(&mut self, event: Event) -> Result<(), Event> {
        self.events.enqueue(event)
    }

    /// Says where the KV blocks are, for whoever asks how the daemon does.
    pub fn report(&self, counts: BlockCounts) {
        for (to, count) in self.bell.kv_blocks.iter().zip([counts.free, counts.used, counts.cached]) {
            to.store(count, Ordering::Relaxed);
        }
    }

    /// Counts a step, for whoever asks.
    pub fn count(&self, step: &StepReport) {
        self.bell.gauges.record(step);
    }

    /// Wakes the I/O thread.
    pub fn ring(&self) {
        // A full counter still reads as readable: nothing is lost.
        let _ = self.bell.io.write(1);
    }

    /// Whether the I/O thread asked the engine to stop.
    pub fn stopping(&self) -> bool {
        self.bell.shutdown.load(Ordering::Acquire)
    }

    /// Whether the I/O thread is gone: whatever is under way, nobody waits for it.
    pub fn abandoned(&self) -> bool {
        self.bell.io_gone.load(Ordering::Acquire)
    }
}

impl Drop for EngineEnd<'_> {
    /// Wakes the I/O thread, which would wait for ever for an engine that panicked.
    fn drop(&mut self) {
        self.bell.engine_gone.store(true, Ordering::Release);
        self.ring();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn job(id: RequestId) -> Box<Job> {
        Box::new(Job {
            id,
            prompt: vec![TokenId(0)],
            sampling: SamplingParams::default(),
            max_tokens: 1,
            ..Job::default()
        })
    }

    #[test]
    fn as_many_jobs_wait_as_promised_and_a_cancelled_one_makes_room() {
        let mut rings = Rings::new();
        let (mut end, link) = rings.split().unwrap();
        let mut link = link.bind(std::thread::current());
        let mut cancels = vec![];
        for id in 0..WAITING_JOBS as u64 {
            let job = job(id);
            cancels.push(Arc::clone(&job.cancel));
            link.submit(job).unwrap();
            if id == 10 {
                assert!(end.next_cancelled().is_none(), "some are in the line, some in the ring");
            }
        }
        assert_eq!(link.submit(job(99)).unwrap_err().id, 99);
        cancels[20].store(true, Ordering::Release);
        cancels[3].store(true, Ordering::Release);
        let cancelled: Vec<_> = std::iter::from_fn(|| end.next_cancelled()).map(|job| job.id).collect();
        assert_eq!(cancelled, [3, 20]);
        link.submit(job(100)).unwrap();
        link.submit(job(101)).unwrap();
        assert!(link.submit(job(102)).is_err());
        let order: Vec<_> = std::iter::from_fn(|| end.next_job()).map(|job| job.id).collect();
        let mut expected: Vec<_> = (0..WAITING_JOBS as u64).filter(|id| ![3, 20].contains(id)).collect();
        expected.extend([100, 101]);
        assert_eq!((order, link.waiting()), (expected, 0));
    }

    #[test]
    fn the_peer_with_fewest_running_is_next_and_of_one_peer_the_oldest() {
        let mut rings = Rings::new();
        let (mut end, link) = rings.split().unwrap();
        let mut link = link.bind(std::thread::current());
        for (id, peer) in [(0, 7), (1, 7), (2, 7), (3, 8), (4, 7), (5, 8)] {
            let peer = Peer { id: peer, ..Peer::default() };
            link.submit(Box::new(Job { peer, ..*job(id) })).unwrap();
        }
        let mut running = [0; 9];
        let mut order = vec![];
        while let Some(job) = end.next_fair_job(|peer| running[peer as usize]) {
            running[job.peer.id as usize] += 1;
            order.push(job.id);
        }
        assert_eq!((order, link.waiting()), (vec![0, 3, 1, 5, 2, 4], 0));
    }

    #[test]
    fn events_wait_up_to_the_rings_size_and_ring_the_bell() {
        let mut rings = Rings::new();
        let (mut end, link) = rings.split().unwrap();
        let mut link = link.bind(std::thread::current());
        let event = |id| Event::Token { id, token: TokenId(7), logits_hash: None, logprobs: None };
        let room = end.event_room();
        for id in 0..room as u64 {
            end.emit(event(id)).unwrap();
        }
        assert_eq!((end.event_room(), end.emit(event(0)).is_err()), (0, true));
        let ready = |link: &EngineLink<'_>| {
            let mut fds = [nix::poll::PollFd::new(link.event_fd(), nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut fds, 0u8).unwrap() == 1
        };
        assert!(!ready(&link));
        end.ring();
        assert!(ready(&link));
        link.clear();
        let drained = std::iter::from_fn(|| link.next_event()).count();
        assert_eq!((drained, ready(&link), end.event_room()), (room, false, room));
    }
}
