//! The vocabulary: text to token ids and a token id to the bytes it prints.
//! Next on the data's way: ids go to `engine::queue`; printed bytes to `detokenize`.

use super::TokenId;
use super::bpe::{self, Bpe};
use super::quote::without_marks;
use super::special::{Fragment, Special, Specials};
use super::split::SplitError;
use super::spm::{self, Spm};
use super::table::{Arena, IndexTable, Seed};

mod eog;
mod raw;
mod tables;

pub use raw::{RawVocab, SpecialIds};
pub use tables::Tables;

/// Tokens in a vocabulary.
pub const MAX_VOCAB_TOKENS: usize = 4 << 20;
/// Bytes of text that one `encode` takes.
pub const MAX_TEXT_BYTES: usize = 256 << 20;
/// Heap bytes a token that loading takes besides the tables (scores and types as read from the file).
const LOADING_BYTES_PER_TOKEN: usize = 8;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A piece of text.
    Normal,
    /// Stands for what the vocabulary lacks; prints nothing unless asked.
    Unknown,
    /// Steers the model; prints nothing unless asked.
    Control,
    /// A piece of text that is found before anything else is.
    UserDefined,
    /// Never produced; prints nothing.
    Unused,
    /// A single byte, written `<0x0A>`.
    Byte,
}

/// Why a vocabulary cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum VocabError {
    /// The tokenizer's family is not implemented.
    #[error("tokenizer model `{found}` is not supported; supported: gpt2 (byte-level BPE), llama (SentencePiece)")]
    UnsupportedModel {
        /// The family found.
        found: String,
    },
    /// The way of cutting text into words is not implemented.
    #[error("pre-tokenizer `{found}` is not supported; supported: {}", super::split::SUPPORTED.join(", "))]
    UnsupportedPre {
        /// The name found.
        found: String,
    },
    /// Too many tokens, or none.
    #[error("a vocabulary of {found} tokens; 1 to {MAX_VOCAB_TOKENS} are taken")]
    Size {
        /// Tokens found.
        found: usize,
    },
    /// All strings together are too long.
    #[error("the strings of the vocabulary exceed 4 GiB")]
    TooLarge,
    /// An array is shorter than the list of tokens.
    #[error("{found} {what} for {tokens} tokens")]
    TooFew {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many tokens there are.
        tokens: usize,
    },
    /// A byte-level vocabulary without its merges.
    #[error("tokenizer model gpt2 without merges (tokenizer.ggml.merges)")]
    NoMerges,
    /// A merge that is not two strings with a space between them.
    #[error("merge {rank} is no pair separated by a space")]
    BadMerge {
        /// Its index.
        rank: usize,
    },
    /// The file wants a token added that it does not name.
    #[error("the model wants {token} added to every prompt, but names no such token among its {tokens}")]
    MissingSpecial {
        /// BOS or EOS.
        token: &'static str,
        /// How many tokens there are.
        tokens: usize,
    },
    /// A table of a packed model.
    #[error(
        "table {name:?} of the vocabulary is missing or damaged; hearth inspect --verify FILE tells, packing again mends it"
    )]
    Table {
        /// Its name.
        name: &'static str,
    },
    /// A pattern of the pre-tokenizer does not compile.
    #[error(transparent)]
    Pattern(#[from] SplitError),
    /// The special tokens cannot be indexed.
    #[error("special tokens: {reason}")]
    Specials {
        /// What the search automaton says.
        reason: String,
    },
}

/// Why a text cannot be tokenized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// Longer than one call takes.
    #[error("{bytes} bytes of text; at most {MAX_TEXT_BYTES} are tokenized at once")]
    TooLong {
        /// The text's length.
        bytes: usize,
    },
    /// The pattern engine gave up.
    #[error(transparent)]
    Pattern(#[from] SplitError),
}

/// A vocabulary ready for use: built here from what the file lists, or the tables of a packed model, mapped.
#[derive(Debug)]
pub struct Vocab<'m> {
    texts: Texts<'m>,
    /// What each token prints as when control tokens are shown.
    printed: Arena<'m>,
    kinds: Vec<Kind>,
    specials: Specials,
    merger: Merger<'m>,
    ids: SpecialIds,
    /// Sorted.
    eog: Vec<TokenId>,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
}

#[derive(Debug)]
enum Merger<'m> {
    Bpe(Box<Bpe<'m>>),
    Spm(Box<Spm<'m>>),
}

impl<'m> Vocab<'m> {
    /// Builds the tables. Nothing of the file is kept.
    ///
    /// # Errors
    /// What the file says cannot be used, see [`VocabError`].
    pub fn new<'r, S>(raw: &RawVocab<'r, S>) -> Result<Self, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        Self::build(raw, Seed::random())
    }

    fn build<'r, S>(raw: &RawVocab<'r, S>, seed: Seed) -> Result<Self, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        let is_spm = raw.is_spm()?;
        let mut kinds = raw.kinds()?;
        let mut texts = Texts::new(raw.tokens.clone(), seed)?;
        let ids = raw.special_ids(is_spm);
        let merger = if is_spm {
            Merger::Spm(Box::new(Spm::new(raw, &texts, ids.unk)?))
        } else {
            Merger::Bpe(Box::new(Bpe::new(raw, &mut texts)?))
        };
        texts.arena.shrink();
        let eog = eog::detect(&texts, &ids, &mut kinds);
        let printed = print_all(&texts, &kinds, is_spm)?;
        Self::assemble(raw, texts, printed, kinds, eog, merger)
    }

    fn assemble<'r, S>(
        raw: &RawVocab<'r, S>,
        texts: Texts<'m>,
        printed: Arena<'m>,
        kinds: Vec<Kind>,
        eog: Vec<TokenId>,
        merger: Merger<'m>,
    ) -> Result<Self, VocabError>
    where
        S: ExactSizeIterator<Item = &'r [u8]> + Clone,
    {
        let is_spm = matches!(merger, Merger::Spm(_));
        let ids = raw.special_ids(is_spm);
        let specials = collect_specials(&texts, &kinds, raw.strips_right_of_specials())?;
        let tokens = kinds.len();
        let vocab = Self {
            printed,
            texts,
            kinds,
            specials,
            merger,
            ids,
            eog,
            add_bos: raw.add_bos.unwrap_or(is_spm || raw.pre == Some("llama-bpe")),
            add_eos: raw.add_eos.unwrap_or(false),
            add_space_prefix: raw.add_space_prefix.unwrap_or(is_spm),
        };
        for (wanted, id, token) in [(vocab.add_bos, ids.bos, "BOS"), (vocab.add_eos, ids.eos, "EOS")] {
            if wanted && id.is_none() {
                return Err(VocabError::MissingSpecial { token, tokens });
            }
        }
        Ok(vocab)
    }

    /// The same without the file that tables may be mapped from. What was built here is moved, not copied.
    pub fn into_owned(self) -> Vocab<'static> {
        let Self { texts, printed, kinds, specials, merger, ids, eog, add_bos, add_eos, add_space_prefix } = self;
        let Texts { arena, index, seed, tokens } = texts;
        let texts = Texts { arena: arena.into_owned(), index: index.into_owned(), seed, tokens };
        let merger = match merger {
            Merger::Bpe(bpe) => Merger::Bpe(Box::new(bpe.into_owned())),
            Merger::Spm(spm) => Merger::Spm(Box::new(spm.into_owned())),
        };
        let printed = printed.into_owned();
        Vocab { texts, printed, kinds, specials, merger, ids, eog, add_bos, add_eos, add_space_prefix }
    }

    /// Turns text into tokens. `add_special` adds BOS and EOS as the model wants; `parse_special` takes text that looks
    /// like a control token for one (only for text that this program wrote).
    ///
    /// # Errors
    /// The text is longer than [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        self.encode_but(text, add_special, parse_special, &[])
    }

    /// Turns a rendered chat template into tokens: text that looks like a control token is one, but where a mark of
    /// [`quote`](super::quote::quote) says that a user wrote it. Adds no token; without marks it is `encode(text, false, true)`.
    ///
    /// # Errors
    /// The text is longer than [`MAX_TEXT_BYTES`].
    pub fn encode_quoted(&self, text: &str, mark: char) -> Result<Vec<TokenId>, EncodeError> {
        let (plain, quoted) = without_marks(text, mark);
        self.encode_but(&plain, false, true, &quoted)
    }

    pub(super) fn steering_points(&self, text: &str) -> Vec<usize> {
        self.specials.steering_points(text)
    }

    /// What begins at one of `quoted` is no control token.
    fn encode_but(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
        quoted: &[usize],
    ) -> Result<Vec<TokenId>, EncodeError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(EncodeError::TooLong { bytes: text.len() });
        }
        let mut ids = Vec::with_capacity(text.len() / 4 + 2);
        ids.extend(self.ids.bos.filter(|_| add_special && self.add_bos));
        let mut after_special = true;
        for fragment in self.specials.partition(text, parse_special, quoted) {
            match (fragment, &self.merger) {
                (Fragment::Token(id), _) => {
                    ids.push(id);
                    after_special = true;
                }
                (Fragment::Text(range), Merger::Bpe(bpe)) => bpe.encode(&self.texts, &text[range], &mut ids)?,
                (Fragment::Text(range), Merger::Spm(spm)) => {
                    let prefix = if self.add_space_prefix && after_special { spm::SPACE } else { "" };
                    let escaped = prefix.to_string() + &text[range].replace(' ', spm::SPACE);
                    spm.encode(&self.texts, &escaped, &mut ids);
                    after_special = false;
                }
            }
        }
        ids.extend(self.ids.eos.filter(|_| add_special && self.add_eos));
        Ok(ids)
    }

    /// What a sequence of tokens prints as from its beginning: a space that `encode` put in front is taken off again.
    pub fn decode(&self, ids: &[TokenId], special: bool) -> Vec<u8> {
        let mut out = Vec::new();
        for (i, id) in ids.iter().enumerate() {
            let bytes = self.token_bytes(*id, special);
            let bytes = bytes.strip_prefix(b" ").filter(|_| i == 0 && self.add_space_prefix).unwrap_or(bytes);
            out.extend_from_slice(bytes);
        }
        out
    }

    /// What one token prints as, maybe half a character. Control tokens print nothing unless `special`; an id outside the
    /// vocabulary prints nothing.
    pub fn token_bytes(&self, id: TokenId, special: bool) -> &[u8] {
        if self.is_control(id) && !special { &[] } else { self.printed.get(id.0) }
    }

    /// The token as it stands in the file; empty outside the vocabulary.
    pub fn text_of(&self, id: TokenId) -> &[u8] {
        if id.index() < self.len() { self.texts.get(id.0) } else { &[] }
    }

    /// Whether the token is a control or unknown token.
    pub fn is_control(&self, id: TokenId) -> bool {
        matches!(self.kinds.get(id.index()), Some(Kind::Control | Kind::Unknown))
    }

    /// Every token that ends an answer, in order.
    pub fn eog_ids(&self) -> &[TokenId] {
        &self.eog
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<TokenId> {
        self.ids.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<TokenId> {
        self.ids.eos
    }

    /// Whether `encode` puts BOS in front when it adds special tokens.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Tokens in the vocabulary.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Never true: a vocabulary has a token.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Heap bytes held, with what loading took on top; an upper estimate for the memory plan.
    pub fn memory_bytes(&self) -> usize {
        let merger = match &self.merger {
            Merger::Bpe(bpe) => bpe.memory_bytes() + size_of::<Bpe<'_>>(),
            Merger::Spm(spm) => spm.memory_bytes() + size_of::<Spm<'_>>(),
        };
        self.texts.memory_bytes()
            + self.printed.memory_bytes()
            + self.kinds.capacity()
            + self.specials.memory_bytes()
            + merger
            + self.eog.capacity() * size_of::<TokenId>()
            + self.len() * LOADING_BYTES_PER_TOKEN
    }
}

/// The strings of a vocabulary: tokens first, then strings that only merges speak of.
#[derive(Debug)]
pub(super) struct Texts<'m> {
    arena: Arena<'m>,
    index: IndexTable<'m>,
    seed: Seed,
    tokens: u32,
}

impl<'m> Texts<'m> {
    fn new<'r>(list: impl ExactSizeIterator<Item = &'r [u8]> + Clone, seed: Seed) -> Result<Self, VocabError> {
        let tokens = list.len();
        let bytes = list.clone().map(<[u8]>::len).sum();
        let mut texts = Self {
            arena: Arena::with_capacity(tokens, bytes),
            index: IndexTable::with_capacity(tokens),
            seed,
            tokens: u32::try_from(tokens).map_err(|_| VocabError::Size { found: tokens })?,
        };
        for text in list {
            let number = texts.arena.push(&[text]).ok_or(VocabError::TooLarge)?;
            // An empty token matches nothing; of two that look the same the first is meant.
            if !text.is_empty() && texts.find(text).is_none() {
                texts.index.insert(number, |i| texts.seed.hash(texts.arena.get(i)));
            }
        }
        Ok(texts)
    }

    pub(super) fn seed(&self) -> Seed {
        self.seed
    }

    /// The number of the string that `parts` make, which is added if it is new.
    pub(super) fn intern(&mut self, parts: &[&[u8]]) -> Result<u32, VocabError> {
        let number = self.arena.push(parts).ok_or(VocabError::TooLarge)?;
        if let Some(known) = self.find(self.arena.get(number)) {
            self.arena.pop();
            return Ok(known);
        }
        self.index.insert(number, |i| self.seed.hash(self.arena.get(i)));
        Ok(number)
    }

    /// The token with this text.
    pub(super) fn token(&self, text: &[u8]) -> Option<TokenId> {
        self.as_token(self.find(text)?)
    }

    /// The token with this string number, unless only merges speak of it.
    pub(super) fn as_token(&self, number: u32) -> Option<TokenId> {
        (number < self.tokens).then_some(TokenId(number))
    }

    pub(super) fn get(&self, number: u32) -> &[u8] {
        self.arena.get(number)
    }

    /// Bytes of the longest token.
    pub(super) fn longest(&self) -> usize {
        (0..self.tokens).map(|number| self.get(number).len()).max().unwrap_or(0)
    }

    pub(super) fn find(&self, text: &[u8]) -> Option<u32> {
        self.index.find(self.seed.hash(text), |i| self.arena.get(i) == text)
    }

    fn memory_bytes(&self) -> usize {
        self.arena.memory_bytes() + self.index.memory_bytes()
    }
}

fn collect_specials(texts: &Texts<'_>, kinds: &[Kind], strip: bool) -> Result<Specials, VocabError> {
    let mut found = Vec::new();
    for (number, &kind) in (0u32..).zip(kinds) {
        let text = texts.get(number);
        if text.is_empty() || !matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown) {
            continue;
        }
        // Input is UTF-8, so a token that is not can never occur in it.
        if let Ok(text) = std::str::from_utf8(text) {
            let strips_right = strip && !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
            found.push(Special { id: TokenId(number), text: text.into(), kind, strips_right });
        }
    }
    found.shrink_to_fit();
    Specials::new(found).map_err(|e| VocabError::Specials { reason: e.to_string() })
}

fn print_all<'m>(texts: &Texts<'_>, kinds: &[Kind], is_spm: bool) -> Result<Arena<'m>, VocabError> {
    let mut printed = Arena::with_capacity(kinds.len(), texts.arena.total_bytes());
    let mut piece = Vec::new();
    for (number, &kind) in (0u32..).zip(kinds) {
        piece.clear();
        print(texts.get(number), kind, is_spm, &mut piece);
        printed.push(&[&piece]).ok_or(VocabError::TooLarge)?;
    }
    printed.shrink();
    Ok(printed)
}

fn print(text: &[u8], kind: Kind, is_spm: bool, out: &mut Vec<u8>) {
    match kind {
        Kind::Control | Kind::Unknown | Kind::UserDefined => out.extend_from_slice(text),
        Kind::Unused => {}
        Kind::Byte => match byte_of(text) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(text),
        },
        Kind::Normal if is_spm => {
            let mut rest = text;
            while let Some(at) = rest.windows(spm::SPACE.len()).position(|window| window == spm::SPACE.as_bytes()) {
                out.extend_from_slice(&rest[..at]);
                out.push(b' ');
                rest = &rest[at + spm::SPACE.len()..];
            }
            out.extend_from_slice(rest);
        }
        Kind::Normal => {
            for character in String::from_utf8_lossy(text).chars() {
                match bpe::char_byte(character) {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
        }
    }
}

/// The byte of `<0x0A>`.
fn byte_of(text: &[u8]) -> Option<u8> {
    let hex = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    (hex.len() == 2 && hex.iter().all(u8::is_ascii_hexdigit))
        .then(|| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok())?
}

#[cfg(test)]
mod tests;
