//! Grammars that an answer has to follow: a JSON schema, or a grammar in Lark's notation. `llguidance` does the work; here a vocabulary
//! becomes its trie of tokens, a request's grammar a [`Course`], and every bound of it has a name.
//!
//! A course says which tokens may come next ([`Course::allowed`]), is told which one did ([`Course::push`]), and knows when nothing can
//! follow. Control tokens are never text to it: of those only the ones that end an answer are allowed, and exactly where the grammar may
//! end. Used by `serve`, on the I/O thread; next on the data's way: `engine::mask`.

mod limits;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, TokenParser};
use serde_json::{Value, json};

use super::{TokenId, Vocab};

/// Longest grammar that is read, in bytes; a schema is bounded by the request that carries it.
pub const MAX_GRAMMAR_BYTES: usize = 16 * 1024;
/// Longest reason why a grammar is refused, in characters: it may quote what the request said.
pub const MAX_REASON_CHARS: usize = 300;
/// Work that one grammar may take at its start, in llguidance's units, 50,000 a millisecond on a PC.
pub const INITIAL_FUEL: u64 = 150_000;
/// Work that one token may take, in llguidance's units, 14,000 a millisecond on a PC.
pub const STEP_FUEL: u64 = 200_000;
/// Items that one token may take, 20,000 a millisecond on a PC.
pub const STEP_ITEMS: usize = 50_000;
/// Items at one place of the text: how ambiguous a grammar may be.
pub const MAX_ITEMS_IN_ROW: usize = 1_000;
/// Items of an answer so far, 16 bytes each with the list's room to grow.
pub const MAX_ITEMS: usize = 60_000;
/// Symbols in a grammar, tens of bytes each.
pub const MAX_GRAMMAR_SYMBOLS: usize = 30_000;
/// States of a grammar's lexer.
pub const MAX_LEXER_STATES: usize = 2_000;
/// Bytes of a grammar's lexer, which grows with what is met; one that wants more ends its answer.
pub const MAX_LEXER_BYTES: usize = 3 * 1024 * 1024;
/// Bytes of a token that may be part of such an answer; longer ones are runs of blanks and lines.
pub const MAX_TOKEN_BYTES: usize = 256;

/// Heap bytes of one course at most: its lexer, its items, its grammar.
pub const COURSE_BYTES: usize = MAX_LEXER_BYTES + 16 * MAX_ITEMS + 2 * 1024 * 1024;
/// Heap bytes that reading a grammar may take before its limits are looked at; there is one at a time.
const BEGIN_BYTES: usize = 8 * 1024 * 1024;
/// Heap bytes that a token of the vocabulary takes in the tries while they are made: measured 253 with SmolLM2's, rounded up.
const TRIE_BYTES_PER_TOKEN: usize = 288;

/// What an answer has to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON value that fits the schema.
    JsonSchema(Value),
    /// What a grammar in llguidance's variant of Lark derives from `start`.
    Lark(String),
}

/// Why there is no course, or why it cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl GrammarError {
    /// The one of a grammar that lets no token through.
    pub fn empty() -> Self {
        Self("the only answer is an empty one".into())
    }

    fn new(reason: &impl std::fmt::Display) -> Self {
        let text = reason.to_string();
        let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it is refused");
        Self(line.chars().filter(|c| !c.is_control()).take(MAX_REASON_CHARS).collect())
    }
}

/// One vocabulary, ready for grammars.
pub struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// Takes a moment: some tens of milliseconds on a PC.
    ///
    /// # Errors
    /// The vocabulary has no token that ends an answer.
    pub fn new(vocab: &Vocab<'_>) -> Result<Self, GrammarError> {
        let eog: Vec<u32> = vocab.eog_ids().iter().map(|id| id.0).collect();
        let Some(&first) = eog.first() else {
            return Err(GrammarError("the model has no token that ends an answer".into()));
        };
        let ids = 0..u32::try_from(vocab.len()).unwrap_or(u32::MAX);
        let word = |id: u32| match vocab.is_control(TokenId(id)) {
            // An empty one is never allowed; no text begins a character with the mark.
            false => match vocab.token_bytes(TokenId(id), false) {
                [TokTrie::SPECIAL_TOKEN_MARKER, ..] => Vec::new(),
                bytes if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
                bytes => bytes.to_vec(),
            },
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], vocab.text_of(TokenId(id))].concat(),
        };
        let words: Vec<Vec<u8>> = ids.clone().map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(ids.end, first), &words).with_eos_tokens(&eog);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        // Without the library's slices, tries of parts of the vocabulary: each takes a fifth more memory, and no gain was to be seen.
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[]);
        let mut factory = factory.map_err(|e| GrammarError::new(&e))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_items_in_row: MAX_ITEMS_IN_ROW,
            initial_lexer_fuel: INITIAL_FUEL,
            step_lexer_fuel: STEP_FUEL,
            step_max_items: STEP_ITEMS,
            max_lexer_states: MAX_LEXER_STATES,
            max_grammar_size: MAX_GRAMMAR_SYMBOLS,
            precompute_large_lexemes: false,
            verbose_errors: false,
        };
        Ok(Self { factory })
    }

    /// Heap bytes of the tries of a vocabulary, and of reading one grammar.
    pub const fn bytes(n_vocab: usize) -> usize {
        n_vocab.saturating_mul(TRIE_BYTES_PER_TOKEN).saturating_add(BEGIN_BYTES)
    }

    /// Begins an answer.
    ///
    /// # Errors
    /// The grammar is wrong, too large, or uses what is not supported.
    pub fn begin(&self, grammar: &Grammar) -> Result<Course, GrammarError> {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => {
                limits::schema(schema).map_err(GrammarError)?;
                TopLevelGrammar::from_json_schema(spaced(schema)?)
            }
            Grammar::Lark(text) if text.len() > MAX_GRAMMAR_BYTES => {
                let long = format!("it has {} bytes, at most {MAX_GRAMMAR_BYTES} are read", text.len());
                return Err(GrammarError(long));
            }
            Grammar::Lark(text) => {
                limits::lark(text).map_err(GrammarError)?;
                TopLevelGrammar::from_lark(text.clone())
            }
        };
        let mut parser = self.factory.create_parser(grammar).map_err(|e| GrammarError::new(&e))?;
        // What the library only warns of would be left out of the grammar in silence.
        if let Some(warning) = parser.grammar_warnings().first() {
            return Err(GrammarError::new(warning));
        }
        parser.start_without_prompt();
        Ok(Course { parser, items: 0 })
    }
}

/// The schema with the only spaces that an answer has: one behind a colon and one behind a comma. Free ones are what a small model loses its way in.
fn spaced(schema: &Value) -> Result<Value, GrammarError> {
    let style = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
    match schema {
        Value::Bool(true) => Ok(json!({"x-guidance": style})),
        Value::Object(fields) => {
            let mut fields = fields.clone();
            fields.insert("x-guidance".into(), style);
            Ok(Value::Object(fields))
        }
        _ => Err(GrammarError("a schema is an object, or true".into())),
    }
}

/// One answer on its way through its grammar.
pub struct Course {
    parser: TokenParser,
    /// Items that the parser keeps of the tokens so far.
    items: usize,
}

/// A set of tokens.
pub struct Allowed(SimpleVob);

impl Allowed {
    /// Bit `t % 32` of word `t / 32` is token `t`; bits beyond the vocabulary may be anything.
    pub fn words(&self) -> &[u32] {
        self.0.as_slice()
    }
}

impl Course {
    /// What may come next. `None`: nothing; the answer is whole.
    ///
    /// # Errors
    /// The grammar takes more work or memory than it may, or no token of the vocabulary fits.
    pub fn allowed(&mut self) -> Result<Option<Allowed>, GrammarError> {
        let allowed = match self.parser.compute_mask() {
            Ok(allowed) => allowed,
            Err(_) if self.parser.stop_reason().is_ok() && self.parser.is_accepting() => return Ok(None),
            Err(error) => return Err(GrammarError::new(&error)),
        };
        let bytes = self.parser.parser.lexer_stats().num_bytes;
        if bytes > MAX_LEXER_BYTES {
            let large = format!("its regular expressions take {bytes} bytes, at most {MAX_LEXER_BYTES} are kept");
            return Err(GrammarError(large));
        }
        Ok(Some(Allowed(allowed)))
    }

    /// Takes the token that came. True: the answer is whole, and nothing can follow.
    ///
    /// # Errors
    /// The token was not allowed, or the grammar takes more work or memory than it may.
    pub fn push(&mut self, token: TokenId) -> Result<bool, GrammarError> {
        let before = self.parser.parser_stats().all_items;
        self.parser.consume_token(token.0).map_err(|e| GrammarError::new(&e))?;
        self.items = self.items.saturating_add(self.parser.parser_stats().all_items.saturating_sub(before));
        if self.items > MAX_ITEMS {
            return Err(GrammarError("the answer is too long for so ambiguous a grammar".into()));
        }
        if !self.parser.check_stop().map_err(|e| GrammarError::new(&e))? {
            return Ok(false);
        }
        match self.parser.stop_reason() {
            reason if reason.is_ok() => Ok(true),
            reason => Err(GrammarError::new(&reason)),
        }
    }

    /// Another answer at the same place.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { parser: self.parser.deep_clone(), items: self.items }
    }
}
