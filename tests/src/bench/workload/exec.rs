use std::time::Instant;

use crate::bench::{Options, Peer, Report};

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    let made = super::pod_for_each(options, peers).await;
    for (counted, uncounted) in super::turns(options) {
        for (peer, (_, container)) in peers.iter().zip(&made) {
            for round in 0..uncounted + counted {
                tokio::time::sleep(options.spaced).await;
                let begun = Instant::now();
                peer.exec_sync(container, &["/bin/true"]).await;
                if round >= uncounted {
                    report.add("ExecSync of true (ms)", &peer.name, begun.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
    }
    for (peer, (pod, _)) in peers.iter().zip(made) {
        super::remove_all(peer, &[pod]).await;
    }
}
