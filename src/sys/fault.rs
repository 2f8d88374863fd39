//! SIGBUS: a page of the mapped model file cannot be read any longer, because its card was pulled, the file cut, or the medium
//! failed. One line on stderr and an exit code of its own; whoever supervises starts the daemon again.
//! Nothing comes next on the data's way.

use std::io;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Exit code of a process whose model file vanished under it: EX_IOERR of sysexits.h.
pub const LOST_FILE_EXIT_CODE: u8 = 74;

const MESSAGE: &[u8] =
    b"hearth: the model file can no longer be read: card removed, file cut short, or I/O error (SIGBUS)\n";

/// From now on SIGBUS ends the process with [`LOST_FILE_EXIT_CODE`].
///
/// # Errors
/// The kernel refused the handler.
pub fn exit_where_a_file_is_lost() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(lost_file), SaFlags::SA_ONSTACK, SigSet::all());
    // SAFETY: the handler calls nothing but write(2) and _exit(2), both async-signal-safe, and touches no memory but a constant.
    unsafe { sigaction(Signal::SIGBUS, &action) }?;
    Ok(())
}

extern "C" fn lost_file(_signal: libc::c_int) {
    // SAFETY: the pointer and length are those of a constant, and _exit takes any code and does not return.
    unsafe {
        // Nobody may be listening; the exit code says it as well.
        let _ = libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
        libc::_exit(LOST_FILE_EXIT_CODE.into());
    }
}
