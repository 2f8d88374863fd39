//! Memory maps: the model file, read-only and shared, and anonymous regions for what is made from it.
//! Next on the data's way: `model::gguf` parses the bytes, `model::weights` fills a region with tiles.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, MmapMut};

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

    /// Tells the kernel that the file is about to be read once, front to back.
    pub fn will_read_sequentially(&self) {
        // Advice only: a kernel that refuses it reads a little slower.
        let _ = self.map.advise(Advice::Sequential);
    }
}

/// A page-aligned anonymous region, zeroed, taken once and never grown.
#[derive(Debug)]
pub struct Region {
    map: MmapMut,
}

impl Region {
    /// Takes `bytes` bytes (at least one page's worth of address space).
    ///
    /// # Errors
    /// The kernel has no such range left.
    pub fn new(bytes: usize) -> Result<Self, std::io::Error> {
        let map = MmapMut::map_anon(bytes.max(1))?;
        // 2 MiB pages where the kernel offers them: fewer TLB misses in a stream of weights.
        let _ = map.advise(Advice::HugePage);
        Ok(Self { map })
    }

    /// The region, to be read.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The region, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
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
}
