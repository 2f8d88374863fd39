#![allow(clippy::unwrap_used)]

use super::*;

const PID: Pid = Pid::from_raw(i32::MAX);

fn setup(folder: &Path, restart: Restart) -> AppSetup {
    let at = |name: &str| folder.join(name);
    let (hearth, socket) = (at("no program"), at("s"));
    AppSetup { hearth, folder: at("apps"), socket, view: None, restart, report: at("report") }
}

/// One app that runs, without a process.
fn running(restart: Restart, since: Instant) -> (tempfile::TempDir, Apps) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["apps", "report"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("apps/clock"), "").unwrap();
    let mut apps = Apps::find(Some(setup(folder.path(), restart)), since, &mut Console::default());
    apps.apps[0].state = State::Running { pid: PID, since };
    (folder, apps)
}

fn ends(apps: &mut Apps, status: WaitStatus, now: Instant) -> String {
    assert!(apps.is_gone(status, now, &mut Console::default()));
    apps.states().next().unwrap()
}

#[test]
fn rests_grow_until_an_app_is_given_up_and_a_good_run_forgives() {
    let begin = Instant::now();
    let (_folder, mut apps) = running(Restart::OnFailure, begin);
    let mut rests = Vec::new();
    for _ in 1..GIVE_UP_AFTER {
        let told = ends(&mut apps, WaitStatus::Exited(PID, 3), begin);
        assert!(told.starts_with("clock: to be started again, it ended with exit code 3; user 1000"), "{told}");
        let State::Resting { until, .. } = apps.apps[0].state else { panic!("{told}") };
        rests.push((until - begin).as_secs());
        apps.apps[0].state = State::Running { pid: PID, since: begin };
    }
    assert_eq!(rests, [1, 2, 4, 8]);
    // It ran well for a while: all is as in the beginning.
    let told = ends(&mut apps, WaitStatus::Signaled(PID, Signal::SIGSEGV, false), begin + GOOD_RUN);
    assert!(told.contains("to be started again, it ended with SIGSEGV"), "{told}");
    for _ in 1..GIVE_UP_AFTER {
        apps.apps[0].state = State::Running { pid: PID, since: begin };
        ends(&mut apps, WaitStatus::Exited(PID, 3), begin);
    }
    let told = apps.states().next().unwrap();
    assert!(told.starts_with("clock: given up, it ended with exit code 3"), "{told}");
    assert!(!apps.is_gone(WaitStatus::Exited(PID, 3), begin, &mut Console::default()), "that was no app's process");
}

#[test]
fn the_setting_says_which_ends_are_followed_by_a_start() {
    let begin = Instant::now();
    for (restart, code, wanted) in [
        (Restart::No, 0, "clock: it ended with exit code 0"),
        (Restart::No, 1, "clock: it ended with exit code 1"),
        (Restart::OnFailure, 0, "clock: it ended with exit code 0"),
        (Restart::OnFailure, 1, "clock: to be started again"),
        (Restart::Always, 0, "clock: to be started again"),
        (Restart::Always, i32::from(CANNOT_START), "clock: given up"),
    ] {
        let (_folder, mut apps) = running(restart, begin);
        let told = ends(&mut apps, WaitStatus::Exited(PID, code), begin);
        assert!(told.starts_with(wanted), "{restart:?} {code}: {told}");
    }
    let (_folder, mut apps) = running(Restart::Always, begin);
    apps.stopping = true;
    let told = ends(&mut apps, WaitStatus::Signaled(PID, Signal::SIGTERM, false), begin);
    assert!(told.starts_with("clock: it ended with SIGTERM"), "none is started while the board stops: {told}");
}

#[test]
fn one_that_cannot_be_started_is_tried_again_and_told() {
    let begin = Instant::now();
    let (folder, mut apps) = running(Restart::OnFailure, begin);
    apps.apps[0].state = State::Resting { until: begin, why: None };
    for turn in 0..20 {
        apps.work(begin + MAX_REST * turn, &mut Console::default());
    }
    let told = apps.states().next().unwrap();
    assert!(told.starts_with("clock: given up, it is not started: ") && told.ends_with("started 5 times"), "{told}");
    assert_eq!(fs::read_to_string(folder.path().join("report/state")).unwrap(), format!("{told}\n"));
}

#[test]
fn programs_come_by_name_and_no_more_than_there_is_room_for() {
    let folder = tempfile::tempdir().unwrap();
    let apps = folder.path().join("apps");
    fs::create_dir_all(apps.join("folder")).unwrap();
    for name in ["._a", "b\u{1b}[2J", "a"].map(str::to_owned).into_iter().chain((0..9).map(|n| format!("n{n}"))) {
        fs::write(apps.join(name), "").unwrap();
    }
    let found = Apps::find(Some(setup(folder.path(), Restart::No)), Instant::now(), &mut Console::default());
    let told: Vec<_> = found.states().collect();
    assert_eq!((told.len(), told[0].as_str()), (MAX_APPS, "a: to be started; user 1000, started 0 times"));
    assert!(told[1].starts_with("b[2J: to be started; user 1001"), "{}", told[1]);
    assert_eq!(Apps::find(None, Instant::now(), &mut Console::default()).states().count(), 0);
}

#[test]
fn one_that_floods_leaves_the_lines_of_others() {
    let mut log: VecDeque<_> = (0..3).map(|line| (1, format!("quiet: {line}"))).collect();
    for line in 0..1000 {
        if log.len() == LOG_LINES {
            forget_one(&mut log);
        }
        log.push_back((0, format!("loud: {line}")));
    }
    let of = |app| log.iter().filter(|(of, _)| *of == app).count();
    assert_eq!((of(1), of(0), log.back().unwrap().1.as_str()), (3, LOG_LINES - 3, "loud: 999"));
}

#[test]
fn output_is_lines_that_no_terminal_obeys() {
    let mut output = b"\x1b[2Jred\r\n\n \n\xff\nhalf".to_vec();
    let lines: Vec<_> = std::iter::from_fn(|| next_line(&mut output)).collect();
    assert_eq!((lines, output), (vec!["[2Jred".to_owned(), "\u{fffd}".to_owned()], b"half".to_vec()));
    let mut long = vec![b'x'; 2 * MAX_LINE_BYTES + 5];
    let lines: Vec<_> = std::iter::from_fn(|| next_line(&mut long)).map(|line| line.len()).collect();
    assert_eq!((lines, long.len()), (vec![MAX_LINE_BYTES; 2], 5));
}
