//! How fast steps are, as measured, so that a prompt's chunk fits the time that running streams can wait.
//! Fed by `engine` after every step; what it says goes to [`super::scheduler::plan`].

use std::time::Duration;

/// How long a step may take while answers stream, where nobody says otherwise, in milliseconds: at least ten tokens a second go
/// out, which is faster than one reads.
pub const DEFAULT_STEP_MS: u64 = 100;
/// Rows of prompts in a step at least, however slow the board: prompts get on, too.
pub const LEAST_PREFILL_ROWS: usize = 4;
/// Rows of prompts in the first step beside streams, before any was measured.
const FIRST_PREFILL_ROWS: usize = 16;
/// Prompts get one part in so many of the budget even where the streams alone take all of it.
const PREFILL_SHARE: u32 = 4;
/// A measurement counts one part in so many; a slower one than expected a half, since a late token is worse than a late prompt.
const SMOOTHING: u64 = 4;

/// What steps cost. Two numbers: a step of streams alone, and a row of a prompt on top.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    budget: Option<Duration>,
    decode_ns: u64,
    row_ns: u64,
}

impl Pace {
    /// `budget`: how long a step may take; `None` sets no limit.
    pub fn new(budget: Option<Duration>) -> Self {
        Self { budget, ..Self::default() }
    }

    /// Rows of prompts that fit a step beside streams; at most `max_rows`.
    pub fn prefill_rows(&self, max_rows: usize) -> usize {
        let Some(budget) = self.budget else { return max_rows };
        if self.row_ns == 0 {
            return FIRST_PREFILL_ROWS.min(max_rows);
        }
        let left = budget.saturating_sub(Duration::from_nanos(self.decode_ns)).max(budget / PREFILL_SHARE);
        let rows = left.as_nanos() / u128::from(self.row_ns);
        usize::try_from(rows).unwrap_or(max_rows).max(LEAST_PREFILL_ROWS).min(max_rows)
    }

    /// A step with so many rows of streams and of prompts took so long.
    pub fn record(&mut self, decode_rows: usize, prefill_rows: usize, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if prefill_rows == 0 {
            self.decode_ns = smoothed(self.decode_ns, took);
            return;
        }
        let decode = if decode_rows > 0 { self.decode_ns.min(took / 2) } else { 0 };
        self.row_ns = smoothed(self.row_ns, ((took - decode) / prefill_rows as u64).max(1));
    }

    /// A prompt's tokens a second, as last measured.
    pub fn prefill_tokens_per_s(&self) -> f64 {
        if self.row_ns == 0 { 0.0 } else { 1e9 / self.row_ns as f64 }
    }
}

fn smoothed(before: u64, now: u64) -> u64 {
    match before {
        0 => now,
        _ if now > before => before + (now - before) / 2,
        _ => before - (before - now) / SMOOTHING,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_fits_what_streams_leave_of_the_budget() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(Some(ms(100)));
        assert_eq!(pace.prefill_rows(128), FIRST_PREFILL_ROWS);
        for _ in 0..50 {
            pace.record(4, 0, ms(20));
            let rows = pace.prefill_rows(128);
            pace.record(4, rows, ms(20) + ms(2) * u32::try_from(rows).unwrap_or(0));
        }
        assert_eq!(pace.prefill_rows(128), 40, "(100 - 20) / 2");
        assert_eq!(pace.prefill_rows(32), 32);
        assert!((pace.prefill_tokens_per_s() - 500.0).abs() < 1.0);
        for _ in 0..50 {
            pace.record(4, 0, ms(400));
        }
        assert_eq!(pace.prefill_rows(128), 12, "a quarter of the budget");
        for _ in 0..50 {
            pace.record(4, 12, ms(5000));
        }
        assert_eq!(pace.prefill_rows(128), LEAST_PREFILL_ROWS);
        assert_eq!(Pace::new(None).prefill_rows(77), 77);
    }
}
