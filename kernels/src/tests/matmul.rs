//! Products: the specification against f64 on numbers read straight from GGUF bytes, every set against it by bits.

use super::*;
use crate::{QBlock, QBlockK, Rows, blocks_per_row, k_blocks_per_row, padded_cols};

/// Activations in all forms; K blocks where the columns are whole ones.
struct Input {
    quantized: Vec<QBlock>,
    k: Vec<QBlockK>,
    dense: Vec<f32>,
}

impl Input {
    fn new(n: usize, cols: usize, data: Data, rng: &mut Rng) -> Self {
        let mut dense = vec![0.0; n * padded_cols(cols)];
        let mut quantized =
            vec![QBlock { q: [99; 32], d: f32::NAN, d_sum: f32::NAN, sum: 99 }; n * blocks_per_row(cols)];
        let rows = dense.chunks_mut(padded_cols(cols)).zip(quantized.chunks_mut(blocks_per_row(cols)));
        for (dense, quantized) in rows {
            let sign = rng.unit().signum();
            for x in &mut dense[..cols] {
                *x = match data {
                    Data::Random => 3.0 * rng.unit(),
                    Data::Extreme if sign > 0.0 => 1000.0,
                    Data::Extreme => 1000.0 * rng.unit().signum(),
                    Data::Zero => 0.0,
                };
            }
            scalar().quantize(dense, quantized);
        }
        let wrong = QBlockK { q: [99; 256], sums: [99; 16], d: f32::NAN };
        let mut k = vec![wrong; n * k_blocks_per_row(cols)];
        if cols.is_multiple_of(SUPER_BLOCK) {
            let rows = dense.chunks(cols).zip(k.chunks_mut(k_blocks_per_row(cols)));
            rows.for_each(|(dense, k)| scalar().quantize_k(dense, k));
        }
        Self { quantized, k, dense }
    }

    fn rows(&self, format: Format) -> Rows<'_> {
        match format.row_kind() {
            RowKind::Dense => Rows::Dense(&self.dense),
            RowKind::Quantized => Rows::Quantized(&self.quantized),
            RowKind::QuantizedK => Rows::QuantizedK(&self.k),
        }
    }
}

fn product(kernels: Kernels, w: &Weights, x: &Input, n: usize) -> Vec<f32> {
    let groups = w.matrix().row_groups();
    let mut out = vec![f32::NAN; groups * n * ROW_GROUP];
    kernels.matmul(&w.matrix(), 0..groups, x.rows(w.format), n, &mut out);
    out
}

#[test]
fn the_specification_agrees_with_f64() {
    let mut rng = Rng::new(7);
    for format in Format::ALL {
        for (rows, cols, n) in [(1, 32, 1), (19, 96, 3), (32, 576, 2), (5, 1536, 1)] {
            let cols = fit(format, cols);
            let w = Weights::new(format, rows, cols, Data::Random, &mut rng);
            let x = Input::new(n, cols, Data::Random, &mut rng);
            let out = product(scalar(), &w, &x, n);
            for (row, weights) in dequantize(format, &w.source, cols).iter().enumerate() {
                for t in 0..n {
                    let activation = |k: usize| match format.row_kind() {
                        RowKind::Dense => f64::from(x.dense[t * padded_cols(cols) + k]),
                        RowKind::Quantized => {
                            let block = &x.quantized[t * blocks_per_row(cols) + k / 32];
                            f64::from(block.d) * f64::from(block.q[k % 32])
                        }
                        RowKind::QuantizedK => {
                            let block = &x.k[t * k_blocks_per_row(cols) + k / SUPER_BLOCK];
                            f64::from(block.d) * f64::from(block.q[k % SUPER_BLOCK])
                        }
                    };
                    let terms = weights.iter().enumerate().map(|(k, w)| f64::from(*w) * activation(k));
                    let (want, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let have = f64::from(out[(row / 16 * n + t) * 16 + row % 16]);
                    assert!(
                        (have - want).abs() <= 1e-5 * size,
                        "{format:?} {rows}x{cols} [{row}][{t}]: {have}, not {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_set_gives_the_bits_of_the_specification() {
    let mut rng = Rng::new(8);
    for format in Format::ALL {
        // One to five row groups: sets take them in pairs or fours.
        let all_rows = [1, 16, 17, 33, 50, 79];
        let mut all_cols = vec![32, 64, 96, 576, 1536];
        match format.row_kind() {
            RowKind::Dense => all_cols.extend([1, 33, 67, 100]),
            RowKind::Quantized => (),
            RowKind::QuantizedK => all_cols = vec![256, 512, 1536],
        }
        for (i, rows) in all_rows.into_iter().enumerate() {
            for cols in all_cols.iter().copied() {
                // The widest with the tallest would only cost time.
                if cols == 1536 && i % 3 != 0 {
                    continue;
                }
                for data in Data::ALL {
                    let w = Weights::new(format, rows, cols, data, &mut rng);
                    for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64] {
                        if n > 5 && data != Data::Random {
                            continue;
                        }
                        let x = Input::new(n, cols, data, &mut rng);
                        let want = product(scalar(), &w, &x, n);
                        for kernels in fast_sets() {
                            let have = product(kernels, &w, &x, n);
                            assert_same_bits(&have, &want, || {
                                format!("{kernels:?} {format:?} {rows}x{cols} n {n} {data:?}")
                            });
                        }
                    }
                }
            }
        }
    }
}

/// Blocks of ±127 throughout, with every weight at its extreme: the largest integer sums there can be.
#[test]
fn the_largest_integer_sums_are_exact() {
    let mut rng = Rng::new(9);
    for format in Format::ALL.into_iter().filter(|format| format.row_kind() != RowKind::Dense) {
        for fill in [127, -127] {
            let sum = 32 * i32::from(fill);
            let block = QBlock { q: [fill; 32], d: 1.0, d_sum: sum as f32, sum };
            let k = QBlockK { q: [fill; 256], sums: [16 * i16::from(fill); 16], d: 1.0 };
            for _ in 0..8 {
                let w = Weights::new(format, 16, fit(format, 64), Data::Extreme, &mut rng);
                for n in [1, 5] {
                    let x = Input { quantized: vec![block; n * 2], k: vec![k; n], dense: Vec::new() };
                    let want = product(scalar(), &w, &x, n);
                    for kernels in fast_sets() {
                        assert_same_bits(&product(kernels, &w, &x, n), &want, || {
                            format!("{kernels:?} {format:?} {fill}")
                        });
                    }
                }
            }
        }
    }
}

/// Long rows and many of them, in whatever pieces a set takes them.
#[test]
fn long_rows_and_many_rows_have_the_bits_of_the_specification() {
    let mut rng = Rng::new(11);
    for format in Format::ALL {
        // A row of 70,000 values is longer than any set's piece of a row.
        for (rows, cols, n) in [(1, 70_016, 1), (17, 9_984, 3), (16, 4_096, 18), (33, 64, 430), (16, 96, 600)] {
            let cols = fit(format, cols);
            let w = Weights::new(format, rows, cols, Data::Random, &mut rng);
            let x = Input::new(n, cols, Data::Random, &mut rng);
            let want = product(scalar(), &w, &x, n);
            for kernels in fast_sets() {
                let have = product(kernels, &w, &x, n);
                assert_same_bits(&have, &want, || format!("{kernels:?} {format:?} {rows}x{cols} n {n}"));
            }
        }
    }
}

/// What a row gives does not depend on the rows beside it, nor on how the groups are split.
#[test]
fn a_row_is_alone_in_any_batch_and_any_range() {
    let mut rng = Rng::new(10);
    for format in Format::ALL {
        let (rows, cols, n) = (150, fit(format, 96), 7);
        let w = Weights::new(format, rows, cols, Data::Random, &mut rng);
        let x = Input::new(n, cols, Data::Random, &mut rng);
        for kernels in Kernels::supported() {
            let whole = product(kernels, &w, &x, n);
            for t in 0..n {
                let one = Input {
                    quantized: x.quantized[t * blocks_per_row(cols)..][..blocks_per_row(cols)].to_vec(),
                    k: x.k[t * k_blocks_per_row(cols)..][..k_blocks_per_row(cols)].to_vec(),
                    dense: x.dense[t * padded_cols(cols)..][..padded_cols(cols)].to_vec(),
                };
                for groups in [0..3, 3..10] {
                    let mut out = vec![f32::NAN; groups.len() * ROW_GROUP];
                    kernels.matmul(&w.matrix(), groups.clone(), one.rows(format), 1, &mut out);
                    for (g, out) in groups.zip(out.chunks(ROW_GROUP)) {
                        let want = &whole[(g * n + t) * ROW_GROUP..][..ROW_GROUP];
                        assert_same_bits(out, want, || format!("{kernels:?} {format:?} group {g} row {t}"));
                    }
                }
            }
        }
    }
}
