//! What comes in while the supervisor waits: signals, the power button, serve's messages, commands typed on the console while no model answers there.
//! Next on the data's way: [`super::Supervisor`], which acts on it, and `serve` at the other end of the line.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Instant;

use super::{CONSOLE, Ending, JOB, LINE, LOG, Supervisor, show_boot_report, show_records};
use crate::init::apps::Apps;
use crate::init::console;
use crate::init::job::Job;

use crate::sys::heartbeat::Message;
use crate::sys::marks::Stage;
use crate::sys::poll::{Interest, Ready};
use crate::sys::report::Kind;
use crate::sys::settings::{Change, SettingsFile};

/// Messages taken from serve in one round: whatever it sends, the loop goes on.
pub const MESSAGES_PER_ROUND: usize = 64;

impl Supervisor<'_> {
    /// Takes what came in.
    pub(super) fn listen(&mut self, ready: &[Ready], now: Instant) {
        if self.terminate.take() {
            self.stop(Ending::PowerOff, now);
        }
        if self.interrupt.take() {
            self.stop(Ending::Reboot, now);
        }
        if self.buttons.pressed() && self.stopping.is_none() {
            self.console.say("the power button: the machine is switched off");
            self.stop(Ending::PowerOff, now);
        }
        self.ended.take();
        for _ in 0..MESSAGES_PER_ROUND {
            let Some(message) = self.child.as_ref().and_then(|child| child.line.receive()) else { break };
            match message {
                Message::Ready => self.is_ready(now),
                Message::Beat { operations, busy } => {
                    self.judge.beat(now, operations, busy);
                    self.saboteur.beat(now, operations, busy, self.serve.fault.as_ref());
                }
                Message::PowerOff => self.stop(Ending::PowerOff, now),
                Message::Reboot => self.stop(Ending::Reboot, now),
                Message::Selftest { shown } => self.start_job(shown, now),
                Message::Reached(stage, mark) => {
                    self.console.stage(stage, mark, self.judge.is_serving());
                    if stage == Stage::FirstAnswer {
                        self.keep_boot_report();
                    }
                }
                Message::Keep(change) => self.keep(change),
                Message::ReadySeen | Message::SelftestOver | Message::Kept { .. } => {}
            }
        }
        self.share_console();
        if self.listening {
            self.command(now);
        }
        self.read_log();
        if let Some(job) = &mut self.job {
            job.round(self.console, now);
        }
        if ready.iter().any(|event| event.key == CONSOLE && event.hung_up) {
            self.console.hang_up();
            self.listening = false;
        }
        // What was closed at the other end would wake the loop for ever; the end itself comes with SIGCHLD.
        if let Some(child) = &self.child {
            for event in ready.iter().filter(|event| event.hung_up) {
                let _ = match event.key {
                    LINE => self.poller.remove(&child.line),
                    LOG => self.poller.remove(child.log()),
                    _ => Ok(()),
                };
            }
        }
    }

    /// Listens on the console exactly while serve does not.
    pub(super) fn share_console(&mut self) {
        let wanted = !self.judge.is_serving();
        if wanted == self.listening {
            return;
        }
        let Some(input) = self.console.input() else { return };
        let changed = match wanted {
            true => self.poller.add(input, CONSOLE, Interest::READ),
            false => self.poller.remove(input),
        };
        match changed {
            Ok(()) => self.listening = wanted,
            Err(error) => self.console.log(&format!("listening on the console: {error}")),
        }
    }

    /// Does what is typed on the console while no model answers there.
    fn command(&mut self, now: Instant) {
        match self.console.command() {
            None => {}
            Some(console::Command::PowerOff) => self.stop(Ending::PowerOff, now),
            Some(console::Command::Reboot) => self.stop(Ending::Reboot, now),
            Some(console::Command::Status) => {
                let model =
                    self.serve.models.get(self.model).map_or("no model".into(), |path| path.display().to_string());
                let state = if self.child.is_some() { "serve is loading" } else { "serve is not running" };
                let before = self.last_end.as_deref().unwrap_or("nothing ended yet");
                self.console.say(&format!("{state}; {model}; {before}"));
                for app in self.apps.iter().flat_map(Apps::states).collect::<Vec<_>>() {
                    self.console.show(&format!("app {app}"));
                }
                show_records(self.console, &self.serve.records);
            }
            Some(console::Command::Selftest) => self.start_job(true, now),
            Some(console::Command::BootReport) => show_boot_report(self.console),
            Some(_) => {
                self.console.say(
                    "no model answers yet; /status, /selftest, /boot-report, /poweroff and /reboot are understood",
                );
            }
        }
    }

    fn is_ready(&mut self, now: Instant) {
        self.judge.ready(now);
        self.find_buttons();
        // Before serve reads there, and before the console says so.
        self.share_console();
        let user = self.child.as_ref().and_then(|child| std::fs::metadata(format!("/proc/{}", child.pid())).ok());
        let user = user.map_or("an unknown user".to_owned(), |process| format!("user {}", process.uid()));
        self.console.stamp(&format!("serve is up as {user}"));
        self.saboteur.ready(now, self.serve.fault.as_ref(), &self.serve.records);
        self.console.ready();
        // Before serve hears that it may speak, and can be asked for it.
        self.keep_boot_report();
        if self.apps.is_none() {
            self.apps = Some(Apps::find(self.serve.apps.clone(), now, self.console));
        }
        if let Some(child) = &self.child {
            // Serve goes on in any case after a moment.
            let _ = child.line.send(Message::ReadySeen);
        }
    }

    /// For serve, which tells it to whoever asks.
    fn keep_boot_report(&mut self) {
        let reports = &self.serve.selftest.reports;
        if let Err(error) = reports.write(Kind::Boot, &self.console.timeline().report()) {
            self.console.log(&format!("{}: {error}", reports.folder().display()));
        }
    }

    /// Starts a self-test; one that runs is shown from now on to whoever asks for another.
    fn start_job(&mut self, shown: bool, now: Instant) {
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

    /// Keeps what somebody set on the console; serve, which may write nothing, hears when it is on the card.
    fn keep(&mut self, change: Change) {
        let file = SettingsFile::beside(self.serve.records.path());
        let kept = file.keep(change);
        if let Err(error) = &kept {
            self.console.log(&format!("{}: {error}", file.path().display()));
        }
        let errno = kept.err().map_or(0, |error| error.raw_os_error().unwrap_or(nix::libc::EIO).unsigned_abs());
        if let Some(child) = &self.child {
            // As with ready.
            let _ = child.line.send(Message::Kept { errno });
        }
    }
}
