//! The pod as a whole: PID namespaces, the reaper, sysctls.

use std::fs;
use std::os::fd::AsFd;

use hull_agent::container::{self, PidNamespace};
use hull_sys::process;

use crate::support::{Pod, Wanted, image};

crate::tests!(
    containers_can_share_a_pid_namespace_with_a_reaper,
    the_reaper_is_harmless,
    a_debug_container_joins_its_targets_pid_namespace,
    a_container_can_be_in_the_hosts_pid_namespace,
    sysctls_are_the_pods_own,
    a_bad_sysctl_or_hostname_stops_the_pod,
);

const SLEEP: &str = "echo ready; exec sleep 1000";

fn containers_can_share_a_pid_namespace_with_a_reaper() {
    let image = image("image", |_| ());
    let first = Wanted::script("first", &image, SLEEP);
    let second = Wanted::script(
        "second",
        &image,
        "readlink /proc/self/ns/pid; (sleep 0.05 & ) ; sleep 0.2; ps -o pid,comm,stat | grep -c Z; ps | grep -c 'sleep 1000'; kill -9 1; kill -15 1; echo still",
    );
    let pod = Pod::enter();
    let own = fs::read_link("/proc/thread-self/ns/pid").unwrap();
    let leaf = pod.leaf("reaper");
    let reaper = container::start_reaper(&leaf, None).unwrap();
    let join = || PidNamespace::Join(reaper.pidfd.as_fd());
    let mut running = pod.start_in(&first, join()).unwrap();
    assert_eq!(running.line(), "ready");
    let output = pod.start_in(&second, join()).unwrap().finish();
    assert_eq!(output.code, 0, "{output:?}");
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_ne!(lines[0], own.to_str().unwrap());
    assert_eq!(lines[1], "0", "no zombie is left: {output:?}");
    assert_ne!(lines[2], "0", "the other container is in sight");
    assert_eq!(lines[3], "still", "the reaper does not obey the pod's own processes");
    assert_eq!(
        fs::read_link("/proc/thread-self/ns/pid").unwrap(),
        own,
        "the agent's children are its own again"
    );
    assert_eq!(process::try_wait(reaper.pidfd.as_fd()).unwrap(), None);
    process::pidfd_send_signal(reaper.pidfd.as_fd(), 15).unwrap();
    assert_eq!(running.finish().code, 137, "with it ends everything in the namespace");
    // Only now: the first process of a namespace ends when all others in it have been reaped.
    assert_eq!(process::wait(reaper.pidfd.as_fd()).unwrap().exit_code(), 0);
}

fn the_reaper_is_harmless() {
    let image = image("image", |_| ());
    let script = "ls /proc/1/root/ /proc/1/fd/ 2>&1 | grep -c 'Permission denied'; grep -E 'Cap(Prm|Bnd)|NoNew' /proc/1/status; wc -l < /proc/1/mountinfo";
    let wanted = Wanted::script("one", &image, script);
    let pod = Pod::enter();
    let leaf = pod.leaf("reaper");
    let reaper = container::start_reaper(&leaf, None).unwrap();
    let fds = fs::read_dir(format!("/proc/{}/fd", reaper.pid)).unwrap().count();
    assert_eq!(fds, 0, "no descriptor is left");
    let root = fs::read_dir(format!("/proc/{}/root/", reaper.pid)).unwrap().count();
    assert_eq!(root, 0, "its root is empty");
    let running = pod.start_in(&wanted, PidNamespace::Join(reaper.pidfd.as_fd())).unwrap();
    let output = running.finish();
    let none = "0000000000000000";
    let expected = format!("CapPrm:\t{none}\nCapBnd:\t{none}\nNoNewPrivs:\t1\n");
    assert!(output.stdout.contains(&expected), "{output:?}");
    process::pidfd_send_signal(reaper.pidfd.as_fd(), 9).unwrap();
    process::wait(reaper.pidfd.as_fd()).unwrap();
}

fn a_debug_container_joins_its_targets_pid_namespace() {
    let image = image("image", |_| ());
    let target = Wanted::script("target", &image, "echo mine > /tmp/x; echo ready; exec sleep 1000");
    let debug = Wanted::script(
        "debug",
        &image,
        "tr '\\0' ' ' < /proc/1/cmdline; readlink /proc/self/ns/pid; ls /tmp",
    );
    let pod = Pod::enter();
    let mut running = pod.start(&target).unwrap();
    assert_eq!(running.line(), "ready");
    let namespace = fs::read_link(format!("/proc/{}/ns/pid", running.launched.pid)).unwrap();
    let output = pod.start_in(&debug, PidNamespace::Join(running.launched.pidfd.as_fd())).unwrap().finish();
    let expected = format!("sleep 1000 {}\n", namespace.display());
    assert_eq!(output.stdout, expected, "same processes, another root");
    running.kill();
}

fn a_container_can_be_in_the_hosts_pid_namespace() {
    let image = image("image", |_| ());
    let wanted = Wanted::script("one", &image, "readlink /proc/self/ns/pid; echo $$");
    let pod = Pod::enter();
    let running = pod.start_in(&wanted, PidNamespace::Agent).unwrap();
    let pid = running.launched.pid;
    let own = fs::read_link("/proc/thread-self/ns/pid").unwrap();
    assert_eq!(running.finish().lines(), [own.to_str().unwrap(), &pid.to_string()]);
}

fn sysctls_are_the_pods_own() {
    let before = fs::read_to_string("/proc/sys/kernel/shmmni").unwrap();
    let image = image("image", |_| ());
    let wanted = Wanted::script(
        "one",
        &image,
        "cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start",
    );
    let pod = Pod::enter_with(|spec, _| {
        spec.sysctls.insert("kernel.shmmni".into(), "1234".into());
        spec.sysctls.insert("net/ipv4/ip_unprivileged_port_start".into(), "80".into());
    });
    assert_eq!(pod.run(&wanted).lines(), ["1234", "80"]);
    assert_ne!(before.trim(), "1234");
}

fn a_bad_sysctl_or_hostname_stops_the_pod() {
    use hull_agent::container::Slots;
    use hull_agent::protocol::messages::CreateSandbox;
    use hull_agent::sandbox;
    let slots = Slots::new(&[], &[]);
    let long = CreateSandbox { hostname: "x".repeat(65), ..Default::default() };
    assert!(sandbox::enter(&long, &slots, None).unwrap_err().to_string().contains("hostname"));
    let missing = CreateSandbox { network_namespace: Some(3), ..Default::default() };
    assert!(sandbox::enter(&missing, &slots, None).unwrap_err().to_string().contains("slot 3"));
    sandbox::withdraw(&hull_agent::cgroup::discover().unwrap(), "").unwrap();
    let mut spec = CreateSandbox { new_ipc_namespace: true, ..Default::default() };
    spec.sysctls.insert("kernel.no_such_thing".into(), "1".into());
    let error = sandbox::enter(&spec, &slots, None).unwrap_err().to_string();
    assert!(error.starts_with("cannot set the sysctl kernel.no_such_thing: "), "{error}");
}
