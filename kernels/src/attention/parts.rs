//! Attention of one row by several threads: each looks at some of the blocks and leaves every block's share as it is; the shares
//! are then combined in the order and with the operations of [`super::attend`], so nothing shows who looked at what.
//! Called by `dispatch`; next on the data's way: the sets' lanes.

use std::ops::Range;

use super::{AttentionArgs, AttentionScratch, Block, MAX_GROUP_HEADS};
use crate::simd::{LANES, Simd, exp};

/// Values of one block's share of a group of `heads` heads: `[heads][head_dim]` weighted sums of values, then the heads' largest
/// scores and their sums of weights, each padded to whole vectors.
pub const fn attention_part_len(heads: usize, head_dim: usize) -> usize {
    heads * head_dim + 2 * heads.next_multiple_of(LANES)
}

/// The shares of `blocks`, one after the other in `parts`; `a` has one row. The arguments have been checked.
#[inline(always)]
pub(crate) fn attend_blocks<S: Simd>(
    s: S,
    a: &AttentionArgs<'_>,
    blocks: Range<usize>,
    parts: &mut [f32],
    scratch: &mut AttentionScratch,
) {
    for (i, part) in blocks.zip(parts.chunks_exact_mut(attention_part_len(a.heads, a.head_dim))) {
        let (out, statistics) = part.split_at_mut(a.heads * a.head_dim);
        Block::new(a, i, true).all_heads(s, a, out, scratch);
        let (max, sum) = statistics.split_at_mut(statistics.len() / 2);
        max.copy_from_slice(&scratch.max[..max.len()]);
        sum.copy_from_slice(&scratch.sum[..sum.len()]);
    }
}

/// Attention's answer, `[heads][head_dim]`, from the shares of all its blocks, in order. The arguments have been checked.
#[inline(always)]
pub(crate) fn combine<S: Simd>(s: S, heads: usize, head_dim: usize, parts: &[f32], out: &mut [f32]) {
    let mut parts = parts.chunks_exact(attention_part_len(heads, head_dim)).map(|part| {
        let (values, statistics) = part.split_at(heads * head_dim);
        let (max, sum) = statistics.split_at(statistics.len() / 2);
        (values.as_chunks::<LANES>().0, max.as_chunks::<LANES>().0, sum.as_chunks::<LANES>().0)
    });
    let out = out.as_chunks_mut::<LANES>().0;
    let columns = head_dim / LANES;
    let (mut m, mut l) = ([[0.0; LANES]; MAX_GROUP_HEADS / LANES], [[0.0; LANES]; MAX_GROUP_HEADS / LANES]);
    if let Some((values, max, sum)) = parts.next() {
        out.copy_from_slice(values);
        m[..max.len()].copy_from_slice(max);
        l[..sum.len()].copy_from_slice(sum);
    }
    for (values, block_max, block_sum) in parts {
        for (i, (block_max, block_sum)) in block_max.iter().zip(block_sum).enumerate() {
            let (old, block_max) = (s.load(&m[i]), s.load(block_max));
            let max = s.max(old, block_max);
            let (c, e) = (exp(s, s.sub(old, max)), exp(s, s.sub(block_max, max)));
            s.store(max, &mut m[i]);
            s.store(s.fma(s.load(&l[i]), c, s.mul(s.load(block_sum), e)), &mut l[i]);
            let (mut keep, mut take) = ([0.0; LANES], [0.0; LANES]);
            s.store(c, &mut keep);
            s.store(e, &mut take);
            let of_these = i * LANES * columns..heads.min((i + 1) * LANES) * columns;
            let heads = out[of_these.clone()].chunks_exact_mut(columns).zip(values[of_these].chunks_exact(columns));
            for ((out, values), (keep, take)) in heads.zip(keep.into_iter().zip(take)) {
                let (keep, take) = (s.splat(keep), s.splat(take));
                for (out, new) in out.iter_mut().zip(values) {
                    s.store(s.fma(s.load(out), keep, s.mul(s.load(new), take)), out);
                }
            }
        }
    }
    for (out, l) in out.chunks_exact_mut(columns).zip(l.as_flattened()) {
        let inv = s.splat(1.0 / l);
        for out in out {
            s.store(s.mul(s.load(out), inv), out);
        }
    }
}
