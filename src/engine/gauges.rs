//! What the engine's steps came to, counted where another thread can read it: atomics alone, so that the engine neither waits nor
//! allocates. Written by `engine` after every step; read by `serve::metrics`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the step times that are told apart, in milliseconds; one bucket more takes the rest.
pub const STEP_BUCKETS_MS: [u64; 12] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];
/// Buckets of step times.
pub const STEP_BUCKETS: usize = STEP_BUCKETS_MS.len() + 1;

/// One step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Rows of sequences that generate.
    pub decode_rows: usize,
    /// Rows of prompts.
    pub prefill_rows: usize,
    /// Sequences that took part.
    pub sequences: usize,
    /// How long it took.
    pub took: Duration,
}

/// All steps since the start. One thread writes.
#[derive(Debug, Default)]
pub struct Gauges {
    decode_rows: AtomicU64,
    prefill_rows: AtomicU64,
    last_sequences: AtomicU64,
    step_ns: AtomicU64,
    buckets: [AtomicU64; STEP_BUCKETS],
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Steps.
    pub steps: u64,
    /// Rows of sequences that generate.
    pub decode_rows: u64,
    /// Rows of prompts.
    pub prefill_rows: u64,
    /// Sequences in the last step.
    pub last_sequences: u64,
    /// Nanoseconds of all steps.
    pub step_ns: u64,
    /// Steps that took no longer than [`STEP_BUCKETS_MS`] says and longer than the bound before it.
    pub buckets: [u64; STEP_BUCKETS],
}

impl Gauges {
    /// Counts a step.
    pub fn record(&self, step: &StepReport) {
        // One writer: what it read is what is there.
        let add = |to: &AtomicU64, more: u64| {
            to.store(to.load(Ordering::Relaxed).saturating_add(more), Ordering::Relaxed);
        };
        add(&self.decode_rows, step.decode_rows as u64);
        add(&self.prefill_rows, step.prefill_rows as u64);
        self.last_sequences.store(step.sequences as u64, Ordering::Relaxed);
        add(&self.step_ns, u64::try_from(step.took.as_nanos()).unwrap_or(u64::MAX));
        let is_within = |bound: &u64| step.took <= Duration::from_millis(*bound);
        let bucket = STEP_BUCKETS_MS.iter().position(is_within).unwrap_or(STEP_BUCKETS_MS.len());
        add(&self.buckets[bucket], 1);
    }

    /// What was counted so far; of a step that ends meanwhile a part may be missing.
    pub fn read(&self) -> Counted {
        let get = |from: &AtomicU64| from.load(Ordering::Relaxed);
        let buckets = std::array::from_fn(|at| get(&self.buckets[at]));
        Counted {
            steps: buckets.iter().sum(),
            decode_rows: get(&self.decode_rows),
            prefill_rows: get(&self.prefill_rows),
            last_sequences: get(&self.last_sequences),
            step_ns: get(&self.step_ns),
            buckets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_falls_into_the_bucket_whose_bound_it_does_not_exceed() {
        let gauges = Gauges::default();
        for us in [10, 1000, 1001, 5_000_000, 5_000_001, 60_000_000] {
            let took = Duration::from_micros(us);
            gauges.record(&StepReport { decode_rows: 2, prefill_rows: 16, sequences: 3, took });
        }
        let counted = gauges.read();
        assert_eq!((counted.buckets[0], counted.buckets[1], counted.buckets[11], counted.buckets[12]), (2, 1, 1, 2));
        assert_eq!((counted.steps, counted.decode_rows, counted.prefill_rows, counted.last_sequences), (6, 12, 96, 3));
        assert_eq!(counted.step_ns, 70_002_012_000);
    }
}
