//! The loop's part in the serial line: a device that comes and goes, and what is asked on it.
//! Next on the data's way: `serve::tty`.

use std::time::Instant;

use super::calls::NO_APPLIANCE;
use super::{Owner, Server, TTY};
use crate::serve::Defaults;
use crate::serve::tty::TtyPort;
use crate::sys::heartbeat::Message;
use crate::sys::poll::{Interest, Ready};
use crate::sys::record::{APP_LOG, Records};
use crate::sys::report::Kind;
use crate::sys::settings::{Change, Settings};
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
            LineEvent::BootReport => {
                let report = self.report(Kind::Boot).map_or(NO_APPLIANCE.to_owned(), |lines| lines.join("\n"));
                if let Some(tty) = &mut self.tty {
                    tty.say(&report);
                }
            }
            LineEvent::Settings => {
                let told = self.settings_told();
                if let Some(tty) = &mut self.tty {
                    tty.say(&told);
                }
            }
            LineEvent::Set(text) => {
                if let Err(why) = self.ask_to_keep(&text)
                    && let Some(tty) = &mut self.tty
                {
                    tty.say(&why);
                }
            }
            LineEvent::Selftest => {
                // The line is silent until the supervisor has said what it found.
                if !self.ask_supervisor(Message::Selftest { shown: true })
                    && let Some(tty) = &mut self.tty
                {
                    tty.say("this is no appliance: hearth selftest --model FILE checks the machine");
                }
            }
        }
    }

    /// Passes on what the console asks of the machine; the supervisor then stops this process as it would at any other time.
    fn ask_for_power(&mut self, message: Message, done: &str) {
        let asked = self.ask_supervisor(message);
        let Some(tty) = &mut self.tty else { return };
        tty.say(if asked { done } else { NO_APPLIANCE });
    }

    /// Whether there is a supervisor to ask.
    pub(super) fn ask_supervisor(&self, message: Message) -> bool {
        self.setup.supervisor.as_ref().is_some_and(|supervisor| supervisor.line.send(message).is_ok())
    }

    /// Takes what the supervisor says.
    pub(super) fn hear_supervisor(&mut self, event: Ready) {
        while let Some(message) = self.setup.supervisor.as_ref().and_then(|supervisor| supervisor.line.receive()) {
            match (message, &mut self.tty) {
                (Message::SelftestOver, Some(tty)) => tty.resume(),
                (Message::Kept { errno }, _) => self.kept(errno),
                _ => {}
            }
        }
        if event.hung_up
            && let Some(supervisor) = &self.setup.supervisor
        {
            // It stays so; nobody is told any more.
            let _ = self.poller.remove(&supervisor.line);
        }
    }

    /// Passes a change on to whoever may write it. What is wrong with it is told; nothing is said while it is on its way.
    fn ask_to_keep(&mut self, text: &str) -> Result<(), String> {
        let change = Change::parse(text).map_err(|e| e.to_string())?;
        if !self.ask_supervisor(Message::Keep(change)) {
            return Err("this is no appliance: flags of hearth serve set what requests get".to_owned());
        }
        self.asked_to_keep = Some(change);
        Ok(())
    }

    /// The change that was asked for is on the card, or is not: told, and from now on so.
    fn kept(&mut self, errno: u32) {
        let Some(change) = self.asked_to_keep.take() else { return };
        let told = match i32::try_from(errno) {
            Ok(0) => {
                self.settings = self.settings.with(change);
                self.setup.defaults = with_settings(&self.configured, self.settings);
                format!("kept: {change}")
            }
            Ok(errno) => format!("not kept: {change}: {}", std::io::Error::from_raw_os_error(errno)),
            Err(_) => format!("not kept: {change}"),
        };
        if let Some(tty) = &mut self.tty {
            tty.say(&told);
        }
    }

    fn settings_told(&self) -> String {
        let defaults = &self.setup.defaults;
        let from = |is_set: bool| if is_set { "set on the console" } else { "as configured" };
        let most = defaults.max_tokens.map_or("up to the context's end".to_owned(), |n| n.to_string());
        let Settings { temperature, max_tokens } = self.settings;
        let temperature = format!("temperature  {} ({})", defaults.sampling.temperature, from(temperature.is_some()));
        format!("{temperature}\nmax_tokens   {most} ({})", from(max_tokens.is_some()))
    }
}

/// What requests that say nothing get: as configured, but for what is set on the console.
pub(super) fn with_settings(configured: &Defaults, settings: Settings) -> Defaults {
    let mut defaults = configured.clone();
    defaults.sampling.temperature = settings.temperature.unwrap_or(defaults.sampling.temperature);
    defaults.max_tokens = settings.max_tokens.and_then(|n| usize::try_from(n).ok()).or(defaults.max_tokens);
    defaults
}
