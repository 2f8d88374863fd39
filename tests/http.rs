//! The daemon over HTTP on a real socket, with a scripted engine behind the real rings.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Script, post, read_response, wait_for, with_daemon, with_daemon_at};

const CHAT: &str = "/v1/chat/completions";

fn script(answer: &str) -> Script {
    Script {
        answer: answer.to_owned(),
        ..Script::default()
    }
}

fn ask(stream: bool) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"stream":{stream}}}"#)
}

#[test]
fn a_chat_completion_streams_and_ends() {
    with_daemon(&script("hé!"), None, |daemon| {
        let response = daemon.post(CHAT, &ask(true));
        assert_eq!(response.status, 200);
        assert!(response.head.contains("Content-Type: text/event-stream\r\n"), "{}", response.head);
        let chunk = |delta: &str, finish: &str| {
            format!(
                r#"{{"id":"chatcmpl-1","object":"chat.completion.chunk","created":0,"model":"bytes","choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]}}"#
            )
        };
        let expected = [
            chunk(r#"{"role":"assistant","content":""}"#, "null"),
            chunk(r#"{"content":"h"}"#, "null"),
            chunk(r#"{"content":"é"}"#, "null"),
            chunk(r#"{"content":"!"}"#, "null"),
            chunk("{}", r#""stop""#),
            "[DONE]".to_owned(),
        ];
        assert_eq!(response.events(), expected);
        daemon.ask_to_stop();
    })
    .unwrap();
}
