//! The packed model: a GGUF container whose matrices are R16K4 tiles, mapped and run as they are.
//!
//! | in the file | what |
//! |---|---|
//! | every metadata key of the source | as it was, but for `general.alignment`, which is [`ALIGNMENT_BYTES`] |
//! | `hearth.layout`, `hearth.layout.version` | [`LAYOUT`], [`LAYOUT_VERSION`]: how a tile is laid out, see `hearth_kernels` |
//! | `hearth.source.name`, `hearth.source.blake3` | name and hash of the file that was packed |
//! | `hearth.tensor.blake3` | a hash for each tensor, in the file's order, over its bytes without padding |
//! | `hearth.header.blake3` | over everything up to the first tensor, these 64 digits taken as zeros |
//! | matrices | dimensions as in the source; type [`TILED_IDS`](super::gguf::TILED_IDS) plus the source's, which other readers refuse |
//! | vectors | as in the source |
//! | tensors named [`TABLE_PREFIX`]… | ready-made tables of the vocabulary, `I8` |
//!
//! Hashes are BLAKE3 in hexadecimal: without a C compiler and without crypto extensions the fastest of the well-kept ones.
//! Written by [`mod@write`]; read here; next on the data's way: `weights` binds matrices to it.

pub mod write;

use super::ModelError;
use super::gguf::{GgmlType, Gguf, GgufError, TensorInfo};

/// Name of the tile layout.
pub const LAYOUT: &str = "r16k4";
/// Its version: grows whenever the same weights give other bytes.
pub const LAYOUT_VERSION: u32 = 1;
/// Where tensors begin: no page of Linux on Arm or x86 is larger.
pub const ALIGNMENT_BYTES: u32 = 65_536;
/// Beginning of the names of tensors that are no weights.
pub const TABLE_PREFIX: &str = "hearth.";

const KEY_PREFIX: &str = "hearth.";
const LAYOUT_KEY: &str = "hearth.layout";
const VERSION_KEY: &str = "hearth.layout.version";
const SOURCE_NAME_KEY: &str = "hearth.source.name";
const SOURCE_HASH_KEY: &str = "hearth.source.blake3";
const TENSOR_HASHES_KEY: &str = "hearth.tensor.blake3";
const HEADER_HASH_KEY: &str = "hearth.header.blake3";
/// Hexadecimal digits of a hash.
const HASH_DIGITS: usize = 2 * blake3::OUT_LEN;
/// What a hash is while it is not known.
const NO_HASH: &str = match std::str::from_utf8(&[b'0'; HASH_DIGITS]) {
    Ok(zeros) => zeros,
    Err(_) => "",
};

/// What a packed file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Packed<'m> {
    /// Name of the file that was packed, without its folder.
    pub source_name: &'m str,
    /// BLAKE3 of the file that was packed.
    pub source_hash: &'m str,
}

/// Reads what a packed file says of itself; `None` for a plain GGUF.
///
/// # Errors
/// The tiles have another layout than the kernels of this program read.
pub fn read<'m>(gguf: &Gguf<'m>) -> Result<Option<Packed<'m>>, ModelError> {
    let layout = gguf.str(LAYOUT_KEY)?;
    let has_tiles = || gguf.tensors().iter().any(|tensor| matches!(tensor.ggml_type, GgmlType::Tiled(_)));
    if layout.is_none() && !has_tiles() {
        return Ok(None);
    }
    let version = gguf.u32(VERSION_KEY)?.unwrap_or(0);
    let source_name = gguf.str(SOURCE_NAME_KEY)?.unwrap_or("SOURCE.gguf");
    if (layout, version) != (Some(LAYOUT), LAYOUT_VERSION) {
        let (found, source_name) = (layout.unwrap_or("(none)").to_owned(), source_name.to_owned());
        return Err(ModelError::Layout { found, version, source_name });
    }
    Ok(Some(Packed { source_name, source_hash: gguf.str(SOURCE_HASH_KEY)?.unwrap_or("(none)") }))
}

/// What is wrong with a packed file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The header is not what was written.
    Header,
    /// A tensor is not what was written.
    Tensor(String),
}

/// Why a file cannot be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A plain GGUF.
    #[error("no hashes to verify: this is not a packed model (hearth pack makes one)")]
    NoHashes,
    /// The hashes themselves cannot be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// As many hashes as tensors are needed.
    #[error("{hashes} hashes for {tensors} tensors: the header is damaged")]
    Count {
        /// Hashes in the file.
        hashes: usize,
        /// Tensors in the file.
        tensors: usize,
    },
}

/// Compares every byte that matters with the hashes in the header. `progress` gets the bytes done.
///
/// # Errors
/// There are no hashes, or not as many as tensors.
pub fn verify(gguf: &Gguf<'_>, mut progress: impl FnMut(u64)) -> Result<Vec<Damage>, VerifyError> {
    let (Some(hashes), Some(header_hash)) = (gguf.array_str(TENSOR_HASHES_KEY)?, gguf.str(HEADER_HASH_KEY)?) else {
        return Err(VerifyError::NoHashes);
    };
    if hashes.len() != gguf.tensors().len() {
        return Err(VerifyError::Count { hashes: hashes.len(), tensors: gguf.tensors().len() });
    }
    let mut damaged = Vec::new();
    if hash_of_header(gguf, header_hash) != header_hash {
        damaged.push(Damage::Header);
    }
    let mut done = 0u64;
    for (tensor, hash) in gguf.tensors().iter().zip(hashes) {
        if hash_of_tensor(gguf, tensor).as_bytes() != hash {
            damaged.push(Damage::Tensor(tensor.name.to_owned()));
        }
        done = done.saturating_add(tensor.bytes);
        progress(done);
    }
    Ok(damaged)
}

fn hash_of_tensor(gguf: &Gguf<'_>, tensor: &TensorInfo<'_>) -> String {
    blake3::hash(gguf.data(tensor)).to_hex().to_string()
}

/// The header's hash, computed as if `written`, a string inside it, were zeros.
fn hash_of_header(gguf: &Gguf<'_>, written: &str) -> String {
    let first = gguf.tensors().iter().map(|tensor| tensor.offset).min();
    let end = first.and_then(|offset| usize::try_from(offset).ok()).unwrap_or(gguf.bytes().len());
    let header = gguf.bytes().get(..end).unwrap_or_default();
    let at = written.as_ptr().addr().saturating_sub(header.as_ptr().addr());
    let (before, rest) = header.split_at_checked(at).unwrap_or((header, &[]));
    let after = rest.get(written.len()..).unwrap_or_default();
    let mut hasher = blake3::Hasher::new();
    hasher.update(before).update(NO_HASH.as_bytes()).update(after);
    hasher.finalize().to_hex().to_string()
}
