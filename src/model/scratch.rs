//! The buffers of a step, all taken at boot: rows, each operation's input in the forms its matrices need, and what every worker
//! has for itself. Counted by `plan`, filled by `model::forward`; next on the data's way: `kernels`.

use hearth_kernels::{
    AttentionScratch, Buffer, Kernels, Matrix, QBlock, QBlockK, ROW_GROUP, RowKind, Rows, SUPER_BLOCK, TILE_K,
    attention_part_len, blocks_per_row, k_blocks_per_row,
};

use crate::model::hyper::Hyper;
use crate::model::kv::blocks_for;
use crate::sys::map::touch;

/// Up to this many rows, each worker prepares all of an operation's inputs itself; beyond, rows are shared out first.
pub(super) const REDUNDANT_ROWS: usize = 4;
/// Row groups a chunk that a worker's buffer holds with the most rows: what kernels set up once a call pays over as many.
pub(super) const MOST_GROUPS: usize = 4;

/// Query heads of one kv head, those of several rows together, that share a pass over keys and values: what the widest kernels
/// hold sums of in registers.
const ATTENTION_HEADS: usize = 12;

/// Every buffer of a step, sized once.
#[derive(Debug)]
pub struct Scratch {
    pub(super) max_rows: usize,
    pub(super) max_outputs: usize,
    /// Residual stream, `[n_embd / 16][rows][16]`.
    pub(super) x: Buffer<f32>,
    /// `[(q_rows + 2 kv_rows) / 16][rows][16]`.
    pub(super) qkv: Buffer<f32>,
    /// Attention's output, `[kv heads][rows][heads of the group × head_dim]`.
    pub(super) attention: Buffer<f32>,
    /// Shares of attention, one a KV block, of up to [`shared_rows`] rows: `[row][kv head][block]`.
    pub(super) parts: Buffer<f32>,
    /// SwiGLU's output, `[n_ff / 16][rows][16]`.
    pub(super) ffn: Buffer<f32>,
    /// Rows whose logits are wanted, `[n_embd / 16][outputs][16]`.
    pub(super) last: Buffer<f32>,
    /// `[n_vocab / 16, rounded up][outputs][16]`.
    pub(super) logits: Buffer<f32>,
    /// Logits rows in the last step.
    pub(super) outputs: usize,
    /// `[rows][rope pairs]` of (cos, sin).
    pub(super) angles: Vec<[f32; 2]>,
    /// Inputs shared by all workers, when rows are many.
    pub(super) shared: Input,
    pub(super) workers: Vec<WorkerScratch>,
}

/// One operation's input rows, in the forms its matrices need.
#[derive(Debug)]
pub(super) struct Input {
    /// `[rows][blocks_per_row(width)]`.
    pub(super) quantized: Vec<QBlock>,
    /// `[rows][k_blocks_per_row(width)]`.
    pub(super) quantized_k: Vec<QBlockK>,
    /// `[rows][width padded to 64]`.
    pub(super) dense: Buffer<f32>,
}

/// What each worker has for itself.
#[derive(Debug)]
pub(super) struct WorkerScratch {
    pub(super) input: Input,
    pub(super) work: Work,
}

#[derive(Debug)]
pub(super) struct Work {
    /// One row, padded, or one chunk of a matrix product.
    pub(super) values: Buffer<f32>,
    pub(super) attention: AttentionScratch,
}

impl Scratch {
    /// Takes every buffer for steps of up to `max_rows` rows with up to `max_outputs` rows of logits, of sequences of up to `ctx`
    /// positions.
    pub fn new(hyper: &Hyper, ctx: usize, max_rows: usize, max_outputs: usize, threads: usize) -> Self {
        let redundant = max_rows.min(REDUNDANT_ROWS);
        Self {
            max_rows,
            max_outputs,
            x: Buffer::new(hyper.n_embd * max_rows),
            qkv: Buffer::new(qkv_rows(hyper) * max_rows),
            attention: Buffer::new(hyper.q_rows() * max_rows),
            parts: Buffer::new(parts_len(hyper, ctx, max_rows, threads)),
            ffn: Buffer::new(hyper.n_ff * max_rows),
            last: Buffer::new(hyper.n_embd * max_outputs),
            logits: Buffer::new(hyper.n_vocab.next_multiple_of(ROW_GROUP) * max_outputs),
            outputs: 0,
            angles: vec![[0.0; 2]; hyper.rope.dims / 2 * max_rows],
            shared: Input::new(hyper, max_rows),
            workers: (0..threads)
                .map(|_| WorkerScratch {
                    input: Input::new(hyper, redundant),
                    work: Work {
                        values: Buffer::new(values_len(hyper, max_rows, max_outputs)),
                        attention: AttentionScratch::new(),
                    },
                })
                .collect(),
        }
    }

    /// Makes every page of the large buffers memory now, not when a step first writes to it.
    pub fn touch(&mut self) {
        let Self { x, qkv, attention, parts, ffn, last, logits, .. } = self;
        [x, qkv, attention, parts, ffn, last, logits].into_iter().for_each(|values| touch(values));
        touch(&mut self.angles);
        let workers = self.workers.iter_mut().map(|worker| {
            touch(&mut worker.work.values);
            &mut worker.input
        });
        for input in std::iter::once(&mut self.shared).chain(workers) {
            touch(&mut input.quantized);
            touch(&mut input.quantized_k);
            touch(&mut input.dense);
        }
    }

    /// Bytes that [`Scratch::new`] takes.
    pub fn bytes(hyper: &Hyper, ctx: usize, max_rows: usize, max_outputs: usize, threads: usize) -> usize {
        let redundant = max_rows.min(REDUNDANT_ROWS);
        let of_rows = [hyper.n_embd, qkv_rows(hyper), hyper.q_rows(), hyper.n_ff].map(|width| width * max_rows);
        let of_outputs = [hyper.n_embd, hyper.n_vocab.next_multiple_of(ROW_GROUP)].map(|width| width * max_outputs);
        let parts = parts_len(hyper, ctx, max_rows, threads);
        let buffers: usize = of_rows.into_iter().chain(of_outputs).chain([parts]).map(Buffer::<f32>::bytes).sum();
        let worker = Input::bytes(hyper, redundant)
            + Buffer::<f32>::bytes(values_len(hyper, max_rows, max_outputs))
            + size_of::<WorkerScratch>()
            + AttentionScratch::HEAP_BYTES;
        buffers + hyper.rope.dims * max_rows * size_of::<f32>() + Input::bytes(hyper, max_rows) + threads * worker
    }

    /// Most rows a step may have.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Most rows of logits a step may give.
    pub fn max_outputs(&self) -> usize {
        self.max_outputs
    }

    /// Copies the logits of the step's `output`-th wanted row to `row`, `n_vocab` values.
    pub fn copy_logits(&self, output: usize, row: &mut [f32]) {
        if self.outputs == 1 {
            let len = row.len();
            row.copy_from_slice(&self.logits[..len]);
            return;
        }
        for (group, values) in row.chunks_mut(ROW_GROUP).enumerate() {
            let from = (group * self.outputs + output) * ROW_GROUP;
            values.copy_from_slice(&self.logits[from..from + values.len()]);
        }
    }
}

impl Input {
    fn new(hyper: &Hyper, rows: usize) -> Self {
        let width = widest(hyper);
        Self {
            quantized: vec![QBlock::default(); rows * blocks_per_row(width)],
            quantized_k: vec![QBlockK::default(); rows * width.div_ceil(SUPER_BLOCK)],
            dense: Buffer::new(rows * padded(width)),
        }
    }

    fn bytes(hyper: &Hyper, rows: usize) -> usize {
        let width = widest(hyper);
        let k = width.div_ceil(SUPER_BLOCK) * size_of::<QBlockK>();
        rows * (blocks_per_row(width) * size_of::<QBlock>() + k) + Buffer::<f32>::bytes(rows * padded(width))
    }

    /// The first `rows` rows of `width` values, in the form that `matrix` multiplies.
    pub(super) fn rows(&self, matrix: &Matrix<'_>, rows: usize, width: usize) -> Rows<'_> {
        match matrix.format().row_kind() {
            RowKind::Quantized => Rows::Quantized(&self.quantized[..rows * blocks_per_row(width)]),
            RowKind::QuantizedK => Rows::QuantizedK(&self.quantized_k[..rows * k_blocks_per_row(width)]),
            RowKind::Dense => Rows::Dense(&self.dense[..rows * padded(width)]),
        }
    }

    /// Writes a prepared row, padded to 64, as row `t` in the forms that are needed.
    pub(super) fn emit(&mut self, kernels: Kernels, needs: Needs, t: usize, row: &[f32], width: usize) {
        if needs.quantized {
            let blocks = blocks_per_row(width);
            kernels.quantize(&row[..width], &mut self.quantized[t * blocks..][..blocks]);
        }
        if needs.quantized_k {
            let blocks = k_blocks_per_row(width);
            kernels.quantize_k(&row[..width], &mut self.quantized_k[t * blocks..][..blocks]);
        }
        if needs.dense {
            self.dense[t * row.len()..][..row.len()].copy_from_slice(row);
        }
    }
}

/// Which forms of its input an operation's matrices need.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub(super) quantized: bool,
    pub(super) quantized_k: bool,
    pub(super) dense: bool,
}

impl Needs {
    pub(super) fn of(matrices: &[&Matrix<'_>]) -> Self {
        let any = |kind| matrices.iter().any(|matrix| matrix.format().row_kind() == kind);
        Self { quantized: any(RowKind::Quantized), quantized_k: any(RowKind::QuantizedK), dense: any(RowKind::Dense) }
    }
}

pub(super) const fn padded(width: usize) -> usize {
    width.next_multiple_of(TILE_K)
}

pub(super) fn qkv_rows(hyper: &Hyper) -> usize {
    hyper.q_rows() + 2 * hyper.kv_rows()
}

fn widest(hyper: &Hyper) -> usize {
    hyper.n_embd.max(hyper.n_ff).max(hyper.q_rows())
}

/// Up to how many rows the workers share every row's attention: those that have too few kv heads to go round.
pub(super) fn shared_rows(hyper: &Hyper, max_rows: usize, threads: usize) -> usize {
    if threads == 1 { 0 } else { ((2 * threads - 1) / hyper.n_head_kv).min(REDUNDANT_ROWS).min(max_rows) }
}

fn parts_len(hyper: &Hyper, ctx: usize, max_rows: usize, threads: usize) -> usize {
    let planes = shared_rows(hyper, max_rows, threads) * hyper.n_head_kv;
    planes * blocks_for(ctx) * attention_part_len(hyper.group_heads(), hyper.head_dim)
}

/// Rows whose heads of one group go through attention together at most.
pub(super) fn attention_rows(hyper: &Hyper) -> usize {
    (ATTENTION_HEADS / hyper.group_heads()).max(1)
}

/// Values of a worker's own buffer: a padded row, a chunk of any product, a key and a value, or the queries of one call.
fn values_len(hyper: &Hyper, max_rows: usize, max_outputs: usize) -> usize {
    let chunk = ROW_GROUP * MOST_GROUPS * max_rows.max(max_outputs);
    let queries = attention_rows(hyper) * hyper.group_heads() * hyper.head_dim;
    padded(widest(hyper)).max(chunk).max(2 * hyper.head_dim).max(queries)
}
