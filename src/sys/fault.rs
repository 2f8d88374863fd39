//! SIGBUS: a page of the mapped model file cannot be read any longer, because its card was pulled, the file cut, or the medium
//! failed. SIGSYS: a thread asked the kernel for what [`super::sandbox`] does not allow. One line on stderr and an exit code of its
//! own each; whoever supervises starts the daemon again. Nothing comes next on the data's way.

use std::io;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Exit code of a process whose model file vanished under it: EX_IOERR of sysexits.h.
pub const LOST_FILE_EXIT_CODE: u8 = 74;

/// Exit code of a process that asked for a syscall which its sandbox refuses: EX_NOPERM of sysexits.h.
pub const REFUSED_SYSCALL_EXIT_CODE: u8 = 77;

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

/// From now on a syscall that a filter traps ends the process with [`REFUSED_SYSCALL_EXIT_CODE`], its name on stderr.
///
/// # Errors
/// The kernel refused the handler.
pub fn exit_where_a_syscall_is_refused() -> io::Result<()> {
    let flags = SaFlags::SA_ONSTACK | SaFlags::SA_SIGINFO;
    let action = SigAction::new(SigHandler::SigAction(refused_syscall), flags, SigSet::all());
    // SAFETY: the handler calls nothing but write(2) and _exit(2), both async-signal-safe, and reads constants and its argument.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

/// What the kernel says of SIGSYS: `siginfo_t` on 64-bit Linux, up to the number of the syscall.
#[repr(C)]
struct SigSys {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    padding: libc::c_int,
    call_address: *const libc::c_void,
    syscall: libc::c_int,
}

extern "C" fn refused_syscall(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a `siginfo_t`, which is larger than `SigSys`, begins like it for SIGSYS, and is aligned for it.
    let number = unsafe { (*info.cast::<SigSys>()).syscall };
    let name = super::sandbox::name(number.into()).unwrap_or("of an unknown number");
    for part in ["hearth: the sandbox refuses the syscall ", name, "; this is a bug or an attack: the process ends\n"] {
        // SAFETY: the pointer and length are those of a string.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: _exit takes any code and does not return.
    unsafe { libc::_exit(REFUSED_SYSCALL_EXIT_CODE.into()) }
}
