//! `hearth.toml`: what somebody may set on the card. `RawConfig` is the file as it is written, [`Config`] what was checked; every
//! limit is named here. Read by `init`, which turns it into arguments of `serve`, and by `hearth config --check`.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::model::hyper::MAX_CONTEXT;
use crate::serve::daemon::{MAX_STEP_MS, MIN_STEP_MS};
use crate::tools::session::{MAX_PREFIX_POSITIONS, MAX_SEQUENCES};

/// Largest file that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 64 * 1024;
/// Fewest positions a sequence may have: a chat template takes some 30 before the first word.
pub const MIN_CONTEXT: usize = 64;
/// Highest temperature.
pub const MAX_TEMPERATURE: f32 = 2.0;
/// Longest device name, in bytes.
pub const MAX_DEVICE_BYTES: usize = 64;

/// The file, value by value; what is absent is as it would be without the file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    model: Option<String>,
    ctx: Option<usize>,
    sequences: Option<usize>,
    step_ms: Option<usize>,
    prefix_positions: Option<usize>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    serial: Option<String>,
}

/// Settings that were checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// The model, relative to the card's first partition; `None`: the first in `models/`, else the card's own.
    pub model: Option<PathBuf>,
    /// Positions a sequence.
    pub ctx: Option<usize>,
    /// Sequences at once.
    pub sequences: Option<usize>,
    /// How long a step may take while answers stream, in milliseconds.
    pub step_ms: Option<usize>,
    /// Positions of the prefix cache beside those of the sequences.
    pub prefix_positions: Option<usize>,
    /// Tokens an answer may have where the request names no number.
    pub max_tokens: Option<usize>,
    /// Temperature of requests that name none.
    pub temperature: Option<f32>,
    /// The line to answer on.
    pub serial: Serial,
}

/// Where people and programs type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Serial {
    /// The kernel's console.
    #[default]
    Console,
    /// Another line.
    Device(PathBuf),
    /// No line: the socket alone.
    Off,
}

/// Why a configuration is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{0}")]
    Read(String),
    /// It is not TOML, or names something that is not a setting, or gives it a value of another kind.
    #[error("line {line}: {why}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// A value is out of range.
    #[error("{key} is {found}, must be {wanted}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What it is.
        found: String,
        /// What would be right.
        wanted: String,
    },
}

impl Config {
    /// Reads the file at `path`; one that is not there sets nothing.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |e: std::io::Error| ConfigError::Read(e.to_string());
        let bytes = match std::fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(failed(e)),
        };
        if bytes > MAX_CONFIG_BYTES {
            return Err(ConfigError::Read(format!("it has {bytes} bytes, at most {MAX_CONFIG_BYTES} are read")));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(failed)?)
    }

    /// Checks the text of a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count();
            ConfigError::Syntax { line, why: e.message().lines().next().unwrap_or_default().to_owned() }
        })?;
        let number = |key, found: Option<usize>, least: usize, most: usize| match found {
            Some(n) if n < least || n > most => {
                Err(ConfigError::Value { key, found: n.to_string(), wanted: format!("from {least} to {most}") })
            }
            found => Ok(found),
        };
        Ok(Self {
            model: raw.model.map(model_path).transpose()?,
            ctx: number("ctx", raw.ctx, MIN_CONTEXT, MAX_CONTEXT)?,
            sequences: number("sequences", raw.sequences, 1, MAX_SEQUENCES)?,
            step_ms: number("step_ms", raw.step_ms, MIN_STEP_MS as usize, MAX_STEP_MS as usize)?,
            prefix_positions: number("prefix_positions", raw.prefix_positions, 0, MAX_PREFIX_POSITIONS)?,
            max_tokens: number("max_tokens", raw.max_tokens, 1, MAX_CONTEXT)?,
            temperature: raw.temperature.map(temperature).transpose()?,
            serial: raw.serial.map_or(Ok(Serial::Console), serial)?,
        })
    }
}

/// A path below the partition's root, without a way out.
fn model_path(text: String) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(&text);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    if text.is_empty() || !inside || text.contains('\0') {
        let wanted = "a path on this partition, such as \"models/name.gguf\"".to_owned();
        return Err(ConfigError::Value { key: "model", found: format!("{text:?}"), wanted });
    }
    Ok(path)
}

fn temperature(value: f32) -> Result<f32, ConfigError> {
    if (0.0..=MAX_TEMPERATURE).contains(&value) {
        return Ok(value);
    }
    let wanted = format!("from 0 (always the same answer) to {MAX_TEMPERATURE}");
    Err(ConfigError::Value { key: "temperature", found: value.to_string(), wanted })
}

fn serial(text: String) -> Result<Serial, ConfigError> {
    let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match text.as_str() {
        "console" => Ok(Serial::Console),
        "off" => Ok(Serial::Off),
        device if device.len() <= MAX_DEVICE_BYTES && device.strip_prefix("/dev/tty").is_some_and(is_name) => {
            Ok(Serial::Device(text.into()))
        }
        _ => {
            let wanted = "\"console\", \"off\" or a line such as \"/dev/ttyAMA1\"".to_owned();
            Err(ConfigError::Value { key: "serial", found: format!("{text:?}"), wanted })
        }
    }
}

/// Check a configuration, line and reason where it is refused.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// Refuse what the appliance would not take, with exit code 1
    #[arg(long, value_name = "FILE")]
    check: PathBuf,
}

/// `hearth config`.
///
/// # Errors
/// The file is absent or would not be taken.
pub fn run(args: &ConfigArgs) -> Result<(), ConfigError> {
    let path = &args.check;
    if !path.exists() {
        return Err(ConfigError::Read(format!("{}: there is no such file", path.display())));
    }
    let named = |e: ConfigError| ConfigError::Read(format!("{}: {e}", path.display()));
    Config::read(path).map_err(named)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_cards_own_file_sets_nothing_and_its_examples_are_taken() {
        let file = include_str!("../image/hearth.toml");
        assert_eq!(Config::parse(file), Ok(Config::default()));
        let examples: String =
            file.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect::<Vec<_>>().join("\n");
        let all = Config::parse(&examples).unwrap();
        assert_eq!(all.model, Some("models/name.gguf".into()));
        assert_eq!((all.ctx, all.sequences, all.max_tokens), (Some(2048), Some(4), Some(512)));
        assert_eq!((all.step_ms, all.prefix_positions), (Some(100), Some(0)));
        assert_eq!((all.temperature, all.serial), (Some(0.0), Serial::Console));
    }

    #[test]
    fn what_is_wrong_is_named_with_line_and_reason() {
        for (text, wanted) in [
            ("ctx = 2048\nctxx = 1\n", "line 2: unknown field `ctxx`"),
            ("\n\nctx = \"many\"", "line 3: invalid type: string \"many\""),
            ("ctx = 2048\n= 3", "line 2: "),
            ("ctx = -1", "line 1: invalid value"),
            ("ctx = 63", "ctx is 63, must be from 64 to"),
            ("sequences = 0", "sequences is 0, must be from 1 to 256"),
            ("step_ms = 0", "step_ms is 0, must be from 1 to 60000"),
            ("temperature = nan", "temperature is NaN, must be from 0"),
            ("temperature = 2.1", "temperature is 2.1, must be"),
            ("model = \"../etc/passwd\"", "model is \"../etc/passwd\", must be a path on this partition"),
            ("model = \"/dev/sda\"", "model is \"/dev/sda\", must be a path"),
            ("model = \"\"", "model is \"\", must be a path"),
            ("serial = \"/dev/mem\"", "serial is \"/dev/mem\", must be \"console\""),
            ("serial = \"/dev/tty/../mem\"", "must be \"console\""),
        ] {
            let found = Config::parse(text).unwrap_err().to_string();
            assert!(found.contains(wanted), "{text:?}: {found}");
        }
    }

    #[test]
    fn a_pcs_editor_may_leave_its_marks() {
        assert_eq!(Config::parse("\u{feff}# settings\r\nctx = 64\r\n").unwrap().ctx, Some(64));
    }

    #[test]
    fn an_absent_file_sets_nothing_and_a_huge_one_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hearth.toml");
        assert_eq!(Config::read(&path), Ok(Config::default()));
        std::fs::File::create(&path).unwrap().set_len(MAX_CONFIG_BYTES + 1).unwrap();
        assert!(Config::read(&path).unwrap_err().to_string().contains("at most 65536"));
        std::fs::write(&path, b"\xff").unwrap();
        assert!(Config::read(&path).is_err());
        std::fs::write(&path, "serial = \"off\"").unwrap();
        assert_eq!(Config::read(&path).unwrap().serial, Serial::Off);
    }
}
