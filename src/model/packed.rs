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

use std::borrow::Cow;
use std::io;
use std::ops::Range;

use super::ModelError;
use super::gguf::{GgmlType, Gguf, GgufError};

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
/// Bytes that [`verify`] hashes at once.
const VERIFY_PIECE_BYTES: usize = 1 << 20;
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

/// A part of a packed file that has a hash: the header, or a tensor.
#[derive(Clone, Debug)]
pub struct Part {
    /// The tensor's name; `None`: the header.
    tensor: Option<String>,
    /// Where it begins in the file, in bytes.
    at: u64,
    /// Its size, in bytes.
    pub bytes: u64,
    /// Where its own hash stands, which is computed as if that were zeros.
    zeros: Range<u64>,
    /// What its hash was, in hexadecimal digits.
    hash: String,
}

impl Part {
    /// A tensor as it should be.
    pub fn of(name: &str, at: u64, data: &[u8]) -> Self {
        let hash = blake3::hash(data).to_hex().to_string();
        Self { tensor: Some(name.to_owned()), at, bytes: data.len() as u64, zeros: 0..0, hash }
    }

    /// `header`, or `tensor NAME` without anything that a terminal would obey.
    pub fn name(&self) -> Cow<'static, str> {
        self.tensor.as_ref().map_or("header".into(), |name| format!("tensor {}", name.escape_debug()).into())
    }

    /// Whether the part, which `read` gives piece by piece from a place in the file, is as it was.
    ///
    /// # Errors
    /// What `read` says.
    pub fn is_whole(
        &self,
        buffer: &mut [u8],
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        while done < self.bytes {
            let now = usize::try_from(self.bytes - done).unwrap_or(usize::MAX).min(buffer.len());
            let at = self.at + done;
            let piece = &mut buffer[..now];
            read(at, piece)?;
            let inside = |place: u64| usize::try_from(place.saturating_sub(at)).unwrap_or(usize::MAX).min(now);
            piece[inside(self.zeros.start)..inside(self.zeros.end)].fill(b'0');
            hasher.update(piece);
            done += now as u64;
        }
        Ok(hasher.finalize().to_hex().as_str() == self.hash)
    }
}

/// Every part of the file that has a hash, in the file's order.
///
/// # Errors
/// There are no hashes, or not as many as tensors.
pub fn parts(gguf: &Gguf<'_>) -> Result<Vec<Part>, VerifyError> {
    let (Some(hashes), Some(header_hash)) = (gguf.array_str(TENSOR_HASHES_KEY)?, gguf.str(HEADER_HASH_KEY)?) else {
        return Err(VerifyError::NoHashes);
    };
    if hashes.len() != gguf.tensors().len() {
        return Err(VerifyError::Count { hashes: hashes.len(), tensors: gguf.tensors().len() });
    }
    let file_bytes = gguf.bytes().len() as u64;
    let header_bytes = gguf.tensors().iter().map(|tensor| tensor.offset).min().unwrap_or(file_bytes).min(file_bytes);
    let own = header_hash.as_ptr().addr().saturating_sub(gguf.bytes().as_ptr().addr()) as u64;
    let zeros = own..own.saturating_add(header_hash.len() as u64);
    let header = Part { tensor: None, at: 0, bytes: header_bytes, zeros, hash: header_hash.to_owned() };
    let tensors = gguf.tensors().iter().zip(hashes).map(|(tensor, hash)| Part {
        tensor: Some(tensor.name.to_owned()),
        at: tensor.offset,
        bytes: tensor.bytes,
        zeros: 0..0,
        hash: String::from_utf8_lossy(hash).into_owned(),
    });
    Ok(std::iter::once(header).chain(tensors).collect())
}

/// Compares every byte that matters with the hashes in the header. `progress` gets the bytes of tensors done.
///
/// # Errors
/// There are no hashes, or not as many as tensors.
pub fn verify(gguf: &Gguf<'_>, mut progress: impl FnMut(u64)) -> Result<Vec<Damage>, VerifyError> {
    let mut damaged = Vec::new();
    let mut buffer = vec![0; VERIFY_PIECE_BYTES];
    let mut done = 0u64;
    for part in parts(gguf)? {
        let is_whole = part.is_whole(&mut buffer, |at, piece| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let bytes = gguf.bytes().get(at..).and_then(|rest| rest.get(..piece.len()));
            piece.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        });
        let bytes = part.tensor.as_ref().map_or(0, |_| part.bytes);
        if !is_whole.unwrap_or(false) {
            damaged.push(part.tensor.map_or(Damage::Header, Damage::Tensor));
        }
        done = done.saturating_add(bytes);
        progress(done);
    }
    Ok(damaged)
}
