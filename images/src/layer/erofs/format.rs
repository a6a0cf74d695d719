//! The on-disk format: what the kernel's fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst define. Only the
//! part that every kernel since 5.4 reads is used: no incompatible feature bit is ever set.

/// Bytes of a block.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of a block, for file offsets.
pub(crate) const BLOCK_U64: u64 = BLOCK as u64;
/// Bytes of an inode slot; inode numbers count these from the start of the file.
pub(crate) const SLOT: u64 = 32;
/// Bytes of an extended inode. Compact ones (32 bytes) have no time of their own and are not used.
pub(crate) const INODE: usize = 64;
/// Bytes of a directory entry without its name.
pub(crate) const DIRENT: usize = 12;
/// Where the root inode lies: in the first block behind the super block, since its number has only 16 bits.
pub(crate) const ROOT_OFFSET: u64 = 1024 + 128;
/// Block addresses have 32 bits, the last one means "none".
pub(crate) const MAX_BLOCKS: u64 = u32::MAX as u64 - 1;

const SUPER_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const FEATURE_CHECKSUM: u32 = 1;
const FEATURE_MTIME: u32 = 2;
const NLINK_OFFSET: u64 = 44;

/// The type bits of a mode.
pub(crate) const S_IFMT: u16 = 0o170_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFIFO: u16 = 0o010_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;

/// A point in time, as `struct timespec`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timestamp {
    /// Since 1970, negative before.
    pub(crate) seconds: i64,
    /// Below 1,000,000,000.
    pub(crate) nanoseconds: u32,
}

/// Where an inode's content is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In whole blocks of its own.
    #[default]
    Plain = 0,
    /// The last, partial block directly behind the inode and its attributes, the others in blocks.
    Inline = 2,
}

/// An inode, except for its attributes and content.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    /// With the type bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// Bytes of content.
    pub(crate) size: u64,
    pub(crate) links: u32,
    /// First block of the content, or the device number.
    pub(crate) address: u32,
    pub(crate) layout: Layout,
    /// Bytes of the attribute body behind the inode: 0, or 12 and more in steps of 4.
    pub(crate) xattr_bytes: usize,
    /// A number for 32-bit stat.
    pub(crate) serial: u32,
}

impl Inode {
    pub(crate) fn encode(&self) -> [u8; INODE] {
        let format: u16 = 1 | (self.layout as u16) << 1;
        let xattr_count = if self.xattr_bytes == 0 { 0 } else { (self.xattr_bytes - 12) / 4 + 1 };
        let mut raw = [0; INODE];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &format.to_le_bytes());
        put(2, &(xattr_count as u16).to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.address.to_le_bytes());
        put(20, &self.serial.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.seconds.to_le_bytes());
        put(40, &self.mtime.nanoseconds.to_le_bytes());
        put(NLINK_OFFSET as usize, &self.links.to_le_bytes());
        raw
    }

    pub(crate) fn decode(raw: &[u8; INODE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let xattr_count = usize::from(u16_at(2));
        Self {
            mode: u16_at(4),
            uid: u32_at(24),
            gid: u32_at(28),
            mtime: Timestamp { seconds: u64_at(32).cast_signed(), nanoseconds: u32_at(40) },
            size: u64_at(8),
            links: u32_at(NLINK_OFFSET as usize),
            address: u32_at(16),
            layout: if u16_at(0) >> 1 & 7 == 2 { Layout::Inline } else { Layout::Plain },
            xattr_bytes: if xattr_count == 0 { 0 } else { 12 + (xattr_count - 1) * 4 },
            serial: u32_at(20),
        }
    }
}

/// Where in the file an inode's count of links is.
pub(crate) fn links_offset(nid: u64) -> u64 {
    nid * SLOT + NLINK_OFFSET
}

/// Linux' `new_encode_dev`.
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The type in a directory entry (`FT_*`), from an inode's mode.
pub(crate) fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// What the super block says beyond constants.
pub(crate) struct SuperBlock {
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    /// Block address of the shared attributes; 0 when there are none.
    pub(crate) xattr_block: u32,
    pub(crate) uuid: [u8; 16],
}

impl SuperBlock {
    /// Writes the super block and its checksum into the first block, which already holds the root inode.
    pub(crate) fn write(&self, block: &mut [u8; BLOCK]) {
        let fields = &mut block[SUPER_OFFSET..SUPER_OFFSET + 128];
        let mut put = |at: usize, bytes: &[u8]| fields[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &(FEATURE_CHECKSUM | FEATURE_MTIME).to_le_bytes());
        put(12, &[BLOCK.trailing_zeros() as u8]);
        put(14, &((ROOT_OFFSET / SLOT) as u16).to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(44, &self.xattr_block.to_le_bytes());
        put(48, &self.uuid);
        let checksum = crc32c(&block[SUPER_OFFSET..]);
        block[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// Where the shared attributes are, from the super block in a file's first block; `None` without a super block.
pub(crate) fn shared_xattrs_block(block: &[u8; BLOCK]) -> Option<u32> {
    let word = |at: usize| block[SUPER_OFFSET + at..].first_chunk().map(|word| u32::from_le_bytes(*word));
    (word(0)? == MAGIC).then(|| word(44)).flatten()
}

// CRC-32C as the kernel's crc32c(~0, …): not inverted at the end. Only ever over 3 KiB.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_survives_encoding() {
        let inode = Inode {
            mode: S_IFREG | 0o4755,
            uid: 70_000,
            gid: u32::MAX - 1,
            mtime: Timestamp { seconds: -5, nanoseconds: 999_999_999 },
            size: 5 << 32 | 7,
            links: 3,
            address: 0xdead_beef,
            layout: Layout::Inline,
            xattr_bytes: 12 + 40,
            serial: 9,
        };
        assert_eq!(Inode::decode(&inode.encode()), inode);
    }

    #[test]
    fn the_checksum_is_the_castagnoli_crc() {
        // The standard check value, un-inverted.
        assert_eq!(crc32c(b"123456789"), !0xe306_9283);
    }
}
