//! The serial line's protocol: a person types a line and reads the answer as it comes; a program sends a JSON object a
//! line and reads JSON lines. A pure state machine: [`LineProtocol::push`] takes bytes, [`LineProtocol::next_event`]
//! says what they ask for, and the answers' bytes are appended to a buffer. Next on the data's way: `serve`.
//!
//! A line that starts with `{` is a program's: it is not echoed, and from then on there is no prompt and errors are JSON,
//! until somebody types anything else. A line that is too long or is not text is dropped to its end and answered with one
//! error line; nothing in it can reach the line after it. While an answer runs, input waits; only ^C is looked for, also in
//! what came together with the question. It takes what waits in front of it along; what stands behind it is kept in order.

mod edit;

use std::collections::VecDeque;

use serde_json::json;

use self::edit::{Editor, Key, KeyDecoder, write_for_terminal};
use super::request::{self, Kind};
use super::{Finish, GenerateRequest, Message, Outcome, Prompt, Reject, Status, hash_text};

#[cfg(test)]
mod tests;

/// A line typed by a person, in bytes.
pub const MAX_TYPED_BYTES: usize = 4 * 1024;
/// A program's JSON line, in bytes.
pub const MAX_JSON_LINE_BYTES: usize = 64 * 1024;
/// Input that may wait while an answer runs, in bytes.
pub const MAX_PENDING_BYTES: usize = 2 * MAX_JSON_LINE_BYTES;
/// What waits to be told at most; more is in the log.
pub const MAX_NOTICES: usize = 4;
/// What the line holds at most beside the conversation, in bytes; lists that grow take up to twice what is in them.
pub const MAX_HELD_BYTES: usize =
    2 * (MAX_PENDING_BYTES + MAX_JSON_LINE_BYTES) + 2 * (edit::MAX_HISTORY_LINES + 2) * MAX_TYPED_BYTES;

/// What the line asks the daemon for.
#[derive(Clone, Debug, PartialEq)]
pub enum LineEvent {
    /// An answer: call [`LineProtocol::delta`] and then [`LineProtocol::finish`], or [`LineProtocol::reject`].
    Ask(Box<GenerateRequest>),
    /// ^C: the running answer is not wanted any more; it still has to be finished.
    Cancel,
    /// Call [`LineProtocol::status`].
    Status,
    /// What apps wrote last; call [`LineProtocol::say`].
    Log,
    /// Switch the machine off; call [`LineProtocol::say`].
    PowerOff,
    /// Start the machine again; call [`LineProtocol::say`].
    Reboot,
    /// Print when what happened at the start; call [`LineProtocol::say`].
    BootReport,
    /// Print what is set on the console; call [`LineProtocol::say`].
    Settings,
    /// Keep a setting over a restart: what stands behind `/set`. Nothing that is typed is looked at until [`LineProtocol::say`] says how it went.
    Set(String),
    /// Check the machine. Nothing that is typed is looked at until [`LineProtocol::say`] or [`LineProtocol::resume`] is called: somebody
    /// else speaks on the line.
    Selftest,
}

/// The state of one serial line.
#[derive(Debug)]
pub struct LineProtocol {
    model: String,
    /// Who is at the other end, as far as the last line told.
    peer: Peer,
    pending: VecDeque<u8>,
    /// Input was lost because too much waited; skipping to the next line's start.
    overrun: Overrun,
    after_cr: bool,
    line: Line,
    keys: KeyDecoder,
    editor: Editor,
    settings: Settings,
    conversation: Vec<Message>,
    answer: Option<Answer>,
    /// Somebody else speaks on the line.
    waits: bool,
    /// What a person should know and was not told yet.
    notices: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Person,
    Program,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overrun {
    None,
    /// Bytes are dropped up to the next line's end.
    Skipping,
    /// An error line is due.
    Due,
}

/// The line that is coming in.
#[derive(Debug)]
enum Line {
    /// Nothing of it yet, or nothing left of it.
    Empty,
    Typed,
    Json(Vec<u8>),
    Dropped(Reject),
}

/// What a person set with commands.
#[derive(Debug, Default)]
struct Settings {
    temperature: Option<f32>,
    seed: Option<u64>,
    max_tokens: Option<usize>,
    system: Option<String>,
}

/// The answer that runs.
#[derive(Debug)]
struct Answer {
    peer: Peer,
    stream: bool,
    text: String,
    /// The terminal's cursor stands at a line's start.
    at_line_start: bool,
    cancel_due: bool,
}

impl LineProtocol {
    /// A line that nothing was said on yet.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            peer: Peer::Person,
            pending: VecDeque::new(),
            overrun: Overrun::None,
            after_cr: false,
            line: Line::Empty,
            keys: KeyDecoder::default(),
            editor: Editor::default(),
            settings: Settings::default(),
            conversation: Vec::new(),
            answer: None,
            waits: false,
            notices: Vec::new(),
        }
    }

    /// Says who is here; once, when the line was opened.
    pub fn greet(&self, out: &mut Vec<u8>) {
        line_out(out, &format!("hearth: {}. /help lists the commands.", self.model));
        out.extend_from_slice(PROMPT);
    }

    /// Whether the running answer is kept to its end: a person's becomes part of the conversation, a program's may be sent whole.
    pub fn keeps_answer(&self) -> bool {
        self.answer.as_ref().is_some_and(|answer| answer.peer == Peer::Person || !answer.stream)
    }

    /// Takes what was read. Call [`LineProtocol::next_event`] until it gives nothing.
    pub fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == INTERRUPT
                && let Some(answer) = &mut self.answer
            {
                answer.cancel_due = true;
                self.pending.clear();
                self.overrun = Overrun::None;
                self.after_cr = false;
            } else if self.overrun == Overrun::Skipping {
                if is_line_end(byte) {
                    self.overrun = Overrun::Due;
                }
            } else if self.pending.len() < MAX_PENDING_BYTES {
                self.pending.push_back(byte);
            } else {
                let whole_lines = self.pending.iter().rposition(|&b| is_line_end(b)).map_or(0, |at| at + 1);
                self.pending.truncate(whole_lines);
                self.overrun = if is_line_end(byte) { Overrun::Due } else { Overrun::Skipping };
            }
        }
    }

    /// What the input asks for next; echo and complaints go to `out`.
    pub fn next_event(&mut self, out: &mut Vec<u8>) -> Option<LineEvent> {
        if let Some(answer) = &mut self.answer {
            return std::mem::take(&mut answer.cancel_due).then_some(LineEvent::Cancel);
        }
        if self.waits {
            return None;
        }
        while let Some(byte) = self.pending.pop_front() {
            if let Some(event) = self.byte(byte, out) {
                return Some(event);
            }
        }
        if self.overrun == Overrun::Due {
            self.overrun = Overrun::None;
            let lost = format!("input was lost: more than {MAX_PENDING_BYTES} bytes came while an answer ran");
            self.complain(&Reject::request(400, lost).with_code("input_overrun"), out);
        }
        self.tell_notices(out);
        None
    }

    /// The next piece of the answer.
    pub fn delta(&mut self, text: &str, out: &mut Vec<u8>) {
        let Some(answer) = &mut self.answer else {
            return;
        };
        if text.is_empty() {
            return;
        }
        match answer.peer {
            Peer::Person => {
                write_for_terminal(text, out);
                answer.at_line_start = text.ends_with('\n');
                answer.text.push_str(text);
            }
            Peer::Program if answer.stream => json_out(out, &json!({"delta": text})),
            Peer::Program => answer.text.push_str(text),
        }
    }

    /// The answer's end.
    pub fn finish(&mut self, outcome: &Outcome, out: &mut Vec<u8>) {
        let Some(answer) = self.answer.take() else {
            return;
        };
        match answer.peer {
            Peer::Person => {
                if !answer.at_line_start {
                    out.extend_from_slice(b"\r\n");
                }
                match outcome.finish {
                    Finish::Stop => {}
                    Finish::Length => {
                        line_out(out, &format!("[cut after {} tokens]", outcome.usage.completion_tokens));
                    }
                    Finish::Cancelled => line_out(out, "^C"),
                }
                if answer.text.is_empty() {
                    self.conversation.pop();
                } else {
                    self.conversation.push(Message::assistant(answer.text));
                }
                out.extend_from_slice(PROMPT);
            }
            Peer::Program => {
                let mut last = json!({"done": true});
                if !answer.stream {
                    last["text"] = answer.text.into();
                }
                last["finish_reason"] = outcome.finish.as_str().into();
                last["usage"] = outcome.usage.to_json();
                if let Some(hash) = outcome.logits_hash {
                    last["logits_hash"] = hash_text(hash).into();
                }
                json_out(out, &last);
            }
        }
    }

    /// The answer cannot be given, or not to its end.
    pub fn reject(&mut self, reject: &Reject, out: &mut Vec<u8>) {
        let Some(answer) = self.answer.take() else {
            return;
        };
        if answer.peer == Peer::Person {
            if !answer.at_line_start {
                out.extend_from_slice(b"\r\n");
            }
            self.conversation.pop();
        }
        self.complain(reject, out);
    }

    /// The answer to [`LineEvent::Status`].
    pub fn status(&self, status: &Status, out: &mut Vec<u8>) {
        line_out(out, &format!("model     {}", status.model));
        line_out(out, &format!("context   {} tokens", status.context_tokens));
        line_out(out, &format!("requests  {} active, {} of them waiting", status.active, status.waiting));
        line_out(out, &format!("up        {} s", status.uptime_s));
        line_out(out, &format!("talk      {} messages", self.conversation.len()));
        if let Some(check) = &status.check {
            let (done, bytes) = (check.done_bytes >> 20, check.bytes >> 20);
            line_out(out, &format!("check     {}, {done} of {bytes} MiB compared with their hashes", check.word()));
            check.damaged.iter().for_each(|part| line_out(out, &format!("damaged   {part}")));
        }
        for failure in &status.failures {
            line_out(out, &format!("failure   {failure}"));
        }
        for app in &status.apps {
            line_out(out, &format!("app       {app}"));
        }
        if status.draining {
            line_out(out, "stopping");
        }
        out.extend_from_slice(PROMPT);
    }

    /// What the daemon has to say to a command, and the next prompt.
    pub fn say(&mut self, text: &str, out: &mut Vec<u8>) {
        line_out(out, text);
        self.resume(out);
    }

    /// Something that a person at the line should know, whatever they do: told when the line is at rest.
    pub fn notice(&mut self, text: String) {
        if self.notices.len() < MAX_NOTICES {
            self.notices.push(text);
        }
    }

    /// Tells a person what waits to be told; a program asks for it.
    fn tell_notices(&mut self, out: &mut Vec<u8>) {
        let at_rest =
            self.peer == Peer::Person && matches!(self.line, Line::Empty) && self.answer.is_none() && !self.waits;
        if at_rest && !self.notices.is_empty() {
            out.extend_from_slice(b"\r\n");
            self.notices.drain(..).for_each(|text| line_out(out, &text));
            out.extend_from_slice(PROMPT);
        }
    }

    /// Whoever else spoke on the line is done: the next prompt.
    pub fn resume(&mut self, out: &mut Vec<u8>) {
        self.waits = false;
        out.extend_from_slice(PROMPT);
    }

    fn byte(&mut self, byte: u8, out: &mut Vec<u8>) -> Option<LineEvent> {
        let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
        if byte == b'\n' && after_cr {
            return None;
        }
        match &mut self.line {
            Line::Empty if byte == b'{' => {
                if self.peer == Peer::Person {
                    out.extend_from_slice(b"\r\n");
                }
                self.peer = Peer::Program;
                self.line = Line::Json(vec![byte]);
                None
            }
            Line::Empty | Line::Typed => self.typed(byte, out),
            Line::Json(json) => {
                if byte == INTERRUPT {
                    self.line = Line::Empty;
                } else if is_line_end(byte) {
                    let json = std::mem::take(json);
                    self.line = Line::Empty;
                    return self.json_line(&json, out);
                } else if json.len() < MAX_JSON_LINE_BYTES {
                    json.push(byte);
                } else {
                    self.line = Line::Dropped(line_too_long(MAX_JSON_LINE_BYTES));
                }
                None
            }
            Line::Dropped(why) => {
                if is_line_end(byte) || byte == INTERRUPT {
                    let why = why.clone();
                    self.line = Line::Empty;
                    self.complain(&why, out);
                }
                None
            }
        }
    }

    fn typed(&mut self, byte: u8, out: &mut Vec<u8>) -> Option<LineEvent> {
        let key = self.keys.push(byte);
        if let Some(key) = key {
            match key {
                Key::Enter => return self.entered(out),
                Key::Interrupt => {
                    self.drop_typed();
                    self.peer = Peer::Person;
                    line_out(out, "^C");
                    out.extend_from_slice(PROMPT);
                    return None;
                }
                Key::Noise(byte) => {
                    self.drop_typed();
                    let why = format!("the line was dropped: byte 0x{byte:02x} does not belong to text in UTF-8");
                    self.line = Line::Dropped(Reject::request(400, why).with_code("not_text"));
                    // The noise may have been the line's end itself, in the middle of a character.
                    return if is_line_end(byte) { self.byte_again(byte, out) } else { None };
                }
                Key::Char(_) if self.editor.text().len() >= MAX_TYPED_BYTES => {
                    self.drop_typed();
                    out.push(BELL);
                    self.line = Line::Dropped(line_too_long(MAX_TYPED_BYTES));
                    return None;
                }
                key => {
                    if self.peer == Peer::Program && matches!(key, Key::Char(_)) {
                        self.peer = Peer::Person;
                        out.extend_from_slice(PROMPT);
                    }
                    if self.peer == Peer::Person {
                        self.editor.key(key, out);
                    }
                }
            }
        }
        self.line = if key.is_some() && self.editor.text().is_empty() { Line::Empty } else { Line::Typed };
        None
    }

    /// Feeds a line's end to a line that was just dropped.
    fn byte_again(&mut self, byte: u8, out: &mut Vec<u8>) -> Option<LineEvent> {
        self.after_cr = false;
        self.byte(byte, out)
    }

    fn drop_typed(&mut self) {
        self.keys.reset();
        self.editor.clear();
        self.line = Line::Empty;
    }

    fn entered(&mut self, out: &mut Vec<u8>) -> Option<LineEvent> {
        self.peer = Peer::Person;
        let text = self.editor.take();
        self.drop_typed();
        out.extend_from_slice(b"\r\n");
        let text = text.trim();
        if text.is_empty() {
            out.extend_from_slice(PROMPT);
            return None;
        }
        if let Some(command) = text.strip_prefix('/') {
            let (name, argument) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
            match name {
                "status" => return Some(LineEvent::Status),
                "log" => return Some(LineEvent::Log),
                "poweroff" => return Some(LineEvent::PowerOff),
                "reboot" => return Some(LineEvent::Reboot),
                "boot-report" => return Some(LineEvent::BootReport),
                "settings" => return Some(LineEvent::Settings),
                "set" => {
                    self.waits = true;
                    return Some(LineEvent::Set(argument.trim().to_owned()));
                }
                "selftest" => {
                    self.waits = true;
                    return Some(LineEvent::Selftest);
                }
                _ => {}
            }
            let said = self.command(name, argument.trim());
            line_out(out, &said);
            out.extend_from_slice(PROMPT);
            return None;
        }
        self.conversation.push(Message::user(text));
        let mut messages: Vec<Message> = self.settings.system.iter().map(Message::system).collect();
        messages.extend_from_slice(&self.conversation);
        let mut request = GenerateRequest::new(Prompt::Chat(messages));
        request.stream = true;
        request.sampling.temperature = self.settings.temperature;
        request.sampling.seed = self.settings.seed;
        request.max_tokens = self.settings.max_tokens;
        Some(self.ask(Peer::Person, request))
    }

    fn json_line(&mut self, json: &[u8], out: &mut Vec<u8>) -> Option<LineEvent> {
        match request::parse(json, Kind::Either, true) {
            Ok(request) => Some(self.ask(Peer::Program, request)),
            Err(reject) => {
                self.complain(&reject, out);
                None
            }
        }
    }

    fn ask(&mut self, peer: Peer, request: GenerateRequest) -> LineEvent {
        // The same as if it came now: how the bytes were cut into reads makes no difference.
        let interrupt = self.pending.iter().rposition(|&byte| byte == INTERRUPT);
        if let Some(at) = interrupt {
            self.pending.drain(..=at);
            self.after_cr = false;
        }
        let cancel_due = interrupt.is_some();
        self.answer =
            Some(Answer { peer, stream: request.stream, text: String::new(), at_line_start: true, cancel_due });
        LineEvent::Ask(Box::new(request))
    }

    /// Runs a command that needs nothing from outside; the answer is one or more lines.
    fn command(&mut self, name: &str, argument: &str) -> String {
        let settings = &mut self.settings;
        match (name, argument) {
            ("help", _) => HELP.to_owned(),
            ("reset", _) => {
                self.conversation.clear();
                "the conversation is forgotten".to_owned()
            }
            ("temp", "") => setting("temperature", settings.temperature.as_ref()),
            ("temp", value) => match value.parse::<f32>() {
                Ok(t) if (0.0..=2.0).contains(&t) => {
                    settings.temperature = Some(t);
                    setting("temperature", Some(&t))
                }
                _ => "/temp takes a number from 0 to 2".to_owned(),
            },
            ("seed", "") => setting("seed", settings.seed.as_ref()),
            ("seed", value) => match value.parse::<u64>() {
                Ok(seed) => {
                    settings.seed = Some(seed);
                    setting("seed", Some(&seed))
                }
                Err(_) => format!("/seed takes an integer from 0 to {}", u64::MAX),
            },
            ("max", "") => setting("answer length in tokens", settings.max_tokens.as_ref()),
            ("max", value) => match value.parse::<usize>() {
                Ok(max) if max > 0 => {
                    settings.max_tokens = Some(max);
                    setting("answer length in tokens", Some(&max))
                }
                _ => "/max takes an integer of at least 1".to_owned(),
            },
            ("system", "") => {
                settings.system = None;
                "no system message".to_owned()
            }
            ("system", text) => {
                settings.system = Some(text.to_owned());
                "system message set; /reset forgets what was said before it".to_owned()
            }
            _ => "no such command; /help lists them".to_owned(),
        }
    }

    fn complain(&self, reject: &Reject, out: &mut Vec<u8>) {
        match self.peer {
            Peer::Program => json_out(out, &reject.to_json()),
            Peer::Person => {
                // A line that was dropped midway still has its echo in front of the cursor.
                if !out.ends_with(b"\n") {
                    out.extend_from_slice(b"\r\n");
                }
                let hint = match reject.code {
                    Some("context_length_exceeded") => " (/reset forgets the conversation)",
                    _ => "",
                };
                let word = if reject.status == 429 { "busy" } else { "error" };
                line_out(out, &format!("{word}: {}{hint}", reject.message));
                out.extend_from_slice(PROMPT);
            }
        }
    }
}

/// What stands before a person's line.
const PROMPT: &[u8] = b"> ";
/// ^C.
const INTERRUPT: u8 = 0x03;
const BELL: u8 = 0x07;

const HELP: &str = "type a question and press Enter; ^C cancels an answer\n\
    /status       what the daemon does; /log shows what apps wrote last\n\
    /reset        forget the conversation\n\
    /temp 0.7     temperature, from 0 (always the same answer) to 2\n\
    /seed 1       seed of the draw\n\
    /max 200      answer length in tokens\n\
    /system TEXT  instruction before the conversation\n\
    /settings     what is kept over a restart; /set temperature 0.7, /set max_tokens 200 or default\n\
    /selftest     check the board; /boot-report tells when what happened at the start\n\
    /poweroff     switch the appliance off; /reboot starts it again\n\
    a line that starts with { is a JSON request, answered in JSON lines";

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

fn line_too_long(max: usize) -> Reject {
    Reject::request(400, format!("the line was dropped: it is longer than {max} bytes")).with_code("line_too_long")
}

fn setting<T: std::fmt::Display>(name: &str, value: Option<&T>) -> String {
    match value {
        Some(value) => format!("{name}: {value}"),
        None => format!("{name}: as configured"),
    }
}

fn line_out(out: &mut Vec<u8>, text: &str) {
    write_for_terminal(text, out);
    out.extend_from_slice(b"\r\n");
}

fn json_out(out: &mut Vec<u8>, value: &serde_json::Value) {
    out.extend_from_slice(value.to_string().as_bytes());
    out.push(b'\n');
}
