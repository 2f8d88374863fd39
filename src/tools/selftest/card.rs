//! How fast the card gives a file, past the page cache (O_DIRECT): what the first start of a model takes. Next: `selftest::report`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::stat::major;

use super::report::Check;

/// Most that is read, in bytes.
pub const MOST_BYTES: u64 = 64 << 20;
/// Longest time that is read for; the read under way is waited for.
pub const MOST_TIME: Duration = Duration::from_secs(4);
/// Bytes asked for at once: as much as the appliance reads ahead.
const READ_BYTES: usize = 2 << 20;
/// Where buffers and lengths of such reads begin, at the most.
const ALIGN_BYTES: usize = 4096;

/// Reads the beginning of the first of `paths` that lies on a disk: a model may be in the initramfs, which is memory.
pub fn speed(paths: &[&Path]) -> Check {
    // A card that is not mounted has no files; that is said in other places.
    let on_disk = |path: &&&Path| path.metadata().is_ok_and(|file| major(file.dev()) != 0);
    let Some(path) = paths.iter().find(on_disk) else {
        return Check::not_here("card", "no file that could be read lies on a disk of its own");
    };
    let direct = OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(path);
    match direct.and_then(|file| read(&file)) {
        Ok((bytes, time)) if bytes > 0 => {
            let mb_s = bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9);
            Check::pass("card", format!("{mb_s:.1} MB/s, {} MiB of {}", bytes >> 20, path.display()))
        }
        Ok(_) => Check::not_here("card", "the file is empty"),
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Check::not_here("card", format!("the file system of {} reads through memory alone", path.display()))
        }
        Err(e) => Check::that("card", false, format!("{}: {e}", path.display())),
    }
}

fn read(file: &File) -> io::Result<(u64, Duration)> {
    let mut buffer = vec![0; READ_BYTES + ALIGN_BYTES];
    let first = buffer.as_ptr().addr().wrapping_neg() % ALIGN_BYTES;
    let aligned = buffer.get_mut(first..first + READ_BYTES).unwrap_or_default();
    let (begun, mut done) = (Instant::now(), 0);
    while done < MOST_BYTES && begun.elapsed() < MOST_TIME {
        match file.read_at(aligned, done) {
            Ok(0) => break,
            Ok(n) => done += n as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        // The file's last piece ends anywhere, and no such read begins there.
        if !done.is_multiple_of(ALIGN_BYTES as u64) {
            break;
        }
    }
    Ok((done, begun.elapsed()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn a_file_is_read_to_its_end_or_said_to_be_none_of_a_card() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::fs::write(&path, vec![1; READ_BYTES + 12_345]).unwrap();
        let check = speed(&[&path]);
        // A file system in memory refuses such reads, or has no need to.
        assert!(check.verdict == Verdict::NotHere || check.found.contains(" MB/s, 2 MiB of "), "{check:?}");
        let (bytes, _) = read(&File::open(&path).unwrap()).unwrap();
        assert_eq!(bytes, READ_BYTES as u64 + 12_345);
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(&File::open(folder.path()).unwrap()).is_err());
    }

    #[test]
    fn what_is_memory_is_no_card() {
        let in_memory = Path::new("/proc/self/status");
        assert_eq!(speed(&[in_memory]).verdict, Verdict::NotHere);
        let folder = tempfile::tempdir().unwrap();
        let none = folder.path().join("none");
        assert_eq!(speed(&[in_memory, &none]).verdict, Verdict::NotHere);
        assert_eq!(speed(&[]).verdict, Verdict::NotHere);
    }
}
