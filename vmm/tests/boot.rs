//! Boots a real kernel on a real KVM: what the machine promises to a guest. Where /dev/kvm cannot run one, it says so and
//! does nothing; `hack/node` has one that can.
//!
//! The kernel is HULL_GUEST_KERNEL, else target-guest/vmlinux; its init is busybox with a script.
#![cfg(feature = "machine")]
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod busybox;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use hull_vmm::devices::legacy::PortEvent;
use hull_vmm::machine::{Core, CoreConfig, CoreFiles, CoreState, Kernel};
use hull_vmm::memory::MachineMemory;
use hull_vmm::vcpu::{VcpuEvent, VcpuEvents};

use busybox::{initramfs, kernel, kvm};

/// A guest may be emulated as a whole.
const PATIENCE: Duration = Duration::from_secs(120);

struct Guest {
    core: Core,
    console: File,
    seen: String,
    events: Receiver<VcpuEvent>,
    _console_path: tempfile::NamedTempFile,
}

fn events() -> (VcpuEvents, Receiver<VcpuEvent>) {
    let (sender, receiver) = channel();
    (Arc::new(move |event| drop(sender.send(event))), receiver)
}

fn console() -> (tempfile::NamedTempFile, OwnedFd, File) {
    let path = tempfile::NamedTempFile::new().unwrap();
    let append = File::options().append(true).open(path.path()).unwrap();
    let reading = path.reopen().unwrap();
    (path, append.into(), reading)
}

impl Guest {
    fn boot(kvm: OwnedFd, cpus: u32, memory: u64, cmdline: &str) -> Self {
        Self::boot_kernel(kvm, cpus, memory, cmdline, kernel())
    }

    fn boot_kernel(kvm: OwnedFd, cpus: u32, memory: u64, cmdline: &str, kernel: PathBuf) -> Self {
        let (path, append, console) = console();
        let (sink, events) = events();
        let core = Core::boot(
            &CoreConfig { cpus, cmdline_extra: cmdline.to_owned() },
            CoreFiles { kvm, console: append },
            MachineMemory::new(memory, memory + (1 << 30)).unwrap(),
            Kernel {
                kernel: File::open(&kernel).unwrap_or_else(|e| panic!("{}: {e}", kernel.display())),
                initramfs: initramfs(),
            },
            Vec::new(),
            &sink,
            || Ok(()),
        )
        .unwrap();
        let mut guest = Self { core, console, seen: String::new(), events, _console_path: path };
        guest.core.resume().unwrap();
        guest
    }

    fn read_console(&mut self) {
        let at = self.seen.len() as u64;
        self.console.seek(SeekFrom::Start(at)).unwrap();
        let mut bytes = Vec::new();
        self.console.read_to_end(&mut bytes).unwrap();
        self.seen.push_str(&String::from_utf8_lossy(&bytes));
    }

    fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        loop {
            self.read_console();
            if self.seen.contains(text) {
                eprintln!("{text:?} after {:?}", start.elapsed());
                return;
            }
            assert!(start.elapsed() < PATIENCE, "no {text:?} on the console:\n{}", self.seen);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn event(&mut self) -> VcpuEvent {
        self.events.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            self.read_console();
            panic!("the machine said nothing:\n{}", self.seen)
        })
    }
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn a_guest_sees_all_its_memory_and_costs_nothing_idle_and_brings_its_processors_up_one_by_one() {
    let Some(kvm) = kvm() else { return };

    let mut guest = Guest::boot(kvm, 4, (3 << 30) + (512 << 20), "test.memory test.idle test.cpus test.off");

    guest.wait_for("test: init");
    guest.wait_for("MemTotal");
    guest.wait_for("test: idle");
    // Booting leaves work behind that ends in the seconds after it.
    let spent: Vec<_> = (0..6)
        .map(|_| {
            let before = processor_time();
            std::thread::sleep(Duration::from_secs(2));
            processor_time() - before
        })
        .collect();
    eprintln!("idle: {spent:?} of processor time in 2 s each");
    assert!(spent.iter().min().unwrap() < &busybox::idle_cost(), "{spent:?}");
    guest.wait_for("test: 1 online of 0-3");
    for online in 2..=4 {
        guest.wait_for(&format!("test: {online} online"));
    }
    let total: u64 = guest
        .seen
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap();
    assert!((3400 << 10..=3584 << 10).contains(&total), "{total} kB");
    // What lies above 3 GiB is above 4.
    assert!(guest.seen.contains("00100000-bfffffff : System RAM"), "{}", guest.seen);
    assert!(guest.seen.contains("100000000-11fffffff : System RAM"), "{}", guest.seen);
    assert!(matches!(guest.event(), VcpuEvent::Port(PortEvent::PowerOff)));
    guest.core.end();
}

#[test]
fn a_restart_and_a_panic_end_the_machine_and_the_panic_is_told() {
    for (command, panics) in [("test.restart", false), ("test.panic", true)] {
        let Some(kvm) = kvm() else { return };

        let mut guest = Guest::boot(kvm, 1, 128 << 20, command);

        let mut told = None;
        loop {
            match guest.event() {
                VcpuEvent::Port(PortEvent::Panicked(message)) => told = Some(message),
                VcpuEvent::Port(PortEvent::Reset(message)) => {
                    told = told.or(message);
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        match told {
            Some(message) => assert!(panics && message.contains("Attempted to kill init"), "{message}"),
            None => assert!(!panics),
        }
        guest.core.end();
    }
}

#[test]
fn a_bzimage_boots_too() {
    let Some(kvm) = kvm() else { return };
    let image = kernel().with_file_name("bzImage");
    if !image.exists() {
        eprintln!("skipped: there is no {}", image.display());
        return;
    }

    let mut guest = Guest::boot_kernel(kvm, 1, 256 << 20, "test.off", image);

    guest.wait_for("test: init");
    assert!(matches!(guest.event(), VcpuEvent::Port(PortEvent::PowerOff)));
}

#[test]
fn a_paused_machine_stands_still_and_a_saved_one_goes_on_in_another() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::boot(kvm.try_clone().unwrap(), 2, 128 << 20, "test.count");
    guest.wait_for("test: count 3");

    guest.core.pause().unwrap();
    guest.read_console();
    let before = guest.seen.clone();
    std::thread::sleep(Duration::from_secs(1));
    guest.read_console();
    assert_eq!(guest.seen, before, "it prints while it rests");
    let state = serde_json::to_vec(&guest.core.save().unwrap()).unwrap();

    let memory = MachineMemory::new(128 << 20, (128 << 20) + (1 << 30)).unwrap();
    copy(&guest.core.memory().file, &memory.file);
    let (path, append, reading) = console();
    let (sink, events) = events();
    let state: CoreState = serde_json::from_slice(&state).unwrap();
    let files = CoreFiles { kvm, console: append };
    let core = Core::restore(state, files, memory, Vec::new(), &sink, || Ok(())).unwrap();
    let mut copy = Guest { core, console: reading, seen: String::new(), events, _console_path: path };
    copy.core.resume().unwrap();
    guest.core.resume().unwrap();

    let last = before.lines().filter(|line| line.starts_with("test: count")).count();
    copy.wait_for(&format!("test: count {}", last + 5));
    guest.wait_for(&format!("test: count {}", last + 5));
    assert!(!copy.seen.contains("test: init"), "it is the same machine, not a new one:\n{}", copy.seen);
    guest.core.end();
    copy.core.end();
}

/// Copies what is allocated of a sparse file.
fn copy(from: &File, to: &File) {
    use rustix::fs::SeekFrom::{Data, Hole};
    use std::os::unix::fs::FileExt;
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(from, Data(at)) {
        let end = rustix::fs::seek(from, Hole(start)).unwrap();
        let mut buffer = vec![0; 1 << 20];
        let mut position = start;
        while position < end {
            let length = buffer.len().min((end - position) as usize);
            from.read_exact_at(&mut buffer[..length], position).unwrap();
            to.write_all_at(&buffer[..length], position).unwrap();
            position += length as u64;
        }
        at = end;
    }
}
