//! What a stack of layers shows of directories that its upper layers only imply.
//!
//! An archive may hold `tmp/x` without `tmp/`. Unpacked over the layers below, `tmp` stays as it was; but a layer file has
//! to have a `tmp` of some kind, and overlayfs shows the attributes of the uppermost one. So a container's writable
//! directory gets such directories beforehand, as the layers below have them.
//!
//! Where a layer below has a symbolic link (`lib -> usr/lib` below a layer with `lib/x` only), the directory hides it:
//! containerd's overlayfs snapshotter, CRI-O and Docker all unpack a layer into a directory of its own, in which there is
//! no link to follow. As with containerd the directory looks like what the link leads to; and it is told.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;

use super::erofs::{ImageReader, Node};
use crate::image::UpperDirectory;

/// Directories that one image can ask for; one that is not hostile has a handful, and nearly all have none.
const MAX_DIRECTORIES: usize = 1024;
/// Bytes of their paths and extended attributes.
const MAX_BYTES: usize = 256 << 10;
// Names looked up in layer files, well below a second's worth.
const MAX_LOOKUPS: u32 = 200_000;
// As the kernel (MAXSYMLINKS).
const MAX_HOPS: u32 = 40;
/// Hidden links that are told of.
const MAX_HIDDEN: usize = 16;

/// One layer of a stack.
pub(crate) struct StackLayer {
    pub(crate) image: ImageReader,
    /// As [`Converted::implied_directories`](super::Converted::implied_directories).
    pub(crate) implied: Vec<Vec<u8>>,
}

/// What lies differently on each other than layer by layer.
#[derive(Default)]
pub(crate) struct Overlaid {
    /// Directories that overlayfs would show wrongly, with all directories above them, the root included; parents come
    /// before children. What overlayfs would show as it should is not among them.
    pub(crate) directories: Vec<UpperDirectory>,
    /// Some paths where a directory that a layer implies hides a symbolic link of one below.
    pub(crate) hidden_links: Vec<Vec<u8>>,
}

/// Looks at the directories that `layers` (lowest first) imply.
pub(crate) fn overlaid(layers: &[StackLayer]) -> io::Result<Overlaid> {
    let implied = layers.iter().map(|layer| layer.implied.iter().map(Vec::as_slice).collect()).collect();
    let mut stack =
        Stack { layers, implied, lookups: 0, bytes: 0, found: BTreeMap::new(), hidden: BTreeSet::new() };
    stack.look()?;
    let directories = stack.found.into_values().collect();
    Ok(Overlaid { directories, hidden_links: stack.hidden.into_iter().collect() })
}

struct Stack<'l> {
    layers: &'l [StackLayer],
    implied: Vec<HashSet<&'l [u8]>>,
    lookups: u32,
    bytes: usize,
    found: BTreeMap<Vec<u8>, UpperDirectory>,
    hidden: BTreeSet<Vec<u8>>,
}

/// What a layer says about a path.
enum Lookup {
    /// It has a directory there. Lower layers have none if one above it is opaque; if it is opaque itself they still say
    /// how it looks.
    Directory { node: Node, hides_lower: bool },
    /// It has a symbolic link there or on the way, which leads to this directory of it.
    Linked { node: Node, is_last: bool },
    /// Nothing, and what lower layers have shows.
    Absent,
    /// Something else, or nothing lower shows.
    Hidden,
}

/// What the whole stack has at a path.
struct Shown {
    /// The directory that gives the attributes.
    node: Node,
    /// Whether the uppermost directory only implies it and a lower one names it.
    is_lower: bool,
    /// Whether several layers have it, or may have: then a lower one may name what is in it.
    is_merged: bool,
}

impl<'l> Stack<'l> {
    fn look(&mut self) -> io::Result<()> {
        let layers = self.layers;
        // Paths with nothing below them; so have all paths in them.
        let mut alone: HashSet<&[u8]> = HashSet::new();
        let mut seen: HashSet<&[u8]> = HashSet::new();
        for layer in layers.iter().skip(1).rev() {
            alone.clear();
            for path in &layer.implied {
                if parent(path).is_some_and(|parent| alone.contains(parent)) {
                    alone.insert(path);
                    continue;
                }
                // An upper layer implies it too.
                if !seen.insert(path) {
                    continue;
                }
                if self.lookups > MAX_LOOKUPS {
                    tracing::warn!(
                        "the image has too many directories that its layers do not name; some keep wrong attributes"
                    );
                    return Ok(());
                }
                match self.shown(path)? {
                    Some(shown) if shown.is_lower && !is_plain(&shown.node) => {
                        if !self.add(path, &shown.node)? {
                            tracing::warn!(
                                "the image has too many directories with lost attributes; some keep wrong ones"
                            );
                            return Ok(());
                        }
                    }
                    Some(shown) if shown.is_merged => {}
                    _ => {
                        alone.insert(path);
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds a directory and those above it. False when there is no room for all of them, and then none is added.
    fn add(&mut self, path: &[u8], node: &Node) -> io::Result<bool> {
        let mut added = vec![directory(path, node)];
        let mut at = path;
        while let Some(above) = parent(at).filter(|above| !self.found.contains_key(*above)) {
            // It is shown, since what is in it is.
            if let Some(shown) = self.shown(above)? {
                added.push(directory(above, &shown.node));
            }
            at = above;
        }
        // The root of an overlay is as the writable directory is, which is made like the uppermost layer's.
        if let (false, Some(uppermost)) = (self.found.contains_key(&b""[..]), self.layers.last()) {
            added.push(directory(b"", &uppermost.image.root()?));
        }
        self.bytes += added.iter().map(UpperDirectory::bytes).sum::<usize>();
        if self.bytes > MAX_BYTES || self.found.len() + added.len() > MAX_DIRECTORIES {
            return Ok(false);
        }
        self.found.extend(added.into_iter().map(|directory| (directory.path.clone(), directory)));
        Ok(true)
    }

    /// What overlayfs should show at a path; None if that is no directory.
    fn shown(&mut self, path: &[u8]) -> io::Result<Option<Shown>> {
        let mut uppermost = None;
        let mut is_merged = false;
        for number in (0..self.layers.len()).rev() {
            let (node, hides_lower) = match self.lookup(number, path)? {
                Lookup::Directory { node, hides_lower } => (node, hides_lower),
                // No directory is shown where the link is the uppermost.
                Lookup::Linked { node, is_last } if uppermost.is_some() => {
                    if is_last && self.hidden.len() < MAX_HIDDEN {
                        self.hidden.insert(path.to_vec());
                    }
                    return Ok(Some(Shown { node, is_lower: true, is_merged: true }));
                }
                Lookup::Linked { .. } => break,
                Lookup::Absent => continue,
                Lookup::Hidden => break,
            };
            is_merged = uppermost.is_some();
            if !self.implied[number].contains(path) {
                // What is below this one was not looked at.
                return Ok(Some(Shown { node, is_lower: is_merged, is_merged: true }));
            }
            uppermost.get_or_insert(node);
            if hides_lower {
                break;
            }
        }
        Ok(uppermost.map(|node| Shown { node, is_lower: false, is_merged }))
    }

    fn lookup(&mut self, number: usize, path: &[u8]) -> io::Result<Lookup> {
        let image = &self.layers[number].image;
        let mut node = image.root()?;
        let mut hides_lower = node.is_opaque;
        let mut names = path.split(|byte| *byte == b'/').peekable();
        while let Some(name) = names.next() {
            self.lookups += 1;
            node = match image.lookup(&node, name)? {
                Some(found) if found.is_directory() => found,
                Some(found) if found.is_symlink() => {
                    return self.follow(number, path, names.peek().is_none());
                }
                // A file or a whiteout.
                Some(_) => return Ok(Lookup::Hidden),
                None if hides_lower => return Ok(Lookup::Hidden),
                None => return Ok(Lookup::Absent),
            };
            if names.peek().is_some() {
                hides_lower |= node.is_opaque;
            }
        }
        Ok(Lookup::Directory { node, hides_lower })
    }

    /// The same for a path with symbolic links, which are followed within the layer.
    fn follow(&mut self, number: usize, path: &[u8], is_last: bool) -> io::Result<Lookup> {
        let image = &self.layers[number].image;
        let mut node = image.root()?;
        let mut hops = 0;
        let mut left: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
        while let Some(name) = left.pop() {
            if name.is_empty() {
                continue;
            }
            self.lookups += 1;
            match image.lookup(&node, &name)? {
                Some(found) if found.is_directory() => node = found,
                Some(found) if found.is_symlink() && hops < MAX_HOPS => {
                    hops += 1;
                    let target = image.target(&found)?;
                    if target.starts_with(b"/") {
                        node = image.root()?;
                    }
                    left.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                // It leads to no directory, to another layer, or in a circle.
                _ => return Ok(Lookup::Hidden),
            }
        }
        Ok(Lookup::Linked { node, is_last })
    }
}

/// None for those in the root.
fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|byte| *byte == b'/').map(|slash| &path[..slash])
}

/// Whether the directory is like one that is only implied.
fn is_plain(node: &Node) -> bool {
    (node.permissions(), node.uid(), node.gid()) == (0o755, 0, 0) && node.xattrs.is_empty()
}

fn directory(path: &[u8], node: &Node) -> UpperDirectory {
    UpperDirectory {
        path: path.to_vec(),
        mode: node.permissions(),
        uid: node.uid(),
        gid: node.gid(),
        xattrs: node.xattrs.clone(),
    }
}
