//! The socket file: made with its final permissions before anybody can connect, replaced only if nobody listens on it,
//! removed at the end if it is still ours. Next on the data's way: `serve::conn`, one for each accepted stream.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};

/// The socket's permissions where nobody says otherwise: owner and group may connect.
pub const SOCKET_MODE: u32 = 0o660;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;
/// How long another daemon that starts on the same directory is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("another process serves on {path}; stop it, or choose another --socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has that name.
    #[error("{path} exists and is not a socket; move it away, or choose another --socket")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The name is too long for the kernel.
    #[error("{path} is too long for a socket: a path may have {max} bytes here")]
    TooLong {
        /// The socket.
        path: PathBuf,
        /// Bytes the path may have.
        max: usize,
    },
    /// The kernel refused a step.
    #[error("socket {path}: {step}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The listening socket and its file.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that only our own file is removed.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, a file with permissions `mode`.
    ///
    /// The socket is bound under a temporary name beside it and takes its own name once its mode is set, so there is no
    /// moment at which a stranger could connect. A lock on the directory keeps two daemons from both finding a stale file.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, mode: u32) -> Result<Self, SocketError> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let temporary = directory.join(format!(".hearth-{}", std::process::id()));
        for name in [path, &temporary] {
            if name.as_os_str().len() > MAX_PATH_BYTES {
                return Err(SocketError::TooLong { path: name.to_owned(), max: MAX_PATH_BYTES });
            }
        }
        let failed = |step| move |source: io::Error| SocketError::Io { path: path.to_owned(), step, source };
        let _lock = lock(directory).map_err(failed("locking its directory"))?;
        check_free(path)?;

        remove_if_there(&temporary).map_err(failed("removing an old temporary name"))?;
        let listener = bind_at(&temporary).map_err(|e| failed("binding")(e.into()))?;
        let named = name_it(&listener, &temporary, path, mode);
        if named.is_err() {
            // What stays behind would be a socket that nobody serves; the first error is the one to tell.
            let _ = fs::remove_file(&temporary);
        }
        let identity = named.map_err(|(step, source)| failed(step)(source))?;
        Ok(Self { listener: UnixListener::from(listener), path: path.to_owned(), identity })
    }

    /// The next connection that waits, not blocking; `None` if there is none.
    ///
    /// # Errors
    /// No descriptors left, for instance.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            // The peer went away while it waited.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            // Nothing to be done if it fails: the next start finds a stale socket and replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Bytes that a path may have: `sun_path` without its terminating NUL.
pub const MAX_PATH_BYTES: usize = 107;

fn lock(directory: &Path) -> io::Result<Flock<File>> {
    let mut file = File::open(directory)?;
    let patience = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < patience => file = back,
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Nothing there, or a socket that refuses connections.
fn check_free(path: &Path) -> Result<(), SocketError> {
    let failed = |step| move |source: io::Error| SocketError::Io { path: path.to_owned(), step, source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("looking at it")(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match probe(path) {
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(()),
        // EAGAIN: somebody listens and their queue is full.
        Ok(()) | Err(Errno::EAGAIN) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(e) => Err(failed("asking whether somebody listens")(e.into())),
    }
}

fn probe(path: &Path) -> Result<(), Errno> {
    let fd = new_socket()?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
}

fn bind_at(path: &Path) -> Result<OwnedFd, Errno> {
    let fd = new_socket()?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

fn new_socket() -> Result<OwnedFd, Errno> {
    socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// Sets the mode, listens, and gives the socket its name. A bound socket refuses connections until it listens.
fn name_it(
    listener: &OwnedFd,
    temporary: &Path,
    path: &Path,
    mode: u32,
) -> Result<(u64, u64), (&'static str, io::Error)> {
    fs::set_permissions(temporary, Permissions::from_mode(mode)).map_err(|e| ("setting its mode", e))?;
    let backlog = Backlog::new(BACKLOG).map_err(|e| ("listening", e.into()))?;
    socket::listen(listener, backlog).map_err(|e| ("listening", e.into()))?;
    let meta = fs::symlink_metadata(temporary).map_err(|e| ("looking at it", e))?;
    fs::rename(temporary, path).map_err(|e| ("giving it its name", e))?;
    Ok((meta.dev(), meta.ino()))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
