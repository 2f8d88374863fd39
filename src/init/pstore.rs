//! What the kernel kept of its own crash over the restart: pstore, where the kernel and the board have it. At the next start each record
//! becomes one line among the failures on the state partition, and makes room for the next. Next: `sys::record`, which `/status` reads.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sys::record::Records;

/// Where the kernel shows what it kept.
pub const FOLDER: &str = "/sys/fs/pstore";
/// Most files that are taken at one start; the rest is for the next one.
pub const MAX_FILES: usize = 16;
/// Most of a file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 256 * 1024;

/// What the line begins with that says why a kernel fell, the most telling first.
const REASONS: [&str; 4] = ["Kernel panic", "Internal error", "BUG:", "Unable to handle"];

/// Records every crash in `folder` and removes what is recorded; how many.
///
/// # Errors
/// One could not be recorded or removed; it stays for the next start.
pub fn collect(folder: &Path, records: &Records, since_boot: Duration) -> io::Result<usize> {
    let mut files: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    files.sort();
    // What it kept of the console or of traces holds no reason of its own.
    files.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("dmesg-")));
    files.truncate(MAX_FILES);
    for path in &files {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
        records.add(since_boot, &format!("the kernel crashed: {}", reason(&bytes)))?;
        fs::remove_file(path)?;
    }
    Ok(files.len())
}

/// The line of a kernel's log that says why it fell.
fn reason(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let messages: Vec<&str> = text.lines().map(message).collect();
    let found = REASONS.iter().find_map(|reason| messages.iter().find(|message| message.starts_with(reason)));
    found.map_or_else(|| "it left no reason".to_owned(), |message| (*message).to_owned())
}

/// `<PRIORITY>[SECONDS] TEXT` as `TEXT`.
fn message(line: &str) -> &str {
    let line = line.strip_prefix('<').and_then(|rest| rest.split_once('>')).map_or(line, |(_, rest)| rest);
    line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, text)| text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CRASH: &[u8] =
        b"Panic#1 Part1\n<6>[    5.120000] hearth: ready\n<4>[    9.000000] Internal error: Oops: 96000005\n\
        <0>[    9.131000] Kernel panic - not syncing: sysrq triggered crash\n<4>[    9.2] CPU: 0 PID: 1\n";

    #[test]
    fn a_crash_becomes_a_failure_once() {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("pstore");
        fs::create_dir(&kept).unwrap();
        let records = Records::at(folder.path().join("failures"));
        fs::write(kept.join("dmesg-ramoops-0"), CRASH).unwrap();
        fs::write(kept.join("dmesg-ramoops-1"), b"\xff\0noise").unwrap();
        fs::write(kept.join("console-ramoops-0"), CRASH).unwrap();
        assert_eq!(collect(&kept, &records, Duration::from_millis(500)).unwrap(), 2);
        let lines = records.read();
        assert_eq!(lines[0], "1 +0.500s the kernel crashed: Kernel panic - not syncing: sysrq triggered crash");
        assert_eq!(lines[1], "2 +0.500s the kernel crashed: it left no reason");
        assert_eq!(collect(&kept, &records, Duration::ZERO).unwrap(), 0);
        assert_eq!(records.read().len(), 2);
    }

    #[test]
    fn what_cannot_be_recorded_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("dmesg-ramoops-0");
        fs::write(&file, CRASH).unwrap();
        let nowhere = Records::at(folder.path().join("none/failures"));
        assert!(collect(folder.path(), &nowhere, Duration::ZERO).is_err());
        assert!(file.exists());
        assert_eq!(collect(&folder.path().join("absent"), &nowhere, Duration::ZERO).unwrap(), 0);
    }

    #[test]
    fn one_start_takes_a_bounded_number_and_the_next_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("pstore");
        fs::create_dir(&kept).unwrap();
        for number in 0..MAX_FILES + 1 {
            fs::write(kept.join(format!("dmesg-ramoops-{number}")), CRASH).unwrap();
        }
        let records = Records::at(folder.path().join("failures"));
        assert_eq!(collect(&kept, &records, Duration::ZERO).unwrap(), MAX_FILES);
        assert_eq!(collect(&kept, &records, Duration::ZERO).unwrap(), 1);
    }
}
