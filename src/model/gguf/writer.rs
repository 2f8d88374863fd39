//! The other direction: a GGUF v3 header, metadata copied or new, tensors placed one after the other.
//! Next on the data's way: `model::packed::write` puts it in front of the tensors' bytes.

use super::value::{Value, ValueType};
use super::{GgmlType, MAX_ALIGNMENT};

/// A header in the making. Sizes are known before the values are: strings of the same length give the same offsets.
#[derive(Debug)]
pub struct HeaderWriter {
    alignment: u64,
    metadata: Vec<u8>,
    metadata_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    /// End of the last tensor, bytes from the start of the data section.
    data_end: u64,
}

impl HeaderWriter {
    /// An empty header whose tensors begin at multiples of `alignment` (a power of two); the key that says so is written.
    pub fn new(alignment: u32) -> Self {
        debug_assert!(alignment.is_power_of_two() && u64::from(alignment) <= MAX_ALIGNMENT);
        let mut header = Self {
            alignment: alignment.into(),
            metadata: Vec::new(),
            metadata_count: 0,
            tensors: Vec::new(),
            tensor_count: 0,
            data_end: 0,
        };
        header.u32("general.alignment", alignment);
        header
    }

    /// A number.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, ValueType::U32);
        self.metadata.extend(value.to_le_bytes());
    }

    /// A text.
    pub fn str(&mut self, key: &str, value: &str) {
        self.entry(key, ValueType::String);
        put_string(&mut self.metadata, value.as_bytes());
    }

    /// Texts.
    pub fn strs<'s>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'s str>) {
        self.entry(key, ValueType::Array);
        self.metadata.extend((ValueType::String as u32).to_le_bytes());
        self.metadata.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_string(&mut self.metadata, value.as_bytes());
        }
    }

    /// A value of another file, as it stands there.
    pub fn copy(&mut self, key: &str, value: &Value<'_>) {
        match value {
            Value::Int(number, kind) => {
                self.entry(key, *kind);
                let bytes = number.to_le_bytes();
                self.metadata.extend(&bytes[..kind.fixed_bytes().unwrap_or(0)]);
            }
            Value::Float(number, kind) => {
                self.entry(key, *kind);
                match kind {
                    // It was widened from f32, so this gives the same number back.
                    ValueType::F32 => self.metadata.extend((*number as f32).to_le_bytes()),
                    _ => self.metadata.extend(number.to_le_bytes()),
                }
            }
            Value::Bool(truth) => {
                self.entry(key, ValueType::Bool);
                self.metadata.push(u8::from(*truth));
            }
            Value::Str(text) => {
                self.entry(key, ValueType::String);
                put_string(&mut self.metadata, text);
            }
            Value::Array(array) => {
                self.entry(key, ValueType::Array);
                self.metadata.extend((array.element_type() as u32).to_le_bytes());
                self.metadata.extend((array.len() as u64).to_le_bytes());
                self.metadata.extend(array.bytes());
            }
        }
    }

    /// Places a tensor of `bytes` bytes behind the last one. Returns its offset in the data section; `None` past 2^64.
    pub fn tensor(&mut self, name: &str, dims: &[u64], ggml_type: GgmlType, bytes: u64) -> Option<u64> {
        let offset = self.data_end.checked_next_multiple_of(self.alignment)?;
        self.data_end = offset.checked_add(bytes)?;
        put_string(&mut self.tensors, name.as_bytes());
        // A tensor has at most four dimensions.
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|extent| self.tensors.extend(extent.to_le_bytes()));
        self.tensors.extend(ggml_type.id().to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        Some(offset)
    }

    /// Bytes of the data section as placed so far, the last tensor unpadded.
    pub fn data_bytes(&self) -> u64 {
        self.data_end
    }

    /// The file up to its data section, padding included.
    pub fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.metadata_count.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.tensors);
        // The alignment is at most 2^30.
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out
    }

    fn entry(&mut self, key: &str, kind: ValueType) {
        put_string(&mut self.metadata, key.as_bytes());
        self.metadata.extend((kind as u32).to_le_bytes());
        self.metadata_count += 1;
    }
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}
