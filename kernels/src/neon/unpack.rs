//! Packed weights to a byte a value, four rows a register, for `neon/rows.rs` and `neon/krows.rs`.

use std::arch::aarch64::*;
use std::arch::asm;

use super::neon;
use crate::format::Quant;

/// Which bits of a byte are the low nibble, fifth bits as [`Masks::with_fifth_bits`] takes them, and bits 4 and 5.
#[derive(Clone, Copy)]
pub(crate) struct Masks {
    nibble: uint8x16_t,
    fifth: uint8x16_t,
    pub(crate) pair: uint8x16_t,
}

impl Masks {
    /// The compiler is not told what they are: it would set them anew before each use where registers are short.
    #[inline(always)]
    pub(crate) fn new() -> Self {
        let [nibble, fifth, pair] = [15, 0x11, 0x30].map(|bits| {
            let mut mask = neon!(vdupq_n_u8(bits));
            // SAFETY: no instruction at all.
            unsafe { asm!("/* {0:v} */", inout(vreg) mask, options(pure, nomem, nostack, preserves_flags)) }
            mask
        });
        Self { nibble, fifth, pair }
    }

    /// Low and high nibbles of vector `j` with their fifth bits, if any.
    #[inline(always)]
    pub(crate) fn unpacked<Q: Quant, const R: usize>(
        self,
        packed: [uint8x16_t; R],
        high: [uint8x16_t; R],
        j: usize,
    ) -> [[int8x16_t; R]; 2] {
        if Q::BITS == 4 { self.nibbles(packed).map(signed) } else { self.with_fifth_bits(packed, high, j).map(signed) }
    }

    #[inline(always)]
    pub(crate) fn nibbles<const R: usize>(self, packed: [uint8x16_t; R]) -> [[uint8x16_t; R]; 2] {
        [self.low(packed), upper(packed)]
    }

    /// Low nibbles.
    #[inline(always)]
    pub(crate) fn low<const R: usize>(self, packed: [uint8x16_t; R]) -> [uint8x16_t; R] {
        packed.map(|w| neon!(vandq_u8(w, self.nibble)))
    }

    /// Nibbles of vector `j` and, above them, bits `j` (low nibbles) and `4 + j` (high ones) of `high`.
    #[inline(always)]
    pub(crate) fn with_fifth_bits<const R: usize>(
        self,
        packed: [uint8x16_t; R],
        high: [uint8x16_t; R],
        j: usize,
    ) -> [[uint8x16_t; R]; 2] {
        let mut parts = [packed; 2];
        for r in 0..R {
            // Bits 0 and 4: the first goes above the low nibbles, the second is in place above the high ones.
            let mut second = neon!({
                let shifted = match j {
                    0 => high[r],
                    1 => vshrq_n_u8::<1>(high[r]),
                    2 => vshrq_n_u8::<2>(high[r]),
                    _ => vshrq_n_u8::<3>(high[r]),
                };
                vandq_u8(shifted, self.fifth)
            });
            let mut first = neon!(vandq_u8(packed[r], self.nibble));
            // SAFETY: two operations on registers. As `asm!`, because the compiler takes these apart into two each.
            unsafe {
                asm!("sli {0:v}.16b, {1:v}.16b, #4", inout(vreg) first, in(vreg) second,
                    options(pure, nomem, nostack, preserves_flags));
                asm!("sri {0:v}.16b, {1:v}.16b, #4", inout(vreg) second, in(vreg) packed[r],
                    options(pure, nomem, nostack, preserves_flags));
            }
            (parts[0][r], parts[1][r]) = (first, second);
        }
        parts
    }
}

/// High nibbles.
#[inline(always)]
pub(crate) fn upper<const R: usize>(packed: [uint8x16_t; R]) -> [uint8x16_t; R] {
    packed.map(|w| neon!(vshrq_n_u8::<4>(w)))
}

#[inline(always)]
pub(crate) fn signed<const R: usize>(w: [uint8x16_t; R]) -> [int8x16_t; R] {
    w.map(|w| neon!(vreinterpretq_s8_u8(w)))
}
