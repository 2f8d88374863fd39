//! The dotprod set's inner loop over several rows of activations: one block of eight weight rows stays in sixteen registers while
//! the activations pass in pairs of rows. Written in assembly, because the compiler finds no allocation of all 32 registers that
//! has each pair's activations, zeros and sums come and go by one instruction each: 53 of them a pair and block, of which the
//! products and the numeric model are 48. `dotprod/product.rs` calls it.

use std::arch::asm;

use super::loads::Zeros;
use crate::activation::QBlock;
use crate::neon::krows::EightRowsK;
use crate::neon::rows::EightRows;

/// The products of two weight registers (rows 0 to 3 and 4 to 7) with one group of four activations of one or two rows.
macro_rules! products {
    ($w:literal, $u:literal, $x:literal, $group:literal) => {
        concat!(
            "\tsdot v8.4s, v",
            $w,
            ".16b, v",
            $x,
            ".4b[",
            $group,
            "]\n",
            "\tsdot v9.4s, v",
            $u,
            ".16b, v",
            $x,
            ".4b[",
            $group,
            "]\n",
        )
    };
    ($w:literal, $u:literal, $x:literal, $y:literal, $group:literal) => {
        concat!(
            "\tsdot v8.4s, v",
            $w,
            ".16b, v",
            $x,
            ".4b[",
            $group,
            "]\n",
            "\tsdot v9.4s, v",
            $u,
            ".16b, v",
            $x,
            ".4b[",
            $group,
            "]\n",
            "\tsdot v10.4s, v",
            $w,
            ".16b, v",
            $y,
            ".4b[",
            $group,
            "]\n",
            "\tsdot v11.4s, v",
            $u,
            ".16b, v",
            $y,
            ".4b[",
            $group,
            "]\n",
        )
    };
}

/// Two rows of activations: v2, v3 and v5, v6 their values, v4 and v7 their factors, v8 to v11 integer sums, v0 to v3 accumulators;
/// v12 to v27 weights, v28 and v29 scales, v30 and v31 minimums.
macro_rules! pair {
    ($($minimums:literal)*) => {
        concat!(
            "\tld1 {{v2.16b, v3.16b, v4.16b}}, [{x}], {step}\n",
            "\tld1 {{v5.16b, v6.16b, v7.16b}}, [{x}], {step}\n",
            "\tld1 {{v8.4s, v9.4s, v10.4s, v11.4s}}, [{zeros}]\n",
            products!(12, 13, 2, 5, 0),
            products!(14, 15, 2, 5, 1),
            products!(16, 17, 2, 5, 2),
            products!(18, 19, 2, 5, 3),
            products!(20, 21, 3, 6, 0),
            products!(22, 23, 3, 6, 1),
            products!(24, 25, 3, 6, 2),
            products!(26, 27, 3, 6, 3),
            "\tld1 {{v0.4s, v1.4s, v2.4s, v3.4s}}, [{sums}]\n",
            "\tscvtf v8.4s, v8.4s\n",
            "\tscvtf v9.4s, v9.4s\n",
            "\tfmul v5.4s, v28.4s, v4.s[0]\n",
            "\tfmul v6.4s, v29.4s, v4.s[0]\n",
            "\tscvtf v10.4s, v10.4s\n",
            "\tscvtf v11.4s, v11.4s\n",
            "\tfmla v0.4s, v5.4s, v8.4s\n",
            "\tfmla v1.4s, v6.4s, v9.4s\n",
            "\tfmul v5.4s, v28.4s, v7.s[0]\n",
            "\tfmul v6.4s, v29.4s, v7.s[0]\n",
            "\tfmla v2.4s, v5.4s, v10.4s\n",
            "\tfmla v3.4s, v6.4s, v11.4s\n",
            $($minimums,)*
            "\tst1 {{v0.4s, v1.4s, v2.4s, v3.4s}}, [{sums}], #64\n",
        )
    };
}

/// The last of an odd number of rows: v5 and v6 its values, v7 its factors, v8 and v9 integer sums, v0 and v1 accumulators.
macro_rules! single {
    ($($minimums:literal)*) => {
        concat!(
            "\tld1 {{v5.16b, v6.16b, v7.16b}}, [{x}]\n",
            "\tld1 {{v8.4s, v9.4s}}, [{zeros}]\n",
            products!(12, 13, 5, 0),
            products!(14, 15, 5, 1),
            products!(16, 17, 5, 2),
            products!(18, 19, 5, 3),
            products!(20, 21, 6, 0),
            products!(22, 23, 6, 1),
            products!(24, 25, 6, 2),
            products!(26, 27, 6, 3),
            "\tld1 {{v0.4s, v1.4s}}, [{sums}]\n",
            "\tscvtf v8.4s, v8.4s\n",
            "\tscvtf v9.4s, v9.4s\n",
            "\tfmul v5.4s, v28.4s, v7.s[0]\n",
            "\tfmul v6.4s, v29.4s, v7.s[0]\n",
            "\tfmla v0.4s, v5.4s, v8.4s\n",
            "\tfmla v1.4s, v6.4s, v9.4s\n",
            $($minimums,)*
            "\tst1 {{v0.4s, v1.4s}}, [{sums}]\n",
        )
    };
}

/// Two rows of activations of a K format: v4, v5 and v6, v7 their values, v8 to v11 sums of the group or of its halves, v0 to v3 the
/// super-block's; v12 to v27 weights, v28 and v29 scales, v30 and v31 those of the second half.
macro_rules! k_pair {
    ($($between_halves:literal)*) => {
        concat!(
            "\tld1 {{v4.16b, v5.16b}}, [{x}], {step}\n",
            "\tld1 {{v6.16b, v7.16b}}, [{x}], {step}\n",
            "\tld1 {{v8.4s, v9.4s, v10.4s, v11.4s}}, [{zeros}]\n",
            "\tld1 {{v0.4s, v1.4s, v2.4s, v3.4s}}, [{sums}]\n",
            products!(12, 13, 4, 6, 0),
            products!(14, 15, 4, 6, 1),
            products!(16, 17, 4, 6, 2),
            products!(18, 19, 4, 6, 3),
            $($between_halves,)*
            products!(20, 21, 5, 7, 0),
            products!(22, 23, 5, 7, 1),
            products!(24, 25, 5, 7, 2),
            products!(26, 27, 5, 7, 3),
            "\tmla v0.4s, v8.4s, v30.4s\n",
            "\tmla v1.4s, v9.4s, v31.4s\n",
            "\tmla v2.4s, v10.4s, v30.4s\n",
            "\tmla v3.4s, v11.4s, v31.4s\n",
            "\tst1 {{v0.4s, v1.4s, v2.4s, v3.4s}}, [{sums}], #64\n",
        )
    };
}

/// The last of an odd number of rows of a K format: v4 and v5 its values, v8 and v9 sums of the group or of its halves, v0 and v1 the
/// super-block's.
macro_rules! k_single {
    ($($between_halves:literal)*) => {
        concat!(
            "\tld1 {{v4.16b, v5.16b}}, [{x}]\n",
            "\tld1 {{v8.4s, v9.4s}}, [{zeros}]\n",
            "\tld1 {{v0.4s, v1.4s}}, [{sums}]\n",
            products!(12, 13, 4, 0),
            products!(14, 15, 4, 1),
            products!(16, 17, 4, 2),
            products!(18, 19, 4, 3),
            $($between_halves,)*
            products!(20, 21, 5, 0),
            products!(22, 23, 5, 1),
            products!(24, 25, 5, 2),
            products!(26, 27, 5, 3),
            "\tmla v0.4s, v8.4s, v30.4s\n",
            "\tmla v1.4s, v9.4s, v31.4s\n",
            "\tst1 {{v0.4s, v1.4s}}, [{sums}]\n",
        )
    };
}

/// All rows: four pairs a turn, then pairs, then the row without a partner.
macro_rules! all_rows {
    ($pair:expr, $single:expr, $w:expr, $factors:expr, $x:expr, $step:expr, $n:expr, $sums:expr) => {
        asm!(
            "cbz {eights}, 3f",
            "2:",
            $pair,
            $pair,
            $pair,
            $pair,
            "subs {eights}, {eights}, #1",
            "b.ne 2b",
            "3:",
            "cbz {pairs}, 5f",
            "4:",
            $pair,
            "subs {pairs}, {pairs}, #1",
            "b.ne 4b",
            "5:",
            "cbz {odd}, 6f",
            $single,
            "6:",
            x = inout(reg) $x => _,
            step = in(reg) $step,
            zeros = in(reg) Zeros::at(),
            sums = inout(reg) $sums => _,
            eights = inout(reg) $n / 8 => _,
            pairs = inout(reg) $n % 8 / 2 => _,
            odd = in(reg) $n % 2,
            in("v12") $w[0][0], in("v13") $w[0][1], in("v14") $w[1][0], in("v15") $w[1][1],
            in("v16") $w[2][0], in("v17") $w[2][1], in("v18") $w[3][0], in("v19") $w[3][1],
            in("v20") $w[4][0], in("v21") $w[4][1], in("v22") $w[5][0], in("v23") $w[5][1],
            in("v24") $w[6][0], in("v25") $w[6][1], in("v26") $w[7][0], in("v27") $w[7][1],
            in("v28") $factors[0][0], in("v29") $factors[0][1], in("v30") $factors[1][0], in("v31") $factors[1][1],
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _,
            out("v6") _, out("v7") _, out("v8") _, out("v9") _, out("v10") _, out("v11") _,
            options(nostack),
        )
    };
}

/// One block's step of the accumulators of `n` rows.
///
/// # Safety
/// The CPU has dotprod; `x` points to a block of the first row, the other rows' are `row_bytes` apart; `sums` holds `n` rows.
#[inline(always)]
pub(super) unsafe fn pass<const HAS_MIN: bool>(
    w: EightRows,
    x: *const QBlock,
    row_bytes: usize,
    n: usize,
    sums: *mut [f32; 8],
) {
    let factors = [w.factors.scale, w.factors.min];
    // SAFETY: the caller's promise: as many blocks are read and sums changed as there are rows.
    unsafe {
        if HAS_MIN {
            all_rows!(
                pair!(
                    "\tfmla v0.4s, v30.4s, v4.s[1]\n"
                    "\tfmla v1.4s, v31.4s, v4.s[1]\n"
                    "\tfmla v2.4s, v30.4s, v7.s[1]\n"
                    "\tfmla v3.4s, v31.4s, v7.s[1]\n"
                ),
                single!(
                    "\tfmla v0.4s, v30.4s, v7.s[1]\n"
                    "\tfmla v1.4s, v31.4s, v7.s[1]\n"
                ),
                w.w,
                factors,
                x,
                row_bytes,
                n,
                sums
            );
        } else {
            all_rows!(pair!(), single!(), w.w, factors, x, row_bytes, n, sums);
        }
    }
}

/// One group's step of the integer sums of `n` rows, of a K format with one scale a group or one for each sixteen values.
///
/// # Safety
/// The CPU has dotprod; `x` points to 32 values of the first row, the other rows' are `row_bytes` apart; `sums` holds `n` rows.
#[inline(always)]
pub(super) unsafe fn group_pass<const ONE_SCALE: bool>(
    w: EightRowsK,
    x: *const i8,
    row_bytes: usize,
    n: usize,
    sums: *mut [i32; 8],
) {
    // SAFETY: as above.
    unsafe {
        if ONE_SCALE {
            all_rows!(k_pair!(), k_single!(), w.w, w.scales, x, row_bytes, n, sums);
        } else {
            all_rows!(
                k_pair!(
                    "\tmla v0.4s, v8.4s, v28.4s\n"
                    "\tmla v1.4s, v9.4s, v29.4s\n"
                    "\tmla v2.4s, v10.4s, v28.4s\n"
                    "\tmla v3.4s, v11.4s, v29.4s\n"
                    "\tld1 {{v8.4s, v9.4s, v10.4s, v11.4s}}, [{zeros}]\n"
                ),
                k_single!(
                    "\tmla v0.4s, v8.4s, v28.4s\n"
                    "\tmla v1.4s, v9.4s, v29.4s\n"
                    "\tld1 {{v8.4s, v9.4s}}, [{zeros}]\n"
                ),
                w.w,
                w.scales,
                x,
                row_bytes,
                n,
                sums
            );
        }
    }
}
