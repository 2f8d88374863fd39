//! Typed access to metadata: what a key is wanted as, or an error that names key, found type and wanted type.
//! Next on the data's way: `model::vocab` and the model's hyperparameters.

use super::value::{Strings, Value};
use super::{Gguf, GgufError};

impl<'m> Gguf<'m> {
    /// The integer under `key` as `u32`.
    ///
    /// # Errors
    /// It is no integer, or does not fit.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.int(key, "u32")
    }

    /// The integer under `key` as `u64`.
    ///
    /// # Errors
    /// It is no integer, or does not fit.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.int(key, "u64")
    }

    /// The floating-point number under `key`, `f64` rounded to `f32`.
    ///
    /// # Errors
    /// It is no floating-point number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "f32", |value| match value {
            Value::Float(number, _) => Some(*number as f32),
            _ => None,
        })
    }

    /// The boolean under `key`.
    ///
    /// # Errors
    /// It is no boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "bool", |value| match value {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        })
    }

    /// The string under `key`.
    ///
    /// # Errors
    /// It is no string, or not UTF-8.
    pub fn str(&self, key: &str) -> Result<Option<&'m str>, GgufError> {
        let bytes = self.typed(key, "string", |value| match value {
            Value::Str(bytes) => Some(*bytes),
            _ => None,
        })?;
        bytes
            .map(std::str::from_utf8)
            .transpose()
            .map_err(|e| GgufError::NotUtf8 { key: key.to_string(), at: e.valid_up_to() })
    }

    /// The strings under `key`, each as its bytes, decoded on demand.
    ///
    /// # Errors
    /// It is no array of strings.
    pub fn array_str(&self, key: &str) -> Result<Option<Strings<'m>>, GgufError> {
        self.typed(key, "array of string", |value| match value {
            Value::Array(array) => array.strings(),
            _ => None,
        })
    }

    /// The floating-point numbers under `key`.
    ///
    /// # Errors
    /// It is no array of floating-point numbers.
    pub fn array_f32(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.typed(key, "array of f32", |value| match value {
            Value::Array(array) => Some(array.floats()?.collect()),
            _ => None,
        })
    }

    /// The integers under `key` as `i32`.
    ///
    /// # Errors
    /// It is no array of integers, or one does not fit.
    pub fn array_i32(&self, key: &str) -> Result<Option<Vec<i32>>, GgufError> {
        self.ints(key, "array of i32")
    }

    /// As [`Gguf::str`], of a key that must be there.
    ///
    /// # Errors
    /// As [`Gguf::str`], or the key is missing.
    pub fn require_str(&self, key: &str) -> Result<&'m str, GgufError> {
        self.str(key)?.ok_or_else(|| missing(key, "string"))
    }

    fn int<T: TryFrom<i128>>(&self, key: &str, wanted: &'static str) -> Result<Option<T>, GgufError> {
        let number = self.typed(key, wanted, |value| match value {
            Value::Int(number, _) => Some(*number),
            _ => None,
        })?;
        number.map(|number| fit(key, number, wanted)).transpose()
    }

    fn ints<T: TryFrom<i128>>(&self, key: &str, wanted: &'static str) -> Result<Option<Vec<T>>, GgufError> {
        let numbers = self.typed(key, wanted, |value| match value {
            Value::Array(array) => array.ints(),
            _ => None,
        })?;
        numbers.map(|numbers| numbers.map(|number| fit(key, number, wanted)).collect()).transpose()
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(&Value<'m>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(found) => Ok(Some(found)),
            None => Err(GgufError::WrongType { key: key.to_string(), found: value.type_name(), wanted }),
        }
    }
}

fn fit<T: TryFrom<i128>>(key: &str, number: i128, wanted: &'static str) -> Result<T, GgufError> {
    T::try_from(number).map_err(|_| GgufError::OutOfRange { key: key.to_string(), found: number.to_string(), wanted })
}

fn missing(key: &str, wanted: &'static str) -> GgufError {
    GgufError::Missing { key: key.to_string(), wanted }
}
