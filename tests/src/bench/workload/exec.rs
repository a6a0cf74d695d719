use crate::bench::{Options, Peer, Report};

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    let made = super::pod_for_each(options, peers).await;
    for round in 0..=options.rounds {
        for (peer, (_, container)) in peers.iter().zip(&made) {
            tokio::time::sleep(options.spaced).await;
            let running = peer.exec_sync(container, &["/bin/true"]);
            report.timed("ExecSync of true (ms)", &peer.name, running).await;
        }
        if round == 0 {
            report.clear();
        }
    }
    for (peer, (pod, _)) in peers.iter().zip(made) {
        super::remove_all(peer, &[pod]).await;
    }
}
