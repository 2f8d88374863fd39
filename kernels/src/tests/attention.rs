//! Attention: the specification against f64, every set against it by bits, blocks wherever the table says.

use super::*;
use crate::{AttentionArgs, AttentionScratch, KV_BLOCK, attention_part_len, kv_block_len};

/// One sequence of random keys and values in scattered blocks whose other bits are all NaN.
struct Cache {
    plane: Vec<u16>,
    table: Vec<u32>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

impl Cache {
    fn new(positions: usize, head_dim: usize, rng: &mut Rng) -> Self {
        let blocks = positions.div_ceil(KV_BLOCK);
        let len = kv_block_len(head_dim);
        let mut plane = vec![0xffff; (2 * blocks + 1) * len];
        let table: Vec<u32> = (0..blocks as u32).map(|i| 2 * (blocks as u32 - 1 - i) + 1).collect();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for p in 0..positions {
            let (k, v) = (rng.units(head_dim), rng.units(head_dim));
            let block = &mut plane[table[p / KV_BLOCK] as usize * len..][..len];
            scalar().kv_store(block, p % KV_BLOCK, &k, &v);
            let round = |x: &f32| f16::from_f32(*x).to_f32();
            keys.push(k.iter().map(round).collect());
            values.push(v.iter().map(round).collect());
        }
        Self { plane, table, k: keys, v: values }
    }
}

/// Softmax attention of one head, plainly.
fn exact(q: &[f32], cache: &Cache, scale: f32) -> Vec<f64> {
    let dot = |k: &Vec<f32>| -> f64 { k.iter().zip(q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum() };
    let scores: Vec<f64> = cache.k.iter().map(|k| dot(k) * f64::from(scale)).collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let channel = |d: usize| cache.v.iter().zip(&weights).map(|(v, w)| f64::from(v[d]) * w).sum::<f64>() / sum;
    (0..q.len()).map(channel).collect()
}

#[test]
fn attention_is_close_to_f64_and_the_same_everywhere() {
    let mut rng = Rng::new(15);
    let mut scratch = AttentionScratch::new();
    for head_dim in [16, 32, 64, 80, 128, 256] {
        for (positions, heads) in [(1, 1), (2, 3), (15, 2), (16, 4), (63, 5), (64, 3), (65, 9), (200, 7), (513, 3)] {
            let cache = Cache::new(positions, head_dim, &mut rng);
            let q: Vec<f32> = (0..heads * head_dim).map(|_| 4.0 * rng.unit()).collect();
            let scale = 1.0 / (head_dim as f32).sqrt();
            let args = AttentionArgs {
                q: &q,
                rows: 1,
                heads,
                head_dim,
                plane: &cache.plane,
                table: &cache.table,
                positions,
                scale,
            };
            let mut want = vec![f32::NAN; q.len()];
            scalar().attention(&args, &mut want, &mut scratch);
            for (q, want) in q.chunks(head_dim).zip(want.chunks(head_dim)) {
                for (exact, want) in exact(q, &cache, scale).iter().zip(want) {
                    assert!((exact - f64::from(*want)).abs() < 2e-6, "{head_dim} {positions}: {want}, not {exact}");
                }
            }
            for kernels in fast_sets() {
                let mut have = vec![f32::NAN; q.len()];
                kernels.attention(&args, &mut have, &mut scratch);
                assert_same_bits(&have, &want, || format!("{kernels:?} size {head_dim} heads {heads} at {positions}"));
            }
        }
    }
}

/// A head's answer does not depend on which heads share the call.
#[test]
fn a_head_is_alone_in_any_group() {
    let mut rng = Rng::new(16);
    let mut scratch = AttentionScratch::default();
    let (head_dim, heads, positions) = (64, 7, 130);
    let cache = Cache::new(positions, head_dim, &mut rng);
    let q = rng.units(heads * head_dim);
    for kernels in Kernels::supported() {
        let mut run = |q: &[f32]| {
            let (plane, table) = (&cache.plane, &cache.table);
            let heads = q.len() / head_dim;
            let args = AttentionArgs { q, rows: 1, heads, head_dim, plane, table, positions, scale: 0.125 };
            let mut out = vec![f32::NAN; q.len()];
            kernels.attention(&args, &mut out, &mut scratch);
            out
        };
        let together = run(&q);
        for (q, want) in q.chunks(head_dim).zip(together.chunks(head_dim)) {
            assert_same_bits(&run(q), want, || format!("{kernels:?}"));
        }
    }
}

/// Rows that go together give what each gives alone, wherever they lie in their blocks.
#[test]
fn a_row_is_alone_beside_any_others() {
    let mut rng = Rng::new(18);
    let mut scratch = AttentionScratch::new();
    let head_dim = 32;
    for (rows, heads) in [(2, 1), (4, 3), (8, 4), (3, 9), (32, 1), (13, 2)] {
        for positions in [1, 40, 60, 63, 64, 65, 120, 128, 190] {
            let mut cache = Cache::new(positions + rows - 1, head_dim, &mut rng);
            // What only the last row sees is infinite: nothing of it may reach the others, not even as 0 × infinity.
            let (last, len) = (positions + rows - 2, kv_block_len(head_dim));
            let value = KV_BLOCK * head_dim + last % KV_BLOCK * head_dim;
            cache.plane[cache.table[last / KV_BLOCK] as usize * len + value] = 0x7c00;
            let q = rng.units(rows * heads * head_dim);
            let (plane, table) = (&cache.plane, &cache.table);
            for kernels in Kernels::supported() {
                let args = AttentionArgs { q: &q, rows, heads, head_dim, plane, table, positions, scale: 0.2 };
                let mut together = vec![f32::NAN; q.len()];
                kernels.attention(&args, &mut together, &mut scratch);
                let row_len = heads * head_dim;
                for (row, (q, want)) in q.chunks(row_len).zip(together.chunks(row_len)).enumerate() {
                    let args = AttentionArgs { q, rows: 1, positions: positions + row, ..args };
                    let mut alone = vec![f32::NAN; row_len];
                    kernels.attention(&args, &mut alone, &mut scratch);
                    assert_same_bits(&alone, want, || format!("{kernels:?}: row {row} of {rows} from {positions} on"));
                    assert!(row + 1 == rows || want.iter().all(|x| x.is_finite()), "{kernels:?}: row {row} of {rows}");
                }
            }
        }
    }
}

/// Blocks that were looked at apart, in any shares, give what one look at all of them gives.
#[test]
fn shares_of_blocks_combine_to_the_whole() {
    let mut rng = Rng::new(19);
    let mut scratch = AttentionScratch::new();
    for (heads, head_dim) in [(1, 16), (3, 64), (5, 32), (17, 80), (32, 16)] {
        for positions in [1, 64, 65, 300, 641] {
            let cache = Cache::new(positions, head_dim, &mut rng);
            let q: Vec<f32> = (0..heads * head_dim).map(|_| 8.0 * rng.unit()).collect();
            let (plane, table) = (&cache.plane, &cache.table);
            let args = AttentionArgs { q: &q, rows: 1, heads, head_dim, plane, table, positions, scale: 0.3 };
            let (len, blocks) = (attention_part_len(heads, head_dim), positions.div_ceil(KV_BLOCK));
            for kernels in Kernels::supported() {
                let mut want = vec![f32::NAN; q.len()];
                kernels.attention(&args, &mut want, &mut scratch);
                for share in [1, 2, blocks] {
                    let mut parts = vec![f32::NAN; blocks * len];
                    for first in (0..blocks).step_by(share).rev() {
                        let these = first..blocks.min(first + share);
                        let parts = &mut parts[first * len..these.end * len];
                        kernels.attention_blocks(&args, these, parts, &mut scratch);
                    }
                    let mut have = vec![f32::NAN; q.len()];
                    kernels.attention_combine(heads, head_dim, &parts, &mut have);
                    assert_same_bits(&have, &want, || format!("{kernels:?}: {heads} of {head_dim} at {positions}"));
                }
            }
        }
    }
}

#[test]
fn scores_far_apart_do_not_overflow() {
    let mut rng = Rng::new(17);
    let (head_dim, positions) = (32, 150);
    let cache = Cache::new(positions, head_dim, &mut rng);
    let q: Vec<f32> = (0..head_dim).map(|_| 1e4 * rng.unit()).collect();
    let (plane, table) = (&cache.plane, &cache.table);
    let args = AttentionArgs { q: &q, rows: 1, heads: 1, head_dim, plane, table, positions, scale: 1.0 };
    for kernels in Kernels::supported() {
        let mut out = vec![f32::NAN; head_dim];
        kernels.attention(&args, &mut out, &mut AttentionScratch::new());
        for (exact, have) in exact(&q, &cache, 1.0).iter().zip(&out) {
            assert!((exact - f64::from(*have)).abs() < 1e-2, "{kernels:?}: {have}, not {exact}");
        }
    }
}

#[test]
#[should_panic(expected = "a block beyond the plane")]
fn a_block_beyond_the_plane_is_refused() {
    let plane = vec![0; kv_block_len(32)];
    let args = AttentionArgs {
        q: &[0.0; 32],
        rows: 1,
        heads: 1,
        head_dim: 32,
        plane: &plane,
        table: &[1],
        positions: 1,
        scale: 1.0,
    };
    Kernels::detect().attention(&args, &mut [0.0; 32], &mut AttentionScratch::new());
}

#[test]
fn every_set_stores_the_same_f16() {
    let mut rng = Rng::new(29);
    for head_dim in [16, 80] {
        let mut row = || -> Vec<f32> {
            let odd = [0.0, -0.0, 65504.0, 65519.9, 65520.0, -1e9, f32::INFINITY, 6e-8, -2.9e-8, 1.000_488_3, 1e-40];
            let mut row: Vec<f32> = (0..head_dim).map(|_| 1e5 * rng.unit() * rng.unit()).collect();
            row[..odd.len()].copy_from_slice(&odd);
            row
        };
        let (k, v) = (row(), row());
        for position in [0, 17, 63] {
            let mut want = vec![0xffff; kv_block_len(head_dim)];
            for d in 0..head_dim {
                want[(position / 16 * head_dim + d) * 16 + position % 16] = f16::from_f32(k[d]).to_bits();
                want[KV_BLOCK * head_dim + position * head_dim + d] = f16::from_f32(v[d]).to_bits();
            }
            for kernels in Kernels::supported().chain([Kernels::plain_scalar()]) {
                let mut block = vec![0xffff; kv_block_len(head_dim)];
                kernels.kv_store(&mut block, position, &k, &v);
                assert_eq!(block, want, "{kernels:?}, position {position}");
            }
        }
    }
}
