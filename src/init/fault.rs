//! Failures on purpose: `hearth.fault=KIND` on the kernel's command line makes one happen a moment after the first answer could be
//! given, once for each kind and state partition, so that what follows can be watched on a real board as in the tests.
//! `hearth.fault=KIND,KIND…:TIMES` makes serve fail so many times in one run of the board, of each kind in turn, each time after it has
//! answered. Next: what the failure meets, in `init::supervise`, the hardware watchdog or the kernel.

use std::time::{Duration, Instant};

use crate::sys::record::Records;

/// So long after "ready" a failure that happens once does.
pub const AFTER: Duration = Duration::from_secs(2);
/// So long after an answer one that happens again and again does.
pub const AFTER_ANSWER: Duration = Duration::from_millis(500);
/// So often SIGSEGV is sent for a crash, and the time between.
pub const CRASH_SIGNALS: u32 = 5;
/// See [`CRASH_SIGNALS`].
pub const CRASH_SIGNALS_APART: Duration = Duration::from_millis(50);
/// Most failures of one run.
pub const MAX_TIMES: u32 = 10_000;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Serve is killed.
    Kill,
    /// Serve is stopped: its heart beats no more.
    Stop,
    /// Serve crashes: SIGSEGV, as from a wild pointer.
    Crash,
    /// Serve's model file is gone under it: SIGBUS.
    Bus,
    /// PID 1 hangs: the hardware watchdog restarts the board.
    Hang,
    /// PID 1 panics: the kernel restarts the board.
    Panic,
}

const KINDS: [(&str, Fault); 6] = [
    ("kill", Fault::Kill),
    ("stop", Fault::Stop),
    ("crash", Fault::Crash),
    ("bus", Fault::Bus),
    ("hang", Fault::Hang),
    ("panic", Fault::Panic),
];

impl Fault {
    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        KINDS.iter().find(|(known, _)| *known == name).map(|(_, fault)| *fault)
    }

    /// What is recorded in front of it.
    pub fn record(self) -> String {
        let name = KINDS.iter().find(|(_, fault)| *fault == self).map_or("", |(name, _)| name);
        format!("hearth.fault={name} happens now, as the kernel's command line says")
    }

    /// Whether it happened already: a board that came back is left in peace.
    pub fn has_happened(self, records: &Records) -> bool {
        let record = self.record();
        records.read().iter().any(|line| line.ends_with(&record))
    }

    /// Whether it is serve that fails, and not PID 1.
    fn is_of_serve(self) -> bool {
        !matches!(self, Self::Hang | Self::Panic)
    }
}

/// Which failures happen on purpose, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    kinds: Vec<Fault>,
    /// `None`: once for each state partition.
    times: Option<u32>,
}

impl Plan {
    /// The plan that the word's value, `KIND` or `KIND,KIND…:TIMES`, asks for. A failure of PID 1 cannot be repeated in one run.
    pub fn parse(value: &str) -> Option<Self> {
        let (names, times) = match value.split_once(':') {
            None => (value, None),
            Some((names, times)) => (names, Some(times.parse().ok().filter(|n| (1..=MAX_TIMES).contains(n))?)),
        };
        let kinds = names.split(',').map(Fault::named).collect::<Option<Vec<_>>>()?;
        let is_one = kinds.len() == 1 && times.is_none();
        (is_one || times.is_some() && kinds.iter().all(|kind| kind.is_of_serve())).then_some(Self { kinds, times })
    }
}

/// When the next failure of a plan happens.
#[derive(Debug, Default)]
pub struct Saboteur {
    /// Failures so far in this run.
    done: u32,
    at: Option<Instant>,
    /// Serve has answered since it was started.
    answered: bool,
}

impl Saboteur {
    /// Serve takes requests.
    pub fn ready(&mut self, now: Instant, plan: Option<&Plan>, records: &Records) {
        let once = plan.filter(|plan| plan.times.is_none()).and_then(|plan| plan.kinds.first());
        self.at = once.filter(|fault| !fault.has_happened(records)).map(|_| now + AFTER);
        self.answered = false;
    }

    /// Serve says how far it is.
    pub fn beat(&mut self, now: Instant, operations: u64, busy: bool, plan: Option<&Plan>) {
        let again = plan.and_then(|plan| plan.times).is_some_and(|times| self.done < times);
        if again && operations > 0 && !busy && !self.answered {
            self.answered = true;
            self.at = Some(now + AFTER_ANSWER);
        }
    }

    /// The failure that is due: from here on it has happened.
    pub fn take(&mut self, now: Instant, plan: Option<&Plan>) -> Option<Fault> {
        self.at.take_if(|at| now >= *at)?;
        let kinds = &plan?.kinds;
        let kind = kinds.get(self.done as usize % kinds.len().max(1)).copied();
        self.done += 1;
        kind
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_kind_has_its_name_and_happens_once() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::at(folder.path().join("failures"));
        let now = Instant::now();
        for (name, fault) in KINDS {
            assert_eq!(Fault::named(name), Some(fault));
            let plan = Plan::parse(name);
            let mut saboteur = Saboteur::default();
            saboteur.ready(now, plan.as_ref(), &records);
            assert_eq!(saboteur.take(now, plan.as_ref()), None);
            assert_eq!(saboteur.take(now + AFTER, plan.as_ref()), Some(fault));
            assert_eq!(saboteur.take(now + AFTER, plan.as_ref()), None);
            records.add(Duration::from_secs(1), &fault.record()).unwrap();
            saboteur.ready(now, plan.as_ref(), &records);
            assert_eq!(saboteur.take(now + AFTER, plan.as_ref()), None, "it has happened");
        }
        assert_eq!(Fault::named("Kill"), None);
    }

    #[test]
    fn a_plan_of_several_goes_round_and_waits_for_an_answer_each_time() {
        let records = Records::at("/nowhere/failures");
        let plan = Plan::parse("crash,stop:3");
        let mut saboteur = Saboteur::default();
        let mut now = Instant::now();
        let mut happened = Vec::new();
        for _ in 0..5 {
            saboteur.ready(now, plan.as_ref(), &records);
            for (operations, busy) in [(0, false), (0, true), (5, true)] {
                now += AFTER;
                saboteur.beat(now, operations, busy, plan.as_ref());
                assert_eq!(saboteur.take(now + AFTER, plan.as_ref()), None);
            }
            saboteur.beat(now, 9, false, plan.as_ref());
            assert_eq!(saboteur.take(now, plan.as_ref()), None);
            happened.extend(saboteur.take(now + AFTER_ANSWER, plan.as_ref()));
            saboteur.beat(now, 9, false, plan.as_ref());
            assert_eq!(saboteur.take(now + AFTER, plan.as_ref()), None, "once for each start");
        }
        assert_eq!(happened, [Fault::Crash, Fault::Stop, Fault::Crash]);
    }

    #[test]
    fn what_is_no_plan_does_nothing() {
        for wrong in ["", "Kill", "kill,stop", "kill:0", "kill:x", "kill:10001", "kill,:3", "panic:3", "kill,hang:2"] {
            assert_eq!(Plan::parse(wrong), None, "{wrong}");
        }
    }
}
