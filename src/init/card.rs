//! The card: which disk it is, its partitions, and the models that lie on it. A card that is late, absent or damaged costs what is
//! on it; PID 1 goes on. Next: `init::supervise` starts `hearth serve` with one of the models.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::mount;

use super::table::Partition;

/// The disk signature in the partition table of every hearth card; `image/build` writes it.
pub const DISK_SIGNATURE: u32 = 0x6874_7268;
/// How long the card may take to show itself after PID 1 has loaded its driver.
pub const CARD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often disks are looked through until then.
pub const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Most models that are tried.
pub const MAX_MODELS: usize = 16;
/// Kilobytes read ahead on the card: a model is read from front to back.
pub const READ_AHEAD_KIB: u32 = 2048;

const SECTOR_BYTES: usize = 512;
const SIGNATURE_AT: usize = 440;

/// A disk with our signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its folder in /sys/block.
    sys: PathBuf,
    dev: PathBuf,
}

/// Why a partition is not there.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// It is not in the table.
    #[error("partition {number} is not on the card ({what}: {reason})")]
    Absent {
        /// Its number.
        number: u32,
        /// Where it would be mounted.
        what: &'static str,
        /// What is on it.
        reason: &'static str,
    },
    /// The kernel does not mount it.
    #[error("partition {number} is not mounted on {target} as {kind}: {source} ({reason})")]
    Mount {
        /// Its number.
        number: u32,
        /// Where it would be mounted.
        target: &'static str,
        /// Its file system.
        kind: &'static str,
        /// What is on it.
        reason: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

impl Card {
    /// Waits for the card, calling `meanwhile` before each look; `None`: it did not come.
    pub fn wait(timeout: Duration, mut meanwhile: impl FnMut()) -> Option<Self> {
        let until = Instant::now() + timeout;
        loop {
            meanwhile();
            if let Some(card) = Self::find(Path::new("/sys/block"), Path::new("/dev")) {
                return Some(card);
            }
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The first disk, by name, that has our signature.
    fn find(sys_block: &Path, dev: &Path) -> Option<Self> {
        let mut names: Vec<_> = fs::read_dir(sys_block).ok()?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        names
            .into_iter()
            .find(|name| signature(&dev.join(name)).is_ok_and(|found| found == Some(DISK_SIGNATURE)))
            .map(|name| Self { sys: sys_block.join(name), dev: dev.to_owned() })
    }

    /// The disk's name.
    pub fn name(&self) -> String {
        self.sys.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Lets the kernel read further ahead than it would.
    ///
    /// # Errors
    /// The disk has no such setting.
    pub fn read_ahead(&self) -> io::Result<()> {
        fs::write(self.sys.join("queue/read_ahead_kb"), READ_AHEAD_KIB.to_string())
    }

    /// The device of the partition with that number.
    pub fn partition(&self, number: u32) -> Option<PathBuf> {
        let entries = fs::read_dir(&self.sys).ok()?.flatten();
        let numbered = |entry: &fs::DirEntry| {
            let text = fs::read_to_string(entry.path().join("partition")).ok()?;
            (text.trim().parse() == Ok(number)).then(|| self.dev.join(entry.file_name()))
        };
        entries.into_iter().find_map(|entry| numbered(&entry))
    }

    /// Mounts one partition.
    ///
    /// # Errors
    /// See [`PartitionError`].
    pub fn mount(&self, partition: &Partition) -> Result<(), PartitionError> {
        let Partition { number, target, kind, flags, options, reason, .. } = *partition;
        let device = self.partition(number).ok_or(PartitionError::Absent { number, what: target, reason })?;
        let refused = |source| PartitionError::Mount { number, target, kind, reason, source };
        fs::create_dir_all(target)
            .map_err(|e| refused(e.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)))?;
        mount(Some(&device), target, Some(kind), flags, Some(options)).map_err(refused)
    }
}

/// The signature in a disk's partition table, if it has one.
fn signature(disk: &Path) -> io::Result<Option<u32>> {
    let mut sector = [0; SECTOR_BYTES];
    File::open(disk)?.read_exact(&mut sector)?;
    let bytes = sector.get(SIGNATURE_AT..SIGNATURE_AT + 4).and_then(|bytes| bytes.try_into().ok());
    Ok(bytes.map(u32::from_le_bytes).filter(|_| sector.ends_with(&[0x55, 0xAA])))
}

/// The models in `folders`, in the folders' order and by name inside each. What a PC leaves beside them (`._name`) is none.
pub fn models(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in folders {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut paths: Vec<_> = entries.filter(|path| is_model(path)).collect();
        paths.sort();
        found.extend(paths);
    }
    found.truncate(MAX_MODELS);
    found
}

fn is_model(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let kind = path.extension().unwrap_or_default();
    !hidden && (kind.eq_ignore_ascii_case("gguf") || kind == "hearth") && path.is_file()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_card_is_known_by_its_signature_and_partitions_by_their_number() {
        let folder = tempfile::tempdir().unwrap();
        let (sys, dev) = (folder.path().join("sys"), folder.path().join("dev"));
        fs::create_dir_all(&dev).unwrap();
        let disk = |name: &str, sector: &[u8]| {
            fs::create_dir_all(sys.join(name)).unwrap();
            fs::write(dev.join(name), sector).unwrap();
        };
        let mut ours = vec![0; SECTOR_BYTES];
        ours[SIGNATURE_AT..SIGNATURE_AT + 4].copy_from_slice(&DISK_SIGNATURE.to_le_bytes());
        disk("mmcblk1", &ours);
        disk("sda", &ours[..100]);
        assert_eq!(Card::find(&sys, &dev), None, "no partition table without its last two bytes");
        ours[510..].copy_from_slice(&[0x55, 0xAA]);
        disk("mmcblk2", &ours);
        let card = Card::find(&sys, &dev).unwrap();
        assert_eq!(card.name(), "mmcblk2");
        for number in [1, 2, 12] {
            let part = sys.join(format!("mmcblk2/mmcblk2p{number}"));
            fs::create_dir_all(&part).unwrap();
            fs::write(part.join("partition"), format!("{number}\n")).unwrap();
        }
        assert_eq!(card.partition(2), Some(dev.join("mmcblk2p2")));
        assert_eq!(card.partition(3), None);
    }

    #[test]
    fn models_come_in_the_folders_order_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let (user, own) = (folder.path().join("user"), folder.path().join("own"));
        fs::create_dir_all(user.join("folder.gguf")).unwrap();
        fs::create_dir(&own).unwrap();
        for name in ["b.GGUF", "a.gguf", "._a.gguf", "notes.txt"] {
            fs::write(user.join(name), "").unwrap();
        }
        fs::write(own.join("model.hearth"), "").unwrap();
        let found = models(&[user.clone(), folder.path().join("absent"), own.clone()]);
        assert_eq!(found, [user.join("a.gguf"), user.join("b.GGUF"), own.join("model.hearth")]);
    }
}
