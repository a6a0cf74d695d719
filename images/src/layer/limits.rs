/// Bounds on what one layer may ask for. Every one is checked before memory or disk is spent.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Uncompressed bytes of the archive, padding and everything after its end included. Default 256 GiB.
    pub max_uncompressed: u64,
    /// Sum of all file sizes with the holes of sparse files counted. Default 1 TiB (holes cost no disk).
    pub max_content: u64,
    /// Entries of the archive, and directory entries of the result. Default 2,000,000.
    pub max_entries: u64,
    /// Bytes of a path or of a link's target. Default 4096, as Linux.
    pub max_path: u64,
    /// Bytes of all distinct names kept in memory. Default 96 MiB.
    pub max_name_bytes: u64,
    /// Bytes of all extended attributes of one entry. Default 64 KiB, at most 200 KiB are representable.
    pub max_xattr_bytes: u64,
    /// Bytes of one PAX or GNU extended header. Default 1 MiB.
    pub max_extended_header: u64,
    /// Data segments of one sparse file. Default 65,536.
    pub max_sparse_segments: u64,
    /// Base-2 logarithm of the largest zstd window, which is memory. Default 27 (128 MiB), the zstd tool's own;
    /// usual layers need 8 MiB or less.
    pub max_zstd_window_log: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_uncompressed: 256 << 30,
            max_content: 1 << 40,
            max_entries: 2_000_000,
            max_path: 4096,
            max_name_bytes: 96 << 20,
            max_xattr_bytes: 64 << 10,
            max_extended_header: 1 << 20,
            max_sparse_segments: 1 << 16,
            max_zstd_window_log: 27,
        }
    }
}
