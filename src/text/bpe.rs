//! Byte-level byte-pair encoding (`gpt2`): bytes stand as printable characters, pairs merge by rank.
//! Next on the data's way: token ids into a prompt.
//!
//! Merges are keyed by pairs of string numbers. A string that merges speak of but the vocabulary lacks gets a number past
//! the vocabulary's end; where one survives merging, its single-byte parts are looked up instead.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::split::Splitter;
use super::table::{IndexTable, Numbers, Seed};
use super::vocab::{EncodeError, Tables, Texts, VocabError};
use super::{RawVocab, TokenId};

/// One merge: the pair and what it becomes, as string numbers. Its rank is its index.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Merge {
    left: u32,
    right: u32,
    merged: u32,
}

/// The merging side of a byte-level vocabulary.
#[derive(Debug)]
pub struct Bpe<'m> {
    splitter: Splitter,
    /// A word that is a token as it stands is taken without merging.
    whole_words_first: bool,
    merges: Merges<'m>,
    by_pair: IndexTable<'m>,
    seed: Seed,
    /// The string number of every byte's character.
    bytes: [u32; 256],
}

/// Three numbers a merge: left, right, merged.
#[derive(Debug)]
struct Merges<'m>(Numbers<'m>);

impl Merges<'_> {
    fn get(&self, rank: u32) -> Option<Merge> {
        let at = (rank as usize).checked_mul(3)?;
        Some(Merge { left: self.0.get(at)?, right: self.0.get(at + 1)?, merged: self.0.get(at + 2)? })
    }

    fn is_pair(&self, rank: u32, left: u32, right: u32) -> bool {
        self.get(rank).is_some_and(|merge| (merge.left, merge.right) == (left, right))
    }
}

impl<'m> Bpe<'m> {
    /// Reads merges; strings they speak of are added to `texts`.
    ///
    /// # Errors
    /// Unknown pre-tokenizer, no merges, or a merge that is no pair.
    pub(super) fn new<'r, S>(raw: &RawVocab<'r, S>, texts: &mut Texts<'m>) -> Result<Self, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        let (splitter, whole_words_first) = splitter(raw.pre)?;
        let listed = raw.merges.clone().ok_or(VocabError::NoMerges)?;

        let mut bytes = [0; 256];
        for (byte, number) in (0..=255u8).zip(&mut bytes) {
            *number = texts.intern(&[byte_char(byte).encode_utf8(&mut [0; 4]).as_bytes()])?;
        }
        let seed = texts.seed();
        let mut merges = Merges(Numbers::Own(Vec::with_capacity(listed.len().saturating_mul(3))));
        let mut by_pair = IndexTable::with_capacity(listed.len());
        for (rank, line) in listed.enumerate() {
            // The first space may be the pair's left side itself.
            let space = line.iter().skip(1).position(|&byte| byte == b' ');
            let (left, right) = match space {
                Some(at) => (&line[..at + 1], &line[at + 2..]),
                None => return Err(VocabError::BadMerge { rank }),
            };
            let merge = Merge {
                left: texts.intern(&[left])?,
                right: texts.intern(&[right])?,
                merged: texts.intern(&[left, right])?,
            };
            let is_same = |i: u32| merges.is_pair(i, merge.left, merge.right);
            let known = by_pair.find(seed.hash_pair(merge.left, merge.right), is_same).is_some();
            merges.0.own().extend([merge.left, merge.right, merge.merged]);
            if !known {
                let hash_of = |i: u32| merges.get(i).map_or(0, |merge| seed.hash_pair(merge.left, merge.right));
                by_pair.insert(rank as u32, hash_of);
            }
        }
        Ok(Self { splitter, whole_words_first, merges, by_pair, seed, bytes })
    }

    /// Takes the tables of a packed model as they are. Whatever they hold, encoding ends and panics nowhere.
    ///
    /// # Errors
    /// Unknown pre-tokenizer, or a table is missing or has a size that none has.
    pub(super) fn mapped(pre: Option<&str>, tables: &Tables<'m>, texts: &Texts<'m>) -> Result<Self, VocabError> {
        let (splitter, whole_words_first) = splitter(pre)?;
        let mut bytes = [MERGED; 256];
        for (byte, number) in (0..=255u8).zip(&mut bytes) {
            let damaged = VocabError::Table { name: "index" };
            *number = texts.find(byte_char(byte).encode_utf8(&mut [0; 4]).as_bytes()).ok_or(damaged)?;
        }
        Ok(Self {
            splitter,
            whole_words_first,
            merges: Merges(Numbers::mapped(tables.get(MERGES)?)),
            by_pair: IndexTable::mapped(tables.get(PAIRS)?).ok_or(VocabError::Table { name: PAIRS })?,
            seed: texts.seed(),
            bytes,
        })
    }

    pub(super) fn into_owned(self) -> Bpe<'static> {
        let Self { splitter, whole_words_first, merges, by_pair, seed, bytes } = self;
        let (merges, by_pair) = (Merges(merges.0.into_owned()), by_pair.into_owned());
        Bpe { splitter, whole_words_first, merges, by_pair, seed, bytes }
    }

    /// The tables that [`Bpe::mapped`] reads.
    pub(super) fn to_tables(&self) -> Vec<(&'static str, Vec<u8>)> {
        vec![(MERGES, self.merges.0.to_bytes()), (PAIRS, self.by_pair.to_table())]
    }

    /// Appends the tokens of `text` to `ids`.
    pub(super) fn encode(&self, texts: &Texts, text: &str, ids: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        let words = self.splitter.split(text)?;
        let mut merger = Merger { bpe: self, symbols: Vec::new(), queue: BinaryHeap::new() };
        for word in words {
            let word = &text.as_bytes()[word];
            match self.whole_word(texts, word) {
                Some(id) => ids.push(id),
                None => merger.merge(texts, word, ids),
            }
        }
        Ok(())
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.splitter.memory_bytes() + self.merges.0.memory_bytes() + self.by_pair.memory_bytes()
    }

    fn whole_word(&self, texts: &Texts, word: &[u8]) -> Option<TokenId> {
        if !self.whole_words_first {
            return None;
        }
        let encoded: String = word.iter().map(|&byte| byte_char(byte)).collect();
        texts.token(encoded.as_bytes())
    }

    fn rank(&self, left: u32, right: u32) -> Option<u32> {
        self.by_pair.find(self.seed.hash_pair(left, right), |i| self.merges.is_pair(i, left, right))
    }
}

/// The word cutter of a pre-tokenizer, and whether whole words are looked up before merging.
fn splitter(pre: Option<&str>) -> Result<(Splitter, bool), VocabError> {
    let pre = pre.unwrap_or("default");
    let splitter = Splitter::named(pre).ok_or_else(|| VocabError::UnsupportedPre { found: pre.to_string() })??;
    Ok((splitter, pre == "llama-bpe"))
}

/// Names of the tables in a packed model.
const MERGES: &str = "merges";
const PAIRS: &str = "pairs";

/// A piece of a word while it merges.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    /// String number; `MERGED` once it went into its left neighbour.
    number: u32,
    prev: u32,
    next: u32,
}

const MERGED: u32 = u32::MAX;
const NOBODY: u32 = u32::MAX;

/// A possible merge; the lowest rank comes first, the leftmost of equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: u32,
    right: u32,
}

/// Buffers that live for one `encode`.
struct Merger<'b> {
    bpe: &'b Bpe<'b>,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

impl Merger<'_> {
    fn merge(&mut self, texts: &Texts, word: &[u8], ids: &mut Vec<TokenId>) {
        self.symbols.clear();
        // `Vocab::encode` keeps texts below 2^32 bytes.
        let last = word.len().saturating_sub(1) as u32;
        self.symbols.extend(word.iter().zip(0u32..).map(|(&byte, i)| Symbol {
            number: self.bpe.bytes[usize::from(byte)],
            prev: i.wrapping_sub(1),
            next: if i == last { NOBODY } else { i + 1 },
        }));
        for left in 0..last {
            self.offer(left, left + 1);
        }
        while let Some(Reverse(Candidate { rank, left, right })) = self.queue.pop() {
            let Some(merge) = self.bpe.merges.get(rank) else { continue };
            let (left_symbol, right_symbol) = (self.symbols[left as usize], self.symbols[right as usize]);
            // Neighbours stay neighbours until the right one is gone; a changed number means an outdated candidate. A damaged table
            // may speak of what is gone: every merge that is done must take one symbol away, or this would not end.
            let is_outdated = left_symbol.number != merge.left || right_symbol.number != merge.right;
            if is_outdated || left_symbol.number == MERGED || right_symbol.number == MERGED {
                continue;
            }
            self.symbols[left as usize].number = merge.merged;
            self.symbols[left as usize].next = right_symbol.next;
            self.symbols[right as usize].number = MERGED;
            if right_symbol.next != NOBODY {
                self.symbols[right_symbol.next as usize].prev = left;
                self.offer(left, right_symbol.next);
            }
            if left_symbol.prev != NOBODY {
                self.offer(left_symbol.prev, left);
            }
        }
        for symbol in self.symbols.iter().filter(|symbol| symbol.number != MERGED) {
            match texts.as_token(symbol.number) {
                Some(id) => ids.push(id),
                None => ids.extend(texts.get(symbol.number).iter().filter_map(|byte| texts.token(&[*byte]))),
            }
        }
    }

    fn offer(&mut self, left: u32, right: u32) {
        let (first, second) = (self.symbols[left as usize].number, self.symbols[right as usize].number);
        if let Some(rank) = self.bpe.rank(first, second) {
            self.queue.push(Reverse(Candidate { rank, left, right }));
        }
    }
}

/// The character that stands for a byte: itself where it is printable, one from U+0100 on where it is not.
pub(super) fn byte_char(byte: u8) -> char {
    match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0x00..=0x20 => shifted(byte, 0),
        0x7f..=0xa0 => shifted(byte, 0x7f - 0x21),
        0xad => '\u{143}',
    }
}

/// The byte a character stands for.
pub(super) fn char_byte(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

fn shifted(byte: u8, gap: u32) -> char {
    char::from_u32(0x100 + u32::from(byte) - gap).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_characters_are_one_to_one() {
        assert_eq!((byte_char(b' '), byte_char(b'\n'), byte_char(0x7f), byte_char(0xa0)), ('Ġ', 'Ċ', 'ġ', 'ł'));
        for byte in 0..=255u8 {
            assert_eq!(char_byte(byte_char(byte)), Some(byte));
        }
        assert_eq!(char_byte('漢'), None);
        assert_eq!(char_byte(' '), None);
    }
}
