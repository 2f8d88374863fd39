//! The same bits on every architecture: one computation through every operation, its hashes written down.

use super::*;
use crate::{AttentionArgs, AttentionScratch, QBlock, QBlockK, Rows, blocks_per_row, kv_block_len};

/// Hashes of the products, in the order of `Format::ALL`.
const PRODUCTS: [u64; 11] = [
    0x18bf_0e0d_ec0b_4728,
    0x6e2c_f39a_0b08_2971,
    0xb60c_6b6f_b05e_8a5a,
    0x96f8_2763_ded6_ea2d,
    0xfc79_d152_4de3_7bb0,
    0x5421_ec6e_4646_f0c8,
    0xd0e7_82f8_3f5a_ba15,
    0x0011_1d79_df40_881e,
    0xf962_cc2b_93d2_6198,
    0x7cd8_5f5b_4a84_73e4,
    0x3358_009b_d4a0_24f8,
];
/// Hash of the vector operations.
const VECTORS: u64 = 0xfe1c_5b43_a890_48e9;
/// Hash of the attention.
const ATTENTION: u64 = 0x8184_c3f3_00eb_e980;

/// FNV-1a over the bits.
fn hash(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Every set, and the specification without fused multiply-add instructions.
fn every_set() -> impl Iterator<Item = Kernels> {
    Kernels::supported().chain([Kernels::plain_scalar()])
}

#[test]
fn products_have_the_bits_written_down() {
    for kernels in every_set() {
        let have = Format::ALL.map(|format| {
            let mut rng = Rng::new(21);
            let n = 6;
            if format.row_kind() == RowKind::QuantizedK {
                let w = Weights::new(format, 40, 512, Data::Random, &mut rng);
                let mut blocks = vec![QBlockK::default(); n * 2];
                blocks.chunks_mut(2).for_each(|out| kernels.quantize_k(&rng.units(512), out));
                let mut out = vec![f32::NAN; 3 * n * ROW_GROUP];
                kernels.matmul(&w.matrix(), 0..3, Rows::QuantizedK(&blocks), n, &mut out);
                return hash(&out);
            }
            let (rows, cols) = (40, 160);
            let w = Weights::new(format, rows, cols, Data::Random, &mut rng);
            let x: Vec<f32> = (0..n).flat_map(|_| [rng.units(cols), vec![0.0; 32]].concat()).collect();
            let mut blocks = vec![QBlock::default(); n * blocks_per_row(cols)];
            for (x, out) in x.chunks(192).zip(blocks.chunks_mut(blocks_per_row(cols))) {
                kernels.quantize(&x[..cols], out);
            }
            let rows = if format.row_kind() == RowKind::Quantized { Rows::Quantized(&blocks) } else { Rows::Dense(&x) };
            let mut out = vec![f32::NAN; 3 * n * ROW_GROUP];
            kernels.matmul(&w.matrix(), 0..3, rows, n, &mut out);
            hash(&out)
        });
        assert_eq!(have, PRODUCTS, "{kernels:?}: {have:#x?}");
    }
}

#[test]
fn norm_silu_and_exp_have_the_bits_written_down() {
    for kernels in every_set() {
        let mut rng = Rng::new(22);
        let (x, w) = (rng.units(576), rng.units(576));
        let mut out = vec![0.0; 576];
        kernels.rms_norm(&x, 16, &w, 1e-5, &mut out);
        out.iter_mut().for_each(|x| *x *= 8.0);
        kernels.silu_mul(&mut out, &w);
        let mut powers = x;
        kernels.exp(&mut powers);
        out.extend(powers);
        assert_eq!(hash(&out), VECTORS, "{kernels:?}: {:#x}", hash(&out));
    }
}

#[test]
fn attention_has_the_bits_written_down() {
    for kernels in every_set() {
        let mut rng = Rng::new(23);
        let (heads, head_dim, positions) = (3, 64, 150);
        let mut plane = vec![0; 3 * kv_block_len(head_dim)];
        for p in 0..positions {
            let block = plane.chunks_mut(kv_block_len(head_dim)).nth(p / 64).unwrap();
            let (k, v) = (rng.units(head_dim), rng.units(head_dim));
            kernels.kv_store(block, p % 64, &k, &v);
        }
        let q = rng.units(heads * head_dim);
        let args = AttentionArgs {
            q: &q,
            rows: 1,
            heads,
            head_dim,
            plane: &plane,
            table: &[0, 1, 2],
            positions,
            scale: 0.125,
        };
        let mut out = vec![f32::NAN; q.len()];
        kernels.attention(&args, &mut out, &mut AttentionScratch::new());
        assert_eq!(hash(&out), ATTENTION, "{kernels:?}: {:#x}", hash(&out));
    }
}
