//! What a container needs from outside, poured into its pod's machine through the devices it was born with. Blocks, on
//! a thread that may, inside the runtime.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hull_agent::protocol::messages::{self as agent, Propagation, add_volume, mount, request, slot};
use hull_images::{ImageStore, LayerId};
use hull_vmm::protocol::messages::{self as vmm, request as vmm_request};
use rustix::fs::{AtFlags, FileType, StatxFlags};
use tokio::runtime::Handle;

use super::classify::{Class, classify};
use super::follow::Follower;
use super::machine::Machine;
use super::record::{BlockSlot, Layers, ScratchRange, Volume, VolumeKind};
use super::scratch::{CAPACITY, VOLUME_ROOT, range_length};
use super::shared::Exporter;
use crate::config::MachineConfig;
use crate::sandbox::reach::reach;
use crate::sandbox::source::open_log;
use crate::sandbox::{HostTree, SandboxError, Slots, Source};

/// Name of the range that is a container's writable layer.
const WRITABLE: &str = "writable";
/// Name of the file in the volume of a termination message, and bytes of that volume.
const MESSAGE: &str = "message";
const MESSAGE_SPACE: u64 = 1 << 20;

/// One container's part.
pub(super) struct Pour<'a> {
    pub(super) machine: &'a Arc<Machine>,
    pub(super) config: &'a MachineConfig,
    pub(super) images: &'a ImageStore,
    pub(super) follower: &'a Follower,
    pub(super) exporter: &'a Exporter,
    /// hull-virtiofsd.
    pub(super) program: &'a Path,
    pub(super) container: &'a str,
    pub(super) runtime: Handle,
}

fn unsupported<T>(reason: String) -> Result<T, SandboxError> {
    Err(SandboxError::Unsupported(reason))
}

impl Pour<'_> {
    /// Everything that the container is started with, in the order of its slots.
    pub(super) fn all(
        &self,
        start: &mut agent::StartContainer,
        sources: &[Source],
    ) -> Result<Slots, SandboxError> {
        let _turn = self.machine.turn();
        let mut slots = Slots::default();
        let mut layers = self.layers(sources)?.into_iter();
        for (number, source) in sources.iter().enumerate() {
            let missing = || SandboxError::Layers("a layer was not mapped".into());
            let kind = match source {
                Source::Layer(_) => slot::Kind::Image(layers.next().ok_or_else(missing)?),
                Source::Own(path) if path.file_name().is_some_and(|name| name == WRITABLE) => {
                    slot::Kind::Scratch(self.writable(path)?)
                }
                Source::Own(path) => self.image_volume(path)?,
                Source::Tree(tree) => self.host_path(tree, is_readonly(start, number))?,
                Source::Log(place) => {
                    let file = open_log(place)?;
                    self.runtime.block_on(self.machine.set_log(self.container, file))?;
                    slot::Kind::Log(self.container.to_owned())
                }
                Source::Tasks(path) => {
                    let path = path.display();
                    return Err(SandboxError::Source(format!("{path} takes no processes of a machine")));
                }
            };
            slots.named(kind);
        }
        self.block_devices(start)?;
        let score = start.process.as_ref().and_then(|process| process.oom_score_adj).unwrap_or(0);
        self.machine.started(self.container, score);
        Ok(slots)
    }

    fn tell(&self, what: &'static str, call: request::Call) -> Result<(), SandboxError> {
        self.runtime.block_on(self.machine.tell(what, call))
    }

    /// Maps the image's layers on the images disk.
    fn layers(&self, sources: &[Source]) -> Result<Vec<agent::Range>, SandboxError> {
        let layers: Vec<LayerId> = sources
            .iter()
            .filter_map(|source| match source {
                Source::Layer(id) => Some(id.clone()),
                _ => None,
            })
            .collect();
        let keys: Vec<String> = layers.iter().map(ToString::to_string).collect();
        self.machine.change(|record| {
            record.layers.retain(|one| one.container != self.container);
            record.layers.push(Layers { container: self.container.to_owned(), layers: keys.clone() });
        })?;
        let failed = |error: String| SandboxError::Layers(error);
        let files = self.images.layer_files(&layers).map_err(|error| failed(error.to_string()))?;
        let mut ranges = Vec::with_capacity(files.len());
        for (file, key) in files.into_iter().zip(&keys) {
            let length = file.metadata().map_err(|error| failed(error.to_string()))?.len();
            let mapped = self.machine.map_layer(key, file.into(), length);
            ranges.push(self.runtime.block_on(mapped)?);
        }
        Ok(ranges)
    }

    /// The container's writable layer; `path` has what it is to begin with.
    fn writable(&self, path: &Path) -> Result<agent::Range, SandboxError> {
        let has_content = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        self.range(WRITABLE, false, |format| format(has_content.then_some(path)))
    }

    /// A directory of the image's VOLUMEs, already filled on the host: it moves into the machine.
    fn image_volume(&self, path: &Path) -> Result<slot::Kind, SandboxError> {
        let volume = self.volume(&path.to_string_lossy(), Some(self.container), VolumeKind::Scratch)?;
        let seed = path.with_extension("seed");
        let range = self.range(&volume.id, false, |format| {
            let root = seed.join(VOLUME_ROOT);
            if !root.exists() {
                fs::create_dir_all(&seed).map_err(SandboxError::host("make", &seed))?;
                fs::rename(path, &root).map_err(SandboxError::host("move", path))?;
            }
            format(Some(&seed))
        })?;
        let kind = add_volume::Kind::Scratch(range);
        // As the image has it, also when the container is started again: the root stays, without what was in it.
        let root = seed.join(VOLUME_ROOT);
        match fs::metadata(&root) {
            Ok(metadata) => self.add_like(&volume, kind, &metadata)?,
            // Left by an older hulld.
            Err(_) => self.add(&volume, kind, false)?,
        }
        empty(&root).map_err(SandboxError::host("empty", root))?;
        Ok(slot::Kind::Volume(agent::VolumePath { id: volume.id, path: String::new() }))
    }

    fn host_path(&self, tree: &HostTree, readonly: bool) -> Result<slot::Kind, SandboxError> {
        let path = &tree.path;
        if tree.propagation == Propagation::Bidirectional {
            return unsupported(format!(
                "{} cannot be mounted with Bidirectional propagation: what is mounted in a machine stays there",
                path.display()
            ));
        }
        match classify(path, &self.config.kubelet_roots) {
            Class::Copied => self.copied(path, true),
            Class::CopiedOnce => self.copied(path, false),
            Class::File(content) => Ok(slot::Kind::File(content)),
            Class::Message => self.message(path),
            Class::EmptyDir { directory, path: below, memory } => {
                self.empty_dir(&directory, &below, memory, tree, readonly)
            }
            Class::Host => self.shared(path, readonly),
            Class::Refused(reason) => unsupported(format!("the host path {} {reason}", path.display())),
        }
    }

    /// Copies what kubelet wrote, and has it followed.
    fn copied(&self, path: &Path, follow: bool) -> Result<slot::Kind, SandboxError> {
        let whose = (!follow).then_some(self.container);
        let volume = self.volume(&path.to_string_lossy(), whose, VolumeKind::Copied)?;
        self.add(&volume, add_volume::Kind::Copied(add_volume::Copied {}), false)?;
        self.runtime.block_on(self.follower.write(self.machine, &volume))?;
        if follow {
            self.follower.follow(self.machine, &volume);
        }
        let below = if path.is_file() { super::follow::SINGLE } else { "" };
        Ok(slot::Kind::Volume(agent::VolumePath { id: volume.id, path: below.into() }))
    }

    /// A file that is read back when the container has ended.
    fn message(&self, path: &Path) -> Result<slot::Kind, SandboxError> {
        let host_path = path.to_string_lossy();
        let mut volume = self.volume(&host_path, Some(self.container), VolumeKind::Memory)?;
        volume.read_back = MESSAGE.into();
        self.machine.change(|record| {
            record.volumes.iter_mut().filter(|one| one.id == volume.id).for_each(|one| *one = volume.clone());
        })?;
        let memory = add_volume::Memory { size: MESSAGE_SPACE };
        self.add(&volume, add_volume::Kind::Memory(memory), false)?;
        let metadata = fs::metadata(path).map_err(SandboxError::host("look at", path))?;
        let content = fs::read(path).map_err(SandboxError::host("read", path))?;
        let entry = agent::write_volume::Entry {
            path: MESSAGE.into(),
            mode: metadata.mode() & 0o777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            content: Some(agent::write_volume::entry::Content::File(content)),
            append: false,
        };
        let write =
            agent::WriteVolume { id: volume.id.clone(), generation: 1, entries: vec![entry], last: true };
        self.tell("write a volume", request::Call::WriteVolume(write))?;
        Ok(slot::Kind::Volume(agent::VolumePath { id: volume.id, path: MESSAGE.into() }))
    }

    /// An emptyDir lives in the machine, unless there is something in it on the host when it is first used.
    fn empty_dir(
        &self,
        directory: &Path,
        below: &str,
        memory: Option<u64>,
        tree: &HostTree,
        readonly: bool,
    ) -> Result<slot::Kind, SandboxError> {
        let host_path = directory.to_string_lossy();
        let known = self.machine.with_record(|record| {
            record.volumes.iter().find(|one| one.host_path == host_path && one.container.is_empty()).cloned()
        });
        let is_empty = || fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
        let in_machine = match &known {
            Some(volume) => volume.kind() != VolumeKind::Shared,
            None => is_empty(),
        };
        if !in_machine {
            if known.is_none() {
                // What comes later must find the same place.
                self.volume(&host_path, None, VolumeKind::Shared)?;
            }
            return self.shared(&tree.path, readonly);
        }
        let metadata = fs::metadata(directory).map_err(SandboxError::host("look at", directory))?;
        if let Some(size) = memory {
            let volume = self.volume(&host_path, None, VolumeKind::Memory)?;
            let kind = add_volume::Kind::Memory(add_volume::Memory { size });
            self.add_like(&volume, kind, &metadata)?;
            return Ok(slot::Kind::Volume(agent::VolumePath { id: volume.id, path: below.to_owned() }));
        }
        let volume = self.volume(&host_path, None, VolumeKind::Scratch)?;
        let range = self.range(&volume.id, true, |format| {
            let seed = self.machine.home.join(format!("seed-{}", volume.id));
            let made = like(&seed.join(VOLUME_ROOT), &metadata);
            let formatted =
                made.map_err(SandboxError::host("make", &seed)).and_then(|()| format(Some(&seed)));
            let _ = fs::remove_dir_all(&seed);
            formatted
        })?;
        self.add_like(&volume, add_volume::Kind::Scratch(range), &metadata)?;
        Ok(slot::Kind::Volume(agent::VolumePath { id: volume.id, path: below.to_owned() }))
    }

    /// Serves a host path by virtio-fs. Who may only read is given what others may write, if it is there: then locks,
    /// sockets and caches agree.
    fn shared(&self, path: &Path, readonly: bool) -> Result<slot::Kind, SandboxError> {
        // The server of the path may be gone: nothing is looked at before it is reached.
        let place = match reach(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // As on the host: made as a directory.
                fs::create_dir_all(path)
                    .map_err(SandboxError::host("make the missing mount source", path))?;
                reach(path)
            }
            other => other,
        };
        let place = place.map_err(SandboxError::host("open the mount source", path))?;
        let is_directory = is_directory(&place, path)?;
        let host_path = path.to_string_lossy();
        let known = self.machine.with_record(|record| {
            let mut fitting = record.volumes.iter().filter(|one| {
                one.kind() == VolumeKind::Shared
                    && one.index > 0
                    && one.host_path == host_path
                    && (readonly || !one.readonly)
            });
            fitting.next().cloned()
        });
        let volume = match known {
            Some(volume) => volume,
            None => self.machine.change(|record| {
                record.next_shared += 1;
                record.next_volume += 1;
                let volume = Volume {
                    id: format!("v{}", record.next_volume),
                    kind: VolumeKind::Shared.into(),
                    host_path: host_path.clone().into_owned(),
                    index: record.next_shared,
                    readonly,
                    single_file: !is_directory,
                    ..Default::default()
                };
                record.volumes.push(volume.clone());
                volume
            })?,
        };
        let exported = self.exporter.export(self.machine, self.program, &volume, place);
        let exported = self.runtime.block_on(exported);
        if exported.is_err() {
            // Nobody has it; the next one who asks begins anew.
            self.machine.change(|record| record.volumes.retain(|one| one.id != volume.id))?;
        }
        exported?;
        let kind = add_volume::Shared { index: volume.index, directory: !volume.single_file };
        self.add(&volume, add_volume::Kind::Shared(kind), volume.readonly)?;
        Ok(slot::Kind::Volume(agent::VolumePath { id: volume.id, path: String::new() }))
    }

    /// Tells the agent of a volume, whose root is as it was made; told again, it changes nothing.
    fn add(&self, volume: &Volume, kind: add_volume::Kind, readonly: bool) -> Result<(), SandboxError> {
        let call = agent::AddVolume { id: volume.id.clone(), kind: Some(kind), readonly, mode: 0, gid: None };
        self.tell("add a volume", request::Call::AddVolume(call))
    }

    /// The same, with mode and group as on the host.
    fn add_like(
        &self,
        volume: &Volume,
        kind: add_volume::Kind,
        metadata: &fs::Metadata,
    ) -> Result<(), SandboxError> {
        let call = agent::AddVolume {
            id: volume.id.clone(),
            kind: Some(kind),
            readonly: false,
            mode: metadata.mode() & 0o7777,
            gid: Some(metadata.gid()),
        };
        self.tell("add a volume", request::Call::AddVolume(call))
    }

    /// The volume of a host path, recorded if it is new. `whose`: the one container that it is for.
    fn volume(&self, host_path: &str, whose: Option<&str>, kind: VolumeKind) -> Result<Volume, SandboxError> {
        let container = whose.unwrap_or_default();
        self.machine.change(|record| {
            let known = record
                .volumes
                .iter()
                .find(|one| one.host_path == host_path && one.container == container && one.kind() == kind);
            if let Some(known) = known.filter(|one| one.index == 0) {
                return known.clone();
            }
            record.next_volume += 1;
            let volume = Volume {
                id: format!("v{}", record.next_volume),
                kind: kind.into(),
                host_path: host_path.to_owned(),
                container: container.to_owned(),
                ..Default::default()
            };
            record.volumes.push(volume.clone());
            volume
        })
    }

    /// A range of the scratch disk with a filesystem on it. `fill` is called, with what puts a filesystem there,
    /// unless there is one already.
    fn range(
        &self,
        name: &str,
        shared: bool,
        fill: impl FnOnce(&dyn Fn(Option<&Path>) -> Result<(), SandboxError>) -> Result<(), SandboxError>,
    ) -> Result<agent::Range, SandboxError> {
        let is_it = |one: &ScratchRange| one.name == name && (shared || one.container == self.container);
        let length = range_length(self.config.disk);
        let range = self.machine.change(|record| {
            if let Some(known) = record.ranges.iter().find(|one| is_it(one)) {
                return Some(known.clone());
            }
            let range = ScratchRange {
                offset: record.free_range(length, CAPACITY)?,
                length,
                container: self.container.to_owned(),
                name: name.to_owned(),
                shared,
                formatted: false,
            };
            record.ranges.push(range.clone());
            Some(range)
        })?;
        let full = || SandboxError::Machine {
            action: "find room on the scratch disk of",
            reason: "it is full".into(),
        };
        let range = range.ok_or_else(full)?;
        if !range.formatted {
            let (scratch, offset, length) = (&self.machine.scratch, range.offset, range.length);
            scratch.punch(offset, length)?;
            fill(&|seed| scratch.format(offset, length, seed))?;
            self.machine.change(|record| {
                record.ranges.iter_mut().filter(|one| is_it(one)).for_each(|one| one.formatted = true);
            })?;
        }
        // The guest can write nowhere else, so that what it takes of the host's disk has an end.
        let open = vmm::OpenScratch { offset: range.offset, length: range.length };
        let call = vmm_request::Call::OpenScratch(open);
        self.runtime
            .block_on(self.machine.control.order_if_known("let a container write to the disk of", call))?;
        Ok(agent::Range { offset: range.offset, length: range.length })
    }

    /// Puts the host's block devices behind the machine's slots.
    fn block_devices(&self, start: &mut agent::StartContainer) -> Result<(), SandboxError> {
        self.clear_slots()?;
        self.fill_slots(start).inspect_err(|_| {
            // Others may have them.
            if let Err(error) = self.clear_slots() {
                tracing::warn!(container = self.container, %error, "block slots stay taken");
            }
        })
    }

    fn fill_slots(&self, start: &mut agent::StartContainer) -> Result<(), SandboxError> {
        for device in &mut start.devices {
            if device.r#type != "b" {
                return unsupported(format!(
                    "the device {} is a character device of the host, which a machine cannot have",
                    device.path
                ));
            }
            let path = block_device_path(device.major, device.minor)?;
            let readonly = !device.access.contains('w');
            let slot = self.machine.change(|record| {
                let slot = record.free_slot(record.block_slots)?;
                let path = path.to_string_lossy().into_owned();
                record.slots.push(BlockSlot { slot, container: self.container.to_owned(), path });
                Some(slot)
            })?;
            let Some(slot) = slot else {
                return unsupported("the pod's machine has no block slot left; it has eight".into());
            };
            let file = open_block_device(&path, readonly)?;
            let call = vmm::FillSlot { slot, readonly, file: 0 };
            let call = vmm_request::Call::FillSlot(call);
            self.runtime.block_on(self.machine.control.order("fill a slot of", call, vec![file.into()]))?;
            device.block_slot = Some(slot);
        }
        Ok(())
    }

    /// Slots that the container has of a run before this one.
    fn clear_slots(&self) -> Result<(), SandboxError> {
        let is_its = |one: &BlockSlot| one.container == self.container;
        let slots: Vec<u32> = self.machine.with_record(|record| {
            record.slots.iter().filter(|one| is_its(one)).map(|one| one.slot).collect()
        });
        for slot in &slots {
            let call = vmm_request::Call::ClearSlot(vmm::ClearSlot { slot: *slot });
            self.runtime.block_on(self.machine.control.order("clear a slot of", call, Vec::new()))?;
        }
        match slots.is_empty() {
            true => Ok(()),
            false => self.machine.change(|record| record.slots.retain(|one| !is_its(one))),
        }
    }
}

impl Machine {
    /// Takes back what a container had; its agent has forgotten it. Blocks, on a thread that may.
    pub(super) fn forget(&self, container: &str, runtime: &Handle) -> Result<(), SandboxError> {
        // The same image may be about to be poured in for another one.
        let _turn = self.turn();
        let (layers, slots, ranges, volumes) = self.with_record(|record| {
            let slots = record.slots.iter().filter(|one| one.container == container).map(|one| one.slot);
            let is_own = |one: &&ScratchRange| one.container == container && !one.shared;
            let volumes = record.volumes.iter().filter(|one| one.container == container);
            (
                record.own_layers(container),
                slots.collect::<Vec<_>>(),
                record.ranges.iter().filter(is_own).cloned().collect::<Vec<_>>(),
                volumes.map(|one| one.id.clone()).collect::<Vec<_>>(),
            )
        });
        let order = |action, call| runtime.block_on(self.control.order(action, call, Vec::new()));
        for slot in slots {
            order("clear a slot of", vmm_request::Call::ClearSlot(vmm::ClearSlot { slot }))?;
        }
        for id in volumes {
            let call = request::Call::RemoveVolume(agent::RemoveVolume { id });
            runtime.block_on(self.tell("remove a volume", call))?;
        }
        for key in layers {
            order("take a layer from", vmm_request::Call::RemoveExtent(vmm::RemoveExtent { key }))?;
        }
        let log = vmm::RemoveLog { container_id: container.to_owned() };
        order("close a log of", vmm_request::Call::RemoveLog(log))?;
        for range in &ranges {
            let close = vmm::CloseScratch { offset: range.offset };
            let call = vmm_request::Call::CloseScratch(close);
            runtime.block_on(self.control.order_if_known("take back the disk of a container in", call))?;
            self.scratch.punch(range.offset, range.length)?;
        }
        self.gone(container);
        self.change(|record| {
            record.slots.retain(|one| one.container != container);
            record.volumes.retain(|one| one.container != container);
            record.layers.retain(|one| one.container != container);
            record.ranges.retain(|one| one.container != container || one.shared);
        })
    }
}

/// Whether it is a directory; what is neither that nor a regular file cannot be shared.
fn is_directory(place: &OwnedFd, path: &Path) -> Result<bool, SandboxError> {
    // As the kernel knows it: its server is not asked, for it may be gone.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let status = rustix::fs::statx(place, "", flags, StatxFlags::BASIC_STATS)
        .map_err(|errno| SandboxError::host("look at the mount source", path)(errno.into()))?;
    let what = match FileType::from_raw_mode(u32::from(status.stx_mode)) {
        FileType::Directory => return Ok(true),
        FileType::RegularFile => return Ok(false),
        FileType::Socket => "a socket",
        FileType::Fifo => "a FIFO",
        _ => "a device",
    };
    unsupported(format!(
        "the host path {} is {what}: only directories and regular files can be shared with a machine",
        path.display()
    ))
}

/// Whether the mount that has this slot is read-only.
fn is_readonly(start: &agent::StartContainer, number: usize) -> bool {
    let is_it = |one: &&agent::Mount| one.source == Some(mount::Source::Slot(number as u32));
    start.mounts.iter().find(is_it).is_some_and(|one| one.readonly)
}

/// A directory with the owner and mode of another one.
fn like(path: &Path, metadata: &fs::Metadata) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    std::os::unix::fs::chown(path, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(metadata.mode() & 0o7777))
}

/// Removes what is in a directory, if it is there.
fn empty(path: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// Where the host has the device (sysfs, `uevent`).
fn block_device_path(major: u32, minor: u32) -> Result<PathBuf, SandboxError> {
    let uevent = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let text =
        fs::read_to_string(&uevent).map_err(SandboxError::host("find the block device by", &uevent))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    match name {
        Some(name) => Ok(Path::new("/dev").join(name)),
        None => unsupported(format!("the block device {major}:{minor} has no name on the host")),
    }
}

fn open_block_device(path: &Path, readonly: bool) -> Result<fs::File, SandboxError> {
    let opened = fs::File::options().read(true).write(!readonly).open(path);
    let file = opened.map_err(SandboxError::host("open the block device", path))?;
    let metadata = file.metadata().map_err(SandboxError::host("look at the block device", path))?;
    if metadata.file_type().is_block_device() {
        return Ok(file);
    }
    unsupported(format!("{} is no block device", path.display()))
}
