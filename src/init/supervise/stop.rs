//! How the supervisor comes to its end: serve is asked, asked again, killed, and the apps with it; next on the data's way: `init`,
//! which syncs the card and switches the machine off.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Ending, Supervisor};
use crate::init::apps::Apps;

/// When the machine is to stop, running answers may end within this time.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(3);
/// After a second SIGTERM serve has this long until it is killed.
pub const STOP_LIMIT: Duration = Duration::from_secs(2);
#[derive(Clone, Copy)]
pub(super) struct Stopping {
    pub(super) ending: Ending,
    /// When serve is asked again, and when it is killed.
    again: Option<Instant>,
    kill: Instant,
}

impl Supervisor<'_> {
    /// Begins to stop; what was asked first stands.
    pub(super) fn stop(&mut self, ending: Ending, now: Instant) {
        if self.stopping.is_some() {
            return;
        }
        let again = now + DRAIN_LIMIT;
        self.stopping = Some(Stopping { ending, again: Some(again), kill: again + STOP_LIMIT });
        self.signal(Signal::SIGTERM);
        if let Some(apps) = &mut self.apps {
            apps.stop();
        }
    }

    /// Whether all have ended, or those who have not had their time.
    pub(super) fn is_over(&self, stopping: Stopping, now: Instant) -> bool {
        let apps = self.apps.as_ref().is_none_or(Apps::are_gone) || now >= stopping.kill + STOP_LIMIT;
        apps && self.child.is_none()
    }

    /// Asks serve again, then kills it, then goes on without it.
    pub(super) fn press(&mut self, stopping: Stopping, now: Instant) {
        if stopping.again.is_some_and(|again| now >= again) {
            self.stopping = Some(Stopping { again: None, ..stopping });
            self.signal(Signal::SIGTERM);
        }
        if now >= stopping.kill + STOP_LIMIT {
            self.child = None;
        } else if now >= stopping.kill {
            self.signal(Signal::SIGKILL);
            if let Some(apps) = &self.apps {
                apps.kill();
            }
        }
    }
}
