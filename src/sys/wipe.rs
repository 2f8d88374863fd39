//! The allocator of the binary: memory is cleared when it is given back, so that no word of a prompt or an answer outlives its
//! request on the heap. Set in `main`; nothing comes next on the data's way.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, and zeros over all that is freed.
#[derive(Clone, Copy, Debug)]
pub struct Wiping;

// SAFETY: every block comes from and goes back to `System` with the layout that it was asked for with; `System` keeps the contract.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block has `layout.size()` bytes, is the caller's until `System` takes it, and is not used after that.
        unsafe {
            block.write_bytes(0, layout.size());
            // Without this the compiler may leave out writes that nobody can read.
            std::hint::black_box(block);
            System.dealloc(block, layout);
        }
    }

    // `realloc` is the default: a new block, a copy, and `dealloc` of the old one. `System` would move without wiping.
}
