//! What the supervisor reports: the start's record, and what a self-test finds. Next: `init::timeline`, `init::job`.

use std::path::PathBuf;
use std::time::Instant;

use super::{JOB, Supervisor};
use crate::init::console::Console;
use crate::init::job::Job;
use crate::sys::heartbeat::Message;
use crate::sys::poll::Interest;
use crate::sys::report::Kind;

impl Supervisor<'_> {
    /// For serve, which tells it to whoever asks.
    pub(super) fn keep_boot_report(&mut self) {
        let reports = &self.serve.selftest.reports;
        if let Err(error) = reports.write(Kind::Boot, &self.console.timeline().report()) {
            self.console.log(&format!("{}: {error}", reports.folder().display()));
        }
    }

    /// Starts a self-test; one that runs is shown from now on to whoever asks for another.
    pub(super) fn start_job(&mut self, shown: bool, now: Instant) {
        if let Some(job) = &mut self.job {
            job.shown |= shown;
            return;
        }
        let model = self.serve.models.get(self.model).map(PathBuf::as_path);
        match Job::start(&self.serve.selftest, model, shown, now) {
            Ok(job) => {
                if let Err(error) = self.poller.add(&job, JOB, Interest::READ) {
                    // It is read in every round anyway.
                    self.console.log(&format!("watching the self-test: {error}"));
                }
                self.job = Some(job);
            }
            Err(error) => {
                self.console.say(&format!("the self-test is not started: {error}"));
                self.tell_that_it_is_over();
            }
        }
    }

    pub(super) fn tell_that_it_is_over(&self) {
        if let Some(child) = &self.child {
            // A serve that does not hear it is ended for other reasons.
            let _ = child.line.send(Message::SelftestOver);
        }
    }
}

/// When what happened at the start.
pub(in crate::init) fn show_boot_report(console: &mut Console) {
    console.timeline().report().iter().for_each(|line| console.show(line));
}
