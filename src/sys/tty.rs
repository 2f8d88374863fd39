//! Opening a serial line: raw, 115200 baud, 8 data bits, no parity, 1 stop bit, no flow control, and never waiting.
//! Works on a UART, a USB adapter and the slave side of a pseudo-terminal. Next on the data's way: `serve::tty`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::termios::{
    BaudRate, ControlFlags, FlushArg, InputFlags, SetArg, SpecialCharacterIndices, cfmakeraw, cfsetspeed, tcflush,
    tcgetattr, tcsetattr,
};

/// Speed of the line, in bits a second.
pub const BAUD: u32 = 115_200;

/// Why a serial line could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TtyError {
    /// The device could not be opened: absent, not permitted, unplugged.
    #[error("serial line {path}: {source}")]
    Open {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is a file of another kind.
    #[error("{path} is not a serial line or terminal; --tty takes a device such as /dev/ttyAMA0")]
    NotATty {
        /// The file.
        path: PathBuf,
    },
    /// The line took no raw mode.
    #[error("serial line {path}: setting raw mode at {BAUD} baud: {source}")]
    Configure {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
}

/// Opens and configures `path`; it does not become the controlling terminal. Input that came before is dropped.
///
/// # Errors
/// See [`TtyError`].
pub fn open_raw(path: &Path) -> Result<File, TtyError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags((OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits())
        .open(path)
        .map_err(|source| TtyError::Open { path: path.to_owned(), source })?;
    let configure = |source| TtyError::Configure { path: path.to_owned(), source };
    let mut line = match tcgetattr(&file) {
        Ok(line) => line,
        Err(Errno::ENOTTY) => {
            return Err(TtyError::NotATty { path: path.to_owned() });
        }
        Err(e) => return Err(configure(e)),
    };
    cfmakeraw(&mut line);
    // A break or a wrong stop bit must not become a signal or a NUL in the text; there is no modem to hang up.
    line.input_flags |= InputFlags::IGNBRK | InputFlags::IGNPAR;
    line.control_flags |= ControlFlags::CREAD | ControlFlags::CLOCAL;
    line.control_flags &= !(ControlFlags::CSTOPB | ControlFlags::CRTSCTS);
    // With VMIN 0 "no input yet" would read like the end of the line.
    line.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
    line.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
    cfsetspeed(&mut line, BaudRate::B115200).map_err(configure)?;
    tcsetattr(&file, SetArg::TCSANOW, &line).map_err(configure)?;
    tcflush(&file, FlushArg::TCIFLUSH).map_err(configure)?;
    Ok(file)
}
