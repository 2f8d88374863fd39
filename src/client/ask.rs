//! `hearth ask`: one question, one answer, streamed to standard output.
//! Next on the data's way: `client::http`.

use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::http::{Ended, ask_streaming, ask_whole};
use super::{ClientError, TalkArgs, terminal_safe};
use crate::wire::Message;

/// Asks one question and prints the answer as it comes.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct AskArgs {
    /// The question; read from standard input if absent
    pub question: Option<String>,
    /// Whom to ask, and how.
    #[command(flatten)]
    pub talk: TalkArgs,
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
    if ask_to(socket, args, text.trim(), terminal, &mut out)? == Ended::Length {
        eprintln!("hearth: {}", args.talk.cut());
    }
    Ok(())
}

/// Asks `text` and writes the answer to `out`, which may be a terminal; how it ended.
///
/// # Errors
/// See [`ClientError`].
pub fn ask_to(
    socket: &Path,
    args: &AskArgs,
    text: &str,
    terminal: bool,
    out: &mut dyn Write,
) -> Result<Ended, ClientError> {
    if text.is_empty() {
        return Err(ClientError::NoQuestion);
    }
    let mut messages: Vec<Message> = args.talk.system.iter().map(Message::system).collect();
    messages.push(Message::user(text));
    let question = args.talk.question(messages);
    let never = AtomicBool::new(false);
    if args.json {
        let whole = ask_whole(socket, &question, &never)?;
        let cut = whole["choices"][0]["finish_reason"] == "length";
        writeln!(out, "{whole}").map_err(ClientError::Output)?;
        return Ok(if cut { Ended::Length } else { Ended::Whole });
    }
    let mut write = |text: &str| out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(ClientError::Output);
    let on_text = |text: &str| if terminal { write(&terminal_safe(text)) } else { write(text) };
    let ended = ask_streaming(socket, &question, &never, on_text)?;
    write("\n")?;
    Ok(ended)
}
