//! Text on one side, token ids on the other: vocabularies, chat templates, streaming detokenization.
//! Next on the data's way: `engine::queue`, which carries token ids only.

/// A token's index in the model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

impl TokenId {
    /// The id as an index into a table of the vocabulary's length.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
