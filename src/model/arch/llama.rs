//! The llama family (Touvron et al., 2023; also SmolLM2, Mistral 7B, TinyLlama, Llama 3): RMSNorm, rotary embedding over
//! adjacent pairs, grouped-query attention, SwiGLU. Keys as the GGUF specification names them.
//! Next on the data's way: `model::hyper` checks the numbers.

use crate::model::ModelError;
use crate::model::gguf::Gguf;
use crate::model::hyper::{Hyper, Rope};

/// `rope.freq_base` where the file does not say.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

pub(super) fn hyper(gguf: &Gguf<'_>) -> Result<Hyper, ModelError> {
    let architecture = gguf.architecture()?;
    let key = |name: &str| format!("{architecture}.{name}");
    let optional =
        |name: &str| -> Result<Option<usize>, ModelError> { Ok(gguf.u32(&key(name))?.map(|value| value as usize)) };
    let required = |name: &str| optional(name)?.ok_or_else(|| ModelError::MissingKey { key: key(name) });

    if let Some(experts) = optional("expert_count")?.filter(|&experts| experts > 0) {
        return Err(ModelError::hyper(
            architecture,
            "expert_count",
            experts,
            "0: mixtures of experts are not supported",
        ));
    }
    let n_embd = required("embedding_length")?;
    let n_head = required("attention.head_count")?;
    let head_dim = match optional("attention.key_length")? {
        Some(length) => length,
        None => n_embd / n_head.max(1),
    };
    if let Some(value_length) = optional("attention.value_length")?.filter(|&length| length != head_dim) {
        let wanted = format!("{head_dim}, as attention.key_length");
        return Err(ModelError::hyper(architecture, "attention.value_length", value_length, &wanted));
    }
    let embeddings = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| ModelError::MissingTensor { name: "token_embd.weight".into() })?;
    Ok(Hyper {
        architecture: architecture.into(),
        n_layer: required("block_count")?,
        n_embd,
        n_ff: required("feed_forward_length")?,
        n_head,
        n_head_kv: optional("attention.head_count_kv")?.unwrap_or(n_head),
        head_dim,
        n_vocab: usize::try_from(embeddings.dims[1]).unwrap_or(usize::MAX),
        n_ctx_train: required("context_length")?,
        rms_eps: gguf
            .f32(&key("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| ModelError::MissingKey { key: key("attention.layer_norm_rms_epsilon") })?,
        rope: Rope {
            dims: optional("rope.dimension_count")?.unwrap_or(head_dim),
            base: f64::from(gguf.f32(&key("rope.freq_base"))?.unwrap_or(DEFAULT_ROPE_BASE)),
            linear_factor: linear_factor(gguf, architecture)?,
        },
    })
}

/// `rope.scaling.type` none or linear; llama 3's own factors come as the tensor `rope_freqs.weight` instead.
fn linear_factor(gguf: &Gguf<'_>, architecture: &str) -> Result<f64, ModelError> {
    let factor = gguf.f32(&format!("{architecture}.rope.scaling.factor"))?;
    match gguf.str(&format!("{architecture}.rope.scaling.type"))? {
        Some("linear") => Ok(f64::from(factor.unwrap_or(1.0))),
        // The key that came before `rope.scaling.*`.
        None => Ok(f64::from(gguf.f32(&format!("{architecture}.rope.scale_linear"))?.unwrap_or(1.0))),
        Some("none") => Ok(1.0),
        Some(other) => Err(ModelError::hyper(architecture, "rope.scaling.type", other, "none or linear")),
    }
}
