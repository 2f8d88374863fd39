//! Every set against the specification, and the specification against f64.
#![allow(clippy::unwrap_used)]

use half::f16;

use crate::{Format, Kernels, Matrix, ROW_GROUP, RowKind, SUPER_BLOCK, pack_row_group, packed_bytes};

mod attention;
mod dispatch;
mod golden;
mod matmul;
mod pack;
mod vector;

/// xorshift64*: the same data on every run and machine.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// In [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        self.bits().cast_signed() as f32 / 2_147_483_648.0
    }

    pub(crate) fn units(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// What weights and activations are filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Data {
    Random,
    /// Every stored number at its largest magnitude.
    Extreme,
    Zero,
}

impl Data {
    pub(crate) const ALL: [Self; 3] = [Self::Random, Self::Extreme, Self::Zero];
}

/// A packed matrix and the GGUF rows it was made of.
pub(crate) struct Weights {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) source: Vec<u8>,
    /// Packed bytes from the first 64-byte boundary on.
    tiles: Vec<u8>,
}

impl Weights {
    pub(crate) fn new(format: Format, rows: usize, cols: usize, data: Data, rng: &mut Rng) -> Self {
        let row_bytes = format.source_row_bytes(cols);
        let source: Vec<u8> = (0..rows).flat_map(|_| source_row(format, cols, data, rng)).collect();
        assert_eq!(source.len(), rows * row_bytes);
        let bytes = packed_bytes(format, rows, cols).unwrap();
        let mut tiles = vec![0xaa; bytes + 63];
        let start = boundary(&tiles);
        let groups = tiles[start..].chunks_mut(packed_bytes(format, ROW_GROUP, cols).unwrap());
        for (source, out) in source.chunks(ROW_GROUP * row_bytes).zip(groups) {
            pack_row_group(format, source, source.len() / row_bytes, cols, out).unwrap();
        }
        Self { format, rows, cols, source, tiles }
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        let bytes = packed_bytes(self.format, self.rows, self.cols).unwrap();
        Matrix::new(self.format, self.rows, self.cols, &self.tiles[boundary(&self.tiles)..][..bytes]).unwrap()
    }
}

/// `cols`, or the next number of columns that is whole blocks.
pub(crate) fn fit(format: Format, cols: usize) -> usize {
    cols.next_multiple_of(format.block_cols())
}

/// Index of the first byte on a 64-byte boundary.
fn boundary(bytes: &[u8]) -> usize {
    bytes.as_ptr().addr().wrapping_neg() % 64
}

fn source_row(format: Format, cols: usize, data: Data, rng: &mut Rng) -> Vec<u8> {
    let mut out = Vec::new();
    if format.row_kind() == RowKind::Dense {
        for _ in 0..cols {
            let value = match data {
                Data::Random => rng.unit(),
                Data::Extreme => 60000.0 * rng.unit().signum(),
                Data::Zero => 0.0,
            };
            match format {
                Format::F32 => out.extend(value.to_le_bytes()),
                Format::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
                _ => out.extend(half::bf16::from_f32(value).to_le_bytes()),
            }
        }
        return out;
    }
    if format.row_kind() == RowKind::QuantizedK {
        return (0..cols / SUPER_BLOCK).flat_map(|_| source_super_block(format, data, rng)).collect();
    }
    for _ in 0..cols / 32 {
        let header = if matches!(format, Format::Q4_1 | Format::Q5_1) { 2 } else { 1 };
        for _ in 0..header {
            let value = match data {
                Data::Random => rng.unit() * 0.1,
                Data::Extreme => 65504.0 * rng.unit().signum(),
                Data::Zero => 0.0,
            };
            out.extend(f16::from_f32(value).to_le_bytes());
        }
        let fill = [0x00, 0xff, 0x80, 0x7f][rng.bits() as usize % 4];
        for _ in 0..format.source_row_bytes(32) - 2 * header {
            out.push(match data {
                Data::Random => rng.bits() as u8,
                Data::Extreme => fill,
                Data::Zero => 0,
            });
        }
    }
    out
}

/// A super-block with random or extreme bytes and two f16 that are numbers.
fn source_super_block(format: Format, data: Data, rng: &mut Rng) -> Vec<u8> {
    let fill = [0x00, 0xff, 0x80, 0x7f][rng.bits() as usize % 4];
    let byte = |rng: &mut Rng| match data {
        Data::Random => rng.bits() as u8,
        Data::Extreme => fill,
        Data::Zero => 0,
    };
    let mut out: Vec<u8> = (0..format.source_row_bytes(SUPER_BLOCK)).map(|_| byte(rng)).collect();
    let halves: &[usize] = if format == Format::Q6K { &[208] } else { &[0, 2] };
    for &at in halves {
        let value = match data {
            Data::Random => rng.unit() * 0.01,
            Data::Extreme => 65504.0 * rng.unit().signum(),
            Data::Zero => 0.0,
        };
        out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    }
    out
}

/// Rows straight from GGUF bytes: the formulas of ggml's `dequantize_row_*`.
pub(crate) fn dequantize(format: Format, source: &[u8], cols: usize) -> Vec<Vec<f32>> {
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
    let row = |row: &[u8]| -> Vec<f32> {
        match format {
            Format::F32 => row.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Format::F16 => row.chunks(2).map(half).collect(),
            Format::Bf16 => {
                row.chunks(2).map(|b| f32::from_bits(u32::from(b[1]) << 24 | u32::from(b[0]) << 16)).collect()
            }
            Format::Q8_0 => {
                row.chunks(34).flat_map(|b| b[2..].iter().map(move |q| f32::from(*q as i8) * half(b))).collect()
            }
            Format::Q4K | Format::Q5K => {
                row.chunks(format.source_row_bytes(SUPER_BLOCK)).flat_map(|b| dequantize_k(format, b)).collect()
            }
            Format::Q6K => row.chunks(210).flat_map(dequantize_q6_k).collect(),
            _ => row.chunks(format.source_row_bytes(32)).flat_map(|b| dequantize_low(format, b)).collect(),
        }
    };
    source.chunks(format.source_row_bytes(cols)).map(row).collect()
}

fn dequantize_low(format: Format, b: &[u8]) -> [f32; 32] {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let (d, has_min) = (half(0), matches!(format, Format::Q4_1 | Format::Q5_1));
    let five = matches!(format, Format::Q5_0 | Format::Q5_1);
    let header = if has_min { 4 } else { 2 };
    let high = if five { u32::from_le_bytes(b[header..header + 4].try_into().unwrap()) } else { 0 };
    let qs = &b[header + if five { 4 } else { 0 }..];
    std::array::from_fn(|k| {
        let nibble = if k < 16 { qs[k] & 15 } else { qs[k - 16] >> 4 };
        let w = i32::from(nibble) | ((high >> k & 1) << 4) as i32;
        match (has_min, five) {
            (true, _) => w as f32 * d + half(2),
            (false, true) => (w - 16) as f32 * d,
            (false, false) => (w - 8) as f32 * d,
        }
    })
}

/// `dequantize_row_q4_K` and `dequantize_row_q5_K`, step by step as ggml takes them.
fn dequantize_k(format: Format, b: &[u8]) -> Vec<f32> {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let (d, dmin, scales) = (half(0), half(2), &b[4..16]);
    let scale_min = |j: usize| match j {
        0..4 => (scales[j] & 63, scales[j + 4] & 63),
        _ => ((scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4), (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)),
    };
    let five = format == Format::Q5K;
    let (high, mut nibbles) = (&b[16..48], &b[if five { 48 } else { 16 }..]);
    let mut out = Vec::new();
    let mut bit = 1u8;
    for j in (0..8).step_by(2) {
        for (j, shift) in [(j, 0), (j + 1, 4)] {
            let (scale, min) = scale_min(j);
            let (d1, m1) = (d * f32::from(scale), dmin * f32::from(min));
            for l in 0..32 {
                let fifth = if five && high[l] & bit != 0 { 16 } else { 0 };
                out.push(d1 * f32::from((nibbles[l] >> shift & 15) + fifth) - m1);
            }
            bit <<= 1;
        }
        nibbles = &nibbles[32..];
    }
    out
}

/// `dequantize_row_q6_K`, step by step as ggml takes them.
fn dequantize_q6_k(b: &[u8]) -> [f32; SUPER_BLOCK] {
    let d = f16::from_le_bytes([b[208], b[209]]).to_f32();
    let mut out = [0.0; SUPER_BLOCK];
    for n in 0..2 {
        let (ql, qh, sc) = (&b[64 * n..], &b[128 + 32 * n..], &b[192 + 8 * n..]);
        for l in 0..32 {
            let is = l / 16;
            let q = [
                (ql[l] & 15) | ((qh[l] & 3) << 4),
                (ql[l + 32] & 15) | ((qh[l] >> 2 & 3) << 4),
                (ql[l] >> 4) | ((qh[l] >> 4 & 3) << 4),
                (ql[l + 32] >> 4) | ((qh[l] >> 6 & 3) << 4),
            ];
            for (i, q) in q.into_iter().enumerate() {
                let scale = f32::from(sc[is + 2 * i].cast_signed());
                out[128 * n + 32 * i + l] = d * scale * f32::from(q.cast_signed() - 32);
            }
        }
    }
    out
}

/// Every set but the specification.
pub(crate) fn fast_sets() -> Vec<Kernels> {
    Kernels::supported().filter(|k| k.name() != "scalar").collect()
}

pub(crate) fn scalar() -> Kernels {
    Kernels::by_name("scalar").unwrap()
}

#[track_caller]
pub(crate) fn assert_same_bits(have: &[f32], want: &[f32], what: impl Fn() -> String) {
    assert_eq!(have.len(), want.len());
    for (i, (have, want)) in have.iter().zip(want).enumerate() {
        assert!(!want.is_nan(), "{}: the specification gives NaN at {i}", what());
        assert_eq!(have.to_bits(), want.to_bits(), "{}: {have} instead of {want} at {i}", what());
    }
}
