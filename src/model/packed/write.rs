//! Writes a packed model from a plain GGUF: header, tiles, vectors, tables, and at last the header again with the hashes.
//! Next on the data's way: `tools::pack` puts the file in its place.

use std::io::{Seek, SeekFrom, Write};

use hearth_kernels::{ROW_GROUP, pack_row_group};

use super::{
    ALIGNMENT_BYTES, HEADER_HASH_KEY, KEY_PREFIX, LAYOUT, LAYOUT_KEY, LAYOUT_VERSION, NO_HASH, SOURCE_HASH_KEY,
    SOURCE_NAME_KEY, TENSOR_HASHES_KEY, VERSION_KEY, read,
};
use crate::model::gguf::{GgmlType, Gguf, HeaderWriter, MAX_TENSORS, TensorInfo};
use crate::model::hyper::Hyper;
use crate::model::weights::{PlannedMatrix, WeightLayout};
use crate::model::{ModelError, arch};

/// Bytes that are packed, hashed and written at once; the signal to stop is looked at as often.
const WINDOW_BYTES: usize = 4 << 20;

/// Why a model was not packed.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The source is not a model that hearth runs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The source has tiles already.
    #[error("it is packed already, from {source_name}")]
    AlreadyPacked {
        /// Name of the file that was packed.
        source_name: String,
    },
    /// More tensors than a container takes, or more bytes than 2^64.
    #[error("{tensors} tensors do not fit one file")]
    TooLarge {
        /// Tensors to be written.
        tensors: usize,
    },
    /// Writing failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The caller said so.
    #[error("stopped")]
    Stopped,
}

/// A model that is about to be written.
#[derive(Debug)]
pub struct PackPlan<'g, 'm> {
    gguf: &'g Gguf<'m>,
    source_name: &'g str,
    tensors: Vec<Tensor<'g, 'm>>,
}

#[derive(Debug)]
struct Tensor<'g, 'm> {
    name: &'g str,
    dims: Vec<u64>,
    ggml_type: GgmlType,
    bytes: u64,
    content: Content<'g, 'm>,
}

#[derive(Debug)]
enum Content<'g, 'm> {
    /// To be packed from the source's rows.
    Rows(PlannedMatrix, &'m [u8]),
    /// As it is.
    Bytes(&'g [u8]),
}

impl<'g, 'm: 'g> PackPlan<'g, 'm> {
    /// Checks the source and lists what will be written. `tables`: names that begin with [`TABLE_PREFIX`](super::TABLE_PREFIX), and bytes.
    ///
    /// # Errors
    /// The source is packed already, not supported, or has a vector with NaN or infinity.
    pub fn new(
        gguf: &'g Gguf<'m>,
        source_name: &'g str,
        tables: impl IntoIterator<Item = (&'g str, &'g [u8])>,
    ) -> Result<Self, WriteError> {
        if let Some(packed) = read(gguf)? {
            return Err(WriteError::AlreadyPacked { source_name: packed.source_name.to_owned() });
        }
        let hyper: Hyper = arch::hyper(gguf)?;
        let layout = WeightLayout::new(gguf, &hyper)?;
        let mut tensors = Vec::with_capacity(gguf.tensors().len());
        // Vectors and tables first: they are read at load, so the front of the file is what a start reads.
        for info in gguf.tensors() {
            if layout.matrices().iter().all(|matrix| matrix.name != info.name) {
                tensors.push(Tensor::vector(gguf, info)?);
            }
        }
        tensors.extend(tables.into_iter().map(|(name, bytes)| Tensor::table(name, bytes)));
        for matrix in layout.matrices() {
            let missing = || ModelError::MissingTensor { name: matrix.name.clone() };
            tensors.push(Tensor::matrix(gguf, gguf.tensor(&matrix.name).ok_or_else(missing)?, matrix));
        }
        if tensors.len() > MAX_TENSORS {
            return Err(WriteError::TooLarge { tensors: tensors.len() });
        }
        Ok(Self { gguf, source_name, tensors })
    }

    /// Bytes of the file, holes between tensors included.
    ///
    /// # Errors
    /// They exceed 2^64.
    pub fn file_bytes(&self) -> Result<u64, WriteError> {
        let (header, _) = self.header(&Hashes::default())?;
        (header.finish().len() as u64).checked_add(header.data_bytes()).ok_or(self.too_large())
    }

    /// Bytes that [`PackPlan::write`] will report as done in the end.
    pub fn work_bytes(&self) -> u64 {
        self.tensors.iter().fold(self.gguf.bytes().len() as u64, |sum, tensor| sum.saturating_add(tensor.bytes))
    }

    /// Writes the whole file. `progress` gets the bytes done and says whether to go on.
    ///
    /// # Errors
    /// A weight is NaN or infinite, writing failed, or `progress` said stop; `out` then holds half a file.
    pub fn write(
        &self,
        out: &mut (impl Write + Seek),
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), WriteError> {
        let mut done = 0u64;
        let mut step = |bytes: usize| {
            done = done.saturating_add(bytes as u64);
            if progress(done) { Ok(()) } else { Err(WriteError::Stopped) }
        };
        let mut source = blake3::Hasher::new();
        for window in self.gguf.bytes().chunks(WINDOW_BYTES) {
            source.update(window);
            step(window.len())?;
        }
        let mut hashes = Hashes { source: Some(hex(&source)), ..Hashes::default() };
        let (header, offsets) = self.header(&hashes)?;
        let data_start = header.finish().len() as u64;
        for (tensor, offset) in self.tensors.iter().zip(offsets) {
            out.seek(SeekFrom::Start(data_start + offset))?;
            let mut hasher = blake3::Hasher::new();
            tensor.write(&mut |piece: &[u8]| {
                hasher.update(piece);
                out.write_all(piece)?;
                step(piece.len())
            })?;
            hashes.tensors.push(hex(&hasher));
        }
        let (unsigned, _) = self.header(&hashes)?;
        hashes.header = Some(hex(blake3::Hasher::new().update(&unsigned.finish())));
        out.rewind()?;
        out.write_all(&self.header(&hashes)?.0.finish())?;
        Ok(out.flush()?)
    }

    /// The header and every tensor's offset in the data section. It has the same length whatever the hashes are.
    fn header(&self, hashes: &Hashes) -> Result<(HeaderWriter, Vec<u64>), WriteError> {
        let mut header = HeaderWriter::new(ALIGNMENT_BYTES);
        for (key, value) in self.gguf.metadata() {
            if key != "general.alignment" && !key.starts_with(KEY_PREFIX) {
                header.copy(key, value);
            }
        }
        let or_zeros = |hash: Option<&String>| hash.cloned().unwrap_or_else(|| NO_HASH.to_owned());
        header.str(LAYOUT_KEY, LAYOUT);
        header.u32(VERSION_KEY, LAYOUT_VERSION);
        header.str(SOURCE_NAME_KEY, self.source_name);
        header.str(SOURCE_HASH_KEY, &or_zeros(hashes.source.as_ref()));
        header.str(HEADER_HASH_KEY, &or_zeros(hashes.header.as_ref()));
        let tensors: Vec<String> = (0..self.tensors.len()).map(|index| or_zeros(hashes.tensors.get(index))).collect();
        header.strs(TENSOR_HASHES_KEY, tensors.iter().map(String::as_str));
        let offsets: Option<Vec<u64>> = self
            .tensors
            .iter()
            .map(|tensor| header.tensor(tensor.name, &tensor.dims, tensor.ggml_type, tensor.bytes))
            .collect();
        Ok((header, offsets.ok_or(self.too_large())?))
    }

    fn too_large(&self) -> WriteError {
        WriteError::TooLarge { tensors: self.tensors.len() }
    }
}

/// The hashes in a header, as far as they are known.
#[derive(Debug, Default)]
struct Hashes {
    source: Option<String>,
    header: Option<String>,
    tensors: Vec<String>,
}

impl<'g, 'm: 'g> Tensor<'g, 'm> {
    fn matrix(gguf: &Gguf<'m>, info: &TensorInfo<'m>, matrix: &PlannedMatrix) -> Self {
        Self {
            name: info.name,
            dims: dims_of(info),
            ggml_type: GgmlType::Tiled(matrix.format),
            bytes: matrix.bytes as u64,
            content: Content::Rows(matrix.clone(), gguf.data(info)),
        }
    }

    fn vector(gguf: &Gguf<'m>, info: &TensorInfo<'m>) -> Result<Self, ModelError> {
        let bytes = gguf.data(info);
        let is_finite = |value: &[u8; 4]| f32::from_le_bytes(*value).is_finite();
        if info.ggml_type == GgmlType::F32 && !bytes.as_chunks::<4>().0.iter().all(is_finite) {
            return Err(ModelError::BadVector { tensor: info.name.to_owned() });
        }
        if let GgmlType::Unknown(_) = info.ggml_type {
            return Err(ModelError::UnsupportedType {
                tensor: info.name.to_owned(),
                found: info.ggml_type.to_string(),
            });
        }
        let (dims, ggml_type) = (dims_of(info), info.ggml_type);
        Ok(Self { name: info.name, dims, ggml_type, bytes: bytes.len() as u64, content: Content::Bytes(bytes) })
    }

    fn table(name: &'g str, bytes: &'g [u8]) -> Self {
        let len = bytes.len() as u64;
        Self { name, dims: vec![len], ggml_type: GgmlType::I8, bytes: len, content: Content::Bytes(bytes) }
    }

    /// Gives the tensor's bytes to `emit`, a window at a time.
    fn write(&self, emit: &mut dyn FnMut(&[u8]) -> Result<(), WriteError>) -> Result<(), WriteError> {
        let (matrix, rows) = match &self.content {
            Content::Bytes(bytes) => return bytes.chunks(WINDOW_BYTES).try_for_each(emit),
            Content::Rows(matrix, rows) => (matrix, rows),
        };
        let row_bytes = matrix.format.source_row_bytes(matrix.cols);
        let groups = matrix.rows.div_ceil(ROW_GROUP);
        let group_bytes = matrix.bytes.checked_div(groups).unwrap_or(0);
        let groups_a_window = WINDOW_BYTES.checked_div(group_bytes).unwrap_or(1).max(1);
        let mut window = vec![0; groups_a_window.min(groups) * group_bytes];
        let mut first_row = 0;
        while first_row < matrix.rows {
            let mut filled = 0;
            for tile_row in window.chunks_exact_mut(group_bytes.max(1)) {
                let count = ROW_GROUP.min(matrix.rows - first_row);
                if count == 0 {
                    break;
                }
                let source = &rows[first_row * row_bytes..][..count * row_bytes];
                pack_row_group(matrix.format, source, count, matrix.cols, tile_row)
                    .map_err(|source| ModelError::BadWeight { tensor: matrix.name.clone(), first_row, source })?;
                first_row += count;
                filled += group_bytes;
            }
            emit(&window[..filled])?;
        }
        Ok(())
    }
}

fn hex(hasher: &blake3::Hasher) -> String {
    hasher.finalize().to_hex().to_string()
}

fn dims_of(info: &TensorInfo<'_>) -> Vec<u64> {
    info.dims.iter().take(info.n_dims as usize).copied().collect()
}
