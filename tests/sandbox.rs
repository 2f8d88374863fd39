//! What a ready daemon cannot do any more, and what is left of a prompt that was answered: the real binary and the real model.
#![allow(clippy::unwrap_used)]

#[path = "common/daemon.rs"]
mod daemon;
#[path = "common/models.rs"]
mod models;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use daemon::{call, serve};
use hearth::sys::fault::REFUSED_SYSCALL_EXIT_CODE;
use hearth::sys::sandbox::{Files, Mode, Sandbox, allowed_syscalls};
use nix::libc;
use serde_json::json;

/// Syscalls that a ready daemon may use at most.
const MOST_SYSCALLS: usize = 40;
/// What the test's own process is told to try as a confined one.
const ATTEMPT: &str = "HEARTH_TEST_ATTEMPT";
/// Exit code of an attempt that the kernel refused with an error, and of one that it allowed.
const REFUSED: i32 = 10;
const ALLOWED: i32 = 11;

fn field(daemon: &daemon::Daemon, thread: u32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/task/{thread}/status", daemon.child.id())).unwrap();
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap().trim().to_owned()
}

fn question(text: &str) -> String {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}).to_string()
}

#[test]
fn every_thread_of_a_ready_daemon_is_confined() {
    let daemon = serve(&["--sandbox", "require"]);
    call(&daemon.socket, "POST", "/v1/chat/completions", &question("Name three colours."));
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
    let threads: Vec<u32> =
        threads.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    assert_eq!(threads.len(), 3, "the engine, a worker, the I/O thread");
    for thread in threads {
        assert_eq!(field(&daemon, thread, "Seccomp"), "2");
        assert_eq!(field(&daemon, thread, "NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let kept = u64::from_str_radix(&field(&daemon, thread, set), 16).unwrap();
            // Without the right to do so nobody empties the bounding set; then it gives nothing, either.
            assert!(kept == 0 || set == "CapBnd" && !nix::unistd::geteuid().is_root(), "{set} {kept:x}");
        }
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"));
}

#[test]
fn the_list_of_syscalls_is_short_and_the_readme_has_it() {
    let names = allowed_syscalls();
    assert!(names.len() <= MOST_SYSCALLS, "{}: {names:?}", names.len());
    let readme = include_str!("../README.md");
    let listed = readme.lines().find_map(|line| line.strip_prefix("Syscalls after ready: ")).unwrap();
    for name in names {
        assert!(listed.contains(&format!("`{name}`")), "README does not list {name}");
    }
}

/// What a confined process tries. Gives whether the kernel let it.
fn attempt(what: &str) -> bool {
    let folder = std::env::temp_dir();
    let file = folder.join(format!("hearth-sandbox-{}", std::process::id()));
    std::fs::write(&file, "before").unwrap();
    let read = if what == "read the allowed file" { vec![file.clone()] } else { Vec::new() };
    let sandbox = Sandbox::new(Mode::Require).unwrap();
    if let Some(what) = what.strip_prefix("compute and ") {
        sandbox.confine_computing_thread().unwrap();
        return match what {
            "open" => File::open(&file).is_ok(),
            _ => unreachable!("{what}"),
        };
    }
    sandbox.confine_io_thread(&Files { tty: None, sockets: Vec::new(), read }).unwrap();
    match what {
        "connect" => TcpListener::bind("127.0.0.1:0").is_ok(),
        "connect to a socket" => UnixStream::connect(&file).is_ok(),
        "execute" => Command::new("true").status().is_ok(),
        "make a thread" => std::thread::Builder::new().spawn(|| ()).is_ok(),
        "read a file" | "read the allowed file" => File::open(&file).is_ok(),
        "write a file" => std::fs::write(&file, "after").is_ok(),
        "change rights" => std::fs::set_permissions(&file, PermissionsExt::from_mode(0o777)).is_ok(),
        _ => unreachable!("{what}"),
    }
}

#[test]
fn what_is_not_allowed_is_refused_and_the_log_names_it() {
    if let Ok(what) = std::env::var(ATTEMPT) {
        std::process::exit(if attempt(&what) { ALLOWED } else { REFUSED });
    }
    let name = "what_is_not_allowed_is_refused_and_the_log_names_it";
    for (what, code, syscall) in [
        ("connect", REFUSED_SYSCALL_EXIT_CODE.into(), "socket"),
        ("connect to a socket", REFUSED_SYSCALL_EXIT_CODE.into(), "socket"),
        // Ended by the signal itself: the C library blocks all of them meanwhile.
        ("execute", libc::SIGSYS, ""),
        ("make a thread", libc::SIGSYS, ""),
        ("change rights", REFUSED_SYSCALL_EXIT_CODE.into(), "chmod"),
        ("compute and open", REFUSED_SYSCALL_EXIT_CODE.into(), "openat"),
        ("read a file", REFUSED, ""),
        ("write a file", REFUSED, ""),
        ("read the allowed file", ALLOWED, ""),
    ] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output =
            child.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(ATTEMPT, what).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code().or(output.status.signal()), Some(code), "{what}: {said}");
        let told = said.lines().find(|line| line.starts_with("hearth: the sandbox refuses the syscall "));
        assert_eq!(told.is_some(), code == i32::from(REFUSED_SYSCALL_EXIT_CODE), "{what}: {said}");
        assert!(told.unwrap_or(syscall).contains(syscall), "{what}: {said}");
    }
}

/// Where `needle` is in the memory of a process that may be written: heap, stacks, the engine's buffers.
fn found_in_memory(process: u32, needle: &[u8]) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let mut memory = File::open(format!("/proc/{process}/mem")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [from, to] = [from, to].map(|address| u64::from_str_radix(address, 16).unwrap());
        let mut bytes = Vec::new();
        memory.seek(SeekFrom::Start(from)).unwrap();
        // A page that cannot be read ends the mapping for us.
        let _ = memory.by_ref().take(to - from).read_to_end(&mut bytes);
        if bytes.windows(needle.len()).any(|window| window == needle) {
            found.push(line.to_owned());
        }
    }
    found
}

#[test]
fn no_word_of_a_prompt_outlives_its_request() {
    let canary = format!("xylophone{}quartz", std::process::id());
    // `off`: without root, nobody may look into a daemon with its sandbox.
    let daemon = serve(&["--sandbox", "off"]);
    let process = daemon.child.id();
    assert!(!found_in_memory(process, b"hearth").is_empty(), "the search finds what is there");
    call(&daemon.socket, "POST", "/v1/chat/completions", &question(&format!("Repeat the word {canary}.")));
    call(&daemon.socket, "POST", "/v1/completions", &json!({"prompt": canary, "max_tokens": 8}).to_string());
    // Another client's words are where the first one's were.
    call(&daemon.socket, "POST", "/v1/chat/completions", &question("Name three colours."));
    assert_eq!(found_in_memory(process, canary.as_bytes()), Vec::<String>::new());
    assert!(!daemon.log.lock().unwrap().contains(&canary));
    let left = std::fs::read_dir(daemon.socket.parent().unwrap()).unwrap().count();
    assert_eq!(left, 1, "the socket alone");
}
