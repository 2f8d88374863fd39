//! `hearth pack`: a GGUF into the packed model that `serve` maps and runs without a copy.
//! The file appears whole or not at all. Next on the data's way: `model::packed::write`.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::statvfs::fstatvfs;

use super::ToolError;
use super::session::SessionError;
use crate::model::gguf::Gguf;
use crate::model::packed::write::{PackPlan, WriteError};
use crate::model::vocab;
use crate::sys::map::Mapping;
use crate::sys::signals::StopSignals;

/// Pack a GGUF into the form that is mapped and run without a copy.
///
/// The result holds the model in tiles for every CPU, the vocabulary's tables, and a hash of each tensor; weights that are NaN or
/// infinite are refused. It is written beside its place and renamed: a cut or an error leaves the old file.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct PackArgs {
    /// The model file (GGUF)
    #[arg(value_name = "IN.gguf")]
    source: PathBuf,
    /// The packed file
    #[arg(value_name = "OUT.hearth")]
    target: PathBuf,
    /// Replace OUT where it exists
    #[arg(long)]
    force: bool,
}

/// Why nothing was packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// There is a file already.
    #[error("{path} exists; --force replaces it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The target's file system is too full.
    #[error("{path}: {needed_bytes} bytes are needed, {available_bytes} are available")]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Size of the packed file.
        needed_bytes: u64,
        /// What an ordinary user may still write there.
        available_bytes: u64,
    },
    /// SIGINT or SIGTERM.
    #[error("stopped by a signal; {path} is as it was")]
    Stopped {
        /// The file.
        path: PathBuf,
    },
    /// The source, or writing.
    #[error("{path}: {source}")]
    Write {
        /// The source, or the file that was written.
        path: PathBuf,
        /// What went wrong.
        source: WriteError,
    },
}

/// Runs the tool.
///
/// # Errors
/// See [`PackError`]; the target is then as it was.
pub fn run(args: &PackArgs) -> Result<(), ToolError> {
    let (source, target) = (&args.source, &args.target);
    if !args.force && target.symlink_metadata().is_ok() {
        return Err(PackError::Exists { path: target.clone() }.into());
    }
    let refused = |error| PackError::Write { path: source.clone(), source: error };
    let mapping = Mapping::open(source).map_err(SessionError::from)?;
    let gguf = Gguf::parse(mapping.bytes()).map_err(|error| refused(WriteError::Model(error.into())))?;
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let tables = vocab::tables(&gguf).map_err(|error| SessionError::vocab(source, error))?;
    let tables = tables.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    let plan = PackPlan::new(&gguf, &name, tables).map_err(refused)?;
    let bytes = write_atomically(target, &plan, refused)?;
    eprintln!("{}: {bytes} bytes", target.display());
    Ok(())
}

/// Writes beside `target`, makes it durable, and renames. Returns the file's size.
fn write_atomically(
    target: &Path,
    plan: &PackPlan<'_, '_>,
    refused: impl Fn(WriteError) -> PackError,
) -> Result<u64, PackError> {
    let io = |source: std::io::Error| PackError::Write { path: target.into(), source: source.into() };
    let folder = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let bytes = plan.file_bytes().map_err(&refused)?;
    // First: what a cut left takes the space that is needed now.
    remove_leftovers(folder, target);
    let folder = File::open(folder).map_err(io)?;
    let available_bytes = available_bytes(&folder).map_err(io)?;
    if bytes > available_bytes {
        return Err(PackError::NoSpace { path: target.into(), needed_bytes: bytes, available_bytes });
    }
    let failed = |error| write_failed(target, bytes, &folder, error);
    let mut signals = StopSignals::install().map_err(io)?;
    let mut file = Unfinished::create(target).map_err(io)?;
    let mut progress = Progress::new(plan.work_bytes());
    let written = plan.write(&mut file, &mut |done| {
        progress.at(done);
        signals.take() == 0
    });
    written.map_err(|error| match error {
        WriteError::Stopped => PackError::Stopped { path: target.into() },
        WriteError::Io(source) => failed(source),
        model => refused(model),
    })?;
    progress.end();
    file.put_in_place(bytes, target).map_err(failed)?;
    // The name is durable when its folder is.
    folder.sync_all().map_err(io)?;
    Ok(bytes)
}

/// Bytes that an ordinary user may still write where `folder` is.
fn available_bytes(folder: &File) -> std::io::Result<u64> {
    let space = fstatvfs(folder)?;
    Ok(space.blocks_available().saturating_mul(space.fragment_size()))
}

/// What stopped the writing: others may have filled the file system since it was looked at, and a quota is not seen there.
fn write_failed(target: &Path, needed_bytes: u64, folder: &File, source: std::io::Error) -> PackError {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    if matches!(source.kind(), StorageFull | QuotaExceeded)
        && let Ok(available_bytes) = available_bytes(folder)
    {
        return PackError::NoSpace { path: target.into(), needed_bytes, available_bytes };
    }
    PackError::Write { path: target.into(), source: source.into() }
}

/// What stands between a target's name and the id of the process that writes it.
const UNFINISHED: &str = ".tmp-";

/// Removes unfinished files of `target` that nobody writes any more: a process holds a lock on its own as long as it lives, whatever
/// kills it. Best effort: one that cannot be removed is in nobody's way.
fn remove_leftovers(folder: &Path, target: &Path) {
    let (Some(name), Ok(entries)) = (target.file_name(), folder.read_dir()) else { return };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let rest = found.as_encoded_bytes().strip_prefix(name.as_encoded_bytes());
        let id = rest.and_then(|rest| rest.strip_prefix(UNFINISHED.as_bytes()));
        let is_ours = id.is_some_and(|id| !id.is_empty() && id.iter().all(u8::is_ascii_digit));
        if !is_ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let path = entry.path();
        let is_left = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
        if is_left && std::fs::remove_file(&path).is_ok() {
            eprintln!("{}: removed, left by a run that was killed", path.display());
        }
    }
}

/// A file that goes away again unless it is put in place.
#[derive(Debug)]
struct Unfinished {
    file: File,
    path: Option<PathBuf>,
}

impl Unfinished {
    fn create(target: &Path) -> std::io::Result<Self> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!("{UNFINISHED}{}", std::process::id()));
        let path = target.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        // Says that it is being written. Not every file system has locks: there another run may take it for a leftover.
        let _ = file.try_lock();
        Ok(Self { file, path: Some(path) })
    }

    fn put_in_place(mut self, bytes: u64, target: &Path) -> std::io::Result<()> {
        // The last tensor may end in a hole.
        self.file.set_len(bytes)?;
        self.file.sync_all()?;
        if let Some(path) = &self.path {
            std::fs::rename(path, target)?;
        }
        self.path = None;
        Ok(())
    }
}

impl Write for Unfinished {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Unfinished {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(to)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // Nothing more can be done about a file that cannot be removed.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A bar on a terminal, else a line every tenth.
struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    tenths: u64,
}

impl Progress {
    fn new(total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            match ProgressStyle::with_template("packing {bar:40} {bytes}/{total_bytes} {eta}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self { bar, total: total.max(1), tenths: 0 }
    }

    fn at(&mut self, done: u64) {
        let tenths = (u128::from(done) * 10 / u128::from(self.total)) as u64;
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if tenths > self.tenths => {
                self.tenths = tenths;
                eprintln!("packing {} %", tenths * 10);
            }
            None => {}
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_system_that_fills_up_meanwhile_is_said_to_be_full() {
        let folder = File::open(".").unwrap();
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = full.write_all(b"x").unwrap_err();
        let said = write_failed(Path::new("out.hearth"), 4096, &folder, error);
        assert!(matches!(said, PackError::NoSpace { needed_bytes: 4096, .. }), "{said}");
        let other = write_failed(Path::new("out.hearth"), 4096, &folder, std::io::ErrorKind::PermissionDenied.into());
        assert!(matches!(other, PackError::Write { .. }), "{other}");
    }
}
