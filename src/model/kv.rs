//! The key/value cache: f16, in blocks of 64 positions counted from 0, all from one allocation made at boot.
//!
//! `[layer][kv head][block]`, each block as `hearth_kernels::kv_block_len` lays it out. A sequence owns a table of block
//! numbers, valid in every layer. Written by `model::forward`, read by the attention kernel; next: `kernels`.

use hearth_kernels::{Buffer, KV_BLOCK, kv_block_len};

use crate::model::hyper::Hyper;

/// All sequences' keys and values.
#[derive(Debug)]
pub struct KvCache {
    values: Buffer<u16>,
    /// Values of one layer.
    layer_len: usize,
    /// Values of one kv head in one layer.
    plane_len: usize,
    blocks: usize,
    /// Block numbers nobody owns. Invariant: `free.len()` + blocks in tables == `blocks`.
    free: Vec<u32>,
}

/// One sequence's blocks, in order of position.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

/// Blocks that hold `positions` positions.
pub const fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(KV_BLOCK)
}

impl KvCache {
    /// Takes memory for `blocks` blocks in every layer and kv head.
    pub fn new(hyper: &Hyper, blocks: usize) -> Self {
        let plane_len = blocks * kv_block_len(hyper.head_dim);
        let layer_len = hyper.n_head_kv * plane_len;
        let numbers = 0..u32::try_from(blocks).unwrap_or(u32::MAX);
        Self {
            values: Buffer::new(hyper.n_layer * layer_len),
            layer_len,
            plane_len,
            blocks,
            free: numbers.rev().collect(),
        }
    }

    /// Makes every page memory now, not when a sequence first writes to it.
    pub fn touch(&mut self) {
        crate::sys::map::touch(&mut self.values);
    }

    /// Bytes that [`KvCache::new`] takes.
    pub fn bytes(hyper: &Hyper, blocks: usize) -> Option<usize> {
        let per_block = hyper.n_layer.checked_mul(hyper.n_head_kv)?.checked_mul(kv_block_len(hyper.head_dim))?;
        let values =
            per_block.checked_mul(blocks)?.checked_mul(size_of::<u16>())?.checked_add(Buffer::<u16>::bytes(0))?;
        values.checked_add(blocks.checked_mul(size_of::<u32>())?)
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks that nobody owns.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Values of one kv head's plane in one layer.
    pub fn plane_len(&self) -> usize {
        self.plane_len
    }

    /// One layer, to be read: `[kv head][block]`.
    pub fn layer(&self, layer: usize) -> &[u16] {
        &self.values[layer * self.layer_len..][..self.layer_len]
    }

    /// One layer, to be written: planes of [`KvCache::plane_len`] values, one a kv head.
    pub fn layer_mut(&mut self, layer: usize) -> &mut [u16] {
        &mut self.values[layer * self.layer_len..][..self.layer_len]
    }

    /// Extends `table` until it holds `positions` positions. Returns false, and takes nothing, where too few blocks are free.
    pub fn reserve(&mut self, table: &mut BlockTable, positions: usize) -> bool {
        let wanted = blocks_for(positions).saturating_sub(table.blocks.len());
        if wanted > self.free.len() {
            return false;
        }
        table.blocks.extend(self.free.drain(self.free.len() - wanted..).rev());
        true
    }

    /// One block that nobody owns.
    pub fn take_block(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Gives one block back.
    pub fn give_block(&mut self, block: u32) {
        self.free.push(block);
    }

    /// Gives all of a sequence's blocks back.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.free.extend(table.blocks.drain(..).rev());
    }
}

impl BlockTable {
    /// An empty table that can hold `positions` positions without another allocation.
    pub fn with_capacity(positions: usize) -> Self {
        Self { blocks: Vec::with_capacity(blocks_for(positions)) }
    }

    /// The block numbers.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Adds the block of the next positions.
    pub fn push(&mut self, block: u32) {
        self.blocks.push(block);
    }

    /// Takes the last block off.
    pub fn pop(&mut self) -> Option<u32> {
        self.blocks.pop()
    }

    /// Has the `index`-th positions' keys and values in another block, which holds the same.
    pub fn replace(&mut self, index: usize, block: u32) {
        self.blocks[index] = block;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch::tests::tiny_hyper;

    #[test]
    fn blocks_are_lent_and_given_back_and_never_counted_twice() {
        let mut cache = KvCache::new(&tiny_hyper(), 4);
        let (mut a, mut b) = (BlockTable::with_capacity(256), BlockTable::with_capacity(256));
        assert!(cache.reserve(&mut a, 65));
        assert!(cache.reserve(&mut b, 1));
        assert!(cache.reserve(&mut a, 128), "already held");
        assert!(!cache.reserve(&mut b, 129), "three blocks wanted in all, one is free");
        assert_eq!((a.blocks(), b.blocks(), cache.free_blocks()), (&[0, 1][..], &[2][..], 1));
        cache.release(&mut a);
        assert_eq!(cache.free_blocks(), 3);
        assert!(cache.reserve(&mut b, 256));
        assert_eq!(b.blocks().len() + cache.free_blocks(), cache.blocks());
    }

    #[test]
    fn planned_bytes_cover_what_is_taken() {
        let hyper = tiny_hyper();
        let cache = KvCache::new(&hyper, 3);
        assert_eq!(KvCache::bytes(&hyper, 3), Some(Buffer::<u16>::bytes(cache.values.len()) + 3 * 4));
    }
}
