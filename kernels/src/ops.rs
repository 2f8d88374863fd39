//! Vector operations and dense products over any set's sixteen lanes. Each set instantiates them in functions that enable
//! its instructions (`simd_set!`), `dispatch` has checked every length.

use std::ops::Range;

use crate::activation::{QBlock, QBlockK};
use crate::format::{BLOCK, Format, ROW_GROUP};
use crate::kquant::SUPER_BLOCK;
use crate::matrix::Matrix;
use crate::simd::{LANES, Simd, exp};

/// Blocks whose largest magnitude is below this are zero: 2^-100.
const ZERO_BELOW: f32 = 7.888_609e-31;

/// What one prefetch brings in at least, bytes.
const CACHE_LINE_BYTES: usize = 64;

/// Up to sixteen values, the missing ones zero.
#[inline(always)]
fn load_part<S: Simd>(s: S, x: &[f32]) -> S::V {
    if let Ok(x) = x.try_into() {
        return s.load(x);
    }
    let mut padded = [0.0; LANES];
    padded[..x.len()].copy_from_slice(x);
    s.load(&padded)
}

/// The first `out.len()` lanes.
#[inline(always)]
fn store_part<S: Simd>(s: S, x: S::V, out: &mut [f32]) {
    if let Ok(out) = out.try_into() {
        return s.store(x, out);
    }
    let mut padded = [0.0; LANES];
    s.store(x, &mut padded);
    out.copy_from_slice(&padded[..out.len()]);
}

#[inline(always)]
pub(crate) fn quantize<S: Simd>(s: S, x: &[f32], out: &mut [QBlock]) {
    for (i, out) in out.iter_mut().enumerate() {
        let start = (i * BLOCK).min(x.len());
        let x = &x[start..x.len().min(start + BLOCK)];
        let (low, high) = x.split_at(x.len().min(LANES));
        let (low, high) = (load_part(s, low), load_part(s, high));
        let largest = s.max_lane(s.max(s.abs(low), s.abs(high)));
        if largest < ZERO_BELOW {
            *out = QBlock::default();
            continue;
        }
        let inv = 127.0 / largest;
        let (q, _) = out.q.as_chunks_mut::<LANES>();
        out.sum = s.quantize(low, inv, &mut q[0]) + s.quantize(high, inv, &mut q[1]);
        out.d = largest / 127.0;
        out.d_sum = out.d * out.sum as f32;
    }
}

#[inline(always)]
pub(crate) fn quantize_k<S: Simd>(s: S, x: &[f32], out: &mut [QBlockK]) {
    for (x, out) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(out) {
        let parts = x.as_chunks::<LANES>().0;
        let mut largest = s.splat(0.0);
        for part in parts {
            largest = s.max(largest, s.abs(s.load(part)));
        }
        let largest = s.max_lane(largest);
        if largest < ZERO_BELOW {
            *out = QBlockK::default();
            continue;
        }
        let inv = 127.0 / largest;
        let (q, _) = out.q.as_chunks_mut::<LANES>();
        for ((part, q), sum) in parts.iter().zip(q).zip(&mut out.sums) {
            // Sixteen values of at most 127 each.
            *sum = s.quantize(s.load(part), inv, q) as i16;
        }
        out.d = largest / 127.0;
    }
}

#[inline(always)]
pub(crate) fn rms_norm<S: Simd>(s: S, x: &[f32], group_stride: usize, w: &[f32], eps: f32, out: &mut [f32]) {
    let len = w.len();
    let part = |i: usize| load_part(s, &x[i * group_stride..][..LANES.min(len - i * LANES)]);
    let mut sum = s.splat(0.0);
    for i in 0..len.div_ceil(LANES) {
        let x = part(i);
        sum = s.fma(x, x, sum);
    }
    let inv = s.splat(1.0 / (s.tree_sum(sum) / len as f32 + eps).sqrt());
    for (i, (w, out)) in w.chunks(LANES).zip(out.chunks_mut(LANES)).enumerate() {
        store_part(s, s.mul(s.mul(part(i), inv), load_part(s, w)), out);
    }
}

#[inline(always)]
pub(crate) fn silu_mul<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    let one = s.splat(1.0);
    for (gate, up) in gate.chunks_mut(LANES).zip(up.chunks(LANES)) {
        let g = load_part(s, gate);
        let e = exp(s, s.sub(s.splat(0.0), g));
        store_part(s, s.mul(s.div(g, s.add(one, e)), load_part(s, up)), gate);
    }
}

#[inline(always)]
pub(crate) fn exp_all<S: Simd>(s: S, x: &mut [f32]) {
    for x in x.chunks_mut(LANES) {
        store_part(s, exp(s, load_part(s, x)), x);
    }
}

#[inline(always)]
pub(crate) fn prefetch<S: Simd>(s: S, bytes: &[u8]) {
    for line in bytes.chunks(CACHE_LINE_BYTES) {
        s.prefetch(line.as_ptr());
    }
}

/// How far ahead of its use each row group in hand of a dense matrix is fetched, bytes.
const PREFETCH_BYTES: usize = 2048;

/// A dense format's columns: the values of sixteen rows, as bytes.
trait Dense {
    type Column;
    fn load<S: Simd>(s: S, column: &Self::Column) -> S::V;
    fn columns(group: &[u8]) -> &[Self::Column];
}

struct F32;
struct F16;
struct Bf16;

macro_rules! dense {
    ($($name:ident: $bytes:literal $load:ident;)*) => {$(
        impl Dense for $name {
            type Column = [u8; $bytes];
            #[inline(always)]
            fn load<S: Simd>(s: S, column: &Self::Column) -> S::V {
                s.$load(column)
            }
            #[inline(always)]
            fn columns(group: &[u8]) -> &[Self::Column] {
                group.as_chunks().0
            }
        }
    )*};
}

dense! {
    F32: 64 load_f32_bytes;
    F16: 32 load_f16_bytes;
    Bf16: 32 load_bf16_bytes;
}

/// Product with a dense matrix; shapes as in `Kernels::matmul`.
#[inline(always)]
pub(crate) fn matmul_dense<S: Simd>(s: S, w: &Matrix<'_>, groups: Range<usize>, x: &[f32], n: usize, out: &mut [f32]) {
    match w.format() {
        Format::F32 => dense_groups::<S, F32>(s, w, groups, x, n, out),
        Format::F16 => dense_groups::<S, F16>(s, w, groups, x, n, out),
        Format::Bf16 => dense_groups::<S, Bf16>(s, w, groups, x, n, out),
        _ => unreachable!("a quantized matrix in a dense product"),
    }
}

#[inline(always)]
fn dense_groups<S: Simd, D: Dense>(s: S, w: &Matrix<'_>, groups: Range<usize>, x: &[f32], n: usize, out: &mut [f32]) {
    if n == 0 || groups.is_empty() {
        return;
    }
    let row = x.len() / n;
    let (mut groups, mut out) = (groups, out.as_chunks_mut::<ROW_GROUP>().0);
    // One chain of additions a group is bound by latency: several groups at a time, as many as there are registers for.
    (groups, out) = match (n, S::MANY_REGISTERS) {
        (1, true) => dense_bundles::<S, D, 8>(s, w, groups, x, row, out),
        (1, false) => dense_bundles::<S, D, 4>(s, w, groups, x, row, out),
        (_, true) => dense_bundles::<S, D, 2>(s, w, groups, x, row, out),
        (_, false) => (groups, out),
    };
    dense_bundles::<S, D, 1>(s, w, groups, x, row, out);
}

/// Bundles of `G` row groups; returns the groups that make no whole bundle, and their place.
#[inline(always)]
fn dense_bundles<'a, S: Simd, D: Dense, const G: usize>(
    s: S,
    w: &Matrix<'_>,
    mut groups: Range<usize>,
    x: &[f32],
    row: usize,
    out: &'a mut [[f32; LANES]],
) -> (Range<usize>, &'a mut [[f32; LANES]]) {
    let n = out.len() / groups.len().max(1);
    let mut bundles = out.chunks_exact_mut((G * n).max(1));
    for out in &mut bundles {
        let view = std::array::from_fn(|g| D::columns(w.group(groups.start + g)));
        let rows = |t: usize| &x[t * row..][..row];
        let mut t = 0;
        if S::MANY_REGISTERS && G <= 2 {
            while t + 8 <= n {
                dense_micro::<S, D, G, 8>(s, view, std::array::from_fn(|i| rows(t + i)), &mut out[t..], n);
                t += 8;
            }
        }
        if G <= 2 {
            while t + 4 <= n {
                dense_micro::<S, D, G, 4>(s, view, std::array::from_fn(|i| rows(t + i)), &mut out[t..], n);
                t += 4;
            }
        }
        while t < n {
            dense_micro::<S, D, G, 1>(s, view, [rows(t)], &mut out[t..], n);
            t += 1;
        }
        groups.start += G;
    }
    (groups, bundles.into_remainder())
}

/// `G` row groups × `T` rows of activations; `out[g * n + t]`.
#[inline(always)]
fn dense_micro<S: Simd, D: Dense, const G: usize, const T: usize>(
    s: S,
    w: [&[D::Column]; G],
    x: [&[f32]; T],
    out: &mut [[f32; LANES]],
    n: usize,
) {
    let k_len = w[0].len();
    assert!(w.iter().all(|w| w.len() == k_len) && x.iter().all(|x| x.len() == k_len));
    let mut acc = [[s.splat(0.0); T]; G];
    let columns_ahead = PREFETCH_BYTES / size_of::<D::Column>();
    let columns_a_line = CACHE_LINE_BYTES / size_of::<D::Column>();
    for k in 0..k_len {
        if k.is_multiple_of(columns_a_line) {
            // After a group's last column come the others in hand, which are fetched by themselves, then the next ones. Past the last
            // row group this points nowhere, which a hint may.
            let ahead = columns_ahead + if k + columns_ahead < k_len { 0 } else { (G - 1) * k_len };
            for w in w {
                s.prefetch(w.as_ptr().wrapping_add(k + ahead));
            }
        }
        for g in 0..G {
            let w = D::load(s, &w[g][k]);
            for t in 0..T {
                acc[g][t] = s.fma(w, s.splat(x[t][k]), acc[g][t]);
            }
        }
    }
    for g in 0..G {
        for t in 0..T {
            s.store(acc[g][t], &mut out[g * n + t]);
        }
    }
}
