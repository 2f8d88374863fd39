//! One model: its hyperparameters, weights and forward pass. Token ids in, logits out; text and requests are unknown here.
//!
//! In reading order: [`gguf`] (the file) · [`arch`] and [`hyper`] (its numbers) · [`weights`] (its tensors as
//! tiles) · [`packed`] (the file that has them ready) · [`rope`], [`kv`] and [`scratch`],
//! [`forward`] (a step) · [`mod@reference`] (the same model computed
//! in plain F32, to be close to). Next on the data's way: `engine`.

pub mod arch;
pub mod forward;
pub mod gguf;
pub mod hyper;
pub mod kv;
pub mod packed;
pub mod reference;
pub mod rope;
pub mod scratch;
pub mod vocab;
pub mod weights;

use hyper::Hyper;
use rope::RopeFrequencies;
use weights::{WeightLayout, Weights};

use crate::sys::map::Region;
use crate::sys::workers::Workers;

/// A loaded model. Borrows its tiles: of one [`Region`], or of the packed file.
#[derive(Debug)]
pub struct Model<'m> {
    /// Its numbers.
    pub hyper: Hyper,
    /// Its tensors.
    pub weights: Weights<'m>,
    /// Its rotary frequencies.
    pub rope: RopeFrequencies,
}

impl<'m> Model<'m> {
    /// Repacks a GGUF's weights into `region` and binds the model to it. `progress` gets the bytes done.
    ///
    /// # Errors
    /// A tensor is missing, misshapen, of an unsupported type, or holds NaN or infinity.
    ///
    /// # Panics
    /// `region` is shorter than the layout's `region_bytes`.
    pub fn load(
        gguf: &gguf::Gguf<'_>,
        hyper: Hyper,
        layout: &WeightLayout,
        region: &'m mut Region,
        workers: &mut Workers,
        progress: impl FnMut(usize),
    ) -> Result<Self, ModelError> {
        layout.repack(gguf, region.bytes_mut(), workers, progress)?;
        let weights = Weights::bind(gguf, &hyper, layout, region.bytes())?;
        let rope = RopeFrequencies::new(&hyper.rope, weights.rope_factors.as_deref());
        Ok(Self { hyper, weights, rope })
    }
}

impl<'m> Model<'m> {
    /// Binds the model to the tiles of a packed file: nothing is copied but norms.
    ///
    /// # Errors
    /// A norm is missing, misshapen or not finite, or the file was not mapped to a page's boundary.
    pub fn map(gguf: &gguf::Gguf<'m>, hyper: Hyper, layout: &WeightLayout) -> Result<Self, ModelError> {
        let weights = Weights::bind(gguf, &hyper, layout, gguf.bytes())?;
        let rope = RopeFrequencies::new(&hyper.rope, weights.rope_factors.as_deref());
        Ok(Self { hyper, weights, rope })
    }
}

/// Why a file is not a model that hearth can run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The container is damaged.
    #[error(transparent)]
    Gguf(#[from] gguf::GgufError),
    /// `general.architecture` is not one of [`arch::SUPPORTED`].
    #[error("architecture {found:?} is not supported; supported: {}", arch::SUPPORTED.join(", "))]
    Architecture {
        /// What the file says.
        found: String,
    },
    /// A metadata key that every model of this architecture has.
    #[error("metadata key {key:?} is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A hyperparameter is out of range or does not fit the others.
    #[error("{key} is {found}, must be {wanted}")]
    Hyper {
        /// The metadata key.
        key: String,
        /// Its value.
        found: String,
        /// What would be right.
        wanted: String,
    },
    /// The tokenizer lists tokens that have no embedding.
    #[error("the tokenizer lists {tokens} tokens, token_embd.weight has {rows} rows")]
    VocabSize {
        /// Tokens listed.
        tokens: usize,
        /// Rows of the embeddings.
        rows: usize,
    },
    /// A tensor that every model of this architecture has.
    #[error("tensor {name:?} is missing")]
    MissingTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor that the forward pass would leave out.
    #[error(
        "tensor {name:?} is not used by the architecture {architecture:?} as hearth computes it: the answers would be wrong"
    )]
    UnusedTensor {
        /// The tensor.
        name: String,
        /// The file's architecture.
        architecture: String,
    },
    /// A tensor has other dimensions than the metadata says.
    #[error("tensor {tensor:?} has shape {found:?}, must be {wanted:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its dimensions, innermost first.
        found: Vec<u64>,
        /// What would be right.
        wanted: Vec<usize>,
    },
    /// A tensor's element type has no kernels.
    #[error(
        "tensor {tensor:?} has type {found}, which is not supported here; matrices may be {}, vectors F32",
        supported_types()
    )]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// Its GGML type.
        found: String,
    },
    /// A tensor's size does not fit its shape or this machine.
    #[error(
        "tensor {tensor:?}: its size does not fit its shape, its columns its blocks, or the sum this machine's address space"
    )]
    TooLarge {
        /// The tensor.
        tensor: String,
    },
    /// A matrix holds NaN or infinity.
    #[error("tensor {tensor:?}, rows from {first_row}: {source}")]
    BadWeight {
        /// The tensor.
        tensor: String,
        /// First row of the row group it is in.
        first_row: usize,
        /// Which row and column.
        source: hearth_kernels::PackError,
    },
    /// A vector holds NaN, infinity, or a value that makes no sense there.
    #[error("tensor {tensor:?} holds a value that is not finite or out of range")]
    BadVector {
        /// The tensor.
        tensor: String,
    },
    /// Packed in a layout that these kernels do not read.
    #[error(
        "its tiles are {found:?} version {version}, this program reads {:?} version {}; pack it again: \
         hearth pack --force {source_name} FILE.hearth",
        packed::LAYOUT,
        packed::LAYOUT_VERSION
    )]
    Layout {
        /// The layout's name in the file.
        found: String,
        /// Its version.
        version: u32,
        /// The name of the file that was packed.
        source_name: String,
    },
    /// The region does not fit the layout.
    #[error("tensor {tensor:?}: {source}")]
    Tiles {
        /// The tensor.
        tensor: String,
        /// What does not fit.
        source: hearth_kernels::ShapeError,
    },
}

impl ModelError {
    fn hyper(architecture: &str, key: &str, found: impl ToString, wanted: &str) -> Self {
        Self::Hyper { key: format!("{architecture}.{key}"), found: found.to_string(), wanted: wanted.into() }
    }
}

fn supported_types() -> String {
    hearth_kernels::Format::ALL.map(hearth_kernels::Format::name).join(", ")
}
