//! HTTP as the client speaks it: one request, one response, its body read as it comes. The other end is trusted to be a
//! hearth, not to be well: lengths are bounded and nothing it sends can make this panic.
//! Next on the data's way: `client::ask`, `client::chat`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

use super::ClientError;
use crate::wire::Message;

/// A response's status line and headers, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// A whole body or one event, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;
/// How often a wait looks whether the person has had enough.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What to ask.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The conversation, the question last.
    pub messages: Vec<Message>,
    /// As in the API; `None`: the daemon's.
    pub max_tokens: Option<usize>,
    /// As in the API; `None`: the daemon's.
    pub temperature: Option<f32>,
    /// As in the API; `None`: the daemon's.
    pub seed: Option<u64>,
    /// JSON schema that the answer shall follow; `None`: any text.
    pub schema: Option<Value>,
}

impl Question {
    fn body(&self, stream: bool) -> String {
        let mut body = json!({"messages": self.messages, "stream": stream});
        if let Some(max_tokens) = self.max_tokens {
            body["max_tokens"] = max_tokens.into();
        }
        if let Some(temperature) = self.temperature {
            // By its shortest decimal form, so that 0.7 stays 0.7.
            body["temperature"] = temperature.to_string().parse::<f64>().map_or(Value::Null, Value::from);
        }
        if let Some(seed) = self.seed {
            body["seed"] = seed.into();
        }
        if let Some(schema) = &self.schema {
            let named = json!({"name": "answer", "strict": true, "schema": schema});
            body["response_format"] = json!({"type": "json_schema", "json_schema": named});
        }
        body.to_string()
    }
}

/// How a streamed answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// To its end.
    Whole,
    /// `max_tokens` or the context's end.
    Length,
    /// `cancel` was set; the daemon has been hung up on.
    Cancelled,
}

/// Asks and hands the answer's text to `on_text` as it comes. Setting `cancel` ends it.
///
/// # Errors
/// No daemon, a refusal, a broken connection; what `on_text` returns.
pub fn ask_streaming(
    socket: &Path,
    question: &Question,
    cancel: &AtomicBool,
    mut on_text: impl FnMut(&str) -> Result<(), ClientError>,
) -> Result<Ended, ClientError> {
    let mut response = Response::open(socket, &question.body(true), cancel)?;
    if response.status != 200 {
        return Err(response.refusal());
    }
    let mut ended = Ended::Whole;
    let mut events = Vec::new();
    loop {
        let more = match response.read_some(&mut events) {
            Ok(more) => more,
            Err(Stopped::Cancelled) => return Ok(Ended::Cancelled),
            Err(Stopped::Failed(e)) => return Err(e),
        };
        while let Some(end) = events.windows(2).position(|w| w == b"\n\n") {
            let event: Vec<u8> = events.drain(..end + 2).collect();
            let Some(data) = event.strip_prefix(b"data: ") else {
                continue;
            };
            let data = data.trim_ascii_end();
            if data == b"[DONE]" {
                return Ok(ended);
            }
            let chunk: Value =
                serde_json::from_slice(data).map_err(|e| protocol(format!("an event is not JSON: {e}")))?;
            if let Some(message) = chunk["error"]["message"].as_str() {
                return Err(ClientError::Refused { status: 500, message: message.to_owned() });
            }
            let choice = &chunk["choices"][0];
            if let Some(text) = choice["delta"]["content"].as_str() {
                on_text(text)?;
            }
            if choice["finish_reason"] == "length" {
                ended = Ended::Length;
            }
        }
        if !more {
            return Err(protocol("it ends in the middle".to_owned()));
        }
    }
}

/// Asks and returns the daemon's JSON answer as it is.
///
/// # Errors
/// No daemon, a refusal, a broken connection.
pub fn ask_whole(socket: &Path, question: &Question, cancel: &AtomicBool) -> Result<Value, ClientError> {
    let mut response = Response::open(socket, &question.body(false), cancel)?;
    if response.status != 200 {
        return Err(response.refusal());
    }
    response.json()
}

/// What the daemon at `socket` says to `GET path`, whatever the HTTP status, within `patience`.
///
/// # Errors
/// No daemon, one that is silent, or an answer that is not JSON.
pub fn get_json(socket: &Path, path: &str, patience: Duration) -> Result<Value, ClientError> {
    let cancel = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (answered, is_answered) = mpsc::channel::<()>();
        scope.spawn(move || {
            // The other end is dropped with the answer.
            if is_answered.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                cancel.store(true, Ordering::Relaxed);
            }
        });
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = Response::begin(socket, &request, cancel).and_then(|mut response| response.json());
        drop(answered);
        answer
    })
}

/// Why a read ended without bytes.
enum Stopped {
    Cancelled,
    Failed(ClientError),
}

/// A response whose head was read.
struct Response<'c> {
    stream: UnixStream,
    cancel: &'c AtomicBool,
    /// Read and not yet used.
    input: Vec<u8>,
    status: u16,
    body: Body,
}

#[derive(Clone, Copy)]
enum Body {
    /// Bytes left.
    Sized(usize),
    ChunkSize,
    /// Bytes left of the chunk, its line end included.
    Chunk(usize),
    UntilClose,
}

impl<'c> Response<'c> {
    fn open(socket: &Path, body: &str, cancel: &'c AtomicBool) -> Result<Self, ClientError> {
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        Self::begin(socket, &request, cancel)
    }

    /// Sends a whole request and reads the answer's head.
    fn begin(socket: &Path, request: &str, cancel: &'c AtomicBool) -> Result<Self, ClientError> {
        let mut stream = UnixStream::connect(socket).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied { path: socket.to_owned() },
            _ => ClientError::NoDaemon { path: socket.to_owned(), source },
        })?;
        stream.set_read_timeout(Some(LOOK_INTERVAL)).map_err(ClientError::Connection)?;
        // A daemon that refuses early has answered before it closed: read that before giving up.
        let sent = stream.write_all(request.as_bytes());
        let mut response = Self { stream, cancel, input: Vec::new(), status: 0, body: Body::UntilClose };
        match (response.read_head(), sent) {
            (Ok(()), _) => Ok(response),
            (Err(Stopped::Failed(ClientError::Connection(_))), Err(e)) => Err(ClientError::Connection(e)),
            (Err(Stopped::Failed(e)), _) => Err(e),
            (Err(Stopped::Cancelled), _) => Err(ClientError::Connection(io::Error::new(
                io::ErrorKind::Interrupted,
                "cancelled before the answer began",
            ))),
        }
    }

    fn read_head(&mut self) -> Result<(), Stopped> {
        loop {
            let mut fields = [httparse::EMPTY_HEADER; 32];
            let mut head = httparse::Response::new(&mut fields);
            let parsed = head.parse(&self.input).map_err(|e| failed(format!("no HTTP response: {e}")))?;
            if let (httparse::Status::Complete(used), Some(status)) = (parsed, head.code) {
                let field = |name: &str| {
                    let field = head.headers.iter().find(|f| f.name.eq_ignore_ascii_case(name))?;
                    std::str::from_utf8(field.value).ok()
                };
                self.body = match (field("transfer-encoding"), field("content-length")) {
                    (Some(_), _) => Body::ChunkSize,
                    (None, Some(length)) => {
                        let length = length.parse().ok().filter(|&n| n <= MAX_BODY_BYTES);
                        Body::Sized(length.ok_or_else(|| failed("an impossible length".to_owned()))?)
                    }
                    (None, None) => Body::UntilClose,
                };
                self.status = status;
                self.input.drain(..used);
                return Ok(());
            }
            if self.input.len() > MAX_HEAD_BYTES {
                return Err(failed("endless headers".to_owned()));
            }
            if !self.fill()? {
                return Err(failed("it closed without an answer".to_owned()));
            }
        }
    }

    /// Appends what has come of the body, at least one byte unless it is over (false).
    fn read_some(&mut self, out: &mut Vec<u8>) -> Result<bool, Stopped> {
        loop {
            if out.len() > MAX_BODY_BYTES {
                return Err(failed("an endless body".to_owned()));
            }
            match self.body {
                Body::Sized(0) => return Ok(false),
                Body::Sized(left) if !self.input.is_empty() => {
                    let take = left.min(self.input.len());
                    out.extend(self.input.drain(..take));
                    self.body = Body::Sized(left - take);
                    return Ok(true);
                }
                Body::UntilClose if !self.input.is_empty() => {
                    out.append(&mut self.input);
                    return Ok(true);
                }
                Body::ChunkSize => match httparse::parse_chunk_size(&self.input) {
                    Ok(httparse::Status::Complete((_, 0))) => return Ok(false),
                    Ok(httparse::Status::Complete((used, size))) => {
                        let size = usize::try_from(size).ok().filter(|&n| n <= MAX_BODY_BYTES);
                        let size = size.ok_or_else(|| failed("an impossible chunk".to_owned()))?;
                        self.input.drain(..used);
                        self.body = Body::Chunk(size + 2);
                        continue;
                    }
                    Ok(httparse::Status::Partial) if self.input.len() < MAX_HEAD_BYTES => {}
                    _ => return Err(failed("a broken chunk".to_owned())),
                },
                Body::Chunk(left) if !self.input.is_empty() => {
                    let take = left.min(self.input.len());
                    // The last two bytes of a chunk are its line end.
                    let text = take.min(left.saturating_sub(2));
                    out.extend(self.input.drain(..take).take(text));
                    self.body = if take == left { Body::ChunkSize } else { Body::Chunk(left - take) };
                    if text > 0 {
                        return Ok(true);
                    }
                    continue;
                }
                Body::Sized(_) | Body::UntilClose | Body::Chunk(_) => {}
            }
            if !self.fill()? {
                return Ok(false);
            }
        }
    }

    fn json(&mut self) -> Result<Value, ClientError> {
        let mut body = Vec::new();
        loop {
            match self.read_some(&mut body) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Stopped::Failed(e)) => return Err(e),
                Err(Stopped::Cancelled) => {
                    return Err(ClientError::Connection(io::ErrorKind::Interrupted.into()));
                }
            }
        }
        serde_json::from_slice(&body).map_err(|e| protocol(format!("its body is not JSON: {e}")))
    }

    fn refusal(&mut self) -> ClientError {
        let message = match self.json() {
            Ok(body) => body["error"]["message"].as_str().unwrap_or("no reason given").to_owned(),
            Err(e) => e.to_string(),
        };
        ClientError::Refused { status: self.status, message }
    }

    /// Waits for more input. False: there is none to come.
    fn fill(&mut self) -> Result<bool, Stopped> {
        let mut buffer = [0; 8192];
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(Stopped::Cancelled);
            }
            match self.stream.read(&mut buffer) {
                Ok(n) => {
                    self.input.extend_from_slice(buffer.get(..n).unwrap_or(&[]));
                    return Ok(n > 0);
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(Stopped::Failed(ClientError::Connection(e))),
            }
        }
    }
}

fn failed(what: String) -> Stopped {
    Stopped::Failed(protocol(what))
}

fn protocol(what: String) -> ClientError {
    ClientError::Protocol { what }
}
