//! A reading position in the file: every read is checked against what is left and against the limits.
//! Next on the data's way: `Gguf::parse`, which puts the pieces together.

use super::value::{Array, ValueType};
use super::{GgufError, MAX_ARRAY_DEPTH, MAX_ARRAY_LEN, MAX_STRING_BYTES};

pub(super) struct Cursor<'m> {
    bytes: &'m [u8],
    /// Invariant: at most `bytes.len()`.
    at: usize,
}

impl<'m> Cursor<'m> {
    pub(super) fn new(bytes: &'m [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn offset(&self) -> u64 {
        self.at as u64
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, wanted: &'static str, len: usize) -> Result<&'m [u8], GgufError> {
        match self.bytes.get(self.at..).and_then(|rest| rest.get(..len)) {
            Some(piece) => {
                self.at += len;
                Ok(piece)
            }
            None => {
                Err(GgufError::Truncated { offset: self.offset(), wanted, need: len as u64, have: self.left() as u64 })
            }
        }
    }

    pub(super) fn u32(&mut self, wanted: &'static str) -> Result<u32, GgufError> {
        let mut raw = [0; 4];
        raw.copy_from_slice(self.take(wanted, 4)?);
        Ok(u32::from_le_bytes(raw))
    }

    pub(super) fn u64(&mut self, wanted: &'static str) -> Result<u64, GgufError> {
        let mut raw = [0; 8];
        raw.copy_from_slice(self.take(wanted, 8)?);
        Ok(u64::from_le_bytes(raw))
    }

    /// A number that must not be over `limit`, as an index type.
    pub(super) fn count(&mut self, what: &'static str, limit: usize) -> Result<usize, GgufError> {
        let offset = self.offset();
        let found = self.u64(what)?;
        // The error is made where it is needed, and dropped nowhere: a vocabulary has a hundred thousand lengths.
        match usize::try_from(found) {
            Ok(count) if count <= limit => Ok(count),
            _ => Err(GgufError::OverLimit { what, offset, found, limit: limit as u64 }),
        }
    }

    pub(super) fn string(&mut self, what: &'static str) -> Result<&'m [u8], GgufError> {
        let len = self.count("string length", MAX_STRING_BYTES)?;
        self.take(what, len)
    }

    /// A key or tensor name: UTF-8, not empty, of limited length.
    pub(super) fn name(&mut self, what: &'static str, limit: usize) -> Result<&'m str, GgufError> {
        let len = self.count(what, limit)?;
        let offset = self.offset();
        match std::str::from_utf8(self.take(what, len)?) {
            Ok("") => Err(GgufError::BadName { what, offset, problem: "empty" }),
            Ok(name) => Ok(name),
            Err(_) => Err(GgufError::BadName { what, offset, problem: "not UTF-8" }),
        }
    }

    pub(super) fn value_type(&mut self) -> Result<ValueType, GgufError> {
        let offset = self.offset();
        let found = self.u32("metadata type")?;
        ValueType::from_u32(found).ok_or(GgufError::BadValueType { offset, found })
    }

    /// An array; `depth` counts the arrays it stands in, itself included.
    pub(super) fn array(&mut self, depth: usize) -> Result<Array<'m>, GgufError> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(GgufError::TooDeep { offset: self.offset(), limit: MAX_ARRAY_DEPTH });
        }
        let element = self.value_type()?;
        let len = self.count("array length", MAX_ARRAY_LEN)?;
        let start = self.at;
        match element.fixed_bytes() {
            // At most MAX_ARRAY_LEN × 8 bytes: no overflow.
            Some(bytes) => {
                self.take("array elements", len * bytes)?;
            }
            // Every element takes at least 8 bytes, so a long array of nothing ends at the file's end.
            None if element == ValueType::String => {
                for _ in 0..len {
                    self.string("string in an array")?;
                }
            }
            None => {
                for _ in 0..len {
                    self.array(depth + 1)?;
                }
            }
        }
        Ok(Array { element, len, bytes: &self.bytes[start..self.at] })
    }
}
