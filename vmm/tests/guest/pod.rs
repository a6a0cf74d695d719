//! Containers, their output, execs, and the end of the pod.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use hull_agent::protocol::messages::{
    AddVolume, Device, Dial, Forget, Measure, Measured, Ping, Range, Resize, ResizeTerminal, Resources,
    StopSandbox, add_volume, error::Code, request::Call, response::Outcome, slot::Kind,
};

use crate::agent::{Agent, Container, exec};
use crate::disk;
use crate::machine::Machine;

fn image(machine: &mut Machine) -> Range {
    let tree = machine.directory.path().join("busybox");
    disk::busybox(&tree, &[("etc/marker", "from the image\n")]);
    machine.image(&tree)
}

/// Lines of a CRI log without their times.
fn lines(path: &std::path::Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

fn measure(agent: &mut Agent, containers: &[&str]) -> Measured {
    let container_ids = containers.iter().map(|id| (*id).to_owned()).collect();
    match agent.call(Call::Measure(Measure { container_ids }), vec![]) {
        Outcome::Measured(measured) => measured,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pod_lives_in_a_machine_as_it_does_on_a_host() {
    let Some(mut machine) = Machine::boot(2, 512 << 20) else { return };
    assert!(machine.first_process().success());
    let (started, listening) = machine.started();
    eprintln!("first instruction after {started} µs, listening after {listening} µs");
    let image = image(&mut machine);
    let mut agent = machine.agent();
    assert_eq!(agent.state().sandbox_id, "");
    agent.done(Call::Ping(Ping { wall_clock_ns: 0 }), vec![]);
    let early = agent.error(Call::Measure(Measure::default()), vec![]);
    assert_eq!(early.code(), Code::FailedPrecondition, "{early:?}");
    agent.create(|spec| {
        spec.shared_pid_namespace = false;
        spec.etc_hosts = Some(b"127.0.0.1 localhost\n".to_vec());
        spec.guest.as_mut().unwrap().cpus = 2;
        spec.guest.as_mut().unwrap().kernel_sysctls = [("vm.max_map_count".into(), "262144".into())].into();
    });

    output_and_exit(&mut machine, &mut agent, image);
    let mut agent = another_connection(&mut machine, agent, image);
    execs(&mut machine, &mut agent);
    out_of_memory(&mut machine, &mut agent, image);
    numbers(&mut machine, &mut agent);
    forgotten(&mut machine, &mut agent);

    let id = agent.send(Call::StopSandbox(StopSandbox {}), vec![]);
    assert!(matches!(agent.response(id), Outcome::Done(_)));
    let reason = machine.ended();
    eprintln!("the machine ended: {reason}");
}

/// What a container sees, what it writes, and how it ends.
fn output_and_exit(machine: &mut Machine, agent: &mut Agent, image: Range) {
    let log = machine.log("first");
    let script = "cat /etc/marker /etc/hosts; hostname; nproc; cat /proc/sys/vm/max_map_count; \
        echo changed > /etc/marker && cat /etc/marker; stat -f -c %T /; ls /dev | tr '\\n' ' '; echo; \
        cat /proc/1/cgroup; df -m / | tail -1 | awk '{print $2 > 40}'; echo problem >&2; printf partial; exit 7";
    agent.start(Container::new("first", image, machine.scratch(), script));
    let record = agent.exited("first");
    assert_eq!((record.exit_code, record.oom_killed), (7, false));
    // The exit comes after the last byte is in the log.
    let written = lines(&log);
    let stdout: Vec<&str> = written.iter().filter_map(|line| line.strip_prefix("stdout F ")).collect();
    assert_eq!(stdout[..4], ["from the image", "127.0.0.1 localhost", "guest", "2"], "{written:?}");
    assert_eq!(stdout[4..6], ["262144", "changed"], "{written:?}");
    assert!(stdout.iter().any(|line| line.contains("null") && !line.contains("vda")), "{written:?}");
    assert!(stdout.contains(&"0::/"), "{written:?}");
    assert!(written.contains(&"stderr F problem".to_owned()), "{written:?}");
    assert!(written.contains(&"stdout P partial".to_owned()), "{written:?}");
    agent.done(Call::Forget(Forget { container_id: "first".into() }), vec![]);
}

/// The caller dies; the next one finds everything, and much output arrives exactly.
fn another_connection(machine: &mut Machine, mut agent: Agent, image: Range) -> Agent {
    let log = machine.log("second");
    let mut second = Container::new(
        "second",
        image,
        machine.scratch(),
        "trap 'exit 3' TERM; seq 1 20000; echo ready; while :; do sleep 0.1; done",
    );
    second.spec.resources = Some(Resources { memory_limit: Some(64 << 20), ..Resources::default() });
    agent.start_later(second);
    drop(agent);
    let mut agent = machine.agent();
    let start = std::time::Instant::now();
    while agent.state().containers.is_empty() {
        assert!(start.elapsed() < crate::PATIENCE);
    }
    let state = agent.state();
    assert_eq!((&*state.sandbox_id, &*state.containers[0].id), ("pod", "second"));
    while !fs::read_to_string(&log).unwrap().contains("ready") {
        assert!(start.elapsed() < crate::PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    let numbers: Vec<String> = (1..=20_000).map(|number| format!("stdout F {number}")).collect();
    assert_eq!(lines(&log)[..20_000], numbers);
    agent
}

fn execs(machine: &mut Machine, agent: &mut Agent) {
    // Input, output and exit code over streams; one of them comes after the request.
    let (stdin, mut input) = machine.stream();
    let (stdout, mut output) = machine.stream();
    let mut call = exec("second", "cat; echo again > /dev/stdout; echo bad >&2; exit 5");
    (call.stdin, call.stdout, call.stderr) = (Some(0), Some(1), Some(2));
    let late = u64::MAX - 5;
    let slots = vec![Kind::Stream(stdin), Kind::Stream(stdout), Kind::Stream(late)];
    let id = agent.send(Call::Exec(call), slots);
    std::thread::sleep(Duration::from_millis(100));
    let mut problems = machine.stream_called(late);
    input.write_all(b"typed\n").unwrap();
    input.shutdown(Shutdown::Write).unwrap();
    let (mut text, mut problem) = (String::new(), String::new());
    output.read_to_string(&mut text).unwrap();
    problems.read_to_string(&mut problem).unwrap();
    assert_eq!((&*text, &*problem), ("typed\nagain\n", "bad\n"));
    match agent.response(id) {
        Outcome::ExecEnded(end) => assert_eq!((end.exit_code, end.timed_out), (5, false)),
        other => panic!("{other:?}"),
    }

    // A terminal.
    let (keyboard, mut typist) = machine.stream();
    let (screen, mut shown) = machine.stream();
    let mut call = exec("second", "tty; read line; echo got $line");
    (call.stdin, call.stdout) = (Some(0), Some(1));
    call.process.as_mut().unwrap().terminal = true;
    let id = agent.send(Call::Exec(call), vec![Kind::Stream(keyboard), Kind::Stream(screen)]);
    typist.write_all(b"hello\n").unwrap();
    let mut text = String::new();
    shown.read_to_string(&mut text).unwrap();
    assert!(text.contains("/dev/pts/") && text.contains("got hello"), "{text:?}");
    assert!(matches!(agent.response(id), Outcome::ExecEnded(end) if end.exit_code == 0));

    // One whose size is known before its streams have come begins with it.
    let (keyboard, _typist) = machine.stream();
    let mut call = exec("second", "stty size");
    (call.stdin, call.stdout) = (Some(0), Some(1));
    call.process.as_mut().unwrap().terminal = true;
    let late = u64::MAX - 6;
    let id = agent.send(Call::Exec(call), vec![Kind::Stream(keyboard), Kind::Stream(late)]);
    let size = ResizeTerminal { container_id: "second".into(), rows: 33, columns: 77, exec_request: id };
    agent.done(Call::ResizeTerminal(size), vec![]);
    let (mut shown, mut text) = (machine.stream_called(late), String::new());
    shown.read_to_string(&mut text).unwrap();
    assert_eq!(text, "33 77\r\n");
    assert!(matches!(agent.response(id), Outcome::ExecEnded(end) if end.exit_code == 0));

    // One that is stopped before they have come never begins.
    let mut call = exec("second", "true");
    call.stdout = Some(0);
    let id = agent.send(Call::Exec(call), vec![Kind::Stream(u64::MAX - 7)]);
    agent.done(Call::StopExec(hull_agent::protocol::messages::StopExec { exec_request: id }), vec![]);
    match agent.response(id) {
        Outcome::Error(error) => assert!(error.message.contains("was stopped before"), "{error:?}"),
        other => panic!("{other:?}"),
    }

    // A port of the pod.
    let server = exec("second", "while :; do echo pong | nc -l -p 8080; done");
    let server = agent.send(Call::Exec(server), vec![]);
    let start = std::time::Instant::now();
    let answer = loop {
        let (number, mut stream) = machine.stream();
        match agent.call(Call::Dial(Dial { port: 8080, slot: 0 }), vec![Kind::Stream(number)]) {
            Outcome::Done(_) => {
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                break answer;
            }
            Outcome::Error(error) => assert_eq!(error.errno, 111, "{error:?}"),
            other => panic!("{other:?}"),
        }
        assert!(start.elapsed() < crate::PATIENCE);
    };
    assert_eq!(answer, "pong\n");
    agent.done(Call::StopExec(hull_agent::protocol::messages::StopExec { exec_request: server }), vec![]);

    // A stream that never comes.
    let mut call = exec("second", "true");
    call.stdout = Some(0);
    let error = agent.error(Call::Exec(call), vec![Kind::Stream(u64::MAX)]);
    assert!(error.message.contains("has not come"), "{error:?}");
}

fn out_of_memory(machine: &mut Machine, agent: &mut Agent, image: Range) {
    let mut hog = Container::new("hog", image, machine.scratch(), "exec tail -n 1 /dev/zero");
    machine.log("hog");
    hog.spec.resources = Some(Resources { memory_limit: Some(16 << 20), ..Resources::default() });
    agent.start(hog);
    let record = agent.exited("hog");
    assert_eq!((record.exit_code, record.oom_killed), (137, true));
    agent.done(Call::Forget(Forget { container_id: "hog".into() }), vec![]);
}

fn numbers(machine: &mut Machine, agent: &mut Agent) {
    let run = |agent: &mut Agent, script: &str| match agent.call(Call::Exec(exec("second", script)), vec![]) {
        Outcome::ExecEnded(end) => end.exit_code,
        other => panic!("{other:?}"),
    };
    let before = measure(agent, &["second"]);
    assert_eq!(run(agent, "dd if=/dev/urandom of=/big bs=1M count=16; sync"), 0);
    let after = measure(agent, &["second", "unknown"]);
    let [container] = &*after.containers else { panic!("{after:?}") };
    let usage = container.cgroup.as_ref().unwrap();
    assert!(usage.usage().cpu.unwrap().usage > 0 && usage.usage().memory.unwrap().usage > 0);
    assert_eq!(usage.memory_limit, Some(64 << 20));
    assert!(container.processes >= 1 && container.ulimits.contains_key("max_open_files"), "{container:?}");
    let used = |measured: &Measured| measured.containers[0].disk.as_ref().unwrap().used;
    assert!((16 << 20..20 << 20).contains(&(used(&after) - used(&before))), "{after:?}");
    assert_eq!(after.cpus_online, 2);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let difference = i128::from(after.at) - clock as i128;
    assert!(difference.abs() < 2_000_000_000, "the clock differs by {difference} ns");

    // Deleted files give the host its blocks back.
    let full = machine.scratch_used();
    assert_eq!(run(agent, "rm /big; sync; fstrim / 2>/dev/null; true"), 0);
    let start = std::time::Instant::now();
    while machine.scratch_used() + (12 << 20) > full {
        assert!(start.elapsed() < crate::PATIENCE, "{} of {full}", machine.scratch_used());
        std::thread::sleep(Duration::from_millis(50));
    }

    agent.done(Call::Resize(Resize { cpus: 1 }), vec![]);
    assert_eq!(measure(agent, &[]).cpus_online, 1);
    let error = agent.error(Call::Resize(Resize { cpus: 3 }), vec![]);
    assert!(error.message.contains("born with 2"), "{error:?}");
    eprintln!("{} MiB of {} available", after.memory_available >> 20, after.memory_total >> 20);
}

/// A forgotten container leaves nothing, and its range can be another's.
fn forgotten(machine: &mut Machine, agent: &mut Agent) {
    agent.done(
        Call::Signal(hull_agent::protocol::messages::Signal {
            container_id: "second".into(),
            signal: 15,
            all: false,
        }),
        vec![],
    );
    assert_eq!(agent.exited("second").exit_code, 3);
    agent.done(Call::Forget(Forget { container_id: "second".into() }), vec![]);
    assert!(measure(agent, &[]).disks.is_empty());

    // What cannot be mounted is refused by name, and leaves nothing either.
    let nothing = Range { offset: 1 << 40, length: 4096 };
    let id = agent.start_later(Container::new("bad", nothing, machine.scratch(), "true"));
    match agent.response(id) {
        Outcome::Error(error) => assert!(error.message.contains("cannot start container bad"), "{error:?}"),
        other => panic!("{other:?}"),
    }
    let outside = Range { offset: 1 << 60, length: 4096 };
    let spec =
        AddVolume { id: "v".into(), kind: Some(add_volume::Kind::Scratch(outside)), ..AddVolume::default() };
    assert_eq!(agent.error(Call::AddVolume(spec), vec![]).code(), Code::Invalid);
    assert!(measure(agent, &[]).disks.is_empty());
}

#[test]
fn containers_share_processes_and_get_raw_devices() {
    let Some(mut machine) = Machine::boot(1, 256 << 20) else { return };
    let image = image(&mut machine);
    let mut agent = machine.agent();
    let created = agent.create(|spec| spec.shared_pid_namespace = true);
    assert!(created.reaper_pid > 1);
    machine.log("one");
    let log = machine.log("two");
    machine.fill_slot(1, &[b'x'; 1 << 20]);
    let shared = |mut container: Container| {
        container.spec.pid_mode = hull_agent::protocol::messages::PidMode::PidPod.into();
        container
    };
    let mut one = Container::new("one", image, machine.scratch(), "exec sleep 1234");
    one.spec.devices.push(Device {
        path: "/dev/disk".into(),
        r#type: "b".into(),
        mode: 0o660,
        access: "rwm".into(),
        block_slot: Some(1),
        ..Device::default()
    });
    agent.start(shared(one));
    let script = "ps | grep -q 'sleep 1234' && echo seen; echo shared > /dev/shm/x";
    agent.start(shared(Container::new("two", image, machine.scratch(), script)));
    agent.exited("two");
    assert!(lines(&log).contains(&"stdout F seen".to_owned()));

    let (number, mut output) = machine.stream();
    let mut call =
        exec("one", "cat /dev/shm/x; head -c 3 /dev/disk; wc -c < /dev/disk; printf yes > /dev/disk; sync");
    call.stdout = Some(0);
    let id = agent.send(Call::Exec(call), vec![Kind::Stream(number)]);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "shared\nxxx1048576\n");
    assert!(matches!(agent.response(id), Outcome::ExecEnded(end) if end.exit_code == 0));
    let disk = fs::read(machine.directory.path().join("slot-1")).unwrap();
    assert_eq!(&disk[..4], b"yesx");
}
