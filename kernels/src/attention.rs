//! Keys and values in blocks, and attention of one GQA group over them. `kv_store` fills the blocks, `dispatch` checks an
//! [`AttentionArgs`], each set instantiates [`attend`]; `parts` has the same answer from blocks that several threads looked at.

use crate::simd::{LANES, Simd, exp};

pub(crate) mod parts;

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

/// `Kernels::kv_store`: `block` is one KV block, `k` and `v` are heads of whole vectors.
#[inline(always)]
pub(crate) fn kv_store<S: Simd>(s: S, block: &mut [u16], position_in_block: usize, k: &[f32], v: &[f32]) {
    let (k, v) = (k.as_chunks::<LANES>().0, v.as_chunks::<LANES>().0);
    let block = block.as_chunks_mut::<LANES>().0;
    let (keys, values) = block.split_at_mut(KV_BLOCK * k.len());
    let tile = &mut keys[position_in_block / LANES * LANES * k.len()..][..LANES * k.len()];
    let mut bits = [0; LANES];
    for (columns, k) in tile.as_chunks_mut::<LANES>().0.iter_mut().zip(k) {
        s.store_f16(s.load(k), &mut bits);
        for (column, bits) in columns.iter_mut().zip(bits) {
            column[position_in_block % LANES] = bits;
        }
    }
    for (out, v) in values[position_in_block * v.len()..].iter_mut().zip(v) {
        s.store_f16(s.load(v), out);
    }
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

impl AttentionArgs<'_> {
    /// KV blocks that the last row attends to.
    pub(crate) fn blocks(&self) -> usize {
        self.positions.saturating_add(self.rows - 1).div_ceil(KV_BLOCK)
    }
}

/// Working memory of [`crate::Kernels::attention`], of fixed size; one a thread.
#[derive(Debug)]
pub struct AttentionScratch {
    /// Scores, then weights, of the heads in hand.
    scores: Box<Scores>,
    /// Running maximum and sum of every head.
    max: [f32; MAX_GROUP_HEADS],
    sum: [f32; MAX_GROUP_HEADS],
}

/// `[heads][positions]`, every sixteen in one cache line.
#[derive(Debug)]
#[repr(align(64))]
struct Scores([[f32; KV_BLOCK]; HEADS_AT_ONCE]);

impl AttentionScratch {
    /// Heap bytes that [`AttentionScratch::new`] takes.
    pub const HEAP_BYTES: usize = size_of::<Scores>();

    /// Allocates it.
    pub fn new() -> Self {
        Self {
            scores: Box::new(Scores([[0.0; KV_BLOCK]; HEADS_AT_ONCE])),
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
    for i in 0..a.blocks() {
        Block::new(a, i, i == 0).all_heads(s, a, out, scratch);
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
    /// Which of its sequence it is.
    number: usize,
    /// Whether sums begin with it, not with what was combined before.
    first: bool,
    scale: f32,
}

impl<'a> Block<'a> {
    #[inline(always)]
    fn new(a: &AttentionArgs<'a>, number: usize, first: bool) -> Self {
        let len = kv_block_len(a.head_dim);
        let block = |i: usize| a.plane[a.table[i] as usize * len..][..len].as_chunks::<LANES>().0;
        let next = block((number + 1).min(a.blocks() - 1));
        Self { kv: block(number), next, columns: a.head_dim / LANES, number, first, scale: a.scale }
    }

    /// Positions of the block that a row sees.
    #[inline(always)]
    fn positions(&self, a: &AttentionArgs<'_>, row: usize) -> usize {
        (a.positions + row).saturating_sub(self.number * KV_BLOCK).min(KV_BLOCK)
    }

    /// The heads of all rows that see something of the block, as many at once as there are registers for.
    #[inline(always)]
    fn all_heads<S: Simd>(&self, s: S, a: &AttentionArgs<'_>, out: &mut [f32], scratch: &mut AttentionScratch) {
        let first_row = (self.number * KV_BLOCK + 1).saturating_sub(a.positions);
        let mut head = first_row * a.heads;
        while head < a.rows * a.heads {
            let left = a.rows * a.heads - head;
            head += match left {
                1 => self.heads::<S, 1, 4>(s, a, head, out, scratch),
                2 if S::MANY_REGISTERS => self.heads::<S, 2, 4>(s, a, head, out, scratch),
                3 if S::MANY_REGISTERS => self.heads::<S, 3, 4>(s, a, head, out, scratch),
                4 | 5 if S::MANY_REGISTERS => self.heads::<S, 4, 4>(s, a, head, out, scratch),
                6..12 if S::MANY_REGISTERS => self.heads::<S, 6, 4>(s, a, head, out, scratch),
                _ if S::MANY_REGISTERS => self.heads::<S, HEADS_AT_ONCE, 2>(s, a, head, out, scratch),
                2 => self.heads::<S, 2, 2>(s, a, head, out, scratch),
                3 => self.heads::<S, 3, 2>(s, a, head, out, scratch),
                4 | 5 => self.heads::<S, 4, 1>(s, a, head, out, scratch),
                _ => self.heads::<S, 6, 1>(s, a, head, out, scratch),
            };
        }
    }

    /// `H` heads from the `head`-th of all rows on against the block, combined into `out` and the scratch's maximums and sums;
    /// returns `H`. `C` vectors of positions, then of channels, are in hand at once: `H × C` chains of additions are enough to
    /// hide their latency and few enough to stay in registers.
    #[inline(always)]
    fn heads<S: Simd, const H: usize, const C: usize>(
        &self,
        s: S,
        a: &AttentionArgs<'_>,
        head: usize,
        out: &mut [f32],
        scratch: &mut AttentionScratch,
    ) -> usize {
        let q = &a.q[head * a.head_dim..];
        let (m, l) = (&mut scratch.max[head..], &mut scratch.sum[head..]);
        let scores = &mut scratch.scores.0;
        // In rows' order, so the first head sees the fewest.
        let positions: [usize; H] = std::array::from_fn(|h| self.positions(a, (head + h) / a.heads));
        let tiles = positions[H - 1].div_ceil(LANES);
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
            let (block_max, block_sum) = softmax(s, &mut scores[h], positions[h]);
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
        let out = out[head * a.head_dim..].as_chunks_mut::<LANES>().0;
        let mut column = 0;
        while column + C <= self.columns {
            self.values::<S, H, C>(s, scores, &positions, column, &factors, out);
            column += C;
        }
        while column < self.columns {
            self.values::<S, H, 1>(s, scores, &positions, column, &factors, out);
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
        positions: &[usize; H],
        column: usize,
        factors: &[(f32, f32); H],
        out: &mut [[f32; LANES]],
    ) {
        let first_value = KV_BLOCK * self.columns;
        let mut rows = self.kv[first_value..].chunks_exact(self.columns).enumerate();
        let next = self.next[first_value + column..].as_ptr();
        let mut acc = [[s.splat(0.0); C]; H];
        for (p, row) in rows.by_ref().take(positions[0].min(KV_BLOCK)) {
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
        // What later rows see more. A weight of zero for the others would turn an infinite value into NaN.
        for h in 0..H {
            for (p, row) in rows.clone().take(positions[h].min(KV_BLOCK) - positions[0].min(KV_BLOCK)) {
                let (row, w): (&[_; C], _) = (&row[column..].as_chunks().0[0], s.splat(weights[h][p]));
                for c in 0..C {
                    acc[h][c] = s.fma(w, s.load_f16(&row[c]), acc[h][c]);
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
}

/// Turns the scores of so many positions into weights; their maximum and sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32; KV_BLOCK], positions: usize) -> (f32, f32) {
    scores[positions..].fill(f32::NEG_INFINITY);
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
