use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_cri::v1::{self as cri, ContainerState};

use crate::bench::{Network, Options, Peer, Report, processes};

/// What the fast container prints, in lines of 100 bytes.
const BYTES: u64 = 200_000_000;

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    for round in 0..options.rounds {
        for peer in peers {
            fast(options, peer, round, report).await;
        }
    }
    for peer in peers {
        slow(options, peer, report).await;
    }
}

async fn fast(options: &Options, peer: &Peer, round: usize, report: &mut Report) {
    let name = format!("loud-{round}");
    let line = "x".repeat(99);
    let command = format!("yes {line} | head -c {BYTES}; echo THE-END");
    let config = peer.pod_config(&name, Network::Host);
    let pod = peer.run_pod(config.clone()).await;
    let container =
        peer.create_named(&pod, &config, &options.image, "main", &["/bin/sh", "-c", &command]).await;
    let begun = Instant::now();
    peer.start(&container).await;
    let log = peer.log_path(&name);
    while !has_ended(&log) {
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(begun.elapsed() < Duration::from_secs(300), "{}: its log does not end", peer.name);
    }
    let seconds = begun.elapsed().as_secs_f64();
    report.add("one container's output, logged (MB/s)", &peer.name, BYTES as f64 / 1e6 / seconds);
    wait_for_end(peer, &container).await;
    super::remove_all(peer, &[pod]).await;
    let _ = std::fs::remove_file(log);
}

/// The last line of the log is the container's last.
fn has_ended(log: &Path) -> bool {
    let tail = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        file.seek(SeekFrom::End(-8))?;
        let mut tail = Vec::new();
        file.read_to_end(&mut tail)?;
        Ok(tail)
    };
    tail().is_ok_and(|tail| tail.starts_with(b"THE-END"))
}

async fn wait_for_end(peer: &Peer, container_id: &str) {
    let exited = ContainerState::ContainerExited as i32;
    loop {
        let request = cri::ContainerStatusRequest { container_id: container_id.to_owned(), verbose: false };
        let answer = peer.answer(peer.runtime.clone().container_status(request).await);
        if answer.status.is_some_and(|status| status.state == exited) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Ten pods share the containers. What it costs is processor time, of everything that is not a container's own.
async fn slow(options: &Options, peer: &Peer, report: &mut Report) {
    const PODS: usize = 10;
    let containers = options.containers.min(300);
    let before = processes::all();
    let mut pods = Vec::new();
    for number in 0..PODS {
        let config = peer.pod_config(&format!("slow-{number}"), Network::Host);
        let pod = peer.run_pod(config.clone()).await;
        for container in 0..containers / PODS {
            let command = ["/bin/sh", "-c", "while :; do echo a line of output; usleep 100000; done"];
            let name = format!("c{container}");
            let container = peer.create_named(&pod, &config, &options.image, &name, &command).await;
            peer.start(&container).await;
        }
        pods.push(pod);
    }
    let used = || -> BTreeMap<u32, f64> {
        let mut pids: Vec<u32> = processes::all().difference(&before).copied().collect();
        pids.retain(|pid| processes::of(*pid).is_some_and(|process| process.is_overhead()));
        pids.push(peer.daemon_pid());
        pids.into_iter().map(|pid| (pid, processes::cpu_seconds(pid))).collect()
    };
    let first = used();
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    let cost: f64 = used().iter().map(|(pid, seconds)| seconds - first.get(pid).unwrap_or(&0.0)).sum();
    let share = cost / options.seconds as f64 * 100.0;
    let stage = format!("{} containers, 10 lines/s each (% of a CPU)", containers / PODS * PODS);
    report.add(&stage, &peer.name, share);
    super::remove_all(peer, &pods).await;
}
