//! Where PID 1 speaks: the kernel's log always, the console while `hearth serve` does not answer there, and where it then listens
//! for the few commands that need no model. Lines alone, bounded in length and in the time they may take: a terminal that does not
//! read costs its own lines. Next: `init::supervise` carries the commands out.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::tcdrain;
use nix::time::{ClockId, clock_gettime};

use super::timeline::Timeline;
use crate::sys::marks::{Mark, Stage};
use crate::sys::tty::{TtyError, open_raw};

/// Longest line, in bytes; the rest of a longer one is left out. A record of the kernel's log holds about 1,000.
pub const MAX_LINE_BYTES: usize = 800;
/// How long the console may take for one line.
pub const WRITE_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest command that is listened to, in bytes.
pub const MAX_COMMAND_BYTES: usize = 32;

/// The console and the kernel's log.
#[derive(Debug, Default)]
pub struct Console {
    path: Option<PathBuf>,
    tty: Option<File>,
    log: Option<File>,
    /// A command that has not ended yet.
    typed: Vec<u8>,
    /// What was said with its time.
    timeline: Timeline,
}

/// What is typed on the console while no model answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Say what serve does.
    Status,
    /// Switch off.
    PowerOff,
    /// Start again.
    Reboot,
    /// Print the kernel's log.
    Log,
    /// Make the state partition anew, empty.
    ResetState,
    /// Leave the maintenance menu and start serve.
    Start,
    /// Check the machine.
    Selftest,
    /// Print when what happened at the start.
    BootReport,
    /// Anything else.
    Unknown,
}

impl Command {
    fn parse(line: &[u8]) -> Option<Self> {
        match line.trim_ascii() {
            b"" => None,
            b"/status" => Some(Self::Status),
            b"/poweroff" => Some(Self::PowerOff),
            b"/reboot" => Some(Self::Reboot),
            b"/log" => Some(Self::Log),
            b"/reset-state" => Some(Self::ResetState),
            b"/start" => Some(Self::Start),
            b"/selftest" => Some(Self::Selftest),
            b"/boot-report" => Some(Self::BootReport),
            _ => Some(Self::Unknown),
        }
    }
}

impl Console {
    /// The kernel's console, the last of those it uses, and its log. Either may be missing.
    pub fn open() -> Self {
        let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let path = active.split_whitespace().next_back().map(|name| Path::new("/dev").join(name));
        let log = OpenOptions::new().write(true).open("/dev/kmsg").ok();
        Self { tty: path.as_deref().and_then(|path| open_raw(path).ok()), path, log, ..Self::default() }
    }

    /// A console at `path` and no kernel log: for a supervisor that is not PID 1.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub fn at(path: &Path) -> Result<Self, TtyError> {
        Ok(Self { path: Some(path.to_owned()), tty: Some(open_raw(path)?), ..Self::default() })
    }

    /// The line to listen to.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.tty.as_ref().map(AsFd::as_fd)
    }

    /// The terminal is gone.
    pub fn hang_up(&mut self) {
        self.tty = None;
    }

    /// The command that was typed, if one has ended; what is typed is echoed.
    pub fn command(&mut self) -> Option<Command> {
        let mut bytes = [0; 256];
        // Reads what came: one that is slow to read loses nothing, since the terminal keeps it.
        let count = self.tty.as_mut()?.read(&mut bytes).unwrap_or(0);
        let mut command = None;
        for &byte in bytes.get(..count).unwrap_or_default() {
            match byte {
                b'\r' | b'\n' => {
                    self.print("\r\n");
                    command = Command::parse(&std::mem::take(&mut self.typed)).or(command);
                }
                b' '..=b'~' if self.typed.len() < MAX_COMMAND_BYTES => {
                    self.typed.push(byte);
                    self.print(char::from(byte).encode_utf8(&mut [0; 4]));
                }
                _ => {}
            }
        }
        command
    }

    /// The console's device.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// A line for the log alone.
    pub fn log(&mut self, line: &str) {
        let record = format!("hearth: {}\n", bounded(line));
        if let Some(log) = &mut self.log {
            // The log is for later; what it does not take is lost.
            let _ = log.write_all(record.as_bytes());
        }
    }

    /// A line for the log and the console.
    pub fn say(&mut self, line: &str) {
        self.log(line);
        self.print(&format!("hearth: {}\r\n", bounded(line)));
    }

    /// The same with the time since the kernel started in front of it, kept in the record of the start.
    pub fn stamp(&mut self, line: &str) {
        self.stamp_at(Mark::now(), line);
    }

    /// The same, of something that happened before.
    pub fn stamp_at(&mut self, mark: Mark, line: &str) {
        self.timeline.add(mark, line);
        self.say(&format!("+{:.3}s {line}", mark.at.as_secs_f64()));
    }

    /// Something for the record of the start and the log alone.
    pub fn note(&mut self, line: &str) {
        let mark = Mark::now();
        self.timeline.add(mark, line);
        self.log(&format!("+{:.3}s {line}", mark.at.as_secs_f64()));
    }

    /// Serve came by a stage: on the console while serve does not answer there, in the log otherwise.
    pub fn stage(&mut self, stage: Stage, mark: Mark, is_serving: bool) {
        self.timeline.add_stage(mark, stage);
        let line = format!("+{:.3}s {}", mark.at.as_secs_f64(), stage.name());
        if is_serving { self.log(&line) } else { self.say(&line) }
    }

    /// The first request would be taken now.
    pub fn ready(&mut self) {
        self.timeline.set_ready(Mark::now());
        self.say("ready");
    }

    /// The record of the start.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Waits until the console has sent everything.
    pub fn drain(&self) {
        if let Some(tty) = &self.tty {
            // A line that is gone has nothing left to send.
            let _ = tcdrain(tty);
        }
    }

    /// A line for the console alone: what it says is in the log, or told again at any time.
    pub fn show(&mut self, line: &str) {
        self.print(&format!("{}\r\n", bounded(line)));
    }

    fn print(&mut self, text: &str) {
        let Some(tty) = &mut self.tty else { return };
        let until = Instant::now() + WRITE_TIMEOUT;
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match tty.write(rest) {
                Ok(n @ 1..) => rest = rest.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now());
                    let mut fds = [PollFd::new(tty.as_fd(), PollFlags::POLLOUT)];
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
                    if left.is_zero() || poll(&mut fds, timeout) == Ok(0) {
                        return;
                    }
                }
                _ => return,
            }
        }
    }
}

/// Time since the kernel started.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// `line` up to [`MAX_LINE_BYTES`], without anything that is not text.
fn bounded(line: &str) -> String {
    let mut text = String::new();
    for char in line.chars().filter(|char| !char.is_control()) {
        if text.len() + char.len_utf8() > MAX_LINE_BYTES {
            break;
        }
        text.push(char);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_few() {
        let parse = |line: &str| Command::parse(line.as_bytes());
        assert_eq!(parse(" /poweroff "), Some(Command::PowerOff));
        assert_eq!((parse("/reboot"), parse("/status")), (Some(Command::Reboot), Some(Command::Status)));
        assert_eq!(
            (parse("  "), parse("hello"), parse("/poweroff now")),
            (None, Some(Command::Unknown), Some(Command::Unknown))
        );
    }

    #[test]
    fn lines_are_bounded_and_hold_no_control_characters() {
        assert_eq!(bounded("a\x1b[2Jb\r\nc"), "a[2Jbc");
        let long = "ä".repeat(1000);
        assert_eq!(bounded(&long).len(), MAX_LINE_BYTES);
        assert!(since_boot() > Duration::ZERO);
    }
}
