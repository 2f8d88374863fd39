//! The loop's part in the line to PID 1: what the start has come by, what is asked of it and what it reports, for whoever asks here.
//! Next on the data's way: `init::supervise`, at the other end.

use serde_json::{Value, json};

use super::Server;
use crate::sys::heartbeat::Message;
use crate::sys::marks::{self, Stage};
use crate::sys::poll::Ready;
use crate::sys::report::Kind;
use crate::wire::Reject;

impl Server<'_, '_, '_> {
    /// Tells the supervisor what the start has come by.
    pub(super) fn tell_stages(&mut self) {
        let Some(supervisor) = &self.setup.supervisor else { return };
        for (stage, told) in Stage::ALL.into_iter().zip(&mut self.told) {
            if let Some(mark) = marks::of(stage).filter(|_| !*told) {
                *told = true;
                // As a beat.
                let _ = supervisor.line.send(Message::Reached(stage, mark));
            }
        }
    }

    /// A report of the supervisor's; `None` where there is none.
    pub(super) fn report(&self, kind: Kind) -> Option<Vec<String>> {
        self.setup.supervisor.as_ref()?.reports.read(kind)
    }

    pub(super) fn report_json(&self, kind: Kind) -> Result<Value, Reject> {
        let why = "there is no such report: PID 1 of an appliance makes them, a self-test's when one was asked for";
        let none = || Reject::request(404, why).with_code("no_report");
        self.report(kind).map(|lines| json!({"report": lines})).ok_or_else(none)
    }

    /// Whether there is a supervisor to ask.
    pub(super) fn ask_supervisor(&self, message: Message) -> bool {
        self.setup.supervisor.as_ref().is_some_and(|supervisor| supervisor.line.send(message).is_ok())
    }

    /// Takes what the supervisor says.
    pub(super) fn hear_supervisor(&mut self, event: Ready) {
        while let Some(message) = self.setup.supervisor.as_ref().and_then(|supervisor| supervisor.line.receive()) {
            if message == Message::SelftestOver
                && let Some(tty) = &mut self.tty
            {
                tty.resume();
            }
        }
        if event.hung_up
            && let Some(supervisor) = &self.setup.supervisor
        {
            // It stays so; nobody is told any more.
            let _ = self.poller.remove(&supervisor.line);
        }
    }
}
