//! Compact tables for a vocabulary: strings in one run of bytes, and hash tables that hold only indices.
//! Next on the data's way: `vocab`, `bpe` and `spm` look tokens and merges up in them.

use std::hash::{BuildHasher, RandomState};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Byte strings one after the other, addressed by index.
#[derive(Debug, Default)]
pub struct Arena {
    bytes: Vec<u8>,
    /// `ends[i]` is where string `i` ends and string `i + 1` begins.
    ends: Vec<u32>,
}

impl Arena {
    /// An arena with room for `strings` strings of `bytes` bytes together.
    pub fn with_capacity(strings: usize, bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), ends: Vec::with_capacity(strings) }
    }

    /// Adds a string; `None` when the arena holds 4 GiB or 2³² − 1 strings.
    pub fn push(&mut self, parts: &[&[u8]]) -> Option<u32> {
        let added: usize = parts.iter().map(|part| part.len()).sum();
        let end = u32::try_from(self.bytes.len().checked_add(added)?).ok()?;
        let index = u32::try_from(self.ends.len()).ok().filter(|&index| index < IndexTable::EMPTY)?;
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self.ends.push(end);
        Some(index)
    }

    /// String `index`; empty where there is none.
    pub fn get(&self, index: u32) -> &[u8] {
        let index = index as usize;
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).map_or(0, |&end| end as usize);
        self.ends.get(index).map_or(&[], |&end| &self.bytes[start..end as usize])
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
        self.ends.pop();
        self.bytes.truncate(self.ends.last().map_or(0, |&end| end as usize));
    }

    /// Bytes of all strings together.
    pub fn total_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Gives back what `with_capacity` asked too much.
    pub fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.bytes.capacity() + self.ends.capacity() * size_of::<u32>()
    }
}

/// The hash of keys, with a seed of this process: a model file cannot choose colliding keys.
#[derive(Clone, Copy, Debug)]
pub struct Seed(u64);

impl Seed {
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
pub struct IndexTable {
    /// Invariant: a power of two long, at most three quarters full.
    slots: Vec<u32>,
    used: usize,
}

impl IndexTable {
    const EMPTY: u32 = u32::MAX;

    /// A table that takes `count` indices without growing.
    pub fn with_capacity(count: usize) -> Self {
        let slots = count.saturating_mul(4) / 3 + 1;
        Self { slots: vec![Self::EMPTY; slots.next_power_of_two().max(8)], used: 0 }
    }

    /// The index whose key has this hash and satisfies `is_key`.
    pub fn find(&self, hash: u64, is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            match self.slots[at] {
                Self::EMPTY => return None,
                index if is_key(index) => return Some(index),
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// Adds an index whose key is not in the table yet; `hash_of` gives any index's hash.
    pub fn insert(&mut self, index: u32, hash_of: impl Fn(u32) -> u64) {
        if self.used + 1 > self.slots.len() / 4 * 3 {
            let doubled = vec![Self::EMPTY; self.slots.len() * 2];
            for old in std::mem::replace(&mut self.slots, doubled) {
                if old != Self::EMPTY {
                    self.place(old, hash_of(old));
                }
            }
        }
        self.place(index, hash_of(index));
        self.used += 1;
    }

    /// Heap bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<u32>()
    }

    fn place(&mut self, index: u32, hash: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at] != Self::EMPTY {
            at = (at + 1) & mask;
        }
        self.slots[at] = index;
    }
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
        assert!(table.memory_bytes() <= 8192 * 4);
    }
}
