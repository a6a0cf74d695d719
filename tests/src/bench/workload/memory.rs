use std::time::Duration;

use crate::bench::processes::{self, Process};
use crate::bench::{Network, Options, Peer, Report};

/// What a runtime does after a start is over by then.
const SETTLED: Duration = Duration::from_secs(3);

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    for peer in peers {
        let before = processes::all();
        let mut pods = Vec::new();
        for number in 0..options.pods {
            let name = format!("idle-{number}");
            pods.push(peer.pod_with_container(&name, Network::Host, &options.image).await.0);
        }
        tokio::time::sleep(SETTLED).await;
        let new = processes::all();
        let new = new.difference(&before).filter_map(|pid| processes::of(*pid));
        let overhead: Vec<Process> = new.filter(Process::is_overhead).collect();
        let count = options.pods as f64;
        let each = |pick: fn(&Process) -> u64| overhead.iter().map(pick).sum::<u64>() as f64 / count;
        report.add("each pod, private (KiB)", &peer.name, each(|process| process.private));
        report.add("each pod, proportional (KiB)", &peer.name, each(|process| process.proportional));
        report.add("each pod, resident (KiB)", &peer.name, each(|process| process.resident));
        report.add("each pod, processes", &peer.name, overhead.len() as f64 / count);
        if let Some(daemon) = processes::of(peer.daemon_pid()) {
            report.add("daemon, private (MiB)", &peer.name, daemon.private as f64 / 1024.0);
            report.add("daemon, resident (MiB)", &peer.name, daemon.resident as f64 / 1024.0);
        }
        super::remove_all(peer, &pods).await;
    }
}
