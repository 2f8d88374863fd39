//! Memory maps: the model file, read-only and shared, and anonymous regions for what is made from it.
//! Next on the data's way: `model::gguf` parses the bytes, `model::weights` fills a region with tiles.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use memmap2::{Advice, Mmap, MmapMut};
use nix::sys::mman::{MlockAllFlags, MmapAdvise, madvise, mlockall};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{SysconfVar, sysconf};

/// Bytes of a file that are asked for ahead and waited for together.
const READ_AHEAD_BYTES: usize = 8 << 20;
/// Large pages begin at multiples of this many bytes.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A model file mapped read-only. Owned by the frame that serves; everything else borrows its bytes.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
}

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Opening or mapping failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A directory, device or pipe.
    #[error("{path}: not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Nothing to map.
    #[error("{path}: the file is empty")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl Mapping {
    /// Maps a whole file.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, is empty, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self, MapError> {
        let io = |source| MapError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(MapError::NotAFile { path: path.into() });
        }
        if metadata.len() == 0 {
            return Err(MapError::Empty { path: path.into() });
        }
        // SAFETY: the map is read-only and private to this process's view. A writer who changes the file underneath can change
        // bytes between two reads; every reader of these bytes copies a number before checking it and indexes checked, so the
        // worst outcome is a wrong answer or an error. Truncation by another process is SIGBUS, an exit, not corruption.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { map })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Reads the whole file into the page cache and maps its pages, a window at a time, the next one under way meanwhile.
    /// `progress` gets the bytes done.
    pub fn read_ahead(&self, mut progress: impl FnMut(usize)) {
        let len = self.map.len();
        let window = |start: usize| READ_AHEAD_BYTES.min(len - start);
        for start in (0..len).step_by(READ_AHEAD_BYTES) {
            let next = start + window(start);
            if next < len {
                // Advice only: without it the next window is read when its turn comes.
                let _ = self.map.advise_range(Advice::WillNeed, next, window(next));
            }
            if self.map.advise_range(Advice::PopulateRead, start, window(start)).is_err() {
                // Before Linux 5.14, or a page that cannot be read, which this meets as everybody else would.
                for page in self.map[start..next].iter().step_by(page_bytes()) {
                    std::hint::black_box(*page);
                }
            }
            progress(next);
        }
    }

    /// Tells the kernel that the file is about to be read once, front to back.
    pub fn will_read_sequentially(&self) {
        // Advice only: a kernel that refuses it reads a little slower.
        let _ = self.map.advise(Advice::Sequential);
    }
}

/// An anonymous region, zeroed, taken once and never grown; it begins where a large page can.
#[derive(Debug)]
pub struct Region {
    map: MmapMut,
    range: Range<usize>,
}

impl Region {
    /// Takes `bytes` bytes of address space; memory comes as they are written.
    ///
    /// # Errors
    /// The kernel has no such range left.
    pub fn new(bytes: usize) -> Result<Self, std::io::Error> {
        let is_large = bytes >= HUGE_PAGE_BYTES;
        let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        // The last page may be a large one, and the first begins up to one later than the kernel says.
        let taken = if is_large {
            let whole = bytes.checked_next_multiple_of(HUGE_PAGE_BYTES);
            whole.and_then(|whole| whole.checked_add(HUGE_PAGE_BYTES)).ok_or_else(too_large)?
        } else {
            bytes.max(1)
        };
        let map = MmapMut::map_anon(taken)?;
        let start = if is_large { map.as_ptr().addr().wrapping_neg() % HUGE_PAGE_BYTES } else { 0 };
        // 2 MiB pages where the kernel offers them: fewer TLB misses in a stream of weights.
        let _ = map.advise(Advice::HugePage);
        Ok(Self { map, range: start..start + bytes.max(1) })
    }

    /// The region, to be read.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// The region, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.range.clone()]
    }
}

/// Bytes of a page of this kernel: 4, 16 or 64 KiB.
pub fn page_bytes() -> usize {
    let bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| usize::try_from(bytes).ok());
    // The smallest there is: right for touching every page, whatever it is.
    bytes.filter(|&bytes| bytes > 0).unwrap_or(4096)
}

/// Makes every page of `values`, all zeros as `vec!` made them, memory and not a promise of it; large pages where the kernel has them,
/// which come several times as fast.
pub fn touch<T: Copy>(values: &mut [T]) {
    let page = page_bytes();
    advise_inside(values, HUGE_PAGE_BYTES, MmapAdvise::MADV_HUGEPAGE);
    // A write to each, in one call. A page that is read first is one of the kernel's zeros, and a large one of these comes apart.
    // Advice only: what it left undone, because the kernel is older than 5.14 or an emulator takes the call for a hint, the loop does.
    advise_inside(values, page, MmapAdvise::MADV_POPULATE_WRITE);
    let step = (page / size_of::<T>().max(1)).max(1);
    for value in values.iter_mut().step_by(step) {
        *value = std::hint::black_box(*value);
    }
    // The steps begin in the middle of a page and may end one short.
    if let Some(last) = values.last_mut() {
        *last = std::hint::black_box(*last);
    }
}

/// Gives `advice` for the part of `values` that is made of whole units of `unit` bytes, where the kernel takes it.
fn advise_inside<T>(values: &mut [T], unit: usize, advice: MmapAdvise) {
    let bytes = size_of_val(values);
    let before_first = values.as_ptr().addr().wrapping_neg() % unit;
    let whole = bytes.saturating_sub(before_first) / unit * unit;
    let first = NonNull::from(values).cast::<u8>();
    // SAFETY: `before_first + whole` is at most `bytes`, so the range lies inside of the borrowed values; both advices that are given
    // here change how the kernel backs the range and nothing of what is in it. A refusal costs time alone.
    let _ = unsafe { madvise(first.add(before_first).cast(), whole, advice) };
}

/// Why memory could not be locked.
#[derive(Debug, thiserror::Error)]
#[error(
    "--lock: locking {needed_bytes} bytes of memory was refused ({source}); RLIMIT_MEMLOCK is {limit}: raise it \
     (ulimit -l {}) or run with CAP_IPC_LOCK",
    needed_bytes.div_ceil(1024)
)]
pub struct LockError {
    /// Address space that the process has now.
    pub needed_bytes: u64,
    /// The limit in bytes, or "unlimited".
    pub limit: String,
    /// What the kernel said.
    pub source: std::io::Error,
}

/// Locks all memory that the process has now, mapped files included, so that none of it is read again. What is taken later is not.
///
/// # Errors
/// The kernel refused, mostly for RLIMIT_MEMLOCK.
pub fn lock_all() -> Result<(), LockError> {
    mlockall(MlockAllFlags::MCL_CURRENT).map_err(|errno| {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: u64 = pages.split_whitespace().next().and_then(|pages| pages.parse().ok()).unwrap_or(0);
        let limit = match getrlimit(Resource::RLIMIT_MEMLOCK) {
            Ok((nix::libc::RLIM_INFINITY, _)) | Err(_) => "unlimited".to_owned(),
            Ok((bytes, _)) => format!("{bytes} bytes"),
        };
        LockError { needed_bytes: pages.saturating_mul(page_bytes() as u64), limit, source: errno.into() }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_mapped_whole_and_bad_paths_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, b"GGUF....").unwrap();
        assert_eq!(Mapping::open(&path).unwrap().bytes(), b"GGUF....");
        assert!(matches!(Mapping::open(dir.path()), Err(MapError::NotAFile { .. })));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(Mapping::open(&path), Err(MapError::Empty { .. })));
        let missing = Mapping::open(&dir.path().join("no")).unwrap_err().to_string();
        assert!(missing.contains("/no: "), "{missing}");
    }

    #[test]
    fn a_region_is_zeroed_and_aligned_for_tiles() {
        let mut region = Region::new(10_000).unwrap();
        assert!(region.bytes().iter().all(|&byte| byte == 0));
        assert_eq!(region.bytes().as_ptr().align_offset(64), 0);
        region.bytes_mut()[9_999] = 7;
        assert_eq!(region.bytes()[9_999], 7);
    }

    /// What the kernel counts under `key`, in kB, in the mapping that holds `address`.
    fn smaps_kib(address: usize, key: &str) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_ours = false;
        for line in smaps.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            if let Some((start, end)) = range
                && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                is_ours = (start..end).contains(&address);
            } else if let Some(kib) = line.strip_prefix(key)
                && is_ours
            {
                return kib.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        panic!("no mapping holds {address:#x}");
    }

    #[test]
    fn a_large_region_begins_where_a_large_page_does() {
        let region = Region::new(10 << 20).unwrap();
        let address = region.bytes().as_ptr().addr();
        assert_eq!(address % HUGE_PAGE_BYTES, 0);
        assert_eq!(region.bytes().len(), 10 << 20);
    }

    #[test]
    fn touched_memory_is_resident() {
        let mut values = vec![0u16; 16 << 20];
        let middle = values[8 << 20..].as_ptr().addr();
        let before = smaps_kib(middle, "Anonymous:");
        touch(&mut values);
        // Where the kernel takes the advice, the large pages in the middle are a mapping of their own.
        let (after, whole) = (smaps_kib(middle, "Anonymous:"), smaps_kib(middle, "Size:"));
        assert!(
            whole >= 28 << 10 && after >= whole.min(31 << 10) && after > before,
            "{after} kB of {whole} after {before}"
        );
        assert!(values.iter().all(|&value| value == 0));
    }

    #[test]
    fn reading_ahead_goes_through_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let len = 2 * READ_AHEAD_BYTES + 5;
        std::fs::write(&path, vec![3; len]).unwrap();
        let mut steps = Vec::new();
        Mapping::open(&path).unwrap().read_ahead(|done| steps.push(done));
        assert_eq!(steps, [READ_AHEAD_BYTES, 2 * READ_AHEAD_BYTES, len]);
        assert!(page_bytes().is_power_of_two());
    }
}
