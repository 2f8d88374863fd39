//! The two bounded rings between the I/O thread and the engine thread. Token ids cross here, text never does.
//!
//! I/O thread: [`EngineLink`] submits jobs and drains events. Engine thread: [`EngineEnd`] takes jobs and emits events.
//! Each side wakes the other: the engine is parked (`std::thread::park`), the I/O thread sleeps in epoll on an eventfd.
//! A job's heap memory is made by the I/O thread and goes back to it in [`Event::Finished`]: the engine frees nothing.
//! A side that goes away without a word, by a panic, is noticed by the other, which ends too.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;

use heapless::spsc::{Consumer, Producer, Queue};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::sampler::SamplingParams;
use crate::text::TokenId;

/// Jobs that may wait between the I/O thread and the engine (ring slots; one stays empty).
pub const COMMAND_RING_SLOTS: usize = 33;
/// Events that may wait between the engine and the I/O thread (ring slots; one stays empty).
pub const EVENT_RING_SLOTS: usize = 1025;

/// Names one request for the life of the process.
pub type RequestId = u64;

/// One request, as the engine sees it.
#[derive(Debug)]
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
    /// Set by the I/O thread when the client has gone or a stop string was found.
    pub cancel: Arc<AtomicBool>,
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
}

/// What the engine tells the I/O thread.
#[derive(Debug)]
pub enum Event {
    /// One generated token.
    Token {
        /// The job it belongs to.
        id: RequestId,
        /// The token.
        token: TokenId,
        /// As in [`Event::Finished`], up to and with this token's step: what the hash is if the answer ends here.
        logits_hash: Option<u64>,
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

/// Shared wake-up of the I/O thread, the request to stop, and who is gone.
#[derive(Debug)]
struct Bell {
    io: EventFd,
    shutdown: AtomicBool,
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
            io_gone: AtomicBool::new(false),
            engine_gone: AtomicBool::new(false),
        });
        let (command_tx, command_rx) = self.commands.split();
        let (event_tx, event_rx) = self.events.split();
        Ok((
            EngineEnd { commands: command_rx, events: event_tx, bell: Arc::clone(&bell) },
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
    /// The ring is full: the job comes back; answer 429 / `busy`.
    pub fn submit(&mut self, job: Box<Job>) -> Result<(), Box<Job>> {
        self.commands.enqueue(job)?;
        self.engine.unpark();
        Ok(())
    }

    /// Jobs handed over that the engine has not taken yet.
    pub fn waiting(&self) -> usize {
        self.commands.len()
    }

    /// The next event, if there is one. Clears the eventfd first, so that no wake-up is lost.
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

    /// Wakes the engine after a job's `cancel` was set.
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
    events: Producer<'r, Event>,
    bell: Arc<Bell>,
}

impl EngineEnd<'_> {
    /// The next job, if one waits.
    pub fn next_job(&mut self) -> Option<Box<Job>> {
        self.commands.dequeue()
    }

    /// Events that fit before the ring is full.
    pub fn event_room(&self) -> usize {
        self.events.capacity() - self.events.len()
    }

    /// Emits one event.
    ///
    /// # Errors
    /// The ring is full and the event comes back; check [`EngineEnd::event_room`] before a step.
    pub fn emit(&mut self, event: Event) -> Result<(), Event> {
        self.events.enqueue(event)
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
