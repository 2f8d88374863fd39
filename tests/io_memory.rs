//! What requests take, measured, against what the memory plan says of them. Each case is a process of its own, since the kernel
//! counts memory by process and an allocator keeps what it had.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/models.rs"]
mod models;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::Ordering;

use common::{CONTEXT_TOKENS, Script, post, wait_for, with_daemon};
use hearth::engine::scheduler::{RESERVED_PLACES, WAITING_JOBS};
use hearth::model::gguf::Gguf;
use hearth::model::vocab::raw_vocab;
use hearth::serve::MAX_INPUT_BYTES;
use hearth::serve::memory::{io_bytes, max_text_bytes, request_bytes};
use hearth::serve::model_text::ModelText;
use hearth::serve::text::TextModel;
use hearth::sys::map::Mapping;
use hearth::text::Vocab;
use hearth::text::chat::ChatTemplate;
use hearth::wire::Prompt;
use hearth::wire::http::{MAX_BODY_BYTES, Parser};
use hearth::wire::openai::{Call, route};
use hearth::wire::request::MAX_JSON_VALUES;

/// Names the case in a child process.
const CASE: &str = "HEARTH_IO_MEMORY_CASE";
const CTX: usize = 2048;

/// One line of `/proc/self/status`, bytes.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// How much memory `work` adds at its peak.
fn peak(work: impl FnOnce()) -> usize {
    // Resets the peak to what is there now.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmHWM:");
    work();
    status("VmHWM:").saturating_sub(before)
}

fn chat(content: &str) -> String {
    serde_json::json!({"messages": [{"role": "user", "content": content}]}).to_string()
}

fn completion(prompt: &str) -> String {
    serde_json::json!({"prompt": prompt}).to_string()
}

/// Path and body of the request that takes most of something.
fn request(case: &str) -> (&'static str, String) {
    let text = max_text_bytes(CTX);
    let chats = "/v1/chat/completions";
    let completions = "/v1/completions";
    let filler = |value: &str, values: usize| {
        let list = vec![value; (MAX_JSON_VALUES - 10) / values].join(",");
        format!(r#"{{"prompt":"x","unknown":[{list}]}}"#)
    };
    match case {
        "token ids" => (completions, format!(r#"{{"prompt":[{}]}}"#, vec!["77"; MAX_JSON_VALUES - 10].join(","))),
        "arrays" => (completions, filler("[1]", 5)),
        "objects" => (completions, filler(r#"{"a":1}"#, 5)),
        "strings" => (completions, filler(r#""a""#, 1)),
        "a long field" => (completions, format!(r#"{{"prompt":"x","model":"{}"}}"#, "m".repeat(MAX_BODY_BYTES - 100))),
        "one word" => (completions, completion(&"x".repeat(text))),
        "symbols" => (completions, completion(&"\u{1}~é漢".repeat(text / 7))),
        "special tokens" => (chats, chat(&"<|im_end|>".repeat(text / 24))),
        "a long chat" => (chats, chat(&"y z".repeat((text - 1000) / 3))),
        _ => panic!("no such case: {case}"),
    }
}

const REQUESTS: [&str; 9] = [
    "token ids",
    "arrays",
    "objects",
    "strings",
    "a long field",
    "one word",
    "symbols",
    "special tokens",
    "a long chat",
];

fn one_request(case: &str) {
    let path = models::path("HEARTH_MODEL", "SmolLM2-135M-Instruct-Q4_1.gguf");
    let mapping = Mapping::open(&path).unwrap_or_else(|e| panic!("{e}; run `make model` or set HEARTH_MODEL"));
    let gguf = Gguf::parse(mapping.bytes()).unwrap();
    let raw = raw_vocab(&gguf).unwrap();
    let vocab = Vocab::new(&raw).unwrap();
    let own = gguf.str("tokenizer.chat_template").unwrap().unwrap();
    let template = ChatTemplate::compile(own, "<|im_start|>", "<|im_end|>").unwrap();
    let text = ModelText { vocab: &vocab, template: Some(&template), context_tokens: CTX };
    let serve = |path: &str, body: &str| {
        let mut parser = Parser::default();
        parser.push(post(path, body).as_bytes());
        match route(&parser.next_request().unwrap().unwrap()) {
            Ok(Call::Generate(_, request)) => match &request.prompt {
                Prompt::Chat(messages) => text.encode_chat(messages, None).unwrap().len(),
                Prompt::Text(prompt) => text.encode(prompt).unwrap().len(),
                Prompt::Tokens(ids) => ids.len(),
            },
            other => panic!("{other:?}"),
        }
    };
    // Code and tables are in memory already.
    for (path, body) in [("/v1/chat/completions", chat("<|im_end|> é")), ("/v1/completions", completion("a b"))] {
        assert!(serve(path, &body) > 0);
    }
    let (path, body) = request(case);
    assert!(body.len() <= MAX_BODY_BYTES, "{case}: {} bytes", body.len());
    let took = peak(|| assert!(serve(path, &body) > 0));
    println!("{case}: {took} of {} bytes", request_bytes(CTX));
    assert!(took <= request_bytes(CTX), "{case}: took {took}, planned {}", request_bytes(CTX));
}

/// Requests of one user that wait with the longest prompts, and as much input as is taken beside them.
fn waiting_requests() {
    let script = Script { answer: "a".to_owned(), ..Script::default() };
    script.frozen.store(true, Ordering::SeqCst);
    let prompt = post("/v1/completions", &completion(&"x".repeat(CONTEXT_TOKENS - 1)));
    let half = format!("POST / HTTP/1.1\r\nContent-Length: {MAX_BODY_BYTES}\r\n\r\n{}", " ".repeat(MAX_BODY_BYTES - 1));
    with_daemon(&script, None, |daemon| {
        assert_eq!(daemon.health("active"), 0);
        let mut streams: Vec<UnixStream> = Vec::new();
        let took = peak(|| {
            for _ in 0..WAITING_JOBS - RESERVED_PLACES {
                let mut stream = daemon.connect();
                stream.write_all(prompt.as_bytes()).unwrap();
                streams.push(stream);
            }
            wait_for("the queue", || daemon.health("waiting") == WAITING_JOBS - RESERVED_PLACES);
            for _ in 0..MAX_INPUT_BYTES / MAX_BODY_BYTES + 2 {
                let mut stream = daemon.connect();
                // One that is refused finds its connection shut in the middle.
                let _ = stream.write_all(half.as_bytes());
                streams.push(stream);
            }
            assert_eq!(daemon.health("status"), "ok");
        });
        let planned = io_bytes(CONTEXT_TOKENS, 1);
        println!("waiting requests: {took} of {planned} bytes");
        assert!(took <= planned, "took {took}, planned {planned}");
        script.frozen.store(false, Ordering::SeqCst);
    })
    .unwrap();
}

#[test]
fn requests_take_no_more_than_planned() {
    match std::env::var(CASE).as_deref() {
        Ok("waiting requests") => waiting_requests(),
        Ok(case) => one_request(case),
        Err(_) => {
            for case in REQUESTS.into_iter().chain(["waiting requests"]) {
                let mut child = Command::new(std::env::current_exe().unwrap());
                child.args(["--exact", "requests_take_no_more_than_planned", "--nocapture"]);
                let output = child.env(CASE, case).output().unwrap();
                let said = String::from_utf8_lossy(&output.stdout);
                println!("{}", said.lines().filter(|line| line.starts_with(case)).collect::<String>());
                assert!(output.status.success(), "{case}: {said}{}", String::from_utf8_lossy(&output.stderr));
            }
        }
    }
}
