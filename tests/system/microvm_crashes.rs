//! What becomes of a machine when something dies at the wrong moment.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::{eventually, patience};
use k8s_cri::v1 as cri;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::microvm_ground::{Ground, Kubelet, machines_of, mount, prints, vmm_of};

async fn not_ready(pod: &mut Pod) {
    eventually("the pod is not ready", patience(20), async || {
        (pod.status().await.state() == cri::PodSandboxState::SandboxNotready).then_some(())
    })
    .await;
}

async fn gone(process: Pid) {
    eventually("it has ended", patience(10), async || test_kill_process(process).is_err().then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_is_killed_midway_ends_as_it_was_asked() {
    let Some(mut ground) = Ground::new().await else { return };
    // A machine that ends while nobody listens, as the stop wants it, and one that does not
    for (name, then) in [("ends", Signal::KILL), ("stays", Signal::CONT)] {
        let mut pod = ground.pod(name).await;
        let running = pod.start(ground.sleeper()).await;
        let ended = container_config("ended", &ground.image, &["/bin/sh", "-c", "exit 5"]);
        let ended = pod.start(ended).await;
        pod.ended(&ended).await;
        let vmm = vmm_of(&ground.daemon, &pod).await;

        // Given a stop that has begun, of a machine that does not answer at the moment
        let before = fs::read(ground.record(&pod.id)).unwrap();
        kill_process(vmm, Signal::STOP).unwrap();
        let (mut client, request) =
            (pod.client(), cri::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() });
        let stopping = tokio::spawn(async move { client.stop_pod_sandbox(request).await });
        eventually("the stop is noted", patience(10), async || {
            (fs::read(ground.record(&pod.id)).unwrap() != before).then_some(())
        })
        .await;
        // When hulld is killed,
        ground.daemon.kill();
        assert!(stopping.await.unwrap().is_err());
        kill_process(vmm, then).unwrap();
        ground.restart(&mut pod).await;

        // Then the stop is ended nevertheless, and its containers ended by that
        not_ready(&mut pod).await;
        gone(vmm).await;
        let status = pod.ended(&running).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"), "{name}: {}", status.message);
        assert_eq!(pod.ended(&ended).await.exit_code, 5);
        pod.stop().await;
        pod.remove().await;
    }
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_server_of_volumes_died_unseen_is_not_taken_up() {
    let Some(mut ground) = Ground::new().await else { return };
    let host = ground.daemon.path("host");
    fs::create_dir(&host).unwrap();
    let mut pod = ground.pod("served").await;
    let mut config = ground.sleeper();
    config.mounts = vec![mount(&host, "/host")];
    let id = pod.start(config).await;
    pod.shell(&id, "echo written > /host/file").await;
    let server = server_of(ground.daemon.cgroup());

    ground.daemon.kill();
    kill_process(server, Signal::KILL).unwrap();
    gone(server).await;
    ground.restart(&mut pod).await;

    not_ready(&mut pod).await;
    let status = pod.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "MachineFault"), "{}", status.message);
    assert!(status.message.contains("hull-virtiofsd"), "{}", status.message);
    assert_eq!(fs::read_to_string(host.join("file")).unwrap(), "written\n");
    pod.stop().await;
    pod.remove().await;
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_falls_silent_is_given_up_and_nobody_elses() {
    let Some(ground) = Ground::new().await else { return };
    let (mut silent, mut other) = (ground.pod("silent").await, ground.pod("other").await);
    let (doomed, safe) = (silent.start(ground.sleeper()).await, other.start(ground.sleeper()).await);
    let vmm = vmm_of(&ground.daemon, &silent).await;

    // Given a guest whose only processor does not go on, while its VMM is well
    let mut held = Held::hold(processor_of(vmm));

    // Then, after the 30 s that a guest may take (more on a busy machine),
    eventually("the pod is not ready", patience(90), async || {
        (silent.status().await.state() == cri::PodSandboxState::SandboxNotready).then_some(())
    })
    .await;
    let status = silent.ended(&doomed).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "GuestSilent"), "{}", status.message);
    held.ends();
    assert_eq!(other.output(&safe, &["echo", "alive"]).await, "alive\n");
    for pod in [&mut silent, &mut other] {
        pod.stop().await;
        pod.remove().await;
    }
    assert_eq!(machines_of(&ground.daemon), Vec::<String>::new());
    ground.daemon.finish().await;
}

/// The thread of the first processor of this VMM's guest.
fn processor_of(vmm: Pid) -> i32 {
    let tasks = fs::read_dir(format!("/proc/{}/task", vmm.as_raw_nonzero())).unwrap().flatten();
    let mut processors =
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "vcpu0\n"));
    processors.next().expect("a vcpu0").file_name().to_str().unwrap().parse().unwrap()
}

/// One thread of another process that is stopped, as a debugger does it, for the rest of its life.
struct Held(Child);

impl Held {
    fn hold(thread: i32) -> Held {
        let program = hull_tests::binaries::workspace().join("tests/clients/hold_thread.py");
        let thread = thread.to_string();
        let mut child =
            Command::new("python3").arg(program).arg(thread).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        Held(child)
    }

    /// Waits until the thread has.
    fn ends(&mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The one hull-virtiofsd below this cgroup.
fn server_of(cgroup: &str) -> Pid {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut servers = processes.filter_map(|entry| {
        let program = fs::read_link(entry.path().join("exe")).ok()?;
        let groups = fs::read_to_string(entry.path().join("cgroup")).ok()?;
        let is_it = program.ends_with("hull-virtiofsd") && groups.contains(cgroup);
        Pid::from_raw(entry.file_name().to_str().filter(|_| is_it)?.parse().ok()?)
    });
    let server = servers.next().expect("a hull-virtiofsd");
    assert!(servers.next().is_none(), "there is more than one");
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_nobody_knows_are_ended_at_the_next_start() {
    let Some(mut ground) = Ground::new().await else { return };
    let (mut forgotten, mut lost, mut known) =
        (ground.pod("forgotten").await, ground.pod("lost").await, ground.pod("known").await);
    let mut machines = Vec::new();
    for pod in [&mut forgotten, &mut lost] {
        pod.start(ground.sleeper()).await;
        machines.push(vmm_of(&ground.daemon, pod).await);
    }
    let id = known.start(ground.sleeper()).await;

    // Given a pod without its record, and one of which the machine's own record alone is left
    ground.daemon.kill();
    for pod in [&forgotten, &lost] {
        fs::remove_file(ground.record(&pod.id)).unwrap();
    }
    fs::remove_dir_all(ground.daemon.path("state/pods").join(&lost.id)).unwrap();
    ground.restart(&mut known).await;

    for vmm in machines {
        gone(vmm).await;
    }
    assert_eq!(machines_of(&ground.daemon), [known.id.clone()]);
    assert_eq!(known.output(&id, &["echo", "here"]).await, "here\n");
    known.stop().await;
    known.remove().await;
    assert_eq!(machines_of(&ground.daemon), Vec::<String>::new());
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_loses_nothing_of_a_machine() {
    let Some(Ground { mut daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
    let kubelet = Kubelet::of(&daemon, "kept");
    let settings = kubelet.volume("configmap", "settings");
    Kubelet::write(&settings, "..one", &[("colour", "red\n")]);
    let mut pod = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "kept")).await;
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); usleep 20000; done; exit 7";
    let mut counting = container_config("counting", &name, &["/bin/sh", "-c", script]);
    counting.mounts = vec![mount(&settings, "/etc/settings")];
    let counting = pod.start(counting).await;
    let staying = pod.start(container_config("staying", &name, &["/bin/sleep", "1000"])).await;
    prints(&pod, "counting", "line 3\n").await;

    daemon.kill();
    Kubelet::write(&settings, "..two", &[("colour", "blue\n")]);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    daemon.restart().await;
    pod.reconnect(&daemon).await;

    assert_eq!(pod.status().await.state, cri::PodSandboxState::SandboxReady as i32);
    assert_eq!(pod.ended(&counting).await.exit_code, 7);
    let expected: String = (0..400).map(|number| format!("line {number}\n")).collect();
    assert_eq!(pod.log("counting"), expected);
    assert_eq!(pod.output(&staying, &["echo", "here"]).await, "here\n");
    let mut again = container_config("again", &name, &["/bin/sleep", "1000"]);
    again.mounts = vec![mount(&settings, "/etc/settings")];
    let again = pod.start(again).await;
    assert_eq!(pod.output(&again, &["cat", "/etc/settings/colour"]).await, "blue\n");
    pod.stop().await;
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_vmm_ends_its_pod_and_no_other() {
    let Some(Ground { mut daemon, image: name, registry: _registry }) = Ground::new().await else {
        return;
    };
    let mut victim = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "victim")).await;
    let mut other = Pod::run_microvm(&daemon, networked_pod_config(&daemon, "other")).await;
    let doomed = victim.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;
    let safe = other.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    rustix::process::kill_process(vmm_of(&daemon, &victim).await, rustix::process::Signal::KILL).unwrap();

    eventually("the pod has ended", patience(2), async || {
        (victim.status().await.state == cri::PodSandboxState::SandboxNotready as i32).then_some(())
    })
    .await;
    let status = victim.ended(&doomed).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "VMMLost"));
    assert_eq!(other.output(&safe, &["echo", "alive"]).await, "alive\n");
    assert_eq!(other.status().await.state, cri::PodSandboxState::SandboxReady as i32);

    // And one that dies while nobody looks is found dead
    let pid = vmm_of(&daemon, &other).await;
    daemon.kill();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    daemon.restart().await;
    other.reconnect(&daemon).await;
    victim.reconnect(&daemon).await;
    assert_eq!(other.ended(&safe).await.exit_code, 255);
    assert_eq!(other.status().await.state, cri::PodSandboxState::SandboxNotready as i32);
    for pod in [&mut victim, &mut other] {
        pod.stop().await;
        pod.remove().await;
    }
    assert_eq!(machines_of(&daemon), Vec::<String>::new());
    daemon.finish().await;
}
