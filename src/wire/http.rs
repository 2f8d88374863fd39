//! HTTP/1.1, the part a local server needs: an incremental request parser and a response writer. [`Parser`] takes
//! bytes in any split and gives whole requests; nothing it is fed can make it panic or hold more than
//! [`MAX_BUFFERED_BYTES`]. Next on the data's way: `wire::openai`, which reads a [`Request`]'s path and body.
//!
//! Requests whose end two readers could see in different places (RFC 9112 §6.3, §11.2) are refused and the connection
//! ends: `Transfer-Encoding` with `Content-Length`, either of them twice, a length that is not digits alone.

use std::io::Write;

use super::Reject;

#[cfg(test)]
mod tests;

/// Request line and headers, in bytes (431 beyond).
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Header fields of a request (431 beyond).
pub const MAX_HEADERS: usize = 64;
/// A request's body, in bytes (413 beyond).
pub const MAX_BODY_BYTES: usize = 256 * 1024;
/// One chunk's size line with its extensions, and all trailer fields together, in bytes (400 beyond).
pub const MAX_CHUNK_LINE_BYTES: usize = 256;
/// What the parser holds at most before it wants no more, in bytes; a read may go over it by its own length.
pub const MAX_BUFFERED_BYTES: usize = MAX_HEAD_BYTES + MAX_BODY_BYTES;

/// One whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method as sent.
    pub method: String,
    /// The target's path, without scheme, authority and query.
    pub path: String,
    /// The decoded body.
    pub body: Vec<u8>,
    /// What the answer may look like.
    pub reply: Reply,
}

/// How the answer to one request must be framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The connection stays open afterwards.
    pub keep_alive: bool,
    /// The peer reads chunked bodies (HTTP/1.1).
    pub chunked: bool,
    /// `HEAD`: headers without the body.
    pub head_only: bool,
}

impl Reply {
    /// For requests that could not be read to their end.
    pub const LAST: Self = Self { keep_alive: false, chunked: false, head_only: false };
}

/// Reads requests out of a byte stream, one after the other.
#[derive(Debug, Default)]
pub struct Parser {
    input: Vec<u8>,
    state: State,
    continue_due: bool,
}

#[derive(Debug)]
enum State {
    /// Request line and headers, of which this many bytes were searched for a line's end.
    Head { scanned: usize },
    /// A body of known length.
    Sized { head: Head, length: usize },
    /// A chunked body: what was decoded so far, and what comes next.
    Chunked { head: Head, body: Vec<u8>, next: Chunk },
    /// A refusal was given: the rest of the stream has no meaning.
    Broken,
}

impl Default for State {
    fn default() -> Self {
        State::Head { scanned: 0 }
    }
}

/// What comes next in a chunked body.
#[derive(Clone, Copy, Debug)]
enum Chunk {
    Size,
    Data(usize),
    Trailer(usize),
}

#[derive(Debug, Default)]
struct Head {
    method: String,
    path: String,
    keep_alive: bool,
    chunked_reply: bool,
}

impl Head {
    fn finish(self, body: Vec<u8>) -> Request {
        let reply =
            Reply { keep_alive: self.keep_alive, chunked: self.chunked_reply, head_only: self.method == "HEAD" };
        Request { method: self.method, path: self.path, body, reply }
    }
}

enum Framing {
    Sized(usize),
    Chunked,
}

impl Parser {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Broken) {
            make_room(&mut self.input, bytes.len());
            self.input.extend_from_slice(bytes);
        }
    }

    /// Whether reading more makes sense before [`Parser::next_request`] was called again.
    pub fn has_room(&self) -> bool {
        self.input.len() < MAX_BUFFERED_BYTES
    }

    /// Bytes held, with the room that lists have to grow.
    pub fn buffered(&self) -> usize {
        let head = |head: &Head| head.method.capacity() + head.path.capacity();
        let state = match &self.state {
            State::Chunked { head: of, body, .. } => head(of) + body.capacity(),
            State::Sized { head: of, .. } => head(of),
            State::Head { .. } | State::Broken => 0,
        };
        self.input.capacity() + state
    }

    /// Whether a request has begun and not ended.
    pub fn is_midway(&self) -> bool {
        !self.input.is_empty() || matches!(self.state, State::Sized { .. } | State::Chunked { .. })
    }

    /// Whether the peer waits for `100 Continue`; true once a request.
    pub fn take_continue(&mut self) -> bool {
        std::mem::take(&mut self.continue_due)
    }

    /// The next whole request, or `None` if more bytes are needed.
    ///
    /// # Errors
    /// The bytes are not a request this server reads. Answer with [`Reply::LAST`] and close: every later call is `None`.
    pub fn next_request(&mut self) -> Result<Option<Request>, Reject> {
        let result = self.advance();
        if self.input.is_empty() {
            // A connection that waits keeps no room of what was.
            self.input = Vec::new();
        }
        match &result {
            Ok(None) => {}
            Ok(Some(_)) => self.continue_due = false,
            Err(_) => {
                self.state = State::Broken;
                self.input = Vec::new();
                self.continue_due = false;
            }
        }
        result
    }

    fn advance(&mut self) -> Result<Option<Request>, Reject> {
        loop {
            match std::mem::take(&mut self.state) {
                State::Broken => {
                    self.state = State::Broken;
                    return Ok(None);
                }
                State::Head { scanned } => {
                    if scanned == 0 {
                        // Empty lines before a request are skipped (RFC 9112 §2.2).
                        let blank = self.input.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
                        self.input.drain(..blank);
                    }
                    // Parse again only when another line has ended, so that a slow peer costs no more than a fast one.
                    let new_line = self.input.get(scanned..).is_some_and(|new| new.contains(&b'\n'));
                    self.state = State::Head { scanned: self.input.len() };
                    if !new_line && self.input.len() <= MAX_HEAD_BYTES {
                        return Ok(None);
                    }
                    let Some((used, head, framing, expects)) = parse_head(&self.input)? else {
                        return Ok(None);
                    };
                    self.input.drain(..used);
                    self.continue_due = expects && self.input.is_empty();
                    self.state = match framing {
                        Framing::Sized(length) => State::Sized { head, length },
                        Framing::Chunked => State::Chunked { head, body: Vec::new(), next: Chunk::Size },
                    };
                }
                State::Sized { head, length } => {
                    if self.input.len() < length {
                        self.state = State::Sized { head, length };
                        return Ok(None);
                    }
                    let rest = self.input.split_off(length);
                    let body = std::mem::replace(&mut self.input, rest);
                    return Ok(Some(head.finish(body)));
                }
                State::Chunked { head, mut body, next } => {
                    let Some(next) = self.chunk(&mut body, next)? else {
                        return Ok(Some(head.finish(body)));
                    };
                    let (chunk, more) = next;
                    self.state = State::Chunked { head, body, next: chunk };
                    if !more {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// One step through a chunked body: what comes next and whether it can be tried yet; `None` at its end.
    fn chunk(&mut self, body: &mut Vec<u8>, next: Chunk) -> Result<Option<(Chunk, bool)>, Reject> {
        match next {
            Chunk::Size => {
                let Some(line) = self.line(MAX_CHUNK_LINE_BYTES)? else {
                    return Ok(Some((next, false)));
                };
                let size =
                    chunk_size(&line).ok_or_else(|| Reject::request(400, "a chunk's size is not hexadecimal"))?;
                if size > MAX_BODY_BYTES.saturating_sub(body.len()) {
                    return Err(body_too_long(body.len().saturating_add(size)));
                }
                Ok(Some((if size == 0 { Chunk::Trailer(0) } else { Chunk::Data(size) }, true)))
            }
            Chunk::Data(left) => {
                let take = left.min(self.input.len());
                make_room(body, take);
                body.extend(self.input.drain(..take));
                let left = left - take;
                if left > 0 || self.input.len() < 2 {
                    return Ok(Some((Chunk::Data(left), false)));
                }
                if !self.input.starts_with(b"\r\n") {
                    return Err(Reject::request(400, "a chunk is longer than its size says"));
                }
                self.input.drain(..2);
                Ok(Some((Chunk::Size, true)))
            }
            Chunk::Trailer(seen) => match self.line(MAX_CHUNK_LINE_BYTES.saturating_sub(seen))? {
                None => Ok(Some((next, false))),
                Some(line) if line.is_empty() => Ok(None),
                Some(line) => Ok(Some((Chunk::Trailer(seen.saturating_add(line.len() + 2)), true))),
            },
        }
    }

    /// Takes one line that ends in CR LF out of the input, without its end.
    fn line(&mut self, max: usize) -> Result<Option<Vec<u8>>, Reject> {
        let end = self.input.iter().take(max).position(|&b| b == b'\n');
        match end {
            None if self.input.len() >= max => {
                Err(Reject::request(400, format!("a chunk's size line or the trailers exceed {max} bytes")))
            }
            None => Ok(None),
            Some(end) => {
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                match line.pop() {
                    Some(b'\r') => Ok(Some(line)),
                    _ => Err(Reject::request(400, "a chunk's size line must end in CR LF")),
                }
            }
        }
    }
}

/// Room is made in steps of this many bytes, so that a buffer is never much larger than what it holds.
const GROWTH_BYTES: usize = 4 * 1024;

fn make_room(buffer: &mut Vec<u8>, more: usize) {
    let wanted = buffer.len().saturating_add(more);
    if wanted > buffer.capacity() {
        buffer.reserve_exact(wanted.next_multiple_of(GROWTH_BYTES) - buffer.len());
    }
}

/// A head with its length in bytes, the framing of its body and whether the peer waits for `100 Continue`.
type ParsedHead = (usize, Head, Framing, bool);

fn parse_head(input: &[u8]) -> Result<Option<ParsedHead>, Reject> {
    let too_long = |what: String| Reject::request(431, what).with_code("headers_too_large");
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut fields);
    let head_window = input.get(..MAX_HEAD_BYTES).unwrap_or(input);
    let used = match request.parse(head_window) {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) if input.len() < MAX_HEAD_BYTES => return Ok(None),
        Ok(httparse::Status::Partial) => {
            return Err(too_long(format!("request line and headers exceed {MAX_HEAD_BYTES} bytes")));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Err(too_long(format!("a request may have {MAX_HEADERS} header fields")));
        }
        Err(e) => {
            return Err(Reject::request(400, format!("not an HTTP/1.1 request: {e}")));
        }
    };
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Ok(None);
    };
    let mut head = Head {
        method: method.to_owned(),
        path: path_of(target).to_owned(),
        keep_alive: minor == 1,
        chunked_reply: minor == 1,
    };
    let mut length = None;
    let mut chunked = false;
    let mut expects = false;
    for field in request.headers.iter() {
        let value = field.value.trim_ascii();
        if field.name.eq_ignore_ascii_case("content-length") {
            if length.is_some() {
                return Err(Reject::request(400, "`Content-Length` is given twice"));
            }
            length = Some(content_length(value)?);
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            if chunked {
                return Err(Reject::request(400, "`Transfer-Encoding` is given twice"));
            }
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Reject::request(501, "of transfer codings only \"chunked\" is read"));
            }
            chunked = true;
        } else if field.name.eq_ignore_ascii_case("content-encoding") && !value.eq_ignore_ascii_case(b"identity") {
            return Err(Reject::request(415, "compressed request bodies are not read"));
        } else if field.name.eq_ignore_ascii_case("expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Reject::request(417, "of expectations only \"100-continue\" is met"));
            }
            expects = minor == 1;
        } else if field.name.eq_ignore_ascii_case("connection") {
            for token in value.split(|&b| b == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"close") {
                    head.keep_alive = false;
                } else if token.eq_ignore_ascii_case(b"keep-alive") && minor == 0 {
                    head.keep_alive = true;
                }
            }
        }
    }
    let framing = match (chunked, length) {
        (true, Some(_)) => {
            return Err(Reject::request(400, "`Transfer-Encoding` and `Content-Length` exclude each other"));
        }
        (true, None) if minor == 0 => {
            return Err(Reject::request(400, "HTTP/1.0 has no `Transfer-Encoding`"));
        }
        (true, None) => Framing::Chunked,
        (false, length) => Framing::Sized(length.unwrap_or(0)),
    };
    expects &= !matches!(framing, Framing::Sized(0));
    Ok(Some((used, head, framing, expects)))
}

fn content_length(value: &[u8]) -> Result<usize, Reject> {
    let digits = std::str::from_utf8(value).ok().filter(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit()));
    let Some(digits) = digits else {
        return Err(Reject::request(400, "`Content-Length` must be a decimal number"));
    };
    match digits.parse() {
        Ok(length) if length <= MAX_BODY_BYTES => Ok(length),
        Ok(length) => Err(body_too_long(length)),
        Err(_) => Err(body_too_long(usize::MAX)),
    }
}

fn body_too_long(length: usize) -> Reject {
    Reject::request(413, format!("the body has at least {length} bytes, at most {MAX_BODY_BYTES} are read"))
        .with_code("body_too_large")
}

fn chunk_size(line: &[u8]) -> Option<usize> {
    let digits = line.split(|&b| b == b';').next()?.trim_ascii_end();
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// The path of an origin-form or absolute-form target.
fn path_of(target: &str) -> &str {
    let path = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => rest.find(['/', '?']).map_or("/", |at| &rest[at..]),
        _ => target,
    };
    path.split(['?', '#']).next().unwrap_or(path)
}

/// Appends a whole response with a JSON body.
pub fn write_json(out: &mut Vec<u8>, reply: Reply, status: u16, body: &str) {
    write_response(out, reply, status, "application/json", None, None, body.as_bytes());
}

/// Appends a whole response with a page of text.
pub fn write_text(out: &mut Vec<u8>, reply: Reply, content_type: &str, text: &str) {
    write_response(out, reply, 200, content_type, None, None, text.as_bytes());
}

/// Appends a refusal with its headers.
pub fn write_reject(out: &mut Vec<u8>, reply: Reply, reject: &Reject) {
    let body = reject.to_json().to_string();
    write_response(out, reply, reject.status, "application/json", reject.allow, reject.retry_after_s, body.as_bytes());
}

fn write_response(
    out: &mut Vec<u8>,
    reply: Reply,
    status: u16,
    content_type: &str,
    allow: Option<&str>,
    retry_after_s: Option<u32>,
    body: &[u8],
) {
    let mut head = head_text(reply, status, content_type);
    head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    if let Some(allow) = allow {
        head.push_str(&format!("Allow: {allow}\r\n"));
    }
    if status == 401 {
        // Such an answer has to say how one proves who one is: by being a process that the kernel can name.
        head.push_str("WWW-Authenticate: Peer-Credentials\r\n");
    }
    if let Some(seconds) = retry_after_s {
        head.push_str(&format!("Retry-After: {seconds}\r\n"));
    }
    head.push_str("\r\n");
    out.extend_from_slice(head.as_bytes());
    if !reply.head_only {
        out.extend_from_slice(body);
    }
}

/// Appends the interim answer to `Expect: 100-continue`.
pub fn write_continue(out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
}

/// Appends the head of an event stream; [`write_event`] and [`end_events`] follow.
pub fn begin_events(out: &mut Vec<u8>, reply: Reply) {
    let mut head = head_text(reply, 200, "text/event-stream");
    head.push_str("Cache-Control: no-cache\r\n");
    if reply.chunked {
        head.push_str("Transfer-Encoding: chunked\r\n");
    }
    head.push_str("\r\n");
    out.extend_from_slice(head.as_bytes());
}

/// Appends one server-sent event, as one chunk. `data` is one line.
pub fn write_event(out: &mut Vec<u8>, reply: Reply, data: &str) {
    let framing = "data: ".len() + "\n\n".len();
    if reply.chunked {
        // Writing to a `Vec` cannot fail.
        let _ = write!(out, "{:x}\r\n", data.len() + framing);
    }
    let _ = write!(out, "data: {data}\n\n");
    if reply.chunked {
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends the end of an event stream's body.
pub fn end_events(out: &mut Vec<u8>, reply: Reply) {
    if reply.chunked {
        out.extend_from_slice(b"0\r\n\r\n");
    }
}

fn head_text(reply: Reply, status: u16, content_type: &str) -> String {
    let connection = if reply.keep_alive { "keep-alive" } else { "close" };
    format!("HTTP/1.1 {status} {}\r\nContent-Type: {content_type}\r\nConnection: {connection}\r\n", reason(status))
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ if status < 500 => "Error",
        _ => "Internal Server Error",
    }
}
