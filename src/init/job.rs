//! The self-test as PID 1 runs it: `hearth selftest` as a process of its own, as the user that serve is, its report passed on line by line
//! and kept. It never keeps PID 1 waiting and is killed where it takes too long. Next: `tools::selftest`, in that process.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::console::Console;
use crate::sys::report::{Kind, MAX_BYTES, Reports};

/// A self-test may take this long: the scalar kernels compute a model of several GB on a small board in minutes.
pub const LIMIT: Duration = Duration::from_secs(15 * 60);
/// Longest line that is passed on, in bytes; a longer one is cut in two.
const MAX_LINE_BYTES: usize = 600;
/// Pieces of its output, of 4 KiB each, taken in one round.
const READS_PER_ROUND: usize = 4;

/// What is run.
#[derive(Clone, Debug)]
pub struct Selftest {
    /// The program: this one.
    pub program: PathBuf,
    /// Arguments behind `selftest --appliance`, but for the model.
    pub arguments: Vec<OsString>,
    /// User and group to run it as; `None`: as this process.
    pub user: Option<u32>,
    /// Where its report is kept.
    pub reports: Reports,
}

/// A self-test that runs.
#[derive(Debug)]
pub struct Job {
    pid: Pid,
    out: File,
    unfinished: Vec<u8>,
    lines: Vec<String>,
    until: Instant,
    /// Somebody at the console reads along.
    pub shown: bool,
}

impl Job {
    /// Starts one, of `model` where there is one.
    ///
    /// # Errors
    /// The kernel refuses a process or a pipe.
    pub fn start(test: &Selftest, model: Option<&Path>, shown: bool, now: Instant) -> io::Result<Self> {
        let (out, childs_out) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&out, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut command = Command::new(&test.program);
        if let Some(id) = test.user {
            command.uid(id).gid(id);
        }
        command.args(["selftest", "--appliance"]).args(&test.arguments);
        if let Some(model) = model {
            command.arg("--model").arg(model);
        }
        let errors = childs_out.try_clone()?;
        let child = command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::from(childs_out))
            .stderr(Stdio::from(errors))
            .spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let (unfinished, lines) = (Vec::new(), Vec::new());
        Ok(Self { pid, out: File::from(out), unfinished, lines, until: now + LIMIT, shown })
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Passes on what came, and ends what takes too long.
    pub fn round(&mut self, console: &mut Console, now: Instant) {
        let mut bytes = [0; 4096];
        for _ in 0..READS_PER_ROUND {
            let Ok(count @ 1..) = self.out.read(&mut bytes) else { break };
            self.unfinished.extend_from_slice(bytes.get(..count).unwrap_or_default());
            while let Some(end) = self.line_end() {
                let line: Vec<u8> = self.unfinished.drain(..=end).collect();
                self.line(&line, console);
            }
        }
        if now >= self.until {
            // It is not reaped yet, so the number is still its own.
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }

    fn line_end(&self) -> Option<usize> {
        let end = self.unfinished.iter().position(|&byte| byte == b'\n');
        end.or((self.unfinished.len() >= MAX_LINE_BYTES).then_some(MAX_LINE_BYTES - 1))
    }

    fn line(&mut self, line: &[u8], console: &mut Console) {
        let line = String::from_utf8_lossy(line).trim_end().to_owned();
        if self.shown {
            console.show(&line);
        }
        // A report has some twenty lines.
        if self.lines.iter().map(String::len).sum::<usize>() < MAX_BYTES {
            self.lines.push(line);
        }
    }

    /// It ended, as `how` says: the report is kept.
    pub fn ended(mut self, how: &str, reports: &Reports, console: &mut Console, now: Instant) {
        self.round(console, now);
        let rest = std::mem::take(&mut self.unfinished);
        if !rest.is_empty() {
            self.line(&rest, console);
        }
        if now >= self.until {
            self.line(format!("the self-test took more than {} s and was ended", LIMIT.as_secs()).as_bytes(), console);
        } else if how != "exit code 0" && how != "exit code 1" {
            self.line(format!("the self-test ended: {how}").as_bytes(), console);
        }
        if let Err(error) = reports.write(Kind::Selftest, &self.lines) {
            console.log(&format!("{}: {error}", reports.folder().display()));
        }
    }
}

impl AsFd for Job {
    /// Where its report comes from.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.out.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use nix::sys::wait::waitpid;

    use super::super::child::how_it_ended;
    use super::*;

    /// Runs a shell's words as the self-test; what its report is then.
    fn report_of(words: &str, until: Duration) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("hearth");
        std::fs::write(&program, format!("#!/bin/sh\n{words}\n")).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let reports = Reports::at(folder.path().join("reports"));
        let arguments = vec!["--tty".into(), "/dev/tty".into()];
        let test = Selftest { program, arguments, user: None, reports };
        let (mut console, begun) = (Console::default(), Instant::now());
        let model = Some(Path::new("/m.gguf"));
        // Another process of this test may still hold the script open for writing.
        let mut job = loop {
            match Job::start(&test, model, true, begun) {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::sleep(Duration::from_millis(5)),
                job => break job.unwrap(),
            }
        };
        job.until = begun + until;
        let status = loop {
            job.round(&mut console, Instant::now());
            match waitpid(job.pid(), Some(nix::sys::wait::WaitPidFlag::WNOHANG)).unwrap() {
                nix::sys::wait::WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(5)),
                status => break status,
            }
        };
        job.ended(&how_it_ended(status), &test.reports, &mut console, Instant::now());
        test.reports.read(Kind::Selftest).unwrap()
    }

    #[test]
    fn a_report_is_kept_whole_with_what_was_said_beside_it() {
        let arguments = "selftest --appliance --tty /dev/tty --model /m.gguf";
        let lines = report_of("echo $@; echo oops >&2; printf rest; exit 1", Duration::from_secs(60));
        assert_eq!(lines, [arguments, "oops", "rest"]);
        let lines = report_of("echo a; kill -BUS $$", Duration::from_secs(60));
        assert_eq!(lines, ["a", "the self-test ended: SIGBUS"]);
    }

    #[test]
    fn one_that_takes_too_long_or_says_too_much_is_ended_or_cut() {
        let lines = report_of("echo a; sleep 1000", Duration::from_millis(300));
        assert_eq!(lines.len(), 2);
        assert!(lines[1].starts_with("the self-test took more than"), "{lines:?}");
        let lines = report_of("head -c 100000 /dev/zero | tr '\\\\0' x", Duration::from_secs(60));
        assert!(lines.iter().all(|line| line.len() <= MAX_LINE_BYTES));
        assert!(lines.len() <= MAX_BYTES / MAX_LINE_BYTES + 2, "{}", lines.len());
    }
}
