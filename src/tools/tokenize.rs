//! `hearth tokenize`: text to token ids and back, one JSON object a line.
//! Next on the data's way: `text::Vocab`; nothing is computed, so any model file whose tokenizer is supported will do.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::session::SessionError;
use super::{LineError, ToolError, answer_all};
use crate::model::gguf::Gguf;
use crate::model::vocab;
use crate::sys::map::Mapping;
use crate::text::{TokenId, Vocab};

/// Turn text into tokens and tokens into text; JSON lines in and out.
///
/// stdin:  {"text": "...", "add_special": false, "parse_special": false} or {"ids": [1, 2]}, one object a line
/// stdout: {"ids": [...]} or {"text": "..."} or {"error": {"line", "message"}}
///         add_special: BOS and EOS as the model wants them; parse_special: text that looks like a control token is one
///         {"text"} shows control tokens; bytes that are no UTF-8 become U+FFFD
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct TokenizeArgs {
    /// The model file (GGUF), or its first part up to the tensors
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    text: Option<String>,
    #[serde(default)]
    add_special: bool,
    #[serde(default)]
    parse_special: bool,
    ids: Option<Vec<u32>>,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ids(Vec<u32>),
    Text(String),
}

/// Runs the tool on stdin and stdout.
///
/// # Errors
/// The file has no supported tokenizer, or a line could not be answered.
pub fn run(args: &TokenizeArgs) -> Result<(), ToolError> {
    run_on(&args.model, &mut std::io::stdin().lock(), &mut std::io::stdout().lock())
}

/// Runs the tool on any input and output.
///
/// # Errors
/// As [`run`].
pub fn run_on(model: &Path, input: &mut impl BufRead, output: &mut impl Write) -> Result<(), ToolError> {
    let mapping = Mapping::open(model).map_err(SessionError::from)?;
    let vocab = load(model, mapping.bytes())?;
    answer_all(input, output, |request: Request| answer(&vocab, request))
}

fn load<'m>(path: &Path, bytes: &'m [u8]) -> Result<Vocab<'m>, SessionError> {
    let gguf = Gguf::parse(bytes).map_err(|source| SessionError::model(path, source.into()))?;
    vocab::load(&gguf).map_err(|source| SessionError::vocab(path, source))
}

fn answer(vocab: &Vocab<'_>, request: Request) -> Result<Answer, LineError> {
    match (request.text, request.ids) {
        (Some(text), None) => {
            let ids = vocab.encode(&text, request.add_special, request.parse_special);
            let ids = ids.map_err(|error| LineError(error.to_string()))?;
            Ok(Answer::Ids(ids.into_iter().map(|id| id.0).collect()))
        }
        (None, Some(ids)) => {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab.len()) {
                return Err(LineError(format!("id {id} is outside the vocabulary of {} tokens", vocab.len())));
            }
            let ids: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
            Ok(Answer::Text(String::from_utf8_lossy(&vocab.decode(&ids, true)).into_owned()))
        }
        _ => Err(LineError("exactly one of \"text\" and \"ids\" is needed".into())),
    }
}
