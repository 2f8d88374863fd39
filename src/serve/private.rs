//! A socket that only this process can reach: it is bound in a folder of its own, and as soon as it is bound its name and the folder
//! are removed, so that no signal can leave them behind. The client reaches it through its descriptor.
//! Next on the data's way: `serve::listener`, which binds it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// Folders that may be there already, left by a process of the same number that was killed.
const ATTEMPTS: u32 = 1000;

/// A folder in the temporary directory, for one socket.
#[derive(Debug)]
pub(super) struct PrivateSocket {
    folder: PathBuf,
    /// The bound socket, once it has no name any more.
    hidden: OnceLock<OwnedFd>,
}

impl PrivateSocket {
    /// Makes the folder. Create it right before the socket is bound.
    ///
    /// # Errors
    /// The temporary directory is not there or not writable.
    pub(super) fn create() -> io::Result<Self> {
        Self::create_in(&std::env::temp_dir())
    }

    fn create_in(parent: &Path) -> io::Result<Self> {
        for attempt in 0..ATTEMPTS {
            let folder = parent.join(format!("hearth-{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&folder) {
                Ok(()) => return Ok(Self { folder, hidden: OnceLock::new() }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Where to bind it.
    pub(super) fn path(&self) -> PathBuf {
        self.folder.join("hearth.sock")
    }

    /// Removes name and folder of the bound socket; the path by which this process reaches it still. Without `/proc` both stay
    /// until the end.
    pub(super) fn hide(&self) -> PathBuf {
        let Ok(socket) = open(&self.path(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) else {
            return self.path();
        };
        let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        if !by_descriptor.exists() || self.hidden.set(socket).is_err() {
            return self.path();
        }
        self.remove();
        by_descriptor
    }

    fn remove(&self) {
        // In a private folder nothing that stays behind matters to anybody else.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        if self.hidden.get().is_none() {
            self.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_hidden_socket_has_no_name_and_takes_connections() {
        let parent = tempfile::tempdir().unwrap();
        let left = || fs::read_dir(parent.path()).unwrap().count();
        let socket = PrivateSocket::create_in(parent.path()).unwrap();
        assert_eq!(fs::metadata(&socket.folder).unwrap().permissions().mode() & 0o777, 0o700);
        let listener = UnixListener::bind(socket.path()).unwrap();
        let path = socket.hide();
        assert_eq!(left(), 0);
        let _client = UnixStream::connect(path).unwrap();
        listener.accept().unwrap();

        // What another one left is no obstacle, and one that was never bound goes at its end.
        let first = PrivateSocket::create_in(parent.path()).unwrap();
        let second = PrivateSocket::create_in(parent.path()).unwrap();
        assert_ne!(first.folder, second.folder);
        drop((first, second));
        assert_eq!(left(), 0);
        assert!(PrivateSocket::create_in(Path::new("/no/such/folder")).is_err());
    }
}
