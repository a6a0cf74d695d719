use std::time::{Duration, Instant};

use k8s_cri::v1 as cri;
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::{Options, Peer, Report};

/// Whoever started the daemons starts them again (hack/bench does): a daemon that does not come back ends the program.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    for peer in peers {
        let mut pods = Vec::new();
        for number in 0..options.pods {
            let name = format!("stay-{number}");
            pods.push(peer.pod_with_container(&name, options.network, &options.image).await.0);
        }
        for _ in 0..options.rounds {
            once(peer, options.pods, report).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        super::remove_all(peer, &pods).await;
    }
}

async fn once(peer: &Peer, pods: usize, report: &mut Report) {
    let old = peer.daemon_pid();
    let begun = Instant::now();
    kill_process(Pid::from_raw(old.cast_signed()).expect("a pid"), Signal::KILL).expect("a daemon to kill");
    let patient = |what: &str| assert!(begun.elapsed() < PATIENCE, "{}: {what}", peer.name);
    while peer.find_daemon().is_none_or(|pid| pid == old) {
        patient("the daemon was killed and does not listen again");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    report.add("killed to listening (ms)", &peer.name, begun.elapsed().as_secs_f64() * 1e3);
    while ready_pods(peer).await < pods {
        patient("not all pods are back");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    report.add("killed to all pods listed (ms)", &peer.name, begun.elapsed().as_secs_f64() * 1e3);
}

async fn ready_pods(peer: &Peer) -> usize {
    let state = Some(cri::PodSandboxStateValue { state: cri::PodSandboxState::SandboxReady as i32 });
    let filter = Some(cri::PodSandboxFilter { state, ..Default::default() });
    // The connection may be one to the daemon that was killed.
    let answer = peer.runtime.clone().list_pod_sandbox(cri::ListPodSandboxRequest { filter }).await;
    answer.map_or(0, |answer| answer.into_inner().items.len())
}
