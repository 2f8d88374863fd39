//! `hearth.toml`: what somebody may set on the card. `RawConfig` is the file as it is written, [`Config`] what was checked; every
//! limit is named here. Sockets have a file of their own. Read by `init`, which turns it into arguments of `serve`, and by `hearth config --check`.

mod socket;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use self::socket::RawSocket;
use crate::model::hyper::MAX_CONTEXT;
use crate::serve::access::SocketSetup;
use crate::serve::daemon::{MAX_STEP_MS, MIN_STEP_MS};
use crate::serve::grammar::MAX_GRAMMARS;
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
struct RawConfig {
    model: Option<String>,
    ctx: Option<usize>,
    sequences: Option<usize>,
    step_ms: Option<usize>,
    prefix_positions: Option<usize>,
    grammars: Option<usize>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    serial: Option<String>,
    #[serde(default)]
    socket: Vec<RawSocket>,
    #[serde(default)]
    apps: AppsConfig,
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
    /// Answers that may follow a grammar at once.
    pub grammars: Option<usize>,
    /// Tokens an answer may have where the request names no number.
    pub max_tokens: Option<usize>,
    /// Temperature of requests that name none.
    pub temperature: Option<f32>,
    /// The line to answer on.
    pub serial: Serial,
    /// Where to listen, and who may ask there.
    pub sockets: Vec<SocketSetup>,
    /// What becomes of the programs in `apps/`.
    pub apps: AppsConfig,
}

/// The table `[apps]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AppsConfig {
    /// They are started.
    pub enabled: bool,
    /// When one that ended is started again.
    pub restart: Restart,
}

impl Default for AppsConfig {
    fn default() -> Self {
        Self { enabled: true, restart: Restart::default() }
    }
}

/// When an app that ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    No,
    /// Where it ended with anything but exit code 0.
    #[default]
    OnFailure,
    /// Whatever it ended with.
    Always,
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

/// A setting as `--explain` tells it.
struct Knob {
    key: &'static str,
    unit: &'static str,
    default: &'static str,
}

/// Every setting there is, in the order of [`RawConfig`].
const KNOBS: [Knob; 11] = [
    Knob { key: "model", unit: "path on the partition", default: "the first in models/, else the card's own" },
    Knob { key: "ctx", unit: "tokens a conversation", default: "2048, or what the model was trained for" },
    Knob { key: "sequences", unit: "conversations at once", default: "4" },
    Knob { key: "step_ms", unit: "milliseconds a step beside streams", default: "100" },
    Knob {
        key: "prefix_positions",
        unit: "tokens of past beginnings",
        default: "0, what unused conversations have room for",
    },
    Knob { key: "grammars", unit: "answers at once with a schema or a grammar", default: "4" },
    Knob { key: "max_tokens", unit: "tokens an answer", default: "up to the context's end" },
    Knob { key: "temperature", unit: "0 to 2", default: "0, always the same answer" },
    Knob { key: "serial", unit: "\"console\", a line or \"off\"", default: "\"console\"" },
    Knob { key: "socket", unit: "tables: path, mode, allow", default: "one for owner and group" },
    Knob { key: "apps", unit: "table: enabled, restart", default: "enabled, restart = \"on-failure\"" },
];

/// So many changed letters still make a key look like another.
pub const MAX_EDITS: usize = 2;
/// Longest key that is compared and told, in characters.
pub const MAX_KEY_CHARS: usize = 32;

/// A key that is no setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: `{key}` is no setting{}", nearest.map_or(String::new(), |near| format!("; is `{near}` meant?")))]
pub struct UnknownKey {
    /// The line, from 1.
    pub line: usize,
    /// The key, cut at [`MAX_KEY_CHARS`], without anything that a console would obey.
    pub key: String,
    /// The setting that looks like it.
    pub nearest: Option<&'static str>,
}

impl UnknownKey {
    fn new(line: usize, found: &str) -> Self {
        let key: String = found.chars().take(MAX_KEY_CHARS).flat_map(char::escape_debug).collect();
        let near = KNOBS.iter().map(|knob| (strsim::levenshtein(&key, knob.key), knob.key)).min();
        let nearest = near.filter(|(distance, _)| *distance <= MAX_EDITS).map(|(_, key)| key);
        Self { line, key, nearest }
    }
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
    /// A key is no setting.
    #[error("{0}")]
    Unknown(#[from] UnknownKey),
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
    /// Reads the file at `path`; one that is not there sets nothing. Beside the settings come the keys that are none: the appliance
    /// warns of them and takes the rest, since a word too many is no reason to lose what somebody set.
    ///
    /// # Errors
    /// See [`ConfigError`]; never [`ConfigError::Unknown`].
    pub fn read(path: &Path) -> Result<(Self, Vec<UnknownKey>), ConfigError> {
        text_of(path)?.map_or(Ok(Default::default()), |text| Self::parse(&text))
    }

    /// Checks the text of a file.
    ///
    /// # Errors
    /// See [`ConfigError`]; never [`ConfigError::Unknown`].
    pub fn parse(text: &str) -> Result<(Self, Vec<UnknownKey>), ConfigError> {
        let syntax = |e: toml::de::Error| {
            let line = line_of(text, e.span().map_or(0, |span| span.start));
            ConfigError::Syntax { line, why: e.message().lines().next().unwrap_or_default().to_owned() }
        };
        let keys: BTreeMap<toml::Spanned<String>, IgnoredAny> = toml::from_str(text).map_err(syntax)?;
        let mut unknown: Vec<UnknownKey> = keys
            .keys()
            .filter(|key| KNOBS.iter().all(|knob| knob.key != key.get_ref().as_str()))
            .map(|key| UnknownKey::new(line_of(text, key.span().start), key.get_ref()))
            .collect();
        unknown.sort_by_key(|key| key.line);
        let raw: RawConfig = toml::from_str(text).map_err(syntax)?;
        Ok((Self::checked(raw)?, unknown))
    }

    fn checked(raw: RawConfig) -> Result<Self, ConfigError> {
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
            grammars: number("grammars", raw.grammars, 0, MAX_GRAMMARS)?,
            max_tokens: number("max_tokens", raw.max_tokens, 1, MAX_CONTEXT)?,
            temperature: raw.temperature.map(temperature).transpose()?,
            serial: raw.serial.map_or(Ok(Serial::Console), serial)?,
            sockets: socket::sockets(raw.socket)?,
            apps: raw.apps,
        })
    }
}

/// The file's text; `None`: there is no file.
fn text_of(path: &Path) -> Result<Option<String>, ConfigError> {
    let failed = |e: std::io::Error| ConfigError::Read(e.to_string());
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    if bytes > MAX_CONFIG_BYTES {
        return Err(ConfigError::Read(format!("it has {bytes} bytes, at most {MAX_CONFIG_BYTES} are read")));
    }
    std::fs::read_to_string(path).map(Some).map_err(failed)
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count()
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
    /// Print every setting: unit, default, and what FILE sets
    #[arg(long)]
    explain: bool,
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
    let text = text_of(path).map_err(named)?.unwrap_or_default();
    let (_, unknown) = Config::parse(&text).map_err(named)?;
    if args.explain {
        print!("{}", explained(&text));
    }
    match unknown.into_iter().next() {
        Some(key) => Err(named(key.into())),
        None => Ok(()),
    }
}

/// Every setting on a line, with the value that `text`, which was checked, gives it.
fn explained(text: &str) -> String {
    let set: BTreeMap<String, toml::Spanned<IgnoredAny>> = toml::from_str(text).unwrap_or_default();
    let line = |knob: &Knob| {
        let Knob { key, unit, default } = knob;
        let value = set.get(*key).and_then(|value| text.get(value.span())).unwrap_or("not set");
        // Tables are too long for a line.
        let value = if value.contains(['[', '\n']) { "set" } else { value };
        format!("{key:<17}{value:<24} {unit}; default: {default}\n")
    };
    KNOBS.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_cards_own_file_sets_nothing_and_its_examples_are_taken() {
        let file = include_str!("../image/hearth.toml");
        assert_eq!(Config::parse(file), Ok((Config::default(), Vec::new())));
        let examples: String =
            file.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect::<Vec<_>>().join("\n");
        let (all, unknown) = Config::parse(&examples).unwrap();
        assert_eq!(unknown, []);
        assert!(!explained(&examples).contains("not set"), "the card's file shows every setting there is");
        assert_eq!(all.model, Some("models/name.gguf".into()));
        assert_eq!((all.ctx, all.sequences, all.max_tokens), (Some(2048), Some(4), Some(512)));
        assert_eq!((all.step_ms, all.prefix_positions, all.grammars), (Some(100), Some(0), Some(4)));
        assert_eq!((all.temperature, all.serial), (Some(0.0), Serial::Console));
        assert_eq!(all.apps, AppsConfig { enabled: true, restart: Restart::OnFailure });
        assert_eq!(all.sockets.len(), 1);
        assert_eq!(all.sockets[0].allow.as_ref().map(Vec::len), Some(2));
    }

    #[test]
    fn the_defaults_that_are_told_are_those_that_are_taken() {
        use crate::engine::pace::DEFAULT_STEP_MS;
        use crate::tools::session::{DEFAULT_CONTEXT, DEFAULT_SEQUENCES};
        for (key, taken) in [
            ("ctx", DEFAULT_CONTEXT.to_string()),
            ("sequences", DEFAULT_SEQUENCES.to_string()),
            ("step_ms", DEFAULT_STEP_MS.to_string()),
        ] {
            let told = KNOBS.iter().find(|knob| knob.key == key).unwrap().default;
            assert_eq!(told.split(',').next(), Some(taken.as_str()), "{key}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_line_and_reason() {
        for (text, wanted) in [
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
            ("[apps]\nrestart = true", "line 2: "),
            (
                "[apps]\nrestart = \"ever\"",
                "line 2: unknown variant `ever`, expected one of `no`, `on-failure`, `always`",
            ),
            ("[apps]\nenable = false", "line 2: unknown field `enable`"),
        ] {
            let found = Config::parse(text).unwrap_err().to_string();
            assert!(found.contains(wanted), "{text:?}: {found}");
        }
    }

    #[test]
    fn a_word_too_many_costs_itself_alone_and_the_nearest_setting_is_named() {
        let text = "ctx = 2048\nsequence = 2\nspeed = 11\n[\"\\u001b[2J\"]\na = 1\n";
        let (config, unknown) = Config::parse(text).unwrap();
        assert_eq!((config.ctx, config.sequences), (Some(2048), None));
        let told: Vec<String> = unknown.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "line 2: `sequence` is no setting; is `sequences` meant?",
                "line 3: `speed` is no setting",
                "line 4: `\\u{1b}[2J` is no setting"
            ]
        );
        let folder = tempfile::tempdir().unwrap();
        let check = folder.path().join("hearth.toml");
        std::fs::write(&check, text).unwrap();
        let refused = run(&ConfigArgs { check: check.clone(), explain: false }).unwrap_err().to_string();
        assert!(refused.contains("line 2: `sequence` is no setting"), "{refused}");
        std::fs::write(&check, "ctx = 64").unwrap();
        assert_eq!(run(&ConfigArgs { check, explain: true }), Ok(()));
        assert!(explained("ctx = 64").contains("ctx              64 "));
    }

    #[test]
    fn a_pcs_editor_may_leave_its_marks() {
        assert_eq!(Config::parse("\u{feff}# settings\r\nctx = 64\r\n").unwrap().0.ctx, Some(64));
    }

    #[test]
    fn an_absent_file_sets_nothing_and_a_huge_one_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hearth.toml");
        assert_eq!(Config::read(&path), Ok(Default::default()));
        std::fs::File::create(&path).unwrap().set_len(MAX_CONFIG_BYTES + 1).unwrap();
        assert!(Config::read(&path).unwrap_err().to_string().contains("at most 65536"));
        std::fs::write(&path, b"\xff").unwrap();
        assert!(Config::read(&path).is_err());
        std::fs::write(&path, "serial = \"off\"").unwrap();
        assert_eq!(Config::read(&path).unwrap().0.serial, Serial::Off);
    }
}
