use std::fs::File;

use super::format::{
    BLOCK, BLOCK_U64, INODE, Inode, Layout, ROOT_OFFSET, S_IFDIR, S_IFLNK, S_IFREG, SLOT, SuperBlock,
    Timestamp, links_offset,
};
use super::metadata::Metadata;
use super::output::Output;
use super::xattr::SharedXattrs;
use crate::layer::error::LayerError;

/// Longer tails get a block of their own: inlining saves less than a quarter of a block there, and packs badly.
const MAX_INLINE_TAIL: usize = BLOCK / 4 * 3;

/// What all inodes have.
pub(crate) struct Attributes {
    /// Permission bits only.
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Writes everything but the directories; see the module's picture.
pub(crate) struct ImageWriter<'f> {
    pub(super) output: Output<'f>,
    pub(super) metadata: Metadata,
    pub(super) shared: SharedXattrs,
    inodes: u32,
}

impl<'f> ImageWriter<'f> {
    pub(crate) fn new(file: &'f File) -> Self {
        Self {
            output: Output::new(file, BLOCK_U64),
            metadata: Metadata::new(),
            shared: SharedXattrs::default(),
            inodes: 0,
        }
    }

    /// A device (`address` from `encode_device`), a fifo or a socket. Returns the inode's number.
    pub(crate) fn special(
        &mut self,
        file_type: u16,
        attributes: &Attributes,
        address: u32,
    ) -> Result<u64, LayerError> {
        let (mut inode, body) = self.inode(file_type, attributes, false);
        inode.address = address;
        self.place(&inode, &body, &[])
    }

    pub(crate) fn symlink(&mut self, attributes: &Attributes, target: &[u8]) -> Result<u64, LayerError> {
        self.with_content(S_IFLNK, attributes, target.len() as u64, |sink| sink.data(target))
    }

    /// A file of `size` bytes, which `content` must give to the sink exactly.
    pub(crate) fn file(
        &mut self,
        attributes: &Attributes,
        size: u64,
        content: impl FnOnce(&mut FileSink<'_, 'f>) -> Result<(), LayerError>,
    ) -> Result<u64, LayerError> {
        self.with_content(S_IFREG, attributes, size, content)
    }

    /// Keeps a directory's attributes in the file until its entries are known: an inode that nothing refers to.
    pub(crate) fn directory_attributes(
        &mut self,
        attributes: &Attributes,
        is_root: bool,
    ) -> Result<u64, LayerError> {
        let (inode, body) = self.inode(S_IFDIR, attributes, is_root);
        self.place(&inode, &body, &[])
    }

    /// The target of a symbolic link written before.
    pub(crate) fn read_symlink(&mut self, nid: u64) -> Result<Vec<u8>, LayerError> {
        let (inode, _) = self.read_inode(nid)?;
        let mut target = vec![0; inode.size as usize];
        match inode.layout {
            Layout::Inline => {
                let position = nid * SLOT + (INODE + inode.xattr_bytes) as u64;
                self.metadata.read(&mut self.output, &mut target, position)?;
            }
            Layout::Plain => self.output.read_at(&mut target, u64::from(inode.address) * BLOCK_U64)?,
        }
        Ok(target)
    }

    /// Sets an inode's count of links. Only when all inodes are written out.
    pub(crate) fn set_links(&self, nid: u64, links: u32) -> Result<(), LayerError> {
        self.output.write_at(&links.to_le_bytes(), links_offset(nid))
    }

    /// Writes out all inodes so far.
    pub(crate) fn close_inodes(&mut self) -> Result<(), LayerError> {
        self.metadata.close(&self.output)?;
        self.output.flush()
    }

    pub(super) fn read_inode(&mut self, nid: u64) -> Result<(Inode, Vec<u8>), LayerError> {
        let mut raw = [0; INODE];
        self.metadata.read(&mut self.output, &mut raw, nid * SLOT)?;
        let inode = Inode::decode(&raw);
        let mut body = vec![0; inode.xattr_bytes];
        self.metadata.read(&mut self.output, &mut body, nid * SLOT + INODE as u64)?;
        Ok((inode, body))
    }

    pub(super) fn next_serial(&mut self) -> u32 {
        self.inodes = self.inodes.wrapping_add(1);
        self.inodes
    }

    fn inode(&mut self, file_type: u16, attributes: &Attributes, share_all: bool) -> (Inode, Vec<u8>) {
        let body = self.shared.body(&attributes.xattrs, share_all);
        let inode = Inode {
            mode: file_type | attributes.permissions,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            links: 1,
            xattr_bytes: body.len(),
            serial: self.next_serial(),
            ..Inode::default()
        };
        (inode, body)
    }

    fn place(&mut self, inode: &Inode, body: &[u8], tail: &[u8]) -> Result<u64, LayerError> {
        let head = [inode.encode().as_slice(), body].concat();
        self.metadata.place(&mut self.output, &head, tail)
    }

    fn with_content(
        &mut self,
        file_type: u16,
        attributes: &Attributes,
        size: u64,
        content: impl FnOnce(&mut FileSink<'_, 'f>) -> Result<(), LayerError>,
    ) -> Result<u64, LayerError> {
        let (mut inode, body) = self.inode(file_type, attributes, false);
        let tail = (size % BLOCK_U64) as usize;
        let is_inline = tail > 0 && tail <= MAX_INLINE_TAIL && INODE + body.len() + tail <= BLOCK;
        inode.size = size;
        inode.layout = if is_inline { Layout::Inline } else { Layout::Plain };
        let in_blocks = if is_inline { size - tail as u64 } else { size };
        if in_blocks > 0 {
            inode.address = (self.output.position() / BLOCK_U64) as u32;
        }
        let mut sink = FileSink { output: &mut self.output, in_blocks, tail: Vec::new() };
        content(&mut sink)?;
        let tail = sink.tail;
        self.output.pad_to_block()?;
        self.place(&inode, &body, &tail)
    }

    pub(super) fn write_super_block(
        &self,
        root: &[u8],
        inodes: u64,
        xattr_block: u32,
        blocks: u32,
        uuid: [u8; 16],
    ) -> Result<(), LayerError> {
        let mut block = [0; BLOCK];
        block[ROOT_OFFSET as usize..][..root.len()].copy_from_slice(root);
        SuperBlock { inodes, blocks, xattr_block, uuid }.write(&mut block);
        self.output.write_at(&block, 0)
    }
}

/// Takes a file's content: whole blocks go out, an inline tail is kept for the inode.
pub(crate) struct FileSink<'w, 'f> {
    output: &'w mut Output<'f>,
    in_blocks: u64,
    tail: Vec<u8>,
}

impl FileSink<'_, '_> {
    pub(crate) fn data(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        let split = bytes.len().min(usize::try_from(self.in_blocks).unwrap_or(usize::MAX));
        let (in_blocks, tail) = bytes.split_at(split);
        self.in_blocks -= split as u64;
        self.tail.extend_from_slice(tail);
        if in_blocks.is_empty() { Ok(()) } else { self.output.append(in_blocks) }
    }

    pub(crate) fn hole(&mut self, length: u64) -> Result<(), LayerError> {
        let in_blocks = length.min(self.in_blocks);
        self.in_blocks -= in_blocks;
        // Less than a block: what is left of the file.
        let tail = (length - in_blocks) as usize;
        self.tail.resize(self.tail.len() + tail, 0);
        self.output.append_zeros(in_blocks)
    }
}
