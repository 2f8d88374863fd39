//! The loop's part in the serial line: a device that comes and goes, and what is asked on it.
//! Next on the data's way: `serve::tty`.

use std::time::Instant;

use super::{NO_APPLIANCE, Owner, Server, TTY};
use crate::serve::tty::TtyPort;
use crate::sys::heartbeat::Message;
use crate::sys::poll::{Interest, Ready};
use crate::sys::record::{APP_LOG, Records};
use crate::wire::Finish;
use crate::wire::line::LineEvent;

impl Server<'_, '_, '_> {
    pub(super) fn tty_ready(&mut self, event: Ready, now: Instant) {
        let Some(tty) = &mut self.tty else { return };
        // What was typed before a hang-up has nobody left to answer to.
        if event.hung_up || (event.readable && !tty.read()) {
            self.lose_tty(now);
        }
    }

    pub(super) fn lose_tty(&mut self, now: Instant) {
        let Some(tty) = &mut self.tty else { return };
        if let Some(device) = tty.device() {
            // The set forgets a closed descriptor by itself; an error here would say just that.
            let _ = self.poller.remove(device);
        }
        if let Some(id) = tty.hang_up(now) {
            self.abandon(id);
        }
    }

    pub(super) fn sweep_tty(&mut self, now: Instant) {
        let Some(tty) = &mut self.tty else { return };
        if tty.deadline().is_some_and(|at| at <= now) {
            match tty.try_open(now) {
                Ok(()) => self.watch_tty(),
                Err(e) => log::debug!("{e}"),
            }
        }
        while let Some(event) = self.tty.as_mut().and_then(TtyPort::next_event) {
            self.line_event(event, now);
        }
        let Some(tty) = &mut self.tty else { return };
        if !tty.flush() {
            return self.lose_tty(now);
        }
        let interest = tty.interest();
        if interest != tty.watched
            && let Some(device) = tty.device()
        {
            if self.poller.modify(device, TTY, interest).is_err() {
                return self.lose_tty(now);
            }
            tty.watched = interest;
        }
    }

    pub(super) fn watch_tty(&mut self) {
        let Some(tty) = &mut self.tty else { return };
        let Some(device) = tty.device() else { return };
        match self.poller.add(device, TTY, Interest::READ) {
            Ok(()) => tty.watched = Interest::READ,
            Err(e) => {
                log::warn!("watching the serial line: {e}");
                let _ = tty.hang_up(Instant::now());
            }
        }
    }

    pub(super) fn line_event(&mut self, event: LineEvent, now: Instant) {
        match event {
            LineEvent::Ask(request) => {
                let submitted = self.submit(Owner::Tty, &request, now);
                if let Err(reject) = &submitted {
                    self.counters.refused(reject.status);
                }
                let Some(tty) = &mut self.tty else { return };
                match submitted {
                    Ok(id) => tty.queued(id),
                    Err(reject) => tty.finish(Err(&reject)),
                }
            }
            LineEvent::Cancel => {
                if let Some(id) = self.tty.as_ref().and_then(TtyPort::request) {
                    self.end_early(id, Ok(Finish::Cancelled), now);
                }
            }
            LineEvent::Status => {
                let status = self.status();
                if let Some(tty) = &mut self.tty {
                    tty.status(&status);
                }
            }
            LineEvent::Log => {
                let lines = self.setup.apps.map(|folder| Records::at(folder.join(APP_LOG)).read()).unwrap_or_default();
                let told = if lines.is_empty() { "no app wrote anything".to_owned() } else { lines.join("\n") };
                if let Some(tty) = &mut self.tty {
                    tty.say(&told);
                }
            }
            LineEvent::PowerOff => self.ask_for_power(Message::PowerOff, "switching off"),
            LineEvent::Reboot => self.ask_for_power(Message::Reboot, "starting again"),
        }
    }

    /// Passes on what the console asks of the machine; the supervisor then stops this process as it would at any other time.
    fn ask_for_power(&mut self, message: Message, done: &str) {
        let asked = self.setup.supervisor.as_ref().is_some_and(|supervisor| supervisor.line.send(message).is_ok());
        let Some(tty) = &mut self.tty else { return };
        tty.say(if asked { done } else { NO_APPLIANCE });
    }
}
