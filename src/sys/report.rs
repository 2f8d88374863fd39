//! Reports that PID 1 writes and `hearth serve` reads back, for the console and the socket: a file each in a folder in memory that is
//! PID 1's own, replaced as a whole. Next on the data's way: `serve::server`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The folder on an appliance; it goes with the power.
pub const FOLDER: &str = "/run/reports";
/// Most of a report that is read or written, in bytes.
pub const MAX_BYTES: usize = 16 * 1024;

/// A report's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// When what happened at the start; see `init::timeline`.
    Boot,
    /// What the last self-test found.
    Selftest,
}

impl Kind {
    fn file(self) -> &'static str {
        match self {
            Self::Boot => "boot-report",
            Self::Selftest => "selftest",
        }
    }
}

/// The folder of reports.
#[derive(Clone, Debug)]
pub struct Reports(PathBuf);

impl Reports {
    /// The reports in a folder, which may not be there yet.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// The lines of a report; `None`: there is none yet.
    pub fn read(&self, kind: Kind) -> Option<Vec<String>> {
        let mut bytes = Vec::new();
        let file = File::open(self.0.join(kind.file())).ok()?;
        file.take(MAX_BYTES as u64).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        Some(text.lines().map(|line| line.chars().filter(|char| !char.is_control()).collect()).collect())
    }

    /// Replaces a report; lines beyond [`MAX_BYTES`] are left out.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn write(&self, kind: Kind, lines: &[String]) -> io::Result<()> {
        let mut text = String::new();
        for line in lines {
            if text.len() + line.len() + 1 > MAX_BYTES {
                break;
            }
            text.push_str(line);
            text.push('\n');
        }
        fs::create_dir_all(&self.0)?;
        let (path, new) = (self.0.join(kind.file()), self.0.join("new"));
        fs::write(&new, text)?;
        fs::rename(new, path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_report_is_replaced_as_a_whole_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let reports = Reports::at(folder.path().join("reports"));
        assert_eq!(reports.read(Kind::Boot), None);
        let lines = |text: &str, count: usize| vec![text.to_owned(); count];
        reports.write(Kind::Boot, &lines("a long line", 3000)).unwrap();
        assert_eq!(reports.read(Kind::Boot).unwrap().len(), MAX_BYTES / 12);
        reports.write(Kind::Boot, &lines("b\x1b[2J", 2)).unwrap();
        assert_eq!(reports.read(Kind::Boot).unwrap(), ["b[2J", "b[2J"]);
        assert_eq!(reports.read(Kind::Selftest), None);
        assert_eq!(fs::read_dir(reports.folder()).unwrap().count(), 1);
        assert!(Reports::at("/dev/null/x").write(Kind::Boot, &[]).is_err());
    }
}
