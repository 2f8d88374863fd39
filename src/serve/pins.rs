//! `--pin`: system prompts whose keys and values are computed before "ready" and kept, so that a conversation that begins with
//! one starts at its first own word. Called by `serve::daemon`; next on the data's way: `engine::prefix`.

use std::path::PathBuf;

use super::daemon::DaemonError;
use super::text::TextModel;
use crate::engine::Engine;
use crate::text::TokenId;
use crate::wire::Message;

/// Largest file of a system prompt, in bytes.
pub const MAX_PIN_BYTES: u64 = 256 * 1024;
/// Positions that a chat template puts around a system prompt, at most, and a block not quite full.
const TEMPLATE_POSITIONS: usize = 128;
/// Bytes of text a token, at least, on average over a system prompt: languages with few words in the vocabulary have some two.
const LEAST_BYTES_A_TOKEN: usize = 2;

/// A file and its text.
pub(super) struct Pin {
    path: PathBuf,
    text: String,
}

/// Reads the files.
pub(super) fn read(paths: &[PathBuf]) -> Result<Vec<Pin>, DaemonError> {
    let one = |path: &PathBuf| {
        let io = |source| DaemonError::Io { what: path.display().to_string(), source };
        let bytes = std::fs::metadata(path).map_err(io)?.len();
        if bytes > MAX_PIN_BYTES {
            let path = path.display();
            return Err(DaemonError::Usage(format!("{path}: {bytes} bytes, a system prompt may have {MAX_PIN_BYTES}")));
        }
        Ok(Pin { path: path.clone(), text: std::fs::read_to_string(path).map_err(io)? })
    };
    paths.iter().map(one).collect()
}

/// Positions that all of them take at most, as far as their length tells.
pub(super) fn most_positions(pins: &[Pin]) -> usize {
    pins.iter().map(|pin| pin.text.len() / LEAST_BYTES_A_TOKEN + TEMPLATE_POSITIONS).sum()
}

/// Has the engine compute and keep them.
pub(super) fn compute(
    pins: &[Pin],
    engine: &mut Engine<'_>,
    text: &dyn TextModel,
    date: Option<&str>,
) -> Result<(), DaemonError> {
    for pin in pins {
        let usage = |why: String| DaemonError::Usage(format!("--pin {}: {why}", pin.path.display()));
        let tokens = beginning(text, &pin.text, date).map_err(usage)?;
        let kept = engine.pin(std::slice::from_ref(&tokens)).map_err(|why| usage(why.to_string()))?;
        log::info!("pinned {} tokens of {}; {kept} in all", tokens.len(), pin.path.display());
    }
    Ok(())
}

/// What every conversation with this system prompt begins with: what two of them have in common.
fn beginning(text: &dyn TextModel, system: &str, date: Option<&str>) -> Result<Vec<TokenId>, String> {
    // A file's last line ends with a line feed, a system prompt in a request does not.
    let system = system.strip_suffix('\n').unwrap_or(system);
    let with = |question: &str| {
        let message = |role, content: &str| Message { role, content: content.to_owned() };
        text.encode_chat(&[message("system", system), message("user", question)], date)
    };
    let (mut one, other) = (with("A")?, with("7")?);
    let common = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
    one.truncate(common);
    Ok(one)
}
