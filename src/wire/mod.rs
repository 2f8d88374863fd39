//! What peers say, as bytes, and what it means: HTTP/1.1 with the OpenAI API ([`http`], [`openai`]) and the serial
//! line's protocol ([`mod@line`]). Both end in the same [`GenerateRequest`]. Pure: no descriptor, no clock, no model.
//! Next on the data's way: `serve`, which turns a request into a job for the engine.

pub mod http;
pub mod line;
pub mod openai;
pub mod request;

use serde::Serialize;
use serde_json::{Value, json};

/// One turn of a conversation, as chat templates see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of the person's.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user", content: content.into() }
    }

    /// A turn of the model's.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant", content: content.into() }
    }

    /// The instruction that stands before the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system", content: content.into() }
    }
}

/// What the model is to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A conversation, rendered through the model's chat template. At least one message.
    Chat(Vec<Message>),
    /// Text as it stands, not empty.
    Text(String),
    /// Token ids, at least one; not yet checked against the vocabulary.
    Tokens(Vec<u32>),
}

/// What an answer has to follow.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// A JSON schema; an object, or true.
    JsonSchema(Value),
    /// A grammar in llguidance's variant of Lark's notation.
    Lark(String),
}

impl Constraint {
    /// The field that names it.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "response_format",
            Self::Lark(_) => "grammar",
        }
    }
}

/// The sampling fields a request named; the rest come from the configuration.
/// Ranges are those of `engine::sampler::SamplingParams` and have been checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingFields {
    /// In [0, 2]; 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// In (0, 10].
    pub repetition_penalty: Option<f32>,
    /// In [-2, 2].
    pub frequency_penalty: Option<f32>,
    /// In [-2, 2].
    pub presence_penalty: Option<f32>,
    /// Tokens back; -1 in a request is all.
    pub repeat_last_n: Option<usize>,
    /// In (0, 1].
    pub typical_p: Option<f32>,
    /// In [0, 1].
    pub xtc_probability: Option<f32>,
    /// In [0, 1].
    pub xtc_threshold: Option<f32>,
    /// In [0, 100].
    pub dry_multiplier: Option<f32>,
    /// In [1, 10].
    pub dry_base: Option<f32>,
    /// Tokens.
    pub dry_allowed_length: Option<usize>,
    /// Tokens back; -1 in a request is all.
    pub dry_penalty_last_n: Option<usize>,
    /// 0, 1 or 2.
    pub mirostat: Option<u8>,
    /// In [0, 20].
    pub mirostat_tau: Option<f32>,
    /// In [0, 1].
    pub mirostat_eta: Option<f32>,
    /// In [0, 2].
    pub dynatemp_range: Option<f32>,
    /// In (0, 10].
    pub dynatemp_exponent: Option<f32>,
    /// Token ids, not yet checked against the vocabulary, each with a bias in [-100, 100].
    pub logit_bias: Vec<(u32, f32)>,
    /// Negative seeds keep their two's complement bits.
    pub seed: Option<u64>,
}

/// A request for text, from either protocol, with every range checked.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// How to choose tokens.
    pub sampling: SamplingFields,
    /// At least 1; `None`: up to the context's end.
    pub max_tokens: Option<usize>,
    /// The answer ends before the first of these. None is empty.
    pub stop: Vec<String>,
    /// Send the answer piece by piece.
    pub stream: bool,
    /// Close a stream with a chunk that carries the usage.
    pub include_usage: bool,
    /// Report the hash over the logits of every generated step.
    pub logits_hash: bool,
    /// Answers to the same prompt, at least 1; each has the next seed.
    pub n: usize,
    /// Tell the log probability of each token, and those of so many likeliest at its place.
    pub logprobs: Option<usize>,
    /// Go on past end-of-generation tokens; not together with a constraint.
    pub ignore_eos: bool,
    /// What the answer has to follow.
    pub constraint: Option<Constraint>,
    /// Today's date for templates that print one, `2026-11-23`, maybe with a time. The clock is never asked.
    pub date: Option<String>,
}

impl GenerateRequest {
    /// A request with no field but its prompt.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            sampling: SamplingFields::default(),
            max_tokens: None,
            stop: Vec::new(),
            stream: false,
            include_usage: false,
            logits_hash: false,
            n: 1,
            logprobs: None,
            ignore_eos: false,
            constraint: None,
            date: None,
        }
    }
}

/// One text to be embedded.
#[derive(Clone, Debug, PartialEq)]
pub enum EmbedInput {
    /// A text, not empty.
    Text(String),
    /// Token ids, at least one; not yet checked against the vocabulary.
    Tokens(Vec<u32>),
}

/// Which of a text's hidden states make its embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EmbedPooling {
    /// Their mean.
    #[default]
    Mean,
    /// The last token's.
    Last,
    /// The first token's.
    Cls,
}

/// A request for embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedRequest {
    /// At least one.
    pub inputs: Vec<EmbedInput>,
    /// hearth's own.
    pub pooling: EmbedPooling,
    /// Numbers as little-endian f32 in base64, and not as JSON.
    pub base64: bool,
    /// Only the first so many; at least 1.
    pub dimensions: Option<usize>,
}

/// A token of an answer with its log probability, and the likeliest at its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// The token's bytes; they need not be whole characters.
    pub bytes: Vec<u8>,
    /// Natural logarithm.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(Vec<u8>, f32)>,
}

/// Bytes that a token with its log probability takes in an answer, beside its text: names, number, brackets.
const LOGPROB_JSON_BYTES: usize = 96;
/// Bytes that a byte of a token takes there: escaped as text, and as a number in the list of bytes.
const LOGPROB_BYTES_A_BYTE: usize = 10;

impl Logprob {
    /// Bytes that it takes in an answer, at most.
    pub fn cost(&self) -> usize {
        let one = |bytes: &[u8]| LOGPROB_JSON_BYTES + LOGPROB_BYTES_A_BYTE * bytes.len();
        one(&self.bytes) + self.top.iter().map(|(bytes, _)| one(bytes)).sum::<usize>()
    }
}

/// How an answer ended, in the API's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop string was found.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// Cut short by the person at the serial line. HTTP has no such reason: a client that goes away gets nothing.
    Cancelled,
}

impl Finish {
    /// The value of `finish_reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        }
    }
}

/// Tokens read and written by one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, those of a stop string included.
    pub completion_tokens: usize,
    /// Tokens of the prompt whose keys and values were there already.
    pub cached_tokens: usize,
}

impl Usage {
    /// The `usage` object.
    pub fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens.saturating_add(self.completion_tokens),
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// How one answer ended and what it cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Why it ended.
    pub finish: Finish,
    /// What it cost.
    pub usage: Usage,
    /// Where the request asked for it: over the logits of every step up to the one that ended the answer (with a stop string, the
    /// one whose token completed it).
    pub logits_hash: Option<u64>,
}

/// The hash as every interface prints it: 16 hexadecimal digits.
pub fn hash_text(hash: u64) -> String {
    format!("{hash:016x}")
}

/// How far a model was compared with its hashes, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelCheck {
    /// Bytes compared.
    pub done_bytes: u64,
    /// Of so many.
    pub bytes: u64,
    /// All of it was.
    pub is_over: bool,
    /// Parts that are not what was packed, by name.
    pub damaged: Vec<String>,
}

impl ModelCheck {
    /// In one word.
    pub fn word(&self) -> &'static str {
        match (self.damaged.is_empty(), self.is_over) {
            (false, _) => "damaged",
            (true, true) => "whole",
            (true, false) => "checking",
        }
    }
}

/// What `/health` and `/status` tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The model's name.
    pub model: String,
    /// Positions a sequence may have.
    pub context_tokens: usize,
    /// Requests handed to the engine and not yet answered.
    pub active: usize,
    /// Of these, requests the engine has not taken yet.
    pub waiting: usize,
    /// Seconds since the daemon became ready.
    pub uptime_s: u64,
    /// Whether a shutdown has begun.
    pub draining: bool,
    /// Failures of the appliance on record, the newest last; none where nothing records them.
    pub failures: Vec<String>,
    /// The comparison of the model with its hashes; `None`: it has none, or was checked before.
    pub check: Option<ModelCheck>,
    /// What each app on the appliance does.
    pub apps: Vec<String>,
    /// Blocks of keys and values that hold nothing.
    pub kv_free: usize,
    /// Blocks that conversations use, or that are pinned.
    pub kv_used: usize,
    /// Blocks kept for prompts that begin with the same, free as soon as they are wanted.
    pub kv_cached: usize,
}

/// Why a request is not served: the peer's fault (4xx) or ours (5xx). Never carries a word of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Reject {
    /// HTTP status.
    pub status: u16,
    /// OpenAI's error type.
    pub kind: &'static str,
    /// OpenAI's error code, where there is one.
    pub code: Option<&'static str>,
    /// What is wrong and what would be right.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// Methods the path takes (405).
    pub allow: Option<&'static str>,
    /// Seconds after which another try makes sense (429, 503).
    pub retry_after_s: Option<u32>,
}

impl Reject {
    /// A fault of the peer's, with the HTTP status to answer.
    pub fn request(status: u16, message: impl Into<String>) -> Self {
        Self {
            status,
            kind: "invalid_request_error",
            code: None,
            message: message.into(),
            param: None,
            allow: None,
            retry_after_s: None,
        }
    }

    /// A field with a wrong value (400).
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::request(400, message) }
    }

    /// A field this server knows and does not serve (400, code `unsupported_parameter`).
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// Every place is taken (429).
    pub fn busy() -> Self {
        Self {
            kind: "rate_limit_error",
            code: Some("busy"),
            retry_after_s: Some(RETRY_AFTER_S),
            ..Self::request(429, "every place in the queue is taken; try again in a moment")
        }
    }

    /// Nobody knows who asks (401).
    pub fn unknown_peer(message: impl Into<String>) -> Self {
        Self { kind: "authentication_error", code: Some("unknown_peer"), ..Self::request(401, message) }
    }

    /// Who asks may not (403).
    pub fn not_allowed(message: impl Into<String>) -> Self {
        Self { kind: "permission_error", code: Some("not_allowed"), ..Self::request(403, message) }
    }

    /// Who asks has what they may have (429), and may try again after so many seconds.
    pub fn over_limit(code: &'static str, message: impl Into<String>, retry_after_s: u32) -> Self {
        let refusal = Self::request(429, message);
        Self { kind: "rate_limit_error", code: Some(code), retry_after_s: Some(retry_after_s), ..refusal }
    }

    /// The daemon is stopping or has no connection left (503).
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            kind: "server_error",
            code: Some("unavailable"),
            retry_after_s: Some(RETRY_AFTER_S),
            ..Self::request(503, message)
        }
    }

    /// A fault of the server's (500).
    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: "server_error", code: Some("internal_error"), ..Self::request(500, message) }
    }

    /// The prompt leaves no position to generate (400, code `context_length_exceeded`).
    pub fn context_exceeded(prompt_tokens: usize, context_tokens: usize, param: &str) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field(
                param,
                format!(
                    "the prompt has {prompt_tokens} tokens and the context {context_tokens}: at most {} leave room \
                     for an answer",
                    context_tokens.saturating_sub(1)
                ),
            )
        }
    }

    /// Adds the code.
    #[must_use]
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// OpenAI's error object: `{"error":{"message","type","param","code"}}`.
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// `Retry-After` of 429 and 503, in seconds.
pub const RETRY_AFTER_S: u32 = 1;
