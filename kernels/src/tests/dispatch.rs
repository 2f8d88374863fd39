//! The right sets are there, the wrong ones are an error, the checks refuse wrong shapes.

use super::*;
use crate::{KernelError, QBlock, Rows};

#[test]
fn the_set_of_this_architecture_is_there() {
    let names: Vec<_> = Kernels::supported().map(Kernels::name).collect();
    #[cfg(target_arch = "x86_64")]
    {
        // From the kernel's own list, not from the detection under test.
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has = |flag: &str| info.split_whitespace().any(|word| word == flag);
        let mut expected = vec!["scalar"];
        if ["avx2", "fma", "f16c"].iter().all(|flag| has(flag)) {
            expected.push("avx2");
        }
        let avx512 = ["fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"];
        if avx512.iter().all(|flag| has(flag)) {
            expected.push("avx512vnni");
        }
        assert_eq!(names, expected);
        assert_eq!(Some(&Kernels::detect().name()), expected.last());
    }
    #[cfg(target_arch = "aarch64")]
    {
        // As above.
        const AT_HWCAP: u64 = 16;
        const HWCAP_ASIMDDP: u64 = 1 << 20;
        let auxv = std::fs::read("/proc/self/auxv").unwrap();
        let mut words = auxv.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word));
        let hwcap = loop {
            match (words.next().unwrap(), words.next().unwrap()) {
                (AT_HWCAP, value) => break value,
                (key, _) => assert_ne!(key, 0, "no hardware capabilities among {auxv:?}"),
            }
        };
        let expected = hwcap & HWCAP_ASIMDDP != 0;
        assert_eq!(names.contains(&"dotprod"), expected);
        assert_eq!(Kernels::detect().name(), if expected { "dotprod" } else { "neon" });
        if !expected {
            let error = Kernels::by_name("dotprod").unwrap_err().to_string();
            assert!(error.contains("the dotprod instructions, which this CPU does not have"), "{error}");
        }
    }
    // A run on a CPU that is known says which sets it must get: no more, no fewer.
    if let Ok(demanded) = std::env::var("HEARTH_TEST_SETS") {
        assert_eq!(names, demanded.split_whitespace().collect::<Vec<_>>());
    }
    assert!(names.contains(&"scalar"));
}

#[test]
fn a_set_of_another_architecture_is_refused() {
    let foreign: &[_] = if cfg!(target_arch = "aarch64") { &["avx2", "avx512vnni"] } else { &["neon"] };
    for foreign in foreign {
        let error = Kernels::by_name(foreign).unwrap_err();
        assert!(matches!(error, KernelError::Unsupported { name, .. } if name == *foreign), "{error}");
    }
}

#[test]
fn an_unknown_name_is_answered_with_the_names() {
    let error = Kernels::by_name("turbo").unwrap_err().to_string();
    assert!(error.contains("turbo") && Kernels::NAMES.iter().all(|name| error.contains(name)), "{error}");
}

#[test]
#[should_panic(expected = "output length")]
fn a_wrong_output_length_is_refused() {
    let w = Weights::new(Format::Q4_1, 16, 64, Data::Zero, &mut Rng::new(1));
    let x = [QBlock::default(); 2];
    Kernels::detect().matmul(&w.matrix(), 0..1, Rows::Quantized(&x), 1, &mut [0.0; 15]);
}

#[test]
#[should_panic(expected = "dense rows")]
fn the_wrong_kind_of_rows_is_refused() {
    let w = Weights::new(Format::Q4_1, 16, 64, Data::Zero, &mut Rng::new(1));
    Kernels::detect().matmul(&w.matrix(), 0..1, Rows::Dense(&[0.0; 64]), 1, &mut [0.0; 16]);
}

#[test]
#[should_panic(expected = "row groups")]
fn row_groups_beyond_the_matrix_are_refused() {
    let w = Weights::new(Format::F16, 16, 64, Data::Zero, &mut Rng::new(1));
    Kernels::detect().matmul(&w.matrix(), 1..2, Rows::Dense(&[0.0; 64]), 1, &mut [0.0; 16]);
}
