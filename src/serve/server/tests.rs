#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::path::Path;

use super::*;
use crate::engine::queue::{EngineEnd, Rings};
use crate::serve::Defaults;
use crate::serve::text::TextModel;
use crate::text::TokenId;
use crate::wire::Message;

/// Requests here never get as far as text.
struct NoText;

impl TextModel for NoText {
    fn encode_chat(&self, _: &[Message], _: Option<&str>) -> Result<Vec<TokenId>, String> {
        Err("no text".to_owned())
    }

    fn encode(&self, _: &str) -> Result<Vec<TokenId>, String> {
        Err("no text".to_owned())
    }

    fn tokenize(&self, _: &str, _: bool, _: bool) -> Result<Vec<TokenId>, String> {
        Err("no text".to_owned())
    }

    fn decode(&self, _: &[TokenId]) -> Vec<u8> {
        Vec::new()
    }

    fn token_bytes(&self, _: TokenId) -> &[u8] {
        &[]
    }

    fn vocabulary_len(&self) -> usize {
        0
    }

    fn answer(&self, _: &[String]) -> Result<Box<dyn AnswerText + '_>, String> {
        Err("no text".to_owned())
    }
}

/// A server whose rounds the test makes itself.
fn with_server(test: impl FnOnce(&mut Server<'_, '_, '_>, EngineEnd<'_>, &Path)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let mut rings = Rings::new();
    let (end, unbound) = rings.split().unwrap();
    let mut link = unbound.bind(std::thread::current());
    let setup = ServeSetup {
        socket: &path,
        tty: None,
        text: &NoText,
        model_id: "m",
        context_tokens: 8,
        sequences: 1,
        defaults: Defaults::default(),
        signals: false,
        stop: None,
        supervisor: None,
        records: None,
        plan: Value::Null,
        ready: Box::new(|| ()),
    };
    test(&mut Server::open(setup, &mut link).unwrap(), end, &path);
}

#[test]
fn a_flood_of_connections_is_taken_a_few_in_a_round() {
    with_server(|server, _end, path| {
        let _flood: Vec<UnixStream> = (0..60).map(|_| UnixStream::connect(path).unwrap()).collect();
        let now = Instant::now();
        for round in 1..5 {
            server.accept(now);
            assert_eq!(server.conns.len(), round * ACCEPTS_PER_ROUND);
        }
        while server.conns.len() < 60 {
            server.accept(now);
        }
    });
}

#[test]
fn the_connection_idle_longest_makes_room() {
    with_server(|server, _end, path| {
        let begin = Instant::now();
        let mut peers: Vec<UnixStream> = Vec::new();
        for second in 0..MAX_CONNECTIONS as u64 {
            peers.push(UnixStream::connect(path).unwrap());
            server.accept(begin + Duration::from_secs(second));
        }
        // The first one has begun a request, the second one's waits in the kernel: neither is idle.
        peers[0].write_all(b"G").unwrap();
        server.conns.get_mut(&FIRST_CONNECTION).unwrap().read(begin);
        peers[1].write_all(b"G").unwrap();
        let _extra = UnixStream::connect(path).unwrap();
        server.accept(begin + Duration::from_secs(1000));
        assert_eq!(server.conns.len(), MAX_CONNECTIONS);
        assert_eq!(peers[2].read(&mut [0]).unwrap(), 0, "the third one is closed");
        let gone: Vec<u64> = (0..3).filter(|at| !server.conns.contains_key(&(FIRST_CONNECTION + at))).collect();
        assert_eq!(gone, [2]);
    });
}

#[test]
fn only_root_and_the_daemons_own_user_may_switch_the_board_off() {
    let (root, own, other) = (Uid::from_raw(0), Uid::from_raw(100), Uid::from_raw(1000));
    assert!(may_switch(Some(root), own) && may_switch(Some(own), own));
    assert!(!may_switch(Some(other), own) && !may_switch(None, own));
    assert!(!may_switch(Some(own), root), "a user that serve gave up to be");
}

#[test]
fn a_daemon_that_nobody_supervises_switches_nothing_off() {
    with_server(|server, _end, path| {
        let mut peer = UnixStream::connect(path).unwrap();
        server.accept(Instant::now());
        for (method, call, status) in [("POST", "poweroff", 409), ("POST", "reboot", 409), ("GET", "reboot", 405)] {
            write!(peer, "{method} /{call} HTTP/1.1\r\nContent-Length: 0\r\n\r\n").unwrap();
            server.conns.get_mut(&FIRST_CONNECTION).unwrap().read(Instant::now());
            server.sweep(Instant::now());
            let mut reply = [0; 1024];
            let count = peer.read(&mut reply).unwrap();
            let reply = String::from_utf8_lossy(&reply[..count]).into_owned();
            assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{reply}");
        }
    });
}
