//! A daemon over the real rings whose engine is a script, and a client that speaks HTTP to it.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hearth::engine::queue::{EngineEnd, Event, FinishReason, Job, Rings};
use hearth::engine::sampler::logprobs;
use hearth::serve::access::SocketSetup;
use hearth::serve::text::{AnswerText, TextModel};
use hearth::serve::{Defaults, ServeError, ServeSetup};
use hearth::text::TokenId;
use hearth::text::constrain::Grammars;
use hearth::wire::Message;

/// Positions of a sequence in every test.
pub const CONTEXT_TOKENS: usize = 4096;
/// Patience of every wait in a test.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The token of one long word.
const LONG: u32 = 1;
const LONG_BYTES: usize = 100;

/// A message that no text side survives.
pub const PANIC: &str = "panic";

/// A vocabulary of bytes: the token is the byte, but for one that is a long word.
pub struct Bytes;

impl TextModel for Bytes {
    fn encode_chat(&self, messages: &[Message], date: Option<&str>) -> Result<Vec<TokenId>, String> {
        assert!(messages.iter().all(|m| m.content != PANIC), "as the message says");
        if messages.iter().any(|m| m.content == "raise") {
            return Err("roles must alternate".to_owned());
        }
        let mut text = date.map_or(String::new(), |d| format!("[{d}]"));
        for m in messages {
            text.push_str(&format!("<{}>{}", m.role, m.content));
        }
        text.push_str("<assistant>");
        self.encode(&text)
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Ok(text.bytes().map(|b| TokenId(u32::from(b))).collect())
    }

    fn tokenize(&self, text: &str, add_special: bool, _: bool) -> Result<Vec<TokenId>, String> {
        let mut ids = self.encode(text)?;
        if add_special {
            ids.insert(0, TokenId(0));
        }
        Ok(ids)
    }

    fn decode(&self, tokens: &[TokenId]) -> Vec<u8> {
        tokens.iter().map(|token| token.0 as u8).collect()
    }

    fn token_bytes(&self, _: TokenId) -> &[u8] {
        b"x"
    }

    fn vocabulary_len(&self) -> usize {
        256
    }

    fn grammars(&self) -> Result<Grammars, String> {
        Err("bytes follow no grammar".to_owned())
    }

    fn answer(&self, stop: &[String]) -> Result<Box<dyn AnswerText + '_>, String> {
        Ok(Box::new(ByteAnswer { stop: stop.to_vec(), held: Vec::new() }))
    }
}

/// Holds back incomplete characters, and everything from a character that may begin a stop string.
struct ByteAnswer {
    stop: Vec<String>,
    held: Vec<u8>,
}

impl AnswerText for ByteAnswer {
    fn push(&mut self, token: TokenId, out: &mut String) -> bool {
        match token.0 {
            LONG => self.held.extend_from_slice(&[b'w'; LONG_BYTES]),
            byte => self.held.push(byte as u8),
        }
        let Ok(text) = std::str::from_utf8(&self.held) else {
            return false;
        };
        if let Some(at) = self.stop.iter().filter_map(|s| text.find(s.as_str())).min() {
            out.push_str(&text[..at]);
            return true;
        }
        let begins = |at: usize| self.stop.iter().any(|s| s.starts_with(&text[at..]));
        let safe = text.char_indices().map(|(at, _)| at).find(|&at| begins(at)).unwrap_or(text.len());
        out.push_str(&text[..safe]);
        self.held.drain(..safe);
        false
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.held));
    }
}

/// What the scripted engine does, and what it saw.
#[derive(Default)]
pub struct Script {
    /// The answer to every prompt; empty: the prompt itself, upper case.
    pub answer: String,
    /// Repeat the answer until `max_tokens` or a cancel.
    pub endless: bool,
    /// Wait this long before each token.
    pub pace: Duration,
    /// Take no jobs while this is set.
    pub frozen: AtomicBool,
    /// End with this instead of `Stop`.
    pub broken: bool,
    /// Make no token while this is set, and look at no cancel flag: a long step.
    pub stuck: AtomicBool,
    /// Panic instead of the third token.
    pub panics: bool,
    /// Jobs that ended because their cancel flag was set.
    pub cancelled: AtomicUsize,
    /// Jobs taken.
    pub taken: AtomicUsize,
    /// The prompts seen.
    pub prompts: Mutex<Vec<String>>,
}

/// The engine's thread: one job after the other.
pub fn engine(mut end: EngineEnd<'_>, script: &Script) {
    loop {
        if script.frozen.load(Ordering::SeqCst) && !end.stopping() {
            std::thread::park_timeout(Duration::from_millis(5));
            continue;
        }
        match end.next_job() {
            Some(job) => one_job(&mut end, job, script),
            None if end.stopping() => return,
            None => std::thread::park_timeout(Duration::from_millis(50)),
        }
    }
}

fn one_job(end: &mut EngineEnd<'_>, job: Box<Job>, script: &Script) {
    script.taken.fetch_add(1, Ordering::SeqCst);
    let prompt: Vec<u8> = job.prompt.iter().map(|t| t.0 as u8).collect();
    let prompt = String::from_utf8_lossy(&prompt).into_owned();
    let answer = if script.answer.is_empty() { prompt.to_uppercase() } else { script.answer.clone() };
    script.prompts.lock().unwrap().push(prompt);
    let bytes = answer.as_bytes();
    let hash = |made: usize| job.logits_hash.then_some(0xABC0 + made as u64);
    let mut made = 0;
    let mut reason = FinishReason::Stop;
    while script.endless || made < bytes.len() {
        while script.stuck.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!script.panics || made < 2, "as the script says");
        if job.is_cancelled() {
            script.cancelled.fetch_add(1, Ordering::SeqCst);
            reason = FinishReason::Cancelled;
            break;
        }
        if made == job.max_tokens {
            reason = FinishReason::Length;
            break;
        }
        if script.broken && made == 2 {
            reason = FinishReason::NonFinite;
            break;
        }
        std::thread::sleep(script.pace);
        emit(
            end,
            Event::Token {
                id: job.id,
                token: TokenId(u32::from(bytes[made % bytes.len()])),
                logits_hash: hash(made + 1),
                logprobs: job.logprobs.map(|count| logprobs(&[1.0, 3.0, 2.0], TokenId(1), count)),
            },
        );
        made += 1;
    }
    let logits_hash = hash(made);
    emit(end, Event::Finished { job, reason, completion_tokens: made, logits_hash });
}

fn emit(end: &mut EngineEnd<'_>, event: Event) {
    while end.event_room() == 0 && !end.abandoned() {
        std::thread::park_timeout(Duration::from_millis(1));
    }
    assert!(end.emit(event).is_ok() || end.abandoned());
    end.ring();
}

/// Where and how a test's daemon runs.
pub struct Daemon<'t> {
    pub socket: PathBuf,
    pub script: &'t Script,
    stop: Option<UnixStream>,
}

impl Daemon<'_> {
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Asks the daemon to stop as SIGTERM would.
    pub fn ask_to_stop(&mut self) {
        self.stop.as_mut().unwrap().write_all(b"!").unwrap();
    }

    pub fn post(&self, path: &str, body: &str) -> Response {
        let mut stream = self.connect();
        stream.write_all(post(path, body).as_bytes()).unwrap();
        read_response(&mut stream)
    }

    /// `/health`'s value of one field.
    pub fn health(&self, field: &str) -> serde_json::Value {
        let mut stream = self.connect();
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        read_response(&mut stream).json()[field].clone()
    }
}

/// Runs `test` against a daemon with a scripted engine, and returns how the daemon ended.
pub fn with_daemon(script: &Script, tty: Option<&Path>, test: impl FnOnce(&mut Daemon<'_>)) -> Result<(), ServeError> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    with_daemon_at(&socket, script, tty, false, test)
}

/// The same at a given path, and with signals if asked.
pub fn with_daemon_at(
    socket: &Path,
    script: &Script,
    tty: Option<&Path>,
    signals: bool,
    test: impl FnOnce(&mut Daemon<'_>),
) -> Result<(), ServeError> {
    with_daemon_on(vec![SocketSetup::at(socket)], script, tty, signals, test)
}

/// The same on several sockets; the test's is the first.
pub fn with_daemon_on(
    sockets: Vec<SocketSetup>,
    script: &Script,
    tty: Option<&Path>,
    signals: bool,
    test: impl FnOnce(&mut Daemon<'_>),
) -> Result<(), ServeError> {
    let socket = sockets[0].path.clone();
    let (stop, stop_end) = UnixStream::pair().unwrap();
    let (ready_tx, ready_rx) = std::sync::mpsc::channel();
    let mut rings = Rings::new();
    let (end, unbound) = rings.split().unwrap();
    std::thread::scope(|scope| {
        let engine_thread = scope.spawn(move || {
            let ended = catch_unwind(AssertUnwindSafe(|| engine(end, script)));
            assert_eq!(ended.is_err(), script.panics);
        });
        let link = unbound.bind(engine_thread.thread().clone());
        let io = scope.spawn(move || {
            hearth::serve::run(
                ServeSetup {
                    sockets,
                    tty,
                    text: &Bytes,
                    model_id: "bytes",
                    context_tokens: CONTEXT_TOKENS,
                    sequences: 1,
                    n_embd: 4,
                    grammars: 0,
                    defaults: Defaults::default(),
                    signals,
                    stop: Some(stop_end),
                    supervisor: None,
                    records: None,
                    check: None,
                    confine: Box::new(|| Ok(())),
                    apps: None,
                    facts: Default::default(),
                    plan: serde_json::json!({"total_bytes": 7}),
                    ready: Box::new(move || ready_tx.send(()).unwrap()),
                },
                link,
            )
        });
        // A daemon that could not start drops the sender.
        if ready_rx.recv_timeout(PATIENCE).is_ok() {
            let mut daemon = Daemon { socket, script, stop: Some(stop) };
            test(&mut daemon);
        }
        io.join().unwrap()
    })
}

/// One parsed response.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The `data:` lines of an event stream.
    pub fn events(&self) -> Vec<String> {
        self.text().split("\n\n").filter_map(|e| e.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

pub fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Reads one response byte by byte, so that a pipelined one behind it stays in the stream.
pub fn read_response(stream: &mut UnixStream) -> Response {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(byte(stream));
    }
    let head = String::from_utf8(head).unwrap();
    let status = head[9..12].parse().unwrap();
    if status == 100 {
        return Response { status, head, body: Vec::new() };
    }
    let field = |name: &str| head.lines().find_map(|l| l.strip_prefix(name)).map(str::to_owned);
    let mut body = Vec::new();
    if let Some(length) = field("Content-Length: ") {
        body.resize(length.parse().unwrap(), 0);
        stream.read_exact(&mut body).unwrap();
    } else if field("Transfer-Encoding: ").is_some() {
        loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                line.push(byte(stream));
            }
            let size = usize::from_str_radix(std::str::from_utf8(&line).unwrap().trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).unwrap();
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                break;
            }
        }
    } else {
        stream.read_to_end(&mut body).unwrap();
    }
    Response { status, head, body }
}

fn byte(stream: &mut UnixStream) -> u8 {
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    byte[0]
}

/// Waits until `done` holds.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// For tests that need an `Arc`ed flag.
pub fn flag() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(false))
}
