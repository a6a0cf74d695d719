use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use libc::c_int;

// malloc.h; libc has them for some targets only.
const M_TRIM_THRESHOLD: c_int = -1;
const M_TOP_PAD: c_int = -2;
const M_MMAP_THRESHOLD: c_int = -3;
const M_ARENA_MAX: c_int = -8;

/// Allocations of at least this many bytes are mapped on their own, so that freeing them frees memory.
const MAPPED: c_int = 32 << 10;

/// Tunes the allocator for a small process that idles for most of its life: one arena, large buffers mapped on their
/// own, little kept. Call it before there are threads.
pub fn prefer_small() {
    for (parameter, value) in
        [(M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, MAPPED), (M_TRIM_THRESHOLD, 16 << 10), (M_TOP_PAD, 4 << 10)]
    {
        // SAFETY: mallopt only changes numbers of the allocator. A refusal costs memory and nothing else.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Tunes the allocator for a daemon of many threads: at most `arenas` heaps for all of them together (by default eight
/// for each processor), and large blocks go back when they are freed. Call it before there are threads.
pub fn limit_heaps(arenas: u8) {
    for (parameter, value) in
        [(M_ARENA_MAX, c_int::from(arenas)), (M_MMAP_THRESHOLD, 256 << 10), (M_TRIM_THRESHOLD, 256 << 10)]
    {
        // SAFETY: mallopt only changes numbers of the allocator. A refusal costs memory and nothing else.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives freed memory back to the kernel.
pub fn give_back() {
    // SAFETY: malloc_trim touches only memory that nobody uses.
    unsafe { libc::malloc_trim(0) };
}

/// The system's allocator, which notes for each thread how often it was asked. For tests of what work costs: a program that
/// counts makes it its `#[global_allocator]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn note() {
    // A thread at its end may free and ask when this is gone.
    let _ = ASKED.try_with(|asked| asked.set(asked.get() + 1));
}

// SAFETY: every call is the system allocator's own; the note of it neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller promises what that one asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: as above; the block is the system allocator's, as all are.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What `work` returns, and how often it asked for memory on this thread: 0 in a program whose allocator is not [`Counting`].
pub fn count_allocations<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = ASKED.get();
    let result = work();
    (result, ASKED.get() - before)
}
