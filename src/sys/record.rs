//! Why something ended, kept over a restart: one line for each failure on the state partition, the newest last. A line is a number, the
//! time since that start, and a reason of hearth's own words: never a word of a prompt or an answer. Written whole beside the old file,
//! synced, and renamed over it: power that fails leaves the one or the other. Read back by `/status`, here and in `serve::server`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The records on the state partition.
pub const RECORDS: &str = "/state/failures";
/// In the folder where PID 1 writes down what apps do: a line an app.
pub const APP_STATES: &str = "state";
/// There as well: the newest lines of their output. Both are read as records are.
pub const APP_LOG: &str = "log";
/// So many are kept; the oldest go first.
pub const MAX_RECORDS: usize = 32;
/// Longest record, in bytes; the rest of a longer one is left out.
pub const MAX_RECORD_BYTES: usize = 200;
/// Most of the file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = (MAX_RECORDS * (MAX_RECORD_BYTES + 1)) as u64;

/// The file of records.
#[derive(Clone, Debug)]
pub struct Records(PathBuf);

impl Records {
    /// The records in the file at `path`, which may not be there yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What was recorded, the newest last; nothing where nothing can be read. Lines that are no text are left out.
    pub fn read(&self) -> Vec<String> {
        let mut bytes = Vec::new();
        let Ok(file) = File::open(&self.0) else { return Vec::new() };
        if file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).is_err() {
            return Vec::new();
        }
        let lines = bytes.split(|&byte| byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
        let lines = lines.filter(|line| !line.is_empty() && !line.contains(char::is_control));
        lines.map(str::to_owned).collect()
    }

    /// Adds one; it is on the card when this returns.
    ///
    /// # Errors
    /// The partition is missing, full or cannot be written.
    pub fn add(&self, since_boot: Duration, why: &str) -> io::Result<()> {
        let mut lines = self.read();
        let number = lines.last().and_then(|line| line.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0);
        let mut line = format!("{} +{:.3}s ", number.saturating_add(1), since_boot.as_secs_f64());
        for char in why.chars().filter(|char| !char.is_control()) {
            if line.len() + char.len_utf8() > MAX_RECORD_BYTES {
                break;
            }
            line.push(char);
        }
        lines.push(line);
        let kept = lines.len().saturating_sub(MAX_RECORDS);
        let text: String = lines.iter().skip(kept).flat_map(|line| [line, "\n"]).collect();
        let folder = self.0.parent().unwrap_or(Path::new("/"));
        let new = self.0.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &self.0)?;
        File::open(folder)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_newest_are_kept_and_numbers_count_on() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::at(folder.path().join("failures"));
        assert!(records.read().is_empty());
        for number in 1..=MAX_RECORDS + 3 {
            records.add(Duration::from_millis(1500), &format!("serve ended: {number}")).unwrap();
        }
        let read = records.read();
        assert_eq!(read.len(), MAX_RECORDS);
        assert_eq!(read[0], "4 +1.500s serve ended: 4");
        assert_eq!(read[MAX_RECORDS - 1], "35 +1.500s serve ended: 35");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left in the folder");
    }

    #[test]
    fn a_damaged_file_is_no_obstacle_and_lines_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("failures");
        let mut noise = vec![0xFF; 3 * MAX_FILE_BYTES as usize];
        noise[100] = b'\n';
        fs::write(&path, noise).unwrap();
        let records = Records::at(&path);
        assert!(records.read().is_empty());
        records.add(Duration::ZERO, &"ä\x1b\n".repeat(1000)).unwrap();
        let read = records.read();
        assert_eq!(read.len(), 1);
        assert!(read[0].len() <= MAX_RECORD_BYTES && read[0].starts_with("1 +0.000s ää"), "{read:?}");
        assert!(Records::at(folder.path().join("none/failures")).add(Duration::ZERO, "x").is_err());
    }
}
