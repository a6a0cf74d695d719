//! From the slots of a request to what is behind them in this machine.

use rustix::fd::OwnedFd;

use super::disks;
use super::files::Files;
use super::ranges::{Kind as RangeKind, Ranges};
use super::streams::Streams;
use super::volumes::Volumes;
use super::{Doing, GuestError};
use crate::protocol::messages::{Device, Range, Slot, slot::Kind};
use hull_sys::mount::{self, OpenTreeFlags};
use rustix::fs::CWD;

/// Most slots of a request: layers, volumes and streams.
const MAX_SLOTS: usize = 2048;

/// What a container holds of the machine until it is forgotten.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    ranges: Vec<(RangeKind, Range)>,
    files: Option<Files>,
}

impl Holdings {
    /// The writable range, which is the container's own.
    pub(crate) fn scratch(&self) -> Option<&Range> {
        self.ranges.iter().find(|(kind, _)| *kind == RangeKind::Scratch).map(|(_, range)| range)
    }

    /// Gives back what it holds; its processes must be gone.
    pub(crate) fn give_back(self, ranges: &mut Ranges) {
        for (kind, range) in &self.ranges {
            ranges.give_back(*kind, range);
        }
    }
}

/// What there is to resolve slots with.
pub(crate) struct Resolver<'a> {
    pub(crate) ranges: &'a mut Ranges,
    pub(crate) volumes: &'a Volumes,
    pub(crate) streams: &'a mut Streams,
}

/// The numbers of the streams that a request names.
pub(crate) fn streams(slots: &[Slot]) -> impl Iterator<Item = u64> {
    slots.iter().filter_map(|slot| match slot.kind {
        Some(Kind::Stream(number)) => Some(number),
        _ => None,
    })
}

impl Resolver<'_> {
    /// What is behind each slot; `None` for a log, which is opened when the container runs. `container`: whose request
    /// it is, if it may bring files and ranges along; what it takes is in `holdings` also after an error.
    pub(crate) fn resolve(
        &mut self,
        slots: &[Slot],
        container: Option<&str>,
        holdings: &mut Holdings,
    ) -> Result<Vec<Option<OwnedFd>>, GuestError> {
        if slots.len() > MAX_SLOTS {
            return Err(GuestError::invalid(format!("a request cannot have {} slots", slots.len())));
        }
        let size = slots.iter().map(|slot| match &slot.kind {
            Some(Kind::File(content)) => content.len() as u64,
            _ => 0,
        });
        let size: u64 = size.sum();
        let mut resolved = Vec::with_capacity(slots.len());
        for (number, slot) in slots.iter().enumerate() {
            let only_for_a_start = || {
                GuestError::invalid(format!(
                    "slot {number} is something that only a container's start can bring"
                ))
            };
            resolved.push(match &slot.kind {
                None | Some(Kind::Log(_)) => None,
                Some(Kind::Descriptor(_)) => {
                    let reason = format!("slot {number} is a descriptor, and none can come into a guest");
                    return Err(GuestError::invalid(reason));
                }
                Some(Kind::Stream(number)) => Some(self.streams.take(*number).ok_or_else(|| {
                    GuestError::precondition(format!(
                        "the stream {number} that the request names has not come"
                    ))
                })?),
                Some(Kind::Volume(place)) => Some(self.volumes.tree(place)?),
                Some(Kind::Image(range)) => {
                    container.ok_or_else(only_for_a_start)?;
                    Some(self.range(RangeKind::Image, range, holdings)?)
                }
                Some(Kind::Scratch(range)) => {
                    container.ok_or_else(only_for_a_start)?;
                    Some(self.range(RangeKind::Scratch, range, holdings)?)
                }
                Some(Kind::File(content)) => {
                    let id = container.ok_or_else(only_for_a_start)?;
                    if holdings.files.is_none() {
                        holdings.files = Some(Files::new(id, size)?);
                    }
                    holdings.files.as_mut().map(|files| files.add(content)).transpose()?
                }
            });
        }
        Ok(resolved)
    }

    fn range(
        &mut self,
        kind: RangeKind,
        range: &Range,
        holdings: &mut Holdings,
    ) -> Result<OwnedFd, GuestError> {
        let path = self.ranges.take(kind, range)?;
        holdings.ranges.push((kind, *range));
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        mount::open_tree(CWD, &path, flags).doing(|| format!("take {path}"))
    }
}

/// Puts the numbers of the devices behind block slots into the request for a container.
pub(crate) fn number_devices(devices: &mut [Device]) -> Result<(), GuestError> {
    for device in devices {
        if let Some(slot) = device.block_slot {
            let number = disks::slot(slot)?;
            (device.major, device.minor) = (number.major, number.minor);
        }
    }
    Ok(())
}
