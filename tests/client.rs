//! The client against the daemon, and against what only looks like one.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Script, wait_for, with_daemon};
use hearth::client::http::{Ended, Question, ask_streaming};
use hearth::client::{AskArgs, ChatArgs, ClientError, ask_to, chat_lines};
use hearth::wire::Message;

fn ask(socket: &Path, args: &AskArgs, text: &str) -> Result<String, ClientError> {
    let mut out = Vec::new();
    ask_to(socket, args, text, false, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn one_question() {
    let script = Script::default();
    with_daemon(&script, None, |daemon| {
        let plain = AskArgs::default();
        assert_eq!(ask(&daemon.socket, &plain, "grün").unwrap(), "<USER>GRÜN<ASSISTANT>\n");
        let args = AskArgs { system: Some("be brief".to_owned()), max_tokens: Some(8), ..AskArgs::default() };
        assert_eq!(ask(&daemon.socket, &args, "x").unwrap(), "<SYSTEM>\n");
        let args = AskArgs { json: true, temperature: Some(0.7), seed: Some(5), ..AskArgs::default() };
        let whole: serde_json::Value = serde_json::from_str(&ask(&daemon.socket, &args, "x").unwrap()).unwrap();
        assert_eq!(whole["choices"][0]["message"]["content"], "<USER>X<ASSISTANT>");
        assert!(matches!(ask(&daemon.socket, &plain, ""), Err(ClientError::NoQuestion)));
        let refused = ask(&daemon.socket, &AskArgs { temperature: Some(9.0), ..plain }, "x").unwrap_err();
        assert_eq!(refused.to_string(), "the daemon refused (400): `temperature` is 9: it must be from 0 to 2");
    })
    .unwrap();
}

#[test]
fn a_conversation_from_a_pipe() {
    let script = Script { answer: "ok".to_owned(), ..Script::default() };
    with_daemon(&script, None, |daemon| {
        let args = ChatArgs { system: Some("s".to_owned()), ..ChatArgs::default() };
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
