//! Apps: static programs that somebody dropped into `apps/` on the card. PID 1 starts each as a user of its own ([`super::launch`]) once
//! the first request would be taken, passes its output on to the log, starts it again where it fails, less and less often, and
//! gives it up in the end. Nothing here waits for an app, and nothing that an app does costs more than itself.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::console::Console;
use super::launch::CANNOT_START;
use crate::config::Restart;
use crate::sys::record::{APP_LOG, APP_STATES, MAX_RECORDS};

#[cfg(test)]
mod tests;

/// Most apps that are started, the first by name.
pub const MAX_APPS: usize = 8;
/// Longest name of an app that is told, in characters.
pub const MAX_NAME_CHARS: usize = 32;
/// The first app's user; the next by name has the next number.
pub const FIRST_APP_ID: u32 = 1000;
/// Group of every app: that of the socket.
pub const ASK_ID: u32 = 101;
/// The first rest before an app that failed is started again; it doubles up to [`MAX_REST`].
pub const MIN_REST: Duration = Duration::from_secs(1);
/// The longest rest.
pub const MAX_REST: Duration = Duration::from_secs(60);
/// An app that ran for so long was well, and what failed before is forgotten.
pub const GOOD_RUN: Duration = Duration::from_secs(60);
/// So many failures in a row, and the app is given up until the next start of the board.
pub const GIVE_UP_AFTER: u32 = 5;
/// Output of an app that is taken in a second, in bytes; an app that writes more waits.
pub const OUTPUT_BYTES_PER_S: usize = 4096;
/// What a line counts for beside its own bytes: as many go into the log's record around it.
const LINE_COST_BYTES: usize = 64;
/// Bytes taken at once.
const READ_BYTES: usize = 256;
/// Longest line of an app's output, in bytes; a longer one is cut in two.
pub const MAX_LINE_BYTES: usize = 160;
/// Lines of all apps' output that `/log` on the console shows: the newest.
pub const LOG_LINES: usize = MAX_RECORDS;

/// What to start and how.
#[derive(Clone, Debug)]
pub struct AppSetup {
    /// This program.
    pub hearth: PathBuf,
    /// Where the apps lie.
    pub folder: PathBuf,
    /// The socket that they are told of.
    pub socket: PathBuf,
    /// An empty folder to make their view of the files over; `None`: no view and no user of their own, for a supervisor that is not root.
    pub view: Option<PathBuf>,
    /// When one that ended is started again.
    pub restart: Restart,
    /// Where it is written what they do, for serve to tell.
    pub report: PathBuf,
}

/// All apps.
#[derive(Debug, Default)]
pub struct Apps {
    setup: Option<AppSetup>,
    apps: Vec<App>,
    /// The newest lines of output, and whose they are.
    log: VecDeque<(usize, String)>,
    log_changed: bool,
    states_changed: bool,
    stopping: bool,
    read_at: Option<Instant>,
}

#[derive(Debug)]
struct App {
    name: String,
    path: PathBuf,
    user: u32,
    state: State,
    starts: u32,
    /// Failures in a row.
    failures: u32,
    /// What is still to come of the last process.
    output: Option<File>,
    /// A line that has not ended yet.
    unfinished: Vec<u8>,
    /// What was taken beyond what it may have, in bytes.
    debt: usize,
}

#[derive(Debug)]
enum State {
    /// Not started yet, or to be started again.
    Resting {
        until: Instant,
        why: Option<String>,
    },
    Running {
        pid: Pid,
        since: Instant,
    },
    /// Not to be started again.
    Over(String),
}

impl Apps {
    /// What lies in the setup's folder, to be started now; `None`: no apps.
    pub fn find(setup: Option<AppSetup>, now: Instant, console: &mut Console) -> Self {
        let Some(setup) = setup else { return Self::default() };
        let mut paths = programs(&setup.folder);
        if paths.len() > MAX_APPS {
            console.say(&format!("{} apps, the first {MAX_APPS} by name are started", paths.len()));
            paths.truncate(MAX_APPS);
        }
        let app = |(user, path): (u32, PathBuf)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = name.chars().filter(|c| !c.is_control()).take(MAX_NAME_CHARS).collect();
            let state = State::Resting { until: now, why: None };
            App { name, path, user, state, starts: 0, failures: 0, output: None, unfinished: Vec::new(), debt: 0 }
        };
        let apps: Vec<App> = (FIRST_APP_ID..).zip(paths).map(app).collect();
        let states_changed = !apps.is_empty();
        Self { setup: Some(setup), apps, states_changed, ..Self::default() }
    }

    /// Starts what is due, takes output, and writes down what changed.
    pub fn work(&mut self, now: Instant, console: &mut Console) {
        let Some(setup) = &self.setup else { return };
        for app in self.apps.iter_mut().filter(|_| !self.stopping) {
            if matches!(app.state, State::Resting { until, .. } if until <= now) {
                app.start(setup, now, console);
                self.states_changed = true;
            }
        }
        let since = self.read_at.replace(now).map_or(Duration::ZERO, |before| now.duration_since(before));
        let budget = OUTPUT_BYTES_PER_S * usize::try_from(since.as_millis().min(1000)).unwrap_or(0) / 1000;
        for at in 0..self.apps.len() {
            self.read(at, budget, console);
        }
        self.report(console);
    }

    /// Whether the process that ended was one of them.
    pub fn is_gone(&mut self, status: WaitStatus, now: Instant, console: &mut Console) -> bool {
        let ended = status.pid();
        let is_its = |app: &App| matches!(app.state, State::Running { pid, .. } if Some(pid) == ended);
        let Some(at) = self.apps.iter().position(is_its) else { return false };
        let Some(setup) = &self.setup else { return false };
        self.apps[at].ended(status, setup, self.stopping, now, console);
        self.states_changed = true;
        true
    }

    /// Asks all to end; none is started any more.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.signal(Signal::SIGTERM);
    }

    /// Ends all.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Whether none runs.
    pub fn are_gone(&self) -> bool {
        !self.apps.iter().any(|app| matches!(app.state, State::Running { .. }))
    }

    /// What each does, a line an app.
    pub fn states(&self) -> impl Iterator<Item = String> {
        self.apps.iter().map(App::told)
    }

    fn signal(&self, signal: Signal) {
        for app in &self.apps {
            if let State::Running { pid, .. } = app.state {
                // Before it has made its session it has no group of its own.
                if killpg(pid, signal).is_err() {
                    let _ = kill(pid, signal);
                }
            }
        }
    }

    /// Takes output of one app, as much as it may have in the time since the last round.
    fn read(&mut self, at: usize, budget: usize, console: &mut Console) {
        let app = &mut self.apps[at];
        let debt = app.debt;
        app.debt = debt.saturating_sub(budget);
        let mut budget = budget.saturating_sub(debt);
        let mut bytes = [0; READ_BYTES];
        while let Some(output) = self.apps[at].output.as_mut().filter(|_| budget > 0) {
            let Ok(count) = output.read(&mut bytes) else { return };
            let app = &mut self.apps[at];
            app.unfinished.extend_from_slice(&bytes[..count]);
            if count == 0 {
                // Nobody writes any more; what was left unfinished is the last line.
                app.unfinished.push(b'\n');
                app.output = None;
            }
            let cost = count + LINE_COST_BYTES * self.take_lines(at, console);
            self.apps[at].debt += cost.saturating_sub(budget);
            budget = budget.saturating_sub(cost);
        }
    }

    /// Passes on the lines that have ended; how many they were.
    fn take_lines(&mut self, at: usize, console: &mut Console) -> usize {
        let app = &mut self.apps[at];
        let mut count = 0;
        while let Some(line) = next_line(&mut app.unfinished) {
            let line = format!("{}: {line}", app.name);
            console.log(&format!("app {line}"));
            if self.log.len() == LOG_LINES {
                forget_one(&mut self.log);
            }
            self.log.push_back((at, line));
            self.log_changed = true;
            count += 1;
        }
        count
    }

    fn report(&mut self, console: &mut Console) {
        let Some(setup) = &self.setup else { return };
        let mut write = |name: &str, lines: Vec<String>| {
            let text: String = lines.iter().flat_map(|line| [line, "\n"]).collect();
            let new = setup.report.join("new");
            let written = fs::write(&new, text).and_then(|()| fs::rename(&new, setup.report.join(name)));
            if let Err(error) = written {
                console.log(&format!("{}: {error}", setup.report.display()));
            }
        };
        if std::mem::take(&mut self.states_changed) {
            write(APP_STATES, self.apps.iter().map(App::told).collect());
        }
        if std::mem::take(&mut self.log_changed) {
            write(APP_LOG, self.log.iter().map(|(_, line)| line.clone()).collect());
        }
    }
}

impl App {
    fn start(&mut self, setup: &AppSetup, now: Instant, console: &mut Console) {
        self.starts = self.starts.saturating_add(1);
        self.unfinished.clear();
        match spawn(setup, &self.path, self.user) {
            Ok((pid, output)) => {
                console.log(&format!("app {} is started as process {pid}", self.name));
                self.output = Some(output);
                self.state = State::Running { pid, since: now };
            }
            Err(error) => self.rest(format!("it is not started: {error}"), now, console),
        }
    }

    fn ended(&mut self, status: WaitStatus, setup: &AppSetup, stopping: bool, now: Instant, console: &mut Console) {
        let State::Running { pid, since } = self.state else { return };
        // What it started goes with it, also what left its group.
        let _ = killpg(pid, Signal::SIGKILL);
        if setup.view.is_some() {
            kill_all_of(self.user);
        }
        if now.duration_since(since) >= GOOD_RUN {
            self.failures = 0;
        }
        let how = match status {
            WaitStatus::Exited(_, code) => format!("exit code {code}"),
            WaitStatus::Signaled(_, signal, _) => signal.to_string(),
            other => format!("{other:?}"),
        };
        let how = format!("it ended with {how}");
        console.log(&format!("app {}: {how}", self.name));
        match (status, setup.restart) {
            _ if stopping => self.state = State::Over(how),
            (WaitStatus::Exited(_, code), _) if code == i32::from(CANNOT_START) => self.give_up(how, console),
            (_, Restart::No) | (WaitStatus::Exited(_, 0), Restart::OnFailure) => self.state = State::Over(how),
            (WaitStatus::Exited(_, 0), Restart::Always) => {
                self.state = State::Resting { until: now + MIN_REST, why: Some(how) };
            }
            _ => self.rest(how, now, console),
        }
    }

    fn rest(&mut self, why: String, now: Instant, console: &mut Console) {
        let rest = MIN_REST.saturating_mul(1 << self.failures.min(GIVE_UP_AFTER)).min(MAX_REST);
        self.failures += 1;
        if self.failures >= GIVE_UP_AFTER {
            return self.give_up(why, console);
        }
        self.state = State::Resting { until: now + rest, why: Some(why) };
    }

    fn give_up(&mut self, why: String, console: &mut Console) {
        console.say(&format!("app {} is given up: {why}", self.name));
        self.state = State::Over(format!("given up, {why}"));
    }

    fn told(&self) -> String {
        let what = match &self.state {
            State::Resting { why: None, .. } => "to be started".to_owned(),
            State::Resting { why: Some(why), .. } => format!("to be started again, {why}"),
            State::Running { .. } => "running".to_owned(),
            State::Over(how) => how.clone(),
        };
        let times = if self.starts == 1 { "time" } else { "times" };
        format!("{}: {what}; user {}, started {} {times}", self.name, self.user, self.starts)
    }
}

/// Files that may be programs, by name. What PCs leave beside them (`._name`) is none.
fn programs(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_hidden = |path: &PathBuf| path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let mut paths: Vec<_> = entries.filter(|path| path.is_file() && !is_hidden(path)).collect();
    paths.sort();
    paths
}

/// Makes room in the log: the app with the most lines loses its oldest, so that one that floods leaves those of others.
fn forget_one(log: &mut VecDeque<(usize, String)>) {
    let lines = |app: usize| log.iter().filter(|(of, _)| *of == app).count();
    let most = (0..MAX_APPS).max_by_key(|&app| lines(app));
    if let Some(oldest) = log.iter().position(|(of, _)| Some(*of) == most) {
        log.remove(oldest);
    }
}

/// The next line of what an app wrote, without anything that a terminal would obey; an empty one is passed over.
fn next_line(unfinished: &mut Vec<u8>) -> Option<String> {
    loop {
        let end = unfinished.iter().position(|&byte| byte == b'\n').map(|at| at + 1);
        let end = end.filter(|end| *end <= MAX_LINE_BYTES);
        let end = end.or((unfinished.len() >= MAX_LINE_BYTES).then_some(MAX_LINE_BYTES))?;
        let line: Vec<u8> = unfinished.drain(..end).collect();
        let line: String = String::from_utf8_lossy(&line).chars().filter(|char| !char.is_control()).collect();
        if !line.trim().is_empty() {
            return Some(line);
        }
    }
}

fn spawn(setup: &AppSetup, path: &Path, user: u32) -> io::Result<(Pid, File)> {
    let (output, apps_end) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut command = Command::new(&setup.hearth);
    command.arg("launch").arg(path).arg("--socket").arg(&setup.socket);
    if let Some(view) = &setup.view {
        command.args(["--user", &user.to_string(), "--group", &ASK_ID.to_string(), "--view"]).arg(view);
    }
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::from(apps_end.try_clone()?)).stderr(Stdio::from(apps_end));
    let child = command.spawn()?;
    // Children are reaped all together, by number.
    Ok((Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?), File::from(output)))
}

/// Ends every process of a user who is one app's alone.
fn kill_all_of(user: u32) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for entry in processes {
        let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(id) = id.filter(|_| entry.metadata().is_ok_and(|process| process.uid() == user)) {
            // Gone meanwhile is as good.
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}
