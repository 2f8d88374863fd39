//! Kernel modules, for kernels that do not have everything built in: the image names them in the order in which they load, and
//! each is handed to the kernel as the file that it is. Next: the devices they drive, `init::watchdog` and `init::card`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// The image's list: a file name a line, parameters behind it; dependencies stand in front of what needs them.
pub const LIST: &str = "/lib/hearth/modules";
/// Most modules that a list may name.
pub const MAX_MODULES: usize = 64;

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h: the kernel unpacks the file itself.
const COMPRESSED_FILE: u32 = 4;

/// A module that is to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// Its parameters as the kernel takes them.
    pub parameters: CString,
}

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Its file cannot be read.
    #[error("module {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not take it.
    #[error("module {path}: the kernel refused it: {source}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
}

/// The modules that the list at `path` names; none where there is no list: everything is built in.
pub fn listed(path: &Path) -> Vec<Module> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let module = |line: &str| {
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        Some(Module { path: folder.join(name), parameters: CString::new(parameters).ok()? })
    };
    lines.filter_map(module).take(MAX_MODULES).collect()
}

impl Module {
    /// Loads the module; one that is loaded already is as good.
    ///
    /// # Errors
    /// See [`ModuleError`].
    pub fn load(&self) -> Result<(), ModuleError> {
        let file = File::open(&self.path).map_err(|source| ModuleError::Open { path: self.path.clone(), source })?;
        let compressed = self.path.extension().is_some_and(|end| end != "ko");
        let flags = ModuleInitFlags::from_bits_retain(if compressed { COMPRESSED_FILE } else { 0 });
        match finit_module(file, &self.parameters, flags) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(source) => Err(ModuleError::Refused { path: self.path.clone(), source }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_list_gives_files_in_order_with_their_parameters() {
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("modules");
        assert_eq!(listed(&list), []);
        std::fs::write(&list, "# order matters\n\nb.ko.xz heartbeat=15 nowayout=1\n  a.ko\n").unwrap();
        let found = listed(&list);
        let seen: Vec<_> = found.iter().map(|m| (m.path.clone(), m.parameters.to_str().unwrap())).collect();
        let (b, a) = (folder.path().join("b.ko.xz"), folder.path().join("a.ko"));
        assert_eq!(seen, [(b.clone(), "heartbeat=15 nowayout=1"), (a, "")]);
        let error = found[0].load().unwrap_err().to_string();
        assert!(error.contains("b.ko.xz: No such file"), "{error}");
        std::fs::write(&b, "no module").unwrap();
        let error = found[0].load().unwrap_err().to_string();
        assert!(error.contains("b.ko.xz: the kernel refused it: E"), "{error}");
    }
}
