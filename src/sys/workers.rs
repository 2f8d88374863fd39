//! A fork-join pool of pinned threads: one operation is cut into chunks of one output slice, each chunk is computed once.
//!
//! The caller is worker 0. Chunks are dealt out as one contiguous range a worker, so that in decode each thread streams one slab
//! of weights; a worker that is done helps the others, chunk by chunk. An operation is offered to every worker and taken back from
//! those that did not come, so it waits for nobody who was not there; a worker that kept it waiting (another process has its core)
//! gets no offers for [`BENCH`]. Between operations a worker spins for [`SPIN`], then parks. Which worker computes a chunk never
//! changes a result: a chunk's value depends on its index alone.
//! Called by `model::forward`; next on the data's way: `kernels`.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::sys::cpu;
use crate::sys::sandbox::Sandbox;

/// Most threads a pool may have.
pub const MAX_THREADS: usize = 64;
/// Stack of one worker thread, in bytes. Kernels keep a few KiB there.
pub const WORKER_STACK_BYTES: usize = 256 * 1024;
/// How long a thread spins for the next operation before it parks.
pub const SPIN: Duration = Duration::from_micros(30);
/// A worker that is waited for longer than this, and longer than the caller's own share took, has lost its core.
pub const LATE: Duration = Duration::from_micros(500);
/// How long a worker that lost its core gets no offers: several turns of the kernel's scheduler, so that their cost is rare.
pub const BENCH: Duration = Duration::from_millis(25);
/// Polls between two looks at the clock while spinning. On Arm a poll may rest up to 100 µs.
const POLLS_PER_LOOK: u32 = if cfg!(target_arch = "aarch64") { 1 } else { 32 };

/// The pool. `&mut` everywhere: one operation at a time.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<Worker>,
    /// The core for the caller's thread.
    first_cpu: usize,
    /// Threads that operations are offered to, the caller's included.
    active: usize,
    /// What `active` is for few rows and for many.
    decode_threads: usize,
    prefill_threads: usize,
    operations: Arc<AtomicU64>,
}

/// The pool's view of one worker thread.
struct Worker {
    thread: Thread,
    handle: Option<JoinHandle<()>>,
    /// No offers before this.
    benched_until: Option<Instant>,
}

impl Workers {
    /// [`Workers::confined`] without a sandbox.
    ///
    /// # Errors
    /// The kernel refused a thread.
    pub fn new(threads: usize) -> Result<Self, std::io::Error> {
        Self::confined(threads, None)
    }

    /// Starts `threads - 1` threads beside the caller's, pinned round-robin to the cores this process may use, from the second on:
    /// the first is the caller's, see [`Workers::pin_caller`]. Each gives up what `sandbox` says before it computes anything.
    ///
    /// # Errors
    /// The kernel refused a thread, or its sandbox.
    pub fn confined(threads: usize, sandbox: Option<&Sandbox>) -> Result<Self, std::io::Error> {
        let threads = threads.clamp(1, MAX_THREADS);
        let cpus = cpu::allowed_cpus();
        let shared = Arc::new(Shared {
            panicked: AtomicBool::new(false),
            caller_parked: AtomicBool::new(false),
            caller: UnsafeCell::new(std::thread::current()),
            task: UnsafeCell::new(MaybeUninit::uninit()),
            slots: (0..threads).map(|_| Slot { state: Line(AtomicU32::new(TAKEN)), ..Slot::default() }).collect(),
        });
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(threads),
            first_cpu: cpus[0],
            active: threads,
            decode_threads: threads,
            prefill_threads: threads,
            operations: Arc::default(),
        };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let cpu = cpus[worker % cpus.len()];
            let sandbox = sandbox.cloned();
            let (tell, told) = std::sync::mpsc::sync_channel(1);
            let handle = std::thread::Builder::new().name(format!("w{worker}")).stack_size(WORKER_STACK_BYTES).spawn(
                move || {
                    cpu::pin_current_thread(cpu);
                    let confined = sandbox.as_ref().map_or(Ok(()), Sandbox::confine_computing_thread);
                    drop(sandbox);
                    // Whoever starts the pool waits for this.
                    let _ = tell.send(confined);
                    drop(tell);
                    shared.serve(worker);
                },
            )?;
            pool.threads.push(Worker { thread: handle.thread().clone(), handle: Some(handle), benched_until: None });
            told.recv().map_err(std::io::Error::other)??;
        }
        // A thread that starts takes memory: that is over when the pool is there.
        for worker in 1..threads {
            pool.shared.wait_for_idle(worker);
        }
        Ok(pool)
    }

    /// Pins the calling thread, from which operations are then started, to the core that the workers leave free. A pool of one
    /// thread needs no particular core.
    pub fn pin_caller(&self) {
        if self.threads() > 1 {
            cpu::pin_current_thread(self.first_cpu);
        }
    }

    /// Threads in the pool, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Operations begun so far. Who supervises sees by it that the engine gets on, also in the middle of a long step: a thread that
    /// hangs in a chunk keeps the next operation from beginning.
    pub fn operations(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.operations)
    }

    /// Sets how many of the threads a step of few rows and one of many may use (at least the caller's, at most all): decode is
    /// bound by memory, which fewer threads than cores may keep busy.
    pub fn split(mut self, decode_threads: usize, prefill_threads: usize) -> Self {
        self.decode_threads = decode_threads.clamp(1, self.threads());
        self.prefill_threads = prefill_threads.clamp(1, self.threads());
        self
    }

    /// The operations that follow belong to a step of few rows (decode) or of many (prefill).
    pub fn begin_step(&mut self, few_rows: bool) {
        self.active = if few_rows { self.decode_threads } else { self.prefill_threads };
    }

    /// Computes `out` in chunks of `chunk_len` (the last may be shorter). Every worker that gets a chunk calls `start` once with
    /// its own `scratch` entry, then `body(scratch, index, chunk)` for each of its chunks. A worker that finds no more chunks
    /// calls `idle(worker, of how many)` before it waits for the others.
    ///
    /// # Panics
    /// `scratch` has fewer entries than the pool has threads, `chunk_len` is 0, or `start` or `body` panicked on any thread.
    pub fn chunks<T: Send, S: Send>(
        &mut self,
        scratch: &mut [S],
        out: &mut [T],
        chunk_len: usize,
        idle: impl Fn(usize, usize) + Sync,
        start: impl Fn(&mut S) + Sync,
        body: impl Fn(&mut S, usize, &mut [T]) + Sync,
    ) {
        assert!(scratch.len() >= self.threads(), "one scratch entry a worker");
        assert!(chunk_len > 0, "chunks of at least one element");
        self.operations.fetch_add(1, Ordering::Relaxed);
        let chunks = out.len().div_ceil(chunk_len);
        if self.active == 1 || chunks <= 1 {
            if chunks > 0 {
                start(&mut scratch[0]);
            }
            for (index, chunk) in out.chunks_mut(chunk_len).enumerate() {
                body(&mut scratch[0], index, chunk);
            }
            return;
        }
        let (len, active) = (out.len(), self.active);
        let out = Shareable(out.as_mut_ptr());
        let scratch = Shareable(scratch.as_mut_ptr());
        self.fork_join(chunks, &|worker: usize, claim: &mut dyn FnMut() -> Option<usize>| {
            let Some(mut index) = claim() else { return };
            // SAFETY: `worker` is below `threads()`, which `scratch` was checked against, and no two threads run as the same
            // worker; `fork_join` returns only when every worker has left this closure, so the borrow outlives the use.
            let scratch = unsafe { &mut *scratch.get().add(worker) };
            start(scratch);
            loop {
                let first = index * chunk_len;
                // SAFETY: `index < chunks`, so `first < len`; `claim` hands each index to one worker only, and the ranges of
                // different indices do not overlap. The borrow ends before `fork_join` returns, as above.
                let chunk = unsafe { std::slice::from_raw_parts_mut(out.get().add(first), chunk_len.min(len - first)) };
                body(scratch, index, chunk);
                match claim() {
                    Some(another) => index = another,
                    None => break,
                }
            }
            idle(worker, active);
        });
    }

    /// Runs `task` on this thread and on every worker that comes before all chunks are done; returns when all have left it.
    fn fork_join(&mut self, chunks: usize, task: &Task<'_>) {
        let shared = Arc::clone(&self.shared);
        let on_bench = |worker: &Worker| worker.benched_until.is_some();
        if self.threads.iter().any(on_bench) {
            let now = Instant::now();
            for worker in &mut self.threads {
                worker.benched_until = worker.benched_until.filter(|&until| now < until);
            }
        }
        // A range for each thread that takes part, in order; none for the others.
        let helpers = self.active - 1;
        let part_takers = 1 + self.threads[..helpers].iter().filter(|worker| !on_bench(worker)).count();
        let mut dealt = 0;
        for (number, slot) in shared.slots.iter().enumerate() {
            let takes_part = number == 0 || (number <= helpers && !on_bench(&self.threads[number - 1]));
            slot.next.store(chunks * dealt / part_takers, Ordering::Relaxed);
            dealt += usize::from(takes_part);
            slot.end.store(chunks * dealt / part_takers, Ordering::Relaxed);
        }
        // SAFETY: a worker reads `task` and `caller` only between taking an offer and returning it. None is out: the last operation
        // took back or waited for every one of them, so this thread alone has access. The lifetime is erased; `Join` below ends
        // every use of the pointer before this function returns or unwinds.
        unsafe {
            let erased: *const Task<'static> =
                std::mem::transmute::<*const Task<'_>, *const Task<'static>>(std::ptr::from_ref(task));
            (*shared.task.get()).write(erased);
            *shared.caller.get() = std::thread::current();
        }
        shared.panicked.store(false, Ordering::Relaxed);
        for (slot, worker) in shared.slots[1..].iter().zip(&self.threads).take(helpers) {
            if on_bench(worker) {
                continue;
            }
            slot.state.store(OFFERED, Ordering::SeqCst);
            before_looking();
            if slot.parked.load(Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        let join = Join { shared: &shared, workers: &mut self.threads[..helpers], begun: Instant::now() };
        task(0, &mut || shared.claim(0));
        drop(join);
        assert!(!shared.panicked.load(Ordering::Acquire), "a worker thread panicked");
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for (number, worker) in (1..).zip(&mut self.threads) {
            // One that is still starting would go idle after being told to stop.
            self.shared.wait_for_idle(number);
            let slot = &self.shared.slots[number];
            slot.state.store(STOP, Ordering::SeqCst);
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                // A worker's panic was already reported by the operation it happened in.
                let _ = handle.join();
            }
        }
    }
}

/// One operation: called with the worker's number and a source of chunk indices.
type Task<'a> = dyn Fn(usize, &mut dyn FnMut() -> Option<usize>) + Sync + 'a;

struct Shared {
    panicked: AtomicBool,
    caller_parked: AtomicBool,
    /// Invariant: written only while no offer is out, by the thread that holds `&mut Workers`.
    caller: UnsafeCell<Thread>,
    /// Invariant: as `caller`; valid while an offer is out.
    task: UnsafeCell<MaybeUninit<*const Task<'static>>>,
    slots: Box<[Slot]>,
}

// SAFETY: the two cells are written by the caller while no offer is out and read by workers that took one: the SeqCst store of
// `OFFERED` orders the writes before the reads, the SeqCst store of `IDLE` (which `Join` waits for) the reads before the next write.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer inside is only ever to a `Sync` closure.
unsafe impl Send for Shared {}

/// Nothing to do, or done. Only a worker leaves `TAKEN`, only the caller leaves `IDLE`; who leaves `OFFERED` decides a race.
const IDLE: u32 = 0;
/// The caller offers an operation.
const OFFERED: u32 = 1;
/// The worker is in it, or still starting.
const TAKEN: u32 = 2;
/// The pool is being dropped.
const STOP: u32 = 3;

/// One worker's part of the pool: what it polls on one cache line, its range of chunks, which others take from, on the next.
#[derive(Default)]
struct Slot {
    state: Line<AtomicU32>,
    parked: AtomicBool,
    next: Line<AtomicUsize>,
    end: AtomicUsize,
}

/// Begins a cache line (a pair of them: x86 fetches two).
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

impl<T> std::ops::Deref for Line<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl Shared {
    /// The next chunk for `worker`: from its own range first, then from the others'.
    fn claim(&self, worker: usize) -> Option<usize> {
        let workers = self.slots.len();
        (0..workers).find_map(|offset| {
            let slot = &self.slots[(worker + offset) % workers];
            let end = slot.end.load(Ordering::Relaxed);
            if slot.next.load(Ordering::Relaxed) >= end {
                return None;
            }
            let index = slot.next.fetch_add(1, Ordering::Relaxed);
            (index < end).then_some(index)
        })
    }

    /// A worker thread's life.
    fn serve(&self, worker: usize) {
        self.leave(worker);
        let state = &self.slots[worker].state;
        loop {
            self.wait_for_offer(worker);
            if let Err(found) = state.compare_exchange(OFFERED, TAKEN, Ordering::SeqCst, Ordering::SeqCst) {
                if found == STOP {
                    return;
                }
                continue;
            }
            // SAFETY: the offer was taken, so `task` was written for this operation and stays valid until the state is `IDLE`
            // again (`Join` waits for it).
            let task = unsafe { &*(*self.task.get()).assume_init() };
            if catch_unwind(AssertUnwindSafe(|| task(worker, &mut || self.claim(worker)))).is_err() {
                self.panicked.store(true, Ordering::Release);
            }
            self.leave(worker);
        }
    }

    /// Tells the caller that `worker` is out of what it was in.
    fn leave(&self, worker: usize) {
        // SAFETY: `caller` is not written while a worker is in something, that is before the next line.
        let caller = unsafe { (*self.caller.get()).clone() };
        self.slots[worker].state.store(IDLE, Ordering::SeqCst);
        before_looking();
        if self.caller_parked.load(Ordering::SeqCst) {
            caller.unpark();
        }
    }

    /// Waits until the state is not idle: spins first, then parks.
    fn wait_for_offer(&self, worker: usize) {
        let slot = &self.slots[worker];
        if changes(&slot.state, IDLE) {
            return;
        }
        slot.parked.store(true, Ordering::SeqCst);
        before_looking();
        while slot.state.load(Ordering::SeqCst) == IDLE {
            std::thread::park();
        }
        slot.parked.store(false, Ordering::SeqCst);
    }

    /// Waits until `worker` has left the operation.
    fn wait_for_idle(&self, worker: usize) {
        let state = &self.slots[worker].state;
        if changes(state, TAKEN) {
            return;
        }
        self.caller_parked.store(true, Ordering::SeqCst);
        before_looking();
        while state.load(Ordering::SeqCst) == TAKEN {
            std::thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }
}

/// Ends an operation even when the caller's own share unwinds: the closure must outlive every worker's use of it.
struct Join<'a> {
    shared: &'a Shared,
    workers: &'a mut [Worker],
    begun: Instant,
}

impl Drop for Join<'_> {
    fn drop(&mut self) {
        let mut own_share = None;
        for (number, worker) in (1..).zip(&mut *self.workers) {
            let state = &self.shared.slots[number].state;
            let taken_back = state.compare_exchange(OFFERED, IDLE, Ordering::SeqCst, Ordering::SeqCst);
            if taken_back != Err(TAKEN) {
                continue;
            }
            let share = *own_share.get_or_insert_with(|| self.begun.elapsed());
            self.shared.wait_for_idle(number);
            let now = Instant::now();
            if now.duration_since(self.begun).saturating_sub(share) > LATE.max(share) {
                worker.benched_until = Some(now + BENCH);
            }
        }
    }
}

/// Orders a store of one's own flag before the look at the other side's. SeqCst asks for that already and the hardware does it
/// (`stlr`, then `ldar`); QEMU on x86 lets the load pass the store there, a wake-up is lost, and tests under emulation hung.
fn before_looking() {
    fence(Ordering::SeqCst);
}

/// Whether `state` changed from `from` within [`SPIN`].
fn changes(state: &AtomicU32, from: u32) -> bool {
    let mut begun = None;
    loop {
        for _ in 0..POLLS_PER_LOOK {
            if state.load(Ordering::SeqCst) != from {
                return true;
            }
            pause(state, from);
        }
        if begun.get_or_insert_with(Instant::now).elapsed() >= SPIN {
            return false;
        }
    }
}

/// Lets the core rest a moment.
#[cfg(not(target_arch = "aarch64"))]
fn pause(_: &AtomicU32, _: u32) {
    std::hint::spin_loop();
}

/// Lets the core rest until the line of `state` is written, or until the kernel's event stream wakes it (every 100 µs).
#[cfg(target_arch = "aarch64")]
fn pause(state: &AtomicU32, from: u32) {
    // SAFETY: reads an atomic that is borrowed; the exclusive load arms the monitor, whose loss is the event that ends `wfe`, so a
    // store between the two is not slept through.
    unsafe {
        std::arch::asm!(
            "ldaxr {found:w}, [{state}]",
            "cmp {found:w}, {from:w}",
            "b.ne 2f",
            "wfe",
            "2:",
            found = out(reg) _,
            state = in(reg) state.as_ptr(),
            from = in(reg) from,
            options(nostack, readonly),
        );
    }
}

/// A pointer that the closure above may take to other threads.
struct Shareable<T>(*mut T);

// SAFETY: used only in `Workers::chunks`, which hands disjoint parts to the threads; `T: Send` is required there.
unsafe impl<T: Send> Sync for Shareable<T> {}

impl<T> Shareable<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests;
