use crate::bench::usage::Usage;
use crate::bench::{Options, Peer, Report};

/// Each program belongs to the runtime of the same name, if there is one: the daemon's work counts for it.
pub(super) async fn run(options: &Options, peers: &[Peer], report: &mut Report) {
    for _ in 0..options.rounds {
        for (name, path) in &options.programs {
            script(path, "clean").await;
            let daemon = peers.iter().find(|peer| peer.name == *name).map(Peer::daemon_pid);
            let usage = Usage::begin(options, daemon);
            report.timed("load (ms)", name, script(path, "run")).await;
            usage.end(report, name, true);
            script(path, "clean").await;
        }
    }
}

/// Runs a script of hack/bench; a failure ends the program.
pub(super) async fn script(path: &str, word: &'static str) {
    let mut command = std::process::Command::new(path);
    command.arg(word).stdout(std::process::Stdio::null());
    let status = tokio::task::spawn_blocking(move || command.status()).await.expect("the thread");
    let status = status.unwrap_or_else(|error| panic!("{path}: {error}"));
    assert!(status.success(), "{path} {word}: {status}");
}
