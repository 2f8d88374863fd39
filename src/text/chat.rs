//! Chat templates: messages to the text a model was trained on, as published templates say in Jinja.
//! Next on the data's way: `Vocab::encode` with special tokens parsed.
//!
//! A template comes from a file of unknown origin and is a program: it runs with limits on steps, depth and output, sees
//! nothing but the request, and never a clock. A date comes from the request or the configuration, or there is none.

use std::io;

use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};

mod date;
mod json;
#[cfg(test)]
mod tests;

pub use date::{Date, DateError};

/// Bytes of a template's source.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Bytes of a rendered prompt.
pub const MAX_RENDERED_BYTES: usize = 2 << 20;
/// Steps (template instructions) that one rendering may take.
pub const MAX_STEPS: u64 = 10_000_000;
/// Calls inside calls.
const MAX_DEPTH: usize = 100;
const NAME: &str = "chat template";

/// Why a template is refused, or a conversation cannot be rendered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    /// The template's source is too long.
    #[error("chat template of {bytes} bytes; at most {MAX_TEMPLATE_BYTES} are taken")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// The template is broken.
    #[error("chat template, line {line}: {reason}")]
    Broken {
        /// Line, counted from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The template refuses this conversation, in its own words.
    #[error("the chat template refuses these messages: {message}")]
    Raised {
        /// What it says.
        message: String,
    },
    /// The template cannot make sense of this conversation.
    #[error("chat template, line {line}, cannot render these messages: {reason}")]
    Render {
        /// Line, counted from 1.
        line: usize,
        /// What went wrong there.
        reason: String,
    },
    /// The template asks for the date and nobody gave one.
    #[error("chat template, line {line}, asks for the date: give one in the request or the configuration")]
    NeedsDate {
        /// Line, counted from 1.
        line: usize,
    },
    /// The date given is none.
    #[error(transparent)]
    Date(#[from] DateError),
    /// The template takes too many steps.
    #[error("chat template, line {line}: more than {MAX_STEPS} steps")]
    TooManySteps {
        /// Where it was stopped.
        line: usize,
    },
    /// The prompt is too long.
    #[error("the rendered messages exceed {MAX_RENDERED_BYTES} bytes")]
    TooLong,
}

/// What a conversation is rendered from.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// An array of objects with `role` and `content`.
    pub messages: &'a serde_json::Value,
    /// Whether the prompt ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Tools the model may call, in OpenAI's form.
    pub tools: Option<&'a serde_json::Value>,
    /// The day it is, `2026-11-23`, maybe with a time, `2026-11-23T08:30`.
    pub date: Option<&'a str>,
    /// Further variables that some templates know (`enable_thinking`); they cannot replace the ones above.
    pub extra: Option<&'a serde_json::Map<String, serde_json::Value>>,
}

impl<'a> ChatInput<'a> {
    /// Messages with a generation prompt and nothing else.
    pub fn new(messages: &'a serde_json::Value) -> Self {
        Self { messages, add_generation_prompt: true, tools: None, date: None, extra: None }
    }
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template. It is also run once on a short conversation, so that filters and functions it lacks are found
    /// now; that it refuses that conversation, or asks for a date, is no error here.
    ///
    /// # Errors
    /// The template is broken: line and reason.
    pub fn compile(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(ChatError::TooLarge { bytes: source.len() });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| broken(&e))?;
        let template = Self { environment, bos: bos.to_string(), eos: eos.to_string() };

        let trial = serde_json::json!([{ "role": "user", "content": "Hello" }]);
        match template.run(&ChatInput::new(&trial)) {
            Err(Failure::Template(e)) if is_broken(&e) && !asks_for_date(&e) => Err(broken(&e)),
            Err(Failure::Template(e)) if matches!(e.kind(), ErrorKind::OutOfFuel) => Err(explain(e)),
            Err(Failure::Chat(e)) => Err(e),
            _ => Ok(template),
        }
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// The template refuses it, or fails on it; see [`ChatError`].
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, ChatError> {
        self.run(input).map_err(|failure| match failure {
            Failure::Template(e) => explain(e),
            Failure::Chat(e) => e,
        })
    }

    fn run(&self, input: &ChatInput<'_>) -> Result<String, Failure> {
        let date = input.date.map(str::parse::<Date>).transpose().map_err(|e| Failure::Chat(e.into()))?;
        let known = context! {
            messages => input.messages,
            add_generation_prompt => input.add_generation_prompt,
            tools => input.tools,
            documents => (),
            bos_token => &self.bos,
            eos_token => &self.eos,
        };
        let dated = match date {
            Some(date) => context! {
                date_string => date.strftime("%d %b %Y").unwrap_or_default(),
                strftime_now => Value::from_function(move |format: &str| {
                    date.strftime(format).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
                }),
            },
            None => context! {},
        };
        let extra = input.extra.map_or_else(|| context! {}, Value::from_serialize);
        let mut out = Capped { bytes: Vec::new(), full: false };
        let rendered = self.environment.get_template(NAME).and_then(|template| {
            template.render_captured_to(context! { ..known, ..dated, ..extra }, &mut out).map(drop)
        });
        match rendered {
            _ if out.full => Err(Failure::Chat(ChatError::TooLong)),
            Err(e) => Err(Failure::Template(e)),
            // Everything written was text.
            Ok(()) => Ok(String::from_utf8_lossy(&out.bytes).into_owned()),
        }
    }
}

enum Failure {
    Template(minijinja::Error),
    Chat(ChatError),
}

/// Takes output up to [`MAX_RENDERED_BYTES`], then fails, which stops the template.
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > MAX_RENDERED_BYTES {
            self.full = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Marks an error as the template's own words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// Published templates mark the assistant's words for training with `{% generation %}`, a tag that only trainers know.
/// It becomes a comment of the same shape, which leaves white space as the tag would.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let (inside, end) = (&rest[start + 2..start + len.max(2)], start + len + 2);
        out.push_str(&rest[..start]);
        match inside.trim_matches(['-', '+']).trim() {
            "generation" | "endgeneration" => out.push_str(&format!("{{#{inside}#}}")),
            _ => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out + rest
}

/// Errors that no conversation can avoid: what the template names does not exist.
fn is_broken(e: &minijinja::Error) -> bool {
    use ErrorKind::{SyntaxError, TemplateNotFound, UnknownBlock, UnknownFilter, UnknownFunction, UnknownTest};
    matches!(e.kind(), SyntaxError | TemplateNotFound | UnknownBlock | UnknownFilter | UnknownFunction | UnknownTest)
}

fn asks_for_date(e: &minijinja::Error) -> bool {
    matches!(e.kind(), ErrorKind::UnknownFunction) && e.detail().is_some_and(|detail| detail.contains("strftime_now"))
}

fn line(e: &minijinja::Error) -> usize {
    e.line().unwrap_or(1)
}

fn reason(e: &minijinja::Error) -> String {
    match e.detail() {
        Some(detail) => format!("{}: {detail}", e.kind()),
        None => e.kind().to_string(),
    }
}

fn broken(e: &minijinja::Error) -> ChatError {
    ChatError::Broken { line: line(e), reason: reason(e) }
}

fn explain(e: minijinja::Error) -> ChatError {
    let mut source = std::error::Error::source(&e);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return ChatError::Raised { message: message.clone() };
        }
        source = cause.source();
    }
    match e.kind() {
        ErrorKind::OutOfFuel => ChatError::TooManySteps { line: line(&e) },
        _ if asks_for_date(&e) => ChatError::NeedsDate { line: line(&e) },
        _ if is_broken(&e) => broken(&e),
        _ => ChatError::Render { line: line(&e), reason: reason(&e) },
    }
}
