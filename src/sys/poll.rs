//! Waiting on many descriptors: a level-triggered epoll set whose entries are named by a caller's key.
//! Next on the data's way: `serve`, whose loop sleeps here.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Events taken from the kernel at once.
const BATCH: usize = 64;

/// What a descriptor is watched for. A hang-up is always reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Input, or the end of it.
    pub read: bool,
    /// Room for output.
    pub write: bool,
}

impl Interest {
    /// Input alone.
    pub const READ: Self = Self { read: true, write: false };

    fn flags(self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, self.read);
        flags.set(EpollFlags::EPOLLOUT, self.write);
        flags
    }
}

/// One descriptor that has something to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The key it was added with.
    pub key: u64,
    /// Input, or the end of it.
    pub readable: bool,
    /// Room for output.
    pub writable: bool,
    /// Both directions are over.
    pub hung_up: bool,
}

/// An epoll set.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel refused one.
    pub fn new() -> Result<Self, Errno> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, events: vec![EpollEvent::empty(); BATCH] })
    }

    /// Watches a descriptor. Closing its last copy takes it out again.
    ///
    /// # Errors
    /// It is in the set already, or cannot be waited for (a regular file).
    pub fn add(&self, fd: impl AsFd, key: u64, interest: Interest) -> Result<(), Errno> {
        self.epoll.add(fd, EpollEvent::new(interest.flags(), key))
    }

    /// Changes what a descriptor is watched for.
    ///
    /// # Errors
    /// It is not in the set.
    pub fn modify(&self, fd: impl AsFd, key: u64, interest: Interest) -> Result<(), Errno> {
        self.epoll.modify(fd, &mut EpollEvent::new(interest.flags(), key))
    }

    /// Takes a descriptor out.
    ///
    /// # Errors
    /// It is not in the set.
    pub fn remove(&self, fd: impl AsFd) -> Result<(), Errno> {
        self.epoll.delete(fd)
    }

    /// Sleeps until something is ready or the time is over; a signal counts as neither. `ready` is overwritten.
    ///
    /// # Errors
    /// The kernel refused the wait.
    pub fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<(), Errno> {
        ready.clear();
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            // Rounded up, so that a deadline has passed when the sleep is over.
            Some(time) => {
                EpollTimeout::try_from(time.saturating_add(Duration::from_millis(1))).unwrap_or(EpollTimeout::MAX)
            }
        };
        let count = match self.epoll.wait(&mut self.events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(e) => return Err(e),
        };
        ready.extend(self.events.iter().take(count).map(|event| {
            let flags = event.events();
            Ready {
                key: event.data(),
                readable: flags.contains(EpollFlags::EPOLLIN),
                writable: flags.contains(EpollFlags::EPOLLOUT),
                hung_up: flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR),
            }
        }));
        Ok(())
    }
}
