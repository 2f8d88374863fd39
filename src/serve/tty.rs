//! The serial line as the I/O loop sees it: a device that may vanish and return, its output that may never wait for
//! anybody, and the protocol between. Next on the data's way: `wire::line` for bytes, `serve::Server` for requests.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::engine::queue::RequestId;
use crate::sys::poll::Interest;
use crate::sys::tty::{TtyError, open_raw};
use crate::wire::line::{LineEvent, LineProtocol};
use crate::wire::{Outcome, Reject, Status};

/// Output that may wait on the line, in bytes: five seconds of it at 115200 baud.
pub const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// The first wait before a lost line is opened again; it doubles up to [`MAX_BACK_OFF`].
pub const MIN_BACK_OFF: Duration = Duration::from_millis(250);
/// The longest wait before a lost line is tried again.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(8);

/// Bytes taken from the line at once.
const READ_BYTES: usize = 4 * 1024;

/// The serial line.
#[derive(Debug)]
pub(super) struct TtyPort {
    path: PathBuf,
    model: String,
    device: Option<File>,
    protocol: LineProtocol,
    out: Vec<u8>,
    request: Option<RequestId>,
    back_off: Duration,
    /// When to open the line again.
    retry_at: Instant,
    pub(super) watched: Interest,
}

impl TtyPort {
    /// Opens the line; one that is absent is tried again later.
    ///
    /// # Errors
    /// The path is no serial line: waiting will not heal that.
    pub(super) fn open(path: &Path, model: &str, now: Instant) -> Result<Self, TtyError> {
        let mut port = Self {
            path: path.to_owned(),
            model: model.to_owned(),
            device: None,
            protocol: LineProtocol::new(model),
            out: Vec::new(),
            request: None,
            back_off: MIN_BACK_OFF,
            retry_at: now,
            watched: Interest::default(),
        };
        match port.try_open(now) {
            Err(e @ TtyError::NotATty { .. }) => Err(e),
            Err(e) => {
                log::warn!("{e}; it is tried again");
                Ok(port)
            }
            Ok(()) => Ok(port),
        }
    }

    /// Tries to open a line that is away.
    ///
    /// # Errors
    /// It is still away; [`TtyPort::deadline`] tells when the next try is due.
    pub(super) fn try_open(&mut self, now: Instant) -> Result<(), TtyError> {
        self.retry_at = now + self.back_off;
        self.back_off = self.back_off.saturating_mul(2).min(MAX_BACK_OFF);
        self.device = Some(open_raw(&self.path)?);
        self.protocol = LineProtocol::new(self.model.as_str());
        self.out.clear();
        self.protocol.greet(&mut self.out);
        log::info!("serial line {} is open", self.path.display());
        Ok(())
    }

    /// The line is gone: gives back the request that nobody waits for any more.
    pub(super) fn hang_up(&mut self, now: Instant) -> Option<RequestId> {
        if self.device.take().is_some() {
            log::warn!("serial line {} hung up; it is opened again", self.path.display());
        }
        self.retry_at = now + self.back_off;
        self.request.take()
    }

    pub(super) fn device(&self) -> Option<BorrowedFd<'_>> {
        self.device.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn request(&self) -> Option<RequestId> {
        self.request
    }

    /// Whether the running answer is kept to its end, in a conversation or to be sent whole.
    pub(super) fn keeps_answer(&self) -> bool {
        self.protocol.keeps_answer()
    }

    /// Takes what came in. False: the line is gone.
    pub(super) fn read(&mut self) -> bool {
        let Some(device) = &mut self.device else {
            return true;
        };
        let mut buffer = [0; READ_BYTES];
        match device.read(&mut buffer) {
            Ok(0) => false,
            Ok(n) => {
                self.back_off = MIN_BACK_OFF;
                self.protocol.push(buffer.get(..n).unwrap_or(&[]));
                true
            }
            Err(e) => matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// What the line asks for next.
    pub(super) fn next_event(&mut self) -> Option<LineEvent> {
        if self.is_full() {
            return None;
        }
        self.protocol.next_event(&mut self.out)
    }

    pub(super) fn queued(&mut self, id: RequestId) {
        self.request = Some(id);
    }

    /// Text of the answer. False: the line does not take it, and the answer is over.
    pub(super) fn delta(&mut self, text: &str) -> bool {
        if self.is_full() {
            self.finish(Err(&Reject::unavailable("the answer was cut: the line does not take its output")));
            return false;
        }
        self.protocol.delta(text, &mut self.out);
        true
    }

    pub(super) fn finish(&mut self, outcome: Result<&Outcome, &Reject>) {
        self.request = None;
        match outcome {
            Ok(outcome) => self.protocol.finish(outcome, &mut self.out),
            Err(reject) => self.protocol.reject(reject, &mut self.out),
        }
    }

    pub(super) fn status(&mut self, status: &Status) {
        self.protocol.status(status, &mut self.out);
    }

    pub(super) fn say(&mut self, text: &str) {
        self.protocol.say(text, &mut self.out);
    }

    pub(super) fn notice(&mut self, text: String) {
        self.protocol.notice(text);
    }

    pub(super) fn resume(&mut self) {
        self.protocol.resume(&mut self.out);
    }

    /// Hands waiting output to the kernel. False: the line is gone.
    pub(super) fn flush(&mut self) -> bool {
        let Some(device) = &mut self.device else {
            return true;
        };
        let mut sent = 0;
        let alive = loop {
            let Some(rest) = self.out.get(sent..).filter(|rest| !rest.is_empty()) else {
                break true;
            };
            match device.write(rest) {
                Ok(n @ 1..) => sent += n,
                Ok(0) => break false,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break false,
            }
        };
        self.out.drain(..sent);
        alive
    }

    pub(super) fn has_output(&self) -> bool {
        self.device.is_some() && !self.out.is_empty()
    }

    pub(super) fn interest(&self) -> Interest {
        Interest { read: !self.is_full(), write: !self.out.is_empty() }
    }

    /// When to try to open it again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.device.is_none().then_some(self.retry_at)
    }

    fn is_full(&self) -> bool {
        self.out.len() > MAX_OUTPUT_BYTES
    }
}
