//! A guest that plays with its NIC: chains of all shapes in both queues and bytes anywhere in memory, while frames come from
//! the tap. The tap is one in a network namespace of the fuzzer's own.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::OnceLock;

use hull_fuzz::ring::{Input, MEMORY, Ring, memory};
use hull_vmm::devices::virtio::net::{Net, Port};
use hull_vmm::devices::virtio::{Activation, Interrupt, Memory, VirtioDevice, Worker};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const FRAMES: u64 = 0x4_0000;
const BUFFERS: u64 = 0x8_0000;

struct Host {
    worker: Worker,
    tap: OwnedFd,
    peer: std::net::UdpSocket,
}

fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        // Only this thread moves; what it makes stays usable from others.
        std::thread::spawn(|| {
            hull_sys::namespace::unshare(hull_sys::namespace::Namespaces::NET).unwrap();
            let tap = hull_sys::tun::make_tap("tap0").unwrap();
            let script = "ip link set tap0 mtu 60000 up; ip address add 10.9.0.1/24 dev tap0; \
                          ip neighbour add 10.9.0.2 lladdr 02:00:00:00:00:07 dev tap0 nud permanent";
            assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success());
            let peer = std::net::UdpSocket::bind("10.9.0.1:0").unwrap();
            peer.connect("10.9.0.2:9").unwrap();
            peer.set_nonblocking(true).unwrap();
            Host { worker: Worker::start("net", || Ok(())).unwrap(), tap, peer }
        })
        .join()
        .unwrap()
    })
}

struct Machine {
    memory: Memory,
    device: Net,
    rings: [Ring; 2],
    turn: u64,
}

impl Machine {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 8 {
            0 | 1 => self.frame(input),
            2 => drop(host().peer.send(&vec![7; usize::from(input.u16()) % 60_000])),
            3 => self.give(input),
            4 => {
                let address = u64::from(input.u32()) % MEMORY;
                let _ = self.memory.write_slice(&input.bytes::<16>(), GuestAddress(address));
            }
            5 => self.descriptor(input),
            6 => self.rings[usize::from(input.u8() % 2)].kick(),
            _ => {
                self.device.pause().unwrap();
                let _ = self.device.save().unwrap();
                self.device.resume().unwrap();
            }
        }
    }

    fn frame(&mut self, input: &mut Input<'_>) {
        let address = FRAMES + self.turn % 8 * 0x100;
        self.turn += 1;
        let mut bytes = input.bytes::<12>().to_vec();
        bytes.extend(input.bytes::<6>());
        bytes.extend(if input.u8() < 220 { MAC } else { input.bytes() });
        bytes.extend(input.bytes::<46>());
        let _ = self.memory.write_slice(&bytes, GuestAddress(address));
        let cut = u32::from(input.u8() % 70);
        let rest = if input.u8() < 200 { 70 - cut } else { input.number() };
        self.rings[1].add(&[(address, cut, false), (address + u64::from(cut), rest, false)]);
        self.rings[1].kick();
    }

    fn give(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.u8() % 64 {
            let length = if input.u8() < 200 { 1536 } else { input.number() };
            let address = BUFFERS + self.turn % 256 * 0x600;
            self.turn += 1;
            self.rings[0].add(&[(address, length, true)]);
        }
        self.rings[0].kick();
    }

    fn descriptor(&mut self, input: &mut Input<'_>) {
        let ring = usize::from(input.u8() % 2);
        let address = u64::from(input.u32()) << (input.u8() % 32);
        let (length, flags, next) = (input.number(), u16::from(input.u8()), input.u16());
        self.rings[ring].write_descriptor(input.u16(), address, length, flags, next);
        if flags & 8 != 0 {
            let head = input.u16();
            self.rings[ring].offer(head);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let host = host();
    let memory = memory();
    let mut input = Input(data);
    let choice = input.u8();
    let tap = (choice & 1 == 0).then(|| File::from(host.tap.try_clone().unwrap()).into());
    let mut device = Net::new(host.worker.clone(), Port { tap, mac: MAC, mtu: 60_000 }).unwrap();
    let rings = [0, 0x4000].map(|base| Ring::new(&memory, base, 256));
    let queues = (0..2).map(|index| rings[usize::from(index)].queue(index, choice & 2 != 0)).collect();
    // Some without merging, some without segments.
    let mut features = device.features();
    features &= !(u64::from(choice >> 2 & 1) << 15 | u64::from(choice >> 3 & 3) << 7);
    let interrupt = Interrupt::new(EventFd::new(0o4000).unwrap());
    device.activate(Activation { memory: memory.clone(), features, queues, interrupt }).unwrap();
    let mut machine = Machine { memory, device, rings, turn: 0 };
    while !input.is_empty() {
        machine.step(&mut input);
    }
    machine.device.pause().unwrap();
    machine.device.resume().unwrap();
    machine.device.reset();
});
