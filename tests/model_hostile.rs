//! Damaged models, all the way: parsed, planned, repacked and run. Whatever is wrong is an error or an odd answer, never a panic.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hearth::engine::Engine;
use hearth::engine::capacity::Capacity;
use hearth::engine::queue::{Event, Job};
use hearth::engine::sampler::SamplingParams;
use hearth::engine::scheduler::Peer;
use hearth::model::gguf::Gguf;
use hearth::model::weights::WeightLayout;
use hearth::model::{Model, ModelError, arch};
use hearth::plan::MemoryPlan;
use hearth::sys::map::Region;
use hearth::sys::workers::Workers;
use hearth::text::TokenId;
use hearth_kernels::Kernels;
use tiny::{SHAPE, Shape};

const MUTATIONS: u64 = 10_000;
/// A mutated header that still fits its tensors cannot ask for more than this.
const MAX_REGION_BYTES: usize = 16 << 20;

fn run(file: &[u8]) -> Result<usize, ModelError> {
    let gguf = Gguf::parse(file)?;
    let hyper = arch::hyper(&gguf)?;
    let layout = WeightLayout::new(&gguf, &hyper)?;
    let capacity = Capacity {
        ctx: 64.min(hyper.n_ctx_train),
        sequences: 1,
        max_rows: 8,
        max_outputs: 1,
        threads: 1,
        ..Capacity::default()
    };
    let plan = MemoryPlan::new(&hyper, &layout, 0, file.len(), capacity);
    // Refused or not, it must add up.
    let _ = plan.check(&hyper, 1 << 30);
    assert!(layout.region_bytes() <= MAX_REGION_BYTES, "{} bytes from a file of {}", layout.region_bytes(), file.len());
    let mut region = Region::new(layout.region_bytes()).unwrap();
    let mut workers = Workers::new(1).unwrap();
    let model = Model::load(&gguf, hyper, &layout, &mut region, &mut workers, |_| ())?;
    let mut engine = Engine::new(&model, Kernels::detect(), workers, capacity, 8, vec![]);
    let job = Job {
        id: 0,
        prompt: vec![TokenId(1), TokenId(2)],
        sampling: SamplingParams::default(),
        max_tokens: 2,
        ignore_eos: true,
        logits_hash: true,
        cancel: Arc::new(AtomicBool::new(false)),
        embed: None,
        mask: None,
        peer: Peer::default(),
        logprobs: None,
    };
    let mut tokens = 0;
    if engine.admit(Box::new(job)).is_ok() {
        while !engine.is_idle() {
            engine.step(&mut |event| tokens += usize::from(matches!(event, Event::Token { .. })));
        }
    }
    Ok(tokens)
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn ten_thousand_damaged_models_are_errors_or_answers() {
    let shape =
        Shape { n_layer: 1, n_embd: 32, n_ff: 32, n_head: 2, n_head_kv: 1, n_vocab: 20, n_ctx: 64, tied: false };
    let file = tiny::model(shape, "Q4_1", 5);
    assert_eq!(run(&file).unwrap(), 2, "undamaged, it runs");
    let header = file.windows(18).position(|window| window == b"output_norm.weight").unwrap();
    let (mut refused, mut ran) = (0, 0);
    for seed in 0..MUTATIONS {
        let mut state = seed;
        let mut damaged = file.clone();
        for _ in 0..=next(&mut state) % 4 {
            // Mostly the header, where sizes and counts are; sometimes the weights.
            let end = if next(&mut state).is_multiple_of(4) { file.len() } else { header + 80 };
            let at = usize::try_from(next(&mut state)).unwrap() % end;
            let interesting = [0, 1, 0x7F, 0x80, 0xFF, (next(&mut state) >> 56) as u8];
            damaged[at] = interesting[usize::try_from(next(&mut state)).unwrap() % interesting.len()];
        }
        match run(&damaged) {
            Ok(_) => ran += 1,
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
    }
    println!("{refused} refused, {ran} ran");
    assert!(refused > 1000 && ran > 500, "{refused} refused, {ran} ran: the mutations miss their mark");
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    for (format, block) in
        [("F32", 0x7FC0_0000u32.to_le_bytes().to_vec()), ("Q4_0", vec![0x00, 0x7C]), ("F16", vec![0x01, 0x7E])]
    {
        let mut file = tiny::model(SHAPE, format, 5);
        let at = {
            let gguf = Gguf::parse(&file).unwrap();
            let tensor = gguf.tensor("blk.1.ffn_up.weight").unwrap();
            usize::try_from(tensor.offset).unwrap()
        };
        file[at..at + block.len()].copy_from_slice(&block);
        let message = run(&file).unwrap_err().to_string();
        assert!(message.contains("blk.1.ffn_up.weight"), "{format}: {message}");
    }
}

#[test]
fn tensors_that_would_be_left_out_are_refused_by_name() {
    let mut writer = tiny::Writer::new(1);
    writer.string("general.architecture", "mamba");
    let message = run(&writer.finish()).unwrap_err().to_string();
    assert!(message.contains("mamba") && message.contains("llama"), "{message}");

    let file = tiny::model(SHAPE, "F16", 5);
    let renamed = String::from_utf8_lossy(&file).matches("blk.0.ffn_up.weight").count();
    assert_eq!(renamed, 1);
    let at = file.windows(19).position(|window| window == b"blk.0.ffn_up.weight").unwrap();
    let mut file = file;
    file[at + 6..at + 12].copy_from_slice(b"ffn_xx");
    let message = run(&file).unwrap_err().to_string();
    assert!(message.contains("blk.0.ffn_up.weight"), "{message}");
}
