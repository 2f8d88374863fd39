//! A vocabulary as the model file states it, borrowed: what `model::vocab` reads and [`Vocab`](super::Vocab) builds on.
//! Next on the data's way: `Vocab::new`.

use super::{Kind, MAX_VOCAB_TOKENS, VocabError};
use crate::text::TokenId;

/// A tokenizer's metadata. `S` lists byte strings; listing them twice gives the same.
#[derive(Clone, Debug)]
pub struct RawVocab<'m, S> {
    /// The tokenizer's family (`tokenizer.ggml.model`).
    pub model: &'m str,
    /// How text is cut into words (`tokenizer.ggml.pre`).
    pub pre: Option<&'m str>,
    /// The model's name (`general.name`): the Phi-3 family drops white space behind special tokens and says so nowhere else.
    pub name: Option<&'m str>,
    /// Every token's text.
    pub tokens: S,
    /// Every token's score; may be empty for a byte-level vocabulary.
    pub scores: Vec<f32>,
    /// Every token's kind as GGUF numbers it; empty where the file does not say.
    pub token_types: Vec<i32>,
    /// Pairs with a space between them, in order of rank.
    pub merges: Option<S>,
    /// Tokens with a role.
    pub special: SpecialIds,
    /// Whether BOS goes in front of a prompt.
    pub add_bos: Option<bool>,
    /// Whether EOS goes behind a prompt.
    pub add_eos: Option<bool>,
    /// Whether a space goes in front of text.
    pub add_space_prefix: Option<bool>,
}

/// Tokens with a role. An id outside the vocabulary counts as absent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SpecialIds {
    /// Begins a text.
    pub bos: Option<TokenId>,
    /// Ends a text.
    pub eos: Option<TokenId>,
    /// Ends a turn.
    pub eot: Option<TokenId>,
    /// Ends a message.
    pub eom: Option<TokenId>,
    /// Stands for what the vocabulary lacks.
    pub unk: Option<TokenId>,
    /// Fills up.
    pub pad: Option<TokenId>,
    /// Fills up a fill-in-the-middle prompt.
    pub fim_pad: Option<TokenId>,
    /// Names a repository in a fill-in-the-middle prompt.
    pub fim_rep: Option<TokenId>,
    /// Separates files in a fill-in-the-middle prompt.
    pub fim_sep: Option<TokenId>,
}

impl<'m, S> RawVocab<'m, S>
where
    S: ExactSizeIterator<Item = &'m [u8]> + Clone,
{
    /// Whether the family is SentencePiece, else byte-level BPE.
    pub(super) fn is_spm(&self) -> Result<bool, VocabError> {
        let tokens = self.tokens.len();
        if tokens == 0 || tokens > MAX_VOCAB_TOKENS {
            return Err(VocabError::Size { found: tokens });
        }
        match self.model {
            "llama" => Ok(true),
            "gpt2" => Ok(false),
            other => Err(VocabError::UnsupportedModel { found: other.to_string() }),
        }
    }

    /// Every token's kind.
    pub(super) fn kinds(&self) -> Result<Vec<Kind>, VocabError> {
        let tokens = self.tokens.len();
        if self.token_types.is_empty() {
            return Ok(vec![Kind::Normal; tokens]);
        }
        if self.token_types.len() < tokens {
            return Err(VocabError::TooFew { what: "token types", found: self.token_types.len(), tokens });
        }
        let kind = |number: &i32| match number {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            6 => Kind::Byte,
            _ => Kind::Unused,
        };
        Ok(self.token_types.iter().take(tokens).map(kind).collect())
    }

    /// The roles, with SentencePiece's defaults, without ids outside the vocabulary.
    pub(super) fn special_ids(&self, is_spm: bool) -> SpecialIds {
        let tokens = self.tokens.len();
        let role = |id: Option<TokenId>, default: u32| {
            let inside = |id: &TokenId| id.index() < tokens;
            id.filter(inside).or(Some(TokenId(default)).filter(|id| is_spm && inside(id)))
        };
        let given = |id: Option<TokenId>| id.filter(|id| id.index() < tokens);
        let SpecialIds { bos, eos, eot, eom, unk, pad, fim_pad, fim_rep, fim_sep } = self.special;
        SpecialIds {
            bos: role(bos, 1),
            eos: role(eos, 2),
            unk: role(unk, 0),
            eot: given(eot),
            eom: given(eom),
            pad: given(pad),
            fim_pad: given(fim_pad),
            fim_rep: given(fim_rep),
            fim_sep: given(fim_sep),
        }
    }

    pub(super) fn strips_right_of_specials(&self) -> bool {
        let name = self.name.unwrap_or_default().to_lowercase();
        name.contains("phi-3") || name.contains("phi3")
    }
}
