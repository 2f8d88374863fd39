//! The client behind `hearth ask` and `hearth chat`: one blocking connection to the daemon's socket, over the same HTTP
//! API as everybody's. Next on the data's way: the daemon's `serve::conn`.

mod ask;
mod chat;
pub mod health;
pub mod http;
pub mod report;

use std::io;
use std::path::{Path, PathBuf};

use self::http::Question;
use crate::wire::Message;

pub use self::ask::{AskArgs, ask_over, ask_to};
pub use self::chat::{ChatArgs, chat_lines, chat_over};

/// Tokens of an answer where nobody says otherwise: a small model that chooses the likeliest token may go on for ever.
pub const DEFAULT_MAX_TOKENS: usize = 512;

/// The flags that `ask` and `chat` share.
#[derive(Clone, Debug, clap::Args)]
pub struct TalkArgs {
    /// The daemon's socket [default: $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth.sock, /run/hearth/hearth.sock]
    #[arg(long, value_name = "PATH", conflicts_with = "model")]
    pub socket: Option<PathBuf>,
    /// Load this model in this process instead of asking a daemon
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Instruction before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Tokens an answer may have; where the context ends before, it is cut there
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_TOKENS)]
    pub max_tokens: usize,
    /// From 0 (always the same answer) to 2 [default: the daemon's]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Seed of the draw
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl Default for TalkArgs {
    /// What a command line without any of the flags gives.
    fn default() -> Self {
        let max_tokens = DEFAULT_MAX_TOKENS;
        Self { socket: None, model: None, system: None, max_tokens, temperature: None, seed: None }
    }
}

impl TalkArgs {
    fn question(&self, messages: Vec<Message>) -> Question {
        Question {
            messages,
            max_tokens: Some(self.max_tokens),
            temperature: self.temperature,
            seed: self.seed,
            schema: None,
        }
    }

    /// What to say of an answer that has its greatest length.
    fn cut(&self) -> String {
        format!("the answer was cut at --max-tokens {}, or at the context's end", self.max_tokens)
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no daemon answers on {path} ({source}); start one with: hearth serve --model FILE --socket {path}")]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket is there and not for us.
    #[error("{path} may be used by its owner and group; run as one of them")]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("the connection to the daemon broke: {0}")]
    Connection(#[source] io::Error),
    /// The terminal, or what stands in for it.
    #[error("reading the question: {0}")]
    Input(#[source] io::Error),
    /// Writing the answer.
    #[error("writing the answer: {0}")]
    Output(#[source] io::Error),
    /// The terminal's line editor.
    #[error("reading a line: {0}")]
    Editor(#[from] rustyline::error::ReadlineError),
    /// The daemon refused the request.
    #[error("the daemon refused ({status}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The daemon's words.
        message: String,
    },
    /// What answered is no hearth.
    #[error("the answer is not hearth's: {what}")]
    Protocol {
        /// What was wrong with it.
        what: String,
    },
    /// More input than a request may have.
    #[error("{name} is longer than {limit_bytes} bytes, the most that one request may have")]
    TooLong {
        /// Where it came from.
        name: String,
        /// The limit.
        limit_bytes: usize,
    },
    /// Input that is no text.
    #[error("{name} is not UTF-8: see its byte {at_byte}, counted from 0")]
    NotUtf8 {
        /// Where it came from.
        name: String,
        /// Offset of the first byte that is wrong.
        at_byte: usize,
    },
    /// The file of `--schema` is not there, or no JSON.
    #[error("--schema {path}: {why}")]
    Schema {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There is no question.
    #[error("no question: give it as an argument or on standard input")]
    NoQuestion,
}

/// The exit code where the reader of the answer went away: what a shell says of a program that SIGPIPE ended.
pub const OUTPUT_CLOSED: u8 = 141;

impl ClientError {
    /// Whether the reader of the answer went away, as `head -1` does: its own doing, and no error to tell of.
    pub fn is_output_closed(&self) -> bool {
        matches!(self, Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Where a client looks for the daemon, and a daemon serves, if nobody says otherwise: `$HEARTH_SOCKET`, else
/// `$XDG_RUNTIME_DIR/hearth.sock`, else `/run/hearth/hearth.sock`.
pub fn default_socket() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HEARTH_SOCKET")
        .or_else(|| variable("XDG_RUNTIME_DIR").map(|dir| dir.join("hearth.sock")))
        .unwrap_or_else(|| PathBuf::from("/run/hearth/hearth.sock"))
}

/// `hearth ask` against a daemon that runs already.
///
/// # Errors
/// See [`ClientError`].
pub fn ask(args: &AskArgs) -> Result<(), ClientError> {
    ask_over(&socket_of(args.talk.socket.as_deref()), args)
}

/// `hearth chat` against a daemon that runs already.
///
/// # Errors
/// See [`ClientError`].
pub fn chat(args: &ChatArgs) -> Result<(), ClientError> {
    chat_over(&socket_of(args.talk.socket.as_deref()), args)
}

/// An answer as a terminal may see it: control characters but line feeds and tabs go, so that no model can send it an
/// escape sequence.
fn terminal_safe(text: &str) -> String {
    text.chars().filter(|&c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

fn socket_of(given: Option<&Path>) -> PathBuf {
    given.map_or_else(default_socket, Path::to_owned)
}
