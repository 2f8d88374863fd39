//! The OpenAI API's routes, requests and answers. [`route`] is the one place that knows the paths; [`Emitter`] writes
//! answers, whole or as events. Next on the data's way: `serve`, which runs a [`Call`].
//!
//! Where this server's answers differ from OpenAI's: `created` is always 0 (boards have no clock, and answers repeat);
//! `model` in a request is not looked at, since there is one model, and answers name it; the extra request fields
//! those of llama.cpp's samplers (`top_k`, `min_p`, `typical_p`, `xtc_probability`, `dry_multiplier`, `mirostat` and so on), `ignore_eos`,
//! `logits_hash` and `date` are read; answer `i` of `n` has the seed `seed + i`; an answer whose request said
//! `"logits_hash": true` carries `"hearth": {"logits_hash": "16 hex digits"}` beside its finish reason: xxh3-64 over the logits
//! of every step up to the one that ended the answer, a stop string's last token included.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde::Serialize;
use serde_json::{Value, json};

use super::http::Request;
use super::request::{self, Kind};
use super::{EmbedRequest, GenerateRequest, Reject, Status};

mod emitter;
#[cfg(test)]
mod tests;

pub use emitter::Emitter;

/// `created` of every object: the clock is never read.
const CREATED: u64 = 0;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// An answer from the model, in the API's style for it.
    Generate(Style, Box<GenerateRequest>),
    /// Vectors for texts.
    Embed(EmbedRequest),
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
    /// `GET /v1/plan`: every buffer of the memory plan.
    Plan,
    /// `POST /tokenize`.
    Tokenize {
        /// What is to become tokens.
        content: String,
        /// With those that the model wants in front.
        add_special: bool,
        /// Special tokens in the text count as such.
        parse_special: bool,
    },
    /// `POST /detokenize`: token ids, not yet checked against the vocabulary.
    Detokenize(Vec<u32>),
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
        ("POST", "/v1/embeddings") => Ok(Call::Embed(request::parse_embeddings(body)?)),
        ("GET" | "HEAD", "/v1/models") => Ok(Call::Models),
        ("GET" | "HEAD", "/health" | "/v1/health") => Ok(Call::Health),
        ("GET" | "HEAD", "/boot-report") => Ok(Call::BootReport),
        ("GET" | "HEAD", "/selftest") => Ok(Call::SelftestReport),
        ("POST", "/selftest") => Ok(Call::Selftest),
        ("GET" | "HEAD", "/metrics") => Ok(Call::Metrics),
        ("GET" | "HEAD", "/v1/plan") => Ok(Call::Plan),
        ("POST", "/tokenize") => {
            let (content, add_special, parse_special) = request::parse_tokenize(body)?;
            Ok(Call::Tokenize { content, add_special, parse_special })
        }
        ("POST", "/detokenize") => Ok(Call::Detokenize(request::parse_detokenize(body)?)),
        ("POST", "/poweroff") => Ok(Call::PowerOff),
        ("POST", "/reboot") => Ok(Call::Reboot),
        (method, path) => match (path, path.strip_prefix("/v1/models/")) {
            (
                "/v1/chat/completions" | "/v1/completions" | "/v1/embeddings" | "/tokenize" | "/detokenize" | "/poweroff" | "/reboot",
                _,
            ) => Err(wrong_method(path, "POST")),
            ("/v1/models" | "/v1/plan" | "/health" | "/v1/health" | "/boot-report" | "/metrics", _) => {
                Err(wrong_method(path, "GET, HEAD"))
            }
            ("/selftest", _) => Err(wrong_method(path, "GET, HEAD, POST")),
            (_, Some(name)) if !name.is_empty() => match method {
                "GET" | "HEAD" => Ok(Call::Model(percent_decoded(name))),
                _ => Err(wrong_method("/v1/models/NAME", "GET, HEAD")),
            },
            _ => Err(Reject::request(
                404,
                "no such path; there are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /v1/plan, /tokenize, /detokenize, \
                 /health and /metrics",
            )
            .with_code("unknown_url")),
        },
    }
}

fn generate(style: Style, kind: Kind, body: &[u8]) -> Result<Call, Reject> {
    Ok(Call::Generate(style, Box::new(request::parse(body, kind, false)?)))
}

/// A path's segment as it was meant: clients write blanks and the like as `%20`. What is no such sequence stays.
fn percent_decoded(segment: &str) -> String {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let hex = |at: usize| after.get(at).and_then(|&digit| char::from(digit).to_digit(16));
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(u8::try_from(high * 16 + low).unwrap_or_default());
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wrong_method(path: &str, allow: &'static str) -> Reject {
    Reject {
        allow: Some(allow),
        ..Reject::request(405, format!("{path} takes {allow}")).with_code("method_not_allowed")
    }
}

/// One vector in an answer.
#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Floats(&'a [f32]),
    Base64(String),
}

/// What `POST /v1/embeddings` answers, as text: `vectors` in the order of the inputs, whose tokens were `prompt_tokens`.
pub fn embeddings_text(model: &str, vectors: &[Vec<f32>], base64: bool, prompt_tokens: usize) -> String {
    #[derive(Serialize)]
    struct Entry<'a> {
        object: &'static str,
        index: usize,
        embedding: Vector<'a>,
    }
    #[derive(Serialize)]
    struct Answer<'a> {
        object: &'static str,
        data: Vec<Entry<'a>>,
        model: &'a str,
        usage: Value,
    }
    let coded = |vector: &[f32]| {
        let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
        BASE64_STANDARD.encode(bytes)
    };
    let embedding = |vector| if base64 { Vector::Base64(coded(vector)) } else { Vector::Floats(vector) };
    let entry = |(index, vector)| Entry { object: "embedding", index, embedding: embedding(vector) };
    let data = vectors.iter().map(Vec::as_slice).enumerate().map(entry).collect();
    let usage = json!({"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens});
    serde_json::to_string(&Answer { object: "list", data, model, usage }).unwrap_or_default()
}

/// Bytes of a vector's number in such an answer, at most.
pub const fn embedding_bytes(base64: bool) -> usize {
    // -1.2345678e-10 and a comma; or four thirds of four.
    if base64 { 6 } else { 15 }
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
