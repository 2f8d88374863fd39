//! A step's keys and values into the cache, and attention over it: by kv heads and rows where there are enough to go round, by blocks
//! of the cache where there are not. Called by `forward`; next on the data's way: `kernels`.

use hearth_kernels::{AttentionArgs, KV_BLOCK, Kernels, ROW_GROUP, attention_part_len, kv_block_len};

use super::{BatchRow, CHUNKS_A_WORKER, Step, fetch, gather};
use crate::model::hyper::Hyper;
use crate::model::kv::{BlockTable, KvCache, blocks_for};
use crate::model::scratch::{REDUNDANT_ROWS, WorkerScratch, attention_rows};

/// Attention's answers of a few rows in shares, one a KV block: `[row][kv head][block]`, each of [`attention_part_len`] values.
#[derive(Clone, Copy)]
pub(super) struct Shares<'a> {
    pub(super) parts: &'a [f32],
    pub(super) rows: &'a [BatchRow],
    pub(super) hyper: &'a Hyper,
}

impl Shares<'_> {
    pub(super) fn part_len(hyper: &Hyper) -> usize {
        attention_part_len(hyper.group_heads(), hyper.head_dim)
    }

    /// Blocks that there is room for in each row's shares: those of the longest sequence.
    pub(super) fn blocks(rows: &[BatchRow]) -> usize {
        rows.iter().map(|row| blocks_for(row.position + 1)).max().unwrap_or(0)
    }

    /// The answer of row `t`, `[head][head_dim]`.
    pub(super) fn combine(&self, kernels: Kernels, t: usize, out: &mut [f32]) {
        let Self { parts, rows, hyper } = *self;
        let (len, heads) = (Self::part_len(hyper), hyper.group_heads());
        let plane_len = Self::blocks(rows) * len;
        let used = blocks_for(rows[t].position + 1) * len;
        let planes = parts.chunks_exact(plane_len).skip(t * hyper.n_head_kv);
        for (plane, out) in planes.zip(out.chunks_exact_mut(heads * hyper.head_dim)) {
            kernels.attention_combine(heads, hyper.head_dim, &plane[..used], out);
        }
    }
}

/// What a layer's queries attend to: its keys and values, and where each sequence's blocks of them are.
#[derive(Clone, Copy)]
pub(super) struct Past<'a> {
    pub(super) hyper: &'a Hyper,
    pub(super) cache: &'a KvCache,
    pub(super) layer: usize,
    pub(super) tables: &'a [BlockTable],
}

impl<'a> Past<'a> {
    /// Attention of `rows` successive rows of a sequence, the first of them `row`, with the queries `q` of one kv head.
    fn args(self, q: &'a [f32], rows: usize, row: BatchRow, kv_head: usize) -> AttentionArgs<'a> {
        let plane_len = self.cache.plane_len();
        AttentionArgs {
            q,
            rows,
            heads: self.hyper.group_heads(),
            head_dim: self.hyper.head_dim,
            plane: &self.cache.layer(self.layer)[kv_head * plane_len..][..plane_len],
            table: self.tables[row.sequence].blocks(),
            positions: row.position + 1,
            scale: 1.0 / (self.hyper.head_dim as f32).sqrt(),
        }
    }
}

impl Step<'_> {
    /// Writes this step's keys and values to one layer of the cache.
    pub(super) fn store(
        &mut self,
        hyper: &Hyper,
        cache: &mut KvCache,
        layer: usize,
        tables: &[BlockTable],
        rows: &[BatchRow],
        qkv: &[f32],
    ) {
        let plane_len = cache.plane_len();
        let head_dim = hyper.head_dim;
        let k_first = hyper.q_rows() / ROW_GROUP;
        let v_first = k_first + hyper.kv_rows() / ROW_GROUP;
        let (n, kernels) = (self.n, self.kernels);
        let store_plane = |own: &mut WorkerScratch, kv_head: usize, plane: &mut [u16]| {
            let head = kv_head * head_dim / ROW_GROUP;
            let (k, rest) = own.work.values.split_at_mut(head_dim);
            let v = &mut rest[..head_dim];
            for (t, row) in rows.iter().enumerate() {
                gather(qkv, n, t, k_first + head, k);
                gather(qkv, n, t, v_first + head, v);
                let block = tables[row.sequence].blocks()[row.position / KV_BLOCK] as usize;
                let block = &mut plane[block * kv_block_len(head_dim)..][..kv_block_len(head_dim)];
                kernels.kv_store(block, row.position % KV_BLOCK, k, v);
            }
        };
        if n <= REDUNDANT_ROWS {
            // Too little work to wake anybody for.
            for (kv_head, plane) in cache.layer_mut(layer).chunks_exact_mut(plane_len).enumerate() {
                store_plane(&mut self.scratch[0], kv_head, plane);
            }
        } else {
            self.workers.chunks(self.scratch, cache.layer_mut(layer), plane_len, |_, _| (), |_| (), store_plane);
        }
    }

    /// Attention of every row over its own sequence's positions up to its own.
    pub(super) fn attend(&mut self, past: Past<'_>, rows: &[BatchRow], qkv: &[f32], out: &mut [f32]) {
        let (n, kernels, hyper) = (self.n, self.kernels, past.hyper);
        let (heads, head_dim) = (hyper.group_heads(), hyper.head_dim);
        let fetch_next = fetch(kernels, self.next);
        // The query heads of one kv head share its loads, and so do those of a sequence's next rows.
        let chunks = self.workers.threads() * CHUNKS_A_WORKER;
        let rows_at_once = attention_rows(hyper).min(n * hyper.n_head_kv / chunks).max(1);
        let attend = |own: &mut WorkerScratch, unit: usize, out: &mut [f32]| {
            // `unit` counts `rows_at_once` rows of `[kv head][row]`.
            let mut at = unit * rows_at_once;
            let mut out = out;
            while !out.is_empty() {
                let (kv_head, t) = (at / n, at % n);
                let row = rows[t];
                let room = (out.len() / (heads * head_dim)).min(n - t);
                let follows =
                    |(i, next): &(usize, &BatchRow)| next.sequence == row.sequence && next.position == row.position + i;
                let run = rows[t..t + room].iter().enumerate().take_while(follows).count();
                let (run_out, rest) = out.split_at_mut(run * heads * head_dim);
                let q = &mut own.work.values[..run_out.len()];
                for (i, q) in q.chunks_exact_mut(heads * head_dim).enumerate() {
                    gather(qkv, n, t + i, kv_head * heads * head_dim / ROW_GROUP, q);
                }
                let args = past.args(q, run, row, kv_head);
                kernels.attention(&args, run_out, &mut own.work.attention);
                out = rest;
                at += run;
            }
        };
        self.workers.chunks(self.scratch, out, rows_at_once * heads * head_dim, fetch_next, |_| (), attend);
    }

    /// Attention of so few rows that a kv head is too much for one worker: every block's share of it, `parts` as [`Shares`] has it.
    pub(super) fn attend_together(&mut self, past: Past<'_>, rows: &[BatchRow], qkv: &[f32], parts: &mut [f32]) {
        let (n, kernels, hyper) = (self.n, self.kernels, past.hyper);
        let (heads, head_dim) = (hyper.group_heads(), hyper.head_dim);
        let (part_len, most_blocks) = (Shares::part_len(hyper), Shares::blocks(rows));
        let blocks_at_once = (parts.len() / part_len / (self.workers.threads() * CHUNKS_A_WORKER)).max(1);
        let attend = |own: &mut WorkerScratch, unit: usize, parts: &mut [f32]| {
            let mut at = unit * blocks_at_once;
            let mut parts = parts;
            while !parts.is_empty() {
                let (plane, first) = (at / most_blocks, at % most_blocks);
                let (t, kv_head) = (plane / hyper.n_head_kv, plane % hyper.n_head_kv);
                let run = (parts.len() / part_len).min(most_blocks - first);
                let (run_parts, rest) = parts.split_at_mut(run * part_len);
                // A shorter sequence than the longest leaves its last shares alone.
                let these = first..(first + run).min(blocks_for(rows[t].position + 1));
                if !these.is_empty() {
                    let q = &mut own.work.values[..heads * head_dim];
                    gather(qkv, n, t, kv_head * heads * head_dim / ROW_GROUP, q);
                    let args = past.args(q, 1, rows[t], kv_head);
                    let run_parts = &mut run_parts[..these.len() * part_len];
                    kernels.attention_blocks(&args, these, run_parts, &mut own.work.attention);
                }
                parts = rest;
                at += run;
            }
        };
        let fetch_next = fetch(kernels, self.next);
        self.workers.chunks(self.scratch, parts, blocks_at_once * part_len, fetch_next, |_| (), attend);
    }
}
