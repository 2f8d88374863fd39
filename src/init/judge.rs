//! When `hearth serve` is started, killed, and given up, from what is known of it alone: no process, no clock of its own.
//! `init::supervise` carries out what it says.
//!
//! ```text
//!            rest is over        it is ready
//!  Resting ──────────────> Loading ────────> Serving
//!     ^  too many in a row     │ too long        │ no step for 3 s while work waits, no word for 3 s
//!     │  └──> give up          v                 v
//!     └────────────────────── Killed <───────────┘     (and from each of them when it ends by itself)
//! ```

use std::time::{Duration, Instant};

/// Serve is killed where the engine makes no step for so long while work waits, or where no word comes.
pub const STALL_LIMIT: Duration = Duration::from_secs(3);
/// Serve may take this long from its start until it is ready: a model of 8 GB from a card that gives 10 MB/s.
pub const LOAD_LIMIT: Duration = Duration::from_secs(15 * 60);
/// A process that was killed is gone by then, or stuck in the kernel: then the watchdog is no longer fed.
pub const KILL_LIMIT: Duration = Duration::from_secs(5);
/// The first rest before serve is started again; it doubles up to [`MAX_REST`].
pub const MIN_REST: Duration = Duration::from_millis(250);
/// The longest rest.
pub const MAX_REST: Duration = Duration::from_secs(4);
/// The rest after serve refused to start: its model or its settings are wrong, and only a person mends that.
pub const REFUSED_REST: Duration = Duration::from_secs(30);
/// So many ends in a row without an answer in between, and the machine is started again.
pub const GIVE_UP_AFTER: u32 = 8;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start serve.
    Start,
    /// Kill it with SIGKILL.
    Kill(Reason),
    /// Start the machine again.
    GiveUp,
}

/// Why serve is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Work waits and the engine makes no step.
    #[error("no step for {} s while work waits", STALL_LIMIT.as_secs())]
    Stalled,
    /// Its I/O thread says nothing.
    #[error("no sign of life for {} s", STALL_LIMIT.as_secs())]
    Silent,
    /// It does not become ready.
    #[error("not ready after {} s", LOAD_LIMIT.as_secs())]
    Loading,
}

/// How serve ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an exit code that says that the model or a setting will not do.
    Refused,
    /// Any other way.
    Failed,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Resting { until: Instant },
    Loading { since: Instant },
    Serving { heard: Instant, advanced: Instant, operations: u64 },
    Killed { since: Instant },
}

/// What is known of serve, and what follows from it.
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    phase: Phase,
    /// Ends in a row with no answer in between.
    failures: u32,
}

impl Judge {
    /// Nothing was started yet.
    pub fn new(now: Instant) -> Self {
        Self { phase: Phase::Resting { until: now }, failures: 0 }
    }

    /// What is due.
    pub fn action(&self, now: Instant) -> Option<Action> {
        let over = |since: Instant, limit| now.duration_since(since) >= limit;
        match self.phase {
            Phase::Resting { .. } if self.failures >= GIVE_UP_AFTER => Some(Action::GiveUp),
            Phase::Resting { until } => (now >= until).then_some(Action::Start),
            Phase::Loading { since } => over(since, LOAD_LIMIT).then_some(Action::Kill(Reason::Loading)),
            Phase::Serving { heard, .. } if over(heard, STALL_LIMIT) => Some(Action::Kill(Reason::Silent)),
            Phase::Serving { advanced, .. } => over(advanced, STALL_LIMIT).then_some(Action::Kill(Reason::Stalled)),
            Phase::Killed { .. } => None,
        }
    }

    /// Whether the hardware watchdog may be fed.
    pub fn is_healthy(&self, now: Instant) -> bool {
        match self.phase {
            Phase::Killed { since } => now.duration_since(since) < KILL_LIMIT,
            _ => !matches!(self.action(now), Some(Action::Kill(_))),
        }
    }

    /// Whether serve speaks on the console.
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving { .. })
    }

    /// Serve was started.
    pub fn started(&mut self, now: Instant) {
        self.phase = Phase::Loading { since: now };
    }

    /// Serve takes requests.
    pub fn ready(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Loading { .. }) {
            self.phase = Phase::Serving { heard: now, advanced: now, operations: 0 };
        }
    }

    /// Serve says how far it is: having nothing to do is as good as a step.
    pub fn beat(&mut self, now: Instant, seen: u64, busy: bool) {
        let Phase::Serving { heard, advanced, operations } = &mut self.phase else { return };
        *heard = now;
        if !busy || seen != *operations {
            *advanced = now;
        }
        *operations = seen;
        if !busy && seen > 0 {
            // It has worked something off since it was started.
            self.failures = 0;
        }
    }

    /// The one who judges was away itself for `time`, because the machine stood still or had no core for it: nobody is blamed for that.
    pub fn forgive(&mut self, time: Duration) {
        match &mut self.phase {
            Phase::Serving { heard, advanced, .. } => {
                *heard += time;
                *advanced += time;
            }
            Phase::Loading { since } | Phase::Killed { since } => *since += time,
            Phase::Resting { .. } => {}
        }
    }

    /// SIGKILL was sent.
    pub fn killed(&mut self, now: Instant) {
        self.phase = Phase::Killed { since: now };
    }

    /// Serve is gone; the rest before the next start.
    pub fn ended(&mut self, now: Instant, end: End) -> Duration {
        let refused = end == End::Refused && matches!(self.phase, Phase::Loading { .. });
        let rest = if refused {
            REFUSED_REST
        } else {
            let rest = MIN_REST.saturating_mul(1 << self.failures.min(GIVE_UP_AFTER)).min(MAX_REST);
            self.failures = self.failures.saturating_add(1);
            rest
        };
        self.phase = Phase::Resting { until: now + rest };
        rest
    }

    /// The next start is due at once: there is something else to try.
    pub fn try_now(&mut self, now: Instant) {
        if let Phase::Resting { until } = &mut self.phase {
            *until = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const STEP: Duration = Duration::from_millis(500);

    fn serving(now: Instant) -> Judge {
        let mut judge = Judge::new(now);
        assert_eq!(judge.action(now), Some(Action::Start));
        judge.started(now);
        judge.ready(now);
        judge
    }

    #[test]
    fn an_idle_engine_lives_and_one_that_stands_still_under_work_is_killed() {
        let mut now = Instant::now();
        let mut judge = serving(now);
        for _ in 0..100 {
            now += STEP;
            judge.beat(now, 7, false);
            assert_eq!((judge.action(now), judge.is_healthy(now)), (None, true));
        }
        for operations in 8..108 {
            now += STEP;
            judge.beat(now, operations, true);
            assert_eq!(judge.action(now), None);
        }
        let stood = now;
        while now < stood + STALL_LIMIT - STEP {
            now += STEP;
            judge.beat(now, 107, true);
            assert_eq!((judge.action(now), judge.is_healthy(now)), (None, true));
        }
        now += STEP;
        judge.beat(now, 107, true);
        assert_eq!(judge.action(now), Some(Action::Kill(Reason::Stalled)));
        assert!(!judge.is_healthy(now), "the watchdog is not fed for a hung engine");
    }

    #[test]
    fn silence_is_a_hang_whatever_was_said_last() {
        let now = Instant::now();
        let mut judge = serving(now);
        judge.beat(now, 1, false);
        assert_eq!(judge.action(now + STALL_LIMIT - MS), None);
        assert_eq!(judge.action(now + STALL_LIMIT), Some(Action::Kill(Reason::Silent)));
        // What is killed and does not go lies in the kernel, and only the watchdog helps.
        judge.killed(now);
        assert_eq!((judge.action(now + STALL_LIMIT), judge.is_healthy(now + KILL_LIMIT - MS)), (None, true));
        assert!(!judge.is_healthy(now + KILL_LIMIT));
    }

    #[test]
    fn time_in_which_nobody_ran_counts_for_nothing() {
        let now = Instant::now();
        let mut judge = serving(now);
        judge.beat(now, 1, true);
        judge.forgive(Duration::from_secs(60));
        let later = now + Duration::from_secs(60);
        assert_eq!(judge.action(later + STALL_LIMIT - MS), None);
        assert_eq!(judge.action(later + STALL_LIMIT), Some(Action::Kill(Reason::Silent)));
    }

    #[test]
    fn loading_has_its_limit() {
        let now = Instant::now();
        let mut judge = Judge::new(now);
        judge.started(now);
        assert_eq!((judge.action(now + LOAD_LIMIT - MS), judge.is_healthy(now + LOAD_LIMIT - MS)), (None, true));
        assert_eq!(judge.action(now + LOAD_LIMIT), Some(Action::Kill(Reason::Loading)));
    }

    #[test]
    fn rests_grow_and_too_many_failures_start_the_machine_again() {
        let now = Instant::now();
        let mut judge = Judge::new(now);
        let mut rests = Vec::new();
        for _ in 0..GIVE_UP_AFTER {
            assert_eq!(judge.action(now + MAX_REST), Some(Action::Start));
            judge.started(now);
            judge.ready(now);
            rests.push(judge.ended(now, End::Failed).as_millis());
        }
        assert_eq!(rests, [250, 500, 1000, 2000, 4000, 4000, 4000, 4000]);
        assert_eq!(judge.action(now), Some(Action::GiveUp));
    }

    #[test]
    fn an_answer_in_between_forgives() {
        let now = Instant::now();
        let mut judge = Judge::new(now);
        for _ in 0..10 * GIVE_UP_AFTER {
            judge.started(now);
            judge.ready(now);
            judge.beat(now, 500, true);
            judge.beat(now, 900, false);
            assert_eq!(judge.ended(now, End::Failed), MIN_REST);
        }
    }

    #[test]
    fn a_refused_model_is_tried_again_slowly_and_for_ever() {
        let mut now = Instant::now();
        let mut judge = Judge::new(now);
        for _ in 0..10 * GIVE_UP_AFTER {
            judge.started(now);
            let rest = judge.ended(now, End::Refused);
            assert_eq!((rest, judge.action(now), judge.is_healthy(now)), (REFUSED_REST, None, true));
            now += rest;
            assert_eq!(judge.action(now), Some(Action::Start));
        }
        judge.started(now);
        judge.ended(now, End::Refused);
        judge.try_now(now);
        assert_eq!(judge.action(now), Some(Action::Start));
    }
}
