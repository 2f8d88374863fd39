//! Literal files, and every way a small one can be wrong.
#![allow(clippy::unwrap_used)]

use super::*;

fn string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

fn entry(out: &mut Vec<u8>, key: &str, kind: u32, value: &[u8]) {
    string(out, key.as_bytes());
    out.extend(kind.to_le_bytes());
    out.extend(value);
}

fn tensor(out: &mut Vec<u8>, name: &str, dims: &[u64], kind: u32, offset: u64) {
    string(out, name.as_bytes());
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|extent| out.extend(extent.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
}

/// A file of the given entries and tensors, with `data` bytes of zeros behind them.
fn file(entries: &[(&str, u32, &[u8])], tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    entries.iter().for_each(|(key, kind, value)| entry(&mut out, key, *kind, value));
    tensors.iter().for_each(|(name, dims, kind, offset)| tensor(&mut out, name, dims, *kind, *offset));
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

fn error(bytes: &[u8]) -> String {
    Gguf::parse(bytes).unwrap_err().to_string()
}

#[test]
fn reads_metadata_and_tensors() {
    let mut strings = vec![8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    string(&mut strings, b"a");
    string(&mut strings, b"\xff\xfe");
    let bytes = file(
        &[
            ("a.u32", 4, &7u32.to_le_bytes()),
            ("a.i8", 1, &[0xff]),
            ("a.f32", 6, &1.5f32.to_le_bytes()),
            ("a.bool", 7, &[1]),
            ("a.str", 8, b"\x02\0\0\0\0\0\0\0hi"),
            ("a.strs", 9, &strings),
            ("a.ints", 9, b"\x05\0\0\0\x02\0\0\0\0\0\0\0\xff\xff\xff\xff\x02\0\0\0"),
        ],
        &[("w", &[32, 2], 2, 0), ("b", &[3], 0, 64), ("x", &[5], 999, 96)],
        128,
    );
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.metadata().map(|(key, _)| key).collect::<Vec<_>>()[..2], ["a.u32", "a.i8"]);
    assert_eq!(gguf.u32("a.u32").unwrap(), Some(7));
    assert_eq!(gguf.u64("nothing").unwrap(), None);
    assert_eq!(gguf.f32("a.f32").unwrap(), Some(1.5));
    assert_eq!(gguf.bool("a.bool").unwrap(), Some(true));
    assert_eq!(gguf.str("a.str").unwrap(), Some("hi"));
    assert_eq!(gguf.array_str("a.strs").unwrap().unwrap().collect::<Vec<_>>(), [&b"a"[..], b"\xff\xfe"]);
    assert_eq!(gguf.array_i32("a.ints").unwrap().unwrap(), [-1, 2]);
    assert_eq!(gguf.u32("a.i8").unwrap_err().to_string(), "metadata `a.i8` is -1, out of range for u32");
    assert_eq!(gguf.u32("a.strs").unwrap_err().to_string(), "metadata `a.strs` is array of string, wanted u32");
    assert_eq!(
        gguf.architecture().unwrap_err().to_string(),
        "metadata `general.architecture` is missing (string wanted)"
    );

    let w = gguf.tensor("w").unwrap();
    assert_eq!((w.dims, w.bytes, w.ggml_type, w.elements()), ([32, 2, 1, 1], 36, GgmlType::Q4_0, 64));
    assert_eq!(gguf.data(w).len(), 36);
    let x = gguf.tensor("x").unwrap();
    assert_eq!((x.ggml_type, x.bytes), (GgmlType::Unknown(999), 0));
    assert!(gguf.data(x).is_empty());
}

#[test]
fn other_containers_are_named() {
    assert_eq!(error(b"GG"), "file truncated at byte 0: magic needs 4 bytes, 2 are left");
    assert!(error(b"PK\x03\x04....").starts_with("not a GGUF file: it begins with bytes [50, 4b, 03, 04]"));
    assert!(error(b"tjgg....").contains("legacy GGJT"));
    assert!(error(b"GGUF\0\0\0\x03........").contains("big-endian"));
    assert!(error(b"GGUF\x01\0\0\0....").contains("version 1 is not supported"));
    assert!(error(b"GGUF\x04\0\0\0....").contains("version 4 is not supported"));
}

#[test]
fn metadata_is_checked() {
    let u32_7: (&str, u32, &[u8]) = ("k", 4, &[7, 0, 0, 0]);
    assert_eq!(error(&file(&[u32_7, u32_7], &[], 0)), "metadata key `k` occurs twice");
    assert!(error(&file(&[("k", 13, &[])], &[], 0)).contains("metadata type id 13"));
    assert!(error(&file(&[("k", 7, &[2])], &[], 0)).contains("boolean at byte 37 is 2"));
    assert!(error(&file(&[("", 7, &[1])], &[], 0)).contains("metadata key at byte 32 is empty"));
    assert!(
        error(&file(&[("general.alignment", 4, &[48, 0, 0, 0])], &[], 0)).contains("is 48, must be a power of two")
    );
    assert!(error(&file(&[("general.alignment", 4, &[0; 4])], &[], 0)).contains("is 0, must be"));
    assert!(error(&file(&[("split.count", 2, &[3, 0])], &[], 0)).contains("part 1 of a model split into 3 files"));
    let long = [&[4, 0, 0, 0][..], &u64::MAX.to_le_bytes()].concat();
    assert!(error(&file(&[("k", 9, &long)], &[], 0)).contains("over the limit of 16777216"));
    let nested = [9u8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].repeat(5);
    assert!(error(&file(&[("k", 9, &nested)], &[], 0)).contains("nested deeper than 4"));
    let empty_strings = [&[8, 0, 0, 0][..], &16_000_000u64.to_le_bytes()].concat();
    assert!(error(&file(&[("k", 9, &empty_strings)], &[], 4096)).contains("truncated"));
}

#[test]
fn tensors_are_checked() {
    assert!(error(&file(&[], &[("a", &[4], 0, 0), ("a", &[4], 0, 32)], 64)).contains("tensor name `a` occurs twice"));
    assert!(error(&file(&[], &[("a", &[9], 0, 0), ("b", &[4], 0, 32)], 64)).contains("`a` and `b` overlap"));
    assert!(error(&file(&[], &[("a", &[4], 0, 8)], 64)).contains("no multiple of the alignment 32"));
    assert!(error(&file(&[], &[("a", &[17], 0, 0)], 64)).contains("end after the file's"));
    assert!(error(&file(&[], &[("a", &[33], 2, 0)], 64)).contains("no multiple of the 32 values in a Q4_0 block"));
    assert!(error(&file(&[], &[("a", &[1 << 40, 1 << 40, 0], 0, 0)], 64)).contains("does not fit 63 bits"));
    assert!(error(&file(&[], &[("a", &[1 << 62], 27, 0)], 64)).contains("does not fit 64 bits"));
    assert!(error(&file(&[], &[("a", &[1; 5], 0, 0)], 64)).contains("more than 4 dimensions"));
    assert!(error(&file(&[], &[("a", &[1], 0, !31)], 64)).contains("end after the file's"));
}

#[test]
fn every_prefix_is_an_error_that_says_where() {
    let bytes = file(&[("k", 4, &[7, 0, 0, 0])], &[("a", &[4], 0, 0)], 16);
    assert!(Gguf::parse(&bytes).is_ok());
    for len in 0..bytes.len() {
        let text = error(&bytes[..len]);
        assert!(text.contains("truncated at byte") || text.contains("end after the file's"), "{len}: {text}");
    }
}

#[test]
fn the_type_table_agrees_with_itself() {
    for (id, kind) in GgmlType::KNOWN.iter().enumerate() {
        assert_eq!(kind.id() as usize, id);
        assert_eq!(GgmlType::from_u32(kind.id()), *kind);
        assert!(kind.block_size() > 0 && kind.type_size() > 0, "{kind}");
    }
    assert_eq!(GgmlType::from_u32(77).to_string(), "unknown(77)");
}
