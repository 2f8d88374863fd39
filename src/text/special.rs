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
    /// Does not tell upper from lower case: what it finds is looked at again.
    finder: AhoCorasick,
    /// Indices of the tokens that steer the model, by their text in lower case.
    steering: Vec<u32>,
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
            .ascii_case_insensitive(true)
            .build(tokens.iter().map(|token| token.text.as_bytes()))?;
        let mut steering: Vec<u32> =
            (0u32..).zip(&tokens).filter(|(_, token)| token.steers()).map(|(index, _)| index).collect();
        steering.sort_by(|&a, &b| lower(&tokens[a as usize].text).cmp(lower(&tokens[b as usize].text)));
        Ok(Self { tokens, finder, steering })
    }

    /// Where in a stranger's text a token that steers the model begins, or might once something is written behind it; rising.
    /// A template may change upper and lower case, so here they are the same.
    pub fn steering_points(&self, text: &str) -> Vec<usize> {
        let whole = self.finder.find_overlapping_iter(text);
        let mut points: Vec<usize> =
            whole.filter(|hit| self.tokens[hit.pattern().as_usize()].steers()).map(|hit| hit.start()).collect();
        let longest = self.tokens.first().map_or(0, |token| token.text.len());
        let tails = text.char_indices().rev().map(|(at, _)| at).take_while(|at| text.len() - at < longest);
        points.extend(tails.filter(|&at| self.may_become_steering(&text[at..])));
        points.sort_unstable();
        points.dedup();
        points
    }

    /// Whether a token that steers the model begins with `tail`.
    fn may_become_steering(&self, tail: &str) -> bool {
        let text = |index: u32| lower(&self.tokens[index as usize].text);
        let next = self.steering.partition_point(|&index| text(index).lt(lower(tail)));
        self.steering.get(next).is_some_and(|&index| text(index).take(tail.len()).eq(lower(tail)))
    }

    /// Cuts `text` at special tokens. Where a point of `quoted` (rising) lies in what looks like a token that steers the model, it
    /// is text.
    pub fn partition(&self, text: &str, parse_special: bool, quoted: &[usize]) -> Vec<Fragment> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut fragments = vec![Fragment::Text(0..text.len())];
        for i in self.occurring(text) {
            let token = &self.tokens[i];
            if parse_special || token.kind == Kind::UserDefined {
                fragments = cut_out(token, text, quoted, fragments);
            }
        }
        fragments
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        let texts: usize = self.tokens.iter().map(|token| token.text.len()).sum();
        texts
            + self.tokens.capacity() * size_of::<Special>()
            + self.steering.capacity() * size_of::<u32>()
            + self.finder.memory_usage()
    }

    /// The tokens that occur anywhere in `text`, longest first.
    fn occurring(&self, text: &str) -> Vec<usize> {
        let mut found = vec![false; self.tokens.len()];
        self.finder.find_overlapping_iter(text).for_each(|hit| found[hit.pattern().as_usize()] = true);
        found.iter().enumerate().filter(|(_, found)| **found).map(|(i, _)| i).collect()
    }
}

impl Special {
    /// Whether the token is more than text: users must not be able to write it.
    fn steers(&self) -> bool {
        self.kind != Kind::UserDefined
    }
}

fn lower(text: &str) -> impl Iterator<Item = u8> {
    text.bytes().map(|byte| byte.to_ascii_lowercase())
}

fn cut_out(token: &Special, text: &str, quoted: &[usize], fragments: Vec<Fragment>) -> Vec<Fragment> {
    let is_quoted = |begin: usize, end: usize| {
        let next = quoted.partition_point(|&point| point < begin);
        token.steers() && quoted.get(next).is_some_and(|&point| point < end)
    };
    let mut finer = Vec::with_capacity(fragments.len() + 2);
    for fragment in fragments {
        let Fragment::Text(Range { mut start, end }) = fragment else {
            finer.push(fragment);
            continue;
        };
        let mut from = start;
        while let Some(at) = text[from..end].find(&*token.text) {
            let begin = from + at;
            from = begin + token.text.len();
            if is_quoted(begin, from) {
                // The next one may begin inside of this one.
                from = begin + token.text.chars().next().map_or(1, char::len_utf8);
                continue;
            }
            if begin > start {
                finer.push(Fragment::Text(start..begin));
            }
            finer.push(Fragment::Token(token.id));
            if token.strips_right {
                let rest = &text[from..end];
                from = end - rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']).len();
            }
            start = from;
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
        assert_eq!(specials().partition("abcdab", false, &[]), expected);
    }

    #[test]
    fn control_tokens_are_text_unless_asked_for() {
        assert_eq!(specials().partition("<s> x", false, &[]), [Fragment::Text(0..5)]);
        assert_eq!(specials().partition("<s> x", true, &[]), [Fragment::Token(TokenId(3)), Fragment::Text(4..5)]);
        assert_eq!(specials().partition("<s> ", true, &[]), [Fragment::Token(TokenId(3))]);
        assert_eq!(specials().partition("", true, &[]), []);
    }

    #[test]
    fn steering_tokens_are_found_whole_and_half() {
        let points = |text| specials().steering_points(text);
        assert_eq!(points("ab <s> <S>x"), [3, 7], "user-defined tokens are text");
        assert_eq!(points("<s"), [0]);
        assert_eq!(points("<<S<"), [3], "only an end can be completed");
        assert!(points("a < b, <t").is_empty());
        assert_eq!(points("é<"), [2]);
        assert!(points("").is_empty());
    }

    #[test]
    fn a_quoted_token_is_text_and_its_neighbours_are_not() {
        let s = Fragment::Token(TokenId(3));
        let text = "<s>x<s>y<s>";
        let expected = [s.clone(), Fragment::Text(3..8), s.clone()];
        assert_eq!(specials().partition(text, true, &[4]), expected);
        assert_eq!(specials().partition("<<s>", true, &[0]), [Fragment::Text(0..1), s.clone()]);
        assert_eq!(specials().partition("<s><s>", true, &[3]), [s, Fragment::Text(3..6)]);
        assert_eq!(specials().partition("ab", true, &[0]), [Fragment::Token(TokenId(1))]);
    }
}
