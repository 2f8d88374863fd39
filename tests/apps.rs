//! Apps as processes: programs of this host, started as PID 1 starts them but for what only root can do (a user and a view of their own,
//! which tests/appliance looks at on a board).
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hearth::config::Restart;
use hearth::init::apps::{AppSetup, Apps, GIVE_UP_AFTER, OUTPUT_BYTES_PER_S};
use hearth::init::console::Console;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

const PATIENCE: Duration = Duration::from_secs(60);
const ROUND: Duration = Duration::from_millis(50);

/// The apps, and a clock that the test can put forward.
struct Board {
    apps: Apps,
    ahead: Duration,
}

impl Board {
    fn states(&self) -> Vec<String> {
        self.apps.states().collect()
    }

    /// Does what PID 1 does in each round until `done`.
    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !done(self) {
            assert!(began.elapsed() < PATIENCE, "{:#?}", self.states());
            let now = Instant::now() + self.ahead;
            self.apps.work(now, &mut Console::default());
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                if status == WaitStatus::StillAlive {
                    break;
                }
                assert!(self.apps.is_gone(status, now, &mut Console::default()), "{status:?}");
            }
            std::thread::sleep(ROUND);
        }
    }
}

/// The process that runs the program called `name` from memory.
fn process_of(name: &str) -> Option<PathBuf> {
    let wanted = format!("/memfd:{name} (deleted)");
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let runs = |path: &PathBuf| fs::read_link(path.join("exe")).is_ok_and(|exe| exe.as_os_str() == wanted.as_str());
    entries.into_iter().find(runs)
}

#[test]
fn apps_run_from_memory_within_limits_are_started_again_given_up_and_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["apps", "report"] {
        fs::create_dir(at(name)).unwrap();
    }
    for name in ["env", "false", "yes"] {
        fs::copy(PathBuf::from("/usr/bin").join(name), at("apps").join(name)).unwrap();
        // As on FAT: nothing says that it is a program.
        fs::set_permissions(at("apps").join(name), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    }
    fs::write(at("apps/notes.txt"), "not a program\n").unwrap();
    let setup = AppSetup {
        hearth: env!("CARGO_BIN_EXE_hearth").into(),
        folder: at("apps"),
        socket: "/run/hearth/hearth.sock".into(),
        view: None,
        restart: Restart::OnFailure,
        report: at("report"),
    };
    let apps = Apps::find(Some(setup), Instant::now(), &mut Console::default());
    let mut board = Board { apps, ahead: Duration::ZERO };

    board.until(|board| board.states()[0].starts_with("env: it ended with exit code 0"));
    board.until(|board| board.states()[2].starts_with("notes.txt: given up, it ended with exit code 126"));
    board.until(|_| process_of("yes").is_some());
    let log = || fs::read_to_string(at("report/log")).unwrap_or_default();
    board.until(|_| log().contains("yes: y\n") && log().contains("notes.txt: ") && log().contains("env: "));
    let log = log();
    assert!(log.contains("env: HEARTH_SOCKET=/run/hearth/hearth.sock\n"), "{log}");
    assert!(!log.contains("PATH="), "nothing else of the environment: {log}");
    assert!(log.contains("notes.txt: hearth: it is no program for this machine"), "{log}");

    let yes = process_of("yes").unwrap();
    let status = fs::read_to_string(yes.join("status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    let limits = fs::read_to_string(yes.join("limits")).unwrap();
    for (name, most) in [("Max core file size", "0"), ("Max data size", "67108864"), ("Max open files", "64")] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let words: Vec<_> = line[name.len()..].split_whitespace().take(2).collect();
        assert_eq!(words, [most, most], "{name}");
    }
    // It writes as fast as it is read, which is slowly.
    let written = |path: &PathBuf| {
        let io = fs::read_to_string(path.join("io")).unwrap();
        io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse::<usize>().unwrap()
    };
    let (before, began) = (written(&yes), Instant::now());
    board.until(|_| began.elapsed() > Duration::from_secs(1));
    let in_a_second = (written(&yes) - before) as f64 / began.elapsed().as_secs_f64();
    assert!(in_a_second < 4.0 * OUTPUT_BYTES_PER_S as f64, "{in_a_second}");
    assert!(board.states()[3].starts_with("yes: running; user 1003, started 1 time"), "{:?}", board.states());

    while !board.states()[1].starts_with("false: given up, it ended with exit code 1") {
        let before = board.states()[1].clone();
        // Its rest is over.
        board.ahead += Duration::from_secs(30);
        board.until(|board| board.states()[1] != before);
        board.until(|board| !board.states()[1].contains("running"));
    }
    assert!(board.states()[1].ends_with(&format!("started {GIVE_UP_AFTER} times")), "{:?}", board.states());

    board.apps.stop();
    board.until(|board| board.apps.are_gone());
    assert!(board.states()[3].starts_with("yes: it ended with SIGTERM"), "{:?}", board.states());
    assert_eq!(process_of("yes"), None);
    let told = fs::read_to_string(at("report/state")).unwrap();
    assert_eq!(told.lines().count(), 4, "{told}");
}
