//! SentencePiece (`llama`): neighbouring pieces merge into whichever token scores highest; what stays unknown becomes bytes.
//! Next on the data's way: token ids into a prompt.

use std::collections::BinaryHeap;

use super::table::Numbers;
use super::vocab::{Tables, Texts, VocabError};
use super::{RawVocab, TokenId};

/// The character that stands for a space in pieces, U+2581.
pub(super) const SPACE: &str = "\u{2581}";

/// The merging side of a SentencePiece vocabulary.
#[derive(Debug)]
pub struct Spm<'m> {
    /// By token, the bits of an `f32`. Invariant: no NaN and no negative zero, so that `total_cmp` orders as `<` does.
    scores: Numbers<'m>,
    /// The token of every byte: `<0x0A>`, else the byte as a string, else the unknown token.
    bytes: [Option<TokenId>; 256],
    /// Bytes in the longest token: nothing longer need be looked up.
    longest: usize,
}

/// Name of the table in a packed model.
const SCORES: &str = "scores";

impl<'m> Spm<'m> {
    /// Reads scores and finds the byte tokens.
    ///
    /// # Errors
    /// Fewer scores than tokens.
    pub(super) fn new<'r, S>(raw: &RawVocab<'r, S>, texts: &Texts<'m>, unk: Option<TokenId>) -> Result<Self, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        let tokens = raw.tokens.len();
        if raw.scores.len() < tokens {
            return Err(VocabError::TooFew { what: "scores", found: raw.scores.len(), tokens });
        }
        let ordered = |&score: &f32| if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 };
        let scores = raw.scores.iter().take(tokens).map(ordered).map(f32::to_bits).collect();
        Ok(Self::with(Numbers::Own(scores), texts, unk))
    }

    /// Takes the table of a packed model as it is. Whatever it holds, encoding ends and panics nowhere.
    ///
    /// # Errors
    /// It is missing.
    pub(super) fn mapped(tables: &Tables<'m>, texts: &Texts<'m>, unk: Option<TokenId>) -> Result<Self, VocabError> {
        Ok(Self::with(Numbers::mapped(tables.get(SCORES)?), texts, unk))
    }

    pub(super) fn into_owned(self) -> Spm<'static> {
        Spm { scores: self.scores.into_owned(), bytes: self.bytes, longest: self.longest }
    }

    /// The table that [`Spm::mapped`] reads.
    pub(super) fn to_tables(&self) -> Vec<(&'static str, Vec<u8>)> {
        vec![(SCORES, self.scores.to_bytes())]
    }

    fn with(scores: Numbers<'m>, texts: &Texts<'m>, unk: Option<TokenId>) -> Self {
        let mut bytes = [None; 256];
        for (byte, token) in (0..=255u8).zip(&mut bytes) {
            *token = texts.token(format!("<0x{byte:02X}>").as_bytes()).or_else(|| texts.token(&[byte])).or(unk);
        }
        Self { scores, bytes, longest: texts.longest() }
    }

    /// Appends the tokens of `text`, whose spaces are already [`SPACE`], to `ids`.
    pub(super) fn encode(&self, texts: &Texts, text: &str, ids: &mut Vec<TokenId>) {
        let mut merger =
            Merger { spm: self, texts, text: text.as_bytes(), symbols: Vec::new(), queue: BinaryHeap::new() };
        merger.merge();
        for symbol in merger.symbols.iter().filter(|symbol| symbol.len > 0) {
            let piece = merger.piece(*symbol);
            match texts.token(piece) {
                Some(id) => ids.push(id),
                None => ids.extend(piece.iter().filter_map(|byte| self.bytes[usize::from(*byte)])),
            }
        }
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.scores.memory_bytes()
    }
}

/// A piece of the text while it merges.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    start: u32,
    /// 0 once it went into its left neighbour.
    len: u32,
    prev: u32,
    next: u32,
}

const NOBODY: u32 = u32::MAX;

/// A possible merge; the highest score comes first, the leftmost of equals.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    /// Length of both together when it was offered: outdated if it differs now.
    len: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

struct Merger<'t> {
    spm: &'t Spm<'t>,
    texts: &'t Texts<'t>,
    text: &'t [u8],
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Candidate>,
}

impl<'t> Merger<'t> {
    fn merge(&mut self) {
        let mut start = 0usize;
        while let Some(&first) = self.text.get(start) {
            let len = utf8_len(first).min(self.text.len() - start);
            let i = self.symbols.len() as u32;
            let next = if start + len == self.text.len() { NOBODY } else { i + 1 };
            // `Vocab::encode` keeps texts below 2^32 bytes.
            self.symbols.push(Symbol { start: start as u32, len: len as u32, prev: i.wrapping_sub(1), next });
            start += len;
        }
        for right in 1..self.symbols.len() as u32 {
            self.offer(right - 1, right);
        }
        while let Some(candidate) = self.queue.pop() {
            let (left, right) = (self.symbols[candidate.left as usize], self.symbols[candidate.right as usize]);
            if left.len == 0 || right.len == 0 || left.len + right.len != candidate.len {
                continue;
            }
            self.symbols[candidate.left as usize].len = candidate.len;
            self.symbols[candidate.left as usize].next = right.next;
            self.symbols[candidate.right as usize].len = 0;
            if right.next != NOBODY {
                self.symbols[right.next as usize].prev = candidate.left;
                self.offer(candidate.left, right.next);
            }
            if left.prev != NOBODY {
                self.offer(left.prev, candidate.left);
            }
        }
    }

    fn piece(&self, symbol: Symbol) -> &'t [u8] {
        &self.text[symbol.start as usize..][..symbol.len as usize]
    }

    fn offer(&mut self, left: u32, right: u32) {
        let mut both = self.symbols[left as usize];
        both.len += self.symbols[right as usize].len;
        if both.len as usize > self.spm.longest {
            return;
        }
        if let Some(id) = self.texts.token(self.piece(both)) {
            let score = self.spm.scores.get(id.index()).map_or(f32::NEG_INFINITY, f32::from_bits);
            self.queue.push(Candidate { score, left, right, len: both.len });
        }
    }
}

/// Bytes of a UTF-8 character by its first byte.
fn utf8_len(first: u8) -> usize {
    match first {
        0xf0.. => 4,
        0xe0.. => 3,
        0xc0.. => 2,
        _ => 1,
    }
}
