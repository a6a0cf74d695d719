use super::directory::{self, DirEntry};
use super::format::{BLOCK, BLOCK_U64, INODE, Inode, Layout, ROOT_OFFSET, S_IFDIR, SLOT, Timestamp};
use super::image::ImageWriter;
use super::output::Output;
use crate::layer::error::LayerError;

/// A directory whose place is decided and whose entries are not yet written. Twelve bytes: there may be a million.
#[derive(Clone, Copy)]
pub(crate) struct Directory {
    /// The inode where its attributes were kept, 40 bits; 0 for a directory that the archive never mentioned.
    attributes_low: u32,
    attributes_high: u8,
    is_opaque: bool,
    /// First block, from the start of the directory blocks.
    block: u32,
}

impl Directory {
    fn attributes(&self) -> u64 {
        u64::from(self.attributes_low) | u64::from(self.attributes_high) << 32
    }
}

/// Lays out all directories, then writes them in the same order: a directory refers to others by number, so all places
/// must be known before the first is written.
pub(crate) struct DirectoryWriter<'f> {
    image: ImageWriter<'f>,
    /// Next free byte for inodes, counted in the file.
    position: u64,
    blocks: u64,
    count: u64,
    root: Vec<u8>,
}

impl<'f> DirectoryWriter<'f> {
    /// Starts behind everything that `image` has written, whose inodes must be closed.
    pub(crate) fn new(image: ImageWriter<'f>) -> Self {
        let position = image.output.position();
        Self { image, position, blocks: 0, count: 0, root: Vec::new() }
    }

    /// Decides the place of the next directory; the first one is the root. `names` are the lengths of all its names in
    /// their order, `.` and `..` included. Gives the number of its inode too.
    pub(crate) fn plan(
        &mut self,
        attributes: u64,
        is_opaque: bool,
        names: impl Iterator<Item = usize>,
    ) -> Result<(u64, Directory), LayerError> {
        let (full, tail) = directory::measure(names);
        let is_root = self.count == 0;
        let head = INODE + self.attributes(attributes, is_opaque)?.1.len();
        let is_inline = is_inline(head, tail, is_root);
        let block = u32::try_from(self.blocks).map_err(|_| too_large())?;
        self.blocks += full + u64::from(!is_inline);
        self.count += 1;
        let size = (head + if is_inline { tail } else { 0 }) as u64;
        let position = if is_root { ROOT_OFFSET } else { self.reserve(size) };
        let directory = Directory {
            attributes_low: attributes as u32,
            attributes_high: (attributes >> 32) as u8,
            is_opaque,
            block,
        };
        Ok((position / SLOT, directory))
    }

    // Behind the previous inode, or at the next block if it would straddle.
    fn reserve(&mut self, size: u64) -> u64 {
        let free = self.position.next_multiple_of(BLOCK_U64) - self.position;
        let at = if size <= free { self.position } else { self.position + free };
        self.position = (at + size).next_multiple_of(SLOT);
        at
    }

    /// Ends the planning.
    pub(crate) fn start(self) -> PlannedDirectories<'f> {
        let inodes = Output::new(self.image.output.file(), self.image.output.position());
        let blocks = Output::new(self.image.output.file(), self.position.next_multiple_of(BLOCK_U64));
        let first_block = blocks.position() / BLOCK_U64;
        PlannedDirectories { writer: self, inodes, blocks, first_block }
    }

    fn attributes(&mut self, nid: u64, is_opaque: bool) -> Result<(Inode, Vec<u8>), LayerError> {
        let (inode, body) = if nid == 0 {
            let inode = Inode {
                mode: S_IFDIR | 0o755,
                mtime: Timestamp::default(),
                serial: self.image.next_serial(),
                ..Inode::default()
            };
            (inode, Vec::new())
        } else {
            self.image.read_inode(nid)?
        };
        let body = if is_opaque { self.image.shared.with_opaque(&body) } else { body };
        Ok((inode, body))
    }
}

/// Writes the directories that a [`DirectoryWriter`] planned.
pub(crate) struct PlannedDirectories<'f> {
    writer: DirectoryWriter<'f>,
    inodes: Output<'f>,
    blocks: Output<'f>,
    first_block: u64,
}

impl<'f> PlannedDirectories<'f> {
    /// Writes the next directory of the plan. `entries` come sorted by name, `.` and `..` included; `links` is 2 and one
    /// for each directory in it.
    pub(crate) fn write<'n>(
        &mut self,
        nid: u64,
        directory: &Directory,
        links: u32,
        entries: impl Iterator<Item = DirEntry<'n>>,
    ) -> Result<(), LayerError> {
        let (mut inode, body) = self.writer.attributes(directory.attributes(), directory.is_opaque)?;
        let is_root = nid == ROOT_OFFSET / SLOT;
        let first = self.blocks.position();
        let tail = directory::pack(entries, |block| self.blocks.append(block))?;
        let is_inline = is_inline(INODE + body.len(), tail.len(), is_root);
        if !is_inline {
            self.blocks.append(&tail)?;
            self.blocks.pad_to_block()?;
        }
        let full = (self.blocks.position() - first) / BLOCK_U64 - u64::from(!is_inline);
        inode.size = full * BLOCK_U64 + tail.len() as u64;
        inode.address = (self.first_block + u64::from(directory.block)) as u32;
        inode.layout = if is_inline { Layout::Inline } else { Layout::Plain };
        inode.links = links;
        inode.xattr_bytes = body.len();
        let mut raw = [inode.encode().as_slice(), &body].concat();
        if is_inline {
            raw.extend_from_slice(&tail);
        }
        if is_root {
            self.writer.root = raw;
            return Ok(());
        }
        self.inodes.append_zeros(nid * SLOT - self.inodes.position())?;
        self.inodes.append(&raw)
    }

    /// Writes the shared attributes behind the directories and returns what the super block needs. Until that is written
    /// the file is no file system.
    pub(crate) fn finish(mut self, other_inodes: u64) -> Result<Unsealed<'f>, LayerError> {
        self.inodes.flush()?;
        let xattr_block = self.writer.image.shared.write(&mut self.blocks)?;
        self.blocks.flush()?;
        let size = self.blocks.position();
        let file = self.writer.image.output.file();
        file.set_len(size).map_err(LayerError::WriteFile)?;
        Ok(Unsealed {
            inodes: other_inodes + self.writer.count,
            image: self.writer.image,
            root: self.writer.root,
            xattr_block,
            size,
        })
    }
}

/// A complete image but for its super block.
pub(crate) struct Unsealed<'f> {
    image: ImageWriter<'f>,
    root: Vec<u8>,
    inodes: u64,
    xattr_block: u32,
    /// Bytes of the file.
    pub(crate) size: u64,
}

impl Unsealed<'_> {
    /// Writes the super block: from now on the file can be mounted.
    pub(crate) fn seal(self, uuid: [u8; 16]) -> Result<(), LayerError> {
        let blocks = u32::try_from(self.size / BLOCK_U64).map_err(|_| too_large())?;
        self.image.write_super_block(&self.root, self.inodes, self.xattr_block, blocks, uuid)
    }
}

fn is_inline(head: usize, tail: usize, is_root: bool) -> bool {
    let room = if is_root { BLOCK - ROOT_OFFSET as usize } else { BLOCK };
    head + tail <= room
}

fn too_large() -> LayerError {
    LayerError::Limit { what: "blocks of the layer file", limit: u64::from(u32::MAX) }
}
