//! `hearth serve` as a child of PID 1: how it is started, and what connects the two – a line of messages of fixed size that is its
//! standard input, and a pipe for its log. Next on the data's way: [`super::supervise`], which listens to both and ends it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::sys::heartbeat::Line;

/// Pieces of serve's log, of [`LOG_PIECE_BYTES`] each, taken in one round.
pub const LOG_READS_PER_ROUND: usize = 16;
/// Bytes of its log that are read at a time.
pub const LOG_PIECE_BYTES: usize = 4096;
/// Longest line of serve's log, in bytes; a longer one is cut in two.
pub const MAX_LOG_LINE_BYTES: usize = 4096;

/// `hearth serve` and what connects it with us. Not reaped yet, so its number is its own.
pub(super) struct Child {
    pid: Pid,
    /// Its heartbeat, and what either asks of the other.
    pub line: Line,
    log: File,
    /// A line of its log that has not ended yet.
    unfinished: Vec<u8>,
}

impl Child {
    /// Starts `program serve` with a model and the arguments behind it, as user and group `user` where one is given.
    ///
    /// # Errors
    /// The kernel has no room for a pipe or a process, or the program is not there.
    pub fn spawn(program: &Path, user: Option<u32>, model: &Path, arguments: &[OsString]) -> io::Result<Self> {
        let (line, childs_end) = Line::pair()?;
        let (log, childs_log) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&log, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut command = Command::new(program);
        if let Some(id) = user {
            // Supplementary groups and all capabilities go with it.
            command.uid(id).gid(id);
        }
        let child = command
            .args(["serve", "--supervised", "--model"])
            .arg(model)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::from(childs_end))
            .stdout(Stdio::null())
            .stderr(Stdio::from(childs_log))
            .spawn()?;
        // Children are reaped all together, by number.
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        Ok(Self { pid, line, log: File::from(log), unfinished: Vec::new() })
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The end of the pipe that its log comes out of, to be waited for.
    pub fn log(&self) -> &File {
        &self.log
    }

    /// Lines of its log that are complete, without their ends, as far as one round takes them.
    pub fn log_lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut bytes = [0; LOG_PIECE_BYTES];
        for _ in 0..LOG_READS_PER_ROUND {
            let Ok(n @ 1..) = self.log.read(&mut bytes) else { break };
            self.unfinished.extend_from_slice(bytes.get(..n).unwrap_or_default());
            loop {
                let end = self.unfinished.iter().position(|&byte| byte == b'\n');
                let is_long = self.unfinished.len() >= MAX_LOG_LINE_BYTES;
                let Some(end) = end.or(is_long.then_some(MAX_LOG_LINE_BYTES - 1)) else { break };
                let line: Vec<u8> = self.unfinished.drain(..=end).collect();
                lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        }
        lines
    }

    /// Sends a signal. One that comes too late is lost: it ended already.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid, signal);
    }
}

/// How a process ended, in words.
pub(super) fn how_it_ended(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit code {code}"),
        WaitStatus::Signaled(_, signal, _) => signal.to_string(),
        other => format!("{other:?}"),
    }
}
