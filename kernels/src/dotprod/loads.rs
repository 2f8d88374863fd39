//! The dotprod set's loads: three or four registers by one instruction that also moves the pointer on. As `asm!`, because the
//! compiler makes pairs of the intrinsics, with an addition each; the registers are chosen here, because these instructions take
//! only neighbours. What is loaded goes to `dotprod/product.rs` and, from `ZEROS`, to `dotprod/pass.rs`.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::activation::QBlock;
use crate::neon::neon;
use crate::neon::rows::Activations;

/// Four registers of zeros to load: one instruction, where setting them takes four of the multipliers' slots.
#[repr(align(64))]
pub(super) struct Zeros([i32; 16]);

static ZEROS: Zeros = Zeros([0; 16]);

impl Zeros {
    /// Where they are.
    #[inline(always)]
    pub(super) fn at() -> *const i32 {
        ZEROS.0.as_ptr()
    }
}

/// Sixteen zeros, loaded where this stands.
#[inline(always)]
pub(super) fn zeros() -> [int32x4_t; 4] {
    let (a, b, c, d);
    // SAFETY: sixteen numbers are there.
    unsafe {
        asm!(
            "ld1 {{v8.4s, v9.4s, v10.4s, v11.4s}}, [{at}]",
            at = in(reg) Zeros::at(), out("v8") a, out("v9") b, out("v10") c, out("v11") d,
            options(readonly, nostack, preserves_flags)
        );
    }
    [a, b, c, d]
}

/// Four registers from `at` on, and past them; `turn` chooses among four places for them.
///
/// # Safety
/// `at` points to 64 bytes.
#[inline(always)]
pub(super) unsafe fn take_four(at: &mut *const u8, turn: usize) -> [uint8x16_t; 4] {
    macro_rules! take {
        ($a:tt, $b:tt, $c:tt, $d:tt) => {{
            let (a, b, c, d);
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!("ld1 {{", $a, ".16b, ", $b, ".16b, ", $c, ".16b, ", $d, ".16b}}, [{at}], #64"),
                    at = inout(reg) *at, out($a) a, out($b) b, out($c) c, out($d) d,
                    options(pure, readonly, nostack, preserves_flags)
                );
            }
            [a, b, c, d]
        }};
    }
    match turn {
        0 => take!("v0", "v1", "v2", "v3"),
        1 => take!("v4", "v5", "v6", "v7"),
        2 => take!("v12", "v13", "v14", "v15"),
        _ => take!("v28", "v29", "v30", "v31"),
    }
}

/// The block at `x`, and past it.
///
/// # Safety
/// `x` points to a block.
#[inline(always)]
pub(super) unsafe fn take_block(x: &mut *const QBlock) -> Activations {
    let (low, high, factors);
    // SAFETY: a block is three registers long, with its padding; the caller's promise.
    unsafe {
        asm!(
            "ld1 {{v24.16b, v25.16b, v26.16b}}, [{x}], #48",
            x = inout(reg) *x, out("v24") low, out("v25") high, out("v26") factors,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    let sum = neon!(vdupq_laneq_s32::<2>(vreinterpretq_s32_f32(factors)));
    Activations { q: [low, high], factors, sum }
}

const _: () = assert!(size_of::<QBlock>() == 48);
