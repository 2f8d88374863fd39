#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const PLAIN: &[u8] = b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello";
const CHUNKED: &[u8] =
    b"POST /p HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3;ext=\"x\"\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n";

fn all(parts: &[&[u8]]) -> Result<Vec<Request>, Reject> {
    let mut parser = Parser::default();
    let mut requests = Vec::new();
    for part in parts {
        parser.push(part);
        while let Some(request) = parser.next_request()? {
            requests.push(request);
        }
    }
    Ok(requests)
}

fn status_of(bytes: &[u8]) -> u16 {
    all(&[bytes]).expect_err("accepted").status
}

fn with_header(header: &str) -> Vec<u8> {
    format!("POST / HTTP/1.1\r\n{header}\r\n\r\n").into_bytes()
}

#[test]
fn a_request_is_read_whole() {
    let request = all(&[PLAIN]).unwrap().remove(0);
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/v1/chat/completions"));
    assert_eq!(request.body, b"hello");
    assert_eq!(request.reply, Reply { keep_alive: true, chunked: true, head_only: false });
    assert_eq!(all(&[CHUNKED]).unwrap()[0].body, b"hello");
}

#[test]
fn a_split_at_every_byte_changes_nothing() {
    for bytes in [PLAIN, CHUNKED] {
        let whole = all(&[bytes]).unwrap();
        assert_eq!(whole.len(), 1);
        for at in 0..=bytes.len() {
            assert_eq!(all(&[&bytes[..at], &bytes[at..]]).unwrap(), whole, "split at {at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(all(&single).unwrap(), whole);
    }
}

#[test]
fn requests_behind_each_other_come_in_order() {
    let mut bytes = PLAIN.to_vec();
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(CHUNKED);
    bytes.extend_from_slice(b"GET http://localhost/health HTTP/1.0\r\n\r\n");
    let requests = all(&[&bytes]).unwrap();
    let paths: Vec<&str> = requests.iter().map(|r| r.path.as_str()).collect();
    assert_eq!(paths, ["/v1/chat/completions", "/p", "/health"]);
    assert_eq!(requests[2].reply, Reply { keep_alive: false, chunked: false, head_only: false });
}

#[test]
fn an_end_that_two_readers_could_see_differently_is_refused() {
    let smuggled = [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5\r\ncontent-length: 6",
        "Content-Length: 5, 5",
        "Content-Length: +5",
        "Content-Length: -1",
        "Content-Length: 0x5",
        "Content-Length: 5 5",
        "Content-Length:",
        "Content-Length : 5",
        "Content-Length: 5\r\n folded: 6",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
    ];
    for header in smuggled {
        assert_eq!(status_of(&with_header(header)), 400, "{header}");
    }
    for header in ["Transfer-Encoding: gzip", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: xchunked"] {
        assert_eq!(status_of(&with_header(header)), 501, "{header}");
    }
    assert_eq!(status_of(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"), 400);
    for chunks in
        ["x\r\n", "\r\n", "-1\r\n", "+1\r\na\r\n", "2\nab\r\n", "1\r\nabc\r\n", "fffffffff\r\n", " 1\r\n", "1\rx"]
    {
        let bytes =
            [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", chunks.as_bytes(), b"0\r\n\r\n"].concat();
        assert_eq!(status_of(&bytes), 400, "{chunks:?}");
    }
}

#[test]
fn every_limit_has_its_status() {
    let long = format!("X: {}", "a".repeat(MAX_HEAD_BYTES));
    assert_eq!(status_of(&with_header(&long)), 431);
    let endless = vec![b'G'; MAX_HEAD_BYTES + 1];
    assert_eq!(status_of(&endless), 431);
    let many = vec!["X: y"; MAX_HEADERS + 1].join("\r\n");
    assert_eq!(status_of(&with_header(&many)), 431);
    assert_eq!(status_of(&with_header(&format!("Content-Length: {}", MAX_BODY_BYTES + 1))), 413);
    assert_eq!(status_of(&with_header("Content-Length: 99999999999999999999999")), 413);
    let chunk = format!("Transfer-Encoding: chunked\r\n\r\n{:x}", MAX_BODY_BYTES + 1);
    assert_eq!(status_of(&with_header(&chunk)), 413);
    let slow = "Transfer-Encoding: chunked\r\n\r\n1;".to_owned() + &"x".repeat(MAX_CHUNK_LINE_BYTES);
    assert_eq!(status_of(&with_header(&slow)), 400);
    let trailers = "Transfer-Encoding: chunked\r\n\r\n0\r\n".to_owned() + &"A: b\r\n".repeat(MAX_CHUNK_LINE_BYTES);
    assert_eq!(status_of(&with_header(&trailers)), 400);
    assert_eq!(status_of(&with_header("Expect: coffee")), 417);
    assert_eq!(status_of(&with_header("Content-Encoding: gzip")), 415);
    assert_eq!(status_of(b"not http at all\r\n\r\n"), 400);
    assert_eq!(status_of(b"\x16\x03\x01\x02\x00\x01\n"), 400);

    let fits = format!("Content-Length: {MAX_BODY_BYTES}\r\n\r\n{}", "b".repeat(MAX_BODY_BYTES - 4));
    assert_eq!(all(&[&with_header(&fits)]).unwrap()[0].body.len(), MAX_BODY_BYTES);
}

#[test]
fn nothing_is_read_behind_a_refusal() {
    let mut parser = Parser::default();
    parser.push(b"bad\r\n\r\n");
    assert!(parser.next_request().is_err());
    parser.push(PLAIN);
    assert_eq!(parser.next_request(), Ok(None));
}

#[test]
fn a_peer_that_waits_is_told_once_to_continue() {
    let mut parser = Parser::default();
    parser.push(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(parser.next_request(), Ok(None));
    assert!(parser.take_continue());
    assert!(!parser.take_continue());
    parser.push(b"ab");
    assert_eq!(parser.next_request().unwrap().unwrap().body, b"ab");
    // The body came along: nobody waits.
    parser.push(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\na");
    assert_eq!(parser.next_request(), Ok(None));
    assert!(!parser.take_continue());
}

#[test]
fn connection_tokens_decide_whether_it_stays_open() {
    let open = |bytes: &[u8]| all(&[bytes]).unwrap()[0].reply.keep_alive;
    assert!(open(b"GET / HTTP/1.1\r\n\r\n"));
    assert!(!open(b"GET / HTTP/1.1\r\nConnection: TE, Close\r\n\r\n"));
    assert!(!open(b"GET / HTTP/1.0\r\n\r\n"));
    assert!(open(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"));
}

#[test]
fn responses_are_these_bytes() {
    let reply = Reply { keep_alive: true, chunked: true, head_only: false };
    let mut out = Vec::new();
    write_json(&mut out, reply, 200, "{}");
    assert_eq!(
        out,
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
    );
    out.clear();
    write_json(&mut out, Reply { head_only: true, ..reply }, 200, "{}");
    assert!(out.ends_with(b"Content-Length: 2\r\n\r\n"));
    out.clear();
    write_reject(&mut out, Reply::LAST, &Reject::busy());
    let text = String::from_utf8(out.clone()).unwrap();
    assert!(text.starts_with("HTTP/1.1 429 Too Many Requests\r\n"), "{text}");
    assert!(text.contains("Connection: close\r\n") && text.contains("Retry-After: 1\r\n"), "{text}");
    out.clear();
    begin_events(&mut out, reply);
    write_event(&mut out, reply, "[DONE]");
    end_events(&mut out, reply);
    assert_eq!(
        out,
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: keep-alive\r\nCache-Control: no-cache\r\n\
          Transfer-Encoding: chunked\r\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    );
}

proptest! {
    /// Any bytes in any split: no panic, the same result as in one piece, and a bounded buffer.
    #[test]
    fn any_bytes_in_any_split(
        seed in prop::collection::vec(prop_oneof![
            Just(PLAIN.to_vec()), Just(CHUNKED.to_vec()), Just(b"\r\n".to_vec()),
            Just(b"Transfer-Encoding: chunked\r\n".to_vec()), Just(b"Content-Length: 3\r\n\r\n".to_vec()),
            prop::collection::vec(any::<u8>(), 0..40),
        ], 0..6),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut bytes = seed.concat();
        if !bytes.is_empty() {
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let parts: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
        let (whole, split) = (all(&[&bytes]), all(&parts));
        prop_assert_eq!(whole.is_ok(), split.is_ok());
        if let (Ok(whole), Ok(split)) = (whole, split) {
            prop_assert_eq!(whole, split);
        }
    }
}
