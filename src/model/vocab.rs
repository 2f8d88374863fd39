//! The tokenizer's part of a model file, as `text` wants it.
//! Next on the data's way: `text::Vocab::new` builds tables from it, `text::chat` compiles the template.

use super::gguf::{Gguf, GgufError, Strings};
use crate::text::vocab::SpecialIds;
use crate::text::{RawVocab, TokenId};

/// Reads the tokenizer metadata of a model file; strings stay in the file.
///
/// # Errors
/// A key is missing, or of a type it must not have.
pub fn raw_vocab<'m>(gguf: &Gguf<'m>) -> Result<RawVocab<'m, Strings<'m>>, GgufError> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
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
        scores: gguf.array_f32("tokenizer.ggml.scores")?.unwrap_or_default(),
        token_types: gguf.array_i32("tokenizer.ggml.token_type")?.unwrap_or_default(),
        merges: gguf.array_str("tokenizer.ggml.merges")?,
        special,
        add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
        add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
        chat_template: gguf.str("tokenizer.chat_template")?,
    })
}
