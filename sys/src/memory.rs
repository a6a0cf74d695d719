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
