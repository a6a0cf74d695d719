use super::load::script;
use crate::bench::usage::Usage;
use crate::bench::{Options, Peer, Report};

pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    for _ in 0..options.rounds {
        for peer in peers {
            peer.remove_image(&options.image).await;
            let usage = Usage::begin(options, Some(peer.daemon_pid()));
            report.timed("PullImage (ms)", &peer.name, peer.pull(&options.image)).await;
            usage.end(report, &peer.name, false);
            peer.remove_image(&options.image).await;
        }
        for (name, path) in &options.programs {
            script(path, "clean").await;
            let usage = Usage::begin(options, None);
            report.timed("PullImage (ms)", name, script(path, "run")).await;
            usage.end(report, name, true);
            script(path, "clean").await;
        }
    }
}
