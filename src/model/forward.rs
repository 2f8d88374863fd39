//! One step of the transformer: rows of (token, sequence, position) in, rows of logits out.
//!
//! Activations lie row-group-major, `[width / 16][rows][16]`, the layout in which the kernels write a matrix product: a worker's
//! share of an operation is one contiguous slice. A row's values depend on its own sequence alone, so batches, chunks and
//! threads never change a bit. Five operations a layer, one fork-join each:
//! QKV + rotary · attention · output + residual · gate/up + SwiGLU · down + residual; norm and quantization are recomputed by
//! each worker while rows are few, and shared out over rows in prefill.
//! Called by `engine`; next on the data's way: `kernels`, then `engine::sampler`.

use std::ops::Range;

use hearth_kernels::{Kernels, Matrix, ROW_GROUP, blocks_per_row, k_blocks_per_row};

use crate::model::Model;
use crate::model::kv::{BlockTable, KvCache};
use crate::model::rope;
use crate::model::scratch::{
    Input, MOST_GROUPS, Needs, REDUNDANT_ROWS, Scratch, Work, WorkerScratch, padded, qkv_rows, shared_rows,
};
use crate::sys::workers::Workers;
use crate::text::TokenId;

mod attention;
use attention::{Past, Shares};

/// One row of a step.
#[derive(Clone, Copy, Debug)]
pub struct BatchRow {
    /// The token at `position`.
    pub token: TokenId,
    /// Index into the step's block tables.
    pub sequence: usize,
    /// Position in its sequence, from 0. All earlier positions are in the cache or in earlier rows of this step.
    pub position: usize,
    /// Whether the logits after this row are wanted.
    pub logits: bool,
}

/// Row groups a chunk at least: output and down projections, gate/up; and of the head.
const RESIDUAL_GROUPS: usize = 2;
const FFN_GROUPS: usize = 2;
const HEAD_GROUPS: usize = 16;
/// Bytes of the next operation's weights that a worker fetches before it waits: what the hardware needs to see the stream.
const FETCH_BYTES: usize = 4096;
/// Chunks a worker at least, where there are enough: so few that calls cost nothing beside their work, so many that helping a
/// worker that fell behind pays.
const CHUNKS_A_WORKER: usize = 8;

/// Where an operation's input rows come from.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// RMSNorm of `[width / 16][rows][16]`.
    Norm { x: &'a [f32], weight: &'a [f32], eps: f32 },
    /// `[planes][rows][width / planes]` as it is.
    PlaneMajor { x: &'a [f32], planes: usize },
    /// `[width / 16][rows][16]` as it is.
    GroupMajor(&'a [f32]),
    /// Attention, to be combined.
    Shares(Shares<'a>),
}

/// Runs one step. Logits of the rows that want them are then in `scratch`, in row order.
///
/// # Panics
/// More rows or outputs than `scratch` was made for, a token outside the vocabulary, or a table that does not cover a position:
/// the scheduler checks all three.
pub fn forward(
    model: &Model<'_>,
    kernels: Kernels,
    cache: &mut KvCache,
    tables: &[BlockTable],
    rows: &[BatchRow],
    scratch: &mut Scratch,
    workers: &mut Workers,
) {
    let hyper = &model.hyper;
    let n = rows.len();
    assert!(n <= scratch.max_rows, "{n} rows, room for {}", scratch.max_rows);
    let pairs = model.rope.pairs();
    let qkv_rows = qkv_rows(hyper);

    let x = &mut scratch.x[..hyper.n_embd * n];
    let qkv = &mut scratch.qkv[..qkv_rows * n];
    let attention = &mut scratch.attention[..hyper.q_rows() * n];
    let parts = &mut *scratch.parts;
    let ffn = &mut scratch.ffn[..hyper.n_ff * n];
    let angles = &mut scratch.angles[..pairs * n];
    let max_rows = scratch.max_rows;
    workers.begin_step(n <= REDUNDANT_ROWS);
    let (shared, own) = (&mut scratch.shared, &mut scratch.workers);
    let mut step = Step { n, max_rows, kernels, workers, next: &[], shared, scratch: own };

    for (t, row) in rows.iter().enumerate() {
        step.embed(&model.weights.embeddings, row.token, t, x);
        model.rope.angles(row.position, &mut angles[t * pairs..][..pairs]);
    }
    let angles = &*angles;

    for (index, layer) in model.weights.layers.iter().enumerate() {
        let norm = Source::Norm { x, weight: &layer.attn_norm, eps: hyper.rms_eps };
        let [q, k, v] = &layer.qkv;
        let head_groups = hyper.head_dim / ROW_GROUP;
        step.next = layer.attn_output.tiles();
        let rotated_heads = hyper.n_head + hyper.n_head_kv;
        step.product(norm, hyper.n_embd, &[q, k, v], qkv, head_groups, |call, input, _, head, out| {
            let groups = head * head_groups..(head + 1) * head_groups;
            let (matrix, groups) = locate(&layer.qkv, groups);
            call.matmul(matrix, groups, input, hyper.n_embd, out);
            if head < rotated_heads {
                for t in 0..n {
                    rope::rotate(&mut out[t * ROW_GROUP..], n * ROW_GROUP, &angles[t * pairs..][..pairs]);
                }
            }
        });
        step.store(hyper, cache, index, tables, rows, qkv);
        let past = Past { hyper, cache, layer: index, tables };
        let source = if n <= shared_rows(hyper, max_rows, step.workers.threads()) {
            let parts = &mut parts[..n * hyper.n_head_kv * Shares::blocks(rows) * Shares::part_len(hyper)];
            step.attend_together(past, rows, qkv, parts);
            Source::Shares(Shares { parts, rows, hyper })
        } else {
            step.attend(past, rows, qkv, attention);
            Source::PlaneMajor { x: attention, planes: hyper.n_head_kv }
        };

        step.next = layer.gate.tiles();
        step.residual(source, hyper.q_rows(), &layer.attn_output, x);

        step.next = layer.down.tiles();
        let norm = Source::Norm { x, weight: &layer.ffn_norm, eps: hyper.rms_eps };
        let chunk_groups = step.chunk_groups(layer.gate.row_groups(), FFN_GROUPS);
        step.product(
            norm,
            hyper.n_embd,
            &[&layer.gate, &layer.up],
            ffn,
            chunk_groups,
            |call, input, work, chunk, gate| {
                let first = chunk * chunk_groups;
                let groups = first..first + gate.len() / (n * ROW_GROUP);
                let up = &mut work.values[..gate.len()];
                call.matmul(&layer.gate, groups.clone(), input, hyper.n_embd, gate);
                call.matmul(&layer.up, groups, input, hyper.n_embd, up);
                call.kernels.silu_mul(gate, up);
            },
        );
        step.next =
            model.weights.layers.get(index + 1).map_or(model.weights.output.tiles(), |next| next.qkv[0].tiles());
        step.residual(Source::GroupMajor(ffn), hyper.n_ff, &layer.down, x);
    }

    // The head, for the rows that want it.
    let outputs = rows.iter().filter(|row| row.logits).count();
    assert!(outputs <= scratch.max_outputs, "{outputs} outputs, room for {}", scratch.max_outputs);
    scratch.outputs = outputs;
    if outputs == 0 {
        return;
    }
    let last = &mut scratch.last[..hyper.n_embd * outputs];
    for (output, (t, _)) in rows.iter().enumerate().filter(|(_, row)| row.logits).enumerate() {
        for group in 0..hyper.n_embd / ROW_GROUP {
            let from = (group * n + t) * ROW_GROUP;
            let to = (group * outputs + output) * ROW_GROUP;
            last[to..to + ROW_GROUP].copy_from_slice(&x[from..from + ROW_GROUP]);
        }
    }
    step.n = outputs;
    step.next = model.weights.layers.first().map_or(&[], |first| first.qkv[0].tiles());
    let head = &model.weights.output;
    let norm = Source::Norm { x: last, weight: &model.weights.output_norm, eps: hyper.rms_eps };
    let logits = &mut scratch.logits[..head.row_groups() * ROW_GROUP * outputs];
    step.product(norm, hyper.n_embd, &[head], logits, HEAD_GROUPS, |call, input, _, chunk, out| {
        let first = chunk * HEAD_GROUPS;
        let groups = first..first + out.len() / (outputs * ROW_GROUP);
        call.matmul(head, groups, input, hyper.n_embd, out);
    });
}

/// The state of row `row` of the last step's `n`, behind the last norm: what the head would see. `out`: `[n_embd]`.
pub fn hidden_state(model: &Model<'_>, kernels: Kernels, scratch: &Scratch, n: usize, row: usize, out: &mut [f32]) {
    let x = &scratch.x[..model.hyper.n_embd * n];
    kernels.rms_norm(&x[row * ROW_GROUP..], n * ROW_GROUP, &model.weights.output_norm, model.hyper.rms_eps, out);
}

/// What the operations of one step share.
struct Step<'s> {
    /// Rows.
    n: usize,
    /// Rows that the buffers were made for.
    max_rows: usize,
    kernels: Kernels,
    workers: &'s mut Workers,
    /// Weights of the operation after the one in hand.
    next: &'s [u8],
    shared: &'s mut Input,
    scratch: &'s mut [WorkerScratch],
}

/// Multiplies one operation's prepared rows.
#[derive(Clone, Copy)]
struct Call {
    n: usize,
    kernels: Kernels,
}

impl Call {
    fn matmul(self, matrix: &Matrix<'_>, groups: Range<usize>, input: &Input, width: usize, out: &mut [f32]) {
        self.kernels.matmul(matrix, groups, input.rows(matrix, self.n, width), self.n, out);
    }
}

impl Step<'_> {
    /// Row groups a chunk of a matrix with `total` of them, at least `least`; a chunk's values fit [`Work::values`].
    fn chunk_groups(&self, total: usize, least: usize) -> usize {
        let fair = total / (self.workers.threads() * CHUNKS_A_WORKER);
        fair.min(MOST_GROUPS * self.max_rows / self.n.max(1)).max(least)
    }

    /// The token's embedding, dequantized, as row `t` of `x`.
    fn embed(&mut self, embeddings: &Matrix<'_>, token: TokenId, t: usize, x: &mut [f32]) {
        let row = &mut self.scratch[0].work.values[..embeddings.cols()];
        embeddings.unpack_row(token.index(), row);
        for (group, values) in row.chunks_exact(ROW_GROUP).enumerate() {
            x[(group * self.n + t) * ROW_GROUP..][..ROW_GROUP].copy_from_slice(values);
        }
    }

    /// Prepares the source's rows, then has each chunk of `groups` row groups of `out` computed by `body`.
    fn product(
        &mut self,
        source: Source<'_>,
        width: usize,
        matrices: &[&Matrix<'_>],
        out: &mut [f32],
        groups: usize,
        body: impl Fn(Call, &Input, &mut Work, usize, &mut [f32]) + Sync,
    ) {
        let (n, kernels) = (self.n, self.kernels);
        let needs = Needs::of(matrices);
        let call = Call { n, kernels };
        let chunk_len = groups * n * ROW_GROUP;
        let fetch_next = fetch(kernels, self.next);
        if n <= REDUNDANT_ROWS {
            let prepare_all = |own: &mut WorkerScratch| {
                for t in 0..n {
                    prepare(kernels, source, n, t, width, &mut own.work.values);
                    own.input.emit(kernels, needs, t, &own.work.values[..padded(width)], width);
                }
            };
            self.workers.chunks(self.scratch, out, chunk_len, fetch_next, prepare_all, |own, index, out| {
                body(call, &own.input, &mut own.work, index, out);
            });
            return;
        }
        if needs.quantized {
            let rows = &mut self.shared.quantized[..n * blocks_per_row(width)];
            self.workers.chunks(
                self.scratch,
                rows,
                blocks_per_row(width),
                |_, _| (),
                |_| (),
                |own, t, row| {
                    prepare(kernels, source, n, t, width, &mut own.work.values);
                    kernels.quantize(&own.work.values[..width], row);
                },
            );
        }
        if needs.quantized_k {
            let rows = &mut self.shared.quantized_k[..n * k_blocks_per_row(width)];
            self.workers.chunks(
                self.scratch,
                rows,
                k_blocks_per_row(width),
                |_, _| (),
                |_| (),
                |own, t, row| {
                    prepare(kernels, source, n, t, width, &mut own.work.values);
                    kernels.quantize_k(&own.work.values[..width], row);
                },
            );
        }
        if needs.dense {
            let rows = &mut self.shared.dense[..n * padded(width)];
            self.workers.chunks(
                self.scratch,
                rows,
                padded(width),
                |_, _| (),
                |_| (),
                |_, t, row| prepare(kernels, source, n, t, width, row),
            );
        }
        let input = &*self.shared;
        self.workers.chunks(
            self.scratch,
            out,
            chunk_len,
            fetch_next,
            |_| (),
            |own, index, out| body(call, input, &mut own.work, index, out),
        );
    }

    /// `x += matrix * source`.
    fn residual(&mut self, source: Source<'_>, width: usize, matrix: &Matrix<'_>, x: &mut [f32]) {
        let n = self.n;
        let chunk_groups = self.chunk_groups(matrix.row_groups(), RESIDUAL_GROUPS);
        self.product(source, width, &[matrix], x, chunk_groups, |call, input, work, chunk, x| {
            let first = chunk * chunk_groups;
            let delta = &mut work.values[..x.len()];
            call.matmul(matrix, first..first + x.len() / (n * ROW_GROUP), input, width, delta);
            for (x, delta) in x.iter_mut().zip(delta) {
                *x += *delta;
            }
        });
    }
}

/// Writes row `t` of the source to `out`, `width` values and zeros up to the padded width.
fn prepare(kernels: Kernels, source: Source<'_>, n: usize, t: usize, width: usize, out: &mut [f32]) {
    let out = &mut out[..padded(width)];
    match source {
        Source::Norm { x, weight, eps } => {
            kernels.rms_norm(&x[t * ROW_GROUP..], n * ROW_GROUP, weight, eps, &mut out[..width])
        }
        Source::PlaneMajor { x, planes } => {
            let len = width / planes;
            for (x, out) in x.chunks_exact(n * len).zip(out[..width].chunks_exact_mut(len)) {
                out.copy_from_slice(&x[t * len..][..len]);
            }
        }
        Source::GroupMajor(x) => gather(x, n, t, 0, &mut out[..width]),
        Source::Shares(shares) => shares.combine(kernels, t, &mut out[..width]),
    }
    out[width..].fill(0.0);
}

/// What a worker does before it waits: it fetches the beginning of its share of `tiles`, the next operation's weights.
fn fetch(kernels: Kernels, tiles: &[u8]) -> impl Fn(usize, usize) + Sync {
    move |worker, of| {
        let share = &tiles[tiles.len() * worker / of..];
        kernels.prefetch(&share[..share.len().min(FETCH_BYTES)]);
    }
}

/// Row `t` of `[groups][n][16]`, from row group `first_group` on, to contiguous values.
fn gather(x: &[f32], n: usize, t: usize, first_group: usize, out: &mut [f32]) {
    let x = x.as_chunks::<ROW_GROUP>().0;
    for (group, values) in out.as_chunks_mut::<ROW_GROUP>().0.iter_mut().enumerate() {
        *values = x[(first_group + group) * n + t];
    }
}

/// The matrix of a stack that holds row groups `groups` of the stack, and those groups' numbers within it.
fn locate<'a, 'm>(stack: &'a [Matrix<'m>; 3], groups: Range<usize>) -> (&'a Matrix<'m>, Range<usize>) {
    let [first, second, third] = stack;
    let (a, b) = (first.row_groups(), first.row_groups() + second.row_groups());
    match groups.start {
        start if start < a => (first, groups),
        start if start < b => (second, start - a..groups.end - a),
        start => (third, start - b..groups.end - b),
    }
}
