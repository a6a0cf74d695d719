use crate::bench::{Options, Peer, Report};

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    let mut number = 0;
    for (counted, uncounted) in super::turns(options) {
        for peer in peers {
            for round in 0..uncounted + counted {
                tokio::time::sleep(options.spaced).await;
                number += 1;
                match round < uncounted {
                    true => one(options, peer, number, &mut Report::new("")).await,
                    false => one(options, peer, number, report).await,
                }
            }
        }
    }
}

async fn one(options: &Options, peer: &Peer, round: usize, report: &mut Report) {
    let name = &peer.name;
    let config = peer.pod_config(&format!("pod-{round}"), options.network);
    let (pod, sandbox) = report.timed("RunPodSandbox (ms)", name, peer.run_pod(config.clone())).await;
    let creating = peer.create(&pod, &config, &options.image);
    let (container, create) = report.timed("CreateContainer (ms)", name, creating).await;
    let ((), start) = report.timed("StartContainer (ms)", name, peer.start(&container)).await;
    report.add("pod start (the three, ms)", name, sandbox + create + start);
    tokio::time::sleep(options.spaced).await;
    let stopping = peer.stop_container(&container);
    let ((), stop) = report.timed("StopContainer, no grace (ms)", name, stopping).await;
    let removing = peer.remove_container(&container);
    let ((), remove) = report.timed("RemoveContainer (ms)", name, removing).await;
    let ((), stop_pod) = report.timed("StopPodSandbox (ms)", name, peer.stop_pod(&pod)).await;
    let ((), remove_pod) = report.timed("RemovePodSandbox (ms)", name, peer.remove_pod(&pod)).await;
    report.add("pod stop and remove (the four, ms)", name, stop + remove + stop_pod + remove_pod);
}
