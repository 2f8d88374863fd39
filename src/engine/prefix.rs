//! The prefix cache: which KV blocks hold which tokens, so that prompts that begin alike share the blocks of what they share.
//!
//! A full block is known by its tokens and the block before it, compared as they are: a hash only finds the candidates, so no
//! collision can give a prompt another's keys and values. A block that no sequence uses any more stays known until its memory is
//! wanted, the one unused for the longest time first. Keys and values do not depend on who computed them, nor in which batch, so
//! a hit changes no bit. Only full blocks are shared and a full block is never written again: nothing is ever copied.
//! Owned by `engine`, which asks before it plans a step; the blocks' memory is `model::kv`'s.

use hearth_kernels::KV_BLOCK;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::model::kv::{BlockTable, KvCache};
use crate::text::TokenId;

/// What is known of every block of a cache.
#[derive(Debug)]
pub struct PrefixCache {
    blocks: Vec<Block>,
    /// The first known block of every hash; a power of two.
    buckets: Vec<u32>,
    /// Known blocks that nobody uses: the next to be forgotten, and the last.
    oldest: u32,
    newest: u32,
    idle: usize,
    /// Blocks that somebody uses.
    used: usize,
    pinned: usize,
}

/// One block.
#[derive(Clone, Debug)]
struct Block {
    /// Sequences that use it, and one for a pin.
    users: u32,
    /// Its tokens and what is before them are known, and will not change.
    known: bool,
    pinned: bool,
    /// The block before it, [`NONE`] for a prompt's first.
    parent: u32,
    tokens: [TokenId; KV_BLOCK],
    bucket: u32,
    next_in_bucket: u32,
    /// Neighbours among the idle.
    older: u32,
    newer: u32,
}

/// Where the blocks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Never used, or given back before they were full.
    pub free: usize,
    /// In a sequence's table, or pinned.
    pub used: usize,
    /// Known, in nobody's table: free as soon as the memory is wanted.
    pub cached: usize,
}

/// No block.
const NONE: u32 = u32::MAX;

impl PrefixCache {
    /// For a cache of so many blocks.
    pub fn new(blocks: usize) -> Self {
        let block = Block {
            users: 0,
            known: false,
            pinned: false,
            parent: NONE,
            tokens: [TokenId(0); KV_BLOCK],
            bucket: 0,
            next_in_bucket: NONE,
            older: NONE,
            newer: NONE,
        };
        Self {
            blocks: vec![block; blocks],
            buckets: vec![NONE; buckets_for(blocks)],
            oldest: NONE,
            newest: NONE,
            idle: 0,
            used: 0,
            pinned: 0,
        }
    }

    /// Bytes that [`PrefixCache::new`] takes.
    pub const fn bytes(blocks: usize) -> usize {
        blocks.saturating_mul(size_of::<Block>()).saturating_add(buckets_for(blocks) * size_of::<u32>())
    }

    /// The block that holds `tokens` after all that `parent` and those before it hold.
    pub fn find(&self, parent: Option<u32>, tokens: &[TokenId]) -> Option<u32> {
        let parent = parent.unwrap_or(NONE);
        let mut at = self.buckets[self.bucket(parent, tokens) as usize];
        while at != NONE {
            let block = &self.blocks[at as usize];
            if block.parent == parent && block.tokens == tokens {
                return Some(at);
            }
            at = block.next_in_bucket;
        }
        None
    }

    /// One more sequence uses a block that was found.
    pub fn attach(&mut self, block: u32) {
        if self.blocks[block as usize].users == 0 {
            self.unlink_idle(block);
            self.used += 1;
        }
        self.blocks[block as usize].users += 1;
    }

    /// A block to be written: a free one, else the known one unused for the longest time. `None`: all are in use.
    pub fn take(&mut self, cache: &mut KvCache) -> Option<u32> {
        let block = match cache.take_block() {
            Some(block) => block,
            None if self.oldest == NONE => return None,
            None => {
                let block = self.oldest;
                self.unlink_idle(block);
                self.forget(block);
                block
            }
        };
        self.blocks[block as usize].users = 1;
        self.used += 1;
        Some(block)
    }

    /// A sequence's own block is full: it becomes known, and what comes back is to be used from now on. That is another one where
    /// somebody else computed the same meanwhile; the own one is then free.
    pub fn publish(&mut self, cache: &mut KvCache, parent: Option<u32>, own: u32, tokens: &[TokenId]) -> u32 {
        if let Some(same) = self.find(parent, tokens) {
            self.attach(same);
            self.let_go(cache, own);
            return same;
        }
        let parent = parent.unwrap_or(NONE);
        let bucket = self.bucket(parent, tokens);
        let first = std::mem::replace(&mut self.buckets[bucket as usize], own);
        let block = &mut self.blocks[own as usize];
        block.known = true;
        block.parent = parent;
        block.tokens.copy_from_slice(tokens);
        (block.bucket, block.next_in_bucket) = (bucket, first);
        own
    }

    /// A sequence ends: its blocks lose a user. From the last to the first, so that what is before a block is never forgotten
    /// earlier than the block itself.
    pub fn release(&mut self, cache: &mut KvCache, table: &mut BlockTable) {
        while let Some(block) = table.pop() {
            self.let_go(cache, block);
        }
    }

    /// Keeps a known block for ever.
    pub fn pin(&mut self, block: u32) {
        if !self.blocks[block as usize].pinned {
            self.attach(block);
            self.blocks[block as usize].pinned = true;
            self.pinned += 1;
        }
    }

    /// Blocks that are kept for ever.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// Where the blocks are.
    pub fn counts(&self, cache: &KvCache) -> BlockCounts {
        BlockCounts { free: cache.free_blocks(), used: self.used, cached: self.idle }
    }

    /// Counts again, table by table and block by block.
    ///
    /// # Panics
    /// A block is lost, or lent without its user being counted: a defect, and the engine must not go on.
    pub fn check(&self, cache: &KvCache, tables: &[BlockTable]) {
        let counts = self.counts(cache);
        let BlockCounts { free, used, cached } = counts;
        assert_eq!(free + used + cached, cache.blocks(), "KV blocks: {counts:?}");
        let lent: usize = tables.iter().map(|table| table.blocks().len()).sum();
        let users: usize = self.blocks.iter().map(|block| block.users as usize).sum();
        assert_eq!(lent + self.pinned, users, "users of KV blocks: {counts:?}");
        let in_use = self.blocks.iter().filter(|block| block.users > 0).count();
        assert_eq!(in_use, used, "KV blocks in use: {counts:?}");
    }

    fn let_go(&mut self, cache: &mut KvCache, number: u32) {
        let block = &mut self.blocks[number as usize];
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        self.used -= 1;
        if !block.known {
            return cache.give_block(number);
        }
        (block.older, block.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = number,
            newest => self.blocks[newest as usize].newer = number,
        }
        self.newest = number;
        self.idle += 1;
    }

    fn unlink_idle(&mut self, number: u32) {
        let Block { older, newer, .. } = self.blocks[number as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.idle -= 1;
    }

    fn forget(&mut self, number: u32) {
        let Block { bucket, next_in_bucket, .. } = self.blocks[number as usize];
        self.blocks[number as usize].known = false;
        let first = &mut self.buckets[bucket as usize];
        if *first == number {
            *first = next_in_bucket;
            return;
        }
        let mut at = *first;
        while at != NONE {
            let block = &mut self.blocks[at as usize];
            if block.next_in_bucket == number {
                block.next_in_bucket = next_in_bucket;
                return;
            }
            at = block.next_in_bucket;
        }
    }

    fn bucket(&self, parent: u32, tokens: &[TokenId]) -> u32 {
        let mut bytes = [0u8; KV_BLOCK * 4];
        for (to, token) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
            *to = token.0.to_le_bytes();
        }
        let hash = xxh3_64_with_seed(&bytes, u64::from(parent));
        (hash & (self.buckets.len() as u64 - 1)) as u32
    }
}

const fn buckets_for(blocks: usize) -> usize {
    if blocks < 2 { 1 } else { blocks.next_power_of_two() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::arch::tests::tiny_hyper;
    use proptest::prelude::*;

    fn tokens(kind: u32) -> [TokenId; KV_BLOCK] {
        [TokenId(kind); KV_BLOCK]
    }

    /// What a sequence does with a prompt of whole blocks: takes what is known, computes the rest, lets others know. Hits.
    fn run(prefix: &mut PrefixCache, cache: &mut KvCache, table: &mut BlockTable, prompt: &[u32]) -> usize {
        let mut hits = 0;
        for (index, &kind) in prompt.iter().enumerate() {
            let parent = table.blocks().last().copied();
            let block = match prefix.find(parent, &tokens(kind)) {
                Some(block) => {
                    prefix.attach(block);
                    hits += 1;
                    block
                }
                None => {
                    let own = prefix.take(cache).unwrap();
                    prefix.publish(cache, parent, own, &tokens(kind))
                }
            };
            table.push(block);
            assert_eq!(table.blocks().len(), index + 1);
        }
        hits
    }

    #[test]
    fn a_prompt_finds_what_another_began_with_and_nothing_else() {
        let mut cache = KvCache::new(&tiny_hyper(), 8);
        let mut prefix = PrefixCache::new(8);
        let mut tables: Vec<_> = (0..3).map(|_| BlockTable::with_capacity(256)).collect();
        assert_eq!(run(&mut prefix, &mut cache, &mut tables[0], &[1, 2, 3]), 0);
        assert_eq!(run(&mut prefix, &mut cache, &mut tables[1], &[1, 2, 4]), 2, "shares while the first still runs");
        assert_eq!(run(&mut prefix, &mut cache, &mut tables[2], &[2, 3]), 0, "the same tokens elsewhere are others");
        prefix.check(&cache, &tables);
        assert_eq!(prefix.counts(&cache), BlockCounts { free: 2, used: 6, cached: 0 });
        for table in &mut tables {
            prefix.release(&mut cache, table);
        }
        assert_eq!(prefix.counts(&cache), BlockCounts { free: 2, used: 0, cached: 6 });
        assert_eq!(run(&mut prefix, &mut cache, &mut tables[0], &[1, 2, 3]), 3);
    }

    #[test]
    fn the_longest_unused_end_is_forgotten_first_and_a_pinned_beginning_never() {
        let mut cache = KvCache::new(&tiny_hyper(), 4);
        let mut prefix = PrefixCache::new(4);
        let mut table = BlockTable::with_capacity(256);
        run(&mut prefix, &mut cache, &mut table, &[1, 2]);
        prefix.pin(table.blocks()[0]);
        prefix.release(&mut cache, &mut table);
        run(&mut prefix, &mut cache, &mut table, &[5, 6]);
        prefix.release(&mut cache, &mut table);
        assert_eq!(run(&mut prefix, &mut cache, &mut table, &[7]), 0, "takes the place of 2, unused the longest");
        prefix.release(&mut cache, &mut table);
        assert_eq!(run(&mut prefix, &mut cache, &mut table, &[5, 6]), 2);
        prefix.release(&mut cache, &mut table);
        assert_eq!(run(&mut prefix, &mut cache, &mut table, &[8, 9, 10]), 0);
        assert!(prefix.take(&mut cache).is_none(), "three in use and one pinned");
        prefix.release(&mut cache, &mut table);
        assert_eq!(run(&mut prefix, &mut cache, &mut table, &[1, 2]), 1);
        prefix.check(&cache, std::slice::from_ref(&table));
    }

    #[test]
    fn two_that_compute_the_same_at_once_end_up_with_one_block() {
        let mut cache = KvCache::new(&tiny_hyper(), 4);
        let mut prefix = PrefixCache::new(4);
        let (a, b) = (prefix.take(&mut cache).unwrap(), prefix.take(&mut cache).unwrap());
        assert_eq!(prefix.publish(&mut cache, None, a, &tokens(1)), a);
        assert_eq!(prefix.publish(&mut cache, None, b, &tokens(1)), a);
        assert_eq!(prefix.counts(&cache), BlockCounts { free: 3, used: 1, cached: 0 });
    }

    proptest! {
        #[test]
        fn no_block_is_lost_and_every_known_blocks_parent_is_known(
            prompts in prop::collection::vec((prop::collection::vec(0u32..3, 1..5), 0usize..3), 1..60),
        ) {
            let mut cache = KvCache::new(&tiny_hyper(), 12);
            let mut prefix = PrefixCache::new(12);
            let mut tables: Vec<_> = (0..3).map(|_| BlockTable::with_capacity(256)).collect();
            for (prompt, slot) in prompts {
                prefix.release(&mut cache, &mut tables[slot]);
                run(&mut prefix, &mut cache, &mut tables[slot], &prompt);
                prefix.check(&cache, &tables);
                for block in prefix.blocks.iter().filter(|block| block.known && block.parent != NONE) {
                    let parent = &prefix.blocks[block.parent as usize];
                    prop_assert!(parent.known && (block.users == 0 || parent.users > 0));
                }
            }
        }
    }
}
