//! Measures CRI runtimes side by side: the same client, the same requests, taking turns in one run. See hack/bench.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use hull_tests::bench::{Peer, Report, memory};
use k8s_cri::v1 as cri;

const USAGE: &str = "hull-bench WORKLOAD --image NAME [--rounds N] [--pods N] [--spaced MILLISECONDS] [--json FILE] NAME=SOCKET…

WORKLOAD is start, exec, pull or memory. NAME=SOCKET names a runtime and its unix socket; the first is compared with the
others. Times are milliseconds, memory is KiB.";

struct Options {
    workload: String,
    image: String,
    rounds: usize,
    pods: usize,
    spaced: Duration,
    json: Option<String>,
    peers: Vec<(String, String)>,
}

fn options() -> Option<Options> {
    let mut words = std::env::args().skip(1);
    let workload = words.next()?;
    let mut options = Options {
        workload,
        image: String::new(),
        rounds: 20,
        pods: 30,
        spaced: Duration::ZERO,
        json: None,
        peers: Vec::new(),
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--image" => options.image = words.next()?,
            "--rounds" => options.rounds = words.next()?.parse().ok()?,
            "--pods" => options.pods = words.next()?.parse().ok()?,
            "--spaced" => options.spaced = Duration::from_millis(words.next()?.parse().ok()?),
            "--json" => options.json = Some(words.next()?),
            _ => {
                let (name, socket) = word.split_once('=')?;
                options.peers.push((name.to_owned(), socket.to_owned()));
            }
        }
    }
    (!options.peers.is_empty() && !options.image.is_empty()).then_some(options)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let mut peers = Vec::new();
    for (name, socket) in &options.peers {
        peers.push(Peer::connect(name, socket).await);
    }
    let mut report = Report::new(&options.workload);
    match options.workload.as_str() {
        "start" => start(&options, &mut peers, &mut report).await,
        "exec" => exec(&options, &mut peers, &mut report).await,
        "pull" => pull(&options, &mut peers, &mut report).await,
        "memory" => idle_memory(&options, &mut peers, &mut report).await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    report.print();
    if let Some(path) = &options.json {
        report.write_json(path).expect("the JSON file is written");
    }
    ExitCode::SUCCESS
}

/// Runs `step` and notes how long it took.
async fn timed<T>(report: &mut Report, stage: &str, peer: &str, step: impl Future<Output = T>) -> (T, f64) {
    let started = Instant::now();
    let result = step.await;
    let milliseconds = started.elapsed().as_secs_f64() * 1e3;
    report.add(stage, peer, milliseconds);
    (result, milliseconds)
}

async fn start(options: &Options, peers: &mut [Peer], report: &mut Report) {
    for peer in peers.iter_mut() {
        peer.pull(&options.image).await;
    }
    // The first round warms up and is not counted.
    for round in 0..=options.rounds {
        for peer in peers.iter_mut() {
            tokio::time::sleep(options.spaced).await;
            let mut scratch = Report::new("warm-up");
            let report = if round == 0 { &mut scratch } else { &mut *report };
            let name = peer.name.clone();
            let config = peer.pod_config(&format!("start-{round}"));
            let (pod, sandbox) = timed(report, "RunPodSandbox", &name, peer.run_pod(config.clone())).await;
            let (container, create) =
                timed(report, "CreateContainer", &name, peer.create(&pod, &config, &options.image)).await;
            let ((), started) = timed(report, "StartContainer", &name, peer.start(&container)).await;
            report.add("pod start (the three)", &name, sandbox + create + started);
            let ((), stop_container) =
                timed(report, "StopContainer (0 s)", &name, peer.stop_container(&container)).await;
            let ((), remove_container) =
                timed(report, "RemoveContainer", &name, peer.remove_container(&container)).await;
            let ((), stop) = timed(report, "StopPodSandbox", &name, peer.stop_pod(&pod)).await;
            let ((), remove) = timed(report, "RemovePodSandbox", &name, peer.remove_pod(&pod)).await;
            report.add(
                "pod stop and remove (the four)",
                &name,
                stop_container + remove_container + stop + remove,
            );
        }
    }
}

async fn exec(options: &Options, peers: &mut [Peer], report: &mut Report) {
    let mut containers = Vec::new();
    for peer in peers.iter_mut() {
        peer.pull(&options.image).await;
        let config = peer.pod_config("exec");
        let pod = peer.run_pod(config.clone()).await;
        let container = peer.create(&pod, &config, &options.image).await;
        peer.start(&container).await;
        containers.push((pod, container));
    }
    for round in 0..=options.rounds {
        for (peer, (_, container)) in peers.iter_mut().zip(&containers) {
            tokio::time::sleep(options.spaced).await;
            let started = Instant::now();
            let request = cri::ExecSyncRequest {
                container_id: container.clone(),
                cmd: vec!["/bin/true".into()],
                timeout: 60,
            };
            let answer = peer.runtime.exec_sync(request).await.expect("ExecSync").into_inner();
            assert_eq!(answer.exit_code, 0);
            if round > 0 {
                report.add("ExecSync true", &peer.name, started.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    for (peer, (pod, _)) in peers.iter_mut().zip(&containers) {
        peer.stop_pod(pod).await;
        peer.remove_pod(pod).await;
    }
}

async fn pull(options: &Options, peers: &mut [Peer], report: &mut Report) {
    for _ in 0..options.rounds {
        for peer in peers.iter_mut() {
            peer.remove_image(&options.image).await;
            let name = peer.name.clone();
            timed(report, "PullImage", &name, peer.pull(&options.image)).await;
            peer.remove_image(&options.image).await;
        }
    }
}

async fn idle_memory(options: &Options, peers: &mut [Peer], report: &mut Report) {
    for peer in peers.iter_mut() {
        peer.pull(&options.image).await;
        let before = memory::processes();
        let mut pods = Vec::new();
        for number in 0..options.pods {
            let config = peer.pod_config(&format!("idle-{number}"));
            let pod = peer.run_pod(config.clone()).await;
            let container = peer.create(&pod, &config, &options.image).await;
            peer.start(&container).await;
            pods.push(pod);
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        let overhead: Vec<_> =
            memory::processes().difference(&before).filter_map(|pid| memory::of(*pid)).collect();
        let overhead: Vec<_> = overhead.into_iter().filter(|process| process.command != "sleep").collect();
        let pods_count = options.pods as f64;
        let sum =
            |pick: fn(&memory::Process) -> u64| overhead.iter().map(pick).sum::<u64>() as f64 / pods_count;
        report.add("each pod, private", &peer.name, sum(|process| process.private));
        report.add("each pod, proportional", &peer.name, sum(|process| process.proportional));
        report.add("each pod, resident", &peer.name, sum(|process| process.resident));
        report.add("each pod, processes", &peer.name, overhead.len() as f64 / pods_count);
        if let Some(daemon) = memory::of(peer.daemon_pid()) {
            report.add("daemon, resident", &peer.name, daemon.resident as f64);
        }
        for pod in &pods {
            peer.stop_pod(pod).await;
            peer.remove_pod(pod).await;
        }
    }
}
