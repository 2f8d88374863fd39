//! Speed of every kernel set on the shapes of SmolLM2-135M, beside what the machine gives in the same run: bandwidth of
//! reads (the best way of `ReadPlan`) and, per set, its multiplication instruction alone. One thread; sets take turns within a measurement, the best of
//! many counts. Arguments (any order): names of formats or sets to keep to, `attention`, `matmul`, `gemm`.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use hearth_kernels::{
    AttentionArgs, AttentionScratch, Buffer, Format, Kernels, Matrix, QBlock, QBlockK, ROW_GROUP, ReadPlan, RowKind,
    Rows, blocks_per_row, k_blocks_per_row, kv_block_len, pack_row_group, packed_bytes, padded_cols,
};

/// Output × input features.
const SHAPES: [(usize, usize); 4] = [(576, 576), (1536, 576), (576, 1536), (49152, 576)];
/// Bytes of copies of a matrix that no cache here holds.
const COLD_BYTES: usize = 768 << 20;
/// A matrix larger than this is not called hot; a read loop over so much is what a cache gives.
const HOT_BYTES: usize = 1 << 20;
const FEW: usize = 8;
const PREFILL: usize = 128;
/// Length of a measurement, per set.
const TIME: Duration = Duration::from_millis(120);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let asked = |names: &[&str], name: &str| {
        let any = words.iter().any(|word| names.contains(&word.as_str()));
        !any || words.iter().any(|word| word == name)
    };
    // The specification is slow and nobody runs it: only if asked for.
    let sets: Vec<Kernels> = Kernels::supported()
        .filter(|set| asked(&Kernels::NAMES, set.name()))
        .filter(|set| set.name() != "scalar" || words.iter().any(|word| word == "scalar"))
        .collect();
    let machine = Machine::measure(&sets);
    if asked(&["matmul", "attention", "gemm"], "matmul") {
        println!(
            "\nGMAC/s; one row also GB/s and % of the lower of peak and reads (hot 1 MiB, cold 768 MiB); several rows: % of peak"
        );
        println!(
            "{:10} {:5} {:>10} {:>22} {:>22} {:>13} {:>13} {:>13}",
            "set", "", "", "1 row, hot", "1 row, cold", "8 rows, hot", "8 rows, cold", "128 rows"
        );
        let names = Format::ALL.map(Format::name);
        for format in Format::ALL.into_iter().filter(|format| asked(&names, format.name())) {
            for (rows, cols) in SHAPES {
                products(&sets, format, rows, cols, &machine);
            }
        }
    }
    if asked(&["matmul", "attention", "gemm"], "gemm") {
        println!("\nF32 products beside the gemm crate, GMAC/s, and how many of its sums have the same bits");
        for (rows, cols) in [(576, 512), (576, 576), (576, 1536)] {
            for n in [1, FEW, PREFILL] {
                beside_gemm(&sets, rows, cols, n);
            }
        }
    }
    if asked(&["matmul", "attention", "gemm"], "attention") {
        println!("\nattention, 30 layers, 9 heads on 3 of 64, ms a token and GB/s of keys and values");
        for positions in [512, 4096] {
            attention(&sets, positions, true);
            attention(&sets, positions, false);
        }
    }
}

/// What the machine gives, and one large allocation, filled with weights that have ordinary scales.
struct Machine {
    memory: Vec<u8>,
    /// Bytes a second of reads alone.
    cache_bandwidth: f64,
    memory_bandwidth: f64,
    /// Multiplications a second of each set's instruction alone: int8, f32.
    peaks: Vec<[f64; 2]>,
}

impl Machine {
    fn measure(sets: &[Kernels]) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = info.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        println!("cpu: {}", name.unwrap_or(std::env::consts::ARCH));
        // f16 0x2c66 is 0.07, also as two bytes of f32 or bf16 an ordinary number; as nibbles it is as good as any.
        let memory = [0x66, 0x2c].repeat((COLD_BYTES + 64) / 2);
        let plans: Vec<ReadPlan> = ReadPlan::all().collect();
        let bandwidth = |bytes: usize| {
            let times = best(&plans, 1, |plan| {
                black_box(Kernels::detect().read(plan, &memory[..bytes]));
            });
            bytes as f64 / times.into_iter().fold(f64::MAX, f64::min)
        };
        let (cache_bandwidth, memory_bandwidth) = (bandwidth(HOT_BYTES), bandwidth(COLD_BYTES));
        println!(
            "reads, the best of {} ways: {:.1} GB/s of 1 MiB, {:.1} GB/s of 768 MiB",
            plans.len(),
            cache_bandwidth / 1e9,
            memory_bandwidth / 1e9
        );
        let peaks: Vec<_> = sets.iter().map(|set| peak::of(set.name())).collect();
        for (set, [int8, f32]) in sets.iter().zip(&peaks) {
            println!("peak of {}: {:.0} GMAC/s int8, {:.0} f32", set.name(), int8 / 1e9, f32 / 1e9);
        }
        Self { memory, cache_bandwidth, memory_bandwidth, peaks }
    }

    /// Copies of a packed matrix of so many bytes.
    fn tiles(&self, bytes: usize) -> impl Iterator<Item = &[u8]> {
        self.memory[self.memory.as_ptr().addr().wrapping_neg() % 64..].chunks_exact(bytes)
    }
}

fn products(sets: &[Kernels], format: Format, rows: usize, cols: usize, machine: &Machine) {
    // Rows of the K formats are whole super-blocks: a little longer here.
    let cols = cols.next_multiple_of(format.block_cols());
    let bytes = packed_bytes(format, rows, cols).expect("a small shape");
    let matrix = |tiles| Matrix::new(format, rows, cols, tiles).expect("aligned tiles");
    let x: Vec<f32> = (0..padded_cols(cols) * PREFILL).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let mut q = vec![QBlock::default(); blocks_per_row(cols) * PREFILL];
    for (x, q) in x.chunks(padded_cols(cols)).zip(q.chunks_mut(blocks_per_row(cols))) {
        Kernels::detect().quantize(x, q);
    }
    let mut k = vec![QBlockK::default(); k_blocks_per_row(cols) * PREFILL];
    if format.row_kind() == RowKind::QuantizedK {
        Kernels::detect().quantize_k(&x, &mut k);
    }
    let input = |n: usize| match format.row_kind() {
        RowKind::Dense => Rows::Dense(&x[..n * padded_cols(cols)]),
        RowKind::Quantized => Rows::Quantized(&q[..n * blocks_per_row(cols)]),
        RowKind::QuantizedK => Rows::QuantizedK(&k[..n * k_blocks_per_row(cols)]),
    };
    let mut out = Buffer::new(rows * PREFILL);
    let mut run = |set: Kernels, w: &Matrix<'_>, n: usize| {
        set.matmul(w, 0..w.row_groups(), input(n), n, &mut out[..rows * n]);
        black_box(&mut out);
    };
    let first = matrix(machine.tiles(bytes).next().expect("fits"));
    let hot = (bytes <= HOT_BYTES).then(|| best(sets, 8, |set| run(set, &first, 1)));
    let copies = machine.tiles(bytes).count() as f64;
    let cold = best(sets, 1, |set| machine.tiles(bytes).for_each(|tiles| run(set, &matrix(tiles), 1)));
    let few = best(sets, 1, |set| run(set, &first, FEW));
    let few_cold = best(sets, 1, |set| machine.tiles(bytes).for_each(|tiles| run(set, &matrix(tiles), FEW)));
    let many = best(sets, 1, |set| run(set, &first, PREFILL));
    for (i, set) in sets.iter().enumerate() {
        let peak = machine.peaks[i][usize::from(format.row_kind() == RowKind::Dense)];
        let macs = (rows * cols) as f64;
        let one = |time: f64, bandwidth: f64| {
            let share = 100.0 * macs / time / peak.min(bandwidth * macs / bytes as f64);
            format!("{:6.1} {:6.1} {share:4.0}%", macs / time / 1e9, bytes as f64 / time / 1e9)
        };
        let several = |n: usize, time: f64| {
            let rate = n as f64 * macs / time;
            format!("{:6.1} {:4.0}%", rate / 1e9, 100.0 * rate / peak)
        };
        println!(
            "{:10} {:5} {:>10} {:>22} {:>22} {:>13} {:>13} {:>13}",
            set.name(),
            format.name(),
            format!("{rows}x{cols}"),
            hot.as_ref().map_or("-".to_owned(), |hot| one(hot[i], machine.cache_bandwidth)),
            one(cold[i] / copies, machine.memory_bandwidth),
            several(FEW, few[i]),
            several(FEW, few_cold[i] / copies),
            several(PREFILL, many[i]),
        );
    }
}

/// `n` rows times an F32 matrix, by every set and by the gemm crate, whose sums begin anew at a depth that it takes from the caches.
fn beside_gemm(sets: &[Kernels], rows: usize, cols: usize, n: usize) {
    let value = |i: usize| (i * 37 % 101) as f32 / 73.0 - 0.7;
    let x: Vec<f32> = (0..cols * n).map(value).collect();
    let weights: Vec<f32> = (0..cols * rows).map(|i| value(i + 5)).collect();
    let row_groups = rows.div_ceil(ROW_GROUP);
    let group_bytes = packed_bytes(Format::F32, ROW_GROUP, cols).expect("a small shape");
    let mut memory = vec![0u8; row_groups * group_bytes + 64];
    let offset = memory.as_ptr().addr().wrapping_neg() % 64;
    let tiles = &mut memory[offset..][..row_groups * group_bytes];
    for (rows, out) in weights.chunks(cols * ROW_GROUP).zip(tiles.chunks_mut(group_bytes)) {
        let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        pack_row_group(Format::F32, &bytes, rows.len() / cols, cols, out).expect("finite weights");
    }
    let matrix = Matrix::new(Format::F32, rows, cols, tiles).expect("aligned tiles");
    let padded: Vec<f32> = x
        .chunks(cols)
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, padded_cols(cols) - cols)))
        .collect();
    let (mut ours, mut theirs) = (vec![0.0f32; rows * n], vec![0.0f32; rows * n]);
    let times = best(sets, 1, |set| {
        set.matmul(&matrix, 0..row_groups, Rows::Dense(&padded), n, &mut ours);
        black_box(&mut ours);
    });
    let stride = isize::try_from(cols).expect("a small shape");
    let time = best(&[()], 1, |()| {
        // SAFETY: the strides describe `theirs` as [n][rows], `x` as [n][cols] and `weights` transposed, [rows][cols], which is how
        // long they are; none overlaps another.
        unsafe {
            gemm::gemm(
                n,
                rows,
                cols,
                theirs.as_mut_ptr(),
                1,
                isize::try_from(rows).expect("a small shape"),
                false,
                x.as_ptr(),
                1,
                stride,
                weights.as_ptr(),
                stride,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        black_box(&mut theirs);
    })[0];
    let same = (0..rows * n).filter(|i| {
        let (row, t) = (i % rows, i / rows);
        ours[(row / ROW_GROUP * n + t) * ROW_GROUP + row % ROW_GROUP].to_bits() == theirs[*i].to_bits()
    });
    let rate = |time: f64| (n * rows * cols) as f64 / time / 1e9;
    let speeds: Vec<String> =
        sets.iter().zip(times).map(|(set, time)| format!("{} {:.1}", set.name(), rate(time))).collect();
    let percent = 100.0 * same.count() as f64 / (rows * n) as f64;
    println!("{n:3} rows x {rows}x{cols}: {}, gemm {:.1}; {percent:.0} % the same", speeds.join(", "), rate(time));
}

/// One decoded token of SmolLM2-135M: 9 query heads on 3 KV heads of 64, 30 layers; hot where all layers are the first.
fn attention(sets: &[Kernels], positions: usize, hot: bool) {
    let (layers, kv_heads, heads, head_dim) = (30, 3, 3, 64);
    let blocks = positions / 64;
    let plane_len = blocks * kv_block_len(head_dim);
    // f16 0x2c66 is 0.07.
    let mut cache = Buffer::new(if hot { kv_heads } else { layers * kv_heads } * plane_len);
    cache.fill(0x2c66u16);
    let table: Vec<u32> = (0..blocks as u32).collect();
    let q = vec![0.5; heads * head_dim];
    let mut out = vec![0.0; heads * head_dim];
    let mut scratch = AttentionScratch::new();
    let times = best(sets, 1, |set| {
        for plane in cache.chunks_exact(plane_len).cycle().take(layers * kv_heads) {
            let args = AttentionArgs { q: &q, rows: 1, heads, head_dim, plane, table: &table, positions, scale: 0.125 };
            set.attention(&args, &mut out, &mut scratch);
            black_box(&mut out);
        }
    });
    for (set, time) in sets.iter().zip(times) {
        println!(
            "{:10} {positions:4} positions, {} {:8.3} ms {:6.1} GB/s",
            set.name(),
            if hot { " hot" } else { "cold" },
            time * 1e3,
            (layers * kv_heads * plane_len * 2) as f64 / time / 1e9
        );
    }
}

/// Seconds of one call for each subject, the best of batches of `batch` that take turns.
fn best<S: Copy>(subjects: &[S], batch: u32, mut f: impl FnMut(S)) -> Vec<f64> {
    let start = Instant::now();
    let mut best = vec![f64::MAX; subjects.len()];
    let mut rounds = 0;
    while rounds < 3 || start.elapsed() < TIME * subjects.len() as u32 {
        for (subject, best) in subjects.iter().zip(&mut best) {
            let t = Instant::now();
            (0..batch).for_each(|_| f(*subject));
            *best = best.min(t.elapsed().as_secs_f64() / f64::from(batch));
        }
        rounds += 1;
    }
    best
}

/// A set's multiplication instruction alone, in as many independent chains as hide its latency.
mod peak {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;

    /// Steps of a measurement; each is one instruction in each of [`CHAINS`].
    const STEPS: usize = 100_000;
    const CHAINS: usize = 12;

    /// Multiplications a second, int8 and f32; infinite for a set whose instruction is not written down here.
    pub fn of(set: &str) -> [f64; 2] {
        #[cfg(target_arch = "x86_64")]
        match set {
            // SAFETY: the set is supported, so its instructions are.
            "avx2" => return unsafe { [rate(32, || avx2_int8()), rate(8, || avx2_f32())] },
            // SAFETY: as above.
            "avx512vnni" => return unsafe { [rate(64, || avx512_int8()), rate(16, || avx512_f32())] },
            _ => {}
        }
        let _ = (set, STEPS, CHAINS);
        [f64::INFINITY; 2]
    }

    #[cfg(target_arch = "x86_64")]
    fn rate(macs: usize, f: impl Fn()) -> f64 {
        (macs * STEPS * CHAINS) as f64 / super::best(&[()], 1, |()| f())[0]
    }

    /// `$step` over [`CHAINS`] accumulators, [`STEPS`] times; the loop's values are hidden from the optimizer.
    #[cfg(target_arch = "x86_64")]
    macro_rules! chains {
        ($(#[$feature:meta])* $name:ident: $zero:expr, $x:expr, |$acc:ident, $a:ident| $step:expr) => {
            $(#[$feature])*
            fn $name() {
                let mut accs = [$zero; CHAINS];
                let $a = std::hint::black_box($x);
                for _ in 0..STEPS {
                    for acc in &mut accs {
                        let $acc = *acc;
                        *acc = $step;
                    }
                }
                std::hint::black_box(accs);
            }
        };
    }

    #[cfg(target_arch = "x86_64")]
    chains!(#[target_feature(enable = "avx2,fma")] avx2_int8:
        _mm256_setzero_si256(), _mm256_set1_epi8(1), |acc, a| _mm256_maddubs_epi16(acc, a));
    #[cfg(target_arch = "x86_64")]
    chains!(#[target_feature(enable = "avx2,fma")] avx2_f32:
        _mm256_setzero_ps(), _mm256_set1_ps(0.5), |acc, a| _mm256_fmadd_ps(a, a, acc));
    #[cfg(target_arch = "x86_64")]
    chains!(#[target_feature(enable = "avx512f,avx512bw,avx512vnni")] avx512_int8:
        _mm512_setzero_si512(), _mm512_set1_epi8(1), |acc, a| _mm512_dpbusd_epi32(acc, a, a));
    #[cfg(target_arch = "x86_64")]
    chains!(#[target_feature(enable = "avx512f,avx512bw,avx512vnni")] avx512_f32:
        _mm512_setzero_ps(), _mm512_set1_ps(0.5), |acc, a| _mm512_fmadd_ps(a, a, acc));
}
