//! Containers from start to end, through the real agent. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Pod, is_alive, shell, until};
use hull_agent::protocol::exit_record;
use hull_agent::protocol::messages::{
    CreateSandbox, Exec, Forget, PidMode, PrepareContainer, Resources, Signal, StartContainer, StopExec,
    UpdateResources, error::Code, event, request::Call, response::Outcome, user,
};

#[test]
fn a_container_runs_prints_and_ends_with_its_exit_code() {
    let mut pod = Pod::new();
    let pid = pod.run("first", "echo out; echo err >&2; printf unfinished; exit 7");
    assert!(pid > 1);
    let record = pod.client.exited("first");
    assert_eq!((record.exit_code, record.oom_killed), (7, false));
    assert!(record.started_at > 0 && record.finished_at >= record.started_at);
    let mut log = pod.log("first.log");
    log.sort();
    let entry = |stream: &str, tag: &str, text: &str| (stream.to_owned(), tag.to_owned(), text.to_owned());
    assert_eq!(
        log,
        [entry("stderr", "F", "err"), entry("stdout", "F", "out"), entry("stdout", "P", "unfinished")]
    );
    // The record was there before the event came.
    let state = File::open(pod.path("state")).unwrap();
    assert_eq!(exit_record::read(state.as_fd(), "first").unwrap(), Some(record.clone()));
    assert_eq!(pod.client.state().containers[0].exit, Some(record));
    pod.client.done(Call::Forget(Forget { container_id: "first".into() }), &[]);
    assert!(pod.client.state().containers.is_empty());
    assert!(exit_record::list(state.as_fd()).unwrap().is_empty());
    pod.stop();
}

#[test]
fn exit_codes_are_0_and_128_plus_the_signal() {
    let mut pod = Pod::new();
    pod.run("zero", "exit 0");
    assert_eq!(pod.client.exited("zero").exit_code, 0);
    pod.run("killed", "sleep 1000");
    let kill = Signal { container_id: "killed".into(), signal: 9, all: false };
    pod.client.done(Call::Signal(kill.clone()), &[]);
    assert_eq!(pod.client.exited("killed").exit_code, 137);
    let error = pod.client.error(Call::Signal(kill), &[]);
    assert_eq!(error.code(), Code::FailedPrecondition);
    pod.run("term", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done");
    until("the trap is set", || !pod.lines("term").is_empty());
    pod.client.done(Call::Signal(Signal { container_id: "term".into(), signal: 15, all: false }), &[]);
    assert_eq!(pod.client.exited("term").exit_code, 3);
    pod.stop();
}

#[test]
fn a_signal_to_all_reaches_every_process_of_the_container() {
    let mut pod = Pod::new();
    pod.run("all", "trap '' TERM; sleep 1000 & sleep 1000 & echo ready; wait; echo over");
    until("it runs", || !pod.lines("all").is_empty());
    until("three processes", || pod.leaf("all").processes().unwrap().len() == 3);
    pod.client.done(Call::Signal(Signal { container_id: "all".into(), signal: 9, all: true }), &[]);
    assert_eq!(pod.client.exited("all").exit_code, 137);
    assert!(pod.leaf("all").processes().unwrap().is_empty());
    pod.stop();
}

#[test]
fn a_failed_start_says_why_and_leaves_nothing() {
    let mut pod = Pod::new();
    let mut spec = pod.container("missing", "");
    spec.process.as_mut().unwrap().args = vec!["/bin/no-such-program".into()];
    let Outcome::Error(error) = pod.try_start(spec) else { panic!() };
    assert_eq!((error.code(), error.errno), (Code::Invalid, 2), "{}", error.message);
    assert!(
        error.message.contains("missing") && error.message.contains("no-such-program"),
        "{}",
        error.message
    );
    assert!(pod.client.state().containers.is_empty());
    let gone = |pod: &Pod| pod.leaf("missing").try_remove().unwrap();
    assert!(gone(&pod));
    // The same id may be tried again.
    fs::remove_dir_all(pod.path("missing-writable")).unwrap();
    pod.run("missing", "exit 0");
    assert_eq!(pod.client.exited("missing").exit_code, 0);
    pod.stop();
}

#[test]
fn state_tells_all_that_a_new_caller_needs() {
    let mut pod = Pod::with(|spec| spec.shared_pid_namespace = true);
    let mut spec = pod.container("web", "sleep 1000");
    let user = spec.process.as_mut().unwrap().user.as_mut().unwrap();
    (user.user, user.supplemental_groups) = (Some(user::User::Name("web".into())), vec![77]);
    let Outcome::ContainerStarted(started) = pod.try_start(spec) else { panic!() };
    let state = pod.client.state();
    assert_eq!((state.agent_pid, state.reaper_pid), (pod.agent_pid, pod.reaper_pid));
    assert_eq!(state.cgroup_created_levels, 1);
    let container = &state.containers[0];
    assert_eq!((container.pid, container.started_at), (started.pid, started.started_at));
    assert_eq!((container.uid, container.gid, &container.groups), (1000, 1000, &started.groups));
    assert!(container.groups.contains(&77));
    pod.stop();
}

#[test]
fn a_sandbox_that_cannot_be_made_says_why_and_the_agent_ends() {
    type Change = fn(&mut CreateSandbox);
    let changes: [(&str, Change); 5] = [
        ("hostname", |spec| spec.hostname = "x".repeat(100)),
        ("sysctl", |spec| spec.sysctls = [("kernel.no_such_thing".to_owned(), "1".to_owned())].into()),
        ("slot 9", |spec| spec.network_namespace = Some(9)),
        ("cgroup", |spec| spec.cgroup_leaf = "../up".into()),
        ("its id", |spec| spec.id = "a/b".into()),
    ];
    for (word, change) in changes {
        let error = common::failed_birth(change);
        assert!(error.message.contains(word), "{}", error.message);
    }
}

/// A waiting agent must not keep the host's mounts busy, which would make their unmounting fail or mean nothing.
#[test]
fn an_agent_that_waits_for_its_pod_holds_no_mount_of_the_host() {
    let meanwhile = |agent| {
        let mounts = || {
            let table = fs::read_to_string(format!("/proc/{agent}/mountinfo")).unwrap();
            let point = |line: &str| line.split(' ').nth(4).unwrap().to_owned();
            table.lines().map(point).filter(|point| point != "/run/hull/cgroup").collect::<Vec<_>>()
        };
        until("it has left the host", || mounts() == ["/", "/proc", "/run/hull/shm"]);
    };
    let mut pod = Pod::of_prepared_agent(meanwhile, |_| {});
    pod.run("main", "cat /etc/passwd /sys/kernel/mm/transparent_hugepage/enabled; mount");
    assert_eq!(pod.client.exited("main").exit_code, 0);
    assert_eq!(pod.lines("main")[0], "root:x:0:0:root:/root:/bin/sh");
    pod.stop();
}

#[test]
fn a_prepared_agent_gives_its_pod_the_namespaces_and_the_shared_memory_that_it_asks_for() {
    let of = |pid: i32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let own = std::process::id() as i32;
    for (new_ipc, new_uts, shm_size) in
        [(true, true, 0), (false, true, 64 << 20), (true, false, 1 << 20), (false, false, 0)]
    {
        let mut pod = Pod::of_prepared_agent(
            |_| {},
            |spec| {
                (spec.new_ipc_namespace, spec.new_uts_namespace, spec.shm_size) =
                    (new_ipc, new_uts, shm_size);
            },
        );
        assert_eq!(of(pod.agent_pid, "ipc") != of(own, "ipc"), new_ipc);
        assert_eq!(of(pod.agent_pid, "uts") != of(own, "uts"), new_uts);
        pod.run("main", "hostname; df -k /dev/shm | tail -n 1");
        assert_eq!(pod.client.exited("main").exit_code, 0);
        let lines = pod.lines("main");
        assert_eq!(lines[0] == "test", new_uts, "{lines:?}");
        let kilobytes = if shm_size == 1 << 20 { " 1024 " } else { " 65536 " };
        assert!(lines[1].contains(kilobytes), "{lines:?}");
        pod.stop();
    }
}

#[test]
fn a_prepared_agent_refuses_a_pod_that_it_has_not_prepared_for() {
    let labelled =
        |spec: &mut CreateSandbox| spec.mount_label = "system_u:object_r:container_file_t:s0".into();
    let error = common::failed_birth_after_preparing(labelled);
    assert!(error.message.contains("another kind"), "{}", error.message);
}

#[test]
fn the_agent_is_counted_in_the_pods_cgroup_and_killed_by_its_own() {
    let pod = Pod::new();
    let memberships = fs::read_to_string(format!("/proc/{}/cgroup", pod.agent_pid)).unwrap();
    for line in memberships.lines() {
        let (controllers, path) = line.split_once(':').unwrap().1.split_once(':').unwrap();
        let own = if controllers.is_empty() { "/agent" } else { "" };
        let is_used = path.starts_with(&pod.cgroup_parent);
        // A v1 hierarchy may be mounted nowhere.
        assert!(is_used || !controllers.is_empty(), "{line}");
        assert!(!is_used || path == format!("{}{own}", pod.cgroup_parent), "{line}");
    }
    // hulld's way if the agent does not answer.
    pod.leaf("agent").kill().unwrap();
    until("it is dead", || !is_alive(pod.agent_pid));
    pod.forget();
}

#[test]
fn the_cgroup_of_a_created_container_is_there_before_it_starts_and_goes_if_it_does_not() {
    let mut pod = Pod::new();
    let prepare = |pod: &mut Pod, id: &str| {
        let call = PrepareContainer { container_id: id.into(), cgroup_leaf: id.into() };
        pod.client.done(Call::PrepareContainer(call), &[]);
    };
    for id in ["starts", "forgotten", "stopped", "fails"] {
        prepare(&mut pod, id);
        prepare(&mut pod, id);
        assert!(pod.leaf(id).clone_fd().is_some() && pod.leaf(id).exists(), "{id}");
    }
    pod.run("starts", "cat /proc/self/cgroup");
    assert_eq!(pod.client.exited("starts").exit_code, 0);
    let forget = |pod: &mut Pod, id: &str| {
        pod.client.done(Call::Forget(Forget { container_id: id.into() }), &[]);
        assert!(!pod.leaf(id).exists(), "{id}");
    };
    forget(&mut pod, "starts");
    forget(&mut pod, "forgotten");
    // A start that is refused before anything of it is made
    let mut spec = pod.container("fails", "");
    spec.process.as_mut().unwrap().args.clear();
    assert!(matches!(pod.try_start(spec), Outcome::Error(_)));
    forget(&mut pod, "fails");
    pod.stop();
}

#[test]
fn bad_requests_are_refused_and_the_agent_goes_on() {
    let mut pod = Pod::new();
    let id = pod.client.send(None, &[]);
    let Outcome::Error(error) = pod.client.response(id) else { panic!() };
    assert_eq!(error.code(), Code::UnknownCall);
    for id in ["", "../up", "a/b", "a\nb", &"x".repeat(200)] {
        let spec = StartContainer { id: id.into(), ..pod.container("x", "") };
        let error = pod.client.error(Call::StartContainer(spec), &[]);
        assert_eq!(error.code(), Code::Invalid, "{}", error.message);
    }
    // A container in the agent's own cgroup could be killed only with it.
    let spec = StartContainer { cgroup_leaf: "agent".into(), ..pod.container("x", "") };
    let Outcome::Error(error) = pod.try_start(spec) else { panic!() };
    assert!(error.message.contains("cgroup"), "{}", error.message);
    let spec = pod.container("x", "");
    let error = pod.client.error(Call::StartContainer(spec), &[]);
    assert!(error.message.contains("slot"), "{}", error.message);
    let kill = Signal { container_id: "x".repeat(1 << 20), signal: 9, all: false };
    let error = pod.client.error(Call::Signal(kill), &[]);
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message.len() < 300, "what it quotes is bounded");
    // Forgetting what is not known is what was asked for.
    pod.client.done(Call::Forget(Forget { container_id: "nobody".into() }), &[]);
    pod.stop();
}

#[test]
fn an_exec_runs_inside_and_its_exit_code_comes_back() {
    let mut pod = Pod::new();
    pod.run("target", "echo inside > /tmp/mark; echo marked; sleep 1000");
    until("it has marked the place", || !pod.lines("target").is_empty());
    let (ended, text) = pod.exec("target", "cat /tmp/mark; echo $GREETING; exit 5", 0);
    assert_eq!((ended.exit_code, ended.timed_out, text.as_str()), (5, false, "inside\nhello\n"));
    let error = pod.client.error(
        Call::Exec(Exec { container_id: "nobody".into(), process: Some(shell("")), ..Exec::default() }),
        &[],
    );
    assert_eq!(error.code(), Code::NotFound);
    pod.stop();
}

#[test]
fn processes_get_no_descriptor_of_the_agent() {
    let mut pod = Pod::new();
    // The shell's own glob opens one more, for the directory.
    pod.run("target", "cd /proc/self/fd; ls /proc/self/fd | tr '\\n' ' '; echo; sleep 1000");
    until("it has printed", || !pod.lines("target").is_empty());
    assert_eq!(pod.lines("target"), ["0 1 2 3 "]);
    assert_eq!(pod.exec("target", "ls /proc/self/fd | tr '\\n' ' '", 0).1, "0 1 2 3 ");
    pod.stop();
}

#[test]
fn an_exec_that_takes_too_long_is_killed_with_what_it_started() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let start = Instant::now();
    // The caller's pipe ends only when the background process is gone too.
    let (ended, text) = pod.exec("target", "echo begun; sleep 500 & sleep 500", 200);
    assert_eq!((ended.exit_code, ended.timed_out, text.as_str()), (137, true, "begun\n"));
    assert!((Duration::from_millis(200)..Duration::from_secs(5)).contains(&start.elapsed()));
    // Whoever was killed stays in the cgroup until it is reaped.
    until("only the container's own process is left", || pod.leaf("target").processes().unwrap().len() == 1);
    pod.stop();
}

#[test]
fn many_execs_at_once_each_get_their_own_answer() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let call = |code: u64| Exec {
        container_id: "target".into(),
        process: Some(shell(&format!("sleep 0.0{}; exit {code}", 9 - code % 10))),
        inherit: true,
        ..Exec::default()
    };
    let numbers: Vec<(u64, u64)> =
        (0..30).map(|code| (code, pod.client.send(Some(Call::Exec(call(code))), &[]))).collect();
    for (code, number) in numbers {
        let Outcome::ExecEnded(ended) = pod.client.response(number) else { panic!() };
        assert_eq!(u64::try_from(ended.exit_code).unwrap(), code);
    }
    pod.stop();
}

/// Asks for a command in the container without waiting for the answer; the request's number.
fn send_exec(pod: &mut Pod, id: &str) -> u64 {
    let process = Some(shell("exit 0"));
    let exec = Exec { container_id: id.into(), process, inherit: true, ..Exec::default() };
    pod.client.send(Some(Call::Exec(exec)), &[])
}

#[test]
fn an_exec_in_a_container_that_has_ended_unnoticed_is_told_that_it_does_not_run() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut pod = Pod::with(|spec| spec.shared_pid_namespace = true);
    let agent = Pid::from_raw(pod.agent_pid).unwrap();
    for (id, mode) in [("own-pids", PidMode::PidContainer), ("pods-pids", PidMode::PidPod)] {
        let mut spec = pod.container(id, "exec sleep 1000");
        spec.pid_mode = mode.into();
        let first = pod.start(spec);
        // A request that waits is looked at before what ended while the agent did nothing.
        kill_process(agent, Signal::STOP).unwrap();
        let request = send_exec(&mut pod, id);
        kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
        until("the container has ended", || !is_alive(first));
        kill_process(agent, Signal::CONT).unwrap();
        let Outcome::Error(error) = pod.client.response(request) else { panic!("{id}: it ran") };
        assert_eq!(error.code(), Code::FailedPrecondition, "{id}: {}", error.message);
        assert!(error.message.ends_with(&format!("container {id} is not running")), "{}", error.message);
        assert_eq!(pod.client.exited(id).exit_code, 137);
    }
    pod.stop();
}

#[test]
fn a_container_that_is_to_join_one_that_has_ended_unnoticed_is_told_so_and_leaves_nothing() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut pod = Pod::new();
    let agent = Pid::from_raw(pod.agent_pid).unwrap();
    let target = pod.run("target", "exec sleep 1000");
    let mut spec = pod.container("debug", "exit 0");
    (spec.pid_mode, spec.pid_target) = (PidMode::PidTarget.into(), "target".into());
    // A request that waits is looked at before what ended while the agent did nothing.
    kill_process(agent, Signal::STOP).unwrap();
    let request = pod.send_spec(spec);
    kill_process(Pid::from_raw(target).unwrap(), Signal::KILL).unwrap();
    until("the target has ended", || !is_alive(target));
    kill_process(agent, Signal::CONT).unwrap();
    let Outcome::Error(error) = pod.client.response(request) else { panic!("it runs") };
    assert_eq!(error.code(), Code::FailedPrecondition, "{}", error.message);
    assert!(error.message.ends_with("container target is not running"), "{}", error.message);
    assert_eq!(pod.client.exited("target").exit_code, 137);
    assert!(!pod.leaf("debug").exists());
    pod.stop();
}

#[test]
fn an_exec_that_meets_its_containers_end_runs_or_is_told_that_the_container_does_not() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut pod = Pod::new();
    for round in 0..20 {
        let id = format!("round-{round}");
        let first = pod.run(&id, "exec sleep 1000");
        let requests: Vec<u64> = (0..8).map(|_| send_exec(&mut pod, &id)).collect();
        for (index, request) in requests.into_iter().enumerate() {
            // The end comes before, between and after the commands, as the round has it.
            if index == round % 4 {
                kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
            }
            match pod.client.response(request) {
                Outcome::ExecEnded(_) => {}
                Outcome::Error(error) => {
                    assert_eq!(error.code(), Code::FailedPrecondition, "{}", error.message);
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(pod.client.exited(&id).exit_code, 137);
        pod.client.done(Call::Forget(Forget { container_id: id }), &[]);
    }
    pod.stop();
}

#[test]
fn what_a_container_leaves_behind_in_a_shared_pid_namespace_does_not_outlive_it() {
    let mut pod = Pod::with(|spec| spec.shared_pid_namespace = true);
    assert!(is_alive(pod.reaper_pid));
    for (id, mode) in [("pod-mode", PidMode::PidPod), ("node-mode", PidMode::PidNode)] {
        let mut spec = pod.container(id, "(while :; do sleep 1000; done) & echo main; exit 4");
        spec.pid_mode = mode.into();
        pod.start(spec);
        assert_eq!(pod.client.exited(id).exit_code, 4);
        until("nothing is left", || pod.leaf(id).processes().unwrap().is_empty());
        assert_eq!(pod.lines(id), ["main"]);
    }
    // One sees the other in the pod's namespace.
    let mut spec = pod.container("one", "exec sleep 999");
    spec.pid_mode = PidMode::PidPod.into();
    pod.start(spec);
    let mut spec = pod.container(
        "two",
        "for i in 1 2 3 4 5; do ps | grep -q 'sleep 99[9]' && exit 0; sleep 0.1; done; exit 1",
    );
    spec.pid_mode = PidMode::PidPod.into();
    pod.start(spec);
    assert_eq!(pod.client.exited("two").exit_code, 0);
    let mut spec = pod.container("debug", "ps | grep -q 'sleep 99[9]'");
    (spec.pid_mode, spec.pid_target) = (PidMode::PidTarget.into(), "one".into());
    pod.start(spec);
    assert_eq!(pod.client.exited("debug").exit_code, 0);
    pod.stop();
}

#[test]
fn an_orphan_of_an_exec_is_reaped() {
    let mut pod = Pod::new();
    let mut spec = pod.container("target", "sleep 1000");
    spec.pid_mode = PidMode::PidNode.into();
    pod.start(spec);
    pod.exec("target", "(sleep 0.1; echo late > /tmp/late) & exit 0", 0);
    until("the orphan ran", || pod.exec("target", "test -s /tmp/late", 0).0.exit_code == 0);
    let children = || {
        let path = format!("/proc/{0}/task/{0}/children", pod.agent_pid);
        fs::read_to_string(path).unwrap().split_whitespace().count()
    };
    until("only the container is a child", || children() == 1);
    pod.stop();
}

#[test]
fn a_container_that_runs_out_of_memory_says_so() {
    let mut pod = Pod::new();
    let mut spec = pod.container("greedy", "exec tail -n 1 /dev/zero");
    spec.resources = Some(Resources { memory_limit: Some(16 << 20), ..Resources::default() });
    pod.start(spec);
    let mut oom_event = false;
    let record = loop {
        match pod.client.event() {
            event::Event::Oom(id) => oom_event = id == "greedy",
            event::Event::Exited(record) => break record,
        }
    };
    assert_eq!((record.exit_code, record.oom_killed), (137, true));
    // The first process's own end may come before the event; a child's kill in a living container must be told.
    let _ = oom_event;
    let mut spec = pod.container("parent", "tail -n 1 /dev/zero; echo survived; sleep 1000");
    spec.resources = Some(Resources { memory_limit: Some(16 << 20), ..Resources::default() });
    pod.start(spec);
    loop {
        match pod.client.event() {
            event::Event::Oom(id) if id == "parent" => break,
            event::Event::Oom(_) => {}
            event::Event::Exited(record) => panic!("{record:?}"),
        }
    }
    pod.stop();
}

#[test]
fn resources_of_a_running_container_change() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let update = |limit| {
        Call::UpdateResources(UpdateResources {
            container_id: "target".into(),
            resources: Some(Resources { memory_limit: Some(limit), ..Resources::default() }),
            ..UpdateResources::default()
        })
    };
    pod.client.done(update(64 << 20), &[]);
    pod.client.done(update(32 << 20), &[]);
    pod.client.done(update(128 << 20), &[]);
    let (_, text) = pod.exec(
        "target",
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null",
        0,
    );
    assert_eq!(text.trim(), (128 << 20).to_string());
    pod.stop();
}

#[test]
fn a_stop_kills_everything_answers_and_leaves_no_cgroup() {
    let mut pod = Pod::with(|spec| spec.shared_pid_namespace = true);
    let first = pod.run("first", "trap '' TERM; while :; do sleep 1000; done");
    let mut spec = pod.container("second", "sleep 1000 & sleep 1000");
    spec.pid_mode = PidMode::PidNode.into();
    let second = pod.start(spec);
    let (reaper, agent) = (pod.reaper_pid, pod.agent_pid);
    let state = File::open(pod.path("state")).unwrap();
    pod.stop();
    for pid in [first, second, reaper, agent] {
        assert!(!is_alive(pid));
    }
    let mut codes: Vec<i32> =
        exit_record::list(state.as_fd()).unwrap().into_iter().map(|record| record.exit_code).collect();
    codes.dedup();
    assert!(codes.is_empty() || codes == [137], "the directory may be gone with the test's own: {codes:?}");
}

/// What reads an exec's output is told of its end when the process closes it, or, if so asked, when the process has ended.
#[test]
fn the_end_of_an_execs_output_comes_when_it_is_asked_for() {
    let mut pod = Pod::new();
    pod.run("main", "sleep 1000");
    for output_at_end in [false, true] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let script =
            "echo said; exec >&- 2>&-; until test -e /tmp/go; do sleep 0.01; done; rm /tmp/go; exit 3";
        let exec = Exec {
            container_id: "main".into(),
            process: Some(shell(script)),
            stdout: Some(0),
            inherit: true,
            output_at_end,
            ..Exec::default()
        };
        let request = pod.client.send(Some(Call::Exec(exec)), &[writer.as_fd()]);
        drop(writer);
        let (sender, ended) = std::sync::mpsc::channel();
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
            sender.send(()).unwrap();
            text
        });
        let patience = Duration::from_millis(if output_at_end { 300 } else { 10_000 });
        assert_eq!(ended.recv_timeout(patience).is_ok(), !output_at_end);
        let (go, _) = pod.exec("main", "> /tmp/go", 0);
        assert_eq!(go.exit_code, 0);
        let Outcome::ExecEnded(end) = pod.client.response(request) else { panic!() };
        assert_eq!(end.exit_code, 3);
        assert_eq!(reading.join().unwrap(), "said\n");
    }
    pod.stop();
}

#[test]
fn a_container_starts_although_somebody_removed_the_cgroup_that_was_made_for_it() {
    let mut pod = Pod::new();
    let call = PrepareContainer { container_id: "main".into(), cgroup_leaf: "main".into() };
    pod.client.done(Call::PrepareContainer(call), &[]);
    pod.leaf("main").remove().unwrap();
    pod.run("main", "exit 5");
    assert_eq!(pod.client.exited("main").exit_code, 5);
    pod.stop();
}

#[test]
fn an_exec_whose_caller_has_gone_can_be_stopped_with_all_it_started() {
    let mut pod = Pod::new();
    pod.run("main", "sleep 1000");
    let process = Some(shell("sleep 1000 & sleep 1000; true"));
    let exec = Exec { container_id: "main".into(), process, inherit: true, ..Exec::default() };
    let request = pod.client.send(Some(Call::Exec(exec)), &[]);
    until("it runs", || pod.leaf("main").processes().unwrap().len() == 4);
    // Another request's number, and another connection, stop nothing.
    pod.client.done(Call::StopExec(StopExec { exec_request: request + 1000 }), &[]);
    pod.connect().done(Call::StopExec(StopExec { exec_request: request }), &[]);
    assert_eq!(pod.leaf("main").processes().unwrap().len(), 4);
    pod.client.done(Call::StopExec(StopExec { exec_request: request }), &[]);
    let Outcome::ExecEnded(ended) = pod.client.response(request) else { panic!() };
    assert_eq!((ended.exit_code, ended.timed_out), (137, false));
    until("only the container's own is left", || pod.leaf("main").processes().unwrap().len() == 1);
    pod.client.done(Call::StopExec(StopExec { exec_request: request }), &[]);
    pod.stop();
}
