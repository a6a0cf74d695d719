//! Reads back what the writer wrote: a layer's directories and their attributes, without a mount. Files are hull's own, but
//! disks fail: whatever does not fit together is an error, never a panic.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::format::{
    BLOCK, BLOCK_U64, DIRENT, INODE, Inode, Layout, MAX_BLOCKS, ROOT_OFFSET, S_IFDIR, S_IFLNK, S_IFMT,
    S_IFREG, SLOT, shared_xattrs_block,
};
use super::xattr::{OPAQUE, Value, decode};

/// Bytes of a symbolic link's target, as Linux has it.
const MAX_TARGET: u64 = 4095;

/// A finished layer file.
pub(crate) struct ImageReader {
    file: File,
    xattr_block: u32,
}

/// An inode of a layer file with its extended attributes.
pub(crate) struct Node {
    nid: u64,
    inode: Inode,
    /// Names and values, overlayfs' mark of an opaque directory left out.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether a directory hides what lower layers have in it.
    pub(crate) is_opaque: bool,
}

impl Node {
    pub(crate) fn is_directory(&self) -> bool {
        self.inode.mode & S_IFMT == S_IFDIR
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.inode.mode & S_IFMT == S_IFLNK
    }

    /// Permission bits only.
    pub(crate) fn permissions(&self) -> u16 {
        self.inode.mode & 0o7777
    }

    pub(crate) fn uid(&self) -> u32 {
        self.inode.uid
    }

    pub(crate) fn gid(&self) -> u32 {
        self.inode.gid
    }
}

/// Where the bytes of a file are in the layer file.
pub(crate) struct FileContent {
    size: u64,
    in_blocks: u64,
    blocks: u64,
    tail: u64,
}

impl FileContent {
    /// The place of the byte at `offset`, and how many follow it there.
    pub(crate) fn at(&self, offset: u64) -> io::Result<(u64, u64)> {
        match offset {
            _ if offset < self.in_blocks => Ok((self.blocks + offset, self.in_blocks - offset)),
            _ if offset < self.size => Ok((self.tail + (offset - self.in_blocks), self.size - offset)),
            _ => Err(damaged("a file is shorter than its archive's entry")),
        }
    }
}

impl ImageReader {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    pub(crate) fn new(file: File) -> io::Result<Self> {
        let mut block = [0; BLOCK];
        file.read_exact_at(&mut block, 0)?;
        let xattr_block = shared_xattrs_block(&block).ok_or_else(|| damaged("no super block"))?;
        Ok(Self { file, xattr_block })
    }

    pub(crate) fn root(&self) -> io::Result<Node> {
        self.node(ROOT_OFFSET / SLOT)
    }

    /// The entry `name` of a directory.
    pub(crate) fn lookup(&self, directory: &Node, name: &[u8]) -> io::Result<Option<Node>> {
        // Names are in order, within a block and from one to the next: the last block that does not begin behind it.
        let blocks = directory.inode.size.div_ceil(BLOCK_U64);
        let (mut low, mut high) = (0, blocks);
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            let block = self.directory_block(directory, middle)?;
            let (first, _) = entry(&block, 0)?;
            if first <= name { low = middle } else { high = middle }
        }
        if blocks == 0 {
            return Ok(None);
        }
        let block = self.directory_block(directory, low)?;
        for number in 0..count(&block)? {
            let (found, nid) = entry(&block, number)?;
            if found == name {
                return self.node(nid).map(Some);
            }
        }
        Ok(None)
    }

    /// The target of a symbolic link.
    pub(crate) fn target(&self, link: &Node) -> io::Result<Vec<u8>> {
        let Node { nid, inode, .. } = link;
        if !link.is_symlink() || inode.size > MAX_TARGET {
            return Err(damaged("an inode is no symbolic link"));
        }
        let position = match inode.layout {
            Layout::Inline => nid * SLOT + (INODE + inode.xattr_bytes) as u64,
            Layout::Plain => u64::from(inode.address) * BLOCK_U64,
        };
        let mut target = vec![0; inode.size as usize];
        self.file.read_exact_at(&mut target, position)?;
        Ok(target)
    }

    /// Where the content of the regular file with this number is.
    pub(crate) fn content(&self, nid: u64) -> io::Result<FileContent> {
        let (inode, position) = self.inode(nid)?;
        if inode.mode & S_IFMT != S_IFREG {
            return Err(damaged("an inode is no regular file"));
        }
        let tail = match inode.layout {
            Layout::Inline => inode.size % BLOCK_U64,
            Layout::Plain => 0,
        };
        Ok(FileContent {
            size: inode.size,
            in_blocks: inode.size - tail,
            blocks: u64::from(inode.address) * BLOCK_U64,
            tail: position + (INODE + inode.xattr_bytes) as u64,
        })
    }

    fn directory_block(&self, directory: &Node, number: u64) -> io::Result<Vec<u8>> {
        let Node { nid, inode, .. } = directory;
        let start = number * BLOCK_U64;
        let length = inode.size.saturating_sub(start).min(BLOCK_U64);
        let is_tail = number == inode.size / BLOCK_U64;
        let position = match inode.layout {
            Layout::Inline if is_tail => nid * SLOT + (INODE + inode.xattr_bytes) as u64,
            _ => u64::from(inode.address) * BLOCK_U64 + start,
        };
        let mut block = vec![0; length as usize];
        self.file.read_exact_at(&mut block, position)?;
        Ok(block)
    }

    /// An inode and where in the file it is.
    fn inode(&self, nid: u64) -> io::Result<(Inode, u64)> {
        let limit = MAX_BLOCKS * BLOCK_U64;
        let position = nid.checked_mul(SLOT).filter(|position| *position < limit);
        let position = position.ok_or_else(|| damaged("an inode number is too large"))?;
        let mut raw = [0; INODE];
        self.file.read_exact_at(&mut raw, position)?;
        Ok((Inode::decode(&raw), position))
    }

    fn node(&self, nid: u64) -> io::Result<Node> {
        let (inode, position) = self.inode(nid)?;
        let mut body = vec![0; inode.xattr_bytes];
        self.file.read_exact_at(&mut body, position + INODE as u64)?;
        let mut xattrs = Vec::new();
        for value in decode(&body).ok_or_else(bad_xattrs)? {
            xattrs.push(match value {
                Value::Inline(name, value) => (name, value),
                Value::Shared(id) => self.shared_xattr(id)?,
            });
        }
        let is_opaque = xattrs.iter().any(|(name, _)| name == OPAQUE.0);
        xattrs.retain(|(name, _)| name != OPAQUE.0);
        Ok(Node { nid, inode, xattrs, is_opaque })
    }

    fn shared_xattr(&self, id: u32) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let position = u64::from(self.xattr_block) * BLOCK_U64 + u64::from(id) * 4;
        let mut head = [0; 4];
        self.file.read_exact_at(&mut head, position)?;
        let length = 4 + usize::from(head[0]) + usize::from(u16::from_le_bytes([head[2], head[3]]));
        let mut entry = vec![0; length];
        self.file.read_exact_at(&mut entry, position)?;
        super::xattr::decode_entry(&entry).map(|(name, value, _)| (name, value)).ok_or_else(bad_xattrs)
    }
}

// Entries come first, names behind them: where the first name begins tells how many there are.
fn count(block: &[u8]) -> io::Result<usize> {
    let names = block.get(8..10).map(|raw| usize::from(u16::from_le_bytes([raw[0], raw[1]])));
    match names {
        Some(names) if names >= DIRENT && names <= block.len() && names.is_multiple_of(DIRENT) => {
            Ok(names / DIRENT)
        }
        _ => Err(damaged("a directory block has no entries")),
    }
}

fn entry(block: &[u8], number: usize) -> io::Result<(&[u8], u64)> {
    let wrong = || damaged("a directory entry lies outside its block");
    let count = count(block)?;
    let raw = block.get(number * DIRENT..(number + 1) * DIRENT).ok_or_else(wrong)?;
    let nid = raw.first_chunk().map(|nid| u64::from_le_bytes(*nid)).ok_or_else(wrong)?;
    let offset = |raw: &[u8]| usize::from(u16::from_le_bytes([raw[8], raw[9]]));
    let end = match block.get((number + 1) * DIRENT..(number + 2) * DIRENT) {
        Some(next) if number + 1 < count => offset(next),
        _ => block.len(),
    };
    let name = block.get(offset(raw)..end).ok_or_else(wrong)?;
    // The last name of a block is padded with zeros.
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok((&name[..length], nid))
}

fn bad_xattrs() -> io::Error {
    damaged("an extended attribute is cut off")
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the layer file is damaged: {what}"))
}
