//! One request's answers as an HTTP response, whole or as events; with `n` over 1 several choices side by side.
//! Called by `serve::conn`; next on the data's way: `wire::http`.

use serde_json::{Value, json};

use super::{CREATED, Style};
use crate::wire::http::{self, Reply};
use crate::wire::{GenerateRequest, Logprob, Outcome, Reject, Usage, hash_text};

/// Writes one request's answers.
#[derive(Debug)]
pub struct Emitter {
    id: String,
    model: String,
    style: Style,
    reply: Reply,
    stream: bool,
    include_usage: bool,
    begun: bool,
    choices: Vec<Choice>,
}

/// One answer.
#[derive(Debug, Default)]
struct Choice {
    /// Its first chunk, with the role, is out.
    begun: bool,
    text: String,
    logprobs: Vec<Logprob>,
    /// Bytes of its text that are out, as offsets of completions count.
    offset: usize,
    outcome: Option<Outcome>,
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
            choices: (0..request.n).map(|_| Choice::default()).collect(),
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

    /// The next piece of an answer's text, and the log probabilities of its newest token; nothing is sent for nothing.
    pub fn delta(&mut self, index: usize, text: &str, logprob: Option<Logprob>, out: &mut Vec<u8>) {
        let Some(choice) = self.choices.get_mut(index) else { return };
        if !self.stream {
            choice.text.push_str(text);
            choice.logprobs.extend(logprob);
        } else if !text.is_empty() || logprob.is_some() {
            let offset = choice.offset;
            choice.offset += text.len();
            self.begin(index, out);
            let logprobs = self.logprobs_json(logprob.as_slice(), offset);
            let choice = match self.style {
                Style::Chat => {
                    json!({"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null})
                }
                Style::Completion => {
                    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null})
                }
            };
            let chunk = self.chunk(choice);
            http::write_event(out, self.reply, &chunk.to_string());
        }
    }

    /// An answer's end. True: it was the last one, and the response is whole.
    pub fn finish(&mut self, index: usize, outcome: &Outcome, out: &mut Vec<u8>) -> bool {
        if self.stream {
            self.begin(index, out);
            let reason = outcome.finish.as_str();
            let choice = match self.style {
                Style::Chat => {
                    json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason})
                }
                Style::Completion => {
                    json!({"index": index, "text": "", "logprobs": null, "finish_reason": reason})
                }
            };
            let mut last = self.chunk(choice);
            add_hash(&mut last, outcome);
            http::write_event(out, self.reply, &last.to_string());
        }
        if let Some(choice) = self.choices.get_mut(index) {
            choice.outcome = Some(*outcome);
        }
        if self.choices.iter().any(|choice| choice.outcome.is_none()) {
            return false;
        }
        if self.stream {
            if self.include_usage {
                let mut usage = self.object(self.chunk_name(), json!([]));
                usage["usage"] = self.usage().to_json();
                http::write_event(out, self.reply, &usage.to_string());
            }
            self.close(out);
        } else {
            self.write_whole(out);
        }
        true
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

    fn write_whole(&mut self, out: &mut Vec<u8>) {
        let mut choices = std::mem::take(&mut self.choices);
        let (mut list, mut first) = (Vec::with_capacity(choices.len()), None);
        let mut usage = Usage::default();
        for (index, choice) in choices.iter_mut().enumerate() {
            let text = std::mem::take(&mut choice.text);
            let logprobs = self.logprobs_json(&choice.logprobs, 0);
            choice.logprobs.clear();
            let Some(outcome) = choice.outcome else { continue };
            usage = with(usage, outcome.usage);
            first = first.or(Some(outcome));
            let reason = outcome.finish.as_str();
            list.push(match self.style {
                Style::Chat => json!({
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }),
                Style::Completion => {
                    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
                }
            });
        }
        let name = match self.style {
            Style::Chat => "chat.completion",
            Style::Completion => "text_completion",
        };
        let mut whole = self.object(name, Value::Array(list));
        whole["usage"] = usage.to_json();
        if let Some(outcome) = first {
            add_hash(&mut whole, &outcome);
        }
        http::write_json(out, self.reply, 200, &whole.to_string());
    }

    /// Of all answers; they share a prompt.
    fn usage(&self) -> Usage {
        self.choices.iter().filter_map(|choice| choice.outcome).fold(Usage::default(), |sum, one| with(sum, one.usage))
    }

    /// The `logprobs` of a choice: a list of tokens in chats, four lists in completions, whose texts begin at `offset`.
    fn logprobs_json(&self, tokens: &[Logprob], mut offset: usize) -> Value {
        if tokens.is_empty() {
            return Value::Null;
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if self.style == Style::Chat {
            let one = |bytes: &[u8], logprob: f32| json!({"token": text(bytes), "logprob": logprob, "bytes": bytes});
            let content: Vec<Value> = tokens
                .iter()
                .map(|token| {
                    let mut entry = one(&token.bytes, token.logprob);
                    entry["top_logprobs"] = token.top.iter().map(|(bytes, logprob)| one(bytes, *logprob)).collect();
                    entry
                })
                .collect();
            return json!({"content": content, "refusal": null});
        }
        let mut offsets = Vec::with_capacity(tokens.len());
        for token in tokens {
            offsets.push(offset);
            offset += token.bytes.len();
        }
        let top = |token: &Logprob| -> Value {
            token.top.iter().map(|(bytes, logprob)| (text(bytes), Value::from(*logprob))).collect::<Value>()
        };
        json!({
            "tokens": tokens.iter().map(|token| text(&token.bytes)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }

    fn begin(&mut self, index: usize, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.begun, true) {
            http::begin_events(out, self.reply);
        }
        let Some(choice) = self.choices.get_mut(index) else { return };
        if !std::mem::replace(&mut choice.begun, true) && self.style == Style::Chat {
            let choice = json!({
                "index": index,
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

fn with(sum: Usage, one: Usage) -> Usage {
    Usage {
        prompt_tokens: one.prompt_tokens,
        completion_tokens: sum.completion_tokens + one.completion_tokens,
        cached_tokens: sum.cached_tokens.max(one.cached_tokens),
    }
}

fn add_hash(object: &mut Value, outcome: &Outcome) {
    if let Some(hash) = outcome.logits_hash {
        object["hearth"] = json!({"logits_hash": hash_text(hash)});
    }
}
