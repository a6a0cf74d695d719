//! Much through streams: nothing is lost, and whoever does not read costs no memory.

use std::collections::HashMap;
use std::time::Duration;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use sha2::{Digest, Sha256};

use crate::streaming::{Case, LARGE, Read, Spdy, V4, text};

/// What a stream that nobody reads may add to a process, in bytes: buffers, and what allocators keep.
const GROWTH: u64 = 8 << 20;

fn piece() -> Vec<u8> {
    (0..100_000_u32).map(|number| (number * 7 % 251) as u8).collect()
}

fn digest_of_all() -> String {
    let mut sum = Sha256::new();
    for _ in 0..LARGE / piece().len() {
        sum.update(piece());
    }
    hex::encode(sum.finalize())
}

/// Sends it all on a stream while reading what comes on every one, until `done` says so.
async fn exchange(
    spdy: Spdy,
    to: u32,
    done: impl Fn(&HashMap<u32, Read>) -> bool,
) -> (HashMap<u32, Read>, Spdy) {
    let Spdy { mut reader, mut writer } = spdy;
    let sender = tokio::spawn(async move {
        let piece = piece();
        for _ in 0..LARGE / piece.len() {
            writer.send(to, false, &piece).await;
        }
        writer.send(to, true, &[]).await;
        writer
    });
    let mut streams: HashMap<u32, Read> = HashMap::new();
    while !done(&streams) {
        let Some((stream, ended, bytes)) = reader.data().await else { break };
        let read = streams.entry(stream).or_default();
        read.bytes.extend(bytes);
        read.ended |= ended;
    }
    let writer = sender.await.unwrap();
    (streams, Spdy { reader, writer })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_pass_an_attach_in_each_direction_intact() {
    let case = Case::new(|config| {
        config.command = vec!["/bin/cat".into()];
        config.stdin = true;
        config.stdin_once = true;
    })
    .await;
    let mut spdy = Spdy::connect(&case.attach(true, false).await, V4).await;
    let error = spdy.writer.kind("error").await;
    let stdin = spdy.writer.kind("stdin").await;
    let stdout = spdy.writer.kind("stdout").await;
    spdy.writer.kind("stderr").await;
    let (streams, _) = exchange(spdy, stdin, |_| false).await;
    assert_eq!(streams[&stdout].bytes.len(), LARGE, "{}", text(&streams[&error].bytes));
    assert_eq!(hex::encode(Sha256::digest(&streams[&stdout].bytes)), digest_of_all());
    assert!(text(&streams[&error].bytes).contains("Success"), "{}", text(&streams[&error].bytes));
    case.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_pass_a_forwarded_port_in_each_direction_intact() {
    let (daemon, pod, _) = serving("/bin/cat").await;
    let mut spdy = Spdy::connect(&forward(&pod).await, "portforward.k8s.io").await;
    let (error, data) = connection(&mut spdy).await;
    let complete = |streams: &HashMap<u32, Read>| streams.get(&error).is_some_and(|error| error.ended);
    let (streams, spdy) = exchange(spdy, data, complete).await;
    assert_eq!(streams[&data].bytes.len(), LARGE, "{}", text(&streams[&error].bytes));
    assert_eq!(hex::encode(Sha256::digest(&streams[&data].bytes)), digest_of_all());
    assert!(streams[&error].bytes.is_empty(), "{}", text(&streams[&error].bytes));
    drop(spdy);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_read_costs_no_memory_and_stops_no_container_for_good() {
    let (daemon, mut pod, name) = serving("/bin/yes").await;
    let mut config = container_config("talker", &name, &["/bin/sh", "-c", "sleep 1; yes; true"]);
    config.log_path = String::new();
    let talker = pod.start(config).await;
    let agent = match hull_tests::microvm::by_default() {
        true => None,
        false => Some(crate::survival::agent_of(&daemon, &pod.id).await as u32),
    };
    let before = (memory(daemon.pid()), agent.map(memory));

    // Given an exec, an attach and a forwarded port that print without end, and clients that read nothing
    let exec = cri::ExecRequest {
        container_id: talker.clone(),
        cmd: vec!["/bin/yes".into()],
        stdout: true,
        ..Default::default()
    };
    let exec = pod.client().exec(exec).await.unwrap().into_inner().url;
    let attach = cri::AttachRequest { container_id: talker.clone(), stdout: true, ..Default::default() };
    let attach = pod.client().attach(attach).await.unwrap().into_inner().url;
    let mut idle = Vec::new();
    for url in [exec, attach] {
        let mut spdy = Spdy::connect(&url, V4).await;
        spdy.writer.kind("error").await;
        spdy.writer.kind("stdout").await;
        idle.push(spdy);
    }
    let mut spdy = Spdy::connect(&forward(&pod).await, "portforward.k8s.io").await;
    connection(&mut spdy).await;
    idle.push(spdy);
    tokio::time::sleep(Duration::from_secs(6)).await;

    // Then nothing has grown by what they print
    let after = (memory(daemon.pid()), agent.map(memory));
    assert!(after.0 < before.0 + GROWTH, "hulld: {before:?} {after:?}");
    assert!(
        after.1 < before.1.map(|before| before + GROWTH) || agent.is_none(),
        "agent: {before:?} {after:?}"
    );
    // And the attached container has not stopped for the client that it was held up for
    let used = processor_time(&mut pod, &talker).await;
    hull_tests::eventually("the container goes on", hull_tests::patience(20), async || {
        (processor_time(&mut pod, &talker).await > used + 200_000_000).then_some(())
    })
    .await;
    drop(idle);
    daemon.finish().await;
}

/// A pod whose port 8080 is served by this program, one connection after the other; the name of its image.
async fn serving(program: &str) -> (Daemon, Pod, String) {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "ports")).await;
    let command = ["/bin/nc", "-l", "-p", "8080", "-e", program];
    let id = pod.start(container_config("main", &name, &command)).await;
    hull_tests::eventually("it listens", hull_tests::patience(20), async || {
        pod.shell(&id, "netstat -ltn").await.contains(":8080").then_some(())
    })
    .await;
    (daemon, pod, name)
}

async fn forward(pod: &Pod) -> String {
    let request = cri::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
    pod.client().port_forward(request).await.unwrap().into_inner().url
}

/// A connection to the port: its streams for errors and for data.
async fn connection(spdy: &mut Spdy) -> (u32, u32) {
    let stream = |kind| [("port", "8080"), ("requestid", "0"), ("streamtype", kind)];
    let error = spdy.writer.open(&stream("error")).await;
    (error, spdy.writer.open(&stream("data")).await)
}

/// Resident memory of a process in bytes.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// Of a container, in nanoseconds.
async fn processor_time(pod: &mut Pod, container: &str) -> u64 {
    let request = cri::ContainerStatsRequest { container_id: container.to_owned() };
    let stats = pod.client().container_stats(request).await.unwrap().into_inner().stats.unwrap();
    stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value
}
