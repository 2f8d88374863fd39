//! hearth's matrix, attention and vector kernels: one result, bit for bit, on every CPU.
//!
//! A caller packs GGUF rows into the R16K4 tile layout ([`pack_row_group`]), views the bytes as a [`Matrix`], picks a
//! kernel set once ([`Kernels::detect`]) and hands it rows of activations. Nothing here allocates (except
//! [`AttentionScratch::new`] and [`Buffer::new`]), spawns, logs or keeps state. [`Kernels`] is the one safe entry: it checks every shape in
//! release builds too, and its private field proves that the CPU has the features of the set it names.
//!
//! # Numeric model
//! The scalar set is the specification; every other set gives the same bits for finite inputs. All arithmetic is IEEE f32
//! in the default floating-point mode; `fma` rounds once; a lane is an output row (or a position, or a channel), so the
//! vector width never changes the order of a sum. NaN inputs give unspecified bits, never a crash.
//!
//! * **Activation blocks** ([`QBlock`], 32 values): `a = max |x|`. If `a < 2^-100`: `d = 0, q = 0, sum = 0`. Otherwise
//!   `d = a / 127`, `inv = 127 / a`, `q = round_ties_even(x * inv)`, `sum = Σ q`.
//! * **Quantized product**: `acc = +0`; for each block of 32 in index order, with the exact integer dot
//!   `isum = Σ w q` (`w` is the stored number less 8 for Q4_0, less 16 for Q5_0, as stored for Q4_1 and Q5_1, signed for
//!   Q8_0): `acc = fma(dw * d, isum, acc)`, then for Q4_1 and Q5_1 `acc = fma(mw, d * sum, acc)`. `dw`, `mw` are the
//!   block's f16 scale and minimum. Padding blocks (to 64 columns) take part as zeros.
//! * **K product**: activations in blocks of 256 ([`QBlockK`]), `d` and `q` as above over the whole block. For each super-block
//!   in index order, with exact integers: `isum = Σ scale (Σ w q)` over its sub-blocks (`w` as stored; less 32 for Q6_K) and,
//!   for Q4_K and Q5_K, `imin = Σ min (Σ q)`: `acc = fma(dw * d, isum, acc)`, then `acc = fma(dmin * -d, imin, acc)`.
//! * **Dense product**: `acc = +0`; `acc = fma(w[k], x[k], acc)`, `k` ascending, padding included.
//! * **Sixteen-lane sum**: lane `j` takes values `j, j + 16, …` in order (missing ones count as `+0`); then
//!   `t_i = lane_i + lane_{i+8}`, `u_i = t_i + t_{i+4}`, `v_i = u_i + u_{i+2}`, result `v_0 + v_1`.
//! * **RMS norm**: `out = (x * inv) * w`, `inv = 1 / sqrt(sumsq / len + eps)`; `sumsq` is the sixteen-lane sum of squares
//!   where each lane is a chain of `fma(x, x, lane)` from `+0`.
//! * **SiLU**: `gate / (1 + exp(-gate)) * up`.
//! * **exp**: 0 below [`EXP_MIN`], +inf above [`EXP_MAX`]; otherwise `t = fma(x, log2 e, 1.5 * 2^23)`, `n = t - 1.5 * 2^23`,
//!   `r` = `x - n ln 2` in two `fma` steps, a degree-5 `fma` Horner polynomial `p`, `fma(p, r * r, r) + 1`, times `2^n`.
//!   Within 2 ulp of the true value.
//! * **Attention**, per query head, over KV blocks of [`KV_BLOCK`] positions in table order. In a block:
//!   `s_p = scale * (fma chain of q[d] k[p][d], d ascending, from +0)`, `m_b = max s_p`, `e_p = exp(s_p - m_b)`, `l_b` the
//!   sixteen-lane sum of `e_p`, `o_b[d]` the fma chain of `e_p v[p][d]`, `p` ascending, from +0. The first block sets
//!   `m, l, o`; a later one gives `m' = max(m, m_b)`, `c = exp(m - m')`, `e = exp(m_b - m')`, `l = fma(l, c, l_b * e)`,
//!   `o = fma(o, c, o_b * e)`. Result `o * (1 / l)`. A block's part depends on that block alone.
//! * Weights below 2^-100 in magnitude count as zero and NaN or infinity is refused when packing, so denormals do not meet
//!   a kernel through the weights.
//!
//! # Reading order
//! [`format`](Format), `pack` and `kquant` (the layout) · `activation` ([`QBlock`], [`QBlockK`]) and [`Buffer`] · `simd` (the sixteen lanes) ·
//! `ops` and `attention` (written once over those lanes) · `scalar` (the integer products as specified) · `avx2`, `avx512vnni`
//! (the products, fast, with `kproduct` for the K formats), `neon`, `dotprod` (likewise, `neon/rows.rs` and `neon/krows.rs` for
//! both) · `dispatch` (the table and the checks) · `read` (what the benches measure products by).

mod activation;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
mod buffer;
mod dispatch;
#[cfg(target_arch = "aarch64")]
mod dotprod;
mod format;
#[cfg(target_arch = "x86_64")]
mod kproduct;
mod kquant;
mod math;
mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod ops;
mod pack;
mod read;
mod scalar;
mod simd;

#[cfg(test)]
mod tests;

pub use activation::{QBlock, QBlockK, Rows, blocks_per_row, k_blocks_per_row, padded_cols};
pub use attention::parts::attention_part_len;
pub use attention::{AttentionArgs, AttentionScratch, KV_BLOCK, MAX_GROUP_HEADS, MAX_HEAD_DIM, kv_block_len};
pub use buffer::Buffer;
pub use dispatch::{KernelError, Kernels};
pub use format::{BLOCK, Format, ROW_GROUP, RowKind, TILE_K, packed_bytes};
pub use kquant::SUPER_BLOCK;
pub use math::{EXP_MAX, EXP_MIN, exp};
pub use matrix::{Matrix, ShapeError};
pub use pack::{PackError, pack_row_group};
pub use read::ReadPlan;
