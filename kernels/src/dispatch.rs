//! The table of kernel sets and the one safe entry to them: detection makes the proof, every call checks its shapes.

use std::ops::Range;

use crate::activation::{QBlock, QBlockK, Rows, blocks_per_row, k_blocks_per_row, padded_cols};
use crate::attention::parts::attention_part_len;
use crate::attention::{AttentionArgs, AttentionScratch, KV_BLOCK, MAX_GROUP_HEADS, MAX_HEAD_DIM, kv_block_len};
use crate::format::{BLOCK, ROW_GROUP, RowKind};
use crate::kquant::SUPER_BLOCK;
use crate::matrix::Matrix;
use crate::read::ReadPlan;
use crate::simd::LANES;

/// One set's functions. Each may be called only where the CPU has the set's features, with shapes as the method of the same
/// name on [`Kernels`] checks them.
pub(crate) struct Set {
    pub(crate) name: &'static str,
    pub(crate) matmul_quantized: unsafe fn(&Matrix<'_>, Range<usize>, &[QBlock], usize, &mut [f32]),
    pub(crate) matmul_k: unsafe fn(&Matrix<'_>, Range<usize>, &[QBlockK], usize, &mut [f32]),
    pub(crate) matmul_dense: unsafe fn(&Matrix<'_>, Range<usize>, &[f32], usize, &mut [f32]),
    pub(crate) quantize: unsafe fn(&[f32], &mut [QBlock]),
    pub(crate) quantize_k: unsafe fn(&[f32], &mut [QBlockK]),
    pub(crate) rms_norm: unsafe fn(&[f32], usize, &[f32], f32, &mut [f32]),
    pub(crate) silu_mul: unsafe fn(&mut [f32], &[f32]),
    pub(crate) exp: unsafe fn(&mut [f32]),
    pub(crate) prefetch: unsafe fn(&[u8]),
    pub(crate) kv_store: unsafe fn(&mut [u16], usize, &[f32], &[f32]),
    pub(crate) read: unsafe fn(ReadPlan, &[u8]) -> u32,
    pub(crate) attention: unsafe fn(&AttentionArgs<'_>, &mut [f32], &mut AttentionScratch),
    pub(crate) attention_blocks: unsafe fn(&AttentionArgs<'_>, Range<usize>, &mut [f32], &mut AttentionScratch),
    pub(crate) attention_combine: unsafe fn(usize, usize, &[f32], &mut [f32]),
}

/// Instantiates the operations for a [`crate::simd::Simd`] token under its `#[target_feature]` and fills a [`Set`]. `$token`
/// must be an expression that is sound to evaluate where those features are enabled.
macro_rules! simd_set {
    (
        $(#[$doc:meta])*
        $vis:vis static $set:ident = $name:literal for $token:expr, features($(#[$feature:meta])*), $matmul:path, $matmul_k:path;
    ) => {
        $(#[$doc])*
        $vis static $set: $crate::dispatch::Set = {
            use $crate::attention::{self, AttentionArgs, AttentionScratch};
            use $crate::activation::QBlockK;
            use $crate::ops;
            $(#[$feature])*
            fn matmul_quantized(w: &Matrix<'_>, groups: Range<usize>, x: &[QBlock], n: usize, out: &mut [f32]) {
                $matmul($token, w, groups, x, n, out);
            }
            $(#[$feature])*
            fn matmul_k(w: &Matrix<'_>, groups: Range<usize>, x: &[QBlockK], n: usize, out: &mut [f32]) {
                $matmul_k($token, w, groups, x, n, out);
            }
            $(#[$feature])*
            fn matmul_dense(w: &Matrix<'_>, groups: Range<usize>, x: &[f32], n: usize, out: &mut [f32]) {
                ops::matmul_dense($token, w, groups, x, n, out);
            }
            $(#[$feature])*
            fn quantize(x: &[f32], out: &mut [QBlock]) {
                ops::quantize($token, x, out);
            }
            $(#[$feature])*
            fn quantize_k(x: &[f32], out: &mut [QBlockK]) {
                ops::quantize_k($token, x, out);
            }
            $(#[$feature])*
            fn rms_norm(x: &[f32], group_stride: usize, w: &[f32], eps: f32, out: &mut [f32]) {
                ops::rms_norm($token, x, group_stride, w, eps, out);
            }
            $(#[$feature])*
            fn silu_mul(gate: &mut [f32], up: &[f32]) {
                ops::silu_mul($token, gate, up);
            }
            $(#[$feature])*
            fn exp(x: &mut [f32]) {
                ops::exp_all($token, x);
            }
            $(#[$feature])*
            fn prefetch(bytes: &[u8]) {
                ops::prefetch($token, bytes);
            }
            $(#[$feature])*
            fn kv_store(block: &mut [u16], position_in_block: usize, k: &[f32], v: &[f32]) {
                attention::kv_store($token, block, position_in_block, k, v);
            }
            $(#[$feature])*
            fn read(plan: $crate::read::ReadPlan, bytes: &[u8]) -> u32 {
                $crate::read::read($token, plan, bytes)
            }
            $(#[$feature])*
            fn attention(a: &AttentionArgs<'_>, out: &mut [f32], scratch: &mut AttentionScratch) {
                attention::attend($token, a, out, scratch);
            }
            $(#[$feature])*
            fn attention_blocks(
                a: &AttentionArgs<'_>,
                blocks: Range<usize>,
                parts: &mut [f32],
                scratch: &mut AttentionScratch,
            ) {
                attention::parts::attend_blocks($token, a, blocks, parts, scratch);
            }
            $(#[$feature])*
            fn attention_combine(heads: usize, head_dim: usize, parts: &[f32], out: &mut [f32]) {
                attention::parts::combine($token, heads, head_dim, parts, out);
            }
            $crate::dispatch::Set {
                name: $name, matmul_quantized, matmul_k, matmul_dense, quantize, quantize_k, rms_norm, silu_mul, exp, prefetch, kv_store,
                read, attention, attention_blocks, attention_combine,
            }
        };
    };
}
pub(crate) use simd_set;

/// A kernel set that this CPU can run. The private field is made by detection only, which is the proof that every call
/// below rests on.
#[derive(Clone, Copy)]
pub struct Kernels(&'static Set);

/// Why a kernel set cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// No set has this name.
    #[error("no kernel set is called {name:?}; there are {}", Kernels::NAMES.join(", "))]
    Unknown {
        /// Name asked for.
        name: String,
    },
    /// This CPU lacks what the set needs.
    #[error("kernel set {name:?} needs {missing}, which this CPU does not have")]
    Unsupported {
        /// Name asked for.
        name: &'static str,
        /// The first missing feature.
        missing: &'static str,
    },
}

impl Kernels {
    /// Names of all sets, on any CPU, from plainest to best.
    pub const NAMES: [&'static str; 5] = ["scalar", "neon", "dotprod", "avx2", "avx512vnni"];

    /// The best set of this CPU.
    pub fn detect() -> Self {
        let mut best = scalar();
        for set in Self::supported() {
            best = set;
        }
        best
    }

    /// The set of that name.
    pub fn by_name(name: &str) -> Result<Self, KernelError> {
        match name {
            "scalar" => Ok(scalar()),
            "neon" => neon().map_err(|missing| KernelError::Unsupported { name: "neon", missing }),
            "dotprod" => dotprod().map_err(|missing| KernelError::Unsupported { name: "dotprod", missing }),
            "avx2" => avx2().map_err(|missing| KernelError::Unsupported { name: "avx2", missing }),
            "avx512vnni" => avx512vnni().map_err(|missing| KernelError::Unsupported { name: "avx512vnni", missing }),
            _ => Err(KernelError::Unknown { name: name.to_owned() }),
        }
    }

    /// Every set that this CPU can run, from plainest to best.
    pub fn supported() -> impl Iterator<Item = Self> {
        Self::NAMES.into_iter().filter_map(|name| Self::by_name(name).ok())
    }

    /// The scalar set as a CPU without fused multiply-add runs it.
    #[cfg(test)]
    pub(crate) fn plain_scalar() -> Self {
        Self(&crate::scalar::SCALAR)
    }

    /// Name of the set.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// `n` rows of activations times the row groups `groups` of `w`: output row `16 g + r` of activation row `t` goes to
    /// `out[((g - groups.start) * n + t) * 16 + r]`, overwriting it. Rows that pad the last group give zeros.
    ///
    /// # Panics
    /// If `groups` is not within `w`, `out` is not `groups.len() × n × 16` long, or `x` is not `n` rows of the kind and
    /// length that `w` takes.
    pub fn matmul(self, w: &Matrix<'_>, groups: Range<usize>, x: Rows<'_>, n: usize, out: &mut [f32]) {
        assert!(
            groups.start <= groups.end && groups.end <= w.row_groups(),
            "matmul: row groups {groups:?} of {}",
            w.row_groups()
        );
        let cells = groups.len().checked_mul(n).and_then(|c| c.checked_mul(ROW_GROUP));
        assert_eq!(Some(out.len()), cells, "matmul: output length for {} groups x {n} rows", groups.len());
        match x {
            Rows::Quantized(x) => {
                assert!(w.format().row_kind() == RowKind::Quantized, "matmul: quantized rows for {:?}", w.format());
                assert_eq!(Some(x.len()), n.checked_mul(blocks_per_row(w.cols())), "matmul: blocks of {n} rows");
                // SAFETY: `self` proves the features; the shapes were checked above and `Matrix::new` checked the tiles.
                unsafe { (self.0.matmul_quantized)(w, groups, x, n, out) }
            }
            Rows::QuantizedK(x) => {
                assert!(w.format().row_kind() == RowKind::QuantizedK, "matmul: rows in K blocks for {:?}", w.format());
                assert_eq!(Some(x.len()), n.checked_mul(k_blocks_per_row(w.cols())), "matmul: K blocks of {n} rows");
                // SAFETY: as above.
                unsafe { (self.0.matmul_k)(w, groups, x, n, out) }
            }
            Rows::Dense(x) => {
                assert!(w.format().row_kind() == RowKind::Dense, "matmul: dense rows for {:?}", w.format());
                assert_eq!(Some(x.len()), n.checked_mul(padded_cols(w.cols())), "matmul: values of {n} rows");
                // SAFETY: as above.
                unsafe { (self.0.matmul_dense)(w, groups, x, n, out) }
            }
        }
    }

    /// Quantizes one row into blocks; `out` may be longer than the row needs, its rest becomes zero blocks.
    ///
    /// # Panics
    /// If `x.len()` is not a multiple of 16 or `out` is too short.
    pub fn quantize(self, x: &[f32], out: &mut [QBlock]) {
        assert!(x.len().is_multiple_of(LANES), "quantize: {} values, not a multiple of 16", x.len());
        assert!(x.len().div_ceil(BLOCK) <= out.len(), "quantize: {} values into {} blocks", x.len(), out.len());
        // SAFETY: `self` proves the features.
        unsafe { (self.0.quantize)(x, out) }
    }

    /// Quantizes one row into blocks of 256 for the K formats.
    ///
    /// # Panics
    /// If `x` is not exactly as long as `out` holds.
    pub fn quantize_k(self, x: &[f32], out: &mut [QBlockK]) {
        assert_eq!(Some(x.len()), out.len().checked_mul(SUPER_BLOCK), "quantize_k: values for {} blocks", out.len());
        // SAFETY: `self` proves the features.
        unsafe { (self.0.quantize_k)(x, out) }
    }

    /// RMS norm of a strided row into `out`: value `k` is `x[(k / 16) * group_stride + k % 16]`. A plain row has stride 16;
    /// the output of [`Self::matmul`] for `n` rows, from the wanted row's first value on, has stride `16 n`.
    ///
    /// # Panics
    /// If `w` and `out` differ in length, are empty, or `x` is too short.
    pub fn rms_norm(self, x: &[f32], group_stride: usize, w: &[f32], eps: f32, out: &mut [f32]) {
        assert!(!w.is_empty() && w.len() == out.len(), "rms_norm: {} weights, {} outputs", w.len(), out.len());
        let last = w.len() - 1;
        let need = (last / LANES).checked_mul(group_stride).and_then(|at| at.checked_add(last % LANES + 1));
        assert!(need.is_some_and(|need| need <= x.len()), "rms_norm: input of {} is too short", x.len());
        // SAFETY: `self` proves the features.
        unsafe { (self.0.rms_norm)(x, group_stride, w, eps, out) }
    }

    /// `gate = gate / (1 + exp(-gate)) * up`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "silu_mul: lengths");
        // SAFETY: `self` proves the features.
        unsafe { (self.0.silu_mul)(gate, up) }
    }

    /// [`crate::exp`] of every value, in place.
    pub fn exp(self, x: &mut [f32]) {
        // SAFETY: `self` proves the features.
        unsafe { (self.0.exp)(x) }
    }

    /// Hints that `bytes` will be read soon, line by line.
    pub fn prefetch(self, bytes: &[u8]) {
        // SAFETY: `self` proves the features.
        unsafe { (self.0.prefetch)(bytes) }
    }

    /// Writes one position's key and value, both `head_dim` long, into a block, rounding to f16 (to nearest even; too large becomes
    /// infinite).
    ///
    /// # Panics
    /// If `k` and `v` differ in length or that is no head size, `block` is not as long as its block is, or the position not below
    /// [`KV_BLOCK`].
    pub fn kv_store(self, block: &mut [u16], position_in_block: usize, k: &[f32], v: &[f32]) {
        let head_dim = k.len();
        assert!(is_head_dim(head_dim) && v.len() == head_dim, "kv_store: head size {head_dim} and {}", v.len());
        assert_eq!(block.len(), kv_block_len(head_dim), "kv_store: block length");
        assert!(position_in_block < KV_BLOCK, "kv_store: position {position_in_block} in a block of {KV_BLOCK}");
        // SAFETY: `self` proves the features; the lengths fit.
        unsafe { (self.0.kv_store)(block, position_in_block, k, v) }
    }

    /// Reads every byte, as `plan` says; gives the exclusive or of its little-endian words of four bytes.
    pub fn read(self, plan: ReadPlan, bytes: &[u8]) -> u32 {
        // SAFETY: `self` proves the features.
        unsafe { (self.0.read)(plan, bytes) }
    }

    /// Attention of one GQA group's query heads of consecutive tokens; `out` is `[rows][heads][head_dim]`. A row's values are the
    /// same alone and beside others.
    ///
    /// # Panics
    /// If a length, count or block number in `a` does not fit the others (see [`AttentionArgs`]).
    pub fn attention(self, a: &AttentionArgs<'_>, out: &mut [f32], scratch: &mut AttentionScratch) {
        check_attention(a);
        assert_eq!(out.len(), a.q.len(), "attention: output length");
        // SAFETY: `self` proves the features.
        unsafe { (self.0.attention)(a, out, scratch) }
    }

    /// The shares that KV blocks `blocks` of the sequence have in one row's [`Kernels::attention`], each
    /// [`attention_part_len`] values, one after the other: what threads leave that look at one sequence together.
    ///
    /// # Panics
    /// As [`Kernels::attention`]; if there is more than one row, or a block that the row does not attend to.
    pub fn attention_blocks(
        self,
        a: &AttentionArgs<'_>,
        blocks: Range<usize>,
        parts: &mut [f32],
        scratch: &mut AttentionScratch,
    ) {
        check_attention(a);
        assert!(a.rows == 1 && blocks.start <= blocks.end && blocks.end <= a.blocks(), "attention: blocks {blocks:?}");
        assert_eq!(parts.len(), blocks.len() * attention_part_len(a.heads, a.head_dim), "attention: shares' length");
        // SAFETY: `self` proves the features.
        unsafe { (self.0.attention_blocks)(a, blocks, parts, scratch) }
    }

    /// The same bits as [`Kernels::attention`] of one row, `[heads][head_dim]`, from the shares of all its blocks, in order.
    ///
    /// # Panics
    /// If the number or size of the heads is not one that [`Kernels::attention`] takes, there is no share or a part of one, or `out`
    /// has another length.
    pub fn attention_combine(self, heads: usize, head_dim: usize, parts: &[f32], out: &mut [f32]) {
        assert!(
            (1..=MAX_GROUP_HEADS).contains(&heads) && is_head_dim(head_dim),
            "attention: {heads} heads of {head_dim}"
        );
        let whole = parts.len().is_multiple_of(attention_part_len(heads, head_dim));
        assert!(!parts.is_empty() && whole, "attention: shares' length {}", parts.len());
        assert_eq!(out.len(), heads * head_dim, "attention: output length");
        // SAFETY: `self` proves the features.
        unsafe { (self.0.attention_combine)(heads, head_dim, parts, out) }
    }
}

fn check_attention(a: &AttentionArgs<'_>) {
    let heads = a.rows.checked_mul(a.heads);
    assert!(
        heads.is_some_and(|heads| (1..=MAX_GROUP_HEADS).contains(&heads)),
        "attention: {} heads of {} rows",
        a.heads,
        a.rows
    );
    assert!(is_head_dim(a.head_dim), "attention: head size {}", a.head_dim);
    assert_eq!(a.q.len(), a.rows * a.heads * a.head_dim, "attention: query length");
    assert!(a.positions != 0, "attention: no positions");
    let blocks = a.blocks();
    assert!(blocks <= a.table.len(), "attention: {} positions", a.positions);
    let in_plane = a.plane.len() / kv_block_len(a.head_dim);
    assert!(
        a.table[..blocks].iter().all(|block| (*block as usize) < in_plane),
        "attention: a block beyond the plane's {in_plane}"
    );
}

fn is_head_dim(head_dim: usize) -> bool {
    head_dim != 0 && head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(LANES)
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernels").field(&self.name()).finish()
    }
}

#[cfg(target_arch = "x86_64")]
fn scalar() -> Kernels {
    let fma = std::arch::is_x86_feature_detected!("fma");
    Kernels(if fma { &crate::scalar::with_fma::SCALAR_FMA } else { &crate::scalar::SCALAR })
}

#[cfg(not(target_arch = "x86_64"))]
fn scalar() -> Kernels {
    Kernels(&crate::scalar::SCALAR)
}

/// The set, or the first feature that it misses.
#[cfg(target_arch = "x86_64")]
fn avx2() -> Result<Kernels, &'static str> {
    crate::avx2::missing_feature().map_or(Ok(Kernels(&crate::avx2::AVX2)), Err)
}

#[cfg(not(target_arch = "x86_64"))]
fn avx2() -> Result<Kernels, &'static str> {
    Err("an x86-64 CPU")
}

/// The set, or the first feature that it misses.
#[cfg(target_arch = "x86_64")]
fn avx512vnni() -> Result<Kernels, &'static str> {
    crate::avx512vnni::missing_feature().map_or(Ok(Kernels(&crate::avx512vnni::AVX512VNNI)), Err)
}

#[cfg(not(target_arch = "x86_64"))]
fn avx512vnni() -> Result<Kernels, &'static str> {
    Err("an x86-64 CPU")
}

/// The set, or what it misses.
#[cfg(target_arch = "aarch64")]
fn neon() -> Result<Kernels, &'static str> {
    Ok(Kernels(&crate::neon::NEON))
}

/// The set, or what it misses.
#[cfg(not(target_arch = "aarch64"))]
fn neon() -> Result<Kernels, &'static str> {
    Err("an AArch64 CPU")
}

/// The set, or what it misses.
#[cfg(target_arch = "aarch64")]
fn dotprod() -> Result<Kernels, &'static str> {
    crate::dotprod::missing_feature().map_or(Ok(Kernels(&crate::dotprod::DOTPROD)), Err)
}

/// The set, or what it misses.
#[cfg(not(target_arch = "aarch64"))]
fn dotprod() -> Result<Kernels, &'static str> {
    Err("an AArch64 CPU")
}
