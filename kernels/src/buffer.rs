//! A vector of values from a cache line's beginning on: the kernels' 64-byte loads and stores then never touch two lines, which
//! costs them a second access each. Callers keep rows, caches and products in it; next on the data's way: `dispatch`.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest vector.
const LINE_BYTES: usize = 64;

/// `len` values, their first at a multiple of 64 bytes; taken once, never grown.
#[derive(Debug)]
pub struct Buffer<T> {
    values: Vec<T>,
    first: usize,
    len: usize,
}

impl<T: Copy + Default> Buffer<T> {
    /// Values that fill a line: what is taken beside the `len` wanted.
    const LINE: usize = LINE_BYTES / size_of::<T>();

    /// `len` values of all zero bits, by a type whose default is that.
    pub fn new(len: usize) -> Self {
        let values = vec![T::default(); len + Self::LINE];
        // Where a value is no divisor of a line there may be no such place: then the first will do.
        let first = values.as_ptr().align_offset(LINE_BYTES);
        Self { values, first: if first < Self::LINE { first } else { 0 }, len }
    }

    /// Bytes that [`Buffer::new`] takes.
    pub const fn bytes(len: usize) -> usize {
        (len + Self::LINE) * size_of::<T>()
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.first..self.first + self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.first..self.first + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_begins_a_line() {
        for len in [0, 1, 3, 1000, 1 << 20] {
            let (mut floats, halves) = (Buffer::<f32>::new(len), Buffer::<u16>::new(len));
            assert!(
                floats.as_ptr().addr().is_multiple_of(LINE_BYTES) && halves.as_ptr().addr().is_multiple_of(LINE_BYTES)
            );
            assert_eq!((floats.len(), halves.len()), (len, len));
            assert!(floats.iter().all(|x| x.to_bits() == 0));
            floats.fill(1.0);
            assert_eq!(Buffer::<f32>::bytes(len), floats.values.len() * 4);
        }
    }
}
