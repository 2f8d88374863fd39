//! GGUF versions 2 and 3, little-endian: header, metadata and tensor table of a model file, checked once.
//!
//! [`Gguf::parse`] makes every check; after it nothing here can fail on the file's account except the typed getters, and
//! nothing panics. Metadata strings and arrays stay in the mapped file, only an index is built.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//! Next on the data's way: `model::vocab` reads the tokenizer, the model its hyperparameters and weights.

mod cursor;
mod error;
mod get;
#[cfg(test)]
mod tests;
mod types;
mod value;
mod writer;

pub use error::GgufError;
pub use types::{GgmlType, TILED_IDS};
pub use value::{Array, Strings, Value, ValueType};
pub use writer::HeaderWriter;

use cursor::Cursor;
use hearth_kernels::packed_bytes;

/// Metadata entries in a file.
pub const MAX_METADATA: usize = 65_536;
/// Tensors in a file.
pub const MAX_TENSORS: usize = 65_536;
/// Bytes of a metadata key.
pub const MAX_KEY_BYTES: usize = 65_535;
/// Bytes of a tensor's name.
pub const MAX_TENSOR_NAME_BYTES: usize = 255;
/// Bytes of a metadata string (chat templates are the longest).
pub const MAX_STRING_BYTES: usize = 16 << 20;
/// Elements of a metadata array.
pub const MAX_ARRAY_LEN: usize = 16 << 20;
/// Arrays in arrays.
pub const MAX_ARRAY_DEPTH: usize = 4;
/// Largest `general.alignment`, bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 30;
/// Alignment of a file that does not say, bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Bytes of the smallest metadata entry: key length, one byte of key, type, one byte of value.
const MIN_METADATA_BYTES: usize = 14;
/// Bytes of the smallest tensor entry: name length, one byte of name, dimension count, type, offset.
const MIN_TENSOR_BYTES: usize = 25;

/// A parsed GGUF file over its mapped bytes.
#[derive(Debug)]
pub struct Gguf<'m> {
    bytes: &'m [u8],
    version: u32,
    alignment: u64,
    metadata: Vec<(&'m str, Value<'m>)>,
    /// Indices into `metadata`, by key.
    metadata_by_key: Vec<u32>,
    tensors: Vec<TensorInfo<'m>>,
    /// Indices into `tensors`, by name.
    tensors_by_name: Vec<u32>,
}

/// One tensor: where its bytes are and what they mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorInfo<'m> {
    /// Unique in the file.
    pub name: &'m str,
    /// Extents, fastest first: `dims[0]` is the length of a row. Unused ones are 1.
    pub dims: [u64; 4],
    /// How many of `dims` the file gave.
    pub n_dims: u32,
    /// The type of its blocks.
    pub ggml_type: GgmlType,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Size in bytes; 0 for [`GgmlType::Unknown`], whose size nobody knows.
    pub bytes: u64,
}

impl TensorInfo<'_> {
    /// Values in the tensor.
    pub fn elements(&self) -> u64 {
        // `parse` checked that the product fits.
        self.dims.iter().product()
    }
}

impl<'m> Gguf<'m> {
    /// Checks the file and indexes it.
    ///
    /// # Errors
    /// Whatever is wrong with the file, see [`GgufError`].
    pub fn parse(bytes: &'m [u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(bytes);
        let version = read_version(&mut cursor)?;
        let tensor_count = cursor.count("tensor count", MAX_TENSORS)?;
        let metadata_count = cursor.count("metadata count", MAX_METADATA)?;

        let mut metadata = Vec::with_capacity(metadata_count.min(cursor.left() / MIN_METADATA_BYTES));
        for _ in 0..metadata_count {
            let key = cursor.name("metadata key", MAX_KEY_BYTES)?;
            let kind = cursor.value_type()?;
            metadata.push((key, value::read_value(&mut cursor, kind)?));
        }
        let metadata_by_key = index_by("metadata key", &metadata, |entry| entry.0)?;
        let mut gguf = Self {
            bytes,
            version,
            alignment: DEFAULT_ALIGNMENT,
            metadata,
            metadata_by_key,
            tensors: Vec::new(),
            tensors_by_name: Vec::new(),
        };
        gguf.refuse_split()?;
        gguf.alignment = gguf.read_alignment()?;

        let mut tensors = Vec::with_capacity(tensor_count.min(cursor.left() / MIN_TENSOR_BYTES));
        for _ in 0..tensor_count {
            tensors.push(read_tensor(&mut cursor, gguf.alignment)?);
        }
        gguf.tensors_by_name = index_by("tensor name", &tensors, |tensor| tensor.name)?;
        // A cursor offset is at most isize::MAX and the alignment at most 2^30: no overflow.
        place_tensors(&mut tensors, cursor.offset().next_multiple_of(gguf.alignment), bytes.len() as u64)?;
        gguf.tensors = tensors;
        Ok(gguf)
    }

    /// The whole file.
    pub fn bytes(&self) -> &'m [u8] {
        self.bytes
    }

    /// The container's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of tensors in the file, bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Every metadata entry, in file order.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&'m str, &Value<'m>)> {
        self.metadata.iter().map(|(key, value)| (*key, value))
    }

    /// The metadata value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value<'m>> {
        let found = self.metadata_by_key.binary_search_by(|&i| self.metadata[i as usize].0.cmp(key)).ok()?;
        Some(&self.metadata[self.metadata_by_key[found] as usize].1)
    }

    /// `general.architecture`: the model family, and the prefix of its hyperparameters' keys.
    ///
    /// # Errors
    /// It is missing or no string.
    pub fn architecture(&self) -> Result<&'m str, GgufError> {
        self.require_str("general.architecture")
    }

    /// Every tensor, in file order.
    pub fn tensors(&self) -> &[TensorInfo<'m>] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo<'m>> {
        let found = self.tensors_by_name.binary_search_by(|&i| self.tensors[i as usize].name.cmp(name)).ok()?;
        Some(&self.tensors[self.tensors_by_name[found] as usize])
    }

    /// A tensor's bytes; empty for [`GgmlType::Unknown`], and for a `TensorInfo` of another file that does not fit here.
    pub fn data(&self, tensor: &TensorInfo<'_>) -> &'m [u8] {
        let range = || {
            let start = usize::try_from(tensor.offset).ok()?;
            let len = usize::try_from(tensor.bytes).ok()?;
            self.bytes.get(start..start.checked_add(len)?)
        };
        range().unwrap_or(&[])
    }

    fn refuse_split(&self) -> Result<(), GgufError> {
        match self.u64("split.count")? {
            Some(count) if count > 1 => {
                let part = self.u64("split.no")?.unwrap_or(0).saturating_add(1);
                Err(GgufError::Split { part, count })
            }
            _ => Ok(()),
        }
    }

    fn read_alignment(&self) -> Result<u64, GgufError> {
        let found = self.u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if found.is_power_of_two() && found <= MAX_ALIGNMENT {
            Ok(found)
        } else {
            Err(GgufError::BadAlignment { found, limit: MAX_ALIGNMENT })
        }
    }
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32, GgufError> {
    let mut magic = [0; 4];
    magic.copy_from_slice(cursor.take("magic", 4)?);
    // The old containers wrote their magic as a little-endian number, so the letters stand reversed.
    match &magic {
        b"GGUF" => {}
        b"lmgg" => return Err(GgufError::Legacy { name: "GGML" }),
        b"fmgg" => return Err(GgufError::Legacy { name: "GGMF" }),
        b"tjgg" => return Err(GgufError::Legacy { name: "GGJT" }),
        b"algg" => return Err(GgufError::Legacy { name: "GGLA" }),
        _ => return Err(GgufError::NotGguf { magic }),
    }
    match cursor.u32("version")? {
        version @ (2 | 3) => Ok(version),
        raw if raw != 0 && raw & 0xffff == 0 => Err(GgufError::BigEndian { raw }),
        found => Err(GgufError::Version { found }),
    }
}

/// Reads one tensor entry; its `offset` is still relative to the data section.
fn read_tensor<'m>(cursor: &mut Cursor<'m>, alignment: u64) -> Result<TensorInfo<'m>, GgufError> {
    let name = cursor.name("tensor name", MAX_TENSOR_NAME_BYTES)?;
    let mut dims = [1; 4];
    let bad_shape = |dims, problem| GgufError::BadShape { name: name.to_string(), dims, problem };
    let n_dims = cursor.u32("tensor dimension count")?;
    if n_dims > 4 {
        return Err(bad_shape(dims, "more than 4 dimensions"));
    }
    for extent in dims.iter_mut().take(n_dims as usize) {
        *extent = cursor.u64("tensor dimension")?;
    }
    let ggml_type = GgmlType::from_u32(cursor.u32("tensor type")?);
    let offset = cursor.u64("tensor offset")?;

    // A zero extent must not hide an overflow from code that multiplies the others.
    let elements = dims.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent.max(1)));
    let elements = elements.filter(|&count| count <= i64::MAX as u64);
    let elements = elements.ok_or_else(|| bad_shape(dims, "the number of values does not fit 63 bits"))?;
    let elements = if dims.contains(&0) { 0 } else { elements };
    let bytes = match ggml_type {
        GgmlType::Unknown(_) => 0,
        GgmlType::Tiled(format) => {
            let matrix = || {
                let (cols, rows) = (usize::try_from(dims[0]).ok()?, usize::try_from(dims[1]).ok()?);
                let bytes = packed_bytes(format, rows, cols)?;
                u64::try_from(bytes).ok().filter(|_| n_dims <= 2)
            };
            matrix().ok_or_else(|| bad_shape(dims, "tiles hold one matrix that fits the address space"))?
        }
        known => {
            let block = known.block_size();
            if !dims[0].is_multiple_of(block) {
                let ggml_type = known.name();
                return Err(GgufError::PartialBlock { name: name.to_string(), cols: dims[0], block, ggml_type });
            }
            (elements / block)
                .checked_mul(known.type_size())
                .ok_or_else(|| bad_shape(dims, "the number of bytes does not fit 64 bits"))?
        }
    };
    if !offset.is_multiple_of(alignment) {
        return Err(GgufError::Misaligned { name: name.to_string(), offset, alignment });
    }
    Ok(TensorInfo { name, dims, n_dims, ggml_type, offset, bytes })
}

/// Makes offsets absolute and checks that every tensor lies in the file and shares no byte with another.
fn place_tensors(tensors: &mut [TensorInfo<'_>], data_start: u64, file_bytes: u64) -> Result<(), GgufError> {
    for tensor in tensors.iter_mut() {
        let start = data_start.saturating_add(tensor.offset);
        if start.checked_add(tensor.bytes).is_none_or(|end| end > file_bytes) {
            let (name, bytes) = (tensor.name.to_string(), tensor.bytes);
            return Err(GgufError::OutOfFile { name, start, bytes, file_bytes });
        }
        tensor.offset = start;
    }
    let mut order: Vec<&TensorInfo<'_>> = tensors.iter().collect();
    order.sort_unstable_by_key(|tensor| (tensor.offset, tensor.bytes));
    for pair in order.windows(2) {
        if let [first, second] = pair
            && first.offset + first.bytes > second.offset
        {
            return Err(GgufError::Overlap {
                first: first.name.to_string(),
                second: second.name.to_string(),
                offset: second.offset,
            });
        }
    }
    Ok(())
}

/// The order of `items` by name; the same name twice is an error.
fn index_by<'m, T>(what: &'static str, items: &[T], name: impl Fn(&T) -> &'m str) -> Result<Vec<u32>, GgufError> {
    // The limits on counts keep indices far below u32::MAX.
    let mut order: Vec<u32> = (0..items.len() as u32).collect();
    order.sort_unstable_by_key(|&i| name(&items[i as usize]));
    match order.windows(2).find(|pair| name(&items[pair[0] as usize]) == name(&items[pair[1] as usize])) {
        Some(pair) => Err(GgufError::Duplicate { what, name: name(&items[pair[0] as usize]).to_string() }),
        None => Ok(order),
    }
}
