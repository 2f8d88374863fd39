//! Offline jobs, one file each: JSON lines in, JSON lines out, one object a line.
//!
//! `--help` of each is its interface. A bad line gets an error object and the next line is read; the exit code tells at the end.
//! [`session`] loads a model for the ones that compute.

pub mod bench;
pub mod generate;
pub mod inspect;
pub mod pack;
pub mod perplexity;
pub mod plan;
mod roofline;
pub mod score;
pub mod scorer;
pub mod selftest;
pub mod session;
pub mod tokenize;

use std::io::{BufRead, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::text::{Detokenizer, TokenId, Vocab};
use session::SessionError;

/// Longest line that a tool reads, in bytes.
pub const MAX_LINE_BYTES: u64 = 16 << 20;

/// Why a tool did not do all it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A flag's value.
    #[error("{0}")]
    Usage(String),
    /// The model.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// `hearth pack`.
    #[error(transparent)]
    Pack(#[from] pack::PackError),
    /// `hearth inspect --verify` cannot tell.
    #[error("{path}: {source}")]
    Verify {
        /// The file.
        path: PathBuf,
        /// Why.
        source: crate::model::packed::VerifyError,
    },
    /// `hearth inspect --verify` found damage.
    #[error("{path}: {damaged} of {parts} parts are damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Parts that are not as they were written.
        damaged: usize,
        /// Tensors, and the header.
        parts: usize,
    },
    /// The one input of a tool that reads no lines.
    #[error(transparent)]
    Line(#[from] LineError),
    /// Lines that got an error object.
    #[error("{bad} of {all} lines could not be answered")]
    BadLines {
        /// How many.
        bad: usize,
        /// Of how many.
        all: usize,
    },
    /// `hearth selftest` found something wrong.
    #[error("{failed} of {checks} checks failed")]
    Selftest {
        /// How many.
        failed: usize,
        /// Of how many.
        checks: usize,
    },
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Standard input or output.
    #[error("standard input or output: {0}")]
    Stdio(#[from] std::io::Error),
}

impl ToolError {
    /// 2 for what another command line would mend, 130 after a signal, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Pack(pack::PackError::Exists { .. }) => 2,
            Self::Pack(pack::PackError::Stopped { .. }) => 130,
            Self::Usage(_) | Self::Session(SessionError::Flag { .. } | SessionError::Kernels(_)) => 2,
            _ => 1,
        }
    }
}

/// Why one line got no answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LineError(pub String);

/// Answers every line of stdin on stdout.
///
/// # Errors
/// Standard input or output failed, or at least one line got an error object.
pub fn answer_lines<Q: DeserializeOwned, A: Serialize>(
    answer: impl FnMut(Q) -> Result<A, LineError>,
) -> Result<(), ToolError> {
    answer_all(&mut std::io::stdin().lock(), &mut std::io::stdout().lock(), answer)
}

fn answer_all<Q: DeserializeOwned, A: Serialize>(
    input: &mut impl BufRead,
    output: &mut impl Write,
    mut answer: impl FnMut(Q) -> Result<A, LineError>,
) -> Result<(), ToolError> {
    let (mut line, mut all, mut bad) = (Vec::new(), 0, 0);
    loop {
        line.clear();
        std::io::Read::take(&mut *input, MAX_LINE_BYTES + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            break;
        }
        all += 1;
        let answered = if line.len() as u64 > MAX_LINE_BYTES {
            skip_line(input, &line)?;
            Err(LineError(format!("longer than {MAX_LINE_BYTES} bytes")))
        } else if line.trim_ascii().is_empty() {
            continue;
        } else {
            serde_json::from_slice(&line).map_err(|error| LineError(error.to_string())).and_then(&mut answer)
        };
        match answered {
            Ok(answer) => serde_json::to_writer(&mut *output, &answer).map_err(std::io::Error::from)?,
            Err(error) => {
                bad += 1;
                let error = json!({"error": {"line": all, "message": error.to_string()}});
                serde_json::to_writer(&mut *output, &error).map_err(std::io::Error::from)?;
            }
        }
        output.write_all(b"\n")?;
        output.flush()?;
    }
    if bad > 0 { Err(ToolError::BadLines { bad, all }) } else { Ok(()) }
}

/// Reads on to the end of a line whose beginning was too long.
fn skip_line(input: &mut impl BufRead, begun: &[u8]) -> std::io::Result<()> {
    let mut ended = begun.ends_with(b"\n");
    while !ended {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            break;
        }
        let end = buffer.iter().position(|&byte| byte == b'\n');
        ended = end.is_some();
        let used = end.map_or(buffer.len(), |end| end + 1);
        input.consume(used);
    }
    Ok(())
}

/// The tokens of a request that has either a text or ids.
fn prompt_ids(vocab: &Vocab<'_>, text: Option<String>, ids: Option<Vec<u32>>) -> Result<Vec<TokenId>, LineError> {
    match (text, ids) {
        (Some(text), None) => vocab.encode(&text, true, true).map_err(|error| LineError(error.to_string())),
        (None, Some(ids)) => Ok(ids.into_iter().map(TokenId).collect()),
        _ => Err(LineError("exactly one of a text and \"ids\" is needed".into())),
    }
}

/// What ids print as, control tokens left out.
fn detokenize(vocab: &Vocab<'_>, ids: &[TokenId]) -> String {
    let mut detokenizer = Detokenizer::new();
    let mut text = String::new();
    for &id in ids {
        text.push_str(detokenizer.push(vocab, id));
    }
    text.push_str(detokenizer.finish());
    text
}

fn print_json(value: &impl Serialize) -> Result<(), ToolError> {
    let line = serde_json::to_string(value).map_err(std::io::Error::from)?;
    print_line(&line)
}

fn print_line(line: &str) -> Result<(), ToolError> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

fn check_flag(flag: &str, found: usize, least: usize, most: usize) -> Result<(), ToolError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(ToolError::Usage(format!("--{flag} is {found}, must be from {least} to {most}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn doubled(input: &[u8]) -> (String, Result<(), ToolError>) {
        let mut output = Vec::new();
        let result = answer_all(&mut &*input, &mut output, |n: u32| {
            n.checked_mul(2).ok_or_else(|| LineError("too large".into()))
        });
        (String::from_utf8(output).unwrap(), result)
    }

    #[test]
    fn every_line_is_answered_and_bad_ones_are_named() {
        let (output, result) = doubled(b"1\n\nx\n4294967295\n3");
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!((lines[0], lines[3]), ("2", "6"));
        assert!(lines[1].starts_with(r#"{"error":{"line":3,"message":"expected value"#), "{output}");
        assert_eq!(lines[2], r#"{"error":{"line":4,"message":"too large"}}"#);
        assert!(matches!(result, Err(ToolError::BadLines { bad: 2, all: 5 })));
    }

    #[test]
    fn an_overlong_line_costs_itself_alone() {
        let mut input = vec![b' '; usize::try_from(MAX_LINE_BYTES).unwrap() + 10_000];
        input.extend(b"\n21\n");
        let (output, result) = doubled(&input);
        assert_eq!(output.lines().count(), 2);
        assert!(output.ends_with("\n42\n") && result.is_err());
    }
}
