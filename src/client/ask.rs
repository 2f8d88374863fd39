//! `hearth ask`: one question, one answer, streamed to standard output.
//! Next on the data's way: `client::http`.

use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::http::{Question, ask_streaming, ask_whole};
use super::{ClientError, terminal_safe};
use crate::wire::Message;

/// Asks one question and prints the answer as it comes.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct AskArgs {
    /// The question; read from standard input if absent
    pub question: Option<String>,
    /// The daemon's socket [default: $HEARTH_SOCKET, $XDG_RUNTIME_DIR/hearth.sock, /run/hearth/hearth.sock]
    #[arg(long, value_name = "PATH", conflicts_with = "model")]
    pub socket: Option<PathBuf>,
    /// Load this model in this process instead of asking a daemon
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Instruction before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Length of the answer in tokens
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// From 0 (always the same answer) to 2
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Seed of the draw
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Print the daemon's whole answer as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// `hearth ask` against the daemon at `socket`.
///
/// # Errors
/// See [`ClientError`].
pub fn ask_over(socket: &Path, args: &AskArgs) -> Result<(), ClientError> {
    let text = match &args.question {
        Some(question) => question.clone(),
        None => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).map_err(ClientError::Input)?;
            text
        }
    };
    let mut out = io::stdout();
    let terminal = out.is_terminal();
    ask_to(socket, args, text.trim(), terminal, &mut out)
}

/// Asks `text` and writes the answer to `out`, which may be a terminal.
///
/// # Errors
/// See [`ClientError`].
pub fn ask_to(
    socket: &Path,
    args: &AskArgs,
    text: &str,
    terminal: bool,
    out: &mut dyn Write,
) -> Result<(), ClientError> {
    if text.is_empty() {
        return Err(ClientError::NoQuestion);
    }
    let mut messages: Vec<Message> = args.system.iter().map(Message::system).collect();
    messages.push(Message::user(text));
    let question = Question { messages, max_tokens: args.max_tokens, temperature: args.temperature, seed: args.seed };
    let never = AtomicBool::new(false);
    if args.json {
        let whole = ask_whole(socket, &question, &never)?;
        return writeln!(out, "{whole}").map_err(ClientError::Output);
    }
    let mut write = |text: &str| out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(ClientError::Output);
    ask_streaming(socket, &question, &never, |text| if terminal { write(&terminal_safe(text)) } else { write(text) })?;
    write("\n")
}
