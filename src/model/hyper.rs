//! A model's hyperparameters, as the GGUF metadata of its architecture gives them, checked once.
//! Made by `model::arch`; every size in `plan`, `model::kv` and `model::forward` follows from these numbers.

use crate::model::ModelError;

/// Hyperparameters of a decoder-only transformer. Invariant: every field passed [`Hyper::check`].
#[derive(Clone, Debug, PartialEq)]
pub struct Hyper {
    /// `general.architecture`.
    pub architecture: String,
    /// Layers (`block_count`).
    pub n_layer: usize,
    /// Width of the residual stream (`embedding_length`).
    pub n_embd: usize,
    /// Width of the feed-forward layer (`feed_forward_length`).
    pub n_ff: usize,
    /// Query heads (`attention.head_count`).
    pub n_head: usize,
    /// Key/value heads (`attention.head_count_kv`); divides `n_head`.
    pub n_head_kv: usize,
    /// Values a head (`attention.key_length`, else `n_embd / n_head`).
    pub head_dim: usize,
    /// Tokens in the vocabulary (rows of `token_embd.weight`).
    pub n_vocab: usize,
    /// Positions the model was trained for (`context_length`).
    pub n_ctx_train: usize,
    /// Added to the mean square in every RMSNorm (`attention.layer_norm_rms_epsilon`).
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
}

/// Rotary position embedding over adjacent pairs (GGUF's "norm" order).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotated values at the front of each head (`rope.dimension_count`).
    pub dims: usize,
    /// Base of the frequencies (`rope.freq_base`).
    pub base: f64,
    /// Positions are divided by this (`rope.scaling.factor` of type `linear`); 1 is plain.
    pub linear_factor: f64,
}

/// Most layers a model may have.
pub const MAX_LAYERS: usize = 1024;
/// Widest residual stream or feed-forward layer, in values.
pub const MAX_WIDTH: usize = 1 << 18;
/// Most attention heads a layer.
pub const MAX_HEADS: usize = 1024;
/// Largest vocabulary, in tokens.
pub const MAX_VOCAB: usize = 1 << 22;
/// Longest context, in positions.
pub const MAX_CONTEXT: usize = 1 << 22;

impl Hyper {
    /// Query heads that share one key/value head.
    pub fn group_heads(&self) -> usize {
        self.n_head / self.n_head_kv
    }

    /// Rows of the query projection.
    pub fn q_rows(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Rows of the key, and of the value, projection.
    pub fn kv_rows(&self) -> usize {
        self.n_head_kv * self.head_dim
    }

    /// Checks every number against the others and against what the kernels take.
    ///
    /// # Errors
    /// Names the metadata key, the value and what would be right.
    pub fn check(self) -> Result<Self, ModelError> {
        let arch = self.architecture.as_str();
        let bounded = |key: &str, value: usize, max: usize| match value {
            0 => Err(ModelError::hyper(arch, key, value, "at least 1")),
            _ if value > max => Err(ModelError::hyper(arch, key, value, &format!("at most {max}"))),
            _ => Ok(()),
        };
        bounded("block_count", self.n_layer, MAX_LAYERS)?;
        bounded("embedding_length", self.n_embd, MAX_WIDTH)?;
        bounded("feed_forward_length", self.n_ff, MAX_WIDTH)?;
        bounded("attention.head_count", self.n_head, MAX_HEADS)?;
        bounded("attention.head_count_kv", self.n_head_kv, self.n_head)?;
        bounded("attention.key_length", self.head_dim, hearth_kernels::MAX_HEAD_DIM)?;
        bounded("vocab_size", self.n_vocab, MAX_VOCAB)?;
        bounded("context_length", self.n_ctx_train, MAX_CONTEXT)?;
        let multiple = |key: &str, value: usize, of: usize| match value % of {
            0 => Ok(()),
            _ => Err(ModelError::hyper(arch, key, value, &format!("a multiple of {of}"))),
        };
        multiple("embedding_length", self.n_embd, hearth_kernels::ROW_GROUP)?;
        multiple("feed_forward_length", self.n_ff, hearth_kernels::ROW_GROUP)?;
        multiple("attention.key_length", self.head_dim, hearth_kernels::ROW_GROUP)?;
        multiple("attention.head_count", self.n_head, self.n_head_kv)?;
        if self.group_heads() > hearth_kernels::MAX_GROUP_HEADS {
            let least = self.n_head.div_ceil(hearth_kernels::MAX_GROUP_HEADS);
            return Err(ModelError::hyper(
                arch,
                "attention.head_count_kv",
                self.n_head_kv,
                &format!("at least {least}"),
            ));
        }
        multiple("rope.dimension_count", self.rope.dims, 2)?;
        if self.rope.dims > self.head_dim {
            return Err(ModelError::hyper(
                arch,
                "rope.dimension_count",
                self.rope.dims,
                &format!("at most {}", self.head_dim),
            ));
        }
        if self.n_head * self.head_dim > MAX_WIDTH {
            return Err(ModelError::hyper(arch, "attention.head_count", self.n_head, "fewer or narrower heads"));
        }
        let positive = |key: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(ModelError::hyper(arch, key, value, "finite and above 0")),
        };
        positive("rope.freq_base", self.rope.base)?;
        positive("rope.scaling.factor", self.rope.linear_factor)?;
        positive("attention.layer_norm_rms_epsilon", f64::from(self.rms_eps))?;
        Ok(self)
    }
}
