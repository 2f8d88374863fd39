#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::path::Path;

use super::*;
use crate::engine::queue::{EngineEnd, Rings};
use crate::serve::Defaults;
use crate::serve::access::{Denied, PeerIds, SocketSetup};
use crate::serve::text::TextModel;
use crate::text::TokenId;
use crate::text::constrain::Grammars;
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

    fn grammars(&self) -> Result<Grammars, String> {
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
        sockets: vec![SocketSetup::at(&path)],
        tty: None,
        text: &NoText,
        model_id: "m",
        context_tokens: 8,
        sequences: 1,
        n_embd: 4,
        grammars: 0,
        defaults: Defaults::default(),
        signals: false,
        stop: None,
        supervisor: None,
        records: None,
        check: None,
        confine: Box::new(|| Ok(())),
        apps: None,
        facts: Default::default(),
        plan: serde_json::Value::Null,
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
            server.accept(0, now);
            assert_eq!(server.conns.len(), round * ACCEPTS_PER_ROUND);
        }
        while server.conns.len() < 60 {
            server.accept(0, now);
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
            server.accept(0, begin + Duration::from_secs(second));
        }
        // The first one has begun a request, the second one's waits in the kernel: neither is idle.
        peers[0].write_all(b"G").unwrap();
        server.conns.get_mut(&FIRST_CONNECTION).unwrap().read(begin);
        peers[1].write_all(b"G").unwrap();
        let _extra = UnixStream::connect(path).unwrap();
        server.accept(0, begin + Duration::from_secs(1000));
        assert_eq!(server.conns.len(), MAX_CONNECTIONS);
        assert_eq!(peers[2].read(&mut [0]).unwrap(), 0, "the third one is closed");
        let gone: Vec<u64> = (0..3).filter(|at| !server.conns.contains_key(&(FIRST_CONNECTION + at))).collect();
        assert_eq!(gone, [2]);
    });
}

#[test]
fn who_may_not_ask_hears_why_whatever_they_ask_and_their_connection_is_the_first_to_go() {
    with_server(|server, _end, path| {
        let now = Instant::now();
        let stranger = PeerIds { uid: 1000, gid: 1000 };
        for (denied, status) in [(Denied::NoRule(stranger), "403 Forbidden"), (Denied::Unknown, "401 Unauthorized")] {
            for call in ["GET /health", "POST /v1/chat/completions", "POST /poweroff", "GET /metrics"] {
                let mut peer = UnixStream::connect(path).unwrap();
                let key = server.next_conn;
                server.accept(0, now);
                server.conns.get_mut(&key).unwrap().deny(denied);
                assert!(server.conns[&key].spare_since().is_some());
                write!(peer, "{call} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}").unwrap();
                server.conns.get_mut(&key).unwrap().read(now);
                server.sweep(now);
                let mut reply = [0; 1024];
                let count = peer.read(&mut reply).unwrap();
                let reply = String::from_utf8_lossy(&reply[..count]).into_owned();
                assert!(reply.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{call}: {reply}");
                assert!(reply.contains("Connection: close") && reply.contains(r#""error":{"message":""#), "{reply}");
                assert_eq!(reply.contains("WWW-Authenticate: "), denied == Denied::Unknown);
                assert_eq!(peer.read(&mut [0]).unwrap(), 0);
            }
        }
    });
}

#[test]
fn a_daemon_that_nobody_supervises_switches_nothing_off() {
    with_server(|server, _end, path| {
        let mut peer = UnixStream::connect(path).unwrap();
        server.accept(0, Instant::now());
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
