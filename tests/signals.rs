//! SIGTERM, to this very process: alone in its test binary, since every daemon in it would hear the signal.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Script, post, read_response, wait_for, with_daemon_at};
use nix::sys::signal::{Signal, raise};

#[test]
fn the_first_signal_drains_and_the_second_stops() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let body = r#"{"prompt":"x"}"#;

    let finite = Script { answer: "whole".to_owned(), pace: Duration::from_millis(30), ..Script::default() };
    with_daemon_at(&socket, &finite, None, true, |daemon| {
        let mut stream = daemon.connect();
        stream.write_all(post("/v1/completions", body).as_bytes()).unwrap();
        wait_for("the job", || finite.taken.load(Ordering::SeqCst) == 1);
        raise(Signal::SIGTERM).unwrap();
        assert_eq!(read_response(&mut stream).json()["choices"][0]["text"], "whole");
    })
    .unwrap();
    assert!(!socket.exists());

    let endless = Script { answer: "x".to_owned(), endless: true, pace: Duration::from_millis(5), ..Script::default() };
    let begun = Instant::now();
    with_daemon_at(&socket, &endless, None, true, |daemon| {
        let mut stream = daemon.connect();
        stream.write_all(post("/v1/completions", body).as_bytes()).unwrap();
        wait_for("the job", || endless.taken.load(Ordering::SeqCst) == 1);
        raise(Signal::SIGINT).unwrap();
        wait_for("the drain", || !socket.exists());
        raise(Signal::SIGTERM).unwrap();
        assert_eq!(read_response(&mut stream).status, 503);
    })
    .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15), "the second signal does not wait for the drain's end");
}
