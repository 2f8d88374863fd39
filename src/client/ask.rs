//! `hearth ask`: one question, one answer, streamed to standard output.
//! Next on the data's way: `client::http`.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::http::{Ended, ask_streaming, ask_whole};
use super::{ClientError, TalkArgs, terminal_safe};
use crate::wire::Message;
use crate::wire::http::MAX_BODY_BYTES;

/// Bytes that standard input or a schema may have: the daemon takes no greater request.
pub const MAX_INPUT_BYTES: usize = MAX_BODY_BYTES;

/// Asks one question and prints the answer as it comes
///
/// With a question, what is piped into standard input follows it after an empty line; with none, or with -, it is the question.
/// Exit code: 0 answered, 1 no answer, 2 a wrong command line, 130 ended by ^C, which cancels the answer in the daemon, 141
/// where the reader of the output went away.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct AskArgs {
    /// The question; read from standard input if absent or -
    pub question: Option<String>,
    /// Whom to ask, and how.
    #[command(flatten)]
    pub talk: TalkArgs,
    /// Print the daemon's whole answer as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Ask for an answer that is JSON after the JSON schema in this file
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
}

/// `hearth ask` against the daemon at `socket`.
///
/// # Errors
/// See [`ClientError`].
pub fn ask_over(socket: &Path, args: &AskArgs) -> Result<(), ClientError> {
    let stdin = io::stdin();
    let given = args.question.as_deref().filter(|&question| question != "-");
    let text = match given {
        Some(question) if stdin.is_terminal() => question.to_owned(),
        given => question_with(given, &read_input("standard input", stdin.lock())?),
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
    let mut question = args.talk.question(messages);
    if let Some(path) = &args.schema {
        question.schema = Some(schema_of(path)?);
    }
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

/// The question, an empty line, and what was piped in; one of them where the other is absent or blank.
fn question_with(question: Option<&str>, input: &str) -> String {
    match question {
        Some(question) if input.trim().is_empty() => question.to_owned(),
        Some(question) => format!("{question}\n\n{input}"),
        None => input.to_owned(),
    }
}

/// All of `input`, called `name` in errors: at most [`MAX_INPUT_BYTES`] of UTF-8.
fn read_input(name: &str, input: impl Read) -> Result<String, ClientError> {
    let mut bytes = Vec::new();
    // One byte more tells what is full from what is too long.
    let bound = u64::try_from(MAX_INPUT_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    input.take(bound).read_to_end(&mut bytes).map_err(ClientError::Input)?;
    if bytes.len() > MAX_INPUT_BYTES {
        return Err(ClientError::TooLong { name: name.to_owned(), limit_bytes: MAX_INPUT_BYTES });
    }
    String::from_utf8(bytes)
        .map_err(|e| ClientError::NotUtf8 { name: name.to_owned(), at_byte: e.utf8_error().valid_up_to() })
}

fn schema_of(path: &Path) -> Result<serde_json::Value, ClientError> {
    let name = path.display().to_string();
    let wrong = |why: String| ClientError::Schema { path: path.to_owned(), why };
    let text = read_input(&name, File::open(path).map_err(|e| wrong(e.to_string()))?)?;
    serde_json::from_str(&text).map_err(|e| wrong(format!("not JSON: {e}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn piped_input_follows_the_question() {
        assert_eq!(question_with(Some("why?"), "a log\n"), "why?\n\na log\n");
        assert_eq!(question_with(Some("why?"), "\n"), "why?");
        assert_eq!(question_with(None, "a log\n"), "a log\n");
    }

    #[test]
    fn input_is_bounded_and_utf8() {
        assert_eq!(read_input("x", vec![b'a'; MAX_INPUT_BYTES].as_slice()).unwrap().len(), MAX_INPUT_BYTES);
        let long = read_input("x", io::repeat(b'a')).unwrap_err();
        assert_eq!(long.to_string(), "x is longer than 262144 bytes, the most that one request may have");
        let bad = read_input("x", &b"gr\xfcn"[..]).unwrap_err();
        assert_eq!(bad.to_string(), "x is not UTF-8: see its byte 2, counted from 0");
    }
}
