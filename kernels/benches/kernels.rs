//! Speed of every kernel set on the shapes of SmolLM2-135M, beside what memory gives a plain read loop. One thread; the
//! best of many. Arguments (any order): names of formats or sets to keep to, `attention`, `matmul`.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use hearth_kernels::{
    AttentionArgs, AttentionScratch, Format, Kernels, Matrix, QBlock, Rows, blocks_per_row, kv_block_len, packed_bytes,
    padded_cols,
};

/// Output × input features.
const SHAPES: [(usize, usize); 4] = [(576, 576), (1536, 576), (576, 1536), (49152, 576)];
/// Bytes of copies of a matrix that no cache here holds.
const COLD_BYTES: usize = 768 << 20;
/// A matrix larger than this is not called hot.
const HOT_BYTES: usize = 1 << 20;
const PREFILL: usize = 128;
const TIME: Duration = Duration::from_millis(120);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let asked = |names: &[&str], name: &str| {
        let any = words.iter().any(|word| names.contains(&word.as_str()));
        !any || words.iter().any(|word| word == name)
    };
    let parts = ["matmul", "attention"];
    println!("cpu: {}", cpu());
    let memory = Memory::new();
    println!("plain read loop, 768 MiB: {:.1} GB/s", memory.read_bandwidth());
    for kernels in Kernels::supported().filter(|kernels| asked(&Kernels::NAMES, kernels.name())) {
        if kernels.name() == "scalar" && !words.iter().any(|word| word == "scalar") {
            continue;
        }
        if asked(&parts, "matmul") {
            println!(
                "\n{:8} {:6} {:>12} {:>10} {:>10} {:>10} {:>10} {:>10}",
                "set", "format", "shape", "hot", "cold", "cold", "8 rows", "128 rows"
            );
            println!(
                "{:8} {:6} {:>12} {:>10} {:>10} {:>10} {:>10} {:>10}",
                "", "", "", "GMAC/s", "GMAC/s", "GB/s", "GMAC/s", "GMAC/s"
            );
            let names = Format::ALL.map(Format::name);
            for format in Format::ALL.into_iter().filter(|format| asked(&names, format.name())) {
                for (rows, cols) in SHAPES {
                    products(kernels, format, rows, cols, &memory);
                }
            }
        }
        if asked(&parts, "attention") {
            println!();
            for positions in [512, 4096] {
                attention(kernels, positions, true);
                attention(kernels, positions, false);
            }
        }
    }
}

/// One large allocation, filled with weights that have ordinary scales.
struct Memory(Vec<u8>);

impl Memory {
    fn new() -> Self {
        // f16 0x2c66 is 0.07, also as two bytes of f32 or bf16 an ordinary number; as nibbles it is as good as any.
        Self([0x66, 0x2c].repeat((COLD_BYTES + 64) / 2))
    }

    /// Copies of a packed matrix of so many bytes.
    fn tiles(&self, bytes: usize) -> impl Iterator<Item = &[u8]> {
        self.0[self.0.as_ptr().addr().wrapping_neg() % 64..].chunks_exact(bytes)
    }

    fn read_bandwidth(&self) -> f64 {
        let time = best(1, || {
            let mut sum = [0u64; 32];
            for bytes in self.0.as_chunks::<256>().0 {
                for (sum, word) in sum.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *sum = sum.wrapping_add(u64::from_le_bytes(*word));
                }
            }
            black_box(sum);
        });
        self.0.len() as f64 / time / 1e9
    }
}

fn products(kernels: Kernels, format: Format, rows: usize, cols: usize, memory: &Memory) {
    let bytes = packed_bytes(format, rows, cols).expect("a small shape");
    let matrix = |tiles| Matrix::new(format, rows, cols, tiles).expect("aligned tiles");
    let groups = rows / 16;
    let x: Vec<f32> = (0..padded_cols(cols) * PREFILL).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let mut q = vec![QBlock::default(); blocks_per_row(cols) * PREFILL];
    for (x, q) in x.chunks(padded_cols(cols)).zip(q.chunks_mut(blocks_per_row(cols))) {
        kernels.quantize(x, q);
    }
    let input = |n: usize| {
        if format.is_quantized() {
            Rows::Quantized(&q[..n * blocks_per_row(cols)])
        } else {
            Rows::Dense(&x[..n * padded_cols(cols)])
        }
    };
    let mut out = vec![0.0; rows * PREFILL];
    let macs = (rows * cols) as f64;
    let first = matrix(memory.tiles(bytes).next().expect("fits"));
    let mut run = |w: &Matrix<'_>, n: usize| {
        kernels.matmul(w, 0..groups, input(n), n, &mut out[..rows * n]);
        black_box(&mut out);
    };
    let hot = (bytes <= HOT_BYTES).then(|| macs / best(8, || run(&first, 1)) / 1e9);
    let copies = memory.tiles(bytes).count();
    let cold = best(1, || memory.tiles(bytes).for_each(|tiles| run(&matrix(tiles), 1))) / copies as f64;
    let few = 8.0 * macs / best(1, || run(&first, 8)) / 1e9;
    let many = PREFILL as f64 * macs / best(1, || run(&first, PREFILL)) / 1e9;
    let hot = hot.map_or("-".to_owned(), |hot| format!("{hot:.1}"));
    println!(
        "{:8} {:6} {:>12} {hot:>10} {:>10.1} {:>10.1} {few:>10.1} {many:>10.1}",
        kernels.name(),
        format.name(),
        format!("{rows}x{cols}"),
        macs / cold / 1e9,
        bytes as f64 / cold / 1e9,
    );
}

/// One decoded token of SmolLM2-135M: 9 query heads on 3 KV heads of 64, 30 layers; hot where all layers are the first.
fn attention(kernels: Kernels, positions: usize, hot: bool) {
    let (layers, kv_heads, heads, head_dim) = (30, 3, 3, 64);
    let blocks = positions / 64;
    let plane_len = blocks * kv_block_len(head_dim);
    // f16 0x2c66 is 0.07.
    let cache = vec![0x2c66u16; if hot { kv_heads } else { layers * kv_heads } * plane_len];
    let table: Vec<u32> = (0..blocks as u32).collect();
    let q = vec![0.5; heads * head_dim];
    let mut out = vec![0.0; heads * head_dim];
    let mut scratch = AttentionScratch::new();
    let time = best(1, || {
        for plane in cache.chunks_exact(plane_len).cycle().take(layers * kv_heads) {
            let args = AttentionArgs { q: &q, heads, head_dim, plane, table: &table, positions, scale: 0.125 };
            kernels.attention(&args, &mut out, &mut scratch);
            black_box(&mut out);
        }
    });
    println!(
        "{:8} attention, 30 layers, 9 heads on 3 of 64, {positions:4} positions, {}: {:.3} ms a token, {:.1} GB/s",
        kernels.name(),
        if hot { " hot" } else { "cold" },
        time * 1e3,
        (layers * kv_heads * plane_len * 2) as f64 / time / 1e9
    );
}

/// Seconds of one call, the best over [`TIME`] of batches of `batch`.
fn best(batch: u32, mut f: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::MAX);
    let mut rounds = 0;
    while rounds < 3 || start.elapsed() < TIME {
        let t = Instant::now();
        (0..batch).for_each(|_| f());
        best = best.min(t.elapsed().as_secs_f64() / f64::from(batch));
        rounds += 1;
    }
    best
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find(|line| line.starts_with("model name"));
    name.and_then(|line| line.split(": ").nth(1)).unwrap_or(std::env::consts::ARCH).to_owned()
}
