use crate::bench::{Options, Peer, Report};

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    let mut pods = Vec::new();
    for peer in peers {
        let config = peer.pod_config("containers", options.network);
        pods.push((peer.run_pod(config.clone()).await, config));
    }
    for round in 0..=options.rounds {
        for (peer, (pod, config)) in peers.iter().zip(&pods) {
            tokio::time::sleep(options.spaced).await;
            let (name, image) = (&peer.name, &options.image);
            let title = format!("c{round}");
            let creating = peer.create_named(pod, config, image, &title, &["/bin/sleep", "100000"]);
            let (container, create) = report.timed("CreateContainer (ms)", name, creating).await;
            let ((), start) = report.timed("StartContainer (ms)", name, peer.start(&container)).await;
            let stopping = peer.stop_container(&container);
            let ((), stop) = report.timed("StopContainer, no grace (ms)", name, stopping).await;
            let removing = peer.remove_container(&container);
            let ((), remove) = report.timed("RemoveContainer (ms)", name, removing).await;
            report.add("a container's life (the four, ms)", name, create + start + stop + remove);
        }
        if round == 0 {
            report.clear();
        }
    }
    for (peer, (pod, _)) in peers.iter().zip(pods) {
        super::remove_all(peer, &[pod]).await;
    }
}
