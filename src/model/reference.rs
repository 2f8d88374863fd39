//! The same model computed in plain F32: weights dequantized, activations and keys/values never quantized, products by the
//! `gemm` crate. Slow and simple; what `--reference` of the offline tools measures hearth's own numeric model against.
//! Its sums run in another order than the kernels', so it is a value to be close to, not a hash to equal: the crate begins a new sum
//! at a depth that it takes from the caches (at 1536 columns 2 % of its sums have the kernels' bits), and takes another path for one row.
//! That, and its speed (`kernels/records/x86-64-gemm.txt`), is why the engine's dense products are the kernels' own.

use gemm::Parallelism;
use hearth_kernels::Matrix;

use crate::model::Model;
use crate::model::rope;
use crate::text::TokenId;

/// Logits of every position of one window: `[tokens][n_vocab]`.
///
/// # Panics
/// A token is outside the vocabulary.
pub fn logits(model: &Model<'_>, tokens: &[TokenId]) -> Vec<f32> {
    product(&model.weights.output, &hidden_states(model, tokens), tokens.len())
}

/// What the head sees at every position of one window: `[tokens][n_embd]`.
///
/// # Panics
/// A token is outside the vocabulary.
pub fn hidden_states(model: &Model<'_>, tokens: &[TokenId]) -> Vec<f32> {
    let hyper = &model.hyper;
    let n = tokens.len();
    let mut x = vec![0.0; n * hyper.n_embd];
    for (row, token) in x.chunks_exact_mut(hyper.n_embd).zip(tokens) {
        model.weights.embeddings.unpack_row(token.index(), row);
    }
    let mut angles = vec![[0.0; 2]; model.rope.pairs()];
    for layer in &model.weights.layers {
        let normed = rms_norm(&x, &layer.attn_norm, hyper.rms_eps);
        let [mut q, mut k, v] = layer.qkv.each_ref().map(|matrix| product(matrix, &normed, n));
        for t in 0..n {
            model.rope.angles(t, &mut angles);
            for rows in [&mut q, &mut k] {
                let width = rows.len() / n;
                for head in rows[t * width..(t + 1) * width].chunks_exact_mut(hyper.head_dim) {
                    rope::rotate(head, hearth_kernels::ROW_GROUP, &angles);
                }
            }
        }
        let attention = attention(&q, &k, &v, n, hyper.head_dim, hyper.group_heads());
        add(&mut x, &product(&layer.attn_output, &attention, n));
        let normed = rms_norm(&x, &layer.ffn_norm, hyper.rms_eps);
        let mut hidden = product(&layer.gate, &normed, n);
        for (gate, up) in hidden.iter_mut().zip(product(&layer.up, &normed, n)) {
            *gate = *gate / (1.0 + libm::expf(-*gate)) * up;
        }
        add(&mut x, &product(&layer.down, &hidden, n));
    }
    rms_norm(&x, &model.weights.output_norm, hyper.rms_eps)
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let rows = x.chunks_exact(weight.len()).flat_map(|row| {
        let mean = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / weight.len() as f64;
        let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        row.iter().zip(weight).map(move |(x, weight)| x * scale * weight)
    });
    rows.collect()
}

/// Causal attention of `[n][heads * head_dim]` queries over keys and values with `group` times fewer heads.
fn attention(q: &[f32], k: &[f32], v: &[f32], n: usize, head_dim: usize, group: usize) -> Vec<f32> {
    let (q_width, kv_width) = (q.len() / n, k.len() / n);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut out = vec![0.0; q.len()];
    let mut scores = vec![0.0f32; n];
    for t in 0..n {
        for head in 0..q_width / head_dim {
            let q = &q[t * q_width + head * head_dim..][..head_dim];
            let kv_first = head / group * head_dim;
            for (p, score) in scores[..=t].iter_mut().enumerate() {
                let k = &k[p * kv_width + kv_first..][..head_dim];
                *score = scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
            }
            let largest = scores[..=t].iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let mut sum = 0.0;
            for score in &mut scores[..=t] {
                *score = libm::expf(*score - largest);
                sum += *score;
            }
            let out = &mut out[t * q_width + head * head_dim..][..head_dim];
            for (p, weight) in scores[..=t].iter().enumerate() {
                let v = &v[p * kv_width + kv_first..][..head_dim];
                for (out, v) in out.iter_mut().zip(v) {
                    *out += weight / sum * v;
                }
            }
        }
    }
    out
}

fn add(x: &mut [f32], delta: &[f32]) {
    for (x, delta) in x.iter_mut().zip(delta) {
        *x += delta;
    }
}

/// `x * matrix^T`: `[n][cols]` to `[n][rows]`.
fn product(matrix: &Matrix<'_>, x: &[f32], n: usize) -> Vec<f32> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut weights = vec![0.0; rows * cols];
    for (row, out) in weights.chunks_exact_mut(cols).enumerate() {
        matrix.unpack_row(row, out);
    }
    let mut out = vec![0.0; n * rows];
    assert_eq!(x.len(), n * cols, "one row of x a row of out");
    // SAFETY: the strides describe `out` as [n][rows], `x` as [n][cols] and `weights` transposed, [rows][cols]; the three
    // slices have exactly those lengths (made so above, `x` asserted), and none overlaps another.
    unsafe {
        gemm::gemm(
            n,
            rows,
            cols,
            out.as_mut_ptr(),
            1,
            rows.cast_signed(),
            false,
            x.as_ptr(),
            1,
            cols.cast_signed(),
            weights.as_ptr(),
            cols.cast_signed(),
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    out
}
