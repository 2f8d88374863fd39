//! Small llama-family models made on the spot: a GGUF writer and seeded random weights in any block format.
//! The same bytes everywhere, so a logits hash of one is a golden for every CPU.

#![allow(dead_code, clippy::unwrap_used)]

use hearth::model::gguf::Gguf;
use hearth::model::weights::WeightLayout;
use hearth::model::{Model, arch};
use hearth::sys::map::Region;
use hearth::sys::workers::Workers;

/// GGML type ids and bytes of one block, as the GGUF specification lists them.
pub const TYPES: [(&str, u32, usize, usize); 11] = [
    // name, id, values a block, bytes a block
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("BF16", 30, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
];

/// Shape of a tiny model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_ff: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub n_vocab: usize,
    pub n_ctx: usize,
    /// A head of its own, or the embeddings again.
    pub tied: bool,
}

pub const SHAPE: Shape =
    Shape { n_layer: 2, n_embd: 96, n_ff: 160, n_head: 6, n_head_kv: 2, n_vocab: 100, n_ctx: 512, tied: true };

/// A shape whose rows are whole super-blocks of 256.
pub const WIDE: Shape = Shape { n_layer: 1, n_embd: 256, n_ff: 256, n_head: 8, n_head_kv: 2, ..SHAPE };

/// The shape for a type.
pub fn shape_for(type_name: &str) -> Shape {
    if type_name.ends_with("_K") { WIDE } else { SHAPE }
}

/// Loads a file for as long as `use_model` takes, with the workers that packed it.
pub fn with_model<R>(file: &[u8], threads: usize, use_model: impl FnOnce(&Model<'_>, Workers) -> R) -> R {
    let gguf = Gguf::parse(file).unwrap();
    let hyper = arch::hyper(&gguf).unwrap();
    let layout = WeightLayout::new(&gguf, &hyper).unwrap();
    let mut region = Region::new(layout.region_bytes()).unwrap();
    let mut workers = Workers::new(threads).unwrap();
    let model = Model::load(&gguf, hyper, &layout, &mut region, &mut workers, |_| ()).unwrap();
    use_model(&model, workers)
}

/// A GGUF v3 file with weights of one type (norms F32).
pub fn model(shape: Shape, type_name: &str, seed: u64) -> Vec<u8> {
    let mut writer = Writer::new(seed);
    writer.string("general.architecture", "llama");
    writer.string("general.name", "tiny");
    for (key, value) in [
        ("llama.block_count", shape.n_layer),
        ("llama.embedding_length", shape.n_embd),
        ("llama.feed_forward_length", shape.n_ff),
        ("llama.attention.head_count", shape.n_head),
        ("llama.attention.head_count_kv", shape.n_head_kv),
        ("llama.context_length", shape.n_ctx),
    ] {
        writer.u32(key, u32::try_from(value).unwrap());
    }
    writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let kv = shape.n_embd / shape.n_head * shape.n_head_kv;
    writer.matrix("token_embd.weight", type_name, shape.n_vocab, shape.n_embd);
    for layer in 0..shape.n_layer {
        writer.norm(&format!("blk.{layer}.attn_norm.weight"), shape.n_embd);
        writer.norm(&format!("blk.{layer}.ffn_norm.weight"), shape.n_embd);
        for (name, rows, cols) in [
            ("attn_q", shape.n_embd, shape.n_embd),
            ("attn_k", kv, shape.n_embd),
            ("attn_v", kv, shape.n_embd),
            ("attn_output", shape.n_embd, shape.n_embd),
            ("ffn_gate", shape.n_ff, shape.n_embd),
            ("ffn_up", shape.n_ff, shape.n_embd),
            ("ffn_down", shape.n_embd, shape.n_ff),
        ] {
            writer.matrix(&format!("blk.{layer}.{name}.weight"), type_name, rows, cols);
        }
    }
    writer.norm("output_norm.weight", shape.n_embd);
    if !shape.tied {
        writer.matrix("output.weight", type_name, shape.n_vocab, shape.n_embd);
    }
    writer.finish()
}

/// Writes GGUF v3, little-endian, alignment 32.
pub struct Writer {
    metadata: Vec<u8>,
    metadata_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
    random: u64,
}

const ALIGNMENT: usize = 32;

impl Writer {
    pub fn new(seed: u64) -> Self {
        Self { metadata: vec![], metadata_count: 0, infos: vec![], tensor_count: 0, data: vec![], random: seed }
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
    }

    pub fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_string(&mut self.metadata, value);
    }

    pub fn strings(&mut self, key: &str, values: &[String]) {
        self.key(key, 9);
        self.metadata.extend(8u32.to_le_bytes());
        self.metadata.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_string(&mut self.metadata, value);
        }
    }

    /// Random weights of about `0.7 / sqrt(cols)`, so that activations neither die nor explode.
    pub fn matrix(&mut self, name: &str, type_name: &str, rows: usize, cols: usize) {
        let &(_, id, values, bytes) = TYPES.iter().find(|entry| entry.0 == type_name).unwrap();
        let size = 1.2 / (cols as f32).sqrt();
        let mut data = Vec::new();
        for _ in 0..rows * cols / values {
            match type_name {
                "F32" => data.extend((self.signed() * size).to_le_bytes()),
                "F16" => data.extend(half::f16::from_f32(self.signed() * size).to_le_bytes()),
                "BF16" => data.extend(half::bf16::from_f32(self.signed() * size).to_le_bytes()),
                "Q4_K" | "Q5_K" => {
                    // Minimums in the middle of what the numbers reach, so that weights are about zero on average.
                    let levels = if type_name == "Q4_K" { 16.0 } else { 32.0 };
                    let d = size / levels / 24.0 * (1.0 + 0.5 * self.signed());
                    data.extend(half::f16::from_f32(d).to_le_bytes());
                    data.extend(half::f16::from_f32(d * levels / 2.0).to_le_bytes());
                    // Scales and minimums of 0 to 63, the same pairs in both: their packing is tested elsewhere.
                    let pairs: [u8; 4] = std::array::from_fn(|_| (self.next() >> 56) as u8);
                    data.extend(pairs.iter().chain(&pairs));
                    data.extend(pairs.map(|pair| (pair & 15) * 17));
                    data.extend((0..bytes - 16).map(|_| (self.next() >> 56) as u8));
                }
                "Q6_K" => {
                    data.extend((0..192).map(|_| (self.next() >> 56) as u8));
                    data.extend((0..16).map(|_| (self.next() >> 56) as u8));
                    data.extend(half::f16::from_f32(size / 32.0 / 64.0 * (1.0 + 0.5 * self.signed())).to_le_bytes());
                }
                _ => {
                    let levels = if type_name.starts_with("Q8") {
                        127.0
                    } else if type_name.starts_with("Q5") {
                        16.0
                    } else {
                        8.0
                    };
                    let d = size / levels * (1.0 + 0.5 * self.signed());
                    data.extend(half::f16::from_f32(d).to_le_bytes());
                    let mut left = bytes - 2;
                    if type_name.ends_with("_1") {
                        data.extend(half::f16::from_f32(-d * levels * (1.0 + 0.05 * self.signed())).to_le_bytes());
                        left -= 2;
                    }
                    data.extend((0..left).map(|_| (self.next() >> 56) as u8));
                }
            }
        }
        self.tensor(name, &[cols, rows], id, &data);
    }

    pub fn norm(&mut self, name: &str, len: usize) {
        let data: Vec<u8> = (0..len).flat_map(|_| (1.0 + 0.2 * self.signed()).to_le_bytes()).collect();
        self.tensor(name, &[len], 0, &data);
    }

    pub fn tensor(&mut self, name: &str, dims: &[usize], type_id: u32, data: &[u8]) {
        put_string(&mut self.infos, name);
        self.infos.extend(u32::try_from(dims.len()).unwrap().to_le_bytes());
        for &dim in dims {
            self.infos.extend((dim as u64).to_le_bytes());
        }
        self.infos.extend(type_id.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.tensor_count += 1;
    }

    pub fn finish(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.metadata_count.to_le_bytes());
        file.extend(self.metadata);
        file.extend(self.infos);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(self.data);
        file
    }

    fn key(&mut self, key: &str, kind: u32) {
        put_string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata_count += 1;
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1), exact in f32.
    fn signed(&mut self) -> f32 {
        ((self.next() >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
    }
}

fn put_string(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}
