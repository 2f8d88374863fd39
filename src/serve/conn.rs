//! One client's connection: bytes in through the HTTP parser, the answer's bytes out, and the states between.
//! Knows nothing of the engine. Next on the data's way: `serve::Server`, which turns its requests into jobs.
//!
//! ```text
//!            submitted           first text             answered
//!  Reading ────────────> Queued ────────────> Streaming ────────> Draining ──> Closed
//!     ^ └──────────────────│──────────────────────│─────────────────^  │
//!     │  answered at once  └──────────────────────│─────────────────┘  │
//!     └────────────────────────────────────────────────────────────────┘ flushed, keep-alive
//!  Closed is reached from every state: the peer hung up, does not read, or took too long.
//! ```

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::access::{Denied, PeerIds, Rule};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, getsockopt, recv};

use crate::sys::poll::Interest;
use crate::wire::http::{self, Parser, Reply, Request};
use crate::wire::openai::Emitter;
use crate::wire::{Logprob, Outcome, Reject};

#[cfg(test)]
mod tests;

/// Output that may wait for a slow reader, in bytes; an answer that grows beyond it is ended with its connection.
pub const MAX_OUTPUT_BYTES: usize = 32 * 1024;
/// A connection may be silent between requests for this long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A request must be whole this long after its first byte.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Waiting output must move at least once in this time.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// After its last answer a connection waits this long for the peer to have read it.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes taken from a socket at once.
const READ_BYTES: usize = 16 * 1024;
/// Output is handed to the kernel when this much of it waits, and whenever the loop has done its round.
const FLUSH_BYTES: usize = 16 * 1024;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waiting for a request, or in the middle of one.
    Reading,
    /// Its request is with the engine and no text came yet.
    Queued,
    /// Text is coming.
    Streaming,
    /// The answer is whole; its bytes are on their way.
    Draining,
    /// Over; to be removed.
    Closed,
}

impl State {
    fn may_become(self, next: State) -> bool {
        use State::{Closed, Draining, Queued, Reading, Streaming};
        matches!(
            (self, next),
            (Reading, Queued | Draining) | (Queued, Streaming | Draining) | (Streaming, Draining) | (Draining, Reading)
        ) || next == Closed
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    stream: UnixStream,
    state: State,
    parser: Parser,
    out: Vec<u8>,
    /// Bytes of `out` that were written.
    sent: usize,
    /// When the current wait began: for a request, for the rest of it, for the reader.
    since: Instant,
    /// A request has begun to come in.
    midway: bool,
    /// The peer sends no more.
    eof: bool,
    /// No request is read after the current one.
    last: bool,
    /// A request was refused before it was whole, with this status.
    refused: Option<u16>,
    /// Our direction is shut; waiting for the peer to close.
    lingering: bool,
    /// Who is at the other end, and what they may.
    peer: Option<PeerIds>,
    access: Result<Rule, Denied>,
    exchange: Option<Emitter>,
    /// What epoll was told.
    pub(super) watched: Interest,
}

impl Conn {
    pub(super) fn new(stream: UnixStream, peer: Option<PeerIds>, access: Result<Rule, Denied>, now: Instant) -> Self {
        Self {
            stream,
            state: State::Reading,
            parser: Parser::default(),
            out: Vec::new(),
            sent: 0,
            since: now,
            midway: false,
            eof: false,
            last: false,
            refused: None,
            lingering: false,
            peer,
            access,
            exchange: None,
            watched: Interest::READ,
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The user at the other end when it connected.
    pub(super) fn peer_uid(&self) -> Option<u32> {
        self.peer.map(|peer| peer.uid)
    }

    /// What the peer may.
    pub(super) fn access(&self) -> Result<Rule, Denied> {
        self.access
    }

    /// Takes this peer for one that may not ask.
    #[cfg(test)]
    pub(super) fn deny(&mut self, denied: Denied) {
        self.access = Err(denied);
    }

    /// Input held, in bytes.
    pub(super) fn buffered(&self) -> usize {
        self.parser.buffered()
    }

    /// Since when nobody would miss this connection: between requests with nothing sent or received, or after its last answer.
    pub(super) fn spare_since(&self) -> Option<Instant> {
        let spare = match self.state {
            // Whatever they are about to ask, they get nothing but a refusal.
            State::Reading if self.access.is_err() => true,
            State::Reading => !self.midway && self.out.is_empty() && !self.has_unread(),
            State::Draining => self.lingering,
            State::Closed => true,
            State::Queued | State::Streaming => false,
        };
        spare.then_some(self.since)
    }

    /// Whether the peer sent what was not read yet.
    fn has_unread(&self) -> bool {
        matches!(recv(self.stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT), Ok(1..))
    }

    /// Drops what came in; nothing more is read from a connection whose last answer is given.
    pub(super) fn forget_input(&mut self) {
        self.parser = Parser::default();
    }

    /// Takes what the peer sent.
    pub(super) fn read(&mut self, now: Instant) {
        let mut buffer = [0; READ_BYTES];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.eof = true,
            Ok(n) if self.state == State::Reading => {
                self.parser.push(buffer.get(..n).unwrap_or(&[]));
                if !std::mem::replace(&mut self.midway, true) {
                    self.since = now;
                }
            }
            // Lingering: what comes after the last answer is thrown away.
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.close(),
        }
    }

    /// The next whole request. A bad one is answered here.
    pub(super) fn next_request(&mut self, now: Instant) -> Option<Request> {
        if self.state != State::Reading {
            return None;
        }
        match self.parser.next_request() {
            Ok(Some(request)) => Some(request),
            Ok(None) => {
                if self.parser.take_continue() {
                    http::write_continue(&mut self.out);
                }
                self.midway = self.parser.is_midway();
                if self.eof {
                    self.close();
                }
                None
            }
            Err(reject) => {
                self.refused = Some(reject.status);
                self.reject(Reply::LAST, &reject, now);
                None
            }
        }
    }

    /// The status with which a request was refused that never became whole; told once.
    pub(super) fn take_refused(&mut self) -> Option<u16> {
        self.refused.take()
    }

    /// The engine has the request; the emitter will write its answer.
    pub(super) fn queued(&mut self, emitter: Emitter) {
        self.exchange = Some(emitter);
        self.become_state(State::Queued);
    }

    /// The engine has the request; its answer comes at once, by [`Conn::answer`] or [`Conn::reject`].
    pub(super) fn waits(&mut self) {
        self.become_state(State::Queued);
    }

    /// A whole answer at once.
    pub(super) fn answer(&mut self, reply: Reply, status: u16, body: &str, now: Instant) {
        http::write_json(&mut self.out, reply, status, body);
        self.answered(reply, now);
    }

    /// A whole page of text at once.
    pub(super) fn answer_text(&mut self, reply: Reply, content_type: &str, text: &str, now: Instant) {
        http::write_text(&mut self.out, reply, content_type, text);
        self.answered(reply, now);
    }

    /// A refusal at once.
    pub(super) fn reject(&mut self, reply: Reply, reject: &Reject, now: Instant) {
        http::write_reject(&mut self.out, reply, reject);
        self.answered(reply, now);
    }

    /// Text of one of the answers. False: the peer does not read, and the connection is closed.
    pub(super) fn delta(&mut self, choice: usize, text: &str, logprob: Option<Logprob>, now: Instant) -> bool {
        let Some(emitter) = &mut self.exchange else {
            return true;
        };
        if self.out.is_empty() {
            self.since = now;
        }
        emitter.delta(choice, text, logprob, &mut self.out);
        let streams = emitter.is_stream();
        if self.state == State::Queued {
            self.become_state(State::Streaming);
        }
        if self.out.len() >= FLUSH_BYTES {
            self.flush(now);
        }
        if streams && self.out.len() - self.sent > MAX_OUTPUT_BYTES {
            self.close();
        }
        self.state != State::Closed
    }

    /// An answer's end, or why it has none; that ends the others of the request, too.
    pub(super) fn finish(&mut self, choice: usize, outcome: Result<&Outcome, &Reject>, now: Instant) {
        let Some(emitter) = &mut self.exchange else {
            return;
        };
        match outcome {
            Ok(outcome) => {
                if !emitter.finish(choice, outcome, &mut self.out) {
                    return;
                }
            }
            Err(reject) => emitter.reject(reject, &mut self.out),
        }
        let reply = emitter.reply();
        self.exchange = None;
        self.answered(reply, now);
    }

    /// No request is read after the one that is being answered; an idle connection closes.
    pub(super) fn stop_reading(&mut self) {
        self.last = true;
        if self.state == State::Reading && self.out.is_empty() {
            self.close();
        }
    }

    pub(super) fn close(&mut self) {
        self.become_state(State::Closed);
    }

    /// Hands waiting output to the kernel; an answer that is out leads back to reading, or to the end.
    pub(super) fn flush(&mut self, now: Instant) {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(n @ 1..) => {
                    self.sent += n;
                    self.since = now;
                }
                Ok(0) => return self.close(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.close(),
            }
        }
        if self.sent < self.out.len() {
            self.out.drain(..self.sent);
            self.sent = 0;
            return;
        }
        self.out.clear();
        // A connection that stays open must not keep the room of its longest answer.
        self.out.shrink_to(MAX_OUTPUT_BYTES);
        self.sent = 0;
        if self.state != State::Draining || self.lingering {
            return;
        }
        self.since = now;
        if self.last {
            if self.eof || self.stream.shutdown(Shutdown::Write).is_err() {
                self.close();
            }
            self.lingering = true;
        } else {
            self.midway = self.parser.is_midway();
            self.become_state(State::Reading);
        }
    }

    /// Whether the daemon's end would cut something short.
    pub(super) fn has_work(&self) -> bool {
        match self.state {
            State::Reading | State::Closed => !self.out.is_empty(),
            State::Queued | State::Streaming => true,
            State::Draining => !self.lingering,
        }
    }

    /// Bytes of output beyond [`MAX_OUTPUT_BYTES`] that wait for the peer to read.
    pub(super) fn excess(&self) -> usize {
        (self.out.len() - self.sent).saturating_sub(MAX_OUTPUT_BYTES)
    }

    /// Whether output waits for the peer to read.
    pub(super) fn has_unsent(&self) -> bool {
        self.state != State::Closed && !self.out.is_empty()
    }

    pub(super) fn interest(&self) -> Interest {
        let listens = match self.state {
            State::Reading => self.parser.has_room(),
            State::Draining => self.lingering,
            State::Queued | State::Streaming | State::Closed => false,
        };
        Interest { read: listens && !self.eof, write: !self.out.is_empty() }
    }

    /// When [`Conn::expire`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let patience = match self.state {
            State::Closed => return None,
            State::Draining if self.lingering => LINGER_TIMEOUT,
            _ if !self.out.is_empty() => STALL_TIMEOUT,
            State::Reading if self.midway => REQUEST_TIMEOUT,
            State::Reading => IDLE_TIMEOUT,
            State::Queued | State::Streaming | State::Draining => return None,
        };
        self.since.checked_add(patience)
    }

    /// Ends what took too long. Call when the deadline has passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.state == State::Reading && self.midway && self.out.is_empty() {
            let late = format!("the request was not whole after {} s", REQUEST_TIMEOUT.as_secs());
            self.refused = Some(408);
            self.reject(Reply::LAST, &Reject::request(408, late), now);
        } else {
            self.close();
        }
    }

    fn answered(&mut self, reply: Reply, now: Instant) {
        self.last |= !reply.keep_alive;
        self.since = now;
        self.become_state(State::Draining);
        self.flush(now);
    }

    fn become_state(&mut self, next: State) {
        debug_assert!(self.state.may_become(next), "{:?} → {next:?}", self.state);
        if self.state != State::Closed {
            self.state = next;
        }
    }
}

/// Who connected, as the kernel tells.
pub(super) fn peer_ids(stream: &UnixStream) -> Option<PeerIds> {
    let peer = getsockopt(stream, PeerCredentials).ok()?;
    Some(PeerIds { uid: peer.uid(), gid: peer.gid() })
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
