//! One file a model family: which metadata keys make its [`Hyper`].
//! Next on the data's way: `model::weights` finds, checks and repacks the tensors.

use crate::model::ModelError;
use crate::model::gguf::Gguf;
use crate::model::hyper::Hyper;

mod llama;

/// Architectures whose weights can be loaded.
pub const SUPPORTED: &[&str] = &["llama"];

/// Reads the hyperparameters of any supported architecture.
///
/// # Errors
/// The architecture is not supported, a key is missing or of the wrong type, or a number is out of range.
pub fn hyper(gguf: &Gguf<'_>) -> Result<Hyper, ModelError> {
    match gguf.architecture()? {
        "llama" => llama::hyper(gguf)?.check(),
        other => Err(ModelError::Architecture { found: other.into() }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::hyper::Rope;

    /// Two layers, grouped heads, nothing a power of two that need not be.
    pub(crate) fn tiny_hyper() -> Hyper {
        Hyper {
            architecture: "llama".into(),
            n_layer: 2,
            n_embd: 96,
            n_ff: 160,
            n_head: 6,
            n_head_kv: 2,
            head_dim: 16,
            n_vocab: 50,
            n_ctx_train: 512,
            rms_eps: 1e-5,
            rope: Rope { dims: 16, base: 10_000.0, linear_factor: 1.0 },
        }
    }

    #[test]
    fn the_tiny_model_is_legal_and_its_neighbours_are_refused_by_name() {
        assert!(tiny_hyper().check().is_ok());
        let refused = |change: fn(&mut Hyper), key: &str| {
            let mut hyper = tiny_hyper();
            change(&mut hyper);
            let message = hyper.check().err().map(|error| error.to_string()).unwrap_or_default();
            assert!(message.contains(key), "{key}: {message}");
        };
        refused(|h| h.n_layer = 0, "llama.block_count");
        refused(|h| h.n_embd = 100, "llama.embedding_length");
        refused(|h| h.n_head_kv = 4, "llama.attention.head_count");
        refused(|h| h.n_head_kv = 7, "llama.attention.head_count_kv");
        refused(|h| h.rope.dims = 18, "llama.rope.dimension_count");
        refused(|h| h.rope.base = f64::NAN, "llama.rope.freq_base");
        refused(|h| h.rms_eps = 0.0, "layer_norm_rms_epsilon");
        refused(|h| h.n_vocab = usize::MAX, "vocab_size");
    }
}
