//! Text on one side, token ids on the other: vocabularies, chat templates, streaming detokenization.
//! Next on the data's way: `engine::queue`, which carries token ids only.
//!
//! A prompt: [`quote`] marks what users may not say, [`chat`] renders messages to text, [`vocab`] splits off [`special`] tokens and hands the rest to [`bpe`] (cut
//! into words by [`split`]) or [`spm`]. An answer: [`detokenize`] turns ids back into text, [`stop`] looks for its end; [`constrain`] says what may come next where a
//! grammar has a say.

pub mod bpe;
pub mod chat;
pub mod constrain;
pub mod detokenize;
pub mod quote;
pub mod special;
pub mod split;
pub mod spm;
pub mod stop;
pub mod table;
pub mod vocab;

pub use detokenize::Detokenizer;
pub use stop::{StopError, StopMatcher};
pub use vocab::{EncodeError, RawVocab, Vocab, VocabError};

/// A token's index in the model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

impl TokenId {
    /// The id as an index into a table of the vocabulary's length.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
