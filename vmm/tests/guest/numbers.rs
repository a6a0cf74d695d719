//! Numbers for docs/SPECIFICATION.md: `hack/bench machine` runs these tests, on a machine that is quiet. HULL_BENCH_ROUNDS
//! says how often; HULL_BENCH_FIRECRACKER names a Firecracker to boot in turn with the same kernel and, once each,
//! HULL_BENCH_FIRECRACKER_INITRAMFS or the file system HULL_BENCH_FIRECRACKER_ROOT.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use hull_agent::protocol::messages::{
    AddVolume, Measure, VolumePath, add_volume, request::Call, response::Outcome, slot::Kind,
};

use crate::PATIENCE;
use crate::agent::{Agent, Container, exec};
use crate::disk;
use crate::machine::{self, Machine};

/// What the guest's first process prints under Firecracker.
const MARK: &[u8] = b"FIRST INSTRUCTION";
/// Bytes that the throughput of disk and stream is measured with.
const BULK: usize = 64 << 20;
/// Files that are read and made through virtio-fs.
const FILES: usize = 500;
/// Files of the host that the guest looks at, and does not keep: names have no timeout.
const INODES: usize = 4000;
/// Streams that are open at a time, and of these that are full.
const STREAMS: usize = 128;
const STREAMS_FULL: usize = 8;

fn rounds() -> usize {
    std::env::var("HULL_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(20)
}

/// Measurements by name, which ends with the unit, in the order in which they first came.
#[derive(Default)]
struct Numbers {
    order: Vec<String>,
    values: BTreeMap<String, Vec<f64>>,
}

impl Numbers {
    fn add(&mut self, what: &str, value: f64) {
        let values = self.values.entry(what.to_owned()).or_insert_with(|| {
            self.order.push(what.to_owned());
            Vec::new()
        });
        values.push(value);
    }

    /// Runs `step` and notes how many milliseconds it took.
    fn timed<T>(&mut self, what: &str, step: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = step();
        self.add(what, start.elapsed().as_secs_f64() * 1e3);
        result
    }

    fn print(&self) {
        println!("\n{:<62} {:>9} {:>9} {:>9} {:>4}", "", "median", "least", "most", "n");
        for what in &self.order {
            let mut sorted = self.values[what].clone();
            sorted.sort_by(f64::total_cmp);
            let (median, last) = (sorted[sorted.len() / 2], sorted.len() - 1);
            println!("{what:<62} {median:>9.2} {:>9.2} {:>9.2} {:>4}", sorted[0], sorted[last], last + 1);
            let row = serde_json::json!({"stage": what, "median": median, "values": self.values[what]});
            println!("JSON {row}");
        }
    }
}

#[test]
#[ignore = "measures for minutes"]
fn numbers_of_a_boot() {
    let mut numbers = Numbers::default();
    let firecracker = std::env::var_os("HULL_BENCH_FIRECRACKER");
    for _ in 0..rounds() {
        let Some(mut machine) = Machine::boot(1, 128 << 20) else { return };
        let (first, listens) = machine.started();
        numbers.add("hull-vmm: its start to the agent's first instruction (ms)", first as f64 / 1e3);
        numbers.add("hull-vmm: its start to the agent listening (ms)", listens as f64 / 1e3);
        let mut agent = machine.agent();
        numbers.timed("CreateSandbox in the guest (ms)", || agent.create(|_| ()));
        if let Outcome::Measured(measured) = agent.call(Call::Measure(Measure::default()), vec![]) {
            let used = (128 << 20) - measured.memory_available;
            numbers.add("guest memory in use before the first container (MiB)", used as f64 / 1048576.0);
        }
        let (private, resident) = beyond_guest_memory(machine.pid());
        numbers.add("hull-vmm: private memory beyond the guest's (MiB)", private);
        numbers.add("hull-vmm: resident memory beyond the guest's (MiB)", resident);
        drop(agent);
        drop(machine);
        if let Some(program) = &firecracker {
            boot_firecracker(Path::new(program), Given::Nothing, &mut numbers);
            boot_firecracker(Path::new(program), Given::Devices, &mut numbers);
        }
    }
    numbers.print();
}

/// Private and resident MiB of a process, without mappings as large as a guest's memory.
fn beyond_guest_memory(pid: i32) -> (f64, f64) {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut private, mut resident, mut is_guests) = (0, 0, false);
    for line in smaps.lines() {
        let value = || line.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        match line.split_once(':').map_or("", |(name, _)| name) {
            // Comes first of a mapping's fields.
            "Size" => is_guests = value() >= 64 << 10,
            "Private_Clean" | "Private_Dirty" if !is_guests => private += value(),
            "Rss" if !is_guests => resident += value(),
            _ => {}
        }
    }
    (private as f64 / 1024.0, resident as f64 / 1024.0)
}

/// What a Firecracker has beside the kernel and the serial console.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Given {
    /// An initramfs, and no device at all.
    Nothing,
    /// What nobody does without: a disk, which is its root, a NIC, and a vsock.
    Devices,
}

/// The tap of a Firecracker's NIC.
const TAP: &str = "bench0";

/// The same kernel, and a first process that prints [`MARK`] to the serial console.
fn boot_firecracker(program: &Path, given: Given, numbers: &mut Numbers) {
    let directory = tempfile::tempdir().unwrap();
    let from = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let mut config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": machine::guest("vmlinux"),
            "boot_args": "console=ttyS0 reboot=k panic=1 quiet",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [],
    });
    if given == Given::Nothing {
        config["boot-source"]["initrd_path"] = from("HULL_BENCH_FIRECRACKER_INITRAMFS").into();
    } else {
        // Left from the last round, it is the same.
        let _ = Command::new("ip").args(["tuntap", "add", TAP, "mode", "tap"]).stderr(Stdio::null()).status();
        config["drives"] = serde_json::json!([{
            "drive_id": "root", "path_on_host": from("HULL_BENCH_FIRECRACKER_ROOT"),
            "is_root_device": true, "is_read_only": true,
        }]);
        config["network-interfaces"] = serde_json::json!([{"iface_id": "eth0", "host_dev_name": TAP}]);
        config["vsock"] = serde_json::json!({"guest_cid": 3, "uds_path": "vsock"});
    }
    fs::write(directory.path().join("config"), config.to_string()).unwrap();
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(["--no-api", "--config-file", "config"])
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(directory.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let mut console = child.stdout.take().unwrap();
    let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
    while !seen.windows(MARK.len()).any(|window| window == MARK) {
        let count = console.read(&mut buffer).unwrap();
        let log = || fs::read_to_string(directory.path().join("log")).unwrap_or_default();
        assert!(count > 0 && start.elapsed() < PATIENCE, "{}\n{}", String::from_utf8_lossy(&seen), log());
        seen.extend_from_slice(&buffer[..count]);
    }
    let who = match given {
        Given::Nothing => "Firecracker without a device",
        Given::Devices => "Firecracker with disk, NIC and vsock",
    };
    let millis = start.elapsed().as_secs_f64() * 1e3;
    numbers.add(&format!("{who}: its start to the first process's mark (ms)"), millis);
    let (private, resident) = beyond_guest_memory(child.id().cast_signed());
    numbers.add(&format!("{who}: private memory beyond the guest's (MiB)"), private);
    numbers.add(&format!("{who}: resident memory beyond the guest's (MiB)"), resident);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "measures for minutes"]
fn numbers_of_a_running_machine() {
    let Some(mut machine) = Machine::boot(1, 512 << 20) else { return };
    let mut numbers = Numbers::default();
    let tree = machine.directory.path().join("busybox");
    disk::busybox(&tree, &[("big", &"x".repeat(BULK))]);
    let image = machine.image(&tree);
    let mut agent = machine.agent();
    agent.create(|_| ());
    let host = machine.directory.path().join("host");
    fs::create_dir(&host).unwrap();
    for number in 0..FILES {
        fs::write(host.join(format!("file{number}")), "x".repeat(1000)).unwrap();
    }
    machine.log("one");
    let mut one = Container::new("one", image, machine.scratch(), "while :; do sleep 1000; done");
    share(&mut machine, &mut agent, &mut one, &host);
    numbers.timed("StartContainer in the guest (ms)", || agent.start(one));

    // Once: afterwards it is in the guest's memory.
    let start = Instant::now();
    run(&mut agent, "cat /big > /dev/null");
    let rate = BULK as f64 / 1e6 / start.elapsed().as_secs_f64();
    numbers.add("read of a file of an image, by blocks (MB/s)", rate);
    for _ in 0..rounds() {
        numbers.timed("exec of true (ms)", || run(&mut agent, "exec true"));
        let (number, mut stream) = machine.stream();
        let mut call = exec("one", "exec cat");
        (call.stdin, call.stdout) = (Some(0), Some(0));
        let id = agent.send(Call::Exec(call), vec![Kind::Stream(number)]);
        echo(&mut stream, &mut numbers);
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        agent.response(id);
    }
    for _ in 0..rounds().min(5) {
        throughput(&mut machine, &mut agent, &mut numbers);
    }
    numbers.print();
}

/// What a stream and an open inode take, from what many of them take together.
#[test]
#[ignore = "measures for minutes"]
fn numbers_of_streams_and_inodes() {
    let mut numbers = Numbers::default();
    for _ in 0..rounds().min(5) {
        let Some(mut machine) = Machine::boot(1, 256 << 20) else { return };
        let tree = machine.directory.path().join("busybox");
        disk::busybox(&tree, &[]);
        let image = machine.image(&tree);
        let mut agent = machine.agent();
        agent.create(|_| ());
        let host = machine.directory.path().join("host");
        fs::create_dir(&host).unwrap();
        for number in 0..INODES {
            fs::write(host.join(format!("file{number}")), "x").unwrap();
        }
        machine.log("one");
        let mut one = Container::new("one", image, machine.scratch(), "while :; do sleep 1000; done");
        share(&mut machine, &mut agent, &mut one, &host);
        agent.start(one);
        run(&mut agent, "exec true");
        streams(&mut machine, &mut agent, &mut numbers);
        inodes(&machine, &mut agent, &mut numbers);
    }
    numbers.print();
}

fn streams(machine: &mut Machine, agent: &mut Agent, numbers: &mut Numbers) {
    let private = |machine: &Machine| beyond_guest_memory(machine.pid()).0 * 1048576.0;
    let before = private(machine);
    let waiting: Vec<_> = (0..STREAMS).map(|_| machine.stream()).collect();
    // Behind them all on the way to the guest
    run(agent, "exec true");
    numbers.add("hull-vmm: bytes of an idle vsock stream", (private(machine) - before) / STREAMS as f64);
    drop(waiting);
    run(agent, "exec true");

    let before = private(machine);
    let mut full = Vec::new();
    for _ in 0..STREAMS_FULL {
        let (number, stream) = machine.stream();
        let mut call = exec("one", "exec cat /dev/zero");
        call.stdout = Some(0);
        full.push((agent.send(Call::Exec(call), vec![Kind::Stream(number)]), stream));
    }
    // No more comes once all buffers on the way are full.
    let (start, mut last) = (Instant::now(), 0.0);
    loop {
        std::thread::sleep(std::time::Duration::from_secs(2));
        let now = private(machine);
        // Processes take a while to start.
        if now > before && now <= last {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "nothing comes");
        last = now;
    }
    let each = (last - before) / STREAMS_FULL as f64;
    numbers.add("hull-vmm: bytes of a vsock stream that nobody reads", each);
    for (id, stream) in full {
        drop(stream);
        agent.response(id);
    }
}

fn inodes(machine: &Machine, agent: &mut Agent, numbers: &mut Numbers) {
    let private = || beyond_guest_memory(machine.server_pid).0 * 1048576.0;
    run(agent, "stat /host > /dev/null");
    numbers.add("hull-virtiofsd: private memory with one volume (MiB)", private() / 1048576.0);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", machine.server_pid)).unwrap().count() as f64;
    let (before, open) = (private(), descriptors());
    run(agent, "ls -l /host > /dev/null");
    let files = INODES as f64;
    numbers.add("hull-virtiofsd: bytes of an inode that was looked at", (private() - before) / files);
    numbers.add("hull-virtiofsd: descriptors of an inode that was looked at", (descriptors() - open) / files);

    let (before, open) = (private(), descriptors());
    run(agent, &HOLD.replace("DIRECTORY", "/host"));
    numbers.add("hull-virtiofsd: bytes of an inode that is open", (private() - before) / HELD);
    numbers.add("hull-virtiofsd: descriptors of an inode that is open", (descriptors() - open) / HELD);
}

/// Programs that hold HELD files open, each a thousand (file1000 to file1999, and so on), and stay.
const HOLD: &str = "for thousand in 1 2 3; do
    tail -n 0 -f -s 1000 DIRECTORY/file$thousand??? > /dev/null 2>&1 &
    tails=\"$tails $!\"
done
for tail in $tails; do
    until [ $(ls /proc/$tail/fd | wc -l) -ge 1003 ]; do kill -0 $tail || exit 1; usleep 100000; done
done";
const HELD: f64 = 3000.0;

/// Lets a container have a directory of the host, by virtio-fs.
fn share(machine: &mut Machine, agent: &mut Agent, container: &mut Container, host: &Path) {
    let server = machine.serve_volumes();
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let tree = rustix::fs::open(host, flags, rustix::fs::Mode::empty()).unwrap();
    server.attach(0, host, std::os::fd::AsFd::as_fd(&tree), false).unwrap();
    let shared = add_volume::Kind::Shared(add_volume::Shared { index: 0, directory: true });
    let volume = AddVolume { id: "host".into(), kind: Some(shared), ..Default::default() };
    agent.done(Call::AddVolume(volume), vec![]);
    container.mount("/host", Kind::Volume(VolumePath { id: "host".into(), path: String::new() }));
}

fn run(agent: &mut Agent, script: &str) {
    match agent.call(Call::Exec(exec("one", script)), vec![]) {
        Outcome::ExecEnded(end) => assert_eq!(end.exit_code, 0, "{script}"),
        other => panic!("{other:?}"),
    }
}

/// The first byte waits for the program to start.
fn echo(stream: &mut std::os::unix::net::UnixStream, numbers: &mut Numbers) {
    use std::io::Write;
    for turn in 0..10 {
        let start = Instant::now();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        if turn > 0 {
            numbers.add("one byte to cat and back, by vsock (ms)", start.elapsed().as_secs_f64() * 1e3);
        }
    }
}

fn throughput(machine: &mut Machine, agent: &mut Agent, numbers: &mut Numbers) {
    let start = Instant::now();
    run(agent, "cat /host/file* > /dev/null");
    numbers.add("small files read, by virtio-fs (files/s)", FILES as f64 / start.elapsed().as_secs_f64());
    let (number, mut stream) = machine.stream();
    let mut call = exec("one", &format!("exec head -c {BULK} /dev/zero"));
    call.stdout = Some(0);
    let start = Instant::now();
    let id = agent.send(Call::Exec(call), vec![Kind::Stream(number)]);
    let read = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    assert_eq!(read, BULK as u64);
    numbers.add("output of a process, by vsock (MB/s)", BULK as f64 / 1e6 / start.elapsed().as_secs_f64());
    agent.response(id);
}
