//! What somebody set on the console, kept over a restart: a few typed values on the state partition that go before `hearth.toml`.
//! PID 1 alone writes them, each change whole beside the old file, synced, and renamed over it: what it acknowledges is on the card,
//! and power that fails leaves the one file or the other. `hearth serve` reads them when it starts and asks PID 1 to keep a change
//! ([`super::heartbeat`]). Next on the data's way: `serve::server`, whose defaults they are.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The file's name on the state partition.
pub const NAME: &str = "settings";
/// Most of the file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 4096;
/// Highest temperature.
pub const MAX_TEMPERATURE: f32 = 2.0;
/// Most tokens that an answer may be given; the context is the limit in any case.
pub const MAX_TOKENS: u32 = 1 << 22;
/// The value by which a setting is what it would be without the console.
pub const DEFAULT: &str = "default";

/// What is set; `None`: as `hearth.toml` says, or as it is without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Temperature of requests that name none.
    pub temperature: Option<f32>,
    /// Tokens that an answer may have where the request names no number.
    pub max_tokens: Option<u32>,
}

/// One setting and its new value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// See [`Settings::temperature`].
    Temperature(Option<f32>),
    /// See [`Settings::max_tokens`].
    MaxTokens(Option<u32>),
}

/// Why a change is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// There is no such setting.
    #[error("/set takes temperature or max_tokens, and a value or \"{DEFAULT}\"; /settings shows what is set")]
    Unknown,
    /// The value is no number, or out of range.
    #[error("{key} takes {wanted}, or \"{DEFAULT}\"")]
    Value {
        /// The setting.
        key: &'static str,
        /// What would be right.
        wanted: String,
    },
}

impl Change {
    /// The change that `NAME VALUE` asks for.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn parse(text: &str) -> Result<Self, ChangeError> {
        let mut words = text.split_whitespace();
        let (Some(key), Some(value), None) = (words.next(), words.next(), words.next()) else {
            return Err(ChangeError::Unknown);
        };
        let change = match (key, value) {
            ("temperature", DEFAULT) => Some(Self::Temperature(None)),
            ("temperature", value) => value.parse().ok().map(|t| Self::Temperature(Some(t))),
            ("max_tokens", DEFAULT) => Some(Self::MaxTokens(None)),
            ("max_tokens", value) => value.parse().ok().map(|n| Self::MaxTokens(Some(n))),
            _ => return Err(ChangeError::Unknown),
        };
        let (key, wanted) = match key {
            "temperature" => ("temperature", format!("a number from 0 (always the same answer) to {MAX_TEMPERATURE}")),
            _ => ("max_tokens", format!("a number from 1 to {MAX_TOKENS}")),
        };
        change.filter(|change| change.is_in_range()).ok_or(ChangeError::Value { key, wanted })
    }

    /// As a number, for a message.
    pub fn to_bits(self) -> u64 {
        let (key, value) = match self {
            Self::Temperature(value) => (0, value.map(f32::to_bits)),
            Self::MaxTokens(value) => (1, value),
        };
        u64::from(value.unwrap_or(0)) | u64::from(value.is_some()) << 32 | key << 33
    }

    /// The change that `bits` are; `None` where they are none, or out of range.
    pub fn from_bits(bits: u64) -> Option<Self> {
        let number = u32::try_from(bits & u64::from(u32::MAX)).ok()?;
        let value = (bits >> 32 & 1 == 1).then_some(number);
        let change = match bits >> 33 {
            0 => Self::Temperature(value.map(f32::from_bits)),
            1 => Self::MaxTokens(value),
            _ => return None,
        };
        (change.is_in_range() && change.to_bits() == bits).then_some(change)
    }

    fn is_in_range(self) -> bool {
        match self {
            Self::Temperature(value) => value.is_none_or(|t| (0.0..=MAX_TEMPERATURE).contains(&t)),
            Self::MaxTokens(value) => value.is_none_or(|n| (1..=MAX_TOKENS).contains(&n)),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Temperature(Some(t)) => write!(f, "temperature {t}"),
            Self::MaxTokens(Some(n)) => write!(f, "max_tokens {n}"),
            Self::Temperature(None) => write!(f, "temperature {DEFAULT}"),
            Self::MaxTokens(None) => write!(f, "max_tokens {DEFAULT}"),
        }
    }
}

impl Settings {
    /// These settings with the change made.
    #[must_use]
    pub fn with(self, change: Change) -> Self {
        match change {
            Change::Temperature(temperature) => Self { temperature, ..self },
            Change::MaxTokens(max_tokens) => Self { max_tokens, ..self },
        }
    }

    fn changes(self) -> [Change; 2] {
        [Change::Temperature(self.temperature), Change::MaxTokens(self.max_tokens)]
    }

    /// The file's text.
    fn text(self) -> String {
        let temperature = self.temperature.map(|t| format!("temperature = {t:?}\n"));
        let max_tokens = self.max_tokens.map(|n| format!("max_tokens = {n}\n"));
        temperature.into_iter().chain(max_tokens).collect()
    }
}

/// The file of settings.
#[derive(Clone, Debug)]
pub struct SettingsFile(PathBuf);

impl SettingsFile {
    /// The settings in the file at `path`, which may not be there yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The settings that lie beside the records of failures at `records`.
    pub fn beside(records: &Path) -> Self {
        Self(records.with_file_name(NAME))
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What is set; nothing where there is no file.
    ///
    /// # Errors
    /// The file cannot be read, or is not one that this wrote.
    pub fn read(&self) -> io::Result<Settings> {
        let mut text = String::new();
        match File::open(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Settings::default()),
            file => file?.take(MAX_FILE_BYTES).read_to_string(&mut text)?,
        };
        let settings: Settings = toml::from_str(&text).map_err(|e| io::Error::other(e.message().to_owned()))?;
        match settings.changes().into_iter().find(|change| !change.is_in_range()) {
            Some(wrong) => Err(io::Error::other(format!("{wrong} is out of range"))),
            None => Ok(settings),
        }
    }

    /// Keeps a change; it is on the card when this returns. A file that cannot be read is replaced. What is so already is not written.
    ///
    /// # Errors
    /// The partition is missing, full or cannot be written.
    pub fn keep(&self, change: Change) -> io::Result<()> {
        let old = self.read().ok();
        let settings = old.unwrap_or_default().with(change);
        if old == Some(settings) {
            return Ok(());
        }
        let new = self.0.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(settings.text().as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &self.0)?;
        File::open(self.0.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_change_is_typed_and_bounded_and_survives_its_message() {
        for (text, change) in [
            ("temperature 0.7", Change::Temperature(Some(0.7))),
            (" max_tokens  200 ", Change::MaxTokens(Some(200))),
            ("temperature default", Change::Temperature(None)),
            ("max_tokens default", Change::MaxTokens(None)),
        ] {
            assert_eq!(Change::parse(text), Ok(change));
            assert_eq!(Change::from_bits(change.to_bits()), Some(change));
            assert_eq!(change.to_string().split_whitespace().count(), 2);
        }
        for text in ["", "temperature", "ctx 5", "temperature 1 2", "Temperature 1"] {
            assert_eq!(Change::parse(text), Err(ChangeError::Unknown), "{text}");
        }
        for text in [
            "temperature 2.1",
            "temperature nan",
            "temperature -1",
            "max_tokens 0",
            "max_tokens 1.5",
            "max_tokens 4194305",
        ] {
            assert!(matches!(Change::parse(text), Err(ChangeError::Value { .. })), "{text}");
        }
        let good = Change::Temperature(Some(1.0)).to_bits();
        for bit in 33..64 {
            assert_ne!(Change::from_bits(good ^ 1 << bit), Change::from_bits(good));
        }
        assert_eq!(Change::from_bits(u64::MAX), None);
        assert_eq!(Change::from_bits(1), None, "a value that is not set is zero");
        assert_eq!(Change::from_bits(Change::Temperature(Some(f32::NAN)).to_bits()), None);
    }

    #[test]
    fn the_limits_are_those_of_the_file_on_the_card() {
        assert_eq!(MAX_TEMPERATURE.to_bits(), crate::config::MAX_TEMPERATURE.to_bits());
        assert_eq!(MAX_TOKENS as usize, crate::model::hyper::MAX_CONTEXT);
    }

    #[test]
    fn what_is_kept_is_read_and_a_damaged_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let file = SettingsFile::at(folder.path().join("settings"));
        assert_eq!(file.read().unwrap(), Settings::default());
        file.keep(Change::Temperature(Some(0.7))).unwrap();
        file.keep(Change::MaxTokens(Some(200))).unwrap();
        assert_eq!(file.read().unwrap(), Settings { temperature: Some(0.7), max_tokens: Some(200) });
        file.keep(Change::Temperature(None)).unwrap();
        assert_eq!(file.read().unwrap(), Settings { temperature: None, max_tokens: Some(200) });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left in the folder");
        for damaged in ["temperature = 9.0", "speed = 1", "max_tokens = 0", "\u{1}"] {
            fs::write(file.path(), damaged).unwrap();
            assert!(file.read().is_err(), "{damaged}");
        }
        file.keep(Change::MaxTokens(Some(3))).unwrap();
        assert_eq!(file.read().unwrap(), Settings { temperature: None, max_tokens: Some(3) });
        assert!(SettingsFile::at(folder.path().join("none/settings")).keep(Change::MaxTokens(Some(1))).is_err());
    }

    #[test]
    fn what_is_so_already_costs_no_write() {
        let folder = tempfile::tempdir().unwrap();
        let file = SettingsFile::at(folder.path().join("settings"));
        file.keep(Change::MaxTokens(Some(3))).unwrap();
        let inode = |file: &SettingsFile| std::os::unix::fs::MetadataExt::ino(&fs::metadata(file.path()).unwrap());
        let (before, held) = (inode(&file), File::open(file.path()).unwrap());
        file.keep(Change::MaxTokens(Some(3))).unwrap();
        assert_eq!(inode(&file), before);
        file.keep(Change::MaxTokens(Some(4))).unwrap();
        assert_ne!(inode(&file), before);
        drop(held);
    }
}
