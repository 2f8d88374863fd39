//! PID 1's supervision with real processes: `hearth serve` under it at a pseudo-terminal, stopped, killed and lost, and answering
//! again. Alone in its file: the supervisor takes over the signals of the whole process and reaps all of its children.
#![allow(clippy::unwrap_used)]

#[path = "common/models.rs"]
mod models;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hearth::client::report::{BootReportArgs, boot_report};
use hearth::init::console::Console;
use hearth::init::job::Selftest;
use hearth::init::supervise::{Ending, Serve, run};
use hearth::init::watchdog::Watchdog;
use hearth::sys::record::Records;
use hearth::sys::report::Reports;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, ttyname};

/// From a failure until requests are taken again.
const AGAIN_WITHIN: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);

struct Terminal {
    master: File,
    seen: String,
}

impl Terminal {
    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// What came up to `end` and with it.
    fn until(&mut self, end: &str) -> String {
        let patience = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(end) {
                let rest = self.seen.split_off(at + end.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            assert!(Instant::now() < patience, "waited in vain for {end:?} behind {:?}", self.seen);
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(100u16)).unwrap() > 0 {
                let mut bytes = [0; 4096];
                let count = self.master.read(&mut bytes).unwrap();
                self.seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        }
    }

    fn answers(&mut self) {
        self.type_in("/max 4\r");
        self.until("> ");
        self.type_in("Name three colours.\r");
        assert!(self.until("\n> ").contains("1. Red:"));
    }
}

fn post(socket: &std::path::Path, path: &str, body: &str) -> String {
    let mut client = UnixStream::connect(socket).unwrap();
    write!(client, "POST {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).unwrap();
    reply
}

/// The process of `hearth serve`: our only child.
fn serve_pid() -> Pid {
    let own = format!(" {} ", std::process::id());
    let child = |entry: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // PID (NAME) STATE PPID …
        let behind_name = stat.rsplit_once(") ")?.1;
        behind_name[1..].starts_with(&own).then(|| stat.split(' ').next().unwrap().parse().unwrap())
    };
    let found: Vec<i32> = std::fs::read_dir("/proc").unwrap().flatten().filter_map(child).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    Pid::from_raw(found[0])
}

#[test]
fn serve_comes_back_from_a_hang_and_a_kill_and_stops_when_the_console_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let no_model = folder.path().join("a.gguf");
    std::fs::write(&no_model, "GGUF").unwrap();
    let model = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let dog = folder.path().join("watchdog");
    std::fs::write(&dog, "").unwrap();

    let pty = openpty(None, None).unwrap();
    let console = ttyname(&pty.slave).unwrap();
    let mut terminal = Terminal { master: File::from(pty.master), seen: String::new() };
    let text = |text: &str| std::ffi::OsString::from(text);
    let (socket, failures) = (folder.path().join("hearth.sock"), folder.path().join("failures"));
    let reports = Reports::at(folder.path().join("reports"));
    let arguments = |ctx: &str| {
        vec![
            text("--socket"),
            socket.clone().into(),
            text("--records"),
            failures.clone().into(),
            text("--reports"),
            reports.folder().into(),
            text("--tty"),
            console.clone().into(),
            text("--ctx"),
            text(ctx),
            text("--sequences"),
            text("1"),
        ]
    };
    let serve = Serve {
        program: PathBuf::from(env!("CARGO_BIN_EXE_hearth")),
        models: vec![no_model.clone(), model],
        // More than any memory has.
        arguments: arguments("1000000"),
        defaults: arguments("256"),
        records: Records::at(&failures),
        user: None,
        fault: None,
        selftest: Selftest {
            program: PathBuf::from(env!("CARGO_BIN_EXE_hearth")),
            arguments: Vec::new(),
            user: None,
            reports: reports.clone(),
        },
    };
    let supervisor = std::thread::spawn({
        let dog = dog.clone();
        move || {
            let mut watchdog = Watchdog::arm(&dog).unwrap().unwrap();
            let mut console = Console::at(&console).unwrap();
            run(&serve, &mut console, Some(&mut watchdog)).unwrap()
        }
    });

    let start = terminal.until("hearth: ready\r\n");
    assert!(start.contains(no_model.to_str().unwrap()) && start.contains("the next model is tried"), "{start}");
    assert_eq!(start.matches("it is tried without the settings of hearth.toml").count(), 2, "{start}");
    terminal.until("> ");
    terminal.answers();

    for (signal, told) in [
        (Signal::SIGSTOP, "serve is killed: no sign of life for 3 s"),
        (Signal::SIGKILL, "serve ended: SIGKILL"),
        (Signal::SIGBUS, "serve ended: exit code 74"),
    ] {
        let hurt = Instant::now();
        kill(serve_pid(), signal).unwrap();
        let story = terminal.until("hearth: ready\r\n");
        assert!(hurt.elapsed() < AGAIN_WITHIN, "{signal}: {:?}", hurt.elapsed());
        assert!(story.contains(told), "{signal}: {story}");
        terminal.until("> ");
        terminal.answers();
    }

    let fed = std::fs::read(&dog).unwrap();
    assert!(fed.len() > 3 && fed.iter().all(|&byte| byte == 0), "fed, and never told to stop");
    terminal.type_in("/status\r");
    let status = terminal.until("\n> ");
    let recorded: Vec<_> = status.lines().filter_map(|line| Some(line.strip_prefix("failure")?.trim())).collect();
    let ends = ["no sign of life for 3 s", "serve ended: SIGKILL", "serve ended: SIGKILL", "serve ended: exit code 74"];
    assert_eq!(recorded.len(), ends.len(), "{status}");
    for (number, (record, end)) in recorded.iter().zip(ends).enumerate() {
        assert!(record.starts_with(&format!("{} +", number + 1)) && record.ends_with(end), "{record}");
    }

    // What was typed meanwhile waits for the report's end.
    terminal.type_in("/selftest\r/boot-report\r");
    let report = terminal.until("not here\r\n");
    assert!(report.contains("\r\nanswer      PASS      ") && report.contains("by scalar"), "{report}");
    let boot = terminal.until("PID 1 to ready: work ");
    terminal.until("\n> ");
    for line in ["serve: model read", "ready", "serve: first answer"] {
        assert!(boot.contains(line), "{line}: {boot}");
    }
    let get = |path: &str| {
        let mut client = UnixStream::connect(&socket).unwrap();
        write!(client, "GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut reply = String::new();
        client.read_to_string(&mut reply).unwrap();
        reply
    };
    assert!(get("/selftest").contains("answer      PASS"));
    assert!(get("/boot-report").contains("serve: first answer"));
    let socket_of_it = BootReportArgs { socket: Some(socket.clone()) };
    boot_report(&socket_of_it).unwrap();
    // Without PID 1 there is none.
    std::fs::remove_file(reports.folder().join("boot-report")).unwrap();
    let error = boot_report(&socket_of_it).unwrap_err().to_string();
    assert!(error.contains("there is no such report"), "{error}");

    terminal.type_in("/set temperature 3\r");
    assert!(terminal.until("\n> ").contains("temperature takes a number from 0"));
    terminal.type_in("/set temperature 0.7\r");
    terminal.until("kept: temperature 0.7\r\n> ");
    terminal.type_in("/set max_tokens 5\r");
    terminal.until("kept: max_tokens 5\r\n> ");
    assert_eq!(std::fs::read_to_string(folder.path().join("settings")).unwrap(), "temperature = 0.7\nmax_tokens = 5\n");
    kill(serve_pid(), Signal::SIGKILL).unwrap();
    terminal.until("hearth: ready\r\n");
    terminal.until("> ");
    terminal.type_in("/settings\r");
    let told = terminal.until("\n> ");
    assert!(told.contains("temperature  0.7 (set on the console)\r\nmax_tokens   5 (set on the console)"), "{told}");
    let body = r#"{"prompt":"One","ignore_eos":true}"#;
    let answer = post(&socket, "/v1/completions", body);
    assert!(answer.contains(r#""completion_tokens":5"#), "a request that names no number gets what is set: {answer}");
    terminal.type_in("/set max_tokens default\r");
    terminal.until("kept: max_tokens default\r\n> ");
    terminal.type_in("/settings\r");
    assert!(terminal.until("\n> ").contains("max_tokens   up to the context's end (as configured)"));

    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"POST /poweroff HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 ") && reply.ends_with("{\"status\":\"stopping\"}"), "{reply}");
    assert_eq!(supervisor.join().unwrap(), Ending::PowerOff);
}
