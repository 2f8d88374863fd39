//! The daemon at a pseudo-terminal, as a UART would be wired: a person, a program, noise, and a line that comes and goes.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{PATIENCE, Script, wait_for, with_daemon};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, cfgetospeed, tcgetattr};
use nix::unistd::ttyname;

/// The other end of the line.
struct Terminal {
    master: File,
    /// Kept open, so that the line stands before the daemon has opened it.
    slave: OwnedFd,
    path: PathBuf,
    seen: String,
}

impl Terminal {
    fn open() -> Self {
        let pty = openpty(None, None).unwrap();
        let path = ttyname(&pty.slave).unwrap();
        Self { master: File::from(pty.master), slave: pty.slave, path, seen: String::new() }
    }

    fn type_in(&mut self, bytes: impl AsRef<[u8]>) {
        self.master.write_all(bytes.as_ref()).unwrap();
    }

    /// Reads until `end` has come; what came up to there.
    fn until(&mut self, end: &str) -> String {
        let patience = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(end) {
                let rest = self.seen.split_off(at + end.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            assert!(Instant::now() < patience, "waited in vain for {end:?} behind {:?}", self.seen);
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(100u16)).unwrap();
            if fds[0].any() == Some(true) {
                let mut bytes = [0; 4096];
                match self.master.read(&mut bytes) {
                    Ok(n) => self.seen.push_str(std::str::from_utf8(&bytes[..n]).unwrap()),
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Interrupted, "{e}"),
                }
            }
        }
    }
}

fn script(answer: &str) -> Script {
    Script { answer: answer.to_owned(), ..Script::default() }
}

#[test]
fn a_person_at_the_line() {
    let mut terminal = Terminal::open();
    let path = terminal.path.clone();
    let script = Script::default();
    with_daemon(&script, Some(&path), |_| {
        assert_eq!(terminal.until("> "), "hearth: bytes. /help lists the commands.\r\n> ");
        let line = tcgetattr(&terminal.slave).unwrap();
        assert!(!line.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
        assert_eq!(cfgetospeed(&line), nix::sys::termios::BaudRate::B115200);

        terminal.type_in("hx\x7fi\r");
        assert_eq!(terminal.until("\r\n> "), "hx\x08\x1b[Ki\r\n<USER>HI<ASSISTANT>\r\n> ");
        terminal.type_in("\x1b[A!\r");
        assert!(terminal.until("\r\n> ").starts_with("hi\x1b[K!\r\n<USER>HI<ASSISTANT><USER>HI<"));
        terminal.type_in("/reset\r");
        terminal.until("\r\n> ");
        terminal.type_in("grüße\r");
        terminal.until("<ASSISTANT>\r\n> ");
        assert_eq!(script.prompts.lock().unwrap().last().unwrap(), "<user>grüße<assistant>");
        terminal.type_in("/status\r");
        let status = terminal.until("\r\n> ");
        assert!(status.contains("model     bytes\r\n") && status.contains("requests  0 active"), "{status}");
        terminal.type_in("/poweroff\r");
        assert!(terminal.until("\r\n> ").contains("this is no appliance"), "nobody supervises this daemon");
        terminal.type_in("/what\r");
        assert!(terminal.until("\r\n> ").contains("no such command"));
    })
    .unwrap();
}

#[test]
fn interrupting_an_endless_answer() {
    let mut terminal = Terminal::open();
    let path = terminal.path.clone();
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("la") };
    with_daemon(&script, Some(&path), |_| {
        terminal.until("> ");
        terminal.type_in("sing\r");
        terminal.until("lalalala");
        terminal.type_in("\x03");
        assert!(terminal.until("\r\n> ").ends_with("\r\n^C\r\n> "));
        wait_for("the cancellation", || script.cancelled.load(Ordering::SeqCst) == 1);
        terminal.type_in("/max 3\r");
        terminal.until("\r\n> ");
        terminal.type_in("sing\r");
        assert!(terminal.until("\r\n> ").ends_with("lal\r\n[cut after 3 tokens]\r\n> "));
    })
    .unwrap();
}

#[test]
fn an_interrupt_typed_with_the_question_does_not_wait_for_the_answer() {
    let mut terminal = Terminal::open();
    let path = terminal.path.clone();
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("la") };
    // The engine is busy elsewhere: the line has its prompt back all the same.
    script.frozen.store(true, Ordering::SeqCst);
    with_daemon(&script, Some(&path), |_| {
        terminal.until("> ");
        terminal.type_in("sing\r\x03/max 3\rsing\r");
        assert_eq!(terminal.until("> "), "sing\r\n^C\r\n> ");
        assert_eq!(terminal.until("sing\r\n"), "/max 3\r\nanswer length in tokens: 3\r\n> sing\r\n");
        script.frozen.store(false, Ordering::SeqCst);
        assert_eq!(terminal.until("\r\n> "), "lal\r\n[cut after 3 tokens]\r\n> ");
        assert_eq!(script.cancelled.load(Ordering::SeqCst), 1);
    })
    .unwrap();
}

#[test]
fn a_daemon_that_stops_says_so_on_the_line() {
    let mut terminal = Terminal::open();
    let path = terminal.path.clone();
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("la") };
    with_daemon(&script, Some(&path), |daemon| {
        terminal.until("> ");
        terminal.type_in("sing\r");
        terminal.until("lala");
        script.stuck.store(true, Ordering::SeqCst);
        daemon.ask_to_stop();
        daemon.ask_to_stop();
        assert!(
            terminal.until("answer's end\r\n").ends_with("\r\nerror: the daemon stopped before the answer's end\r\n")
        );
        script.stuck.store(false, Ordering::SeqCst);
    })
    .unwrap();
}

#[test]
fn a_program_at_the_line() {
    let mut terminal = Terminal::open();
    let path = terminal.path.clone();
    with_daemon(&script("ok"), Some(&path), |_| {
        terminal.until("> ");
        // Two requests in one burst, then noise, then one more.
        terminal.type_in("{\"prompt\":\"x\",\"logits_hash\":true}\n{\"prompt\":\"y\",\"stream\":false}\n");
        assert_eq!(
            terminal.until("}\n{\"done\":true,\"text\""),
            "\r\n{\"delta\":\"o\"}\n{\"delta\":\"k\"}\n{\"done\":true,\"finish_reason\":\"stop\",\"usage\":{\"prompt_tokens\":1,\
             \"completion_tokens\":2,\"total_tokens\":3,\"prompt_tokens_details\":{\"cached_tokens\":0}},\"logits_hash\":\"000000000000abc2\"}\n{\"done\":true,\"text\""
        );
        terminal.until("}\n");
        terminal.type_in(b"\xff\x00\xfe noise \x1b\x1b\n{\"prompt\":\"z\"}\n");
        let answer = terminal.until("{\"done\":true");
        assert_eq!(answer.matches("\"error\"").count(), 1, "{answer}");
        assert!(answer.ends_with("{\"delta\":\"o\"}\n{\"delta\":\"k\"}\n{\"done\":true"), "{answer}");
    })
    .unwrap();
}

#[test]
fn a_line_that_nobody_reads_costs_its_answer_alone() {
    let mut terminal = Terminal::open();
    let path = terminal.path.clone();
    let script = Script { endless: true, ..script("\x01") };
    with_daemon(&script, Some(&path), |daemon| {
        terminal.until("> ");
        terminal.type_in("{\"prompt\":\"talk\"}\n");
        wait_for("the answer's end", || script.cancelled.load(Ordering::SeqCst) == 1);
        let body = r#"{"prompt":"x","max_tokens":5}"#;
        assert_eq!(daemon.post("/v1/completions", body).json()["usage"]["completion_tokens"], 5);
        assert!(terminal.until("\"unavailable\"}}\n").contains("the answer was cut"));
        terminal.type_in("/status\r");
        terminal.until("0 active");
    })
    .unwrap();
}

#[test]
fn a_line_that_vanishes_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("ttyX");
    let mut first = Terminal::open();
    std::os::unix::fs::symlink(&first.path, &device).unwrap();
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("la") };
    with_daemon(&script, Some(&device), |daemon| {
        first.until("> ");
        first.type_in("sing\r");
        first.until("lala");
        drop(first);
        wait_for("the cancellation", || script.cancelled.load(Ordering::SeqCst) == 1);
        assert_eq!(daemon.health("status"), "ok");
        let mut second = Terminal::open();
        std::fs::remove_file(&device).unwrap();
        std::os::unix::fs::symlink(&second.path, &device).unwrap();
        second.until("/help lists the commands.\r\n> ");
    })
    .unwrap();
}

#[test]
fn what_is_no_serial_line_is_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let refused = with_daemon(&script("a"), Some(&file), |_| panic!("it must not start")).unwrap_err();
    assert!(refused.to_string().contains("is not a serial line"), "{refused}");
    // One that is absent may come later.
    let absent = dir.path().join("absent");
    with_daemon(&script("a"), Some(&absent), |daemon| assert_eq!(daemon.health("status"), "ok")).unwrap();
}
