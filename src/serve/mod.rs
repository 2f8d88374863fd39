//! The I/O thread: one epoll loop over the socket's connections, the serial line, the signals and the engine's ring. It
//! turns requests into jobs and tokens into text, and is the only place that touches a client. The engine never waits for
//! it: what a client does not read, a client loses. Next on the data's way: `engine::queue`.
//!
//! Its memory is bounded and planned, see [`memory`]: [`MAX_INPUT_BYTES`] in for all connections together, [`conn::MAX_OUTPUT_BYTES`]
//! out for each of [`MAX_CONNECTIONS`] or one whole answer, [`memory::max_jobs`] prompts, and one request at a time on its way to a job.

pub mod access;
mod admit;
pub mod check;
pub mod conn;
pub mod daemon;
pub mod grammar;
pub mod listener;
pub mod memory;
pub mod metrics;
pub mod model_text;
mod pins;
mod private;
mod server;
pub mod text;
pub mod tty;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use nix::errno::Errno;

use self::access::SocketSetup;
pub use self::admit::Defaults;
use self::check::Check;
use self::listener::SocketError;
use self::metrics::Facts;
use self::server::Server;
use self::text::TextModel;
use crate::engine::queue::EngineLink;
use crate::sys::heartbeat;
use crate::sys::report::Reports;
use crate::sys::sandbox::SandboxError;
use crate::sys::tty::TtyError;

/// Connections at once; the next one takes the place of the one idle longest, or gets 503 if none is. More than the engine's ring holds, so that a full ring is told as 429.
pub const MAX_CONNECTIONS: usize = 64;
/// Input that all connections together may hold, in bytes; beyond, the one that holds most gets 503.
pub const MAX_INPUT_BYTES: usize = 2 * 1024 * 1024;
/// Running answers may take this long after the first signal to stop.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// What the I/O thread is to serve, and where.
pub struct ServeSetup<'a> {
    /// The UNIX sockets, the first first: where they lie and who may ask there.
    pub sockets: Vec<SocketSetup>,
    /// The serial line, if there is one.
    pub tty: Option<&'a Path>,
    /// The model's text side.
    pub text: &'a dyn TextModel,
    /// The model's name in answers.
    pub model_id: &'a str,
    /// Positions of a sequence, prompt and answer together.
    pub context_tokens: usize,
    /// Sequences that the engine runs at once.
    pub sequences: usize,
    /// Width of an embedding.
    pub n_embd: usize,
    /// Answers that may follow a grammar at once.
    pub grammars: usize,
    /// What requests that say nothing get.
    pub defaults: Defaults,
    /// Take SIGTERM and SIGINT: the first drains, the second stops at once.
    pub signals: bool,
    /// A byte on this stream drains as SIGTERM does, a second one stops at once; so does its end, for whoever runs the
    /// daemon inside a process of its own.
    pub stop: Option<UnixStream>,
    /// Whoever started this process and looks after it.
    pub supervisor: Option<Supervisor>,
    /// Where the supervisor records failures, for `/status`.
    pub records: Option<&'a Path>,
    /// The comparison of the model with its hashes, which pauses while answers run.
    pub check: Option<&'a Check>,
    /// Where the supervisor writes down what apps do, for `/status` and `/log`.
    pub apps: Option<&'a Path>,
    /// What `/metrics` tells of the plan and the engine.
    pub facts: Facts,
    /// What `/v1/plan` answers.
    pub plan: serde_json::Value,
    /// Confines the I/O thread, once everything that it needs is open.
    pub confine: Box<dyn FnOnce() -> Result<(), SandboxError> + 'a>,
    /// Called once the sockets take connections.
    pub ready: Box<dyn FnOnce() + 'a>,
}

/// The line to whoever supervises this process, and what tells them that the engine gets on.
#[derive(Debug)]
pub struct Supervisor {
    /// The line.
    pub line: heartbeat::Line,
    /// Operations begun by the engine; see `Workers::operations`.
    pub operations: Arc<AtomicU64>,
    /// What the supervisor reports, for whoever asks.
    pub reports: Reports,
}

/// Why the daemon cannot serve, or not any longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The serial line.
    #[error(transparent)]
    Tty(#[from] TtyError),
    /// Signal handlers.
    #[error("taking over SIGTERM and SIGINT: {0}")]
    Signals(#[source] io::Error),
    /// The sandbox, with `--sandbox=require`.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The engine ended before it was told to.
    #[error("the engine ended by itself; this is a defect in hearth")]
    EngineGone,
    /// The epoll set.
    #[error("waiting for clients: {0}")]
    Poll(#[from] Errno),
}

/// Serves until a signal or [`ServeSetup::stop`] says otherwise, and then stops the engine behind `link`, whatever the
/// reason for the end: the caller can join the engine's thread.
///
/// # Errors
/// See [`ServeError`]. Nothing a client does is an error here.
pub fn run(setup: ServeSetup<'_>, mut link: EngineLink<'_>) -> Result<(), ServeError> {
    let result = Server::open(setup, &mut link).and_then(Server::run);
    link.shutdown();
    result
}
