//! A model's weights: found in the file by name, checked for shape and type, and R16K4 tiles: as the packed file has them, or
//! repacked from a plain GGUF into one region.
//!
//! [`WeightLayout`] is the plan (names, shapes, offsets: what `plan` prints), [`WeightLayout::repack`] fills the region,
//! [`Weights`] are the views that `model::forward` reads. Repacking keeps every quantization block bit-exact.

use hearth_kernels::{Format, Matrix, ROW_GROUP, pack_row_group, packed_bytes};

use crate::model::gguf::{GgmlType, Gguf, TensorInfo};
use crate::model::hyper::Hyper;
use crate::model::{ModelError, packed};
use crate::sys::workers::Workers;

/// Tiles begin at multiples of this many bytes.
pub const TILE_ALIGNMENT_BYTES: usize = 64;

/// Where every matrix of a model goes, before a byte is taken.
#[derive(Clone, Debug, Default)]
pub struct WeightLayout {
    matrices: Vec<PlannedMatrix>,
    /// Bytes of the region that holds them all; 0 where they stay in the file.
    region_bytes: usize,
    /// The file holds tiles.
    is_packed: bool,
}

/// One matrix in the region, or in the packed file.
#[derive(Clone, Debug)]
pub struct PlannedMatrix {
    /// The tensor's name.
    pub name: String,
    /// Its element format.
    pub format: Format,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// First byte in the region (a multiple of [`TILE_ALIGNMENT_BYTES`]), or in the packed file.
    pub offset: usize,
    /// Bytes of its tiles.
    pub bytes: usize,
}

/// Views of one model's weights.
#[derive(Debug)]
pub struct Weights<'m> {
    /// `(n_vocab, n_embd)`: one row a token.
    pub embeddings: Matrix<'m>,
    /// `(n_vocab, n_embd)`: the embeddings again where the file has no `output.weight`.
    pub output: Matrix<'m>,
    /// `(n_embd)`.
    pub output_norm: Vec<f32>,
    /// `n_layer` of them.
    pub layers: Vec<Layer<'m>>,
    /// `(rope.dims / 2)` divisors of the rotary frequencies.
    pub rope_factors: Option<Vec<f32>>,
}

/// One transformer layer.
#[derive(Debug)]
pub struct Layer<'m> {
    /// `(n_embd)`.
    pub attn_norm: Vec<f32>,
    /// Query, key, value: `(q_rows, n_embd)`, `(kv_rows, n_embd)` twice.
    pub qkv: [Matrix<'m>; 3],
    /// `(n_embd, q_rows)`.
    pub attn_output: Matrix<'m>,
    /// `(n_embd)`.
    pub ffn_norm: Vec<f32>,
    /// `(n_ff, n_embd)`.
    pub gate: Matrix<'m>,
    /// `(n_ff, n_embd)`.
    pub up: Matrix<'m>,
    /// `(n_embd, n_ff)`.
    pub down: Matrix<'m>,
}

/// Matrices of one layer, in the order of [`WeightLayout::matrices`].
const LAYER_MATRICES: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
const EMBEDDINGS: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";
const OUTPUT_NORM: &str = "output_norm.weight";
const ROPE_FACTORS: &str = "rope_freqs.weight";

impl WeightLayout {
    /// Finds and checks every tensor that the model needs.
    ///
    /// # Errors
    /// A tensor is missing, has another shape or an unsupported type, the file has tensors that this architecture does not
    /// use (a model that needs more than hearth computes would answer wrongly), or it was packed in another layout.
    pub fn new(gguf: &Gguf<'_>, hyper: &Hyper) -> Result<Self, ModelError> {
        let is_packed = packed::read(gguf)?.is_some();
        let mut layout = Self { matrices: Vec::new(), region_bytes: 0, is_packed };
        layout.add(gguf, EMBEDDINGS, hyper.n_vocab, hyper.n_embd)?;
        for layer in 0..hyper.n_layer {
            let shapes = [
                (hyper.q_rows(), hyper.n_embd),
                (hyper.kv_rows(), hyper.n_embd),
                (hyper.kv_rows(), hyper.n_embd),
                (hyper.n_embd, hyper.q_rows()),
                (hyper.n_ff, hyper.n_embd),
                (hyper.n_ff, hyper.n_embd),
                (hyper.n_embd, hyper.n_ff),
            ];
            for (name, (rows, cols)) in LAYER_MATRICES.iter().zip(shapes) {
                layout.add(gguf, &format!("blk.{layer}.{name}.weight"), rows, cols)?;
            }
        }
        if gguf.tensor(OUTPUT).is_some() {
            layout.add(gguf, OUTPUT, hyper.n_vocab, hyper.n_embd)?;
        }
        refuse_unused(gguf, hyper)?;
        Ok(layout)
    }

    /// The matrices, in file order of use.
    pub fn matrices(&self) -> &[PlannedMatrix] {
        &self.matrices
    }

    /// Whether the file holds tiles, so that nothing is repacked.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// Bytes of the region that [`WeightLayout::repack`] fills; 0 for a packed file.
    pub fn region_bytes(&self) -> usize {
        self.region_bytes
    }

    /// Bytes of weights that one generated token reads: every matrix once, but of the embeddings one row where the head is a
    /// matrix of its own.
    pub fn bytes_per_token(&self) -> usize {
        let untied = self.matrices.iter().any(|matrix| matrix.name == OUTPUT);
        self.matrices.iter().filter(|matrix| !(untied && matrix.name == EMBEDDINGS)).map(|matrix| matrix.bytes).sum()
    }

    /// Fills `region` from a plain file, matrix by matrix, row groups spread over the workers. `progress` gets the bytes done.
    ///
    /// # Errors
    /// A weight or a block's scale is NaN or infinite: names the tensor, the row and the column.
    ///
    /// # Panics
    /// `region` is shorter than [`WeightLayout::region_bytes`].
    pub fn repack(
        &self,
        gguf: &Gguf<'_>,
        region: &mut [u8],
        workers: &mut Workers,
        mut progress: impl FnMut(usize),
    ) -> Result<(), ModelError> {
        if self.is_packed {
            return Ok(());
        }
        let mut errors: Vec<Option<(usize, hearth_kernels::PackError)>> = vec![None; workers.threads()];
        for matrix in &self.matrices {
            let source = tensor(gguf, &matrix.name)?;
            let source = gguf.data(source);
            let row_bytes = matrix.format.source_row_bytes(matrix.cols);
            let group_bytes = matrix.bytes / matrix.rows.div_ceil(ROW_GROUP);
            let out = &mut region[matrix.offset..][..matrix.bytes];
            workers.chunks(
                &mut errors,
                out,
                group_bytes,
                |_, _| (),
                |_| (),
                |error, group, out| {
                    let first = group * ROW_GROUP;
                    let rows = ROW_GROUP.min(matrix.rows - first);
                    let source = &source[first * row_bytes..][..rows * row_bytes];
                    if let Err(refused) = pack_row_group(matrix.format, source, rows, matrix.cols, out) {
                        error.get_or_insert((first, refused));
                    }
                },
            );
            if let Some((first_row, source)) = errors.iter_mut().find_map(Option::take) {
                return Err(ModelError::BadWeight { tensor: matrix.name.clone(), first_row, source });
            }
            progress(matrix.offset + matrix.bytes);
        }
        Ok(())
    }

    fn add(&mut self, gguf: &Gguf<'_>, name: &str, rows: usize, cols: usize) -> Result<(), ModelError> {
        let info = tensor(gguf, name)?;
        expect_shape(info, &[cols, rows])?;
        let format = self.format_of(info)?;
        let too_large = || ModelError::TooLarge { tensor: name.into() };
        let bytes = packed_bytes(format, rows, cols).ok_or_else(too_large)?;
        let in_file = if self.is_packed { Some(bytes) } else { rows.checked_mul(format.source_row_bytes(cols)) };
        if in_file.and_then(|bytes| u64::try_from(bytes).ok()) != Some(info.bytes) {
            return Err(too_large());
        }
        let offset = if self.is_packed {
            usize::try_from(info.offset).map_err(|_| too_large())?
        } else {
            let offset = self.region_bytes;
            let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(TILE_ALIGNMENT_BYTES));
            self.region_bytes = end.ok_or_else(too_large)?;
            offset
        };
        self.matrices.push(PlannedMatrix { name: name.into(), format, rows, cols, offset, bytes });
        Ok(())
    }

    /// The kernels' format of a tensor's type: tiles in a packed file, rows in any other.
    fn format_of(&self, info: &TensorInfo<'_>) -> Result<Format, ModelError> {
        let is_tiled = matches!(info.ggml_type, GgmlType::Tiled(_));
        let format = info.ggml_type.format().filter(|_| is_tiled == self.is_packed);
        format
            .ok_or_else(|| ModelError::UnsupportedType { tensor: info.name.into(), found: info.ggml_type.to_string() })
    }
}

impl<'m> Weights<'m> {
    /// Binds the views to a region that [`WeightLayout::repack`] filled, or to the bytes of a packed file, and reads the norms.
    ///
    /// # Errors
    /// A norm is missing, misshapen, not F32, or not finite; tiles do not begin on a multiple of [`TILE_ALIGNMENT_BYTES`].
    ///
    /// # Panics
    /// `tiles` is shorter than the layout says.
    pub fn bind(gguf: &Gguf<'_>, hyper: &Hyper, layout: &WeightLayout, tiles: &'m [u8]) -> Result<Self, ModelError> {
        let mut matrices = layout.matrices.iter().map(|planned| {
            Matrix::new(planned.format, planned.rows, planned.cols, &tiles[planned.offset..][..planned.bytes])
                .map_err(|source| ModelError::Tiles { tensor: planned.name.clone(), source })
        });
        let mut next = || matrices.next().ok_or(ModelError::MissingTensor { name: OUTPUT.into() })?;
        let embeddings = next()?;
        let mut layers = Vec::with_capacity(hyper.n_layer);
        for layer in 0..hyper.n_layer {
            layers.push(Layer {
                attn_norm: vector(gguf, &format!("blk.{layer}.attn_norm.weight"), hyper.n_embd)?,
                qkv: [next()?, next()?, next()?],
                attn_output: next()?,
                ffn_norm: vector(gguf, &format!("blk.{layer}.ffn_norm.weight"), hyper.n_embd)?,
                gate: next()?,
                up: next()?,
                down: next()?,
            });
        }
        let output = if gguf.tensor(OUTPUT).is_some() { next()? } else { embeddings };
        let rope_factors = match gguf.tensor(ROPE_FACTORS) {
            Some(_) => Some(vector(gguf, ROPE_FACTORS, hyper.rope.dims / 2)?),
            None => None,
        };
        if rope_factors.iter().flatten().any(|&factor| factor <= 0.0) {
            return Err(ModelError::BadVector { tensor: ROPE_FACTORS.into() });
        }
        Ok(Self { embeddings, output, output_norm: vector(gguf, OUTPUT_NORM, hyper.n_embd)?, layers, rope_factors })
    }
}

/// Reads a vector of `len` finite F32 values.
pub(super) fn vector(gguf: &Gguf<'_>, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
    let info = tensor(gguf, name)?;
    expect_shape(info, &[len])?;
    if info.ggml_type != GgmlType::F32 {
        return Err(ModelError::UnsupportedType { tensor: name.into(), found: info.ggml_type.name().to_string() });
    }
    let bytes = gguf.data(info).as_chunks::<4>().0;
    let values: Vec<f32> = bytes.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    if values.len() != len || values.iter().any(|value| !value.is_finite()) {
        return Err(ModelError::BadVector { tensor: name.into() });
    }
    Ok(values)
}

fn tensor<'g, 'm>(gguf: &'g Gguf<'m>, name: &str) -> Result<&'g TensorInfo<'m>, ModelError> {
    gguf.tensor(name).ok_or_else(|| ModelError::MissingTensor { name: name.into() })
}

fn expect_shape(info: &TensorInfo<'_>, wanted: &[usize]) -> Result<(), ModelError> {
    let found = &info.dims[..info.n_dims as usize];
    let same = found.len() == wanted.len() && found.iter().zip(wanted).all(|(&f, &w)| usize::try_from(f) == Ok(w));
    if same {
        return Ok(());
    }
    Err(ModelError::Shape { tensor: info.name.into(), found: found.to_vec(), wanted: wanted.to_vec() })
}

/// Refuses tensors that the forward pass would leave out: biases, experts, extra norms.
fn refuse_unused(gguf: &Gguf<'_>, hyper: &Hyper) -> Result<(), ModelError> {
    let used = |name: &str| {
        if [EMBEDDINGS, OUTPUT, OUTPUT_NORM, ROPE_FACTORS].contains(&name) || name.starts_with(packed::TABLE_PREFIX) {
            return true;
        }
        let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            return false;
        };
        let in_range = layer.parse::<usize>().is_ok_and(|layer| layer < hyper.n_layer);
        let part = rest.strip_suffix(".weight").unwrap_or_default();
        // Old converters wrote the rotary table into the file; it is recomputed.
        in_range && (LAYER_MATRICES.contains(&part) || ["attn_norm", "ffn_norm", "attn_rot_embd"].contains(&part))
    };
    match gguf.tensors().iter().find(|info| !used(info.name)) {
        Some(info) => {
            Err(ModelError::UnusedTensor { name: info.name.into(), architecture: hyper.architecture.clone() })
        }
        None => Ok(()),
    }
}
