//! The pod's volumes, each a directory (or a single file) that slots name.

mod generation;
mod inside;
#[cfg(test)]
mod tests;

use hull_sys::mount::{self, Attributes, MountAttrFlags as Attr, OpenTreeFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Gid, Mode, OFlags};

use self::generation::Generations;
use super::place::{SHARED, VOLUMES, attach, detach, directory, filesystem};
use super::ranges::{Kind as RangeKind, Occupied, Ranges, occupied};
use super::{Doing, GuestError};
use crate::protocol::is_valid_id;
use crate::protocol::messages::{AddVolume, Range, ReadVolume, VolumePath, WriteVolume, add_volume::Kind};

/// Most volumes of a pod.
const MAX_VOLUMES: usize = 1024;
/// Most bytes of a volume that is copied; kubelet bounds each of its sources by 1 MiB.
const MAX_COPIED: &str = "256m";
/// Most bytes of one answer.
const MAX_READ: u32 = 512 << 10;
/// Of a volume's root if the request says nothing, as kubelet makes an emptyDir.
const DEFAULT_MODE: u32 = 0o777;
/// Directory below the root of a scratch range that is the volume: beside it is what mke2fs made.
const DATA: &str = "data";
/// The tag of the virtio-fs device.
const TAG: &str = "volumes";

/// A volume.
#[derive(Debug)]
struct Volume {
    spec: AddVolume,
    /// Its root, a directory or for a single shared file that file.
    root: OwnedFd,
    generations: Generations,
}

/// The pod's volumes.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    all: Vec<Volume>,
    shared_is_mounted: bool,
}

impl Volumes {
    /// Makes a volume; one that is there already with the same content stays as it is.
    pub(crate) fn add(&mut self, spec: &AddVolume, ranges: &mut Ranges) -> Result<(), GuestError> {
        let id = &spec.id;
        if !is_valid_id(id) {
            return Err(GuestError::invalid(
                "cannot add a volume: its id is not 1 to 128 letters, digits, -_.",
            ));
        }
        if let Some(known) = self.all.iter().find(|volume| volume.spec.id == *id) {
            return if known.spec == *spec {
                Ok(())
            } else {
                Err(GuestError::precondition(format!("volume {id} exists already and is another")))
            };
        }
        if self.all.len() >= MAX_VOLUMES {
            return Err(GuestError::precondition(format!("the pod has {MAX_VOLUMES} volumes already")));
        }
        let path = format!("{VOLUMES}/{id}");
        let root = match spec.kind.as_ref() {
            None => return Err(GuestError::invalid(format!("cannot add volume {id}: it is of no kind"))),
            Some(Kind::Memory(memory)) => tmpfs(&path, memory.size),
            Some(Kind::Copied(_)) => tmpfs_of(&path, MAX_COPIED),
            Some(Kind::Scratch(range)) => scratch(range, ranges),
            Some(Kind::Shared(shared)) => self.shared(shared.index, shared.directory),
        };
        let root = root?;
        if let Err(error) = set_root(spec, &root) {
            release(spec, ranges);
            return Err(error);
        }
        self.all.push(Volume { spec: spec.clone(), root, generations: Generations::default() });
        Ok(())
    }

    /// Forgets a volume. Containers that still have it mounted keep it.
    pub(crate) fn remove(&mut self, id: &str, ranges: &mut Ranges) {
        let Some(index) = self.all.iter().position(|volume| volume.spec.id == id) else { return };
        let Volume { spec, root, .. } = self.all.swap_remove(index);
        drop(root);
        release(&spec, ranges);
    }

    /// Writes files of a volume.
    pub(crate) fn write(&mut self, call: &WriteVolume) -> Result<(), GuestError> {
        let volume =
            self.all.iter_mut().find(|volume| volume.spec.id == call.id).ok_or_else(|| unknown(&call.id))?;
        let context = || format!("write to volume {}", call.id);
        match volume.spec.kind {
            Some(Kind::Copied(_)) => volume.generations.write(volume.root.as_fd(), call).doing(context),
            Some(Kind::Memory(_) | Kind::Scratch(_)) => {
                inside::write_all(volume.root.as_fd(), &call.entries).doing(context)
            }
            _ => Err(GuestError::invalid(format!("cannot {}: it is the host's", context()))),
        }
    }

    /// The bytes of a file, the last ones of one that is longer than the limit.
    pub(crate) fn read(&self, call: &ReadVolume) -> Result<Vec<u8>, GuestError> {
        let volume = self.get(&call.id)?;
        let links = matches!(volume.spec.kind, Some(Kind::Copied(_)));
        inside::read(volume.root.as_fd(), &call.path, call.limit.min(MAX_READ), links)
            .doing(|| format!("read {:?} of volume {}", call.path, call.id))
    }

    /// A detached mount of a place in a volume, read-only if the volume is.
    pub(crate) fn tree(&self, place: &VolumePath) -> Result<OwnedFd, GuestError> {
        let volume = self.get(&place.id)?;
        let context = || format!("mount {:?} of volume {}", place.path, place.id);
        let make = match volume.spec.kind {
            Some(Kind::Memory(_) | Kind::Scratch(_)) => Some(permissions(&volume.root).doing(context)?),
            _ => None,
        };
        let found = inside::place(volume.root.as_fd(), &place.path, make).doing(context)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = mount::open_tree(&found, "", flags).doing(context)?;
        if volume.spec.readonly {
            let attributes = Attributes { set: Attr::MOUNT_ATTR_RDONLY, ..Attributes::default() };
            mount::set_attributes(tree.as_fd(), true, &attributes).doing(context)?;
        }
        Ok(tree)
    }

    /// What each volume that is the guest's own occupies.
    pub(crate) fn occupied(&self) -> impl Iterator<Item = (&str, Occupied)> {
        let own = self.all.iter().filter(|volume| !matches!(volume.spec.kind, Some(Kind::Shared(_))));
        own.filter_map(|volume| {
            let facts = rustix::fs::fstatvfs(&volume.root).ok()?;
            Some((volume.spec.id.as_str(), occupied(&facts)))
        })
    }

    fn get(&self, id: &str) -> Result<&Volume, GuestError> {
        self.all.iter().find(|volume| volume.spec.id == id).ok_or_else(|| unknown(id))
    }

    /// A directory or file of the host's. The device is mounted when the first one comes.
    fn shared(&mut self, index: u32, is_directory: bool) -> Result<OwnedFd, GuestError> {
        if !self.shared_is_mounted {
            let tree = filesystem("virtiofs", &[("source", TAG)], Attr::empty())?;
            attach(tree, SHARED)?;
            self.shared_is_mounted = true;
        }
        let kind = if is_directory { OFlags::DIRECTORY } else { OFlags::empty() };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | kind;
        rustix::fs::open(format!("{SHARED}/{index}"), flags, Mode::empty())
            .doing(|| format!("open shared volume {index}"))
    }
}

fn unknown(id: &str) -> GuestError {
    let id: String = id.chars().take(128).collect();
    GuestError::not_found(format!("the pod has no volume {id:?}"))
}

fn tmpfs(path: &str, size: u64) -> Result<OwnedFd, GuestError> {
    // The kernel's own default is half of the memory.
    if size == 0 { mounted(path, &[]) } else { tmpfs_of(path, &size.to_string()) }
}

fn tmpfs_of(path: &str, size: &str) -> Result<OwnedFd, GuestError> {
    mounted(path, &[("size", size)])
}

fn mounted(path: &str, options: &[(&str, &str)]) -> Result<OwnedFd, GuestError> {
    let tree = filesystem("tmpfs", options, Attr::empty())?;
    directory(path)?;
    attach(tree, path)?;
    open_directory(path)
}

fn open_directory(path: &str) -> Result<OwnedFd, GuestError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).doing(|| format!("open {path}"))
}

fn scratch(range: &Range, ranges: &mut Ranges) -> Result<OwnedFd, GuestError> {
    let path = ranges.take(RangeKind::Scratch, range)?;
    let data = format!("{path}/{DATA}");
    directory(&data).and_then(|()| open_directory(&data)).inspect_err(|_| {
        ranges.give_back(RangeKind::Scratch, range);
    })
}

/// Unmounts what the volume has mounted.
fn release(spec: &AddVolume, ranges: &mut Ranges) {
    match &spec.kind {
        Some(Kind::Memory(_) | Kind::Copied(_)) => {
            // Whoever uses it has a mount of his own.
            let _ = detach(&format!("{VOLUMES}/{}", spec.id), true);
        }
        Some(Kind::Scratch(range)) => ranges.give_back(RangeKind::Scratch, range),
        Some(Kind::Shared(_)) | None => {}
    }
}

/// Mode and group of the root directory.
fn set_root(spec: &AddVolume, root: &OwnedFd) -> Result<(), GuestError> {
    if matches!(spec.kind, Some(Kind::Shared(_))) {
        return Ok(());
    }
    let mode = if spec.mode == 0 { DEFAULT_MODE } else { spec.mode & 0o7777 };
    let context = || format!("set owner and mode of volume {}", spec.id);
    if let Some(gid) = spec.gid.filter(|gid| *gid != u32::MAX) {
        let flags = AtFlags::EMPTY_PATH;
        rustix::fs::chownat(root, "", None, Some(Gid::from_raw(gid)), flags).doing(context)?;
    }
    // By its path: an O_PATH descriptor takes no fchmod.
    rustix::fs::chmodat(root, ".", Mode::from_raw_mode(mode), AtFlags::empty()).doing(context)
}

/// Permissions for what is made below a root: the root's own, as kubelet makes a subPath.
fn permissions(root: &OwnedFd) -> rustix::io::Result<Mode> {
    Ok(Mode::from_raw_mode(rustix::fs::fstat(root)?.st_mode & 0o7777))
}

const _: () = assert!(MAX_READ as usize + 1024 < super::MAX_FRAME);
