#![allow(clippy::unwrap_used)]

use super::*;
use crate::wire::openai::Style;
use crate::wire::{Finish, GenerateRequest, Prompt, Usage};

const REPLY: Reply = Reply { keep_alive: true, chunked: true, head_only: false };

fn pair(now: Instant) -> (Conn, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Conn::new(ours, None, Ok(Rule::default()), now), theirs)
}

fn received(peer: &mut UnixStream) -> String {
    let mut bytes = vec![0; 1 << 20];
    let mut have = 0;
    while let Ok(n @ 1..) = peer.read(&mut bytes[have..]) {
        have += n;
    }
    String::from_utf8(bytes[..have].to_vec()).unwrap()
}

fn emitter() -> Emitter {
    let mut request = GenerateRequest::new(Prompt::Text("x".to_owned()));
    request.stream = true;
    Emitter::new(1, "m", Style::Completion, REPLY, &request)
}

#[test]
fn only_the_drawn_transitions_are_legal() {
    use State::{Closed, Draining, Queued, Reading, Streaming};
    let all = [Reading, Queued, Streaming, Draining, Closed];
    let legal: Vec<(State, State)> =
        all.iter().flat_map(|&a| all.map(|b| (a, b))).filter(|&(a, b)| b != Closed && a.may_become(b)).collect();
    assert_eq!(
        legal,
        [
            (Reading, Queued),
            (Reading, Draining),
            (Queued, Streaming),
            (Queued, Draining),
            (Streaming, Draining),
            (Draining, Reading)
        ]
    );
    assert!(all.iter().all(|s| s.may_become(Closed)));
}

#[test]
fn a_slow_request_is_timed_from_its_first_byte() {
    let begin = Instant::now();
    let (mut conn, mut peer) = pair(begin);
    assert_eq!(conn.deadline(), Some(begin + IDLE_TIMEOUT));
    for second in 5..20 {
        peer.write_all(b"G").unwrap();
        let now = begin + Duration::from_secs(second);
        conn.read(now);
        assert!(conn.next_request(now).is_none());
    }
    let due = begin + Duration::from_secs(5) + REQUEST_TIMEOUT;
    assert_eq!(conn.deadline(), Some(due), "a byte now and then buys no time");
    conn.expire(due);
    assert!(received(&mut peer).starts_with("HTTP/1.1 408 "));
    // It lingers until the peer has read that, but not for ever.
    assert_eq!(conn.deadline(), Some(due + LINGER_TIMEOUT));
    conn.expire(due + LINGER_TIMEOUT);
    assert_eq!(conn.state(), State::Closed);
}

#[test]
fn an_idle_connection_closes_without_a_word() {
    let begin = Instant::now();
    let (mut conn, mut peer) = pair(begin);
    conn.expire(begin + IDLE_TIMEOUT);
    assert_eq!(conn.state(), State::Closed);
    drop(conn);
    assert_eq!(received(&mut peer), "");
}

#[test]
fn a_reader_that_stops_is_given_up() {
    let begin = Instant::now();
    let (mut conn, _peer) = pair(begin);
    conn.queued(emitter());
    assert_eq!(conn.deadline(), None, "the engine takes the time it needs");
    let text = "x".repeat(1024);
    let mut taken = 0;
    while conn.delta(0, &text, None, begin) {
        taken += text.len();
        assert!(taken < 16 << 20, "the output is not bounded");
    }
    assert_eq!(conn.state(), State::Closed);

    // A whole answer may be as long as it is, but it has to move.
    let (mut conn, _peer) = pair(begin);
    conn.answer(REPLY, 200, &"x".repeat(4 << 20), begin);
    assert_eq!(conn.state(), State::Draining);
    assert_eq!(conn.deadline(), Some(begin + STALL_TIMEOUT));
    conn.expire(begin + STALL_TIMEOUT);
    assert_eq!(conn.state(), State::Closed);
}

#[test]
fn an_answer_goes_through_every_state() {
    let now = Instant::now();
    let (mut conn, mut peer) = pair(now);
    peer.write_all(b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n").unwrap();
    conn.read(now);
    assert_eq!(conn.next_request(now).unwrap().path, "/a");
    conn.queued(emitter());
    assert_eq!(conn.state(), State::Queued);
    assert!(conn.next_request(now).is_none(), "the pipelined one waits");
    assert!(!conn.interest().read, "and so does the kernel");
    assert!(conn.delta(0, "hi", None, now));
    assert_eq!(conn.state(), State::Streaming);
    let outcome = Outcome { finish: Finish::Stop, usage: Usage::default(), logits_hash: None };
    conn.finish(0, Ok(&outcome), now);
    assert_eq!(conn.state(), State::Reading);
    assert_eq!(conn.next_request(now).unwrap().path, "/b");
    conn.answer(Reply { keep_alive: false, ..REPLY }, 200, "{}", now);
    assert_eq!(conn.state(), State::Draining);
    assert!(received(&mut peer).ends_with("{}"));
    drop(peer);
    conn.read(now);
    conn.flush(now);
    assert!(!conn.has_work());
}
