//! The K formats against numbers from outside: super-blocks that another implementation dequantized, and the largest integer sums,
//! worked out by hand. `tests/data/k_blocks.txt` says where its values come from.
#![allow(clippy::unwrap_used)]

use hearth_kernels::{
    Format, Kernels, Matrix, QBlockK, ROW_GROUP, Rows, SUPER_BLOCK, k_blocks_per_row, pack_row_group, packed_bytes,
};

const VECTORS: &str = include_str!("../../tests/data/k_blocks.txt");
const K_FORMATS: [Format; 3] = [Format::Q4K, Format::Q5K, Format::Q6K];
/// Bytes of an f16 one.
const ONE: [u8; 2] = [0x00, 0x3c];

/// GGUF rows, packed on a 64-byte boundary.
struct Packed {
    format: Format,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Packed {
    fn new(format: Format, source: &[Vec<u8>], cols: usize) -> Self {
        let group_bytes = packed_bytes(format, ROW_GROUP, cols).unwrap();
        let mut packed = Self { format, rows: source.len(), cols, bytes: vec![0; source.len() * group_bytes + 63] };
        let start = packed.start();
        for (rows, out) in source.chunks(ROW_GROUP).zip(packed.bytes[start..].chunks_exact_mut(group_bytes)) {
            pack_row_group(format, &rows.concat(), rows.len(), cols, out).unwrap();
        }
        packed
    }

    fn start(&self) -> usize {
        self.bytes.as_ptr().addr().wrapping_neg() % 64
    }

    fn matrix(&self) -> Matrix<'_> {
        let len = packed_bytes(self.format, self.rows, self.cols).unwrap();
        Matrix::new(self.format, self.rows, self.cols, &self.bytes[self.start()..][..len]).unwrap()
    }
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// Blocks of one format and the bits of their values.
fn vectors(format: Format) -> Vec<(Vec<u8>, Vec<u32>)> {
    let lines = VECTORS.lines().filter_map(|line| line.strip_prefix(format.name())?.strip_prefix(' '));
    lines
        .map(|line| {
            let (block, values) = line.split_once(' ').unwrap();
            let bits = unhex(values).as_chunks().0.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect();
            (unhex(block), bits)
        })
        .collect()
}

#[test]
fn unpacked_blocks_have_the_bits_that_another_dequantizer_gives() {
    for format in K_FORMATS {
        let vectors = vectors(format);
        assert_eq!(vectors.len(), 2, "{format:?}");
        // Both blocks in every row of a tile, in both orders, and in a second row group.
        let (rows, cols) = (2 * ROW_GROUP + 1, 2 * SUPER_BLOCK);
        let order = |row: usize| [&vectors[row % 2], &vectors[(row + 1) % 2]];
        let source: Vec<_> = (0..rows).map(|row| order(row).map(|(block, _)| block.clone()).concat()).collect();
        let packed = Packed::new(format, &source, cols);
        let mut out = vec![f32::NAN; cols];
        for row in 0..rows {
            packed.matrix().unpack_row(row, &mut out);
            let want = order(row).map(|(_, bits)| bits.clone()).concat();
            assert_eq!(want.len(), cols, "{format:?}");
            for (col, (have, want)) in out.iter().zip(want).enumerate() {
                assert_eq!(have.to_bits(), want, "{format:?} row {row} column {col}: {have}");
            }
        }
    }
}

/// Largest sums of one super-block with `d = dmin = 1` against activations of ±127: (format, block, sum of products, sum of minimums).
fn extremes() -> [(Format, Vec<u8>, i32, i32); 5] {
    let low_bits = |numbers: usize| [[ONE, ONE].as_flattened(), &vec![0xff; 12 + numbers]].concat();
    let six_bits = |number: u8, scale: u8| [&[number; 192][..], &[scale; 16], &ONE].concat();
    [
        (Format::Q4K, low_bits(128), 8 * 63 * 32 * 15 * 127, 8 * 63 * 32 * 127),
        (Format::Q5K, low_bits(160), 8 * 63 * 32 * 31 * 127, 8 * 63 * 32 * 127),
        // Numbers 0 and 63 less 32, scales -128 and 127.
        (Format::Q6K, six_bits(0x00, 0x80), 16 * 128 * 16 * 32 * 127, 0),
        (Format::Q6K, six_bits(0xff, 0x80), -16 * 128 * 16 * 31 * 127, 0),
        (Format::Q6K, six_bits(0x00, 0x7f), -16 * 127 * 16 * 32 * 127, 0),
    ]
}

#[test]
fn the_largest_sums_there_can_be_come_out_exact_on_every_set() {
    for (format, block, products, minimums) in extremes() {
        let source = vec![block; ROW_GROUP];
        let packed = Packed::new(format, &source, SUPER_BLOCK);
        for sign in [1i8, -1] {
            // One row of activations goes another way than several.
            for n in [1, 5] {
                let block = QBlockK { q: [127 * sign; SUPER_BLOCK], sums: [16 * 127 * i16::from(sign); 16], d: 1.0 };
                let x = vec![block; n * k_blocks_per_row(SUPER_BLOCK)];
                let isum = (i32::from(sign) * products) as f32;
                let want = (-1.0f32).mul_add((i32::from(sign) * minimums) as f32, isum);
                for kernels in Kernels::supported() {
                    let mut out = vec![f32::NAN; n * ROW_GROUP];
                    kernels.matmul(&packed.matrix(), 0..1, Rows::QuantizedK(&x), n, &mut out);
                    assert!(
                        out.iter().all(|have| *have == want),
                        "{kernels:?} {format:?} {sign} n {n}: {out:?}, not {want}"
                    );
                }
            }
        }
    }
}
