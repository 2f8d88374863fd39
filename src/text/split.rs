//! Cutting text into words before byte-pair merging: one list of patterns per pre-tokenizer.
//! Next on the data's way: `bpe` merges inside every word.
//!
//! The published patterns end in `\s+(?!\S)|\s+`: a run of white space leaves its last character to the word behind it.
//! Look-ahead needs backtracking, whose stack grows with the run, so the patterns here say `\s+` and the code gives
//! the last character back. What remains is a regular language, matched in linear time.

use std::ops::Range;

use fancy_regex::{Regex, RegexBuilder};

/// Pre-tokenizers that are known, by their name in `tokenizer.ggml.pre`.
pub const SUPPORTED: &[&str] = &["default", "gpt-2", "llama-bpe", "qwen2", "smollm"];

/// Bytes a pattern may compile to.
const PATTERN_LIMIT_BYTES: usize = 2 << 20;

/// Heap bytes that a compiled pattern and its search cache may hold. The two of `smollm` together were measured at 0.6 MiB after use.
const PATTERN_MEMORY_BYTES: usize = 1 << 20;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const DIGIT: &str = r"\p{N}";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const DIGITS: &str = r"\p{N}+";
const THREE_DIGITS: &str = r"[0-9][0-9][0-9]";

/// The pattern engine refused: a mistake in this file's patterns, never the text's fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("pre-tokenizer pattern: {reason}")]
pub struct SplitError {
    /// What it says.
    pub reason: String,
}

impl From<fancy_regex::Error> for SplitError {
    fn from(error: fancy_regex::Error) -> Self {
        Self { reason: error.to_string() }
    }
}

/// What a match that ends in white space means.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Space {
    /// The pattern never ends in white space.
    Never,
    /// It came from `\s+`, which gives its last character back.
    GiveBack,
    /// As `GiveBack`, except after a line break, which `\s*[\r\n]+` keeps.
    GiveBackUnlessLineBreak,
}

#[derive(Debug)]
struct Stage {
    pattern: Regex,
    space: Space,
}

/// The patterns of one pre-tokenizer, applied one after the other to the pieces of the one before.
#[derive(Debug)]
pub struct Splitter {
    stages: Vec<Stage>,
}

impl Splitter {
    /// The splitter called `name`; `None` if it is none of [`SUPPORTED`].
    ///
    /// # Errors
    /// A pattern does not compile.
    pub fn named(name: &str) -> Option<Result<Self, SplitError>> {
        use Space::{GiveBack, GiveBackUnlessLineBreak, Never};
        let stages: &[(&str, Space)] = match name {
            "gpt-2" => &[(GPT2, GiveBack)],
            "smollm" => &[(DIGIT, Never), (GPT2, GiveBack)],
            "llama-bpe" => &[(LLAMA3, GiveBackUnlessLineBreak)],
            "qwen2" => &[(QWEN2, GiveBackUnlessLineBreak)],
            "default" => &[(PUNCTUATION, Never), (GPT2, GiveBack), (DIGITS, Never), (THREE_DIGITS, Never)],
            _ => return None,
        };
        let compile = |&(pattern, space): &(&str, Space)| {
            let mut builder = RegexBuilder::new(pattern);
            builder.delegate_size_limit(PATTERN_LIMIT_BYTES);
            Ok(Stage { pattern: builder.build()?, space })
        };
        Some(stages.iter().map(compile).collect::<Result<_, _>>().map(|stages| Self { stages }))
    }

    /// Cuts `text` into words that lie end to end and cover it.
    ///
    /// # Errors
    /// The pattern engine gave up.
    pub fn split(&self, text: &str) -> Result<Vec<Range<usize>>, SplitError> {
        let mut words: Vec<_> = std::iter::once(0..text.len()).collect();
        for stage in &self.stages {
            let mut finer = Vec::with_capacity(words.len());
            for word in words {
                stage.cut(text, word, &mut finer)?;
            }
            words = finer;
        }
        Ok(words)
    }

    /// Heap bytes held, an upper estimate.
    pub fn memory_bytes(&self) -> usize {
        self.stages.len() * PATTERN_MEMORY_BYTES
    }
}

impl Stage {
    /// Cuts one piece: every match is a word, and so is every gap between matches.
    fn cut(&self, text: &str, piece: Range<usize>, words: &mut Vec<Range<usize>>) -> Result<(), SplitError> {
        let base = piece.start;
        let piece = &text[piece];
        let mut at = 0;
        while at < piece.len() {
            let Some(found) = self.pattern.find_from_pos(piece, at)? else { break };
            let (start, end) =
                (found.start(), found.end() - self.given_back(found.as_str(), found.end() < piece.len()));
            if start > at {
                words.push(base + at..base + start);
            }
            words.push(base + start..base + end);
            at = end;
        }
        if at < piece.len() {
            words.push(base + at..base + piece.len());
        }
        Ok(())
    }

    /// Bytes of a match that belong to the word behind it.
    fn given_back(&self, word: &str, more_follows: bool) -> usize {
        let Some(last) = word.chars().next_back() else { return 0 };
        let keeps = match self.space {
            Space::Never => true,
            Space::GiveBack => false,
            Space::GiveBackUnlessLineBreak => matches!(last, '\r' | '\n'),
        };
        if keeps || !more_follows || !last.is_whitespace() || word.len() == last.len_utf8() {
            0
        } else {
            last.len_utf8()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let splitter = Splitter::named(name).unwrap().unwrap();
        splitter.split(text).unwrap().into_iter().map(|word| &text[word]).collect()
    }

    #[test]
    fn published_patterns() {
        assert_eq!(words("gpt-2", "I'm 12345,  \n\n ok"), ["I", "'m", " 12345", ",", "  \n\n", " ok"]);
        assert_eq!(words("smollm", "a 12  b\n"), ["a", " ", "1", "2", " ", " b", "\n"]);
        assert_eq!(
            words("llama-bpe", "I'M 12345,  \n\n ok\t "),
            ["I", "'M", " ", "123", "45", ",", "  \n\n", " ok", "\t "]
        );
        assert_eq!(words("qwen2", "12  x!\r\n\r\n  y"), ["1", "2", " ", " x", "!\r\n\r\n", " ", " y"]);
        assert_eq!(words("default", "a+1234 b"), ["a", "+", "123", "4", " b"]);
        assert!(Splitter::named("tekken").is_none());
    }

    /// The patterns as published, look-ahead included.
    fn reference(name: &str, text: &str) -> Vec<String> {
        let published = match name {
            "gpt-2" => GPT2,
            "llama-bpe" => LLAMA3,
            _ => QWEN2,
        };
        let published = format!(r"{}|\s+(?!\S)|\s+", published.strip_suffix(r"|\s+").unwrap());
        Regex::new(&published).unwrap().find_iter(text).map(|found| found.unwrap().as_str().to_string()).collect()
    }

    proptest! {
        #[test]
        fn giving_back_equals_look_ahead(text in "([ \t\r\n\u{a0}\u{3000}]{0,4}([a-zé1-9漢'!]|'ll|\\PC){0,3}){0,8}") {
            for name in ["gpt-2", "llama-bpe", "qwen2"] {
                prop_assert_eq!(words(name, &text), reference(name, &text), "{}", name);
            }
        }
    }

    #[test]
    fn long_runs_take_linear_time() {
        let text = " ".repeat(1 << 20) + "x";
        assert_eq!(words("gpt-2", &text).len(), 2);
        assert_eq!(words("llama-bpe", &("\n \t".repeat(1 << 18) + "x")).len(), 3);
    }
}
