//! Makes the state partition anew where its file system is beyond what its journal repairs: zeros first, so that nothing old can be
//! taken for part of it, then the blocks that an empty file system has. The image brings those along, since there is no program
//! on the board that could make one. Next: `init` mounts it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use nix::errno::Errno;

/// The empty file system: its size in bytes as a little-endian u64, then for each block that is not all zeros its offset in bytes as a
/// little-endian u64 and its [`BLOCK_BYTES`]. Written by `image/blueprint`.
pub const BLUEPRINT: &str = "/lib/hearth/state.blueprint";
/// A block of the file system, in bytes.
pub const BLOCK_BYTES: usize = 4096;
/// Largest partition that is made anew, in bytes: more than that is not the state of an appliance.
pub const MAX_STATE_BYTES: u64 = 1 << 30;

/// Where ext4's superblock says that it is one, in bytes from the device's start.
const EXT4_MAGIC_AT: u64 = 1024 + 56;
const EXT4_MAGIC: [u8; 2] = 0xEF53_u16.to_le_bytes();
/// Free blocks without which a file cannot be written beside its old self and renamed over it.
const LEAST_BLOCKS: nix::libc::fsblkcnt_t = 2;
/// Zeros written at once, in bytes.
const ZEROS_BYTES: usize = 1 << 20;

/// Whether an error of mount(2) says that there is no such file system on `device`, or a damaged one. Others, such as a driver that is
/// missing, are no reason to write. EINVAL is said of an option or a feature that this kernel does not know, too: it counts only where
/// the device can be read and has no superblock.
pub fn is_beyond_repair(error: Errno, device: &Path) -> bool {
    match error {
        Errno::EUCLEAN | Errno::EBADMSG => true,
        Errno::EINVAL => has_superblock(device).is_ok_and(|has| !has),
        _ => false,
    }
}

/// Whether the file system at `folder` has no room for one more small file.
pub fn is_full(folder: &Path) -> bool {
    nix::sys::statvfs::statvfs(folder)
        .is_ok_and(|room| room.blocks_available() < LEAST_BLOCKS || room.files_available() == 0)
}

/// Whether an ext4 superblock begins where it should.
fn has_superblock(device: &Path) -> io::Result<bool> {
    let mut magic = [0; EXT4_MAGIC.len()];
    let mut device = File::open(device)?;
    device.seek(SeekFrom::Start(EXT4_MAGIC_AT))?;
    device.read_exact(&mut magic)?;
    Ok(magic == EXT4_MAGIC)
}

/// Makes the file system on `device` anew after `blueprint`, calling `meanwhile` now and then; it is on the card when this returns.
///
/// # Errors
/// The blueprint is absent or not one, the device is smaller than it, or cannot be written.
pub fn recreate(device: &Path, blueprint: &Path, mut meanwhile: impl FnMut()) -> io::Result<()> {
    let mut blueprint = File::open(blueprint)?;
    let mut number = [0; 8];
    blueprint.read_exact(&mut number)?;
    let bytes = u64::from_le_bytes(number);
    let mut device = OpenOptions::new().write(true).open(device)?;
    let room = device.seek(SeekFrom::End(0))?;
    if bytes > room || bytes > MAX_STATE_BYTES || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
        return Err(io::Error::other(format!("a file system of {bytes} bytes for a partition of {room}")));
    }
    device.rewind()?;
    let zeros = vec![0; ZEROS_BYTES];
    let mut left = bytes;
    while left > 0 {
        let now = zeros.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        device.write_all(&zeros[..now])?;
        // On the card piece by piece: the watchdog must not wait for all of it.
        device.sync_data()?;
        meanwhile();
        left -= now as u64;
    }
    let mut block = [0; BLOCK_BYTES];
    while blueprint.read_exact(&mut number).is_ok() {
        blueprint.read_exact(&mut block)?;
        let offset = u64::from_le_bytes(number);
        if !offset.is_multiple_of(BLOCK_BYTES as u64) || offset >= bytes {
            return Err(io::Error::other(format!("a block at {offset} in a file system of {bytes} bytes")));
        }
        device.seek(SeekFrom::Start(offset))?;
        device.write_all(&block)?;
    }
    device.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_there_is_gone_and_the_blueprint_is_all_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let (device, blueprint) = (folder.path().join("device"), folder.path().join("blueprint"));
        let bytes = 2 * ZEROS_BYTES + BLOCK_BYTES;
        std::fs::write(&device, vec![0xEE; bytes + 10]).unwrap();
        assert!(recreate(&device, &blueprint, || ()).is_err(), "there is no blueprint");
        let record = |offset: u64, fill: u8| [&offset.to_le_bytes()[..], &[fill; BLOCK_BYTES]].concat();
        let offset = (ZEROS_BYTES + BLOCK_BYTES) as u64;
        let text =
            |size: usize, offset: u64| [&(size as u64).to_le_bytes()[..], &record(0, 1), &record(offset, 2)].concat();

        for (size, offset) in [(bytes + BLOCK_BYTES, offset), (bytes + 1, offset), (bytes, bytes as u64), (bytes, 5)] {
            std::fs::write(&blueprint, text(size, offset)).unwrap();
            assert!(recreate(&device, &blueprint, || ()).is_err(), "{size} {offset}");
        }
        std::fs::write(&blueprint, &text(bytes, offset)[..100]).unwrap();
        assert!(recreate(&device, &blueprint, || ()).is_err(), "cut short");

        std::fs::write(&blueprint, text(bytes, offset)).unwrap();
        let mut rounds = 0;
        recreate(&device, &blueprint, || rounds += 1).unwrap();
        assert_eq!(rounds, 3);
        let mut wanted = vec![0; bytes];
        wanted[..BLOCK_BYTES].fill(1);
        wanted[ZEROS_BYTES + BLOCK_BYTES..][..BLOCK_BYTES].fill(2);
        wanted.extend([0xEE; 10]);
        assert!(std::fs::read(&device).unwrap() == wanted);
    }

    #[test]
    fn a_file_system_with_room_is_not_full_and_one_that_is_absent_neither() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_full(folder.path()) && !is_full(&folder.path().join("none")));
        assert!(is_full(Path::new("/proc")), "it has no blocks at all");
    }

    #[test]
    fn only_a_damaged_file_system_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (empty, ext4) = (folder.path().join("empty"), folder.path().join("ext4"));
        let mut bytes = vec![0; BLOCK_BYTES];
        std::fs::write(&empty, &bytes).unwrap();
        bytes[1080..1082].copy_from_slice(&[0x53, 0xEF]);
        std::fs::write(&ext4, &bytes).unwrap();
        assert!(is_beyond_repair(Errno::EUCLEAN, &ext4) && is_beyond_repair(Errno::EBADMSG, &ext4));
        assert!(is_beyond_repair(Errno::EINVAL, &empty));
        assert!(!is_beyond_repair(Errno::EINVAL, &ext4), "an option or a feature that the kernel does not know");
        assert!(!is_beyond_repair(Errno::EINVAL, &folder.path().join("none")), "what cannot be read is not written");
        for transient in [Errno::ENODEV, Errno::EIO, Errno::ENXIO, Errno::EBUSY, Errno::ENOMEM, Errno::EACCES] {
            assert!(!is_beyond_repair(transient, &empty), "{transient}");
        }
    }
}
