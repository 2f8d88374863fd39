//! Compact tables for a vocabulary: strings in one run of bytes, and hash tables that hold only indices.
//! Next on the data's way: `vocab`, `bpe` and `spm` look tokens and merges up in them.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// 32-bit numbers, built here or mapped as little-endian bytes from a packed model.
#[derive(Debug)]
pub enum Numbers<'m> {
    /// Built here.
    Own(Vec<u32>),
    /// In the file.
    Mapped(&'m [[u8; 4]]),
}

impl<'m> Numbers<'m> {
    /// The numbers that these bytes are; what is left over behind the last is no number.
    pub fn mapped(bytes: &'m [u8]) -> Self {
        Self::Mapped(bytes.as_chunks().0)
    }

    /// Number `index`.
    pub fn get(&self, index: usize) -> Option<u32> {
        match self {
            Self::Own(numbers) => numbers.get(index).copied(),
            Self::Mapped(numbers) => numbers.get(index).map(|&bytes| u32::from_le_bytes(bytes)),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Own(numbers) => numbers.len(),
            Self::Mapped(numbers) => numbers.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers to be changed: mapped ones are copied first.
    pub fn own(&mut self) -> &mut Vec<u32> {
        if let Self::Mapped(numbers) = self {
            *self = Self::Own(numbers.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect());
        }
        match self {
            Self::Own(numbers) => numbers,
            Self::Mapped(_) => unreachable!("replaced above"),
        }
    }

    /// The same without the file.
    pub fn into_owned(mut self) -> Numbers<'static> {
        Numbers::Own(std::mem::take(self.own()))
    }

    /// As bytes that [`Numbers::mapped`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        (0..self.len()).filter_map(|index| self.get(index)).flat_map(u32::to_le_bytes).collect()
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Self::Own(numbers) => numbers.capacity() * size_of::<u32>(),
            Self::Mapped(_) => 0,
        }
    }
}

/// Byte strings one after the other, addressed by index.
#[derive(Debug)]
pub struct Arena<'m> {
    bytes: Cow<'m, [u8]>,
    /// `ends[i]` is where string `i` ends and string `i + 1` begins.
    ends: Numbers<'m>,
}

impl<'m> Arena<'m> {
    /// An arena with room for `strings` strings of `bytes` bytes together.
    pub fn with_capacity(strings: usize, bytes: usize) -> Self {
        Self { bytes: Cow::Owned(Vec::with_capacity(bytes)), ends: Numbers::Own(Vec::with_capacity(strings)) }
    }

    /// The arena that these two tables of a packed model are. Ends that make no sense give empty strings.
    pub fn mapped(bytes: &'m [u8], ends: &'m [u8]) -> Self {
        Self { bytes: Cow::Borrowed(bytes), ends: Numbers::mapped(ends) }
    }

    /// The same without the file.
    pub fn into_owned(self) -> Arena<'static> {
        Arena { bytes: Cow::Owned(self.bytes.into_owned()), ends: self.ends.into_owned() }
    }

    /// The two tables that [`Arena::mapped`] reads.
    pub fn to_tables(&self) -> [Vec<u8>; 2] {
        [self.bytes.to_vec(), self.ends.to_bytes()]
    }

    /// Adds a string; `None` when the arena holds 4 GiB or 2³² − 1 strings.
    pub fn push(&mut self, parts: &[&[u8]]) -> Option<u32> {
        let added: usize = parts.iter().map(|part| part.len()).sum();
        let end = u32::try_from(self.bytes.len().checked_add(added)?).ok()?;
        let index = u32::try_from(self.ends.len()).ok().filter(|&index| index < IndexTable::EMPTY)?;
        let bytes = self.bytes.to_mut();
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        self.ends.own().push(end);
        Some(index)
    }

    /// String `index`; empty where there is none.
    pub fn get(&self, index: u32) -> &[u8] {
        let index = index as usize;
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).map_or(0, |end| end as usize);
        self.ends.get(index).and_then(|end| self.bytes.get(start..end as usize)).unwrap_or_default()
    }

    /// How many strings there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Takes the last string off again.
    pub fn pop(&mut self) {
        let ends = self.ends.own();
        ends.pop();
        let len = ends.last().map_or(0, |&end| end as usize);
        self.bytes.to_mut().truncate(len);
    }

    /// Bytes of all strings together.
    pub fn total_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Gives back what `with_capacity` asked too much.
    pub fn shrink(&mut self) {
        if let (Cow::Owned(bytes), Numbers::Own(ends)) = (&mut self.bytes, &mut self.ends) {
            bytes.shrink_to_fit();
            ends.shrink_to_fit();
        }
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        let bytes = if let Cow::Owned(bytes) = &self.bytes { bytes.capacity() } else { 0 };
        bytes + self.ends.memory_bytes()
    }
}

/// The hash of keys. Tables built here have a seed of this process, so that a model file cannot choose colliding keys; those of a
/// packed model have the seed they were written with.
#[derive(Clone, Copy, Debug)]
pub struct Seed(u64);

impl Seed {
    /// The seed of tables that are written to a file: the same model gives the same file.
    pub const PACKED: Self = Self(0x6865_6172_7468);

    /// A fresh seed.
    pub fn random() -> Self {
        Self(RandomState::new().hash_one(0u64))
    }

    /// Hashes a byte string.
    pub fn hash(self, key: &[u8]) -> u64 {
        xxh3_64_with_seed(key, self.0)
    }

    /// Hashes a pair of indices.
    pub fn hash_pair(self, left: u32, right: u32) -> u64 {
        self.hash(&(u64::from(left) << 32 | u64::from(right)).to_le_bytes())
    }
}

/// An open-addressed hash table of indices; the keys live elsewhere, the caller hashes and compares them.
#[derive(Debug)]
pub struct IndexTable<'m> {
    /// Invariant: a power of two long, at most three quarters full (a damaged file's may be full).
    slots: Numbers<'m>,
    used: usize,
}

impl<'m> IndexTable<'m> {
    const EMPTY: u32 = u32::MAX;

    /// A table that takes `count` indices without growing.
    pub fn with_capacity(count: usize) -> Self {
        let slots = count.saturating_mul(4) / 3 + 1;
        Self { slots: Numbers::Own(vec![Self::EMPTY; slots.next_power_of_two().max(8)]), used: 0 }
    }

    /// The table that these bytes of a packed model are; `None` if their number is none that a table has. Nothing is added to it.
    pub fn mapped(bytes: &'m [u8]) -> Option<Self> {
        let slots = Numbers::mapped(bytes);
        slots.len().is_power_of_two().then_some(Self { slots, used: 0 })
    }

    /// The same without the file.
    pub fn into_owned(self) -> IndexTable<'static> {
        IndexTable { slots: self.slots.into_owned(), used: self.used }
    }

    /// The bytes that [`IndexTable::mapped`] reads.
    pub fn to_table(&self) -> Vec<u8> {
        self.slots.to_bytes()
    }

    /// The index whose key has this hash and satisfies `is_key`.
    pub fn find(&self, hash: u64, is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let first = hash as usize & mask;
        // Every slot once at most: a damaged table may have no empty one.
        for step in 0..self.slots.len() {
            match self.slots.get(first.wrapping_add(step) & mask)? {
                Self::EMPTY => return None,
                index if is_key(index) => return Some(index),
                _ => {}
            }
        }
        None
    }

    /// Adds an index whose key is not in the table yet; `hash_of` gives any index's hash.
    pub fn insert(&mut self, index: u32, hash_of: impl Fn(u32) -> u64) {
        let slots = self.slots.own();
        if self.used + 1 > slots.len() / 4 * 3 {
            let doubled = vec![Self::EMPTY; slots.len() * 2];
            for old in std::mem::replace(slots, doubled) {
                if old != Self::EMPTY {
                    place(slots, old, hash_of(old));
                }
            }
        }
        place(slots, index, hash_of(index));
        self.used += 1;
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.slots.memory_bytes()
    }
}

fn place(slots: &mut [u32], index: u32, hash: u64) {
    let mask = slots.len() - 1;
    let mut at = hash as usize & mask;
    while slots[at] != IndexTable::EMPTY {
        at = (at + 1) & mask;
    }
    slots[at] = index;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn finds_every_string_after_growing() {
        let seed = Seed::random();
        let mut arena = Arena::with_capacity(4, 4);
        let mut table = IndexTable::with_capacity(4);
        for number in 0..5000u32 {
            let index = arena.push(&[b"k", number.to_string().as_bytes()]).unwrap();
            table.insert(index, |i| seed.hash(arena.get(i)));
        }
        for number in 0..6000u32 {
            let key = format!("k{number}");
            let found = table.find(seed.hash(key.as_bytes()), |i| arena.get(i) == key.as_bytes());
            assert_eq!(found, (number < 5000).then_some(number));
        }
        assert_eq!(arena.get(5000), b"");
        let [bytes, ends] = arena.to_tables();
        let (slots, arena) = (table.to_table(), Arena::mapped(&bytes, &ends));
        let mapped = IndexTable::mapped(&slots).unwrap();
        for number in 0..6000u32 {
            let key = format!("k{number}");
            let found = mapped.find(seed.hash(key.as_bytes()), |i| arena.get(i) == key.as_bytes());
            assert_eq!(found, (number < 5000).then_some(number));
        }
        assert!(table.memory_bytes() <= 8192 * 4);
    }

    #[test]
    fn damaged_tables_find_nothing_and_end() {
        assert!(IndexTable::mapped(&[0; 12]).is_none() && IndexTable::mapped(&[]).is_none());
        let full = [7; 64];
        let table = IndexTable::mapped(&full).unwrap();
        let arena = Arena::mapped(b"abc", &[2, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(table.find(3, |i| arena.get(i) == b"abc"), None);
        assert_eq!(
            (arena.get(0), arena.get(1), arena.get(2), arena.get(3)),
            (&b"ab"[..], &b""[..], &b""[..], &b""[..])
        );
    }
}
