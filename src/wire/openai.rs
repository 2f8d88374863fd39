//! The OpenAI API's routes, requests and answers. [`route`] is the one place that knows the paths; [`Emitter`] writes
//! answers, whole or as events. Next on the data's way: `serve`, which runs a [`Call`].
//!
//! Where this server's answers differ from OpenAI's: `created` is always 0 (boards have no clock, and answers repeat);
//! `model` in a request is not looked at, since there is one model, and answers name it; the extra request fields
//! `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `logits_hash` and `date` are read; an answer whose request said
//! `"logits_hash": true` carries `"hearth": {"logits_hash": "16 hex digits"}` beside its finish reason: xxh3-64 over the logits
//! of every step up to the one that ended the answer, a stop string's last token included.

use serde_json::{Value, json};

use super::http::{Reply, Request};
use super::request::{self, Kind};
use super::{GenerateRequest, Outcome, Reject, Status, hash_text, http};

#[cfg(test)]
mod tests;

/// `created` of every object: the clock is never read.
const CREATED: u64 = 0;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// An answer from the model, in the API's style for it.
    Generate(Style, Box<GenerateRequest>),
    /// `GET /v1/models`.
    Models,
    /// `GET /v1/models/NAME`.
    Model(String),
    /// `GET /health`.
    Health,
    /// `GET /boot-report`: when what happened at the start.
    BootReport,
    /// `GET /selftest`: what the last self-test found.
    SelftestReport,
    /// `POST /selftest`: check the machine.
    Selftest,
    /// `GET /metrics`.
    Metrics,
    /// Switch the machine off.
    PowerOff,
    /// Start the machine again.
    Reboot,
}

/// Which of the two generating APIs was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

/// Reads a request's method, path and body.
///
/// # Errors
/// 404 and 405 with `Allow`; 400 with the field at fault.
pub fn route(request: &Request) -> Result<Call, Reject> {
    let body = request.body.as_slice();
    match (request.method.as_str(), request.path.as_str()) {
        ("POST", "/v1/chat/completions") => generate(Style::Chat, Kind::Chat, body),
        ("POST", "/v1/completions") => generate(Style::Completion, Kind::Completion, body),
        ("GET" | "HEAD", "/v1/models") => Ok(Call::Models),
        ("GET" | "HEAD", "/health") => Ok(Call::Health),
        ("GET" | "HEAD", "/boot-report") => Ok(Call::BootReport),
        ("GET" | "HEAD", "/selftest") => Ok(Call::SelftestReport),
        ("POST", "/selftest") => Ok(Call::Selftest),
        ("GET" | "HEAD", "/metrics") => Ok(Call::Metrics),
        ("POST", "/poweroff") => Ok(Call::PowerOff),
        ("POST", "/reboot") => Ok(Call::Reboot),
        (method, path) => match (path, path.strip_prefix("/v1/models/")) {
            ("/v1/chat/completions" | "/v1/completions" | "/poweroff" | "/reboot", _) => {
                Err(wrong_method(path, "POST"))
            }
            ("/v1/models" | "/health" | "/boot-report" | "/metrics", _) => Err(wrong_method(path, "GET, HEAD")),
            ("/selftest", _) => Err(wrong_method(path, "GET, HEAD, POST")),
            (_, Some(name)) if !name.is_empty() => match method {
                "GET" | "HEAD" => Ok(Call::Model(name.to_owned())),
                _ => Err(wrong_method("/v1/models/NAME", "GET, HEAD")),
            },
            _ => Err(Reject::request(
                404,
                "no such path; there are /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics",
            )
            .with_code("unknown_url")),
        },
    }
}

fn generate(style: Style, kind: Kind, body: &[u8]) -> Result<Call, Reject> {
    Ok(Call::Generate(style, Box::new(request::parse(body, kind, false)?)))
}

fn wrong_method(path: &str, allow: &'static str) -> Reject {
    Reject {
        allow: Some(allow),
        ..Reject::request(405, format!("{path} takes {allow}")).with_code("method_not_allowed")
    }
}

/// `GET /v1/models`.
pub fn models_json(model: &str) -> Value {
    json!({"object": "list", "data": [model_json(model)]})
}

/// One entry of `GET /v1/models`.
pub fn model_json(model: &str) -> Value {
    json!({"id": model, "object": "model", "created": CREATED, "owned_by": "hearth"})
}

/// `GET /v1/models/NAME` for a name that is not the model's.
pub fn no_such_model(model: &str) -> Reject {
    Reject::request(404, format!("no such model; the one loaded here is \"{model}\"")).with_code("model_not_found")
}

/// `GET /health`.
pub fn health_json(status: &Status) -> Value {
    json!({
        "status": if status.draining { "draining" } else { "ok" },
        "model": status.model,
        "context_tokens": status.context_tokens,
        "active": status.active,
        "waiting": status.waiting,
        "uptime_s": status.uptime_s,
        "failures": status.failures,
        "model_check": status.check.as_ref().map(|check| json!({
            "state": check.word(), "done_bytes": check.done_bytes, "bytes": check.bytes, "damaged": check.damaged,
        })),
        "apps": status.apps,
        "kv_blocks": {"free": status.kv_free, "used": status.kv_used, "cached": status.kv_cached},
    })
}

/// Writes one request's answer as an HTTP response, whole or as events.
#[derive(Debug)]
pub struct Emitter {
    id: String,
    model: String,
    style: Style,
    reply: Reply,
    stream: bool,
    include_usage: bool,
    begun: bool,
    text: String,
}

impl Emitter {
    /// For the request numbered `number`.
    pub fn new(number: u64, model: &str, style: Style, reply: Reply, request: &GenerateRequest) -> Self {
        let prefix = match style {
            Style::Chat => "chatcmpl",
            Style::Completion => "cmpl",
        };
        Self {
            id: format!("{prefix}-{number}"),
            model: model.to_owned(),
            style,
            reply,
            stream: request.stream,
            include_usage: request.include_usage,
            begun: false,
            text: String::new(),
        }
    }

    /// The framing this answer was asked in.
    pub fn reply(&self) -> Reply {
        self.reply
    }

    /// Whether the answer goes out piece by piece.
    pub fn is_stream(&self) -> bool {
        self.stream
    }

    /// The next piece of the answer's text; nothing is sent for an empty one.
    pub fn delta(&mut self, text: &str, out: &mut Vec<u8>) {
        if !self.stream {
            self.text.push_str(text);
        } else if !text.is_empty() {
            self.begin(out);
            let choice = match self.style {
                Style::Chat => {
                    json!({"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": null})
                }
                Style::Completion => {
                    json!({"index": 0, "text": text, "logprobs": null, "finish_reason": null})
                }
            };
            let chunk = self.chunk(choice);
            http::write_event(out, self.reply, &chunk.to_string());
        }
    }

    /// The answer's end.
    pub fn finish(&mut self, outcome: &Outcome, out: &mut Vec<u8>) {
        let reason = outcome.finish.as_str();
        if self.stream {
            self.begin(out);
            let choice = match self.style {
                Style::Chat => {
                    json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": reason})
                }
                Style::Completion => {
                    json!({"index": 0, "text": "", "logprobs": null, "finish_reason": reason})
                }
            };
            let mut last = self.chunk(choice);
            add_hash(&mut last, outcome);
            http::write_event(out, self.reply, &last.to_string());
            if self.include_usage {
                let mut usage = self.object(self.chunk_name(), json!([]));
                usage["usage"] = outcome.usage.to_json();
                http::write_event(out, self.reply, &usage.to_string());
            }
            self.close(out);
        } else {
            let text = std::mem::take(&mut self.text);
            let (name, choice) = match self.style {
                Style::Chat => (
                    "chat.completion",
                    json!({
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "logprobs": null,
                        "finish_reason": reason,
                    }),
                ),
                Style::Completion => {
                    ("text_completion", json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason}))
                }
            };
            let mut whole = self.object(name, json!([choice]));
            whole["usage"] = outcome.usage.to_json();
            add_hash(&mut whole, outcome);
            http::write_json(out, self.reply, 200, &whole.to_string());
        }
    }

    /// The answer cannot be given, or not to its end.
    pub fn reject(&mut self, reject: &Reject, out: &mut Vec<u8>) {
        if self.begun {
            http::write_event(out, self.reply, &reject.to_json().to_string());
            self.close(out);
        } else {
            http::write_reject(out, self.reply, reject);
        }
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        http::begin_events(out, self.reply);
        if self.style == Style::Chat {
            let choice = json!({
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": null,
                "finish_reason": null,
            });
            http::write_event(out, self.reply, &self.chunk(choice).to_string());
        }
    }

    fn close(&self, out: &mut Vec<u8>) {
        http::write_event(out, self.reply, "[DONE]");
        http::end_events(out, self.reply);
    }

    fn chunk_name(&self) -> &'static str {
        match self.style {
            Style::Chat => "chat.completion.chunk",
            Style::Completion => "text_completion",
        }
    }

    /// One event's object. With `include_usage` every chunk but the last says `"usage": null`.
    fn chunk(&self, choice: Value) -> Value {
        let mut chunk = self.object(self.chunk_name(), json!([choice]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn object(&self, name: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": name, "created": CREATED, "model": self.model, "choices": choices})
    }
}

fn add_hash(object: &mut Value, outcome: &Outcome) {
    if let Some(hash) = outcome.logits_hash {
        object["hearth"] = json!({"logits_hash": hash_text(hash)});
    }
}
