mod container;
mod crowd;
mod exec;
mod load;
mod logs;
mod memory;
mod parallel;
mod pods;
mod pull;
mod restart;
mod stream;

use super::{Options, Peer, Report};

/// Every workload, and what it measures.
pub const WORKLOADS: [(&str, &str); 11] = [
    ("pods", "RunPodSandbox, CreateContainer, StartContainer, and the way back, one pod after the other"),
    ("parallel", "--parallel pods at once: until all run, and until all are gone"),
    ("container", "create, start, stop and remove a container in a pod that stays"),
    ("exec", "ExecSync of `true`"),
    ("stream", "streaming exec of `true` to its end; one byte to `cat` and back"),
    ("memory", "--pods idle pods: memory of what is beside the workload, and of the daemon"),
    ("pull", "PullImage, with processor time and peak memory; --program measures other ways"),
    ("load", "reading an image archive, by --program scripts"),
    ("logs", "one container that prints as fast as it can; --containers that print ten lines a second"),
    ("crowd", "list, status, stats and events with --containers running"),
    ("restart", "the daemon killed with --pods running: until it lists all of them again"),
];

/// Runs the workload; false if there is none of that name.
pub async fn run(options: &Options, peers: &[Peer], report: &mut Report) -> bool {
    match options.workload.as_str() {
        "pods" => pods::run(options, peers, report).await,
        "parallel" => parallel::run(options, peers, report).await,
        "container" => container::run(options, peers, report).await,
        "exec" => exec::run(options, peers, report).await,
        "stream" => stream::run(options, peers, report).await,
        "memory" => memory::run(options, peers, report).await,
        "pull" => pull::run(options, peers, report).await,
        "load" => load::run(options, peers, report).await,
        "logs" => logs::run(options, peers, report).await,
        "crowd" => crowd::run(options, peers, report).await,
        "restart" => restart::run(options, peers, report).await,
        _ => return false,
    }
    true
}

/// Back to back, runtimes take turns of so many measurements. One more before them is not counted: it would measure what
/// the runtime before has left to clear up, and how cold it has left the caches.
const TURN: usize = 5;

/// The turns of `rounds` measurements: how many measurements, and how many before those that are not counted. With a pause
/// before each there is nothing to tell apart, and each is a turn of its own.
fn turns(options: &Options) -> impl Iterator<Item = (usize, usize)> {
    let (most, uncounted) = if options.spaced.is_zero() { (TURN, 1) } else { (1, 0) };
    // The very first is the warm-up of all.
    let warm_up = [(0, 1)].into_iter();
    warm_up.chain(
        (0..options.rounds).step_by(most).map(move |done| (most.min(options.rounds - done), uncounted)),
    )
}

async fn pull_for_all(options: &Options, peers: &[Peer]) {
    for peer in peers {
        peer.pull(&options.image).await;
    }
}

/// A pod with a sleeping container at each runtime.
async fn pod_for_each(options: &Options, peers: &[Peer]) -> Vec<(String, String)> {
    pull_for_all(options, peers).await;
    let mut made = Vec::new();
    for peer in peers {
        made.push(peer.pod_with_container(&options.workload, options.network, &options.image).await);
    }
    made
}

async fn remove_all(peer: &Peer, pods: &[String]) {
    for pod in pods {
        peer.stop_pod(pod).await;
        peer.remove_pod(pod).await;
    }
}
