//! SIGTERM and SIGINT as bytes on a descriptor, so that the I/O loop can wait for them among its sockets.
//! Next on the data's way: `serve`, which drains at the first and stops at the second.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::{pipe, unregister};

/// While this lives, SIGTERM and SIGINT do not end the process.
#[derive(Debug)]
pub struct StopSignals {
    read: UnixStream,
    ids: Vec<SigId>,
}

impl StopSignals {
    /// Takes over both signals.
    ///
    /// # Errors
    /// No descriptors left, or the handlers were refused.
    pub fn install() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        let mut signals = Self { read, ids: Vec::with_capacity(2) };
        for signal in [SIGTERM, SIGINT] {
            signals.ids.push(pipe::register(signal, write.try_clone()?)?);
        }
        Ok(signals)
    }

    /// Signals that came since the last call.
    pub fn take(&mut self) -> usize {
        let mut bytes = [0; 16];
        let mut count: usize = 0;
        while let Ok(n @ 1..) = self.read.read(&mut bytes) {
            count = count.saturating_add(n);
        }
        count
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

/// One signal as bytes on a descriptor, for whoever has to tell signals apart.
#[derive(Debug)]
pub struct SignalLine {
    read: UnixStream,
    id: SigId,
}

impl SignalLine {
    /// Takes over `signal`, a number of `signal_hook::consts`, while the line lives.
    ///
    /// # Errors
    /// No descriptors left, or the handler was refused.
    pub fn install(signal: i32) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        Ok(Self { read, id: pipe::register(signal, write)? })
    }

    /// Whether the signal came since the last call.
    pub fn take(&mut self) -> bool {
        let mut bytes = [0; 16];
        let mut came = false;
        while let Ok(1..) = self.read.read(&mut bytes) {
            came = true;
        }
        came
    }
}

impl AsFd for SignalLine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

impl Drop for SignalLine {
    fn drop(&mut self) {
        unregister(self.id);
    }
}

impl Drop for StopSignals {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            unregister(id);
        }
    }
}
