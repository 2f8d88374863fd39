//! Grammars that an answer has to follow: a JSON schema, or a grammar in Lark's notation. `llguidance` does the work; here a vocabulary
//! becomes its trie of tokens, a request's grammar a [`Course`], and every bound of it has a name.
//!
//! A course says which tokens may come next ([`Course::allowed`]), is told which one did ([`Course::push`]), and knows when nothing can
//! follow. Control tokens are never text to it: of those only the ones that end an answer are allowed, and exactly where the grammar may
//! end. Used by `serve`, on the I/O thread; next on the data's way: `engine::mask`.

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::{TokenId, Vocab};

/// Longest grammar that is read, in bytes; a schema is bounded by the request that carries it.
pub const MAX_GRAMMAR_BYTES: usize = 64 * 1024;
/// Longest reason why a grammar is refused, in characters: it may quote what the request said.
pub const MAX_REASON_CHARS: usize = 300;
/// Work that one grammar may take at its start, in llguidance's units, 50,000 a millisecond on a PC.
pub const INITIAL_FUEL: u64 = 1_000_000;
/// Work that one token may take, in llguidance's units, 14,000 a millisecond on a PC.
pub const STEP_FUEL: u64 = 200_000;
/// Items that one token may take, 20,000 a millisecond on a PC.
pub const STEP_ITEMS: usize = 50_000;
/// Symbols in a grammar.
pub const MAX_GRAMMAR_SYMBOLS: usize = 50_000;
/// States of a grammar's lexer, up to 2 KiB each.
pub const MAX_LEXER_STATES: usize = 2_000;

/// Heap bytes of one course at most: its lexer's states, its grammar, and what is made on the way to it.
pub const COURSE_BYTES: usize = MAX_LEXER_STATES * 2048 + 2 * 1024 * 1024;
/// Heap bytes that a token of the vocabulary takes in the tries while they are made: measured 310 with SmolLM2's, rounded up.
const TRIE_BYTES_PER_TOKEN: usize = 384;

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
            false => vocab.token_bytes(TokenId(id), false).to_vec(),
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], vocab.text_of(TokenId(id))].concat(),
        };
        let words: Vec<Vec<u8>> = ids.clone().map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(ids.end, first), &words).with_eos_tokens(&eog);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        // Of llguidance's sets of tokens that it need not look at one by one, the one that saves most: all that may stand in a JSON string.
        // Each takes a trie more, 3 MB for a vocabulary of 49,152.
        let slices: Vec<String> = SlicedBiasComputer::json_slices().pop().into_iter().collect();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| GrammarError::new(&e))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: INITIAL_FUEL,
            step_lexer_fuel: STEP_FUEL,
            step_max_items: STEP_ITEMS,
            max_lexer_states: MAX_LEXER_STATES,
            max_grammar_size: MAX_GRAMMAR_SYMBOLS,
            precompute_large_lexemes: false,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory })
    }

    /// Heap bytes of the tries of a vocabulary.
    pub const fn bytes(n_vocab: usize) -> usize {
        n_vocab.saturating_mul(TRIE_BYTES_PER_TOKEN)
    }

    /// Begins an answer.
    ///
    /// # Errors
    /// The grammar is wrong, too large, or uses what is not supported.
    pub fn begin(&self, grammar: &Grammar) -> Result<Course, GrammarError> {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(spaced(schema)?),
            Grammar::Lark(text) if text.len() > MAX_GRAMMAR_BYTES => {
                let long = format!("it has {} bytes, at most {MAX_GRAMMAR_BYTES} are read", text.len());
                return Err(GrammarError(long));
            }
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(GrammarError::new(&error)),
            // What the library only warns of would be left out of the grammar in silence.
            None => match matcher.grammar_warnings().first() {
                Some(warning) => Err(GrammarError::new(warning)),
                None => Ok(Course { matcher }),
            },
        }
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
    matcher: Matcher,
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
    /// What may come next; never nothing.
    ///
    /// # Errors
    /// The grammar takes more work or memory than it may.
    pub fn allowed(&mut self) -> Result<Allowed, GrammarError> {
        self.matcher.compute_mask_or_eos().map(Allowed).map_err(|e| GrammarError::new(&e))
    }

    /// Takes the token that came. True: the answer is whole, and nothing can follow.
    ///
    /// # Errors
    /// The token was not allowed, or the grammar takes more work or memory than it may.
    pub fn push(&mut self, token: TokenId) -> Result<bool, GrammarError> {
        self.matcher.consume_token(token.0).map_err(|e| GrammarError::new(&e))?;
        Ok(self.matcher.is_stopped())
    }

    /// Another answer at the same place.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { matcher: self.matcher.deep_clone() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::text::vocab::{RawVocab, SpecialIds};

    /// `<unk>`, `<s>`, `</s>`, every byte, then some words.
    fn vocab() -> Vocab<'static> {
        let words = ["{\"", "\": ", "a", "\"}", "null", "</s>x", "  "];
        let bytes = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>"));
        let tokens: Vec<String> = ["<unk>", "<s>", "</s>"]
            .map(String::from)
            .into_iter()
            .chain(bytes)
            .chain(words.map(String::from))
            .collect();
        let kinds = [2, 3, 3].into_iter().chain([6; 256]).chain([1; 7]);
        Vocab::new(&RawVocab {
            model: "llama",
            pre: None,
            name: None,
            tokens: tokens.iter().map(|token| token.as_bytes()),
            scores: vec![0.0; tokens.len()],
            token_types: kinds.collect(),
            merges: None,
            special: SpecialIds { bos: Some(TokenId(1)), eos: Some(TokenId(2)), ..SpecialIds::default() },
            add_bos: Some(true),
            add_eos: None,
            add_space_prefix: Some(false),
        })
        .unwrap()
    }

    const FIRST_WORD: u32 = 3 + 256;

    fn byte(byte: u8) -> u32 {
        3 + u32::from(byte)
    }

    fn allows(course: &mut Course, token: u32) -> bool {
        course.allowed().unwrap().words()[token as usize / 32] >> (token % 32) & 1 == 1
    }

    #[test]
    fn an_answer_may_end_exactly_where_the_schema_does() {
        let grammars = Grammars::new(&vocab()).unwrap();
        let schema = json!({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": false});
        let mut course = grammars.begin(&Grammar::JsonSchema(schema)).unwrap();
        assert!(allows(&mut course, FIRST_WORD) && allows(&mut course, byte(b'{')));
        assert!(!allows(&mut course, byte(b' ')) && !allows(&mut course, 2) && !allows(&mut course, 1));
        for token in [FIRST_WORD, FIRST_WORD + 2, FIRST_WORD + 1] {
            assert!(!course.push(TokenId(token)).unwrap());
            assert!(!allows(&mut course, 2));
        }
        let mut other = course.copy();
        assert!(!course.push(TokenId(FIRST_WORD + 4)).unwrap());
        assert!(course.push(TokenId(byte(b'}'))).unwrap(), "nothing can follow");
        assert!(allows(&mut course, 2));
        assert!(other.push(TokenId(byte(b'7'))).is_err(), "not null");
    }

    #[test]
    fn a_control_token_is_not_the_text_that_it_is_called() {
        let grammars = Grammars::new(&vocab()).unwrap();
        let mut course = grammars.begin(&Grammar::Lark("start: \"</s>\" /x*/".into())).unwrap();
        assert!(!allows(&mut course, 2) && allows(&mut course, byte(b'<')) && allows(&mut course, FIRST_WORD + 5));
        assert!(!course.push(TokenId(FIRST_WORD + 5)).unwrap());
        assert!(allows(&mut course, 2) && allows(&mut course, byte(b'x')) && !allows(&mut course, 1));
    }

    #[test]
    fn what_is_no_grammar_is_refused_with_a_reason() {
        let grammars = Grammars::new(&vocab()).unwrap();
        let refused = |grammar: Grammar| grammars.begin(&grammar).err().map(|e| e.to_string()).unwrap_or_default();
        for (schema, why) in [
            (json!({"type": "text"}), "text"),
            (json!({"type": "object", "patternProperties": 7}), "patternProperties"),
            (json!({"$ref": "https://example.org/other"}), "ref"),
            (json!([1]), "a schema is an object"),
            (json!({"type": "string", "pattern": "("}), "regex"),
        ] {
            let found = refused(Grammar::JsonSchema(schema.clone()));
            assert!(found.contains(why), "{schema}: {found}");
        }
        assert!(refused(Grammar::Lark("start: other".into())).contains("other"));
        assert!(!refused(Grammar::Lark(String::new())).is_empty());
        assert!(
            refused(Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000)))).contains("nested")
        );
        let long = refused(Grammar::Lark(" ".repeat(MAX_GRAMMAR_BYTES + 1)));
        assert!(long.contains("65537 bytes"), "{long}");
        // Deep and wide ones end in a reason or a course, and in bounded time.
        let deep =
            (0..120).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner, "minItems": 2}));
        let _ = refused(Grammar::JsonSchema(deep));
        let _ = refused(Grammar::JsonSchema(json!({"type": "string", "pattern": "(a{1,900}){1,900}"})));
        let chain: String = (0..3000).map(|n| format!("r{n}: \"a\" r{} | \"b\"\n", n + 1)).collect();
        let _ = refused(Grammar::Lark(format!("start: r0\n{chain}r3000: \"c\"\n")));
    }
}
