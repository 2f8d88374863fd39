//! The loop itself. Each round: wait, take what came in, take what the engine made, hand out what goes out, and end what
//! took too long. Next on the data's way: [`calls`] for requests, `serve::conn` and `serve::tty` for answers.

mod answers;
mod calls;
mod embeddings;
mod line;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::geteuid;

use self::embeddings::Embeddings;
use super::access::Meters;
use super::conn::{self, Conn, State};
use super::grammar::{AnswerGrammar, Shelf};
use super::listener::SocketFile;
use super::metrics::Counters;
use super::text::AnswerText;
use super::tty::TtyPort;
use super::{DRAIN_TIMEOUT, Defaults, MAX_CONNECTIONS, MAX_INPUT_BYTES, ServeError, ServeSetup};
use crate::engine::queue::{EngineLink, RequestId};
use crate::sys::heartbeat::{BEAT_EVERY, Message};
use crate::sys::marks::{self, Stage};
use crate::sys::poll::{Interest, Poller, Ready};
use crate::sys::settings::{Change, Settings, SettingsFile};
use crate::sys::signals::StopSignals;
use crate::wire::http::{self, Reply};
use crate::wire::{Reject, Usage};

const ENGINE: u64 = 1;
const SIGNALS: u64 = 2;
const STOP: u64 = 3;
const TTY: u64 = 4;
const SUPERVISOR: u64 = 5;
/// The sockets' keys count up from here, up to the connections'.
const FIRST_LISTENER: u64 = 8;
const LAST_LISTENER: u64 = FIRST_CONNECTION - 1;
const _: () = assert!(FIRST_LISTENER + super::access::MAX_SOCKETS as u64 == FIRST_CONNECTION);
/// Connections' keys count up from here and are never used twice.
const FIRST_CONNECTION: u64 = 16;

/// Connections taken in one round: bounds what a flood of them costs the streams that run.
const ACCEPTS_PER_ROUND: usize = 8;
/// After a stop at once the engine gets this long to give its jobs back.
const LAST_JOBS_TIMEOUT: Duration = Duration::from_secs(5);
/// What the kernel does not take of the last answers within this time is lost.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the last output is tried again, in milliseconds.
const LAST_LOOK_MS: u8 = 20;
/// How often the comparison of the model with its hashes is looked at until it is over.
const CHECK_LOOK_EVERY: Duration = Duration::from_secs(1);
/// Accepting rests this long when there are no descriptors left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Everything the I/O thread owns.
pub(super) struct Server<'s, 'l, 'r> {
    setup: ServeSetup<'s>,
    link: &'l mut EngineLink<'r>,
    poller: Poller,
    /// In the order of the setup's; none once the daemon stops.
    sockets: Vec<SocketFile>,
    accept_again: Option<Instant>,
    signals: Option<StopSignals>,
    tty: Option<TtyPort>,
    conns: HashMap<u64, Conn>,
    next_conn: u64,
    running: HashMap<RequestId, Running<'s>>,
    /// Requests for embeddings, by their connection.
    embeddings: HashMap<u64, Embeddings>,
    /// Made when the first grammar is asked for.
    shelf: Shelf,
    meters: Meters,
    counters: Counters,
    next_request: RequestId,
    started: Instant,
    stopping: Stopping,
    /// When the supervisor is told again how far the engine is.
    next_beat: Instant,
    /// What requests get without the console's settings, and those.
    configured: Defaults,
    settings: Settings,
    /// The change that the supervisor was asked to keep.
    asked_to_keep: Option<Change>,
    /// Damaged parts of the model that were told of.
    damage_told: usize,
    check_told: bool,
    /// Stages of the start that it was told of.
    told: [bool; Stage::ALL.len()],
}

#[derive(Clone, Copy, Debug)]
enum Stopping {
    No,
    /// Running answers may go on until then.
    Draining(Instant),
    Now,
}

/// A job that the engine has not given back.
struct Running<'s> {
    owner: Owner,
    /// Whose turn it takes.
    peer: u64,
    /// Whose tokens are counted.
    metered: Option<u32>,
    /// Which of its request's answers this is.
    choice: usize,
    text: Box<dyn AnswerText + 's>,
    /// What it has to follow.
    grammar: Option<AnswerGrammar>,
    cancel: Arc<AtomicBool>,
    usage: Usage,
    /// Bytes that an answer which is kept whole may still take; no limit for one that goes out as it comes.
    room: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Conn(u64),
    Tty,
    /// Nobody waits: the client is gone, or has its whole answer.
    Nobody,
}

impl<'s, 'l, 'r> Server<'s, 'l, 'r> {
    pub(super) fn open(mut setup: ServeSetup<'s>, link: &'l mut EngineLink<'r>) -> Result<Self, ServeError> {
        let now = Instant::now();
        let poller = Poller::new()?;
        let signals = setup.signals.then(StopSignals::install).transpose().map_err(ServeError::Signals)?;
        if let Some(signals) = &signals {
            poller.add(signals, SIGNALS, Interest::READ)?;
        }
        if let Some(stop) = &setup.stop {
            stop.set_nonblocking(true).map_err(ServeError::Signals)?;
            poller.add(stop, STOP, Interest::READ)?;
        }
        poller.add(link.event_fd(), ENGINE, Interest::READ)?;
        let tty = setup.tty.map(|path| TtyPort::open(path, setup.model_id, now)).transpose()?;
        let mut sockets = Vec::new();
        for (key, socket) in (FIRST_LISTENER..=LAST_LISTENER).zip(&setup.sockets) {
            let socket = SocketFile::bind(&socket.path, socket.mode)?;
            poller.add(&socket, key, Interest::READ)?;
            sockets.push(socket);
        }
        let configured = setup.defaults.clone();
        let settings = setup.records.map(SettingsFile::beside).map_or(Default::default(), |file| {
            file.read().unwrap_or_else(|error| {
                log::warn!("{}: {error}; what was set on the console is left out", file.path().display());
                Settings::default()
            })
        });
        setup.defaults = line::with_settings(&configured, settings);
        let confine = std::mem::replace(&mut setup.confine, Box::new(|| Ok(())));
        let ready = std::mem::replace(&mut setup.ready, Box::new(|| ()));
        let mut server = Self {
            setup,
            link,
            poller,
            sockets,
            accept_again: None,
            signals,
            tty,
            conns: HashMap::new(),
            next_conn: FIRST_CONNECTION,
            running: HashMap::new(),
            embeddings: HashMap::new(),
            shelf: Shelf::default(),
            meters: Meters::default(),
            counters: Counters::default(),
            next_request: 1,
            started: now,
            stopping: Stopping::No,
            next_beat: now,
            configured,
            settings,
            asked_to_keep: None,
            damage_told: 0,
            check_told: false,
            told: [false; Stage::ALL.len()],
        };
        server.watch_tty();
        for socket in &server.setup.sockets {
            log::info!("serving {} on {}", server.setup.model_id, socket.path.display());
        }
        marks::reach(Stage::Listening);
        ready();
        server.tell_stages();
        if let Some(supervisor) = &server.setup.supervisor {
            supervisor.line.announce_ready();
            server.poller.add(&supervisor.line, SUPERVISOR, Interest::READ)?;
        }
        // The last thing before a byte from outside is read. Where a part were missing and required, the workers would not have begun.
        confine()?;
        Ok(server)
    }

    pub(super) fn run(mut self) -> Result<(), ServeError> {
        let result = self.serve();
        self.take_jobs_back();
        log::info!("stopped");
        result
    }

    fn serve(&mut self) -> Result<(), ServeError> {
        let mut ready = Vec::new();
        // The serial line's greeting waits for no event.
        self.sweep(Instant::now());
        loop {
            let now = Instant::now();
            if let Some(check) = self.setup.check {
                check.pause(!self.running.is_empty());
            }
            let timeout = self.next_deadline().map(|at| at.saturating_duration_since(now));
            self.poller.wait(timeout, &mut ready)?;
            let now = Instant::now();
            for event in &ready {
                self.dispatch(*event, now);
            }
            self.drain_engine(now);
            if self.link.engine_gone() {
                return Err(ServeError::EngineGone);
            }
            self.look_at_check();
            self.sweep(now);
            self.beat(now);
            if self.is_done(now) {
                return Ok(());
            }
        }
    }

    fn dispatch(&mut self, event: Ready, now: Instant) {
        match event.key {
            key @ FIRST_LISTENER..=LAST_LISTENER => self.accept((key - FIRST_LISTENER) as usize, now),
            // Drained every round.
            ENGINE => {}
            SIGNALS => {
                let count = self.signals.as_mut().map_or(0, StopSignals::take);
                self.stop(count, now);
            }
            STOP => self.read_stop(now),
            TTY => self.tty_ready(event, now),
            SUPERVISOR => self.hear_supervisor(event),
            key => {
                let Some(conn) = self.conns.get_mut(&key) else {
                    return;
                };
                if event.hung_up {
                    conn.close();
                } else if event.readable {
                    conn.read(now);
                }
                if event.writable {
                    conn.flush(now);
                }
                self.bound_input(now);
            }
        }
    }

    /// Where the input of all connections is too much, the one that holds most loses its request: a small one always finds room.
    fn bound_input(&mut self, now: Instant) {
        let held: usize = self.conns.values().map(Conn::buffered).sum();
        if held <= MAX_INPUT_BYTES {
            return;
        }
        let reading = self.conns.values_mut().filter(|conn| conn.state() == State::Reading);
        if let Some(conn) = reading.max_by_key(|conn| conn.buffered()) {
            let full = format!("unfinished requests hold {MAX_INPUT_BYTES} bytes; try again in a moment");
            conn.reject(Reply::LAST, &Reject::unavailable(full), now);
            conn.forget_input();
        }
    }

    /// What every round does for each connection and the serial line: requests, output, time, and epoll's view of it.
    fn sweep(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            self.watch_listeners(Interest::READ);
        }
        let keys: Vec<u64> = self.conns.keys().copied().collect();
        for key in keys {
            self.serve_requests(key, now);
            let draining = self.is_stopping();
            let Some(conn) = self.conns.get_mut(&key) else {
                continue;
            };
            conn.flush(now);
            if draining {
                conn.stop_reading();
            }
            if conn.deadline().is_some_and(|at| at <= now) {
                conn.expire(now);
            }
            if conn.state() == State::Closed {
                self.drop_conn(key);
                continue;
            }
            let interest = conn.interest();
            if interest != conn.watched {
                conn.watched = interest;
                if self.poller.modify(&*conn, key, interest).is_err() {
                    self.drop_conn(key);
                }
            }
        }
        self.sweep_tty(now);
    }

    /// Takes a few that wait, no more: the rest of a flood waits in the backlog while others are served.
    fn accept(&mut self, listener: usize, now: Instant) {
        for _ in 0..ACCEPTS_PER_ROUND {
            let (Some(socket), Some(setup)) = (self.sockets.get(listener), self.setup.sockets.get(listener)) else {
                return;
            };
            let stream = match socket.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(e) => {
                    log::warn!("accepting a connection: {e}");
                    self.accept_again = Some(now + ACCEPT_REST);
                    return self.watch_listeners(Interest::default());
                }
            };
            let peer = conn::peer_ids(&stream);
            let access = setup.access(peer, geteuid().as_raw());
            if self.conns.len() >= MAX_CONNECTIONS && !self.evict() {
                turn_away(stream);
                continue;
            }
            let key = self.next_conn;
            let conn = Conn::new(stream, peer, access, now);
            if self.poller.add(&conn, key, conn.watched).is_ok() {
                self.next_conn += 1;
                self.conns.insert(key, conn);
            }
        }
    }

    /// Makes room by closing the connection that has been of no use for the longest time. False: all of them are at work.
    fn evict(&mut self) -> bool {
        let spare = self.conns.iter().filter_map(|(&key, conn)| Some((conn.spare_since()?, key)));
        let Some((_, key)) = spare.min() else {
            return false;
        };
        log::debug!("an idle connection makes room for a new one");
        self.drop_conn(key);
        true
    }

    fn watch_listeners(&self, interest: Interest) {
        for (key, socket) in (FIRST_LISTENER..).zip(&self.sockets) {
            if let Err(e) = self.poller.modify(socket, key, interest) {
                log::error!("watching a socket: {e}");
            }
        }
    }

    fn drop_conn(&mut self, key: u64) {
        self.embeddings.remove(&key);
        if self.conns.remove(&key).is_some() {
            self.abandon_all(Owner::Conn(key));
        }
    }

    fn read_stop(&mut self, now: Instant) {
        let Some(stop) = &mut self.setup.stop else {
            return;
        };
        let mut bytes = [0; 8];
        match stop.read(&mut bytes) {
            Ok(0) => {
                // The end of the stream stays readable: watch it no more.
                self.setup.stop = None;
                self.stop(1, now);
            }
            Ok(n) => self.stop(n, now),
            Err(_) => {}
        }
    }

    /// So many requests to stop came in.
    fn stop(&mut self, count: usize, now: Instant) {
        for _ in 0..count {
            self.stopping = match self.stopping {
                Stopping::No => {
                    log::info!(
                        "stopping: {} answers run and may end within {} s",
                        self.running.len(),
                        DRAIN_TIMEOUT.as_secs()
                    );
                    // Closing removes the file: the next client sees at once that nobody serves.
                    self.sockets.clear();
                    Stopping::Draining(now + DRAIN_TIMEOUT)
                }
                Stopping::Draining(_) | Stopping::Now => Stopping::Now,
            };
        }
    }

    fn is_stopping(&self) -> bool {
        !matches!(self.stopping, Stopping::No)
    }

    fn is_done(&self, now: Instant) -> bool {
        match self.stopping {
            Stopping::No => false,
            Stopping::Now => true,
            Stopping::Draining(until) => {
                let work = !self.running.is_empty()
                    || self.conns.values().any(Conn::has_work)
                    || self.tty.as_ref().is_some_and(TtyPort::has_output);
                !work || until <= now
            }
        }
    }

    /// Ends what still runs, tells its clients, and waits for the engine to give the jobs back: an engine with a full ring could
    /// not end. The clients do not wait for the engine, whose step may be long.
    fn take_jobs_back(&mut self) {
        let now = Instant::now();
        // What the engine has ended by now ends as it should.
        self.drain_engine(now);
        let why = match self.link.engine_gone() {
            true => Reject::internal("the engine failed before the answer's end"),
            false => Reject::unavailable("the daemon stopped before the answer's end"),
        };
        let ids: Vec<RequestId> = self.running.keys().copied().collect();
        for id in ids {
            self.end_early(id, Err(&why), now);
        }
        let (jobs_until, output_until) = (now + LAST_JOBS_TIMEOUT, now + LAST_OUTPUT_TIMEOUT);
        loop {
            let now = Instant::now();
            let unsent = self.flush_all(now) && now < output_until;
            let jobs = !self.running.is_empty() && !self.link.engine_gone() && now < jobs_until;
            if !unsent && !jobs {
                return;
            }
            // The engine's descriptor alone: clients that talk on must not keep the loop awake.
            let mut fds = [PollFd::new(self.link.event_fd(), PollFlags::POLLIN)];
            if matches!(poll(&mut fds, LAST_LOOK_MS), Err(e) if e != Errno::EINTR) {
                return;
            }
            self.drain_engine(now);
        }
    }

    /// Hands out what waits; whether something still does.
    fn flush_all(&mut self, now: Instant) -> bool {
        for conn in self.conns.values_mut() {
            conn.flush(now);
        }
        let tty = self.tty.as_mut().is_some_and(|tty| tty.flush() && tty.has_output());
        tty || self.conns.values().any(Conn::has_unsent)
    }

    /// Tells what is damaged of the model.
    fn look_at_check(&mut self) {
        let Some(check) = self.setup.check.filter(|_| !self.check_told) else { return };
        // Asked first: what is found until then is told below.
        self.check_told = check.is_over();
        let state = check.state();
        for part in state.damaged.iter().skip(self.damage_told) {
            log::error!("the model is damaged: {part}");
            if let Some(tty) = &mut self.tty {
                tty.notice(format!("the model is damaged: {part}; answers may be wrong. Copy or pack it again"));
            }
        }
        self.damage_told = state.damaged.len();
        if self.check_told && state.damaged.is_empty() {
            log::info!("the model is as it was packed: {} bytes compared with their hashes", state.bytes);
        }
    }

    /// Tells the supervisor what the start has come by.
    fn tell_stages(&mut self) {
        let Some(supervisor) = &self.setup.supervisor else { return };
        for (stage, told) in Stage::ALL.into_iter().zip(&mut self.told) {
            if let Some(mark) = marks::of(stage).filter(|_| !*told) {
                *told = true;
                // As a beat.
                let _ = supervisor.line.send(Message::Reached(stage, mark));
            }
        }
    }

    /// Tells the supervisor how far the engine is. That the message comes shows that this thread gets on, too.
    fn beat(&mut self, now: Instant) {
        if self.next_beat > now || self.setup.supervisor.is_none() {
            return;
        }
        self.next_beat = now + BEAT_EVERY;
        self.tell_stages();
        let Some(supervisor) = &self.setup.supervisor else { return };
        let operations = supervisor.operations.load(Ordering::Relaxed);
        // Without a supervisor the appliance does not run; a full line says that it does not read.
        let _ = supervisor.line.send(Message::Beat { operations, busy: !self.running.is_empty() });
    }

    fn next_deadline(&self) -> Option<Instant> {
        let draining = match self.stopping {
            Stopping::Draining(until) => Some(until),
            _ => None,
        };
        let conns = self.conns.values().filter_map(Conn::deadline);
        let tty = self.tty.as_ref().and_then(TtyPort::deadline);
        let beat = self.setup.supervisor.as_ref().map(|_| self.next_beat);
        let check = self.setup.check.filter(|_| !self.check_told).map(|_| Instant::now() + CHECK_LOOK_EVERY);
        conns.chain(tty).chain(draining).chain(self.accept_again).chain(beat).chain(check).min()
    }
}

/// One connection too many: says so and closes.
fn turn_away(mut stream: UnixStream) {
    let mut out = Vec::new();
    let full = format!("all {MAX_CONNECTIONS} connections are taken; try again in a moment");
    http::write_reject(&mut out, Reply::LAST, &Reject::unavailable(full));
    // The socket is fresh and its buffer empty: this fits, or the peer is gone.
    let _ = stream.write(&out);
}
