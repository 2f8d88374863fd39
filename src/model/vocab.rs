//! The tokenizer's part of a model file, as `text` wants it.
//! Next on the data's way: `text::Vocab` takes a packed model's tables or builds them, `text::chat` compiles the template.

use super::gguf::{Gguf, GgufError, Strings};
use super::packed::TABLE_PREFIX;
use crate::text::vocab::{SpecialIds, Tables};
use crate::text::{RawVocab, TokenId, Vocab, VocabError};

/// Beginning of the names of the tables, behind [`TABLE_PREFIX`].
const VOCAB_PREFIX: &str = "vocab.";

/// Why a file gives no vocabulary.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its metadata.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// What they say.
    #[error(transparent)]
    Vocab(#[from] VocabError),
}

/// The vocabulary of a model file: the tables of a packed one as they are mapped, else built.
///
/// # Errors
/// The tokenizer is missing or not supported, or a packed file's tables do not fit.
pub fn load<'m>(gguf: &Gguf<'m>) -> Result<Vocab<'m>, LoadError> {
    let tables = gguf.tensors().iter().filter_map(|tensor| {
        let name = tensor.name.strip_prefix(TABLE_PREFIX)?.strip_prefix(VOCAB_PREFIX)?;
        Some((name, gguf.data(tensor)))
    });
    let tables = Tables::new(tables.collect());
    if tables.is_empty() {
        return Ok(Vocab::new(&raw_vocab(gguf)?)?);
    }
    Ok(Vocab::mapped(&without_lists(gguf)?, &tables)?)
}

/// The tables that [`load`] takes from a packed file, with the names of their tensors; none for a file without a tokenizer.
///
/// # Errors
/// The tokenizer is not supported.
pub fn tables(gguf: &Gguf<'_>) -> Result<Vec<(String, Vec<u8>)>, LoadError> {
    if gguf.get(TOKENS).is_none() {
        return Ok(Vec::new());
    }
    let tables = Vocab::tables(&raw_vocab(gguf)?)?;
    Ok(tables.into_iter().map(|(name, bytes)| (format!("{TABLE_PREFIX}{VOCAB_PREFIX}{name}"), bytes)).collect())
}

const TOKENS: &str = "tokenizer.ggml.tokens";

/// Reads the tokenizer metadata of a model file; strings stay in the file.
///
/// # Errors
/// A key is missing, or of a type it must not have.
pub fn raw_vocab<'m>(gguf: &Gguf<'m>) -> Result<RawVocab<'m, Strings<'m>>, GgufError> {
    Ok(RawVocab {
        scores: gguf.array_f32("tokenizer.ggml.scores")?.unwrap_or_default(),
        token_types: gguf.array_i32("tokenizer.ggml.token_type")?.unwrap_or_default(),
        ..without_lists(gguf)?
    })
}

/// As [`raw_vocab`], but for scores and types, which take time to read.
fn without_lists<'m>(gguf: &Gguf<'m>) -> Result<RawVocab<'m, Strings<'m>>, GgufError> {
    let model = gguf.require_str("tokenizer.ggml.model")?;
    let tokens = gguf.array_str(TOKENS)?;
    // Some converters write -1 for "none"; an id outside the vocabulary counts as absent anyway.
    let id = |key: &str| match gguf.u32(key) {
        Err(GgufError::OutOfRange { .. }) => Ok(None),
        id => id.map(|id| id.map(TokenId)),
    };
    let special = SpecialIds {
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        eot: id("tokenizer.ggml.eot_token_id")?,
        eom: id("tokenizer.ggml.eom_token_id")?,
        unk: id("tokenizer.ggml.unknown_token_id")?,
        pad: id("tokenizer.ggml.padding_token_id")?,
        fim_pad: id("tokenizer.ggml.fim_pad_token_id")?,
        fim_rep: id("tokenizer.ggml.fim_rep_token_id")?,
        fim_sep: id("tokenizer.ggml.fim_sep_token_id")?,
    };
    Ok(RawVocab {
        model,
        pre: gguf.str("tokenizer.ggml.pre")?,
        name: gguf.str("general.name")?,
        tokens: tokens.ok_or(GgufError::Missing { key: TOKENS.to_string(), wanted: "array of string" })?,
        scores: Vec::new(),
        token_types: Vec::new(),
        merges: gguf.array_str("tokenizer.ggml.merges")?,
        special,
        add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
        add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
    })
}
