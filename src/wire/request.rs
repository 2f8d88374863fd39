//! From a JSON object to a [`GenerateRequest`]: every field checked, with its name in the refusal. Shared by the HTTP
//! API and the serial line. Unknown fields are ignored; fields that would change the answer and are not served are refused.

use serde_json::{Map, Value, json};

use super::{
    Constraint, EmbedInput, EmbedPooling, EmbedRequest, GenerateRequest, Message, Prompt, Reject, SamplingFields,
};

/// Stop strings a request may name; `text::stop` takes as many.
pub const MAX_STOP_STRINGS: usize = 16;
/// Length of one stop string, in bytes; `text::stop` takes as much.
pub const MAX_STOP_BYTES: usize = 256;
/// Values in one request's JSON: token ids of a context of 32 Ki fit. In memory one takes about 100 bytes, so that an unbounded
/// count would take 60 times the body's length.
pub const MAX_JSON_VALUES: usize = 40_000;
/// What an array or an object counts for, in values: even with one value in it it has room for four.
pub const VALUES_PER_CONTAINER: usize = 4;
/// Messages of one conversation.
pub const MAX_MESSAGES: usize = 1024;
/// Answers to one prompt in one request.
pub const MAX_ANSWERS: usize = 8;
/// Tokens of one `logit_bias`.
pub const MAX_LOGIT_BIASES: usize = 1024;
/// Alternatives told of each token, at most; `engine::sampler` tells as many.
pub const MAX_TOP_LOGPROBS: i64 = 20;
/// Length of a `grammar`, in bytes; `text::constrain` takes as much.
pub const MAX_GRAMMAR_BYTES: usize = 16 * 1024;
/// Length of `date`, in bytes.
pub const MAX_DATE_BYTES: usize = 64;

/// Where the prompt is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `messages` is required.
    Chat,
    /// `prompt` is required.
    Completion,
    /// One of the two.
    Either,
}

/// Reads a request from the text of a JSON object.
///
/// # Errors
/// Not JSON, not an object, a field missing, of the wrong type, out of range, or not served.
pub(super) fn parse(body: &[u8], kind: Kind, stream_default: bool) -> Result<GenerateRequest, Reject> {
    fields(body)?.request(kind, stream_default)
}

/// What `/tokenize` asks: `content`, with the tokens that the model wants in front if `add_special`, and special tokens in the text
/// taken as such unless `parse_special` says no; in llama-server's shape.
pub(super) fn parse_tokenize(body: &[u8]) -> Result<(String, bool, bool), Reject> {
    let fields = fields(body)?;
    let Some(content) = fields.text("content", usize::MAX)? else {
        return Err(Reject::field("content", "`content` is required").with_code("missing_required_parameter"));
    };
    let flag = |name, default| Ok::<_, Reject>(fields.flag(name)?.unwrap_or(default));
    Ok((content, flag("add_special", false)?, flag("parse_special", true)?))
}

/// What `/detokenize` asks: `tokens`.
pub(super) fn parse_detokenize(body: &[u8]) -> Result<Vec<u32>, Reject> {
    let fields = fields(body)?;
    let wrong = || Reject::field("tokens", "`tokens` must be an array of token ids");
    match fields.get("tokens") {
        Some(Value::Array(list)) => {
            list.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect::<Option<_>>().ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

/// What `/v1/embeddings` asks.
pub(super) fn parse_embeddings(body: &[u8]) -> Result<EmbedRequest, Reject> {
    let mut fields = fields(body)?;
    let inputs = match fields.0.remove("input") {
        None | Some(Value::Null) => {
            return Err(Reject::field("input", "`input` is required").with_code("missing_required_parameter"));
        }
        Some(value) => embed_inputs(value)?,
    };
    fields.text("model", usize::MAX)?;
    fields.text("user", usize::MAX)?;
    let one_of = |name: &str, words: &[&str]| match fields.get(name).map(Value::as_str) {
        None => Ok(0),
        Some(word) => words.iter().position(|known| word == Some(known)).ok_or_else(|| {
            let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
            Reject::field(name, format!("`{name}` must be {}", words.join(" or ")))
        }),
    };
    let pooling = [EmbedPooling::Mean, EmbedPooling::Last, EmbedPooling::Cls];
    Ok(EmbedRequest {
        inputs,
        pooling: pooling[one_of("pooling", &["mean", "last", "cls"])?],
        base64: one_of("encoding_format", &["float", "base64"])? == 1,
        dimensions: fields.integer("dimensions", 1, i64::MAX)?.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
    })
}

fn embed_inputs(value: Value) -> Result<Vec<EmbedInput>, Reject> {
    let wrong = |why: &str| {
        let right = "`input` must be a string, an array of strings, an array of token ids, or an array of such arrays";
        Reject::field("input", format!("{right}: {why}"))
    };
    let tokens = |list: &[Value]| {
        let ids: Option<Vec<u32>> = list.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect();
        ids.filter(|ids| !ids.is_empty()).map(EmbedInput::Tokens).ok_or_else(|| wrong("an entry is no token id"))
    };
    let one = |value: Value| match value {
        Value::String(text) if text.is_empty() => Err(wrong("one is empty")),
        Value::String(text) => Ok(EmbedInput::Text(text)),
        Value::Array(list) => tokens(&list),
        _ => Err(wrong("an entry is neither")),
    };
    match value {
        Value::Array(list) if list.first().is_some_and(Value::is_number) => Ok(vec![tokens(&list)?]),
        Value::Array(list) if list.is_empty() => Err(wrong("it is empty")),
        Value::Array(list) => list.into_iter().map(one).collect(),
        value @ Value::String(_) => Ok(vec![one(value)?]),
        _ => Err(wrong("it is neither")),
    }
}

fn fields(body: &[u8]) -> Result<Fields, Reject> {
    let values = count_values(body);
    if values > MAX_JSON_VALUES {
        let many = format!("the request has {values} values, at most {MAX_JSON_VALUES} are read");
        return Err(Reject::request(413, many).with_code("too_many_values"));
    }
    // serde_json's own text may quote the input, so only its position is passed on.
    let value: Value = serde_json::from_slice(body).map_err(|e| {
        let what = if e.is_eof() { "ends too early" } else { "is not JSON" };
        Reject::request(400, format!("the request {what}: line {}, column {}", e.line(), e.column()))
            .with_code("invalid_json")
    })?;
    let Value::Object(object) = value else {
        return Err(Reject::request(400, "the request must be a JSON object").with_code("invalid_json"));
    };
    Ok(Fields(object))
}

/// Values of a JSON text, or more: what separates and opens them, outside of strings; containers count several times.
fn count_values(json: &[u8]) -> usize {
    let (mut in_string, mut escaped, mut count) = (false, false, 1);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' if !in_string => count += 1,
            b'[' | b'{' if !in_string => count += VALUES_PER_CONTAINER,
            _ => {}
        }
    }
    count
}

/// The object's fields; `null` counts as absent, as clients send it.
struct Fields(Map<String, Value>);

impl Fields {
    fn request(mut self, kind: Kind, stream_default: bool) -> Result<GenerateRequest, Reject> {
        self.refuse_unsupported()?;
        self.text("model", usize::MAX)?;
        let prompt = self.prompt(kind)?;
        self.text("user", usize::MAX)?;
        let stream = self.flag("stream")?.unwrap_or(stream_default);
        Ok(GenerateRequest {
            prompt,
            sampling: self.sampling()?,
            max_tokens: self.max_tokens()?,
            stop: self.stop()?,
            stream,
            include_usage: self.include_usage(stream)?,
            logits_hash: self.flag("logits_hash")?.unwrap_or(false),
            n: self.answers(kind)?,
            logprobs: self.logprobs(kind)?,
            ignore_eos: self.flag("ignore_eos")?.unwrap_or(false),
            constraint: self.constraint()?,
            date: self.text("date", MAX_DATE_BYTES)?,
        })
    }

    fn prompt(&mut self, kind: Kind) -> Result<Prompt, Reject> {
        let chat = match kind {
            Kind::Chat => true,
            Kind::Completion => false,
            Kind::Either => match (self.get("messages").is_some(), self.get("prompt").is_some()) {
                (true, true) => {
                    return Err(Reject::field("prompt", "give either `messages` or `prompt`, not both"));
                }
                (messages, _) => messages,
            },
        };
        let name = if chat { "messages" } else { "prompt" };
        match self.0.remove(name) {
            None | Some(Value::Null) => {
                let wanted = if kind == Kind::Either { "`messages` or `prompt`" } else { name };
                Err(Reject::field(name, format!("{wanted} is required")).with_code("missing_required_parameter"))
            }
            Some(value) if chat => messages(value),
            Some(value) => completion_prompt(value),
        }
    }

    fn sampling(&self) -> Result<SamplingFields, Reject> {
        Ok(SamplingFields {
            temperature: self.number("temperature", |v| (0.0..=2.0).contains(&v), "from 0 to 2")?,
            top_k: self.integer("top_k", 0, i64::from(u32::MAX))?.and_then(|k| u32::try_from(k).ok()),
            top_p: self.number("top_p", |v| v > 0.0 && v <= 1.0, "over 0, up to 1")?,
            min_p: self.number("min_p", |v| (0.0..=1.0).contains(&v), "from 0 to 1")?,
            repetition_penalty: self.repetition_penalty()?,
            frequency_penalty: self.number("frequency_penalty", |v| (-2.0..=2.0).contains(&v), "from -2 to 2")?,
            presence_penalty: self.number("presence_penalty", |v| (-2.0..=2.0).contains(&v), "from -2 to 2")?,
            repeat_last_n: self.tokens_back("repeat_last_n")?,
            typical_p: self.number("typical_p", |v| v > 0.0 && v <= 1.0, "over 0, up to 1")?,
            xtc_probability: self.number("xtc_probability", |v| (0.0..=1.0).contains(&v), "from 0 to 1")?,
            xtc_threshold: self.number("xtc_threshold", |v| (0.0..=1.0).contains(&v), "from 0 to 1")?,
            dry_multiplier: self.number("dry_multiplier", |v| (0.0..=100.0).contains(&v), "from 0 to 100")?,
            dry_base: self.number("dry_base", |v| (1.0..=10.0).contains(&v), "from 1 to 10")?,
            dry_allowed_length: self
                .integer("dry_allowed_length", 0, i64::from(u32::MAX))?
                .and_then(|n| usize::try_from(n).ok()),
            dry_penalty_last_n: self.tokens_back("dry_penalty_last_n")?,
            mirostat: self.integer("mirostat", 0, 2)?.and_then(|n| u8::try_from(n).ok()),
            mirostat_tau: self.number("mirostat_tau", |v| (0.0..=20.0).contains(&v), "from 0 to 20")?,
            mirostat_eta: self.number("mirostat_eta", |v| (0.0..=1.0).contains(&v), "from 0 to 1")?,
            dynatemp_range: self.number("dynatemp_range", |v| (0.0..=2.0).contains(&v), "from 0 to 2")?,
            dynatemp_exponent: self.number("dynatemp_exponent", |v| v > 0.0 && v <= 10.0, "over 0, up to 10")?,
            logit_bias: self.logit_bias()?,
            seed: self.seed()?,
        })
    }

    /// llama.cpp calls it `repeat_penalty`, others `repetition_penalty`.
    fn repetition_penalty(&self) -> Result<Option<f32>, Reject> {
        let one = |name| self.number(name, |v| v > 0.0 && v <= 10.0, "over 0, up to 10");
        match (one("repeat_penalty")?, one("repetition_penalty")?) {
            (Some(a), Some(b)) if a != b => {
                let both = format!("`repeat_penalty` is {a} and `repetition_penalty` {b}: give one of them");
                Err(Reject::field("repeat_penalty", both))
            }
            (a, b) => Ok(a.or(b)),
        }
    }

    fn tokens_back(&self, name: &str) -> Result<Option<usize>, Reject> {
        let back = self.integer(name, -1, i64::from(u32::MAX))?;
        Ok(back.map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    fn answers(&self, kind: Kind) -> Result<usize, Reject> {
        let n = self.integer("n", 1, MAX_ANSWERS as i64)?.unwrap_or(1);
        if kind == Kind::Either && n > 1 {
            return Err(Reject::unsupported("n", "`n` is not served on the serial line: 1 answer a request"));
        }
        if let Some(best_of) = self.integer("best_of", 1, i64::MAX)?
            && best_of != n
        {
            return Err(Reject::unsupported("best_of", format!("`best_of` is {best_of}: it must be `n`, {n}")));
        }
        Ok(usize::try_from(n).unwrap_or(1))
    }

    /// Chats say `logprobs` and `top_logprobs`, completions a number.
    fn logprobs(&self, kind: Kind) -> Result<Option<usize>, Reject> {
        let told = match kind {
            Kind::Completion => self.integer("logprobs", 0, MAX_TOP_LOGPROBS)?,
            Kind::Chat | Kind::Either => {
                let top = self.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
                let asked = self.flag("logprobs")?.unwrap_or(false);
                if !asked && top.is_some_and(|top| top > 0) {
                    return Err(Reject::field("top_logprobs", "`top_logprobs` is only allowed with `logprobs`: true"));
                }
                asked.then_some(top.unwrap_or(0))
            }
        };
        if kind == Kind::Either && told.is_some() {
            return Err(Reject::unsupported("logprobs", "`logprobs` are not served on the serial line"));
        }
        Ok(told.and_then(|n| usize::try_from(n).ok()))
    }

    /// `response_format`, as OpenAI has it, or `grammar`. `strict` is not looked at: a schema is always followed to the letter.
    fn constraint(&self) -> Result<Option<Constraint>, Reject> {
        const FORMATS: &str = "`response_format` must be {\"type\":\"text\"}, {\"type\":\"json_object\"} or \
                               {\"type\":\"json_schema\",\"json_schema\":{\"name\":…,\"schema\":{…}}}";
        let format = match self.get("response_format") {
            None => None,
            Some(format) => match (format["type"].as_str(), &format["json_schema"]["schema"]) {
                (Some("text"), _) => None,
                (Some("json_object"), _) => Some(Constraint::JsonSchema(json!({"type": "object"}))),
                (Some("json_schema"), schema @ (Value::Object(_) | Value::Bool(true))) => {
                    Some(Constraint::JsonSchema(schema.clone()))
                }
                (Some("json_schema"), _) => {
                    let field = "response_format.json_schema.schema";
                    return Err(Reject::field(field, format!("`{field}` must be a JSON schema, an object")));
                }
                _ => return Err(Reject::field("response_format", FORMATS)),
            },
        };
        let grammar = self.text("grammar", MAX_GRAMMAR_BYTES)?.map(Constraint::Lark);
        if format.is_some() && grammar.is_some() {
            return Err(Reject::field("grammar", "give either `response_format` or `grammar`, not both"));
        }
        let constraint = format.or(grammar);
        if constraint.is_some() && self.flag("ignore_eos")?.unwrap_or(false) {
            let why = "`ignore_eos` would go on where `response_format` or `grammar` ends: leave one of them out";
            return Err(Reject::field("ignore_eos", why));
        }
        Ok(constraint)
    }

    /// `{"5": -100}`; ids are names in JSON.
    fn logit_bias(&self) -> Result<Vec<(u32, f32)>, Reject> {
        let wrong = |why: &str| {
            let right = "`logit_bias` must be an object of token ids, each with a number from -100 to 100";
            Reject::field("logit_bias", format!("{right}: {why}"))
        };
        let biases = match self.get("logit_bias") {
            None => return Ok(Vec::new()),
            Some(Value::Object(biases)) => biases,
            Some(_) => return Err(wrong("it is no object")),
        };
        if biases.len() > MAX_LOGIT_BIASES {
            return Err(wrong(&format!("it has {} entries, at most {MAX_LOGIT_BIASES} are read", biases.len())));
        }
        let one = |(id, bias): (&String, &Value)| {
            let id = id.parse::<u32>().map_err(|_| wrong("a name is no token id"))?;
            match bias.as_f64() {
                Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((id, bias as f32)),
                _ => Err(wrong(&format!("that of token {id} is none"))),
            }
        };
        biases.iter().map(one).collect()
    }

    fn seed(&self) -> Result<Option<u64>, Reject> {
        let Some(value) = self.get("seed") else {
            return Ok(None);
        };
        match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Ok(Some(seed)),
            (None, Some(seed)) => Ok(Some(seed.cast_unsigned())),
            (None, None) => Err(Reject::field("seed", "`seed` must be an integer of 64 bits")),
        }
    }

    fn max_tokens(&self) -> Result<Option<usize>, Reject> {
        let old = self.integer("max_tokens", 1, i64::MAX)?;
        let new = self.integer("max_completion_tokens", 1, i64::MAX)?;
        if let (Some(old), Some(new)) = (old, new)
            && old != new
        {
            return Err(Reject::field(
                "max_completion_tokens",
                format!("`max_tokens` is {old} and `max_completion_tokens` {new}: give one of them"),
            ));
        }
        Ok(new.or(old).map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    fn stop(&self) -> Result<Vec<String>, Reject> {
        let wrong = || {
            Reject::field(
                "stop",
                format!(
                    "`stop` must be a string or up to {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_BYTES} bytes"
                ),
            )
        };
        let values = match self.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) if values.len() <= MAX_STOP_STRINGS => values.as_slice(),
            Some(one @ Value::String(_)) => std::slice::from_ref(one),
            Some(_) => return Err(wrong()),
        };
        values
            .iter()
            .map(|v| match v.as_str() {
                Some(s) if (1..=MAX_STOP_BYTES).contains(&s.len()) => Ok(s.to_owned()),
                _ => Err(wrong()),
            })
            .collect()
    }

    fn include_usage(&self, stream: bool) -> Result<bool, Reject> {
        let Some(options) = self.get("stream_options") else {
            return Ok(false);
        };
        if !stream {
            return Err(Reject::field("stream_options", "`stream_options` is only allowed with `stream`: true"));
        }
        match options {
            Value::Object(options) => match options.get("include_usage") {
                None | Some(Value::Null) => Ok(false),
                Some(Value::Bool(on)) => Ok(*on),
                Some(_) => Err(Reject::field("stream_options.include_usage", "must be true or false")),
            },
            _ => Err(Reject::field("stream_options", "`stream_options` must be an object")),
        }
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, Reject> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(_) => Err(Reject::field(name, format!("`{name}` must be true or false"))),
        }
    }

    fn text(&self, name: &str, max_bytes: usize) -> Result<Option<String>, Reject> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) if s.len() <= max_bytes => Ok(Some(s.clone())),
            Some(Value::String(s)) => {
                Err(Reject::field(name, format!("`{name}` has {} bytes, at most {max_bytes} are taken", s.len())))
            }
            Some(_) => Err(Reject::field(name, format!("`{name}` must be a string"))),
        }
    }

    fn number(&self, name: &str, legal: fn(f64) -> bool, range: &str) -> Result<Option<f32>, Reject> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let Some(number) = value.as_f64() else {
            return Err(Reject::field(name, format!("`{name}` must be a number {range}")));
        };
        // The check is on what the sampler will see: a tiny `top_p` must not become 0 on the way.
        let single = number as f32;
        if legal(number) && legal(f64::from(single)) {
            Ok(Some(single))
        } else {
            Err(Reject::field(name, format!("`{name}` is {number}: it must be {range}")))
        }
    }

    fn integer(&self, name: &str, min: i64, max: i64) -> Result<Option<i64>, Reject> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_i64() {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ if max == i64::MAX => Err(Reject::field(name, format!("`{name}` must be an integer of at least {min}"))),
            _ => Err(Reject::field(name, format!("`{name}` must be an integer from {min} to {max}"))),
        }
    }

    /// Fields of the API that would change the answer and that this server does not serve. Their neutral values pass.
    fn refuse_unsupported(&self) -> Result<(), Reject> {
        for (name, why) in UNSUPPORTED {
            let Some(value) = self.get(name) else {
                continue;
            };
            let neutral = match value {
                Value::Bool(on) => !on,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty() || (map.len() == 1 && value["type"] == "text"),
                Value::String(s) => s.is_empty() || s == "none" || s == "auto",
                Value::Number(_) => false,
                Value::Null => true,
            };
            if !neutral {
                return Err(Reject::unsupported(name, format!("`{name}` is not served: {why}")));
            }
        }
        match self.get("modalities") {
            Some(Value::Array(list)) if list.iter().any(|m| m != "text") => {
                Err(Reject::unsupported("modalities", "`modalities`: only \"text\" is served"))
            }
            _ => Ok(()),
        }
    }
}

/// Field, and what is right instead.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("tools", "leave it out"),
    ("tool_choice", "only \"none\" and \"auto\" without tools"),
    ("functions", "leave it out"),
    ("function_call", "only \"none\" and \"auto\" without functions"),
    ("audio", "this model reads and writes text"),
    ("suffix", "this model continues text"),
    ("echo", "leave it out"),
    ("dry_sequence_breakers", "line feed, colon, quotation mark and asterisk break a passage"),
    ("samplers", "the order is fixed"),
];

fn messages(value: Value) -> Result<Prompt, Reject> {
    let Value::Array(list) = value else {
        return Err(Reject::field("messages", "`messages` must be an array of {\"role\",\"content\"}"));
    };
    if list.is_empty() || list.len() > MAX_MESSAGES {
        return Err(Reject::field(
            "messages",
            format!("`messages` has {} entries: it must have 1 to {MAX_MESSAGES}", list.len()),
        ));
    }
    list.into_iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<_, _>>().map(Prompt::Chat)
}

fn message(i: usize, value: Value) -> Result<Message, Reject> {
    let Value::Object(mut object) = value else {
        return Err(Reject::field(format!("messages[{i}]"), "a message must be an object with `role` and `content`"));
    };
    let role = match object.get("role").and_then(Value::as_str) {
        // `developer` is the newer name of the same thing; templates know `system`.
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => {
            return Err(Reject::unsupported(&format!("messages[{i}].role"), "tools are not served"));
        }
        _ => {
            return Err(Reject::field(
                format!("messages[{i}].role"),
                "`role` must be \"system\", \"user\" or \"assistant\"",
            ));
        }
    };
    let calls = |name| object.get(name).is_some_and(|c: &Value| !c.is_null() && c != &Value::Array(Vec::new()));
    for name in ["tool_calls", "function_call"] {
        if calls(name) {
            return Err(Reject::unsupported(&format!("messages[{i}].{name}"), "tools are not served"));
        }
    }
    let content = match object.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => text_parts(i, &parts)?,
        _ => {
            return Err(Reject::field(
                format!("messages[{i}].content"),
                "`content` must be a string or an array of {\"type\":\"text\",\"text\":…}",
            ));
        }
    };
    Ok(Message { role, content })
}

/// Text parts are joined by a line feed, as other servers of this API do.
fn text_parts(i: usize, parts: &[Value]) -> Result<String, Reject> {
    let mut texts = Vec::with_capacity(parts.len());
    for (j, part) in parts.iter().enumerate() {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("text"), None) => {
                return Err(Reject::field(format!("messages[{i}].content[{j}].text"), "`text` must be a string"));
            }
            _ => {
                return Err(Reject::unsupported(
                    &format!("messages[{i}].content[{j}].type"),
                    "only parts of type \"text\" are served",
                ));
            }
        }
    }
    Ok(texts.join("\n"))
}

fn completion_prompt(value: Value) -> Result<Prompt, Reject> {
    let wrong =
        |why: &str| Reject::field("prompt", format!("`prompt` must be a string or an array of token ids: {why}"));
    match value {
        Value::String(text) if text.is_empty() => Err(wrong("it is empty")),
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(mut list) => match list.first() {
            None => Err(wrong("it is empty")),
            Some(Value::String(_) | Value::Array(_)) if list.len() > 1 => {
                Err(Reject::unsupported("prompt", format!("`prompt` has {} entries: one prompt a request", list.len())))
            }
            Some(Value::String(_)) => completion_prompt(list.swap_remove(0)),
            Some(Value::Array(inner)) => token_ids(inner).ok_or_else(|| wrong("an entry is not a token id")),
            Some(_) => token_ids(&list).ok_or_else(|| wrong("an entry is not a token id")),
        },
        _ => Err(wrong("it is neither")),
    }
}

fn token_ids(list: &[Value]) -> Option<Prompt> {
    let ids: Option<Vec<u32>> = list.iter().map(|v| u32::try_from(v.as_u64()?).ok()).collect();
    ids.filter(|ids| !ids.is_empty()).map(Prompt::Tokens)
}
