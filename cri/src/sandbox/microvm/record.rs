//! What hulld knows of a pod's machine, on disk: written before each effect, so that a killed hulld's successor can
//! take up the machine or clear it away. `ROOT/machines/ID/record`, in the frame of all records.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::sandbox::Place;
use crate::store::frame;

/// Name of the record in a machine's directory.
const FILE: &str = "record";

/// A machine.
#[derive(Clone, PartialEq, Message)]
pub(super) struct MachineRecord {
    /// The pod's id.
    #[prost(string, tag = "1")]
    pub(super) id: String,
    /// First of the host's user and group ids that are the pod's.
    #[prost(uint32, tag = "2")]
    pub(super) uid_base: u32,
    /// The VMM as the host numbers it; 0 before it was started.
    #[prost(int32, tag = "3")]
    pub(super) vmm_pid: i32,
    /// hull-virtiofsd as the host numbers it; 0 if there is none.
    #[prost(int32, tag = "4")]
    pub(super) virtiofsd_pid: i32,
    /// Processors.
    #[prost(uint32, tag = "5")]
    pub(super) vcpus: u32,
    /// Bytes of memory it booted with.
    #[prost(uint64, tag = "6")]
    pub(super) memory: u64,
    /// Bytes of memory it can have.
    #[prost(uint64, tag = "7")]
    pub(super) memory_max: u64,
    /// What of the scratch disk is taken.
    #[prost(message, repeated, tag = "8")]
    pub(super) ranges: Vec<ScratchRange>,
    /// Volumes that the agent was, or is about to be, told of.
    #[prost(message, repeated, tag = "9")]
    pub(super) volumes: Vec<Volume>,
    /// Block slots that are, or are about to be, filled.
    #[prost(message, repeated, tag = "10")]
    pub(super) slots: Vec<BlockSlot>,
    /// Layers that are, or are about to be, mapped on the images disk, by container.
    #[prost(message, repeated, tag = "11")]
    pub(super) layers: Vec<Layers>,
    /// The number of the next volume that the host serves.
    #[prost(uint32, tag = "12")]
    pub(super) next_shared: u32,
    /// The number of the next volume.
    #[prost(uint32, tag = "13")]
    pub(super) next_volume: u32,
    /// Block slots it was born with.
    #[prost(uint32, tag = "14")]
    pub(super) block_slots: u32,
    /// As in [`Place`]: where its processes are, for whoever finds a machine whose pod has no record.
    #[prost(string, tag = "15")]
    pub(super) cgroup_parent: String,
    #[prost(uint32, tag = "16")]
    pub(super) cgroup_levels: u32,
    /// When the VMM and hull-virtiofsd started, in clock ticks since the boot; 0: not known. See [`super::process`].
    #[prost(uint64, tag = "17")]
    pub(super) vmm_started: u64,
    #[prost(uint64, tag = "18")]
    pub(super) virtiofsd_started: u64,
    /// The VMM has taken hull-virtiofsd: from then on the guest is lost without it.
    #[prost(bool, tag = "19")]
    pub(super) volumes_served: bool,
}

/// A part of the scratch disk.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ScratchRange {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub(super) offset: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub(super) length: u64,
    /// The container whose it is; of a volume that several share, the first.
    #[prost(string, tag = "3")]
    pub(super) container: String,
    /// Its name among the container's: `writable`, or a volume's id.
    #[prost(string, tag = "4")]
    pub(super) name: String,
    /// It stays when the container goes.
    #[prost(bool, tag = "5")]
    pub(super) shared: bool,
    /// There is a filesystem on it, which the guest may know.
    #[prost(bool, tag = "6")]
    pub(super) formatted: bool,
}

/// What a volume in the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum VolumeKind {
    /// Served from the host by virtio-fs.
    Shared = 0,
    /// Memory of the guest.
    Memory = 1,
    /// A range of the scratch disk.
    Scratch = 2,
    /// Files copied from the host, and copied again when they change.
    Copied = 3,
}

/// A volume.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Volume {
    /// As the agent knows it.
    #[prost(string, tag = "1")]
    pub(super) id: String,
    /// See [`VolumeKind`].
    #[prost(enumeration = "VolumeKind", tag = "2")]
    pub(super) kind: i32,
    /// Where it is on the host; empty if it is not there.
    #[prost(string, tag = "3")]
    pub(super) host_path: String,
    /// Shared: its number below the root of the virtio-fs device.
    #[prost(uint32, tag = "4")]
    pub(super) index: u32,
    /// The one container that it is for; empty: all of the pod's.
    #[prost(string, tag = "5")]
    pub(super) container: String,
    /// Copied back to `host_path` when its container has ended: a file of this name in it.
    #[prost(string, tag = "6")]
    pub(super) read_back: String,
    /// Shared: nobody can write to it.
    #[prost(bool, tag = "7")]
    pub(super) readonly: bool,
    /// Shared: a single file.
    #[prost(bool, tag = "8")]
    pub(super) single_file: bool,
}

/// A filled block slot.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BlockSlot {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub(super) slot: u32,
    /// Whose it is.
    #[prost(string, tag = "2")]
    pub(super) container: String,
    /// The device on the host.
    #[prost(string, tag = "3")]
    pub(super) path: String,
}

/// Layers of a container.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Layers {
    /// Whose they are.
    #[prost(string, tag = "1")]
    pub(super) container: String,
    /// Their ids, which are the keys of their extents.
    #[prost(string, repeated, tag = "2")]
    pub(super) layers: Vec<String>,
}

impl MachineRecord {
    /// Where its pod lives; `directory` is the pod's volatile one. None in the record of an older hulld.
    pub(super) fn place(&self, directory: &Path) -> Option<Place> {
        (!self.cgroup_parent.is_empty()).then(|| Place {
            id: self.id.clone(),
            directory: directory.to_owned(),
            cgroup_parent: self.cgroup_parent.clone(),
            cgroup_levels: self.cgroup_levels,
        })
    }

    /// Of the machine whose directory this is; None if there is none or it was torn.
    pub(super) fn load(directory: &Path) -> Option<Self> {
        let bytes = fs::read(directory.join(FILE)).ok()?;
        frame::decode(&bytes)
            .inspect_err(|error| tracing::warn!(%error, "a machine's record is unreadable"))
            .ok()
    }

    /// Replaces the record on disk. The caller orders the writes.
    pub(super) fn store(&self, directory: &Path) -> io::Result<()> {
        let bytes = frame::encode(self).map_err(io::Error::other)?;
        let temporary = directory.join(".record");
        fs::write(&temporary, bytes)?;
        fs::rename(temporary, directory.join(FILE))
    }

    /// The lowest offset where `length` bytes are free on a disk of `capacity` bytes.
    pub(super) fn free_range(&self, length: u64, capacity: u64) -> Option<u64> {
        let mut taken: Vec<_> = self.ranges.iter().map(|range| (range.offset, range.length)).collect();
        taken.sort_unstable();
        let mut offset = 0_u64;
        for (start, size) in taken {
            if start.checked_sub(offset)? >= length {
                return Some(offset);
            }
            offset = start.checked_add(size)?;
        }
        (capacity.checked_sub(offset)? >= length).then_some(offset)
    }

    /// The lowest block slot of `count` that nothing is behind.
    pub(super) fn free_slot(&self, count: u32) -> Option<u32> {
        (0..count).find(|slot| self.slots.iter().all(|taken| taken.slot != *slot))
    }

    /// Layers of this container that no other one has.
    pub(super) fn own_layers(&self, container: &str) -> Vec<String> {
        let others = || self.layers.iter().filter(|one| one.container != container);
        let own = self.layers.iter().filter(|one| one.container == container).flat_map(|one| &one.layers);
        own.filter(|layer| !others().any(|other| other.layers.contains(layer))).cloned().collect()
    }
}

/// The directories of machines, below ROOT.
#[derive(Clone, Debug)]
pub(super) struct Machines(PathBuf);

impl Machines {
    /// Opens, or makes, the directory of all.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let path = root.join("machines");
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Of one machine. The machine's files belong to root: the VMM gets them as descriptors.
    pub(super) fn directory(&self, id: &str) -> PathBuf {
        self.0.join(id)
    }

    /// Where templates are kept.
    pub(super) fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    /// Ids of all machines that have a directory.
    pub(super) fn ids(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.0) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| crate::store::is_id(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> ScratchRange {
        ScratchRange { offset, length, ..Default::default() }
    }

    #[test]
    fn a_range_is_found_in_a_gap_or_behind_all() {
        let mut record = MachineRecord::default();
        assert_eq!(record.free_range(10, 100), Some(0));
        record.ranges = vec![range(20, 10), range(0, 10)];
        assert_eq!(record.free_range(10, 100), Some(10));
        assert_eq!(record.free_range(11, 100), Some(30));
        assert_eq!(record.free_range(71, 100), None);
        assert_eq!(record.free_range(u64::MAX, 100), None);
    }

    #[test]
    fn a_layer_goes_with_the_last_container_that_has_it() {
        let layers = |container: &str, layers: &[&str]| Layers {
            container: container.into(),
            layers: layers.iter().map(|one| (*one).to_owned()).collect(),
        };
        let record = MachineRecord {
            layers: vec![layers("a", &["1", "2"]), layers("b", &["2"])],
            ..Default::default()
        };
        assert_eq!(record.own_layers("a"), ["1"]);
        assert!(record.own_layers("b").is_empty());
    }

    #[test]
    fn what_was_stored_is_loaded_and_a_torn_record_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let record = MachineRecord { id: "a".into(), uid_base: 7, ..Default::default() };
        record.store(directory.path()).unwrap();
        assert_eq!(MachineRecord::load(directory.path()), Some(record));
        fs::write(directory.path().join(FILE), b"HULL").unwrap();
        assert_eq!(MachineRecord::load(directory.path()), None);
    }
}
