//! `/metrics` over the socket: what clients did is what is counted, also while an answer runs.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;

use common::{Daemon, Response, Script, post, read_response, with_daemon};

const CHAT: &str = "/v1/chat/completions";
const BODY: &str = r#"{"messages":[{"role":"user","content":"hello"}]}"#;

fn get(daemon: &Daemon<'_>, method: &str) -> Response {
    let mut stream = daemon.connect();
    write!(stream, "{method} /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    read_response(&mut stream)
}

fn samples(daemon: &Daemon<'_>) -> BTreeMap<String, f64> {
    let response = get(daemon, "GET");
    assert_eq!(response.status, 200);
    assert!(response.head.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{}", response.head);
    let lines = response.text().lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

#[test]
fn what_clients_did_is_counted() {
    with_daemon(&Script::default(), None, |daemon| {
        let before = samples(daemon);
        assert_eq!((before["hearth_requests_running"], before["hearth_prompt_tokens_total"]), (0.0, 0.0));
        assert_eq!(daemon.post(CHAT, BODY).status, 200);
        assert_eq!(daemon.post(CHAT, &BODY.replace("}]}", r#"}],"max_tokens":5}"#)).status, 200);
        assert_eq!(daemon.post(CHAT, "{}").status, 400);
        assert_eq!(daemon.post("/nowhere", "{}").status, 404);
        let mut noise = daemon.connect();
        noise.write_all(b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n").unwrap();
        assert_eq!(read_response(&mut noise).status, 501);
        let after = samples(daemon);
        for (name, value) in [
            ("hearth_requests_total{reason=\"stop\"}", 1.0),
            ("hearth_requests_total{reason=\"length\"}", 1.0),
            ("hearth_refusals_total{status=\"400\"}", 1.0),
            ("hearth_refusals_total{status=\"404\"}", 1.0),
            ("hearth_refusals_total{status=\"501\"}", 1.0),
            ("hearth_refusals_total{status=\"429\"}", 0.0),
            // "<user>hello<assistant>" has 22 tokens for the scripted model, and so has its answer.
            ("hearth_prompt_tokens_total", 44.0),
            ("hearth_completion_tokens_total", 27.0),
            ("hearth_requests_running", 0.0),
        ] {
            assert_eq!(after[name], value, "{name}");
        }
        assert!(after["hearth_connections"] >= 1.0, "the one that asks");
        let head = {
            let mut stream = daemon.connect();
            stream.write_all(b"HEAD /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
            let mut reply = String::new();
            std::io::Read::read_to_string(&mut stream, &mut reply).unwrap();
            reply
        };
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        assert_eq!(get(daemon, "DELETE").status, 405);
    })
    .unwrap();
}

#[test]
fn running_and_waiting_requests_are_told_while_they_are() {
    let script = Script { endless: true, answer: "x".into(), ..Script::default() };
    script.frozen.store(true, std::sync::atomic::Ordering::SeqCst);
    with_daemon(&script, None, |daemon| {
        let clients: Vec<UnixStream> = (0..2)
            .map(|_| {
                let mut stream = daemon.connect();
                stream.write_all(post(CHAT, BODY).as_bytes()).unwrap();
                stream
            })
            .collect();
        while daemon.health("active") != 2 {
            std::thread::yield_now();
        }
        let now = samples(daemon);
        assert_eq!((now["hearth_requests_running"], now["hearth_requests_waiting"]), (2.0, 2.0));
        drop(clients);
        script.frozen.store(false, std::sync::atomic::Ordering::SeqCst);
        while daemon.health("active") != 0 {
            std::thread::yield_now();
        }
        assert_eq!(samples(daemon)["hearth_requests_total{reason=\"cancelled\"}"], 2.0);
    })
    .unwrap();
}
