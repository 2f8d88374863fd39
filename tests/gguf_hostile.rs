//! Damaged and hostile model files: every one is answered with an error that says where, or used; none crashes or hangs.
#![allow(clippy::unwrap_used)]

#[path = "common/gguf_writer.rs"]
mod gguf_writer;
#[path = "common/models.rs"]
mod models;

use std::time::{Duration, Instant};

use gguf_writer::Writer;
use hearth::model::gguf::{Gguf, GgufError};
use hearth::model::vocab::raw_vocab;
use hearth::text::chat::{ChatInput, ChatTemplate};
use hearth::text::{TokenId, Vocab};

/// Longest that one damaged file may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// SplitMix64: the same mutations on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Everything that reads a header: parse, look at every value and tensor, build the vocabulary, tokenize, compile the template.
fn use_file(bytes: &[u8]) -> Result<(), String> {
    let gguf = Gguf::parse(bytes).map_err(|e| e.to_string())?;
    for (key, value) in gguf.metadata() {
        assert_eq!(gguf.get(key), Some(value));
        let _ = (gguf.u64(key), gguf.f32(key), gguf.str(key), gguf.array_i32(key).map(|list| list.map(|l| l.len())));
    }
    for tensor in gguf.tensors() {
        assert_eq!(gguf.tensor(tensor.name), Some(tensor));
        assert_eq!(gguf.data(tensor).len() as u64, tensor.bytes);
    }
    let raw = raw_vocab(&gguf).map_err(|e| e.to_string())?;
    let vocab = Vocab::new(&raw).map_err(|e| e.to_string())?;
    let text = "Hello <|im_start|> wörld\n\n 123 ▁";
    let ids = vocab.encode(text, true, true).map_err(|e| e.to_string())?;
    vocab.decode(&ids, true);
    assert!(ids.iter().all(|id| id.index() < vocab.len()));
    for id in [0, 1, vocab.len() as u32, u32::MAX] {
        let _ = (vocab.token_bytes(TokenId(id), true), vocab.is_control(TokenId(id)), vocab.text_of(TokenId(id)));
    }
    if let Some(template) = gguf.str("tokenizer.chat_template").map_err(|e| e.to_string())? {
        let template = ChatTemplate::compile(template, "", "").map_err(|e| e.to_string())?;
        let messages = serde_json::json!([{ "role": "user", "content": "Hi" }]);
        template.render(&ChatInput::new(&messages)).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn synthetic() -> (Vec<u8>, usize) {
    let tokens = ["a", "b", "Ġ", "ab", "Ġab", "<|im_start|>", "<|im_end|>", "Ċ", "1"];
    let mut writer = Writer::default();
    writer
        .str("general.architecture", "llama")
        .u32("general.alignment", 32)
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", "smollm")
        .strs("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 1, 1, 3, 3, 1, 1])
        .strs("tokenizer.ggml.merges", &["a b", "Ġ ab"])
        .u32("tokenizer.ggml.bos_token_id", 5)
        .u32("tokenizer.ggml.eos_token_id", 6)
        .bool("tokenizer.ggml.add_bos_token", true)
        .str("tokenizer.chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        .tensor("token_embd.weight", &[64, 9], 2, 9 * 36)
        .tensor("output_norm.weight", &[64], 0, 256);
    writer.finish()
}

fn spm() -> (Vec<u8>, usize) {
    let mut writer = Writer::default();
    writer
        .str("general.architecture", "gemma")
        .str("tokenizer.ggml.model", "llama")
        .strs("tokenizer.ggml.tokens", &["<unk>", "<s>", "</s>", "<0x0A>", "▁", "H", "e", "▁H", "▁He"])
        .f32s("tokenizer.ggml.scores", &[0.0, 0.0, 0.0, 0.0, -1.0, -2.0, f32::NAN, -0.0, f32::INFINITY])
        .i32s("tokenizer.ggml.token_type", &[2, 3, 3, 6, 1, 1, 1, 1, 1])
        .tensor("token_embd.weight", &[32, 9], 8, 9 * 34);
    writer.finish()
}

/// Damages one to eight places of the header: bytes, whole lengths, or pieces copied over each other.
fn mutate(bytes: &mut Vec<u8>, header: usize, random: &mut Random) {
    const LENGTHS: [u64; 8] = [0, 1, 0xff, 0xffff, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
    for _ in 0..=random.below(8) {
        let at = random.below(header - 8);
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at..at + 8].copy_from_slice(&LENGTHS[random.below(LENGTHS.len())].to_le_bytes()),
            3 => bytes[at..at + 4].copy_from_slice(&(random.below(16) as u32).to_le_bytes()),
            4 => {
                let (from, len) = (random.below(header), random.below(64));
                let piece = bytes[from..(from + len).min(header)].to_vec();
                let end = (at + piece.len()).min(header);
                bytes[at..end].copy_from_slice(&piece[..end - at]);
            }
            _ => {
                let count = random.below(16);
                bytes.drain(at..(at + count).min(header));
                bytes.resize(bytes.len() + count, 0);
            }
        }
    }
}

fn torment(name: &str, original: &[u8], header: usize, rounds: u64, seed: u64) {
    assert_eq!(use_file(original), Ok(()), "{name}");
    let started = Instant::now();
    let mut damaged = original.to_vec();
    let (mut refused, mut slowest) = (0, Duration::ZERO);
    for round in 0..rounds {
        damaged.clear();
        damaged.extend_from_slice(original);
        mutate(&mut damaged, header, &mut Random(seed + round));
        let began = Instant::now();
        if let Err(reason) = use_file(&damaged) {
            refused += 1;
            assert!(reason.len() > 10, "{name}, round {round}: {reason:?} explains nothing");
        }
        let took = began.elapsed();
        assert!(took < PATIENCE, "{name}, round {round} took {took:?}");
        slowest = slowest.max(took);
    }
    println!("{name}: {rounds} mutations, {refused} refused, slowest {slowest:?}, all {:?}", started.elapsed());
    assert!(refused > rounds / 4, "{name}: only {refused} of {rounds} were refused");
}

/// The real file's header with its tensors' bytes left out: mutations of the header need no 98 MB copied each time.
fn header_of(model: &[u8]) -> (Vec<u8>, usize) {
    let gguf = Gguf::parse(model).unwrap();
    let data_start = gguf.tensors().iter().map(|tensor| tensor.offset).min().unwrap() as usize;
    (model[..data_start].to_vec(), data_start)
}

#[test]
fn synthetic_files_survive_ten_thousand_mutations_each() {
    let (bytes, header) = synthetic();
    torment("byte-level", &bytes, header, 10_000, 1);
    let (bytes, header) = spm();
    torment("sentencepiece", &bytes, header, 10_000, 2);
}

/// Ten thousand mutations of the real header: a thousand go all the way to a prompt, each of which builds 49,152 tokens'
/// tables, the others through the parser alone.
#[test]
fn smollm2_survives_ten_thousand_mutations() {
    let model = models::smollm2();
    let (header, len) = header_of(&model);
    let tensors_begin = len - 272 * 64;
    let mut damaged = model;
    let (mut refused, mut slowest) = (0, Duration::ZERO);
    for round in 0..10_000u64 {
        let mut random = Random(1000 + round);
        damaged[..len].copy_from_slice(&header);
        // Mutations that stay in place: the file behind them is not copied. A third each: the first keys, anywhere, tensors.
        let (from, to) = [(0, 2048), (0, len), (tensors_begin, len)][random.below(3)];
        for _ in 0..=random.below(4) {
            let at = from + random.below(to - from - 8);
            match random.below(3) {
                0 => damaged[at] ^= 1 << random.below(8),
                1 => damaged[at] = random.next() as u8,
                _ => damaged[at..at + 8].copy_from_slice(&random.next().to_le_bytes()[..8]),
            }
        }
        let began = Instant::now();
        let result = if round % 10 == 0 { use_file(&damaged) } else { parse_only(&damaged) };
        refused += u32::from(result.is_err());
        let took = began.elapsed();
        assert!(took < PATIENCE, "round {round} took {took:?}");
        slowest = slowest.max(took);
    }
    println!("SmolLM2: 10000 mutations, {refused} refused, slowest {slowest:?}");
    assert!(refused > 2000, "only {refused} were refused");
}

fn parse_only(bytes: &[u8]) -> Result<(), String> {
    Gguf::parse(bytes).map(drop).map_err(|e| e.to_string())
}

#[test]
fn smollm2_truncated_at_every_4_kib_of_the_first_mib() {
    let model = models::smollm2();
    for len in (0..=1 << 20).step_by(4096) {
        match Gguf::parse(&model[..len]).unwrap_err() {
            GgufError::Truncated { offset, need, have, .. } => {
                assert!(offset <= len as u64 && need > have, "at {len}: offset {offset}, need {need}, have {have}");
                assert_eq!(offset + have, len as u64);
            }
            other => panic!("cut at {len}: {other}"),
        }
    }
}

#[test]
fn both_real_files_read_as_known() {
    let gemma = models::gemma3();
    let gguf = Gguf::parse(&gemma).unwrap();
    assert_eq!((gguf.architecture().unwrap(), gguf.version(), gguf.alignment()), ("gemma3", 3, 32));
    assert_eq!(gguf.tensors().iter().map(|tensor| tensor.elements()).sum::<u64>(), 268_098_176);
    let smollm2 = models::smollm2();
    let gguf = Gguf::parse(&smollm2).unwrap();
    assert_eq!(gguf.architecture().unwrap(), "llama");
    assert_eq!(gguf.tensors().iter().map(|tensor| tensor.elements()).sum::<u64>(), 134_515_008);
}
