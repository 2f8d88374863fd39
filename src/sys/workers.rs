//! A fork-join pool of pinned threads: one operation is cut into chunks of one output slice, each chunk is computed once.
//!
//! The caller is worker 0. Chunks are dealt out as one contiguous range a worker, so that in decode each thread streams one slab
//! of weights; a worker that is done helps the others, chunk by chunk, so a core taken by another process costs its share only.
//! Between operations a worker spins for [`SPIN`], then parks. Which worker computes a chunk never changes a result:
//! a chunk's value depends on its index alone.
//! Called by `model::forward`; next on the data's way: `kernels`.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::sys::cpu;

/// Most threads a pool may have.
pub const MAX_THREADS: usize = 64;
/// Stack of one worker thread, in bytes. Kernels keep a few KiB there.
pub const WORKER_STACK_BYTES: usize = 256 * 1024;
/// How long a thread spins for the next operation before it parks.
pub const SPIN: Duration = Duration::from_micros(30);
/// Polls between two looks at the clock while spinning.
const POLLS_PER_LOOK: u32 = 32;

/// The pool. `&mut` everywhere: one operation at a time.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// The core for the caller's thread.
    first_cpu: usize,
}

impl Workers {
    /// Starts `threads - 1` threads beside the caller's, pinned round-robin to the cores this process may use, from the second on:
    /// the first is the caller's, see [`Workers::pin_caller`].
    ///
    /// # Errors
    /// The kernel refused a thread.
    pub fn new(threads: usize) -> Result<Self, std::io::Error> {
        let threads = threads.clamp(1, MAX_THREADS);
        let cpus = cpu::allowed_cpus();
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            caller_parked: AtomicBool::new(false),
            caller: UnsafeCell::new(std::thread::current()),
            task: UnsafeCell::new(MaybeUninit::uninit()),
            slots: (0..threads).map(|_| Slot::default()).collect(),
        });
        let mut pool = Self { shared, threads: Vec::with_capacity(threads), first_cpu: cpus[0] };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let cpu = cpus[worker % cpus.len()];
            let handle = std::thread::Builder::new().name(format!("w{worker}")).stack_size(WORKER_STACK_BYTES).spawn(
                move || {
                    cpu::pin_current_thread(cpu);
                    shared.serve(worker);
                },
            )?;
            pool.threads.push((handle.thread().clone(), Some(handle)));
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

    /// Computes `out` in chunks of `chunk_len` (the last may be shorter). Every worker that gets a chunk calls `start` once with
    /// its own `scratch` entry, then `body(scratch, index, chunk)` for each of its chunks.
    ///
    /// # Panics
    /// `scratch` has fewer entries than the pool has threads, `chunk_len` is 0, or `start` or `body` panicked on any thread.
    pub fn chunks<T: Send, S: Send>(
        &mut self,
        scratch: &mut [S],
        out: &mut [T],
        chunk_len: usize,
        start: impl Fn(&mut S) + Sync,
        body: impl Fn(&mut S, usize, &mut [T]) + Sync,
    ) {
        assert!(scratch.len() >= self.threads(), "one scratch entry a worker");
        assert!(chunk_len > 0, "chunks of at least one element");
        let chunks = out.len().div_ceil(chunk_len);
        if self.threads() == 1 || chunks <= 1 {
            if chunks > 0 {
                start(&mut scratch[0]);
            }
            for (index, chunk) in out.chunks_mut(chunk_len).enumerate() {
                body(&mut scratch[0], index, chunk);
            }
            return;
        }
        let len = out.len();
        let out = Shareable(out.as_mut_ptr());
        let scratch = Shareable(scratch.as_mut_ptr());
        self.fork_join(chunks, &|worker: usize, next: &mut dyn FnMut() -> Option<usize>| {
            let Some(mut index) = next() else { return };
            // SAFETY: `worker` is below `threads()`, which `scratch` was checked against, and no two threads run as the same
            // worker; `fork_join` returns only when every worker has left this closure, so the borrow outlives the use.
            let scratch = unsafe { &mut *scratch.get().add(worker) };
            start(scratch);
            loop {
                let first = index * chunk_len;
                // SAFETY: `index < chunks`, so `first < len`; `next` hands each index to one worker only, and the ranges of
                // different indices do not overlap. The borrow ends before `fork_join` returns, as above.
                let chunk = unsafe { std::slice::from_raw_parts_mut(out.get().add(first), chunk_len.min(len - first)) };
                body(scratch, index, chunk);
                match next() {
                    Some(another) => index = another,
                    None => return,
                }
            }
        });
    }

    /// Runs `task` once on every worker; returns when all have finished.
    fn fork_join(&mut self, chunks: usize, task: &Task<'_>) {
        let workers = self.threads();
        for (worker, slot) in self.shared.slots.iter().enumerate() {
            slot.next.store(chunks * worker / workers, Ordering::Relaxed);
            slot.end.store(chunks * (worker + 1) / workers, Ordering::Relaxed);
        }
        let shared = &*self.shared;
        // SAFETY: no worker reads `task` or `caller` before the epoch changes below, and none is still in the last operation
        // (`join` waited for that): this thread alone has access. The lifetime is erased; `Join` below ends every use of the
        // pointer before this function returns or unwinds.
        unsafe {
            let erased: *const Task<'static> =
                std::mem::transmute::<*const Task<'_>, *const Task<'static>>(std::ptr::from_ref(task));
            (*shared.task.get()).write(erased);
            *shared.caller.get() = std::thread::current();
        }
        shared.running.store(workers - 1, Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (slot, (thread, _)) in shared.slots[1..].iter().zip(&self.threads) {
            if slot.parked.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let join = Join(shared);
        task(0, &mut || shared.claim(0));
        drop(join);
        assert!(!shared.panicked.swap(false, Ordering::AcqRel), "a worker thread panicked");
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (thread, handle) in &mut self.threads {
            thread.unpark();
            if let Some(handle) = handle.take() {
                // A worker's panic was already reported by the operation it happened in.
                let _ = handle.join();
            }
        }
    }
}

/// One operation: called with the worker's number and a source of chunk indices.
type Task<'a> = dyn Fn(usize, &mut dyn FnMut() -> Option<usize>) + Sync + 'a;

struct Shared {
    /// Counts operations; a change is the signal to begin.
    epoch: AtomicU32,
    /// Workers that have not finished the current operation.
    running: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    caller_parked: AtomicBool,
    /// Invariant: written only between operations, by the thread that holds `&mut Workers`.
    caller: UnsafeCell<Thread>,
    /// Invariant: as `caller`; valid from an epoch's change until `running` is 0 again.
    task: UnsafeCell<MaybeUninit<*const Task<'static>>>,
    slots: Box<[Slot]>,
}

// SAFETY: the two cells are written by the caller between operations and read by workers during one; the epoch's SeqCst change
// orders the writes before the reads, and `running` reaching 0 (AcqRel) orders the reads before the next write.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer inside is only ever to a `Sync` closure.
unsafe impl Send for Shared {}

/// One worker's range of chunks, on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Slot {
    next: AtomicUsize,
    end: AtomicUsize,
    parked: AtomicBool,
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
        let mut seen = 0;
        loop {
            seen = self.next_epoch(worker, seen);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: the epoch changed, so `task` was written for this operation and stays valid until `running` is
            // decremented below (`Join` waits for it).
            let task = unsafe { &*(*self.task.get()).assume_init() };
            if catch_unwind(AssertUnwindSafe(|| task(worker, &mut || self.claim(worker)))).is_err() {
                self.panicked.store(true, Ordering::Release);
            }
            // SAFETY: `caller` is not written before `running` is 0, that is before the next line.
            let caller = unsafe { (*self.caller.get()).clone() };
            if self.running.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_parked.load(Ordering::SeqCst) {
                caller.unpark();
            }
        }
    }

    /// Waits for the operation after `seen`: spins first, then parks.
    fn next_epoch(&self, worker: usize, seen: u32) -> u32 {
        let changed = || {
            let epoch = self.epoch.load(Ordering::SeqCst);
            (epoch != seen).then_some(epoch)
        };
        if let Some(epoch) = spin_for(changed) {
            return epoch;
        }
        let parked = &self.slots[worker].parked;
        parked.store(true, Ordering::SeqCst);
        before_parking();
        let epoch = loop {
            match changed() {
                Some(epoch) => break epoch,
                None => std::thread::park(),
            }
        };
        parked.store(false, Ordering::SeqCst);
        epoch
    }

    /// Waits until every worker has left the operation.
    fn join(&self) {
        let done = || (self.running.load(Ordering::SeqCst) == 0).then_some(());
        if spin_for(done).is_some() {
            return;
        }
        self.caller_parked.store(true, Ordering::SeqCst);
        before_parking();
        while done().is_none() {
            std::thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }
}

/// Joins even when the caller's own share unwinds: the closure must outlive every worker's use of it.
struct Join<'a>(&'a Shared);

impl Drop for Join<'_> {
    fn drop(&mut self) {
        self.0.join();
    }
}

/// Orders "I am about to park" before the last look at what is waited for. SeqCst asks for that already and the hardware does it
/// (`stlr`, then `ldar`); QEMU on x86 lets the load pass the store there, and the wake-up is lost: tests under emulation hung.
fn before_parking() {
    fence(Ordering::SeqCst);
}

fn spin_for<R>(mut ready: impl FnMut() -> Option<R>) -> Option<R> {
    let mut begun = None;
    loop {
        for _ in 0..POLLS_PER_LOOK {
            if let Some(result) = ready() {
                return Some(result);
            }
            std::hint::spin_loop();
        }
        if begun.get_or_insert_with(Instant::now).elapsed() >= SPIN {
            return None;
        }
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_chunk_is_computed_once_for_any_thread_count() {
        for threads in 1..5 {
            let mut pool = Workers::new(threads).unwrap();
            let mut scratch = vec![0usize; threads];
            for len in [0, 1, 7, 64, 1000] {
                let mut out = vec![0u32; len];
                pool.chunks(
                    &mut scratch,
                    &mut out,
                    3,
                    |_| (),
                    |count, index, chunk| {
                        *count += 1;
                        for (offset, value) in chunk.iter_mut().enumerate() {
                            *value += u32::try_from(index * 3 + offset + 1).unwrap();
                        }
                    },
                );
                assert!(out.iter().enumerate().all(|(i, &value)| value as usize == i + 1));
            }
            let chunks: usize = [0usize, 1, 7, 64, 1000].iter().map(|len| len.div_ceil(3)).sum();
            assert_eq!(scratch.iter().sum::<usize>(), chunks);
        }
    }

    #[test]
    fn thousands_of_operations_with_pauses_do_not_hang() {
        let mut pool = Workers::new(3).unwrap();
        let mut scratch = vec![(); 3];
        let mut out = vec![0u64; 16];
        for round in 0..5000 {
            pool.chunks(&mut scratch, &mut out, 1, |()| (), |(), _, chunk| chunk[0] += 1);
            if round % 500 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(out, vec![5000; 16]);
    }

    /// Pauses as long as a worker spins: the operation begins just as it parks.
    #[test]
    fn an_operation_that_meets_a_parking_worker_wakes_it() {
        let mut pool = Workers::new(2).unwrap();
        pool.pin_caller();
        let mut scratch = vec![(); 2];
        let mut out = vec![0u64; 2];
        for round in 0..20_000u32 {
            pool.chunks(&mut scratch, &mut out, 1, |()| (), |(), _, chunk| chunk[0] += 1);
            let (begun, pause) = (Instant::now(), SPIN * (round % 100) / 75);
            while begun.elapsed() < pause {
                std::hint::spin_loop();
            }
        }
        assert_eq!(out, vec![20_000; 2]);
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Workers::new(2).unwrap();
        let mut scratch = vec![(); 2];
        let mut out = vec![0u8; 64];
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            pool.chunks(&mut scratch, &mut out, 1, |()| (), |(), index, _| assert!(index != 40, "chunk 40"));
        }));
        assert!(panicked.is_err());
        pool.chunks(&mut scratch, &mut out, 1, |()| (), |(), _, chunk| chunk[0] = 9);
        assert_eq!(out, vec![9; 64]);
    }
}
