//! Looks after `hearth serve`: starts it as a child of its own, listens to its heartbeat and its log, kills it where it hangs, reaps
//! it and every orphan, and feeds the hardware watchdog while there is reason to. One loop that waits in epoll and never for a
//! child. Once serve answers it starts the [`super::apps`]. What is decided is in `init::judge`; next on the data's way: `serve`, at the other end of the line.

mod attend;
mod stop;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};

use self::stop::Stopping;
use super::apps::{AppSetup, Apps};
use super::button::{self, Buttons};
use super::child::{Child, how_it_ended};
use super::console::{self, Console};
use super::fault::{self, Fault, Plan, Saboteur};
use super::job::{Job, Selftest};
use super::judge::{Action, End, Judge};
use super::watchdog::Watchdog;
use crate::sys::fault::LOST_FILE_EXIT_CODE;
use crate::sys::poll::{Interest, Poller};
use crate::sys::record::Records;
use crate::sys::signals::SignalLine;

/// How often the loop looks at the clock when nothing happens.
pub const TICK: Duration = Duration::from_millis(250);
/// Where a wait of [`TICK`] takes this long, the machine as a whole did not run.
pub const AWAY: Duration = Duration::from_secs(1);
/// What the runtime says of a panic, in front of its place.
const PANICKED: &str = "panicked at ";

const TERMINATE: u64 = 0;
const INTERRUPT: u64 = 1;
const CHILD: u64 = 2;
const LINE: u64 = 3;
const LOG: u64 = 4;
const CONSOLE: u64 = 5;
const JOB: u64 = 6;
const BUTTON: u64 = 7;

/// What to run.
#[derive(Clone, Debug)]
pub struct Serve {
    /// The program: this one.
    pub program: PathBuf,
    /// Models to try, the first first.
    pub models: Vec<PathBuf>,
    /// Arguments behind `serve --supervised --model MODEL`.
    pub arguments: Vec<OsString>,
    /// The same without what somebody set: for a model that refuses the settings.
    pub defaults: Vec<OsString>,
    /// Where failures are recorded.
    pub records: Records,
    /// User and group to run it as; `None`: as this process.
    pub user: Option<u32>,
    /// Failures on purpose.
    pub fault: Option<Plan>,
    /// The self-test that somebody may ask for, and where reports are kept.
    pub selftest: Selftest,
    /// Apps to start once serve answers; `None`: none.
    pub apps: Option<AppSetup>,
}

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Somebody switches the machine off.
    PowerOff,
    /// Somebody, or too many failures, start it again.
    Reboot,
}

/// Runs until the machine is to stop.
///
/// # Errors
/// The kernel refuses what the loop itself needs; nothing serve does is an error here.
pub fn run(serve: &Serve, console: &mut Console, watchdog: Option<&mut Watchdog>) -> io::Result<Ending> {
    let mut supervisor = Supervisor {
        serve,
        console,
        watchdog,
        poller: Poller::new()?,
        terminate: SignalLine::install(SIGTERM)?,
        interrupt: SignalLine::install(SIGINT)?,
        ended: SignalLine::install(SIGCHLD)?,
        buttons: Buttons::default(),
        judge: Judge::new(Instant::now()),
        child: None,
        model: 0,
        without_settings: false,
        panicked: None,
        saboteur: Saboteur::default(),
        last_end: None,
        listening: false,
        job: None,
        apps: None,
        stopping: None,
    };
    supervisor.poller.add(&supervisor.terminate, TERMINATE, Interest::READ)?;
    supervisor.poller.add(&supervisor.interrupt, INTERRUPT, Interest::READ)?;
    supervisor.poller.add(&supervisor.ended, CHILD, Interest::READ)?;
    supervisor.find_buttons();
    supervisor.supervise()
}

struct Supervisor<'a> {
    serve: &'a Serve,
    console: &'a mut Console,
    watchdog: Option<&'a mut Watchdog>,
    poller: Poller,
    terminate: SignalLine,
    interrupt: SignalLine,
    ended: SignalLine,
    /// The machine's power buttons.
    buttons: Buttons,
    judge: Judge,
    child: Option<Child>,
    /// Which of the models is tried.
    model: usize,
    /// It is tried without what somebody set.
    without_settings: bool,
    /// Where the serve that runs says it panicked.
    panicked: Option<String>,
    /// Failures on purpose, and when they happen.
    saboteur: Saboteur,
    /// How serve ended last.
    last_end: Option<String>,
    /// The console's input is ours, and not serve's.
    listening: bool,
    /// A self-test that runs.
    job: Option<Job>,
    /// Found when serve was ready for the first time.
    apps: Option<Apps>,
    stopping: Option<Stopping>,
}

impl Supervisor<'_> {
    fn supervise(&mut self) -> io::Result<Ending> {
        let mut ready = Vec::new();
        let mut round_ended = Instant::now();
        // Serve is started at once, not when the first tick is over.
        let mut tick = Duration::ZERO;
        loop {
            self.poller.wait(Some(tick), &mut ready)?;
            tick = TICK;
            let now = Instant::now();
            let away = now.duration_since(round_ended);
            if away >= AWAY {
                self.judge.forgive(away);
            }
            self.listen(&ready, now);
            self.reap(now);
            if let Some(apps) = &mut self.apps {
                apps.work(now, self.console);
            }
            match self.stopping {
                Some(stopping) if self.is_over(stopping, now) => return Ok(stopping.ending),
                Some(stopping) => self.press(stopping, now),
                None => {
                    self.act(now);
                    self.fail_on_purpose(now);
                }
            }
            if let Some(watchdog) = &mut self.watchdog
                && (self.stopping.is_some() || self.judge.is_healthy(now))
            {
                watchdog.feed(now);
            }
            round_ended = Instant::now();
        }
    }

    /// Listens to the power buttons, unless it does. Also when serve is ready: a driver may have waited for another one.
    fn find_buttons(&mut self) {
        if self.buttons.fds().next().is_some() {
            return;
        }
        self.buttons = Buttons::find(Path::new(button::DEVICES), Path::new(button::CLASS));
        for button in self.buttons.fds() {
            // They are looked at in every round anyway.
            let _ = self.poller.add(button, BUTTON, Interest::READ);
        }
    }

    /// What the judge says.
    fn act(&mut self, now: Instant) {
        match self.judge.action(now) {
            None => {}
            Some(Action::Start) => self.start(now),
            Some(Action::Kill(reason)) => {
                self.judge.killed(now);
                self.console.say(&format!("serve is killed: {reason}"));
                self.record(&format!("serve is killed: {reason}"));
                self.signal(Signal::SIGKILL);
            }
            Some(Action::GiveUp) => {
                self.console.say("serve ended too often without an answer: the machine starts again");
                self.record("serve ended too often without an answer");
                self.stop(Ending::Reboot, now);
            }
        }
    }

    fn fail_on_purpose(&mut self, now: Instant) {
        let Some(fault) = self.saboteur.take(now, self.serve.fault.as_ref()) else { return };
        self.console.stamp(&fault.record());
        if let Err(error) = self.serve.records.add(console::since_boot(), &fault.record()) {
            // Nobody would know after the restart that it happened, and it would happen for ever.
            return self.console.say(&format!("it does not happen: {}: {error}", self.serve.records.path().display()));
        }
        match fault {
            Fault::Kill => self.signal(Signal::SIGKILL),
            Fault::Stop => self.signal(Signal::SIGSTOP),
            Fault::Crash => {
                // The runtime's handler lets the instruction that failed fail again, which none did: it takes another signal.
                for _ in 0..fault::CRASH_SIGNALS {
                    self.signal(Signal::SIGSEGV);
                    std::thread::sleep(fault::CRASH_SIGNALS_APART);
                }
            }
            Fault::Bus => self.signal(Signal::SIGBUS),
            Fault::Hang => loop {
                std::thread::sleep(AWAY);
            },
            Fault::Panic => panic!("on purpose"),
        }
    }

    fn start(&mut self, now: Instant) {
        self.judge.started(now);
        let started = match self.serve.models.get(self.model) {
            Some(model) => {
                let set = if self.without_settings { &self.serve.defaults } else { &self.serve.arguments };
                Child::spawn(&self.serve.program, self.serve.user, model, set)
            }
            None => Err(io::Error::other("there is no model: put a .gguf into models/ on the card's first partition")),
        };
        match started {
            Ok(child) => {
                let watched = self.poller.add(&child.line, LINE, Interest::READ);
                if let Err(error) = watched.and_then(|()| self.poller.add(child.log(), LOG, Interest::READ)) {
                    // Both are read in every round anyway.
                    self.console.log(&format!("watching serve: {error}"));
                }
                self.child = Some(child);
            }
            Err(error) => {
                self.judge.ended(now, End::Refused);
                self.console.say(&format!("serve is not started: {error}"));
            }
        }
    }

    /// Takes the dead: serve, and whatever orphan was left to us.
    fn reap(&mut self, now: Instant) {
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return,
                Ok(status) => status,
                Err(Errno::EINTR) => continue,
                // There are no children.
                Err(_) => return,
            };
            let Some(pid) = status.pid() else { continue };
            if self.child.as_ref().is_some_and(|child| child.pid() == pid) {
                self.is_gone(status, now);
            } else if let Some(job) = self.job.take_if(|job| job.pid() == pid) {
                let how = how_it_ended(status);
                job.ended(&how, &self.serve.selftest.reports, self.console, now);
                self.tell_that_it_is_over();
            } else if let Some(apps) = &mut self.apps {
                apps.is_gone(status, now, self.console);
            }
        }
    }

    fn is_gone(&mut self, status: WaitStatus, now: Instant) {
        let was_serving = self.judge.is_serving();
        let end = match status {
            WaitStatus::Exited(_, 1 | 2) if !was_serving => End::Refused,
            // A card that cannot be read does not get better by starting the machine again.
            WaitStatus::Exited(_, code) if !was_serving && code == i32::from(LOST_FILE_EXIT_CODE) => End::Refused,
            _ => End::Failed,
        };
        let rest = self.judge.ended(now, end);
        self.read_log();
        self.child = None;
        let how = how_it_ended(status);
        let panicked = self.panicked.take();
        self.last_end = Some(format!("the last one ended with {how}"));
        if self.stopping.is_some() {
            return self.console.log(&format!("serve ended: {how}"));
        }
        if end == End::Refused {
            if !self.without_settings && self.serve.arguments != self.serve.defaults {
                self.without_settings = true;
                self.console.say(&format!("serve ended: {how}; it is tried without the settings of hearth.toml"));
                return self.judge.try_now(now);
            }
            self.without_settings = false;
            self.model += 1;
            if self.serve.models.get(self.model).is_some() {
                self.console.say(&format!("serve ended: {how}; the next model is tried"));
                return self.judge.try_now(now);
            }
            self.model = 0;
        } else {
            let place = panicked.map(|place| format!(", {place}")).unwrap_or_default();
            self.record(&format!("serve ended: {how}{place}"));
        }
        self.console.say(&format!("serve ended: {how}; it is started again in {:.2} s", rest.as_secs_f64()));
    }

    /// Passes serve's log on, line by line: to the kernel's log, and to the console what is no mere information as long as nobody
    /// answers there.
    fn read_log(&mut self) {
        let Some(child) = &mut self.child else { return };
        for line in child.log_lines() {
            let line = line.trim_start_matches("hearth: ");
            // The place alone: what follows may hold a value. It stands on a line of its own.
            if let Some(at) = line.find(PANICKED).filter(|_| line.starts_with("thread '")) {
                self.panicked = line.get(at..).map(|place| place.trim_end_matches(':').to_owned());
            }
            if line.starts_with("[INFO]") || line.starts_with("[DEBUG]") || self.judge.is_serving() {
                self.console.log(line);
            } else {
                self.console.say(line);
            }
        }
    }

    /// Keeps a failure on the card. Before the next start, so that a start that fails as well leaves this one.
    fn record(&mut self, why: &str) {
        if let Err(error) = self.serve.records.add(console::since_boot(), why) {
            self.console.log(&format!("{}: {error}", self.serve.records.path().display()));
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            child.signal(signal);
        }
    }
}

/// When what happened at the start.
pub(super) fn show_boot_report(console: &mut Console) {
    console.timeline().report().iter().for_each(|line| console.show(line));
}

/// What failed since the state partition was made.
pub(super) fn show_records(console: &mut Console, records: &Records) {
    let lines = records.read();
    console.show(&format!("{} failures are on record, the newest last", lines.len()));
    lines.iter().for_each(|line| console.show(line));
}
