//! Failures on purpose: `hearth.fault=KIND` on the kernel's command line makes one happen a moment after the first answer could be
//! given, once for each kind and state partition, so that what follows can be watched on a real board as in the tests. Next: what the failure meets, in
//! `init::supervise`, the hardware watchdog or the kernel.

use std::time::Duration;

use crate::sys::record::Records;

/// So long after "ready" it happens.
pub const AFTER: Duration = Duration::from_secs(2);

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Serve is killed.
    Kill,
    /// Serve is stopped: its heart beats no more.
    Stop,
    /// PID 1 hangs: the hardware watchdog restarts the board.
    Hang,
    /// PID 1 panics: the kernel restarts the board.
    Panic,
}

const KINDS: [(&str, Fault); 4] =
    [("kill", Fault::Kill), ("stop", Fault::Stop), ("hang", Fault::Hang), ("panic", Fault::Panic)];

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
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_kind_has_its_name_and_happens_once() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::at(folder.path().join("failures"));
        for (name, fault) in KINDS {
            assert_eq!(Fault::named(name), Some(fault));
            assert!(!fault.has_happened(&records));
            records.add(Duration::from_secs(1), &fault.record()).unwrap();
            assert!(fault.has_happened(&records));
        }
        assert_eq!(Fault::named("Kill"), None);
    }
}
