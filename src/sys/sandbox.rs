//! What the daemon gives up once it has all that it needs: rights, files, and every syscall but those that answering takes.
//!
//! Each thread is confined for itself, before it reads a byte from outside: a worker from its first instruction on, the engine's
//! thread and the I/O thread when the daemon is ready. In this order: no new privileges, Landlock (files beneath few folders, no
//! network), no capabilities, a seccomp filter. A syscall that is not on a thread's list ends the process ([`super::fault`]), and
//! its name is logged. Called by `serve::daemon`; nothing comes next on the data's way.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::libc::{self, c_long};
use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The newest Landlock whose rights are asked for; an older kernel gives those that it knows.
const LANDLOCK: ABI = ABI::V6;

/// How much of the sandbox there has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// All that the kernel has; what it has not is logged
    #[default]
    Auto,
    /// All of it, or the daemon does not start
    Require,
    /// None of it: for a debugger
    Off,
}

/// What every thread may do: wait, wake others, tell the time, take and give back memory, write to what is open, end.
const ANY_THREAD: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Waits that a stopped and continued process goes on with.
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    // Signals are told to the I/O thread by whichever thread they interrupt.
    libc::SYS_sendto,
    libc::SYS_sigaltstack,
    #[cfg(target_env = "gnu")]
    libc::SYS_tgkill,
    #[cfg(target_env = "musl")]
    libc::SYS_tkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What the thread that compares the model with its hashes may do beside that: read the file, which is open.
const READING_THREAD: &[c_long] = &[libc::SYS_pread64];

/// What the I/O thread may do beside that: take connections, read and answer, open the serial line again.
const IO_THREAD: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_geteuid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    #[cfg(target_env = "gnu")]
    libc::SYS_statx,
    #[cfg(target_env = "musl")]
    libc::SYS_fstat,
    #[cfg(target_env = "musl")]
    libc::SYS_newfstatat,
    #[cfg(any(not(target_arch = "x86_64"), target_env = "musl"))]
    libc::SYS_epoll_pwait,
    #[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
    libc::SYS_epoll_wait,
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    libc::SYS_lstat,
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    libc::SYS_open,
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    libc::SYS_stat,
    // Waits for the last answers when the daemon stops.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_ppoll,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// `ioctl` of a socket: calls do not wait. Of a serial line: attributes as they are, attributes to be, what to flush.
#[allow(clippy::unnecessary_cast, reason = "the C libraries give these numbers different types")]
const IO_CTLS: &[u64] = &[libc::FIONBIO as u64, libc::TCGETS as u64, libc::TCSETS as u64, libc::TCFLSH as u64];

/// Why a thread is not confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A part that the kernel lacks or refuses.
    #[error("the sandbox lacks {part}: {why}")]
    Missing {
        /// Which part.
        part: &'static str,
        /// What the kernel said.
        why: String,
    },
}

/// Files that the I/O thread still needs.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// A serial line, which may vanish and come back.
    pub tty: Option<PathBuf>,
    /// The sockets, removed at the end.
    pub sockets: Vec<PathBuf>,
    /// What may be read.
    pub read: Vec<PathBuf>,
}

/// The filters of the three kinds of threads, made before the first of them begins.
#[derive(Clone, Debug)]
pub struct Sandbox {
    mode: Mode,
    any_thread: BpfProgram,
    reading_thread: BpfProgram,
    io_thread: BpfProgram,
}

impl Sandbox {
    /// Compiles the filters and switches off core dumps and looks from outside (`ptrace`, `/proc/PID/mem`) of this process.
    ///
    /// # Errors
    /// `require`, and the kernel refused.
    pub fn new(mode: Mode) -> Result<Self, SandboxError> {
        let (any_thread, reading_thread) = (filter(&[])?, filter(READING_THREAD)?);
        let sandbox = Self { mode, any_thread, reading_thread, io_thread: filter(IO_THREAD)? };
        if mode != Mode::Off {
            let no_core = setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| nix::sys::prctl::set_dumpable(false));
            sandbox.need(log::Level::Warn, "the end of core dumps", no_core)?;
            let handler = super::fault::exit_where_a_syscall_is_refused();
            sandbox.need(log::Level::Warn, "a handler for refused syscalls", handler)?;
        }
        Ok(sandbox)
    }

    /// Confines the calling thread to computing.
    ///
    /// # Errors
    /// `require`, and a part is missing.
    pub fn confine_computing_thread(&self) -> Result<(), SandboxError> {
        self.confine(&Files::default(), &self.any_thread, log::Level::Debug)
    }

    /// Confines the calling thread to computing and to reading files that are open.
    ///
    /// # Errors
    /// `require`, and a part is missing.
    pub fn confine_reading_thread(&self) -> Result<(), SandboxError> {
        self.confine(&Files::default(), &self.reading_thread, log::Level::Debug)
    }

    /// Confines the calling thread to answering.
    ///
    /// # Errors
    /// `require`, and a part is missing.
    pub fn confine_io_thread(&self, files: &Files) -> Result<(), SandboxError> {
        self.confine(files, &self.io_thread, log::Level::Warn)
    }

    /// What is missing is told at `level`: of several threads, by one.
    fn confine(&self, files: &Files, filter: &BpfProgram, level: log::Level) -> Result<(), SandboxError> {
        if self.mode == Mode::Off {
            return Ok(());
        }
        self.need(level, "no_new_privs", nix::sys::prctl::set_no_new_privs())?;
        self.need(level, "Landlock", landlock(files))?;
        self.need(level, "the end of capabilities", drop_capabilities())?;
        self.need(level, "seccomp", seccompiler::apply_filter(filter))
    }

    /// What the mode says of a part that failed.
    fn need<E: std::fmt::Display>(
        &self,
        level: log::Level,
        part: &'static str,
        result: Result<(), E>,
    ) -> Result<(), SandboxError> {
        match result.map_err(|why| SandboxError::Missing { part, why: why.to_string() }) {
            Err(error) if self.mode == Mode::Auto => {
                log::log!(level, "{error}");
                Ok(())
            }
            result => result,
        }
    }
}

/// A filter that lets the syscalls of [`ANY_THREAD`] and of `more` through. Memory that can be executed is never made, and
/// where `more` has sockets `ioctl` is for [`IO_CTLS`].
fn filter(more: &[c_long]) -> Result<BpfProgram, SandboxError> {
    let missing = |why: seccompiler::BackendError| SandboxError::Missing { part: "seccomp", why: why.to_string() };
    let mut rules: std::collections::BTreeMap<c_long, Vec<SeccompRule>> =
        ANY_THREAD.iter().chain(more).map(|&syscall| (syscall, Vec::new())).collect();
    let where_ = |argument, op, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(missing)
    };
    let executable = libc::PROT_EXEC as u64;
    for syscall in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(syscall, vec![where_(2, SeccompCmpOp::MaskedEq(executable), 0)?]);
    }
    // Its own core, and no other process's.
    rules.insert(libc::SYS_sched_setaffinity, vec![where_(0, SeccompCmpOp::Eq, 0)?]);
    if more.contains(&libc::SYS_accept4) {
        let allowed: Result<_, _> = IO_CTLS.iter().map(|&request| where_(1, SeccompCmpOp::Eq, request)).collect();
        rules.insert(libc::SYS_ioctl, allowed?);
    }
    let arch = std::env::consts::ARCH.try_into().map_err(missing)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, arch).map_err(missing)?;
    filter.try_into().map_err(missing)
}

/// Files beneath `files` alone, no network, no signals and no abstract sockets of processes outside.
fn landlock(files: &Files) -> Result<(), String> {
    let error = |e: landlock::RulesetError| e.to_string();
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
        .map_err(error)?;
    let line = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let tty = files.tty.as_deref().and_then(Path::parent).map(|folder| (folder, line));
    let sockets = files.sockets.iter().filter_map(|path| folder_of(path));
    let sockets = sockets.map(|folder| (folder, AccessFs::RemoveFile.into()));
    let read = files.read.iter().map(|path| (path.as_path(), BitFlags::from(AccessFs::ReadFile)));
    let mut ruleset = ruleset;
    for (path, access) in tty.into_iter().chain(sockets).chain(read) {
        // What is not there needs no rule: it cannot be opened later, either.
        let Ok(path) = PathFd::new(path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(path, access)).map_err(error)?;
    }
    match ruleset.restrict_self().map_err(error)?.ruleset {
        RulesetStatus::NotEnforced => {
            Err("this kernel does not have it, or it is not among its security modules".into())
        }
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

/// The folder of `path`, which may be a bare name.
fn folder_of(path: &Path) -> Option<&Path> {
    path.parent().map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder })
}

/// This thread has no capability from now on, nor has what it would execute.
fn drop_capabilities() -> Result<(), caps::errors::CapsError> {
    use caps::CapSet;
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set)?;
    }
    Ok(())
}

/// Names of the syscalls that any thread of a ready daemon may use, sorted: what the README lists.
pub fn allowed_syscalls() -> Vec<&'static str> {
    let own = [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_sched_setaffinity, libc::SYS_ioctl];
    let all = ANY_THREAD.iter().chain(READING_THREAD).chain(IO_THREAD).chain(&own);
    let mut names: Vec<_> = all.filter_map(|&syscall| name(syscall)).collect();
    names.sort_unstable();
    names
}

/// The syscall's name.
pub(super) fn name(syscall: c_long) -> Option<&'static str> {
    let number = usize::try_from(syscall).ok()?;
    syscalls::Sysno::new(number).map(|known| known.name())
}

impl From<SandboxError> for io::Error {
    fn from(error: SandboxError) -> Self {
        Self::new(io::ErrorKind::Unsupported, error)
    }
}
