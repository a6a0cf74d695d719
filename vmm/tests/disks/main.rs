//! A real guest's kernel with the storage and memory devices: an EROFS layer through device-mapper on the images disk, an
//! ext4 on a range of the scratch disk that gives its space back, volumes that come and go, memory that grows and shrinks.
//!
//! Where /dev/kvm cannot run a kernel it says so and does nothing; `hack/node` has one that can. It wants mkfs.erofs,
//! mke2fs and dmsetup.
#![cfg(feature = "machine")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "../busybox/mod.rs"]
mod busybox;
mod files;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_vmm::devices::virtio::balloon::{BalloonHandle, balloon};
use hull_vmm::devices::virtio::block::{
    BlockThreads, Confine, ImagesHandle, OnFault, ScratchHandle, SlotHandle, images, scratch, slot,
};
use hull_vmm::devices::virtio::mem::{MemHandle, mem};
use hull_vmm::devices::virtio::rng::rng;
use hull_vmm::devices::virtio::{VirtioDevice, Worker};
use hull_vmm::machine::{Core, CoreConfig, CoreFiles, Kernel};
use hull_vmm::memory::MachineMemory;
use hull_vmm::vcpu::VcpuEvents;

/// A guest may be emulated as a whole.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const SCRATCH: u64 = 1 << 30;
/// The container's range of the scratch disk.
const RANGE: (u64, u64) = (128 * MIB, 256 * MIB);
const LAYER: u64 = 64 * MIB;

struct Guest {
    core: Core,
    console: File,
    images: ImagesHandle,
    scratch: ScratchHandle,
    slots: Vec<SlotHandle>,
    balloon: BalloonHandle,
    memory: MemHandle,
}

impl Guest {
    /// A machine with a layer on its images disk and a formatted range on its scratch disk.
    fn boot(kvm: OwnedFd, directory: &Path) -> Self {
        let memory = MachineMemory::new(256 * MIB, 512 * MIB).unwrap();
        let confine: Confine = Arc::new(|| Ok(()));
        let no_faults: OnFault = Arc::new(|device, message| eprintln!("{device}: {message}"));
        let threads = |name| BlockThreads::start(name, 3, &confine).unwrap();
        let (image_threads, disk_threads) = (threads("images"), threads("disks"));

        let (images, images_handle) = images(&image_threads, no_faults.clone());
        let layer = images_handle.add("layer", files::layer(&directory.join("layer"), LAYER), LAYER).unwrap();
        let disk = files::scratch(&directory.join("scratch"), SCRATCH, RANGE);
        let (scratch, scratch_handle) = scratch(disk, SCRATCH, &disk_threads, no_faults.clone()).unwrap();
        scratch_handle.open(RANGE.0, RANGE.1).unwrap();
        let (slot0, handle0) = slot(0, &disk_threads, no_faults.clone());
        let (slot1, handle1) = slot(1, &disk_threads, no_faults);
        let small = Worker::start("small", || Ok(())).unwrap();
        let (balloon, balloon_handle) = balloon(&small).unwrap();
        let (mem, mem_handle) = mem(memory.hotplug.0, memory.hotplug.1, &small).unwrap();
        let devices: Vec<Box<dyn VirtioDevice>> = vec![
            Box::new(images),
            Box::new(scratch),
            Box::new(slot0),
            Box::new(slot1),
            Box::new(rng(&small).unwrap()),
            Box::new(balloon),
            Box::new(mem),
        ];

        let console = directory.join("console");
        let append = File::options().append(true).create_new(true).open(&console).unwrap();
        let cmdline_extra = format!(
            "layer_at={} layer_sectors={} range_at={} range_sectors={}",
            layer.offset / 512,
            layer.length / 512,
            RANGE.0 / 512,
            RANGE.1 / 512
        );
        let events: VcpuEvents = Arc::new(|_| {});
        let kernel = busybox::kernel();
        let mut core = Core::boot(
            &CoreConfig { cpus: 1, cmdline_extra },
            CoreFiles { kvm, console: append.into() },
            memory,
            Kernel {
                kernel: File::open(kernel).unwrap(),
                initramfs: files::initramfs(&directory.join("tree")),
            },
            devices,
            &events,
            || Ok(()),
        )
        .unwrap();
        core.resume().unwrap();
        Self {
            core,
            console: File::open(console).unwrap(),
            images: images_handle,
            scratch: scratch_handle,
            slots: vec![handle0, handle1],
            balloon: balloon_handle,
            memory: mem_handle,
        }
    }

    fn seen(&self) -> String {
        let mut bytes = vec![0; self.console.metadata().unwrap().len() as usize];
        let length = self.console.read_at(&mut bytes, 0).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// What the guest says after these words, once it has said it.
    fn says(&self, words: &str) -> String {
        let start = Instant::now();
        loop {
            let seen = self.seen();
            let said = seen
                .lines()
                .filter_map(|line| line.strip_prefix("test: "))
                .find_map(|said| said.strip_prefix(words));
            // The line is whole once another has begun.
            if let Some(said) = said
                .filter(|said| seen.contains(&format!("{said}\r\n")) || seen.contains(&format!("{said}\n")))
            {
                return said.trim().to_owned();
            }
            assert!(start.elapsed() < PATIENCE, "no {words:?} on the console:\n{seen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn until(&self, what: &str, so: impl Fn() -> bool) {
        let start = Instant::now();
        while !so() {
            assert!(start.elapsed() < PATIENCE, "{what} never came; the console:\n{}", self.seen());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the console:\n{}", self.seen());
        }
    }
}

#[test]
fn a_guest_mounts_its_layer_and_its_range_gives_space_back_and_volumes_and_memory_come_and_go() {
    let Some(kvm) = busybox::kvm() else { return };
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::boot(kvm, directory.path());

    disks_are_what_they_promise(&guest);
    a_range_gives_its_space_back(&guest);
    volumes_come_and_go(&guest);
    reads_are_fast(&guest, directory.path());
    memory_grows_and_shrinks(&guest);
    assert!(!guest.core.is_paused());
}

fn disks_are_what_they_promise(guest: &Guest) {
    assert_eq!(guest.says("images size"), format!("{} ro 1 block 4096", (16_u64 << 40) / 512));
    assert_eq!(guest.says("scratch size"), format!("{} ro 0 block 4096", SCRATCH / 512));
    assert_eq!(guest.says("slot0 size"), "0 ro 0 block 512");
    assert_eq!(guest.says("first block"), format!("{}  -", files::md5(&[0; 4096])));
    assert_eq!(guest.says("reading where nothing is"), "failed");
    assert_eq!(guest.says("writing to images"), "failed");
    assert_eq!(guest.says("mounting the layer"), "worked");
    assert_eq!(guest.says("layer content"), format!("{}  -", files::md5(&files::content(LAYER))));
    assert_eq!(guest.images.list().len(), 1);
}

fn a_range_gives_its_space_back(guest: &Guest) {
    assert_eq!(guest.says("mounting the range"), "worked");
    assert_eq!(guest.says("written"), format!("{}  -", files::md5(&vec![b'x'; 64 << 20])));
    let full = guest.scratch.allocated().unwrap();
    assert!(full >= 64 * MIB, "{full}");
    let volume = tempfile::tempfile().unwrap();
    volume.set_len(8 * MIB).unwrap();
    guest.slots[0].fill(volume, false).unwrap();
    assert_eq!(guest.says("slot0 filled"), (8 * MIB / 512).to_string());
    assert_eq!(guest.says("trimming"), "worked");
    guest.says("trimmed");
    let left = guest.scratch.allocated().unwrap();
    eprintln!("scratch: {} KiB with a file of 64 MiB, {} KiB after fstrim", full >> 10, left >> 10);
    assert!(left < 8 * MIB, "{left}");
}

fn volumes_come_and_go(guest: &Guest) {
    let bytes = files::content(MIB);
    let read_only = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(read_only.path(), &bytes).unwrap();
    guest.slots[1].fill(File::open(read_only.path()).unwrap(), true).unwrap();
    assert_eq!(guest.says("slot1 content"), format!("{}  -", files::md5(&bytes)));
    assert_eq!(guest.says("writing to slot1"), "failed");
    assert_eq!(guest.says("writing to slot0"), "worked");
    guest.says("slots done");
    assert_eq!(std::fs::read(read_only.path()).unwrap(), bytes);
    assert!(guest.slots[0].stats().flushes > 0, "the guest's fsync reaches the host's disk");
    guest.slots[0].clear().unwrap();
    assert_eq!(guest.says("a cleared slot has"), "0 bytes");
    assert_eq!(guest.says("reading random numbers"), "worked");
}

/// Numbers for the record; nothing is asserted of an emulated machine's speed.
fn reads_are_fast(guest: &Guest, directory: &Path) {
    guest.says("ready for memory");
    for round in ["1", "2"] {
        let hundredths: f64 = guest.says(&format!("read {round} took")).parse().unwrap();
        eprintln!("in the guest, O_DIRECT, 1 MiB at a time: {:.0} MB/s", LAYER as f64 / hundredths / 1e4);
    }
    let file = File::open(directory.join("layer")).unwrap();
    let (mut buffer, start) = (vec![0; 1 << 20], Instant::now());
    let mut at = 0;
    while file.read_at(&mut buffer, at).unwrap() > 0 {
        at += buffer.len() as u64;
    }
    let took = start.elapsed();
    eprintln!("on the host, cached: {:.0} MB/s", LAYER as f64 / took.as_secs_f64() / 1e6);
}

fn memory_grows_and_shrinks(guest: &Guest) {
    let before = guest.balloon.released().1;
    guest.memory.resize(128 * MIB).unwrap();
    guest.until("128 MiB more", || guest.memory.plugged() == 128 * MIB);
    guest.memory.resize(0).unwrap();
    guest.until("128 MiB less", || guest.memory.plugged() == 0);

    guest.balloon.set_target(32 * MIB);
    guest.until("a balloon of 32 MiB", || guest.balloon.size().1 == 32 * MIB);
    assert_eq!(guest.balloon.released().0, 32 * MIB);
    guest.balloon.ask_statistics();
    guest.until("statistics", || guest.balloon.statistics().is_some_and(|told| told.free.is_some()));
    guest.until("free pages that are reported", || guest.balloon.released().1 > before);
    eprintln!("free pages reported: {} MiB", guest.balloon.released().1 >> 20);
}
