//! Keys and values in blocks, and attention of one GQA group over them. `kv_store` fills the blocks, `dispatch` checks an
//! [`AttentionArgs`], each set instantiates [`attend`].

use std::ops::Range;

#[cfg(not(target_arch = "aarch64"))]
use half::f16;

use crate::simd::{LANES, Simd, exp};

/// Positions in a KV block.
pub const KV_BLOCK: usize = 64;
/// Query heads one [`crate::Kernels::attention`] call may have, those of all its rows together.
pub const MAX_GROUP_HEADS: usize = 32;
/// Values a head may have; head sizes are multiples of 16.
pub const MAX_HEAD_DIM: usize = 512;

/// Query heads, of one row or of several, that share one pass over a block's keys and values: as many as a set's registers hold
/// sums of, at most.
const HEADS_AT_ONCE: usize = 12;
/// Vectors of sixteen f16 in a cache line.
const VECTORS_A_LINE: usize = 2;

/// Length of one KV block of one KV head, u16s: keys `[4 tiles of 16 positions][head_dim][16]`, then values
/// `[64][head_dim]`, both f16 bits.
pub const fn kv_block_len(head_dim: usize) -> usize {
    2 * KV_BLOCK * head_dim
}

/// Writes one position's key and value into a block, rounding to f16 (to nearest even; too large becomes infinite).
///
/// # Panics
/// If `block` is not `kv_block_len(head_dim)` long, `k` or `v` not `head_dim`, that no multiple of 4, or the position not below
/// [`KV_BLOCK`].
pub fn kv_store(block: &mut [u16], position_in_block: usize, head_dim: usize, k: &[f32], v: &[f32]) {
    assert_eq!(block.len(), kv_block_len(head_dim), "kv_store: block length");
    assert!(position_in_block < KV_BLOCK, "kv_store: position {position_in_block} in a block of {KV_BLOCK}");
    assert!(k.len() == head_dim && v.len() == head_dim, "kv_store: head size");
    let (keys, values) = block.split_at_mut(KV_BLOCK * head_dim);
    let tile = &mut keys[position_in_block / LANES * LANES * head_dim..][..LANES * head_dim];
    let (k, k_rest) = k.as_chunks::<4>();
    let (v, v_rest) = v.as_chunks::<4>();
    assert!(k_rest.is_empty() && v_rest.is_empty(), "kv_store: head size {head_dim}");
    let columns = tile.as_chunks_mut::<LANES>().0.as_chunks_mut::<4>().0;
    for (columns, k) in columns.iter_mut().zip(k) {
        for (column, k) in columns.iter_mut().zip(four_f16_bits(k)) {
            column[position_in_block % LANES] = k;
        }
    }
    let values = values[position_in_block * head_dim..][..head_dim].as_chunks_mut::<4>().0;
    for (out, v) in values.iter_mut().zip(v) {
        *out = four_f16_bits(v);
    }
}

/// To nearest even; too large becomes infinite. One instruction on AArch64, where `half` would use it only with FEAT_FP16.
#[cfg(target_arch = "aarch64")]
use crate::neon::four_f16_bits;

/// To nearest even; too large becomes infinite.
#[cfg(not(target_arch = "aarch64"))]
fn four_f16_bits(x: &[f32; 4]) -> [u16; 4] {
    x.map(|x| f16::from_f32(x).to_bits())
}

/// The query heads of one GQA group of one token, or of several that follow one another, against their sequence's cache of the
/// KV head they share.
#[derive(Clone, Copy, Debug)]
pub struct AttentionArgs<'a> {
    /// `[rows][heads][head_dim]`.
    pub q: &'a [f32],
    /// Tokens, at least 1, at consecutive positions.
    pub rows: usize,
    /// Query heads in the group, at least 1; `rows × heads` is at most [`MAX_GROUP_HEADS`].
    pub heads: usize,
    /// Values a head, a multiple of 16 up to [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// All KV blocks of this layer and KV head.
    pub plane: &'a [u16],
    /// Block `i` of the sequence is `plane[table[i] * kv_block_len(head_dim)..]`.
    pub table: &'a [u32],
    /// Positions that the first row attends to, at least 1; each later row attends to one more. What comes after the last row's
    /// in its block may hold anything.
    pub positions: usize,
    /// Factor on the scores.
    pub scale: f32,
}

/// Working memory of [`crate::Kernels::attention`], of fixed size; one a thread.
#[derive(Debug)]
pub struct AttentionScratch {
    /// Scores, then weights, of the heads in hand.
    scores: Box<[[f32; KV_BLOCK]; HEADS_AT_ONCE]>,
    /// Running maximum and sum of every head.
    max: [f32; MAX_GROUP_HEADS],
    sum: [f32; MAX_GROUP_HEADS],
}

impl AttentionScratch {
    /// Heap bytes that [`AttentionScratch::new`] takes.
    pub const HEAP_BYTES: usize = size_of::<[[f32; KV_BLOCK]; HEADS_AT_ONCE]>();

    /// Allocates it.
    pub fn new() -> Self {
        Self {
            scores: Box::new([[0.0; KV_BLOCK]; HEADS_AT_ONCE]),
            max: [0.0; MAX_GROUP_HEADS],
            sum: [0.0; MAX_GROUP_HEADS],
        }
    }
}

impl Default for AttentionScratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Attention as the numeric model says; `out` is `[rows][heads][head_dim]`. The arguments have been checked.
#[inline(always)]
pub(crate) fn attend<S: Simd>(s: S, a: &AttentionArgs<'_>, out: &mut [f32], scratch: &mut AttentionScratch) {
    let block_len = kv_block_len(a.head_dim);
    let block = |i: usize| a.plane[a.table[i] as usize * block_len..][..block_len].as_chunks::<LANES>().0;
    let blocks = (a.positions + a.rows - 1).div_ceil(KV_BLOCK);
    for i in 0..blocks {
        let (kv, next) = (block(i), block((i + 1).min(blocks - 1)));
        let b = Block { kv, next, columns: a.head_dim / LANES, positions: KV_BLOCK, first: i == 0, scale: a.scale };
        // Rows that see some of the block go one by one, those that see all of it together.
        let rows_before = |position: usize| position.saturating_sub(a.positions).min(a.rows);
        let (some, all) = (rows_before(i * KV_BLOCK + 1), rows_before((i + 1) * KV_BLOCK));
        for row in some..all {
            let b = Block { positions: a.positions + row - i * KV_BLOCK, ..b };
            b.all_heads(s, a, row * a.heads..(row + 1) * a.heads, out, scratch);
        }
        b.all_heads(s, a, all * a.heads..a.rows * a.heads, out, scratch);
    }
    for (out, l) in out.chunks_exact_mut(a.head_dim).zip(&scratch.sum) {
        let inv = s.splat(1.0 / l);
        for out in out.as_chunks_mut::<LANES>().0 {
            s.store(s.mul(s.load(out), inv), out);
        }
    }
}

/// One KV block in hand. The first `4 × head_dim` vectors of `kv` are keys, the rest values.
#[derive(Clone, Copy)]
struct Block<'a> {
    kv: &'a [[u16; LANES]],
    /// The block after it, prefetched while this one is worked on.
    next: &'a [[u16; LANES]],
    /// Vectors a head: `head_dim / 16`.
    columns: usize,
    positions: usize,
    first: bool,
    scale: f32,
}

impl Block<'_> {
    /// Some of the heads of all rows against the block, as many at once as there are registers for.
    #[inline(always)]
    fn all_heads<S: Simd>(
        &self,
        s: S,
        a: &AttentionArgs<'_>,
        heads: Range<usize>,
        out: &mut [f32],
        scratch: &mut AttentionScratch,
    ) {
        let mut head = heads.start;
        while head < heads.end {
            let left = heads.end - head;
            let q = &a.q[head * a.head_dim..];
            let out = &mut out[head * a.head_dim..];
            let (scores, m, l) = (&mut scratch.scores, &mut scratch.max[head..], &mut scratch.sum[head..]);
            head += match left {
                1 => self.heads::<S, 1, 4>(s, q, out, scores, m, l),
                2 if S::MANY_REGISTERS => self.heads::<S, 2, 4>(s, q, out, scores, m, l),
                3 if S::MANY_REGISTERS => self.heads::<S, 3, 4>(s, q, out, scores, m, l),
                4 | 5 if S::MANY_REGISTERS => self.heads::<S, 4, 4>(s, q, out, scores, m, l),
                6..12 if S::MANY_REGISTERS => self.heads::<S, 6, 4>(s, q, out, scores, m, l),
                _ if S::MANY_REGISTERS => self.heads::<S, HEADS_AT_ONCE, 2>(s, q, out, scores, m, l),
                2 => self.heads::<S, 2, 2>(s, q, out, scores, m, l),
                3 => self.heads::<S, 3, 2>(s, q, out, scores, m, l),
                4 | 5 => self.heads::<S, 4, 1>(s, q, out, scores, m, l),
                _ => self.heads::<S, 6, 1>(s, q, out, scores, m, l),
            };
        }
    }

    /// `H` heads against the block, combined into `out`, `m` and `l`; returns `H`. `C` vectors of positions, then of
    /// channels, are in hand at once: `H × C` chains of additions are enough to hide their latency and few enough to stay in
    /// registers.
    #[inline(always)]
    fn heads<S: Simd, const H: usize, const C: usize>(
        &self,
        s: S,
        q: &[f32],
        out: &mut [f32],
        scores: &mut [[f32; KV_BLOCK]; HEADS_AT_ONCE],
        m: &mut [f32],
        l: &mut [f32],
    ) -> usize {
        let tiles = self.positions.div_ceil(LANES);
        let mut tile = 0;
        while tile + C <= tiles {
            self.scores::<S, H, C>(s, q, tile, scores);
            tile += C;
        }
        while tile < tiles {
            self.scores::<S, H, 1>(s, q, tile, scores);
            tile += 1;
        }
        // Factors of the old and the new part of `o`; on the first block there is no old part.
        let mut factors = [(0.0, 1.0); H];
        for h in 0..H {
            let (block_max, block_sum) = self.softmax(s, &mut scores[h]);
            if self.first {
                (m[h], l[h]) = (block_max, block_sum);
                continue;
            }
            let max = m[h].max(block_max);
            let (c, e) = (crate::math::exp(m[h] - max), crate::math::exp(block_max - max));
            l[h] = l[h].mul_add(c, block_sum * e);
            m[h] = max;
            factors[h] = (c, e);
        }
        let out = out.as_chunks_mut::<LANES>().0;
        let mut column = 0;
        while column + C <= self.columns {
            self.values::<S, H, C>(s, scores, column, &factors, out);
            column += C;
        }
        while column < self.columns {
            self.values::<S, H, 1>(s, scores, column, &factors, out);
            column += 1;
        }
        H
    }

    /// `scores[h][p]`, scaled, of `C` tiles of positions; lanes past the last position hold whatever the cache does.
    #[inline(always)]
    fn scores<S: Simd, const H: usize, const C: usize>(
        &self,
        s: S,
        q: &[f32],
        tile: usize,
        scores: &mut [[f32; KV_BLOCK]; HEADS_AT_ONCE],
    ) {
        let head_dim = self.columns * LANES;
        let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * head_dim..][..head_dim]);
        let keys: [&[_]; C] = std::array::from_fn(|c| &self.kv[(tile + c) * head_dim..][..head_dim]);
        let next = self.next[tile * head_dim..].as_ptr();
        let mut acc = [[s.splat(0.0); C]; H];
        for d in 0..head_dim {
            if C > 1 || d.is_multiple_of(VECTORS_A_LINE) {
                for c in (0..C).step_by(VECTORS_A_LINE) {
                    s.prefetch(next.wrapping_add(d * C + c));
                }
            }
            let mut k = [s.splat(0.0); C];
            for c in 0..C {
                k[c] = s.load_f16(&keys[c][d]);
            }
            for h in 0..H {
                let q = s.splat(q[h][d]);
                for c in 0..C {
                    acc[h][c] = s.fma(q, k[c], acc[h][c]);
                }
            }
        }
        for h in 0..H {
            let tiles = &mut scores[h].as_chunks_mut::<LANES>().0[tile..][..C];
            // By number, here as below: an iterator over the sums would have them copied, as one array through memory.
            for c in 0..C {
                s.store(s.mul(acc[h][c], s.splat(self.scale)), &mut tiles[c]);
            }
        }
    }

    /// Channels `16 column ..` of `C` vectors: the weighted sum of the block's values, combined into `out`.
    #[inline(always)]
    fn values<S: Simd, const H: usize, const C: usize>(
        &self,
        s: S,
        weights: &[[f32; KV_BLOCK]; HEADS_AT_ONCE],
        column: usize,
        factors: &[(f32, f32); H],
        out: &mut [[f32; LANES]],
    ) {
        let first_value = KV_BLOCK * self.columns;
        let rows = self.kv[first_value..].chunks_exact(self.columns);
        let next = self.next[first_value + column..].as_ptr();
        let mut acc = [[s.splat(0.0); C]; H];
        for (p, row) in rows.enumerate().take(self.positions.min(KV_BLOCK)) {
            if C > 1 || column.is_multiple_of(VECTORS_A_LINE) {
                for c in (0..C).step_by(VECTORS_A_LINE) {
                    s.prefetch(next.wrapping_add(p * self.columns + c));
                }
            }
            let row: &[_; C] = &row[column..].as_chunks().0[0];
            let mut v = [s.splat(0.0); C];
            for c in 0..C {
                v[c] = s.load_f16(&row[c]);
            }
            for h in 0..H {
                let w = s.splat(weights[h][p]);
                for c in 0..C {
                    acc[h][c] = s.fma(w, v[c], acc[h][c]);
                }
            }
        }
        for h in 0..H {
            let (keep, take) = (s.splat(factors[h].0), s.splat(factors[h].1));
            let columns = &mut out[h * self.columns + column..][..C];
            for c in 0..C {
                let (out, new) = (&mut columns[c], acc[h][c]);
                let o = if self.first { new } else { s.fma(s.load(out), keep, s.mul(new, take)) };
                s.store(o, out);
            }
        }
    }

    /// Turns scores into weights; their maximum and sum.
    #[inline(always)]
    fn softmax<S: Simd>(&self, s: S, scores: &mut [f32; KV_BLOCK]) -> (f32, f32) {
        scores[self.positions..].fill(f32::NEG_INFINITY);
        let tiles = scores.as_chunks_mut::<LANES>().0;
        let mut max = s.load(&tiles[0]);
        for tile in &tiles[1..] {
            max = s.max(max, s.load(tile));
        }
        let max = s.max_lane(max);
        let mut sum = s.splat(0.0);
        for tile in tiles {
            let p = exp(s, s.sub(s.load(tile), s.splat(max)));
            sum = s.add(sum, p);
            s.store(p, tile);
        }
        (max, s.tree_sum(sum))
    }
}
