use std::time::Instant;

use crate::bench::{Options, Peer, Report};

/// Rounds of many pods take long, and each has many values.
const MOST_ROUNDS: usize = 5;

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    super::pull_for_all(options, peers).await;
    for round in 0..=options.rounds.min(MOST_ROUNDS) {
        for peer in peers {
            tokio::time::sleep(options.spaced).await;
            at_once(options, peer, round, report).await;
        }
        if round == 0 {
            report.clear();
        }
    }
}

async fn at_once(options: &Options, peer: &Peer, round: usize, report: &mut Report) {
    let begun = Instant::now();
    let starting: Vec<_> = (0..options.parallel)
        .map(|number| {
            let (peer, image, network) = (peer.clone(), options.image.clone(), options.network);
            tokio::spawn(async move {
                let begun = Instant::now();
                let made = peer.pod_with_container(&format!("p-{round}-{number}"), network, &image).await;
                (made, begun.elapsed())
            })
        })
        .collect();
    let mut pods = Vec::new();
    for task in starting {
        let ((pod, _), took) = task.await.expect("a pod that started");
        report.add("start of one pod among them (ms)", &peer.name, took.as_secs_f64() * 1e3);
        pods.push(pod);
    }
    report.add("until all run (ms)", &peer.name, begun.elapsed().as_secs_f64() * 1e3);
    let begun = Instant::now();
    let ending: Vec<_> = pods
        .into_iter()
        .map(|pod| {
            let peer = peer.clone();
            tokio::spawn(async move { super::remove_all(&peer, &[pod]).await })
        })
        .collect();
    for task in ending {
        task.await.expect("a pod that ended");
    }
    report.add("until all are gone (ms)", &peer.name, begun.elapsed().as_secs_f64() * 1e3);
}
