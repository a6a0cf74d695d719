//! Ranges of the images and scratch disks, mapped by device-mapper and mounted, for as long as somebody uses them.

use std::io;
use std::time::{Duration, Instant};

use hull_sys::dm::{Control, Number, SECTOR};
use rustix::io::Errno;

use super::disks::{self, IMAGES, SCRATCH};
use super::place::{RANGES, attach, detach, directory, filesystem};
use super::{Doing, GuestError};
use crate::protocol::messages::Range;
use hull_sys::mount::MountAttrFlags as Attr;

/// Most ranges that are mapped at a time: some for each of the most containers.
const MAX_RANGES: usize = 4096;

/// Block size of the disks, in bytes.
const BLOCK: u64 = 4096;
/// Between two tries to remove what was in use.
const SWEEP: Duration = Duration::from_secs(2);

/// What a range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An EROFS tree on the images disk.
    Image,
    /// An ext4 filesystem on the scratch disk.
    Scratch,
}

/// A mounted range.
#[derive(Debug)]
struct Mounted {
    kind: Kind,
    offset: u64,
    length: u64,
    users: u32,
}

impl Mounted {
    fn name(&self) -> String {
        name(self.kind, self.offset, self.length)
    }

    fn path(&self) -> String {
        format!("{RANGES}/{}", self.name())
    }
}

fn name(kind: Kind, offset: u64, length: u64) -> String {
    let disk = match kind {
        Kind::Image => IMAGES,
        Kind::Scratch => SCRATCH,
    };
    format!("{disk}-{offset:x}-{length:x}")
}

/// All mounted ranges.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    mounted: Vec<Mounted>,
    /// Names of devices that somebody still used when they were to be removed.
    doomed: Vec<String>,
    control: Option<Control>,
    next_sweep: Option<Instant>,
}

impl Ranges {
    /// Mounts a range if nobody else has, counts its user, and tells where it is mounted.
    pub(crate) fn take(&mut self, kind: Kind, range: &Range) -> Result<String, GuestError> {
        self.sweep();
        let &Range { offset, length } = range;
        let same = |one: &&mut Mounted| (one.kind, one.offset, one.length) == (kind, offset, length);
        if let Some(known) = self.mounted.iter_mut().find(same) {
            known.users += 1;
            return Ok(known.path());
        }
        if self.mounted.len() + self.doomed.len() >= MAX_RANGES {
            return Err(GuestError::precondition(format!("{MAX_RANGES} ranges are mounted already")));
        }
        let overlaps = |one: &Mounted| {
            one.kind == kind
                && offset < one.offset.saturating_add(one.length)
                && one.offset < offset.saturating_add(length)
        };
        if kind == Kind::Scratch && self.mounted.iter().any(overlaps) {
            return Err(GuestError::invalid(format!(
                "cannot mount scratch range {offset}+{length}: part of it is mounted already"
            )));
        }
        let new = Mounted { kind, offset, length, users: 1 };
        self.mount(&new)?;
        let path = new.path();
        self.mounted.push(new);
        Ok(path)
    }

    /// One user less; what nobody uses is unmounted and unmapped.
    pub(crate) fn give_back(&mut self, kind: Kind, range: &Range) {
        let same = |one: &Mounted| (one.kind, one.offset, one.length) == (kind, range.offset, range.length);
        let Some(index) = self.mounted.iter().position(same) else { return };
        let one = &mut self.mounted[index];
        one.users -= 1;
        if one.users == 0 {
            let one = self.mounted.swap_remove(index);
            self.unmount(&one);
        }
    }

    /// Where a range is mounted, if it is.
    pub(crate) fn path(&self, kind: Kind, range: &Range) -> Option<String> {
        let same = |one: &&Mounted| (one.kind, one.offset, one.length) == (kind, range.offset, range.length);
        self.mounted.iter().find(same).map(Mounted::path)
    }

    /// Every mounted scratch range.
    pub(crate) fn scratch(&self) -> impl Iterator<Item = Range> {
        let scratch = self.mounted.iter().filter(|one| one.kind == Kind::Scratch);
        scratch.map(|one| Range { offset: one.offset, length: one.length })
    }

    /// When it is worth another try to remove what was in use.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.next_sweep.filter(|_| !self.doomed.is_empty())
    }

    /// Another try, if it is time.
    pub(crate) fn sweep_at(&mut self, now: Instant) {
        if self.deadline().is_some_and(|when| when <= now) {
            self.next_sweep = Some(now + SWEEP);
            self.sweep();
        }
    }

    /// Tries again to remove what was in use.
    pub(crate) fn sweep(&mut self) {
        let Some(control) = &self.control else { return };
        self.doomed.retain(|name| matches!(control.remove(name), Err(error) if is_busy(&error)));
    }

    fn mount(&mut self, one: &Mounted) -> Result<(), GuestError> {
        let device = self.map(one)?;
        let source = format!("/dev/dm-{}", device.minor);
        let tree = match one.kind {
            Kind::Image => filesystem("erofs", &[("source", &source), ("ro", "")], Attr::MOUNT_ATTR_RDONLY),
            // No barriers: the disk ends with the pod, so there is nothing to keep from a crash of the host.
            Kind::Scratch => filesystem(
                "ext4",
                &[("source", &source), ("nobarrier", ""), ("discard", ""), ("errors", "remount-ro")],
                Attr::MOUNT_ATTR_NOATIME,
            ),
        };
        let path = one.path();
        let attached = tree.and_then(|tree| directory(&path).and_then(|()| attach(tree, &path)));
        attached.inspect_err(|_| {
            // The error tells of the mount; what is left of it is only an empty directory.
            let _ = rustix::fs::rmdir(&path);
            self.unmap(one);
        })
    }

    /// A device of its own for the range.
    fn map(&mut self, one: &Mounted) -> Result<Number, GuestError> {
        let disk = disks::find(if one.kind == Kind::Image { IMAGES } else { SCRATCH })?;
        let name = one.name();
        let end = one.offset.checked_add(one.length);
        let sound = one.offset.is_multiple_of(BLOCK)
            && one.length.is_multiple_of(BLOCK)
            && one.length > 0
            && end.is_some_and(|end| end / SECTOR <= disk.sectors);
        if !sound {
            return Err(GuestError::invalid(format!(
                "cannot map {}+{} of the disk: it has {} sectors of {SECTOR} bytes and blocks of {BLOCK}",
                one.offset, one.length, disk.sectors
            )));
        }
        if self.control.is_none() {
            self.control = Some(Control::open().doing(|| "open the device mapper".into())?);
        }
        let control = self.control.as_ref().ok_or_else(|| GuestError::precondition("no device mapper"))?;
        let read_only = one.kind == Kind::Image;
        control
            .create_linear(&name, disk.number, one.offset / SECTOR, one.length / SECTOR, read_only)
            .doing(|| format!("map the range {name}"))
    }

    fn unmount(&mut self, one: &Mounted) {
        let path = one.path();
        match detach(&path, false) {
            Ok(()) => {}
            // A process that looks into it from outside of its container.
            Err(_) => {
                let _ = detach(&path, true);
            }
        }
        self.unmap(one);
    }

    fn unmap(&mut self, one: &Mounted) {
        let Some(control) = &self.control else { return };
        let name = one.name();
        match control.remove(&name) {
            Err(error) if is_busy(&error) => {
                // Whoever still has it gets errors from now on: the range may be given to somebody else at once.
                let _ = control.make_fail(&name, one.length / SECTOR);
                self.doomed.push(name);
                self.next_sweep = Some(Instant::now() + SWEEP);
            }
            _ => {}
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
}

/// What a mounted filesystem has and how much of it is used.
pub(crate) fn occupied(facts: &rustix::fs::StatVfs) -> Occupied {
    let bytes = |blocks: u64| blocks.saturating_mul(facts.f_frsize);
    Occupied {
        capacity: bytes(facts.f_blocks),
        used: bytes(facts.f_blocks.saturating_sub(facts.f_bfree)),
        inodes: facts.f_files,
        inodes_used: facts.f_files.saturating_sub(facts.f_ffree),
    }
}

/// See [`occupied`]; bytes and numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Occupied {
    pub(crate) capacity: u64,
    pub(crate) used: u64,
    pub(crate) inodes: u64,
    pub(crate) inodes_used: u64,
}
