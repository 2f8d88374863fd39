//! Special tokens in running text: where `<|im_start|>` and its like are cut out before the rest is tokenized.
//! Next on the data's way: `bpe` or `spm` for the stretches of text between them.

use std::ops::Range;

use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError, MatchKind};

use super::TokenId;
use super::vocab::Kind;

/// A stretch of the input.
#[derive(Clone, Debug, PartialEq)]
pub enum Fragment {
    /// Ordinary text, as a byte range of the input; not empty.
    Text(Range<usize>),
    /// A special token.
    Token(TokenId),
}

/// One special token.
#[derive(Clone, Debug)]
pub struct Special {
    /// Its id.
    pub id: TokenId,
    /// What it looks like in text; not empty.
    pub text: Box<str>,
    /// Control and unknown tokens count only where the caller asked for special tokens, user-defined ones always.
    pub kind: Kind,
    /// White space behind it is dropped (the Phi-3 family).
    pub strips_right: bool,
}

/// Every special token of a vocabulary.
#[derive(Debug)]
pub struct Specials {
    /// Longest first: a longer token takes its text before a shorter one may look at it. Pattern `i` of `finder`.
    tokens: Vec<Special>,
    finder: AhoCorasick,
}

impl Specials {
    /// Builds the search automaton.
    ///
    /// # Errors
    /// The automaton would be too large.
    pub fn new(mut tokens: Vec<Special>) -> Result<Self, BuildError> {
        tokens.sort_by_key(|token| (std::cmp::Reverse(token.text.len()), token.id));
        let finder = AhoCorasick::builder()
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .match_kind(MatchKind::Standard)
            .build(tokens.iter().map(|token| token.text.as_bytes()))?;
        Ok(Self { tokens, finder })
    }

    /// Cuts `text` at special tokens.
    pub fn partition(&self, text: &str, parse_special: bool) -> Vec<Fragment> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut fragments = vec![Fragment::Text(0..text.len())];
        for i in self.occurring(text) {
            let token = &self.tokens[i];
            if parse_special || token.kind == Kind::UserDefined {
                fragments = cut_out(token, text, fragments);
            }
        }
        fragments
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        let texts: usize = self.tokens.iter().map(|token| token.text.len()).sum();
        texts + self.tokens.capacity() * size_of::<Special>() + self.finder.memory_usage()
    }

    /// The tokens that occur anywhere in `text`, longest first.
    fn occurring(&self, text: &str) -> Vec<usize> {
        let mut found = vec![false; self.tokens.len()];
        self.finder.find_overlapping_iter(text).for_each(|hit| found[hit.pattern().as_usize()] = true);
        found.iter().enumerate().filter(|(_, found)| **found).map(|(i, _)| i).collect()
    }
}

fn cut_out(token: &Special, text: &str, fragments: Vec<Fragment>) -> Vec<Fragment> {
    let mut finer = Vec::with_capacity(fragments.len() + 2);
    for fragment in fragments {
        let Fragment::Text(Range { mut start, end }) = fragment else {
            finer.push(fragment);
            continue;
        };
        while let Some(at) = text[start..end].find(&*token.text) {
            if at > 0 {
                finer.push(Fragment::Text(start..start + at));
            }
            finer.push(Fragment::Token(token.id));
            start += at + token.text.len();
            if token.strips_right {
                let rest = &text[start..end];
                start = end - rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']).len();
            }
        }
        if start < end {
            finer.push(Fragment::Text(start..end));
        }
    }
    finer
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn specials() -> Specials {
        let token =
            |id, text: &str, kind, strips_right| Special { id: TokenId(id), text: text.into(), kind, strips_right };
        Specials::new(vec![
            token(1, "ab", Kind::UserDefined, false),
            token(2, "bcd", Kind::UserDefined, false),
            token(3, "<s>", Kind::Control, true),
        ])
        .unwrap()
    }

    #[test]
    fn the_longer_token_wins_even_from_the_right() {
        let expected = [Fragment::Text(0..1), Fragment::Token(TokenId(2)), Fragment::Token(TokenId(1))];
        assert_eq!(specials().partition("abcdab", false), expected);
    }

    #[test]
    fn control_tokens_are_text_unless_asked_for() {
        assert_eq!(specials().partition("<s> x", false), [Fragment::Text(0..5)]);
        assert_eq!(specials().partition("<s> x", true), [Fragment::Token(TokenId(3)), Fragment::Text(4..5)]);
        assert_eq!(specials().partition("<s> ", true), [Fragment::Token(TokenId(3))]);
        assert_eq!(specials().partition("", true), []);
    }
}
