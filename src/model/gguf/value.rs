//! Metadata values, borrowed from the file: scalars by value, strings and arrays as checked byte ranges.
//! Next on the data's way: the typed getters of `Gguf`, which turn a value into what its reader wants.

use super::cursor::Cursor;

/// The type of a metadata value, as numbered in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// `u8`
    U8,
    /// `i8`
    I8,
    /// `u16`
    U16,
    /// `i16`
    I16,
    /// `u32`
    U32,
    /// `i32`
    I32,
    /// `f32`
    F32,
    /// One byte, 0 or 1.
    Bool,
    /// A length and that many bytes.
    String,
    /// Element type, length, elements.
    Array,
    /// `u64`
    U64,
    /// `i64`
    I64,
    /// `f64`
    F64,
}

impl ValueType {
    const ALL: [(Self, &'static str, usize); 13] = [
        (Self::U8, "u8", 1),
        (Self::I8, "i8", 1),
        (Self::U16, "u16", 2),
        (Self::I16, "i16", 2),
        (Self::U32, "u32", 4),
        (Self::I32, "i32", 4),
        (Self::F32, "f32", 4),
        (Self::Bool, "bool", 1),
        (Self::String, "string", 0),
        (Self::Array, "array", 0),
        (Self::U64, "u64", 8),
        (Self::I64, "i64", 8),
        (Self::F64, "f64", 8),
    ];

    /// The type with this id.
    pub fn from_u32(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).map(|row| row.0)
    }

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Bytes of a value; `None` where they vary.
    pub fn fixed_bytes(self) -> Option<usize> {
        Some(Self::ALL[self as usize].2).filter(|&bytes| bytes > 0)
    }
}

/// One metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'m> {
    /// An integer of any of the eight types, with the type it had.
    Int(i128, ValueType),
    /// `f32` or `f64`, with the type it had.
    Float(f64, ValueType),
    /// A boolean.
    Bool(bool),
    /// Text; not yet known to be UTF-8.
    Str(&'m [u8]),
    /// An array.
    Array(Array<'m>),
}

impl Value<'_> {
    /// The type in words, for messages: `u32`, `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Self::Int(_, kind) | Self::Float(_, kind) => kind.name().to_string(),
            Self::Bool(_) => "bool".to_string(),
            Self::Str(_) => "string".to_string(),
            Self::Array(array) => format!("array of {}", array.element_type().name()),
        }
    }
}

/// An array whose elements were checked to lie in the file; they are decoded on demand.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'m> {
    pub(super) element: ValueType,
    pub(super) len: usize,
    /// Invariant: holds exactly `len` well-formed elements.
    pub(super) bytes: &'m [u8],
}

impl std::fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Array of {} {}", self.len, self.element.name())
    }
}

impl<'m> Array<'m> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The type of every element.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// The elements' bytes as they stand in the file.
    pub fn bytes(&self) -> &'m [u8] {
        self.bytes
    }

    /// The strings, as bytes; `None` if the elements are no strings.
    pub fn strings(&self) -> Option<Strings<'m>> {
        (self.element == ValueType::String).then_some(Strings { bytes: self.bytes, left: self.len })
    }

    /// The integers (booleans as 0 and 1), whatever their width; `None` if the elements are no integers.
    pub fn ints(&self) -> Option<impl Iterator<Item = i128> + use<'m>> {
        use ValueType::{Bool, I8, I16, I32, I64, U8, U16, U32, U64};
        let kind = self.element;
        matches!(kind, U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64 | Bool)
            .then(|| self.scalars().map(move |raw| int_from_le(raw, kind)))
    }

    /// The floating-point numbers, `f64` rounded to `f32`; `None` if the elements are none.
    pub fn floats(&self) -> Option<impl Iterator<Item = f32> + use<'m>> {
        matches!(self.element, ValueType::F32 | ValueType::F64)
            .then(|| self.scalars().map(|raw| float_from_le(raw) as f32))
    }

    fn scalars(&self) -> impl Iterator<Item = &'m [u8]> + use<'m> {
        self.bytes.chunks_exact(self.element.fixed_bytes().unwrap_or(1))
    }
}

/// The strings of an array, each as its bytes.
#[derive(Clone, Debug)]
pub struct Strings<'m> {
    bytes: &'m [u8],
    left: usize,
}

impl<'m> Iterator for Strings<'m> {
    type Item = &'m [u8];

    fn next(&mut self) -> Option<&'m [u8]> {
        self.left = self.left.checked_sub(1)?;
        let (head, rest) = self.bytes.split_first_chunk::<8>()?;
        let (text, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*head)).ok()?)?;
        self.bytes = rest;
        Some(text)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// Reads one scalar of a fixed width. `raw` has exactly the type's bytes.
pub(super) fn scalar(raw: &[u8], kind: ValueType) -> Value<'static> {
    match kind {
        ValueType::F32 | ValueType::F64 => Value::Float(float_from_le(raw), kind),
        ValueType::Bool => Value::Bool(raw.first().is_some_and(|&byte| byte != 0)),
        _ => Value::Int(int_from_le(raw, kind), kind),
    }
}

fn int_from_le(raw: &[u8], kind: ValueType) -> i128 {
    let mut wide = [0u8; 8];
    for (to, from) in wide.iter_mut().zip(raw) {
        *to = *from;
    }
    let bits = u64::from_le_bytes(wide);
    match kind {
        // The casts keep the low bits and read them as signed: that is what the type says.
        ValueType::I8 => i128::from(bits as u8 as i8),
        ValueType::I16 => i128::from(bits as u16 as i16),
        ValueType::I32 => i128::from(bits as u32 as i32),
        ValueType::I64 => i128::from(bits as i64),
        _ => i128::from(bits),
    }
}

fn float_from_le(raw: &[u8]) -> f64 {
    match raw {
        [a, b, c, d] => f64::from(f32::from_le_bytes([*a, *b, *c, *d])),
        [a, b, c, d, e, f, g, h] => f64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
        _ => f64::NAN,
    }
}

/// Reads one value of `kind` at the cursor.
pub(super) fn read_value<'m>(cursor: &mut Cursor<'m>, kind: ValueType) -> Result<Value<'m>, super::GgufError> {
    match kind {
        ValueType::String => Ok(Value::Str(cursor.string("metadata string")?)),
        ValueType::Array => Ok(Value::Array(cursor.array(1)?)),
        fixed => {
            let offset = cursor.offset();
            let raw = cursor.take("metadata value", fixed.fixed_bytes().unwrap_or(1))?;
            match (fixed, raw) {
                (ValueType::Bool, &[found]) if found > 1 => Err(super::GgufError::BadBool { offset, found }),
                _ => Ok(scalar(raw, fixed)),
            }
        }
    }
}
