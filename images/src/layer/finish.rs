//! The end of a layer: links are counted, directories written.

use super::apply::Layer;
use super::erofs::{
    self, Attributes, DirEntry, Directory, DirectoryWriter, ImageWriter, Timestamp, Unsealed, file_type,
};
use super::error::{EntryProblem, LayerError, printable};
use super::links::PendingLink;
use super::tree::{Children, HIDES_LOWER, LINKED, NodeId, NodeKind, REPLACES_LOWER, ROOT, Tree};

// Of implied directories that are told of: what layers of real images imply is a handful.
const MAX_IMPLIED: usize = 1 << 14;
const MAX_IMPLIED_BYTES: usize = 1 << 20;
const MAX_IMPLIED_PATH: usize = 4096;

impl<'f> Layer<'f, '_> {
    /// Writes everything but the super block. Tells the implied directories too, see
    /// [`Converted`](super::convert::Converted).
    pub(super) fn finish(mut self) -> Result<(Unsealed<'f>, Vec<Vec<u8>>), LayerError> {
        self.resolve_pending()?;
        self.tree.drop_useless_whiteouts();
        let (mut tree, children) = self.tree.into_children();
        let mut image = self.image;
        let order = reachable_directories(&tree, &children);
        let implied = implied_directories(&tree, &order);
        let whiteout = place_whiteouts(&mut image, &mut tree, &children, &order)?;
        image.close_inodes()?;
        let inodes = count_links(&image, &tree, &children, &order, whiteout)?;
        let unsealed = write_directories(image, tree, &children, &order)?.finish(inodes)?;
        Ok((unsealed, implied))
    }

    // Links whose target came after them, or that link to such links. Each round resolves one more step of a chain.
    fn resolve_pending(&mut self) -> Result<(), LayerError> {
        let mut open: Vec<(u64, PendingLink)> =
            (0..).zip(std::mem::take(&mut self.pending).into_links()).collect();
        // A link that was replaced since is no longer asked for.
        open.retain(|(number, link)| {
            self.tree.kind(link.node) == NodeKind::PendingLink && self.tree.inode(link.node) == *number
        });
        while !open.is_empty() {
            let before = open.len();
            let mut unresolved = Vec::new();
            for (number, link) in open {
                match self.find(&link.target, &link.path)? {
                    Some(target) if self.tree.kind(target) == NodeKind::Directory => {
                        let problem = EntryProblem::LinkToDirectory(printable(&link.target));
                        return Err(LayerError::entry(&link.path, problem));
                    }
                    Some(target) if self.tree.kind(target) != NodeKind::PendingLink => {
                        let (kind, inode) = (self.tree.kind(target), self.tree.inode(target));
                        self.tree.set(link.node, kind, inode);
                        self.tree.mark(link.node, LINKED);
                        self.tree.mark(target, LINKED);
                    }
                    _ => unresolved.push((number, link)),
                }
            }
            if unresolved.len() == before {
                return Err(unresolved[0].1.unresolved());
            }
            open = unresolved;
        }
        Ok(())
    }
}

// From the root downwards, each directory before those in it: what was replaced is not among them.
fn reachable_directories(tree: &Tree, children: &Children) -> Vec<NodeId> {
    let mut order = vec![ROOT];
    let mut next = 0;
    while let Some(directory) = order.get(next).copied() {
        next += 1;
        let entries = children.of_directory(directory);
        order.extend(entries.iter().filter(|node| tree.kind(**node) == NodeKind::Directory));
    }
    order
}

// Those that take the place of what is below do not look like it; opaque ones do.
fn implied_directories(tree: &Tree, order: &[NodeId]) -> Vec<Vec<u8>> {
    let is_implied = |node: &&NodeId| tree.inode(**node) == 0 && !tree.has(**node, REPLACES_LOWER);
    let mut paths = Vec::new();
    let mut bytes = 0;
    for node in order.iter().skip(1).filter(is_implied) {
        let Some(path) = path_of(tree, *node) else { continue };
        bytes += path.len();
        if paths.len() == MAX_IMPLIED || bytes > MAX_IMPLIED_BYTES {
            break;
        }
        paths.push(path);
    }
    paths
}

// None if no system call would take it.
fn path_of(tree: &Tree, mut node: NodeId) -> Option<Vec<u8>> {
    let mut names = Vec::new();
    let mut length = 0;
    while node != ROOT {
        names.push(tree.name(node));
        length += tree.name(node).len() + 1;
        if length > MAX_IMPLIED_PATH {
            return None;
        }
        node = tree.parent(node);
    }
    names.reverse();
    Some(names.join(&b'/'))
}

// All whiteouts are one device with many names, as overlayfs makes them itself.
fn place_whiteouts(
    image: &mut ImageWriter<'_>,
    tree: &mut Tree,
    children: &Children,
    order: &[NodeId],
) -> Result<Option<(u64, u32)>, LayerError> {
    let mut inode = None;
    let mut count = 0;
    for node in order.iter().flat_map(|directory| children.of_directory(*directory)) {
        if tree.kind(*node) == NodeKind::Whiteout {
            let nid = match inode {
                Some(nid) => nid,
                None => {
                    let attributes = Attributes {
                        permissions: 0,
                        uid: 0,
                        gid: 0,
                        mtime: Timestamp::default(),
                        xattrs: Vec::new(),
                    };
                    *inode.insert(image.special(erofs::S_IFCHR, &attributes, 0)?)
                }
            };
            tree.set(*node, NodeKind::Whiteout, nid);
            count += 1;
        }
    }
    Ok(inode.map(|nid| (nid, count)))
}

// Sets the number of links where it is not one, and returns how many inodes are no directories.
fn count_links(
    image: &ImageWriter<'_>,
    tree: &Tree,
    children: &Children,
    order: &[NodeId],
    whiteout: Option<(u64, u32)>,
) -> Result<u64, LayerError> {
    let mut inodes = 0;
    let mut linked = Vec::new();
    for node in order.iter().flat_map(|directory| children.of_directory(*directory)) {
        match tree.kind(*node) {
            NodeKind::Directory | NodeKind::Whiteout => {}
            _ if tree.has(*node, LINKED) => linked.push(tree.inode(*node)),
            _ => inodes += 1,
        }
    }
    linked.sort_unstable();
    for names in linked.chunk_by(|a, b| a == b) {
        inodes += 1;
        if names.len() > 1 {
            image.set_links(names[0], names.len() as u32)?;
        }
    }
    if let Some((nid, count)) = whiteout {
        inodes += 1;
        image.set_links(nid, count)?;
    }
    Ok(inodes)
}

fn write_directories<'f>(
    image: ImageWriter<'f>,
    mut tree: Tree,
    children: &Children,
    order: &[NodeId],
) -> Result<erofs::PlannedDirectories<'f>, LayerError> {
    let mut writer = DirectoryWriter::new(image);
    let mut planned: Vec<Directory> = Vec::with_capacity(order.len());
    for node in order {
        let names = names(&tree, children, *node).map(|(name, _)| name.len());
        let (nid, directory) = writer.plan(tree.inode(*node), tree.has(*node, HIDES_LOWER), names)?;
        // From here on the node holds the number of the real inode.
        tree.set(*node, NodeKind::Directory, nid);
        planned.push(directory);
    }
    let mut writer = writer.start();
    for (node, directory) in order.iter().zip(&planned) {
        let entries = names(&tree, children, *node).map(|(name, node)| DirEntry {
            name,
            nid: tree.inode(node),
            file_type: file_type(mode_of(tree.kind(node))),
        });
        let subdirectories = children
            .of_directory(*node)
            .iter()
            .filter(|child| tree.kind(**child) == NodeKind::Directory)
            .count();
        writer.write(tree.inode(*node), directory, subdirectories as u32 + 2, entries)?;
    }
    Ok(writer)
}

// All names of a directory in byte order. "." and ".." are not first: '!' and '-' sort before them.
fn names<'t>(
    tree: &'t Tree,
    children: &'t Children,
    directory: NodeId,
) -> impl Iterator<Item = (&'t [u8], NodeId)> {
    let own = [(&b"."[..], directory), (b"..", tree.parent(directory))];
    let entries = children.of_directory(directory);
    let place = |name: &[u8]| entries.partition_point(|node| tree.name(*node) < name);
    let (dot, dot_dot) = (place(b"."), place(b".."));
    let named = |node: &NodeId| (tree.name(*node), *node);
    entries[..dot]
        .iter()
        .map(named)
        .chain([own[0]])
        .chain(entries[dot..dot_dot].iter().map(named))
        .chain([own[1]])
        .chain(entries[dot_dot..].iter().map(named))
}

fn mode_of(kind: NodeKind) -> u16 {
    match kind {
        NodeKind::Directory => erofs::S_IFDIR,
        NodeKind::Symlink => erofs::S_IFLNK,
        NodeKind::CharDevice | NodeKind::Whiteout => erofs::S_IFCHR,
        NodeKind::BlockDevice => erofs::S_IFBLK,
        NodeKind::Fifo => erofs::S_IFIFO,
        NodeKind::File | NodeKind::Dead | NodeKind::PendingLink => erofs::S_IFREG,
    }
}
