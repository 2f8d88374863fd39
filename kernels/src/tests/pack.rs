//! Packing keeps every number, pads with zeros, refuses what no kernel should meet.

use super::*;
use crate::{PackError, ShapeError};

#[test]
fn unpacked_rows_are_what_a_gguf_dequantizer_gives() {
    let mut rng = Rng::new(3);
    for format in Format::ALL {
        for (rows, cols) in [(1, 32), (15, 64), (16, 96), (17, 576), (50, 32), (5, 1536)] {
            let cols = fit(format, cols);
            let w = Weights::new(format, rows, cols, Data::Random, &mut rng);
            let want = dequantize(format, &w.source, cols);
            let mut row = vec![f32::NAN; cols];
            for (r, want) in want.iter().enumerate() {
                w.matrix().unpack_row(r, &mut row);
                assert_same_bits(&row, want, || format!("{format:?} {rows}x{cols} row {r}"));
            }
        }
    }
}

#[test]
fn dense_rows_need_no_whole_block() {
    let mut rng = Rng::new(4);
    for format in [Format::F32, Format::F16, Format::Bf16] {
        for cols in [1, 17, 65, 100] {
            let w = Weights::new(format, 3, cols, Data::Random, &mut rng);
            let mut row = vec![f32::NAN; cols];
            w.matrix().unpack_row(2, &mut row);
            assert_same_bits(&row, &dequantize(format, &w.source, cols)[2], || format!("{format:?} {cols}"));
        }
    }
}

#[test]
fn padding_is_zero() {
    for format in Format::ALL {
        let cols = fit(format, 32);
        let source = source_row(format, cols, Data::Extreme, &mut Rng::new(5));
        let mut out = vec![0xaa; packed_bytes(format, 16, cols).unwrap()];
        pack_row_group(format, &source, 1, cols, &mut out).unwrap();
        let used = out.iter().filter(|byte| **byte != 0).count();
        // Twelve bytes of 6-bit scales and minimums become sixteen.
        let more = if matches!(format, Format::Q4K | Format::Q5K) { 4 } else { 0 };
        assert!(used <= source.len() + more, "{format:?}: {used} bytes set from {}", source.len());
    }
}

#[test]
fn tile_sizes_are_those_of_the_source() {
    for format in Format::ALL {
        // The K formats' 6-bit scales are bytes in a tile, and Q6_K's tile is padded to whole cache lines.
        let more = [(Format::Q4K, 64), (Format::Q5K, 64), (Format::Q6K, 32)].into_iter().find(|(k, _)| *k == format);
        let source = 16 * format.source_row_bytes(format.tile_cols());
        assert_eq!(format.tile_bytes(), source + more.map_or(0, |(_, bytes)| bytes), "{format:?}");
        assert!(format.tile_bytes().is_multiple_of(64), "{format:?}");
        assert_eq!(packed_bytes(format, 17, format.tile_cols() + 1), Some(4 * format.tile_bytes()));
        assert_eq!(packed_bytes(format, usize::MAX, usize::MAX), None);
    }
}

#[test]
fn what_is_not_finite_is_refused_with_its_place() {
    let mut rng = Rng::new(6);
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        for format in Format::ALL.into_iter().filter(|format| format.row_kind() != RowKind::Dense) {
            let block = format.source_row_bytes(format.block_cols());
            let cols = 3 * format.block_cols();
            let has_min = matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K);
            let scale_at = if format == Format::Q6K { 208 } else { 0 };
            for (at, name) in [(scale_at, "scale"), (2, "minimum")].into_iter().take(1 + usize::from(has_min)) {
                let mut source: Vec<u8> =
                    (0..3).flat_map(|_| source_row(format, cols, Data::Random, &mut rng)).collect();
                source[block * 5 + at..][..2].copy_from_slice(&bad.to_le_bytes());
                let mut out = vec![0; packed_bytes(format, 16, cols).unwrap()];
                let error = pack_row_group(format, &source, 3, cols, &mut out).unwrap_err();
                assert!(
                    matches!(error, PackError::BlockNotFinite { row: 1, block: 2, what, .. } if what == name),
                    "{format:?}: {error}"
                );
            }
        }
    }
    let mut source = [0u8; 3 * 20];
    source[20 + 16..20 + 20].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = pack_row_group(Format::F32, &source, 3, 5, &mut [0; 4096]).unwrap_err();
    assert!(matches!(error, PackError::ValueNotFinite { row: 1, col: 4, .. }), "{error}");
}

#[test]
fn tiny_dense_values_become_zero() {
    let values = [1e-40f32, -7.8e-31, 7.9e-31, -1.0];
    let source: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut out = vec![0; 4096];
    pack_row_group(Format::F32, &source, 1, 4, &mut out).unwrap();
    let stored: Vec<f32> = (0..4).map(|k| f32::from_le_bytes(out[64 * k..64 * k + 4].try_into().unwrap())).collect();
    assert_eq!(stored, [0.0, 0.0, 7.9e-31, -1.0]);
}

#[test]
fn wrong_shapes_are_errors() {
    let mut out = [0; 640];
    let error = |result: Result<(), PackError>| result.unwrap_err();
    assert!(matches!(error(pack_row_group(Format::Q4_1, &[0; 20], 0, 32, &mut out)), PackError::Rows { rows: 0 }));
    assert!(matches!(error(pack_row_group(Format::Q4_1, &[0; 20], 17, 32, &mut out)), PackError::Rows { rows: 17 }));
    assert!(matches!(
        error(pack_row_group(Format::Q4_1, &[0; 20], 1, 33, &mut out)),
        PackError::Columns { cols: 33, .. }
    ));
    let source = error(pack_row_group(Format::Q4_1, &[0; 19], 1, 32, &mut out));
    assert!(matches!(source, PackError::SourceLength { have: 19, need: 20, .. }));
    let output = error(pack_row_group(Format::Q4_1, &[0; 20], 1, 32, &mut out[1..]));
    assert!(matches!(output, PackError::OutputLength { have: 639, need: 640 }));
    assert!(matches!(Matrix::new(Format::Q4_1, 1, 33, &out), Err(ShapeError::Columns { .. })));
    assert!(matches!(Matrix::new(Format::Q4_1, 1, 64, &out[1..]), Err(ShapeError::Length { .. })));
    assert!(matches!(Matrix::new(Format::Q4_1, usize::MAX, 64, &out), Err(ShapeError::TooLarge { .. })));
    let wide = [0; 1024];
    let misaligned = boundary(&wide) + 1;
    assert!(matches!(
        Matrix::new(Format::Q4_1, 1, 64, &wide[misaligned..][..640]),
        Err(ShapeError::Alignment { offset: 1 })
    ));
}
