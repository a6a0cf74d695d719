//! What each entry of an archive does to the layer, as extraction would do it: later entries replace earlier ones,
//! missing parents are made, symbolic links on the way are followed within the layer.

use std::io::BufRead;

use super::erofs::{self, Attributes, ImageWriter, encode_device};
use super::error::{EntryProblem, LayerError, printable};
use super::limits::Limits;
use super::links::{PendingLink, PendingLinks};
use super::path::{self, Target};
use super::tar::{Content, Device, Entry, EntryKind, TarReader};
use super::tree::{HIDES_LOWER, LINKED, NodeId, NodeKind, REPLACES_LOWER, ROOT, Tree};
use super::xattr;

const MAX_SYMLINK_TARGET: usize = 4095;
// As the kernel (MAXSYMLINKS).
const MAX_HOPS: usize = 40;
// Lookups of path components for a whole layer, some seconds' worth: short compressed input could ask for days of them.
const MAX_STEPS: u64 = 1 << 28;
const SYMLINK_STEP: u64 = 16;

/// A layer under construction.
pub(super) struct Layer<'f, 'l> {
    pub(super) image: ImageWriter<'f>,
    pub(super) tree: Tree,
    pub(super) pending: PendingLinks,
    pub(super) content: u64,
    limits: &'l Limits,
    /// The directory of the previous entry: the next one is most often in it too. Valid until an entry is replaced.
    recent: Option<(Vec<u8>, NodeId)>,
    steps: u64,
}

impl<'f, 'l> Layer<'f, 'l> {
    pub(super) fn new(image: ImageWriter<'f>, limits: &'l Limits) -> Self {
        Self {
            image,
            tree: Tree::new(limits),
            pending: PendingLinks::default(),
            content: 0,
            limits,
            recent: None,
            steps: 0,
        }
    }

    /// Takes all entries of an archive, and whatever follows its end.
    pub(super) fn read<R: BufRead>(&mut self, reader: &mut TarReader<'_, R>) -> Result<(), LayerError> {
        while let Some(entry) = reader.next()? {
            self.apply(entry, reader)?;
        }
        reader.drain()
    }

    /// Whether the root is opaque.
    pub(super) fn hides_all_lower(&self) -> bool {
        self.tree.has(ROOT, HIDES_LOWER)
    }

    fn apply<R: BufRead>(
        &mut self,
        mut entry: Entry,
        reader: &mut TarReader<'_, R>,
    ) -> Result<(), LayerError> {
        let path = std::mem::take(&mut entry.path);
        match Target::of(&path, self.limits)? {
            Target::Ignored => Ok(()),
            Target::Opaque(directory) => {
                let node = self.directory(&directory, &path)?;
                self.tree.mark(node, HIDES_LOWER);
                Ok(())
            }
            Target::Whiteout(components) => self.whiteout(&components, &path),
            Target::Entry(components) => match components.split_last() {
                None => self.root(entry, &path),
                Some((name, parents)) => {
                    let parent = self.parent(parents, &path)?;
                    self.entry(parent, name, entry, &path, reader)
                }
            },
        }
    }

    fn root(&mut self, entry: Entry, path: &[u8]) -> Result<(), LayerError> {
        if entry.kind != EntryKind::Directory {
            return Err(LayerError::entry(path, EntryProblem::EmptyPath));
        }
        let attributes = self.attributes(&entry, path)?;
        let inode = self.image.directory_attributes(&attributes, true)?;
        self.tree.set(ROOT, NodeKind::Directory, inode);
        Ok(())
    }

    // Whiteouts speak of lower layers only: what this layer has under the name stays, before or after.
    fn whiteout(&mut self, components: &[&[u8]], path: &[u8]) -> Result<(), LayerError> {
        let Some((name, parents)) = components.split_last() else { return Ok(()) };
        let parent = self.parent(parents, path)?;
        self.hide_lower(parent, name)
    }

    fn hide_lower(&mut self, parent: NodeId, name: &[u8]) -> Result<(), LayerError> {
        let node = match self.tree.lookup(parent, name) {
            Some(node) => node,
            None => self.tree.add(parent, name, NodeKind::Whiteout, 0)?,
        };
        self.tree.mark(node, HIDES_LOWER | REPLACES_LOWER);
        Ok(())
    }

    fn entry<R: BufRead>(
        &mut self,
        parent: NodeId,
        name: &[u8],
        mut entry: Entry,
        path: &[u8],
        reader: &mut TarReader<'_, R>,
    ) -> Result<(), LayerError> {
        if let EntryKind::HardLink(target) = &entry.kind {
            return self.hard_link(parent, name, path, target);
        }
        let attributes = self.attributes(&entry, path)?;
        entry.xattrs.clear();
        let (kind, inode) = match entry.kind {
            EntryKind::HardLink(_) => return Ok(()),
            EntryKind::Directory => {
                (NodeKind::Directory, self.image.directory_attributes(&attributes, false)?)
            }
            EntryKind::File(size) => {
                self.count_content(size)?;
                let inode = self.image.file(&attributes, size, |sink| {
                    reader.content(|piece| match piece {
                        Content::Data(bytes) => sink.data(bytes),
                        Content::Hole(length) => sink.hole(length),
                    })
                })?;
                reader.content_is_in(inode)?;
                (NodeKind::File, inode)
            }
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_SYMLINK_TARGET {
                    return Err(LayerError::entry(path, EntryProblem::BadSymlinkTarget));
                }
                (NodeKind::Symlink, self.image.symlink(&attributes, &target)?)
            }
            // An overlayfs whiteout in its own form means the same as a `.wh.` file.
            EntryKind::CharDevice(Device { major: 0, minor: 0 }) => return self.hide_lower(parent, name),
            EntryKind::CharDevice(Device { major, minor }) => {
                let address = encode_device(major, minor);
                (NodeKind::CharDevice, self.image.special(erofs::S_IFCHR, &attributes, address)?)
            }
            EntryKind::BlockDevice(Device { major, minor }) => {
                let address = encode_device(major, minor);
                (NodeKind::BlockDevice, self.image.special(erofs::S_IFBLK, &attributes, address)?)
            }
            EntryKind::Fifo => (NodeKind::Fifo, self.image.special(erofs::S_IFIFO, &attributes, 0)?),
        };
        self.put(parent, name, kind, inode).map(|_| ())
    }

    // Names an inode. A directory that is there already keeps its entries when it is named again.
    fn put(&mut self, parent: NodeId, name: &[u8], kind: NodeKind, inode: u64) -> Result<NodeId, LayerError> {
        let Some(old) = self.tree.lookup(parent, name) else {
            return self.tree.add(parent, name, kind, inode);
        };
        match (self.tree.kind(old), kind) {
            (NodeKind::Directory, NodeKind::Directory) => self.tree.set(old, kind, inode),
            (NodeKind::Directory, _) => {
                self.recent = None;
                return self.tree.replace(old, kind, inode);
            }
            _ => {
                self.recent = None;
                self.tree.unmark(old, LINKED);
                self.tree.set(old, kind, inode);
            }
        }
        Ok(old)
    }

    fn hard_link(
        &mut self,
        parent: NodeId,
        name: &[u8],
        path: &[u8],
        target: &[u8],
    ) -> Result<(), LayerError> {
        let refuse = |problem| Err(LayerError::entry(path, problem));
        let target_node = match self.find(target, path)? {
            Some(node) if Some(node) == self.tree.lookup(parent, name) => {
                return refuse(EntryProblem::LinkToItself);
            }
            Some(node) => node,
            None => {
                let number = self.pending.next();
                let node = self.put(parent, name, NodeKind::PendingLink, number)?;
                let link = PendingLink { node, path: path.to_vec(), target: target.to_vec() };
                return self.pending.push(link);
            }
        };
        let (kind, inode) = (self.tree.kind(target_node), self.tree.inode(target_node));
        match kind {
            NodeKind::Directory => refuse(EntryProblem::LinkToDirectory(printable(target))),
            NodeKind::PendingLink => {
                let number = self.pending.next();
                let node = self.put(parent, name, NodeKind::PendingLink, number)?;
                self.pending.push(PendingLink { node, path: path.to_vec(), target: target.to_vec() })
            }
            _ => {
                let node = self.put(parent, name, kind, inode)?;
                self.tree.mark(node, LINKED);
                self.tree.mark(target_node, LINKED);
                Ok(())
            }
        }
    }

    /// The entry a hard link names, with symbolic links followed in all but its last component. Whiteouts are no entries.
    pub(super) fn find(&mut self, target: &[u8], path: &[u8]) -> Result<Option<NodeId>, LayerError> {
        let refuse = |problem| Err(LayerError::entry(path, problem));
        let components = match path::split(target, self.limits) {
            Ok(components) => components,
            Err(EntryProblem::ClimbsOut) => return refuse(EntryProblem::LinkClimbsOut(printable(target))),
            Err(problem) => return refuse(problem),
        };
        let Some((name, parents)) = components.split_last() else {
            return refuse(EntryProblem::LinkToDirectory(printable(target)));
        };
        let Some(parent) = self.walk(parents, path, false)? else { return Ok(None) };
        let found = self.tree.lookup(parent, name);
        Ok(found.filter(|node| self.tree.kind(*node) != NodeKind::Whiteout))
    }

    // The directory an entry is in, made if it is missing.
    fn parent(&mut self, components: &[&[u8]], path: &[u8]) -> Result<NodeId, LayerError> {
        let key = components.join(&b'/');
        if let Some((recent, node)) = &self.recent
            && *recent == key
        {
            return Ok(*node);
        }
        let node = self.directory(components, path)?;
        self.recent = Some((key, node));
        Ok(node)
    }

    fn directory(&mut self, components: &[&[u8]], path: &[u8]) -> Result<NodeId, LayerError> {
        let refuse = || LayerError::entry(path, EntryProblem::ParentNotDirectory);
        self.walk(components, path, true)?.ok_or_else(refuse)
    }

    // Follows `components` from the root. With `make`, missing directories come into being; without, the answer is None
    // where extraction would find nothing.
    fn walk(&mut self, components: &[&[u8]], path: &[u8], make: bool) -> Result<Option<NodeId>, LayerError> {
        self.step(components.len() as u64)?;
        let mut at = ROOT;
        for (index, component) in components.iter().enumerate() {
            let node = match self.tree.lookup(at, component) {
                None if make => self.tree.add(at, component, NodeKind::Directory, 0)?,
                None => return Ok(None),
                Some(node) => node,
            };
            match self.tree.kind(node) {
                NodeKind::Directory => at = node,
                NodeKind::Whiteout if make => {
                    self.tree.set(node, NodeKind::Directory, 0);
                    self.tree.mark(node, HIDES_LOWER);
                    at = node;
                }
                NodeKind::Symlink => return self.walk_symlinks(at, &components[index..], path, make),
                _ if make => return Err(LayerError::entry(path, EntryProblem::ParentNotDirectory)),
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    // The same with symbolic links: their targets stay within the layer, whose root is their "/" (containerd resolves
    // the parent of an entry in the same way).
    fn walk_symlinks(
        &mut self,
        from: NodeId,
        components: &[&[u8]],
        path: &[u8],
        make: bool,
    ) -> Result<Option<NodeId>, LayerError> {
        let mut at = from;
        let mut hops = 0;
        let mut left: Vec<Vec<u8>> = components.iter().rev().map(|component| component.to_vec()).collect();
        while let Some(component) = left.pop() {
            self.step(SYMLINK_STEP)?;
            match component.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at = self.tree.parent(at);
                    continue;
                }
                name if name.len() > 255 => {
                    return Err(LayerError::entry(path, EntryProblem::NameTooLong));
                }
                _ => {}
            }
            let node = match self.tree.lookup(at, &component) {
                None if make => self.tree.add(at, &component, NodeKind::Directory, 0)?,
                None => return Ok(None),
                Some(node) => node,
            };
            match self.tree.kind(node) {
                NodeKind::Directory => at = node,
                NodeKind::Whiteout if make => {
                    self.tree.set(node, NodeKind::Directory, 0);
                    self.tree.mark(node, HIDES_LOWER);
                    at = node;
                }
                NodeKind::Symlink => {
                    hops += 1;
                    if hops > MAX_HOPS {
                        return Err(LayerError::entry(path, EntryProblem::SymlinkLoop));
                    }
                    let target = self.image.read_symlink(self.tree.inode(node))?;
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    left.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                _ if make => return Err(LayerError::entry(path, EntryProblem::ParentNotDirectory)),
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn step(&mut self, steps: u64) -> Result<(), LayerError> {
        self.steps += steps;
        if self.steps > MAX_STEPS {
            return Err(LayerError::Limit { what: "steps through directories and links", limit: MAX_STEPS });
        }
        Ok(())
    }

    fn attributes(&self, entry: &Entry, path: &[u8]) -> Result<Attributes, LayerError> {
        Ok(Attributes {
            // The permissions of a symbolic link mean nothing; Linux shows all of them.
            permissions: if matches!(entry.kind, EntryKind::Symlink(_)) { 0o777 } else { entry.mode },
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: xattr::accept(&entry.xattrs, self.limits, path)?,
        })
    }

    fn count_content(&mut self, size: u64) -> Result<(), LayerError> {
        self.content = self.content.saturating_add(size);
        let limit = self.limits.max_content;
        if self.content > limit {
            return Err(LayerError::Limit { what: "bytes of file content", limit });
        }
        Ok(())
    }
}
