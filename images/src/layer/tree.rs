//! The names of a layer while it is read. Inodes are in the layer file already; here is only what names them, in 16 bytes
//! an entry and each name once where names repeat: a million entries take about 40 MiB.

use std::hash::{BuildHasher, RandomState};

use super::error::LayerError;
use super::limits::Limits;

/// A directory entry. The root is 0.
pub(super) type NodeId = u32;
pub(super) const ROOT: NodeId = 0;

/// What an entry names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum NodeKind {
    /// Replaced by a later entry; unreachable, and everything in it.
    Dead,
    /// Its inode holds the attributes; 0 when the archive has not mentioned it.
    Directory,
    File,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    /// Hides what lower layers have of this name.
    Whiteout,
    /// A hard link whose target has not been seen yet; the inode is an index of pending links.
    PendingLink,
}

/// Set when the lower layers' entry of the same name is hidden: a directory with it becomes opaque.
pub(super) const HIDES_LOWER: u8 = 1;
/// Set with it when lower layers' entry itself is gone, and not only what is in it: nothing is taken over from that.
pub(super) const REPLACES_LOWER: u8 = 4;
/// Set on every name of an inode that has got several.
pub(super) const LINKED: u8 = 2;

#[derive(Clone, Copy)]
struct Node {
    parent: NodeId,
    name: u32,
    inode_low: u32,
    inode_high: u8,
    kind: NodeKind,
    flags: u8,
}

/// All names of a layer.
pub(super) struct Tree {
    nodes: Vec<Node>,
    names: Names,
    /// Node ids by parent and name, open addressing, 0 is free (the root is never looked up).
    table: Vec<NodeId>,
    hasher: RandomState,
    max_entries: u64,
}

impl Tree {
    pub(super) fn new(limits: &Limits) -> Self {
        let root =
            Node { parent: ROOT, name: 0, inode_low: 0, inode_high: 0, kind: NodeKind::Directory, flags: 0 };
        Self {
            nodes: vec![root],
            names: Names::new(limits.max_name_bytes),
            table: vec![0; 1024],
            hasher: RandomState::new(),
            max_entries: limits.max_entries.min(u64::from(u32::MAX) - 1),
        }
    }

    pub(super) fn kind(&self, node: NodeId) -> NodeKind {
        self.nodes[node as usize].kind
    }

    pub(super) fn parent(&self, node: NodeId) -> NodeId {
        self.nodes[node as usize].parent
    }

    pub(super) fn name(&self, node: NodeId) -> &[u8] {
        self.names.get(self.nodes[node as usize].name)
    }

    /// The number of the node's inode, or what [`NodeKind`] says.
    pub(super) fn inode(&self, node: NodeId) -> u64 {
        let node = &self.nodes[node as usize];
        u64::from(node.inode_low) | u64::from(node.inode_high) << 32
    }

    /// Inode numbers have 40 bits: 32-byte slots of a file of at most 16 TiB.
    pub(super) fn set(&mut self, node: NodeId, kind: NodeKind, inode: u64) {
        let node = &mut self.nodes[node as usize];
        node.kind = kind;
        node.inode_low = inode as u32;
        node.inode_high = (inode >> 32) as u8;
    }

    pub(super) fn has(&self, node: NodeId, flag: u8) -> bool {
        self.nodes[node as usize].flags & flag != 0
    }

    pub(super) fn mark(&mut self, node: NodeId, flag: u8) {
        self.nodes[node as usize].flags |= flag;
    }

    pub(super) fn unmark(&mut self, node: NodeId, flag: u8) {
        self.nodes[node as usize].flags &= !flag;
    }

    /// The entry `name` of the directory `parent`.
    pub(super) fn lookup(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        let slot = self.slot(parent, name);
        Some(self.table[slot]).filter(|node| *node != 0)
    }

    /// Adds the entry `name`, at most 255 bytes, which must not exist.
    pub(super) fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        kind: NodeKind,
        inode: u64,
    ) -> Result<NodeId, LayerError> {
        let name_offset = self.names.intern(&self.hasher, name)?;
        if self.nodes.len() * 8 >= self.table.len() * 7 {
            self.grow();
        }
        let slot = self.slot(parent, name);
        let node = self.push(parent, name_offset, 0)?;
        self.table[slot] = node;
        self.set(node, kind, inode);
        Ok(node)
    }

    /// Puts a new entry in the place of `old`, whose descendants become unreachable. What hid lower layers still does.
    pub(super) fn replace(&mut self, old: NodeId, kind: NodeKind, inode: u64) -> Result<NodeId, LayerError> {
        let Node { parent, name, flags, .. } = self.nodes[old as usize];
        let slot = self.slot(parent, self.names.get(name));
        let node = self.push(parent, name, flags & (HIDES_LOWER | REPLACES_LOWER))?;
        self.table[slot] = node;
        self.set(node, kind, inode);
        self.set(old, NodeKind::Dead, 0);
        Ok(node)
    }

    fn push(&mut self, parent: NodeId, name: u32, flags: u8) -> Result<NodeId, LayerError> {
        let id = self.nodes.len();
        if id as u64 > self.max_entries {
            return Err(LayerError::Limit { what: "directory entries", limit: self.max_entries });
        }
        let kind = NodeKind::Dead;
        self.nodes.push(Node { parent, name, inode_low: 0, inode_high: 0, kind, flags });
        Ok(id as NodeId)
    }

    fn hash(&self, parent: NodeId, name: &[u8]) -> usize {
        self.hasher.hash_one((parent, name)) as usize
    }

    // Of the entry, or the free one where it belongs. An entry keeps its slot when it is replaced.
    fn slot(&self, parent: NodeId, name: &[u8]) -> usize {
        let mask = self.table.len() - 1;
        let mut slot = self.hash(parent, name) & mask;
        loop {
            let id = self.table[slot];
            if id == 0 || self.parent(id) == parent && self.name(id) == name {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }

    fn grow(&mut self) {
        let size = self.table.len() * 2;
        // First the old one goes: both together would be a peak.
        self.table = Vec::new();
        self.table = vec![0; size];
        for id in 1..self.nodes.len() {
            let node = self.nodes[id];
            if node.kind != NodeKind::Dead {
                let slot = self.slot(node.parent, self.names.get(node.name));
                self.table[slot] = id as NodeId;
            }
        }
    }

    /// Takes out whiteouts in directories that hide what is below anyway. They would do harm: where overlayfs has nothing
    /// to merge it lists them, as names that lead to nothing.
    pub(super) fn drop_useless_whiteouts(&mut self) {
        // An entry always comes after its directory.
        let mut hides = vec![false; self.nodes.len()];
        for id in 0..self.nodes.len() {
            let above = hides[self.nodes[id].parent as usize];
            let node = &mut self.nodes[id];
            hides[id] = above || node.flags & HIDES_LOWER != 0;
            if above && node.kind == NodeKind::Whiteout {
                node.kind = NodeKind::Dead;
            }
        }
    }

    /// Gives up looking entries up by name and sorts them into their directories instead.
    pub(super) fn into_children(mut self) -> (Self, Children) {
        self.table = Vec::new();
        let children = Children::of(&self);
        (self, children)
    }
}

/// The entries of each directory, sorted by name.
pub(super) struct Children {
    /// By node, where its entries begin in `nodes`; one more for the end.
    starts: Vec<u32>,
    nodes: Vec<NodeId>,
}

impl Children {
    fn of(tree: &Tree) -> Self {
        let count = tree.nodes.len();
        let alive = || (1..count as u32).filter(|node| tree.kind(*node) != NodeKind::Dead);
        let mut starts = vec![0_u32; count + 1];
        for node in alive() {
            starts[tree.parent(node) as usize] += 1;
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += std::mem::replace(start, sum);
        }
        let mut nodes = vec![0; sum as usize];
        // Filling moves each start to its end, which is the next one's start.
        for node in alive() {
            let next = &mut starts[tree.parent(node) as usize];
            nodes[*next as usize] = node;
            *next += 1;
        }
        starts.rotate_right(1);
        starts[0] = 0;
        let mut children = Self { starts, nodes };
        for directory in 0..count {
            let range = children.starts[directory] as usize..children.starts[directory + 1] as usize;
            children.nodes[range].sort_unstable_by(|a, b| tree.name(*a).cmp(tree.name(*b)));
        }
        children
    }

    /// The entries of `directory`.
    pub(super) fn of_directory(&self, directory: NodeId) -> &[NodeId] {
        let directory = directory as usize;
        &self.nodes[self.starts[directory] as usize..self.starts[directory + 1] as usize]
    }
}

// Names one after another, each behind its length. A small cache finds most of those that repeat ("index.js").
struct Names {
    bytes: Vec<u8>,
    recent: Vec<u32>,
    limit: u64,
}

impl Names {
    const RECENT: usize = 1 << 15;

    fn new(limit: u64) -> Self {
        // The empty name at 0 marks a free place of the cache.
        Self { bytes: vec![0], recent: vec![0; Self::RECENT], limit: limit.min(u64::from(u32::MAX)) }
    }

    fn get(&self, offset: u32) -> &[u8] {
        let offset = offset as usize;
        let length = usize::from(self.bytes[offset]);
        &self.bytes[offset + 1..offset + 1 + length]
    }

    fn intern(&mut self, hasher: &RandomState, name: &[u8]) -> Result<u32, LayerError> {
        let place = hasher.hash_one(name) as usize % Self::RECENT;
        if self.get(self.recent[place]) == name {
            return Ok(self.recent[place]);
        }
        if (self.bytes.len() + name.len() + 1) as u64 > self.limit {
            return Err(LayerError::Limit { what: "bytes of names", limit: self.limit });
        }
        let offset = self.bytes.len() as u32;
        self.bytes.push(name.len() as u8);
        self.bytes.extend_from_slice(name);
        self.recent[place] = offset;
        Ok(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_directory_takes_its_entries_with_it() {
        let mut tree = Tree::new(&Limits::default());
        let old = tree.add(ROOT, b"a", NodeKind::Directory, 7).unwrap();
        tree.add(old, b"b", NodeKind::File, 8).unwrap();
        tree.mark(old, HIDES_LOWER);
        let file = tree.replace(old, NodeKind::File, 9).unwrap();
        let new = tree.replace(file, NodeKind::Directory, 10).unwrap();
        assert_eq!(tree.lookup(ROOT, b"a"), Some(new));
        assert_eq!(tree.lookup(new, b"b"), None);
        assert!(tree.has(new, HIDES_LOWER));
        let (tree, children) = tree.into_children();
        assert_eq!(children.of_directory(ROOT), [new]);
        assert!(children.of_directory(new).is_empty());
        assert_eq!(tree.inode(new), 10);
    }

    #[test]
    fn many_entries_are_found_again_and_come_sorted() {
        let mut tree = Tree::new(&Limits::default());
        let names: Vec<String> = (0..50_000).map(|n| format!("{:x}", n * 7919 % 65_536)).collect();
        for name in &names {
            if tree.lookup(ROOT, name.as_bytes()).is_none() {
                tree.add(ROOT, name.as_bytes(), NodeKind::File, 1 << 39 | 5).unwrap();
            }
        }
        for name in &names {
            let node = tree.lookup(ROOT, name.as_bytes()).unwrap();
            assert_eq!((tree.name(node), tree.inode(node)), (name.as_bytes(), 1 << 39 | 5));
        }
        let (tree, children) = tree.into_children();
        let sorted: Vec<_> = children.of_directory(ROOT).iter().map(|node| tree.name(*node)).collect();
        assert!(sorted.is_sorted());
        assert_eq!(sorted.len(), names.iter().collect::<std::collections::HashSet<_>>().len());
    }

    #[test]
    fn entries_and_names_are_bounded() {
        let mut tree = Tree::new(&Limits { max_entries: 2, ..Limits::default() });
        tree.add(ROOT, b"a", NodeKind::File, 1).unwrap();
        tree.add(ROOT, b"b", NodeKind::File, 1).unwrap();
        assert!(matches!(tree.add(ROOT, b"c", NodeKind::File, 1), Err(LayerError::Limit { .. })));
        let mut tree = Tree::new(&Limits { max_name_bytes: 8, ..Limits::default() });
        tree.add(ROOT, b"abcdef", NodeKind::File, 1).unwrap();
        tree.add(1, b"abcdef", NodeKind::File, 1).unwrap();
        assert!(matches!(tree.add(ROOT, b"c", NodeKind::File, 1), Err(LayerError::Limit { .. })));
    }
}
