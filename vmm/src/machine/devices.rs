//! The device set, which is the same for every machine: threads, devices, and the handles by which they are changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::core::{BuildError, Doing};
use crate::control::Events;
use crate::devices::virtio::balloon::{BalloonHandle, balloon};
use crate::devices::virtio::block::{
    self, BlockThreads, ImagesHandle, OnFault, ScratchHandle, SlotHandle, images, scratch, slot,
};
use crate::devices::virtio::fs::{Volumes, VolumesHandle};
use crate::devices::virtio::mem::{MemHandle, mem};
use crate::devices::virtio::net::{Net, NetHandle, Port};
use crate::devices::virtio::rng::rng;
use crate::devices::virtio::vsock::{Service, Vsock, VsockHandle};
use crate::devices::virtio::{VirtioDevice, Worker};
use crate::jail::{ThreadKind, confine};
use crate::logs::{LOG_PORT, Logs};
use crate::memory::MachineMemory;
use crate::protocol::messages;

/// Threads for the images disk, and for the scratch disk with the slots: so many reads may wait for the host's disk while
/// others are served.
const BLOCK_THREADS: usize = 3;
/// Most block slots of a machine.
pub const MAX_SLOTS: u32 = 8;
/// Of a machine without a network: its NIC has no link, but it is there.
const MAC_WITHOUT_NETWORK: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU_WITHOUT_NETWORK: u32 = 1500;

/// Of what the devices are made.
pub struct DeviceFiles {
    /// The scratch disk.
    pub scratch: OwnedFd,
    /// Listening socket for streams to the agent.
    pub vsock_listener: OwnedFd,
    /// The tap, if the machine has a network.
    pub tap: Option<OwnedFd>,
}

/// What control requests change and ask of the devices of a running machine.
pub struct Handles {
    pub(super) images: ImagesHandle,
    pub(super) scratch: ScratchHandle,
    pub(super) slots: Vec<SlotHandle>,
    pub(super) volumes: VolumesHandle,
    pub(super) net: NetHandle,
    pub(super) vsock: VsockHandle,
    pub(super) logs: Logs,
    pub(super) balloon: BalloonHandle,
    /// A machine that cannot grow has no memory device.
    pub(super) memory: Option<MemHandle>,
}

/// Makes all devices, in the order of their pages, and starts and confines their threads.
///
/// # Errors
/// A device cannot be made so, or a thread not be started.
pub fn build(
    machine: &messages::Machine,
    files: DeviceFiles,
    memory: &MachineMemory,
    events: &Events,
) -> Result<(Vec<Box<dyn VirtioDevice>>, Handles), BuildError> {
    if machine.block_slots > MAX_SLOTS {
        let reason = format!("it would have {} block slots; the most is {MAX_SLOTS}", machine.block_slots);
        return Err(BuildError::Config(reason));
    }
    let on_fault: OnFault = {
        let events = events.clone();
        Arc::new(move |device, message| events.fault(device, message))
    };
    // All that disks tell of is that the host's is full.
    let on_disk_fault: OnFault = {
        let events = events.clone();
        Arc::new(move |device, message| events.passing_fault(device, message))
    };
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();

    let logs = Logs::start(&worker("logs", ThreadKind::Vsock)?).doing("begin to write logs")?;
    let services = BTreeMap::from([(LOG_PORT, Arc::new(logs.handle()) as Arc<dyn Service>)]);
    let vsock = Vsock::new(worker("vsock", ThreadKind::Vsock)?, files.vsock_listener, services)
        .doing("make the vsock device")?;
    let vsock_handle = vsock.handle();
    devices.push(Box::new(vsock));

    let net = Net::new(worker("net", ThreadKind::Net)?, port(machine, files.tap)?)
        .doing("make the network device")?;
    let net_handle = net.handle();
    devices.push(Box::new(net));

    let image_threads = block_threads("images")?;
    let disk_threads = block_threads("disks")?;
    let (images, images_handle) = images(&image_threads, on_disk_fault.clone());
    devices.push(Box::new(images));
    let (scratch, scratch_handle) =
        scratch(File::from(files.scratch), machine.scratch_capacity, &disk_threads, on_disk_fault.clone())
            .map_err(|e| BuildError::Config(e.to_string()))?;
    devices.push(Box::new(scratch));
    let mut slots = Vec::new();
    for number in 0..machine.block_slots {
        let (device, handle) = slot(number, &disk_threads, on_disk_fault.clone());
        devices.push(Box::new(device));
        slots.push(handle);
    }

    let small = worker("small", ThreadKind::Misc)?;
    let volumes = Volumes::new(&small, on_fault).doing("make the device of volumes")?;
    let volumes_handle = volumes.handle();
    devices.push(Box::new(volumes));
    devices.push(Box::new(rng(&small).doing("make the random number device")?));
    let (balloon, balloon_handle) = balloon(&small).doing("make the balloon device")?;
    devices.push(Box::new(balloon));
    let mut memory_handle = None;
    if memory.hotplug.1 > 0 {
        let (device, handle) =
            mem(memory.hotplug.0, memory.hotplug.1, &small).map_err(|e| BuildError::Config(e.to_string()))?;
        devices.push(Box::new(device));
        memory_handle = Some(handle);
    }

    let handles = Handles {
        images: images_handle,
        scratch: scratch_handle,
        slots,
        volumes: volumes_handle,
        net: net_handle,
        vsock: vsock_handle,
        logs,
        balloon: balloon_handle,
        memory: memory_handle,
    };
    Ok((devices, handles))
}

fn worker(name: &'static str, kind: ThreadKind) -> Result<Worker, BuildError> {
    Worker::start(name, move || confine(kind)).doing("start a device's thread")
}

fn block_threads(name: &str) -> Result<BlockThreads, BuildError> {
    let confine: block::Confine = Arc::new(|| -> io::Result<()> { confine(ThreadKind::Block) });
    BlockThreads::start(name, BLOCK_THREADS, &confine).doing("start a disk's threads")
}

fn port(machine: &messages::Machine, tap: Option<OwnedFd>) -> Result<Port, BuildError> {
    if tap.is_none() {
        return Ok(Port { tap, mac: MAC_WITHOUT_NETWORK, mtu: MTU_WITHOUT_NETWORK });
    }
    let mac = machine.mac.as_slice().try_into();
    let mac =
        mac.map_err(|_| BuildError::Config(format!("its MAC has {} bytes, not 6", machine.mac.len())))?;
    Ok(Port { tap, mac, mtu: machine.mtu })
}
