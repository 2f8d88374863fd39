//! `hearth launch`, which PID 1 starts for each app: it copies the program off the card into sealed memory, since nothing on the card may
//! run, gives up everything that an app is not to have, and becomes the app. A process of its own, so that PID 1 waits for no card and
//! nothing here can hurt it. Next: the app.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl::{set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chdir, chroot, fexecve, setgid, setgroups, setsid, setuid};

/// Largest program, in bytes: it is in memory as long as it runs.
pub const MAX_APP_BYTES: u64 = 32 << 20;
/// Memory that an app may write to, in bytes: its data and stacks.
pub const MAX_DATA_BYTES: u64 = 64 << 20;
/// Addresses that an app may have, in bytes: some runtimes reserve many and use few.
pub const MAX_ADDRESS_BYTES: u64 = 1 << 30;
/// Processes and threads of an app.
pub const MAX_PROCESSES: u64 = 16;
/// Open files of an app.
pub const MAX_FILES: u64 = 64;
/// Size of an app's `/tmp`, in bytes.
pub const MAX_TMP_BYTES: u64 = 1 << 20;
/// Largest file that an app makes, in bytes: more than `/tmp` holds, so that a full one is an error and no signal; memory that it shares
/// with itself is a file, too.
pub const MAX_FILE_BYTES: u64 = 16 << 20;
const _: () = assert!(MAX_FILE_BYTES > MAX_TMP_BYTES);
/// Where memory runs out the kernel ends apps first: this is the most that it knows.
const OOM_SCORE: &str = "1000";
/// An app finds no other devices.
const DEVICES: [&str; 4] = ["null", "zero", "random", "urandom"];
/// The exit code of a program that was found and cannot be started, as shells have it.
pub const CANNOT_START: u8 = 126;

/// Become an app.
#[derive(Clone, Debug, clap::Args)]
pub struct LaunchArgs {
    /// The program
    program: PathBuf,
    /// The socket that it is told of
    #[arg(long)]
    socket: PathBuf,
    /// Run as this user
    #[arg(long, requires = "group")]
    user: Option<u32>,
    /// and this group
    #[arg(long)]
    group: Option<u32>,
    /// An empty folder, over which the app's own view of the files is made
    #[arg(long, requires = "user")]
    view: Option<PathBuf>,
}

/// Why it does not become one.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The file is no program that can run here.
    #[error("{0}")]
    NoProgram(String),
    /// The kernel refused a step.
    #[error("{step}: {source}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> LaunchError {
    move |source| LaunchError::Step { step, source: source.into() }
}

/// Does it.
///
/// # Errors
/// See [`LaunchError`]; without one this does not return.
pub fn run(args: &LaunchArgs) -> Result<(), LaunchError> {
    // Signals for the app reach all of its processes, and those of a terminal none.
    setsid().map_err(step("a session of its own"))?;
    let program = sealed_copy(&args.program)?;
    // A kernel without it has nobody to prefer.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    if let (Some(view), Some(user), Some(group)) = (&args.view, args.user, args.group) {
        enter_view(view, &args.socket, user, group)?;
    }
    limit(args.user.is_some()).map_err(step("its limits"))?;
    if let (Some(user), Some(group)) = (args.user, args.group) {
        // Capabilities go with the last user that is root.
        setgroups(&[]).map_err(step("giving up groups"))?;
        setgid(Gid::from_raw(group)).map_err(step("its group"))?;
        setuid(Uid::from_raw(user)).map_err(step("its user"))?;
    }
    set_no_new_privs().map_err(step("giving up new privileges"))?;
    set_pdeathsig(Signal::SIGKILL).map_err(step("an end with PID 1"))?;
    umask(Mode::from_bits_truncate(0o077));
    let no_nul = |_| LaunchError::NoProgram("a name with a NUL".into());
    let name = args.program.file_name().unwrap_or_default().as_bytes();
    let socket = [b"HEARTH_SOCKET=", args.socket.as_os_str().as_bytes()].concat();
    let (name, socket) = (CString::new(name).map_err(no_nul)?, CString::new(socket).map_err(no_nul)?);
    match fexecve(program.as_fd(), &[name], &[socket, c"HOME=/tmp".to_owned(), c"TMPDIR=/tmp".to_owned()]) {
        Ok(never) => match never {},
        Err(Errno::ENOENT) => Err(LaunchError::NoProgram("it wants a loader: an app is linked statically".into())),
        Err(error) => Err(step("starting it")(error)),
    }
}

/// The program in memory that nobody can change any more, not even the app itself.
fn sealed_copy(path: &Path) -> Result<OwnedFd, LaunchError> {
    let file = File::open(path).map_err(step("opening it"))?;
    let metadata = file.metadata().map_err(step("looking at it"))?;
    let bytes = metadata.len();
    if !metadata.is_file() || bytes > MAX_APP_BYTES {
        return Err(LaunchError::NoProgram(format!("it has {bytes} bytes, an app may have {MAX_APP_BYTES}")));
    }
    let mut file = file.take(MAX_APP_BYTES);
    let mut head = Vec::new();
    file.by_ref().take(HEAD_BYTES).read_to_end(&mut head).map_err(step("reading it"))?;
    check_head(&head).map_err(LaunchError::NoProgram)?;
    let name = path.file_name().unwrap_or_default();
    let memory = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
    let mut memory = File::from(memory.map_err(step("memory for it"))?);
    io::copy(&mut head.as_slice().chain(file), &mut memory).map_err(step("copying it"))?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).map_err(step("sealing it"))?;
    Ok(memory.into())
}

/// Bytes of an ELF file that say what it is for.
const HEAD_BYTES: u64 = 20;
/// Where ELF names the machine, and what it is called there.
const MACHINE_AT: usize = 18;
const MACHINE: (u16, &str) = if cfg!(target_arch = "aarch64") { (183, "aarch64") } else { (62, "x86-64") };

/// A 64-bit ELF file for this machine.
fn check_head(head: &[u8]) -> Result<(), String> {
    let machine = head.get(MACHINE_AT..).and_then(|bytes| Some(u16::from_le_bytes(*bytes.first_chunk()?)));
    match machine {
        Some(machine) if head.starts_with(b"\x7fELF\x02\x01") && machine == MACHINE.0 => Ok(()),
        _ => Err(format!("it is no program for this machine: a static ELF file for {} is wanted", MACHINE.1)),
    }
}

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// From here on there is nothing but the socket's folder, four devices and a small `/tmp`, and no network.
fn enter_view(view: &Path, socket: &Path, user: u32, group: u32) -> Result<(), LaunchError> {
    let files = CloneFlags::CLONE_NEWNS;
    // A kernel without the other kinds has no network either (Buildroot's), or gets along without them.
    unshare(files | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .or_else(|_| unshare(files))
        .map_err(step("a view of its own"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("keeping its mounts to itself"))?;
    mount(Some("tmpfs"), view, Some("tmpfs"), QUIET, Some("size=64k,mode=0755")).map_err(step("its root"))?;
    let inside = |path: &Path| view.join(path.strip_prefix("/").unwrap_or(path));
    fs::create_dir(view.join("dev")).map_err(step("its /dev"))?;
    for device in DEVICES {
        let (from, to) = (Path::new("/dev").join(device), view.join("dev").join(device));
        File::create(&to).map_err(step("its devices"))?;
        mount(Some(&from), &to, none, MsFlags::MS_BIND, none).map_err(step("its devices"))?;
    }
    let folder = socket.parent().unwrap_or(Path::new("/"));
    let sockets = inside(folder);
    fs::create_dir_all(&sockets).map_err(step("the socket's folder"))?;
    mount(Some(folder), &sockets, none, MsFlags::MS_BIND, none).map_err(step("the socket's folder"))?;
    let tmp = view.join("tmp");
    fs::create_dir(&tmp).map_err(step("its /tmp"))?;
    let options = format!("size={MAX_TMP_BYTES},mode=0700,uid={user},gid={group}");
    mount(Some("tmpfs"), &tmp, Some("tmpfs"), QUIET, Some(options.as_str())).map_err(step("its /tmp"))?;
    fs::set_permissions(view, Permissions::from_mode(0o755)).map_err(step("its root"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | QUIET;
    mount(none, view, none, read_only, none).map_err(step("its root, read-only"))?;
    chroot(view).map_err(step("entering its root"))?;
    chdir("/").map_err(step("entering its root"))
}

/// Limits that no app can lift again. Processes are counted by user: without one of its own they would be everybody's.
fn limit(has_own_user: bool) -> Result<(), Errno> {
    let limits = [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_DATA, MAX_DATA_BYTES),
        (Resource::RLIMIT_AS, MAX_ADDRESS_BYTES),
        (Resource::RLIMIT_NOFILE, MAX_FILES),
        (Resource::RLIMIT_FSIZE, MAX_FILE_BYTES),
    ];
    for (resource, most) in limits {
        setrlimit(resource, most, most)?;
    }
    if has_own_user { setrlimit(Resource::RLIMIT_NPROC, MAX_PROCESSES, MAX_PROCESSES) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_programs_for_this_machine_are_copied_and_nobody_changes_the_copy() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            sealed_copy(&path).unwrap_err().to_string()
        };
        let mut other = fs::read(std::env::current_exe().unwrap()).unwrap();
        other.truncate(1000);
        other[MACHINE_AT] ^= 1;
        for (name, bytes) in [("a.txt", &b"#!/bin/sh\n"[..]), ("empty", b""), ("short", b"\x7fELF"), ("other", &other)]
        {
            assert!(refused(name, bytes).starts_with("it is no program for this machine"), "{name}");
        }
        File::create(folder.path().join("huge")).unwrap().set_len(MAX_APP_BYTES + 1).unwrap();
        let huge = sealed_copy(&folder.path().join("huge")).unwrap_err().to_string();
        assert!(huge.contains("33554433 bytes, an app may have 33554432"), "{huge}");
        assert!(sealed_copy(&folder.path().join("none")).is_err() && sealed_copy(folder.path()).is_err());

        other[MACHINE_AT] ^= 1;
        let good = folder.path().join("good");
        fs::write(&good, &other).unwrap();
        let copy = File::from(sealed_copy(&good).unwrap());
        assert_eq!(copy.metadata().unwrap().len(), 1000);
        assert!(io::Write::write(&mut &copy, b"x").is_err() && copy.set_len(1).is_err());
    }
}
