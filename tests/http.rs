//! The daemon over HTTP on a real socket, with a scripted engine behind the real rings.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Script, post, read_response, wait_for, with_daemon, with_daemon_at};
use hearth::serve::ServeError;
use hearth::serve::memory::max_text_bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const CHAT: &str = "/v1/chat/completions";

fn script(answer: &str) -> Script {
    Script { answer: answer.to_owned(), ..Script::default() }
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

#[test]
fn a_request_split_at_every_byte_gets_the_same_answer() {
    with_daemon(&script("yes"), None, |daemon| {
        let request = post("/v1/completions", r#"{"prompt":"a","logits_hash":true}"#);
        let whole = daemon.post("/v1/completions", r#"{"prompt":"a","logits_hash":true}"#).json();
        assert_eq!(whole["choices"][0]["text"], "yes");
        assert_eq!(whole["usage"]["completion_tokens"], 3);
        assert_eq!(whole["hearth"]["logits_hash"], "000000000000abc3");
        let mut stream = daemon.connect();
        for at in 1..request.len() {
            let (head, tail) = request.split_at(at);
            stream.write_all(head.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(1));
            stream.write_all(tail.as_bytes()).unwrap();
            let mut split = read_response(&mut stream).json();
            split["id"] = whole["id"].clone();
            assert_eq!(split, whole, "split at {at}");
        }
    })
    .unwrap();
}

#[test]
fn pipelined_and_chunked_requests_are_answered_in_order() {
    with_daemon(&Script::default(), None, |daemon| {
        let mut stream = daemon.connect();
        let mut bytes = post("/v1/completions", r#"{"prompt":"one"}"#);
        bytes.push_str("GET /v1/models HTTP/1.1\r\n\r\n");
        bytes.push_str("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
        bytes.push_str("a\r\n{\"prompt\":\r\n6\r\n\"two\"}\r\n0\r\n\r\n");
        stream.write_all(bytes.as_bytes()).unwrap();
        // The peer says that it sends no more and still gets everything.
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_response(&mut stream).json()["choices"][0]["text"], "ONE");
        assert_eq!(read_response(&mut stream).json()["data"][0]["id"], "bytes");
        assert_eq!(read_response(&mut stream).json()["choices"][0]["text"], "TWO");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    })
    .unwrap();
}

#[test]
fn refusals_leave_the_daemon_alive() {
    with_daemon(&script("ok"), None, |daemon| {
        let send = |bytes: &[u8]| {
            let mut stream = daemon.connect();
            stream.write_all(bytes).unwrap();
            let response = read_response(&mut stream);
            assert!(response.json()["error"]["message"].is_string(), "{response:?}");
            response
        };
        assert_eq!(send(b"GET /nothing HTTP/1.1\r\n\r\n").status, 404);
        let wrong = send(b"GET /v1/completions HTTP/1.1\r\n\r\n");
        assert!(wrong.status == 405 && wrong.head.contains("Allow: POST\r\n"));
        assert_eq!(send(b"POST /health HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n").status, 413);
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(20_000));
        assert_eq!(send(long.as_bytes()).status, 431);
        assert_eq!(send(b"\x00\x01\x02\r\n\r\n").status, 400);
        let smuggled = b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
        assert_eq!(send(smuggled).status, 400);
        assert_eq!(send(post(CHAT, "{").as_bytes()).json()["error"]["code"], "invalid_json");
        let template = r#"{"messages":[{"role":"user","content":"raise"}]}"#;
        assert_eq!(send(post(CHAT, template).as_bytes()).json()["error"]["param"], "messages");
        assert_eq!(send(post("/v1/completions", r#"{"prompt":[256]}"#).as_bytes()).status, 400);
        let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(common::CONTEXT_TOKENS));
        let error = send(post("/v1/completions", &long).as_bytes()).json()["error"].clone();
        assert_eq!(error["code"], "context_length_exceeded");
        assert!(error["message"].as_str().unwrap().contains("4096"), "{error}");
        assert_eq!(daemon.post(CHAT, &ask(false)).json()["choices"][0]["message"]["content"], "ok");
        assert_eq!(daemon.health("active"), 0);
    })
    .unwrap();
}

#[test]
fn several_answers_come_side_by_side_and_with_log_probabilities() {
    with_daemon(&script("ok"), None, |daemon| {
        let body =
            r#"{"messages":[{"role":"user","content":"hi"}],"n":3,"logprobs":true,"top_logprobs":2,"stream":STREAM}"#;
        let whole = daemon.post(CHAT, &body.replace("STREAM", "false")).json();
        for index in 0..3 {
            let choice = &whole["choices"][index];
            assert_eq!((&choice["index"], &choice["message"]["content"]), (&index.into(), &"ok".into()), "{whole}");
            let tokens = choice["logprobs"]["content"].as_array().unwrap();
            assert_eq!((tokens.len(), tokens[0]["top_logprobs"].as_array().unwrap().len()), (2, 2), "{whole}");
        }
        assert_eq!(whole["usage"]["completion_tokens"], 6);
        let mut texts = vec![String::new(); 3];
        let streamed = daemon.post(CHAT, &body.replace("STREAM", "true"));
        for event in streamed.events().iter().filter(|event| *event != "[DONE]") {
            let event: serde_json::Value = serde_json::from_str(event).unwrap();
            let choice = &event["choices"][0];
            let text = choice["delta"]["content"].as_str().unwrap_or_default();
            texts[choice["index"].as_u64().unwrap() as usize].push_str(text);
        }
        assert_eq!(texts, ["ok"; 3]);
        assert_eq!(daemon.health("active"), 0);
    })
    .unwrap();
}

#[test]
fn several_answers_to_a_client_that_goes_away_are_all_given_up() {
    let slow = Script { answer: "y".repeat(500), pace: Duration::from_millis(20), ..Script::default() };
    with_daemon(&slow, None, |daemon| {
        let mut stream = daemon.connect();
        let body = r#"{"prompt":"a","n":4,"stream":true}"#;
        stream.write_all(post("/v1/completions", body).as_bytes()).unwrap();
        wait_for("four answers", || daemon.health("active") == 4);
        drop(stream);
        wait_for("none", || daemon.health("active") == 0);
    })
    .unwrap();
}

#[test]
fn text_becomes_tokens_and_tokens_text() {
    with_daemon(&Script::default(), None, |daemon| {
        let tokens = |body: &str| daemon.post("/tokenize", body).json()["tokens"].to_string();
        assert_eq!(tokens(r#"{"content":"hi"}"#), "[104,105]");
        assert_eq!(tokens(r#"{"content":"hi","add_special":true}"#), "[0,104,105]");
        assert_eq!(daemon.post("/detokenize", r#"{"tokens":[104,105]}"#).json()["content"], "hi");
        let unknown = daemon.post("/detokenize", r#"{"tokens":[256]}"#);
        assert_eq!((unknown.status, &unknown.json()["error"]["param"]), (400, &"tokens".into()));
        let long = format!(r#"{{"content":"{}"}}"#, "x".repeat(max_text_bytes(common::CONTEXT_TOKENS) + 1));
        assert_eq!(daemon.post("/tokenize", &long).status, 400);
        let biased = daemon.post(CHAT, r#"{"messages":[{"role":"user","content":"hi"}],"logit_bias":{"256":1}}"#);
        assert_eq!((biased.status, &biased.json()["error"]["param"]), (400, &"logit_bias".into()));
        let mut stream = daemon.connect();
        stream.write_all(b"GET /v1/plan HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(read_response(&mut stream).json()["total_bytes"], 7);
    })
    .unwrap();
}

#[test]
fn a_stop_string_ends_the_answer_and_the_job() {
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("one. two. ") };
    with_daemon(&script, None, |daemon| {
        let body = r#"{"prompt":"x","stop":["tw","zzz"],"logits_hash":true}"#;
        let answer = daemon.post("/v1/completions", body).json();
        assert_eq!(answer["choices"][0]["text"], "one. ");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer["usage"]["completion_tokens"], 7);
        assert_eq!(answer["hearth"]["logits_hash"], "000000000000abc7", "of the step that completed the stop string");
        wait_for("the job's cancellation", || script.cancelled.load(Ordering::SeqCst) == 1);
        let cut = daemon.post("/v1/completions", r#"{"prompt":"x","max_tokens":4}"#).json();
        assert_eq!(
            (&cut["choices"][0]["text"], &cut["choices"][0]["finish_reason"]),
            (&"one.".into(), &"length".into())
        );
    })
    .unwrap();
}

#[test]
fn an_answer_that_is_kept_whole_is_bounded_in_bytes() {
    // A token of 100 bytes, of which the context holds more than it may have text.
    let script = Script { endless: true, ..script("\u{1}") };
    with_daemon(&script, None, |daemon| {
        let whole = daemon.post("/v1/completions", r#"{"prompt":"x"}"#).json();
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        let bytes = whole["choices"][0]["text"].as_str().unwrap().len();
        let most = max_text_bytes(common::CONTEXT_TOKENS);
        assert!((most - 100..=most).contains(&bytes), "{bytes} of {most}");
        let long = format!(r#"{{"prompt":"{}"}}"#, "x".repeat(most + 1));
        assert_eq!(daemon.post("/v1/completions", &long).json()["error"]["code"], "context_length_exceeded");
    })
    .unwrap();
}

#[test]
fn a_client_that_goes_away_cancels_its_job() {
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("a") };
    with_daemon(&script, None, |daemon| {
        for streams in [true, false] {
            let before = script.cancelled.load(Ordering::SeqCst);
            let mut stream = daemon.connect();
            stream.write_all(post(CHAT, &ask(streams)).as_bytes()).unwrap();
            wait_for("the job", || script.taken.load(Ordering::SeqCst) > before);
            drop(stream);
            wait_for("its cancellation", || script.cancelled.load(Ordering::SeqCst) > before);
        }
        wait_for("an idle daemon", || daemon.health("active") == 0);
    })
    .unwrap();
}

#[test]
fn a_reader_that_does_not_read_loses_its_answer_alone() {
    let script = Script { endless: true, ..script("a") };
    with_daemon(&script, None, |daemon| {
        let mut slow = daemon.connect();
        slow.write_all(post(CHAT, &ask(true)).as_bytes()).unwrap();
        wait_for("the slow reader's end", || script.cancelled.load(Ordering::SeqCst) == 1);
        assert_eq!(daemon.health("active"), 0);
        let body = r#"{"prompt":"x","max_tokens":3}"#;
        assert_eq!(daemon.post("/v1/completions", body).json()["choices"][0]["text"], "aaa");
    })
    .unwrap();
}

#[test]
fn a_full_ring_is_told_as_429() {
    let script = script("a");
    script.frozen.store(true, Ordering::SeqCst);
    with_daemon(&script, None, |daemon| {
        // One user: the last places are for others.
        let waiting = hearth::engine::scheduler::WAITING_JOBS - hearth::engine::scheduler::RESERVED_PLACES;
        let mut streams: Vec<UnixStream> = (0..waiting).map(|_| daemon.connect()).collect();
        for stream in &mut streams {
            stream.write_all(post(CHAT, &ask(false)).as_bytes()).unwrap();
        }
        wait_for("a full ring", || daemon.health("waiting") == waiting);
        let busy = daemon.post(CHAT, &ask(false));
        assert_eq!((busy.status, busy.head.contains("Retry-After: 1\r\n")), (429, true), "{busy:?}");
        assert_eq!(busy.json()["error"]["code"], "busy");
        script.frozen.store(false, Ordering::SeqCst);
        for stream in &mut streams {
            assert_eq!(read_response(stream).status, 200);
        }
    })
    .unwrap();
}

#[test]
fn idle_connections_make_room_and_busy_ones_do_not() {
    with_daemon(&script("a"), None, |daemon| {
        let mut idle: Vec<UnixStream> = (0..hearth::serve::MAX_CONNECTIONS).map(|_| daemon.connect()).collect();
        assert_eq!(daemon.health("status"), "ok", "one more than there are places");
        assert_eq!(idle[0].read(&mut [0]).unwrap(), 0, "the oldest one gave its place");
        idle.clear();

        // Every place has a request that has begun: these stay, and one more is turned away.
        let begun = || {
            let mut stream = daemon.connect();
            stream.write_all(b"G").unwrap();
            stream
        };
        let mut busy: Vec<UnixStream> = (0..hearth::serve::MAX_CONNECTIONS).map(|_| begun()).collect();
        assert_eq!(read_response(&mut daemon.connect()).status, 503);
        for stream in &mut busy {
            stream.write_all(b"ET /health HTTP/1.1\r\n\r\n").unwrap();
            assert_eq!(read_response(stream).status, 200);
        }
    })
    .unwrap();
}

#[test]
fn a_damaged_model_is_an_error_and_not_an_answer() {
    let script = Script { broken: true, ..script("abc") };
    with_daemon(&script, None, |daemon| {
        let whole = daemon.post(CHAT, &ask(false));
        assert_eq!((whole.status, &whole.json()["error"]["type"]), (500, &"server_error".into()));
        let events = daemon.post(CHAT, &ask(true)).events();
        assert!(events[events.len() - 2].starts_with(r#"{"error":{"#), "{events:?}");
    })
    .unwrap();
}

#[test]
fn the_date_comes_from_the_request() {
    with_daemon(&Script::default(), None, |daemon| {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"date":"1 May"}"#;
        let answer = daemon.post(CHAT, body).json();
        assert_eq!(answer["choices"][0]["message"]["content"], "[1 MAY]<USER>X<ASSISTANT>");
    })
    .unwrap();
}

#[test]
fn the_socket_file_has_its_mode_and_goes_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("hearth.sock");
    // A stale socket: its listener is gone, its file is not.
    drop(UnixListener::bind(&socket).unwrap());
    with_daemon_at(&socket, &script("a"), None, false, |daemon| {
        let meta = std::fs::symlink_metadata(&daemon.socket).unwrap();
        assert!(meta.file_type().is_socket());
        assert_eq!(meta.permissions().mode() & 0o777, 0o660);
        assert_eq!(daemon.health("status"), "ok");

        let second = with_daemon_at(&socket, &script("b"), None, false, |_| panic!("it must not start"));
        let message = second.unwrap_err().to_string();
        assert!(message.contains("another process serves on"), "{message}");
        assert_eq!(daemon.health("status"), "ok", "the first one is untouched");
    })
    .unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing stays behind");

    std::fs::write(&socket, "precious").unwrap();
    let refused = with_daemon_at(&socket, &script("a"), None, false, |_| panic!("it must not start"));
    assert!(refused.unwrap_err().to_string().contains("is not a socket"));
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

#[test]
fn stopping_lets_running_answers_end() {
    let script = Script { pace: Duration::from_millis(20), ..script("0123456789") };
    with_daemon(&script, None, |daemon| {
        let mut idle = daemon.connect();
        let mut stream = daemon.connect();
        stream.write_all(post(CHAT, &ask(true)).as_bytes()).unwrap();
        wait_for("the job", || script.taken.load(Ordering::SeqCst) == 1);
        daemon.ask_to_stop();
        assert_eq!(idle.read(&mut [0]).unwrap(), 0, "an idle connection closes");
        wait_for("the socket's removal", || UnixStream::connect(&daemon.socket).is_err());
        let events = read_response(&mut stream).events();
        assert_eq!(events.len(), 1 + 10 + 1 + 1, "{events:?}");
        assert!(events[11].contains(r#""finish_reason":"stop""#));
    })
    .unwrap();
}

#[test]
fn a_second_request_to_stop_stops_at_once() {
    let script = Script { endless: true, pace: Duration::from_millis(5), ..script("a") };
    with_daemon(&script, None, |daemon| {
        let mut stream = daemon.connect();
        stream.write_all(post(CHAT, &ask(false)).as_bytes()).unwrap();
        wait_for("the job", || script.taken.load(Ordering::SeqCst) == 1);
        daemon.ask_to_stop();
        daemon.ask_to_stop();
        assert_eq!(read_response(&mut stream).status, 503);
        wait_for("the cancellation", || script.cancelled.load(Ordering::SeqCst) == 1);
    })
    .unwrap();
}

#[test]
fn a_long_step_keeps_no_client_waiting_for_its_end() {
    let script = Script { endless: true, pace: Duration::from_millis(1), ..script("a") };
    with_daemon(&script, None, |daemon| {
        let mut streaming = daemon.connect();
        streaming.write_all(post(CHAT, &ask(true)).as_bytes()).unwrap();
        let mut begun = [0; 4096];
        assert!(streaming.read(&mut begun).unwrap() > 0);
        script.stuck.store(true, Ordering::SeqCst);
        let mut waiting = daemon.connect();
        waiting.write_all(post(CHAT, &ask(false)).as_bytes()).unwrap();
        wait_for("the second request", || daemon.health("active") == 2);
        daemon.ask_to_stop();
        daemon.ask_to_stop();
        // The engine is still in its step when both have their ends.
        let refused = read_response(&mut waiting);
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &"unavailable".into()));
        let mut rest = String::new();
        streaming.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("data: {\"error\":{") && rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{rest}");
        script.stuck.store(false, Ordering::SeqCst);
    })
    .unwrap();
}

#[test]
fn an_engine_that_panics_ends_the_daemon_and_its_answers() {
    let script = Script { panics: true, ..script("abcd") };
    let ended = with_daemon(&script, None, |daemon| {
        let failed = daemon.post(CHAT, &ask(false));
        assert_eq!((failed.status, &failed.json()["error"]["type"]), (500, &"server_error".into()));
    });
    assert!(matches!(ended, Err(ServeError::EngineGone)), "{ended:?}");
}

#[test]
fn an_io_thread_that_panics_ends_the_engine() {
    let script = Script { endless: true, ..script("a") };
    let ended = catch_unwind(AssertUnwindSafe(|| {
        with_daemon(&script, None, |daemon| {
            let mut running = daemon.connect();
            running.write_all(post("/v1/completions", r#"{"prompt":"x"}"#).as_bytes()).unwrap();
            wait_for("the job", || script.taken.load(Ordering::SeqCst) == 1);
            let mut last = daemon.connect();
            last.write_all(post(CHAT, &ask(true).replace("hi", common::PANIC)).as_bytes()).unwrap();
            assert_eq!(last.read(&mut [0]).unwrap_or(0), 0, "no answer");
        })
    }));
    // That it got here is the point: an engine nobody listens to has ended.
    assert!(ended.is_err());
}

#[test]
fn unfinished_requests_together_are_bounded() {
    with_daemon(&script("a"), None, |daemon| {
        let body = hearth::wire::http::MAX_BODY_BYTES;
        let head = format!("POST /v1/completions HTTP/1.1\r\nContent-Length: {body}\r\n\r\n");
        let fit = hearth::serve::MAX_INPUT_BYTES / body;
        // All but the last byte of each, as often as the limit holds them, and once more.
        let mut held: Vec<UnixStream> = (0..fit + 1)
            .map(|_| {
                let mut stream = daemon.connect();
                stream.write_all(head.as_bytes()).unwrap();
                // The one that is refused may find its connection shut in the middle.
                let _ = stream.write_all(&vec![b' '; body - 1]);
                stream
            })
            .collect();
        // Which one went over depends on who was read when.
        let mut answered = Vec::new();
        wait_for("a refusal", || {
            let mut fds: Vec<PollFd<'_>> = held.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)).collect();
            poll(&mut fds, PollTimeout::ZERO).unwrap();
            answered = (0..fds.len()).filter(|&at| fds[at].any() == Some(true)).collect();
            !answered.is_empty()
        });
        assert_eq!(answered.len(), 1, "one is enough");
        assert_eq!(read_response(&mut held.remove(answered[0])).status, 503);
        assert_eq!(daemon.health("status"), "ok", "a small request always finds room");
        let ends = held.iter_mut().map(|stream| {
            let _ = stream.write_all(b" ");
            read_response(stream).status
        });
        let ends: Vec<u16> = ends.collect();
        let whole = ends.iter().filter(|&&status| status == 400).count();
        assert!(whole >= fit - 1 && ends.iter().all(|status| [400, 503].contains(status)), "{ends:?}");
    })
    .unwrap();
}
