//! What a start costs, counted: promises of docs/SPECIFICATION.md that depend on no clock. The bounds are a little above
//! what was counted when they were written; whoever exceeds one has made starts dearer, and says why when raising it.

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::microvm;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use hull_tests::strace::{Effort, Strace, children};
use k8s_cri::v1::PodSandboxConfig;

/// Pods over which is averaged.
const PODS: usize = 4;

/// Agents that hulld starts in advance (`cri/src/sandbox/prepared.rs`).
const PREPARED: usize = 4;

/// What may be done for one pod.
struct Bound {
    calls: usize,
    processes: usize,
    programs: usize,
    written: u64,
}

fn check(what: &str, effort: &Effort, bound: &Bound) {
    let each = |count: usize| count.div_ceil(PODS);
    println!(
        "{what}: {} calls, {} processes, {} programs, {} mounts, {} bytes written",
        each(effort.calls),
        each(effort.processes),
        each(effort.programs),
        each(effort.mounts),
        effort.written / PODS as u64
    );
    assert_eq!(effort.syncs, 0, "{what} waits for the disk");
    assert!(each(effort.calls) <= bound.calls, "{what}: {} calls: {:?}", each(effort.calls), effort.by_name);
    assert!(each(effort.processes) <= bound.processes, "{what}: {} processes", each(effort.processes));
    assert!(each(effort.programs) <= bound.programs, "{what}: {} programs", each(effort.programs));
    let written = effort.written / PODS as u64;
    assert!(written <= bound.written, "{what} writes {written} bytes");
}

async fn life(
    daemon: &Daemon,
    image: &str,
    name: &str,
    config: fn(&Daemon, &str) -> PodSandboxConfig,
) -> [Effort; 3] {
    let sleep = |name: &str| container_config(name, image, &["/bin/sleep", "1000"]);
    // What is done once: layers are mounted, profiles compiled.
    let mut warm = Pod::run(daemon, config(daemon, &format!("{name}-warm"))).await;
    let container = warm.start(sleep("main")).await;
    warm.exec(&container, &["/bin/true"]).await;

    // Each pod takes one that is there, and has one made in its place.
    let prepared = async || (children(daemon.pid()).len() == PREPARED).then_some(());
    hull_tests::eventually("agents are prepared", hull_tests::patience(20), &prepared).await;
    let mut strace = Strace::attach(daemon.pid(), &daemon.path("")).await;
    let root = daemon.root();
    let mut pods = Vec::new();
    for number in 0..PODS {
        let mut pod = Pod::run(daemon, config(daemon, &format!("{name}-{number}"))).await;
        let container = pod.start(sleep("main")).await;
        pods.push((pod, container));
    }
    // The last one's is of the start, too.
    hull_tests::eventually("agents are prepared again", hull_tests::patience(20), &prepared).await;
    let start = strace.effort(&root).await;
    for (pod, container) in &mut pods {
        assert_eq!(pod.exec(container, &["/bin/true"]).await.exit_code, 0);
    }
    let exec = strace.effort(&root).await;
    for (pod, container) in &mut pods {
        pod.stop_container(container, 0).await;
        pod.remove_container(container).await;
        pod.stop().await;
        pod.remove().await;
    }
    let end = strace.effort(&root).await;
    drop(strace);
    warm.stop().await;
    warm.remove().await;
    [start, exec, end]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_life_takes_no_more_calls_processes_and_bytes_than_promised() {
    if microvm::excepted("what is done for a machine is counted by nobody yet") {
        return;
    }
    let registry = Registry::start();
    let image = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&image).await;

    let [start, exec, end] = life(&daemon, &image, "host", pod_config).await;
    // The agent, the agent again in its cgroup, the container.
    let bound = Bound { calls: 1425, processes: 3, programs: 2, written: 3 << 10 };
    check("a start on the host's network", &start, &bound);
    check("an exec", &exec, &Bound { calls: 230, processes: 1, programs: 1, written: 0 });
    check("an end", &end, &Bound { calls: 430, processes: 0, programs: 0, written: 3 << 10 });

    let [start, _, end] = life(&daemon, &image, "own", networked_pod_config).await;
    let bound = Bound { calls: 1650, processes: 3, programs: 2, written: 3 << 10 };
    check("a start with a network of its own", &start, &bound);
    check("its end", &end, &Bound { calls: 450, processes: 0, programs: 0, written: 4 << 10 });
    the_steps_can_be_asked_for(&daemon);
    daemon.finish().await;
}

fn the_steps_can_be_asked_for(daemon: &Daemon) {
    let mut hull = std::process::Command::new(hull_tests::binaries::program("hull"));
    let output =
        hull.arg("--socket").arg(daemon.socket()).args(["debug", "trace", "start"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for wanted in
        ["RunPodSandbox", "CreateContainer", "StartContainer", "write the record", "- seccomp, execve"]
    {
        assert!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    println!("{text}");
}
