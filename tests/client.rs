//! The client against the daemon, and against what only looks like one.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{PATIENCE, Script, wait_for, with_daemon};
use hearth::client::http::{Ended, Question, ask_streaming};
use hearth::client::{AskArgs, ChatArgs, ClientError, DEFAULT_MAX_TOKENS, TalkArgs, ask_to, chat_lines};
use hearth::wire::Message;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn ask(socket: &Path, args: &AskArgs, text: &str) -> Result<String, ClientError> {
    let mut out = Vec::new();
    ask_to(socket, args, text, false, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

fn asking(talk: TalkArgs) -> AskArgs {
    AskArgs { talk, ..AskArgs::default() }
}

#[test]
fn an_answer_without_an_end_is_cut_and_stderr_says_so() {
    let script = Script { answer: "la ".to_owned(), endless: true, ..Script::default() };
    with_daemon(&script, None, |daemon| {
        let hearth = |arguments: &[&str]| {
            let socket = daemon.socket.to_str().unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
            let output = command.args(arguments).args(["--socket", socket]).stdin(Stdio::null()).output().unwrap();
            let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
            assert!(output.status.success(), "{stderr}");
            (stdout, stderr)
        };
        let (answer, said) = hearth(&["ask", "sing"]);
        assert_eq!(answer.trim_end_matches('\n').len(), DEFAULT_MAX_TOKENS);
        assert_eq!(said, "hearth: the answer was cut at --max-tokens 512, or at the context's end\n");
        let (answer, said) = hearth(&["ask", "sing", "--json", "--max-tokens", "4"]);
        assert!(answer.contains("\"la l\"") && said.contains("--max-tokens 4,"), "{answer} {said}");
        assert!(hearth(&["ask", "--help"]).0.contains("[default: 512]"));
    })
    .unwrap();
}

#[test]
fn one_question() {
    let script = Script::default();
    with_daemon(&script, None, |daemon| {
        let plain = AskArgs::default();
        assert_eq!(ask(&daemon.socket, &plain, "grün").unwrap(), "<USER>GRÜN<ASSISTANT>\n");
        let args = asking(TalkArgs { system: Some("be brief".to_owned()), max_tokens: 8, ..TalkArgs::default() });
        assert_eq!(ask(&daemon.socket, &args, "x").unwrap(), "<SYSTEM>\n");
        let talk = TalkArgs { temperature: Some(0.7), seed: Some(5), ..TalkArgs::default() };
        let args = AskArgs { json: true, ..asking(talk) };
        let whole: serde_json::Value = serde_json::from_str(&ask(&daemon.socket, &args, "x").unwrap()).unwrap();
        assert_eq!(whole["choices"][0]["message"]["content"], "<USER>X<ASSISTANT>");
        assert!(matches!(ask(&daemon.socket, &plain, ""), Err(ClientError::NoQuestion)));
        let refused =
            ask(&daemon.socket, &asking(TalkArgs { temperature: Some(9.0), ..TalkArgs::default() }), "x").unwrap_err();
        assert_eq!(refused.to_string(), "the daemon refused (400): `temperature` is 9: it must be from 0 to 2");
    })
    .unwrap();
}

#[test]
fn a_conversation_from_a_pipe() {
    let script = Script { answer: "ok".to_owned(), ..Script::default() };
    with_daemon(&script, None, |daemon| {
        let args = ChatArgs { talk: TalkArgs { system: Some("s".to_owned()), ..TalkArgs::default() } };
        let mut out = Vec::new();
        let lines: &[u8] = b"one\n\ntwo\nraise\n/what\n/reset\nthree\n/quit\nfour\n";
        chat_lines(&daemon.socket, &args, lines, &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(
            out,
            "ok\nok\nerror (400): roles must alternate\nthere are /reset and /quit\nthe conversation is forgotten\nok\n"
        );
        let prompts = script.prompts.lock().unwrap();
        assert_eq!(
            *prompts,
            [
                "<system>s<user>one<assistant>",
                "<system>s<user>one<assistant>ok<user>two<assistant>",
                "<system>s<user>three<assistant>",
            ]
        );
    })
    .unwrap();
}

#[test]
fn cancelling_ends_the_job() {
    let script = Script { answer: "a".to_owned(), endless: true, pace: Duration::from_millis(1), ..Script::default() };
    with_daemon(&script, None, |daemon| {
        let cancel = AtomicBool::new(false);
        let question = Question { messages: vec![Message::user("x")], ..Question::default() };
        let mut seen = 0;
        let ended = ask_streaming(&daemon.socket, &question, &cancel, |text| {
            seen += text.len();
            cancel.store(seen >= 5, Ordering::Relaxed);
            Ok(())
        });
        assert_eq!(ended.unwrap(), Ended::Cancelled);
        wait_for("the cancellation", || script.cancelled.load(Ordering::SeqCst) == 1);
        let question = Question { max_tokens: Some(2), ..question };
        let ended = ask_streaming(&daemon.socket, &question, &AtomicBool::new(false), |_| Ok(()));
        assert_eq!(ended.unwrap(), Ended::Length);
    })
    .unwrap();
}

#[test]
fn no_daemon_is_told_with_the_command_that_starts_one() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let error = ask(&socket, &AskArgs::default(), "x").unwrap_err().to_string();
    assert!(
        error.contains("hearth serve --model FILE --socket") && error.contains(socket.to_str().unwrap()),
        "{error}"
    );
}

#[test]
fn what_is_no_hearth_is_an_error_and_no_hang() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let head = "HTTP/1.1 200 OK\r\n";
    let answers = [
        String::new(),
        "hello\r\n\r\n".to_owned(),
        format!("{head}Content-Length: 99999999999\r\n\r\n"),
        format!("{head}Content-Length: 5\r\n\r\nda"),
        format!("{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
        format!("{head}Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n"),
        format!("{head}Transfer-Encoding: chunked\r\n\r\n4\r\ndata\r\n0\r\n\r\n"),
        format!("{head}\r\ndata: not json\n\n"),
        format!("{head}X: {}", "y".repeat(100_000)),
    ];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for answer in &answers {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        for answer in &answers {
            let error = ask(&socket, &AskArgs::default(), "x");
            assert!(
                matches!(error, Err(ClientError::Protocol { .. } | ClientError::Connection(_))),
                "{answer:?}: {error:?}"
            );
        }
    });
}

/// The real program, asked through a pipe.
fn piped(socket: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let mut hearth = Command::new(env!("CARGO_BIN_EXE_hearth"))
        .args(arguments)
        .args(["--socket", socket.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    hearth.stdin.take().unwrap().write_all(input).unwrap();
    hearth.wait_with_output().unwrap()
}

#[test]
fn what_is_piped_in_follows_the_question() {
    let script = Script { answer: "ok".to_owned(), ..Script::default() };
    with_daemon(&script, None, |daemon| {
        for arguments in [&["ask", "sum up"][..], &["ask", "-"], &["ask"]] {
            assert_eq!(piped(&daemon.socket, arguments, b"a log").stdout, b"ok\n");
        }
        let refused = piped(&daemon.socket, &["ask", "sum up"], b"gr\xfcn");
        assert_eq!(refused.status.code(), Some(1));
        assert_eq!(refused.stderr, b"hearth: standard input is not UTF-8: see its byte 2, counted from 0\n");
        let prompts = script.prompts.lock().unwrap();
        let log = "<user>a log<assistant>";
        assert_eq!(*prompts, ["<user>sum up\n\na log<assistant>", log, log]);
    })
    .unwrap();
}

#[test]
fn a_reader_that_goes_away_ends_the_answer_and_nothing_is_said() {
    let script =
        Script { answer: "la ".to_owned(), endless: true, pace: Duration::from_millis(1), ..Script::default() };
    with_daemon(&script, None, |daemon| {
        let mut hearth = Command::new(env!("CARGO_BIN_EXE_hearth"))
            .args(["ask", "sing", "--socket", daemon.socket.to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        hearth.stdout.take().unwrap().read_exact(&mut [0; 3]).unwrap();
        let ended = hearth.wait_with_output().unwrap();
        assert_eq!((ended.status.code(), ended.stderr), (Some(141), Vec::new()));
        wait_for("the cancellation", || script.cancelled.load(Ordering::SeqCst) == 1);
    })
    .unwrap();
}

#[test]
fn a_schema_is_sent_as_the_response_format() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, schema) = (dir.path().join("s"), dir.path().join("schema.json"));
    std::fs::write(&schema, "{\"type\":\"object\"}").unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::scope(|scope| {
        let request = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                let mut some = [0; 4096];
                let n = stream.read(&mut some).unwrap();
                assert!(n > 0, "the request ends early");
                request.extend_from_slice(&some[..n]);
            }
            let body = "{\"error\":{\"message\":\"no schemas here\"}}";
            write!(stream, "HTTP/1.1 400 X\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
            String::from_utf8(request).unwrap()
        });
        let args = AskArgs { schema: Some(schema.clone()), ..AskArgs::default() };
        let refused = ask(&socket, &args, "x").unwrap_err();
        assert_eq!(refused.to_string(), "the daemon refused (400): no schemas here");
        let request = request.join().unwrap();
        let body: serde_json::Value = serde_json::from_str(request.split_once("\r\n\r\n").unwrap().1).unwrap();
        let schema = serde_json::json!({"name": "answer", "strict": true, "schema": {"type": "object"}});
        assert_eq!(body["response_format"], serde_json::json!({"type": "json_schema", "json_schema": schema}));
    });
    std::fs::write(&schema, "{").unwrap();
    let args = AskArgs { schema: Some(schema), ..AskArgs::default() };
    assert!(matches!(ask(&socket, &args, "x"), Err(ClientError::Schema { .. })));
}

/// The line editor shares the process's signals with the client: this is the real program in a terminal.
#[test]
fn ctrl_c_in_a_terminal_cancels_the_answer_and_not_the_program() {
    let script = Script { answer: "la".to_owned(), endless: true, pace: Duration::from_millis(2), ..Script::default() };
    with_daemon(&script, None, |daemon| {
        let pty = openpty(None, None).unwrap();
        let mut terminal = File::from(pty.master);
        let mut keys = terminal.try_clone().unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut chat = Command::new(env!("CARGO_BIN_EXE_hearth"))
            .args(["chat", "--socket", daemon.socket.to_str().unwrap()])
            .env("TERM", "vt100")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let mut until = |end: &str| {
            let mut seen = Vec::new();
            let mut byte = [0];
            while !seen.ends_with(end.as_bytes()) {
                let mut fds = [PollFd::new(terminal.as_fd(), PollFlags::POLLIN)];
                let patience = PollTimeout::try_from(PATIENCE).unwrap();
                assert_eq!(poll(&mut fds, patience), Ok(1), "no {end:?} behind {:?}", String::from_utf8_lossy(&seen));
                terminal.read_exact(&mut byte).unwrap();
                seen.push(byte[0]);
            }
        };
        let interrupt = || kill(Pid::from_raw(chat.id().try_into().unwrap()), Signal::SIGINT).unwrap();
        for round in 1..3 {
            until("> ");
            keys.write_all(b"sing\r").unwrap();
            until("lalala");
            interrupt();
            until("[cancelled]");
            wait_for("the cancellation", || script.cancelled.load(Ordering::SeqCst) == round);
        }
        until("> ");
        keys.write_all(b"/quit\r").unwrap();
        assert!(chat.wait().unwrap().success());
    })
    .unwrap();
}
