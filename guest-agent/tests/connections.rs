//! What happens to a pod when its caller goes away, comes back, or misbehaves. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{Client, Pod, is_alive, until};
use hull_agent::protocol::messages::{
    Message, ResizeTerminal, Response, SetLog, State, StateReport, StopSandbox, message::Body, request::Call,
    response::Outcome,
};
use hull_agent::protocol::{encode, exit_record};

/// Replaces the pod's connection by a new one; the old one is closed.
fn reconnect(pod: &mut Pod) {
    let client = pod.connect();
    pod.client = client;
}

#[test]
fn a_caller_that_dies_loses_no_output_and_no_exit_code() {
    let mut pod = Pod::new();
    pod.run("counter", "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.001; done; exit 9");
    let pid = pod.run("stays", "sleep 1000");
    let (gone, _) = UnixStream::pair().unwrap();
    pod.client = Client::new(gone);
    until("it has ended unwatched", || pod.path("state/exit-counter").exists());
    reconnect(&mut pod);
    let state = pod.client.state();
    assert_eq!((state.agent_pid, state.containers.len()), (pod.agent_pid, 2));
    let counter = state.containers.iter().find(|container| container.id == "counter").unwrap();
    assert_eq!(counter.exit.as_ref().unwrap().exit_code, 9);
    let stays = state.containers.iter().find(|container| container.id == "stays").unwrap();
    assert_eq!((stays.pid, &stays.exit), (pid, &None));
    let wanted: Vec<String> = (0..300).map(|i| format!("line {i}")).collect();
    assert_eq!(pod.lines("counter"), wanted);
    // Events go to the newest connection.
    pod.run("later", "exit 1");
    assert_eq!(pod.client.exited("later").exit_code, 1);
    pod.stop();
}

#[test]
fn an_older_connection_still_gets_its_answers_and_the_newest_the_events() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 0.3; exit 2");
    let number = {
        use hull_agent::protocol::messages::Exec;
        let process = Some(common::shell("sleep 0.1; exit 6"));
        let call = Exec { container_id: "target".into(), process, inherit: true, ..Exec::default() };
        pod.client.send(Some(Call::Exec(call)), &[])
    };
    let mut newer = pod.connect();
    newer.state();
    let Outcome::ExecEnded(ended) = pod.client.response(number) else { panic!() };
    assert_eq!(ended.exit_code, 6);
    assert_eq!(newer.exited("target").exit_code, 2);
    pod.stop();
}

#[test]
fn what_a_dead_caller_still_had_queued_starts_nothing_after_its_successor_knows_the_state() {
    let mut pod = Pod::new();
    let agent = rustix::process::Pid::from_raw(pod.agent_pid).unwrap();
    let signal = |signal| rustix::process::kill_process(agent, signal).unwrap();
    // Given starts that wait in the socket of a hulld that is killed, and the question of the one after it
    signal(rustix::process::Signal::STOP);
    for number in 0..8 {
        pod.send_start(&format!("queued-{number}"), "sleep 1000");
    }
    let mut successor = pod.connect();
    let asked = successor.send(Some(Call::State(State {})), &[]);
    let (gone, _) = UnixStream::pair().unwrap();
    pod.client = Client::new(gone);
    signal(rustix::process::Signal::CONT);

    // When it is answered
    let Outcome::State(told) = successor.response(asked) else { panic!() };
    let ids = |state: &StateReport| -> BTreeSet<String> {
        state.containers.iter().map(|container| container.id.clone()).collect()
    };

    // Then nothing starts that it was not told of: each of these questions is another turn of the event loop
    for _ in 0..50 {
        assert_eq!(ids(&successor.state()), ids(&told));
    }
    // And it can start what it finds not started
    pod.client = successor;
    if !ids(&told).contains("queued-7") {
        pod.run("queued-7", "exit 4");
        assert_eq!(pod.client.exited("queued-7").exit_code, 4);
    }
    pod.stop();
}

#[test]
fn a_peer_that_sends_rubbish_loses_its_connection_and_nobody_else() {
    let mut pod = Pod::new();
    let socket = |pod: &Pod| UnixStream::connect(pod.path("socket")).unwrap();
    let response = Message { id: 1, body: Some(Body::Response(Response { outcome: None })) };
    let huge = u32::MAX.to_le_bytes().to_vec();
    let rubbish =
        [vec![5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff], huge, encode(&response).unwrap(), vec![0; 4]];
    for bytes in rubbish {
        let mut bad = socket(&pod);
        bad.write_all(&bytes).unwrap();
        assert!(Client::new(bad).is_closed());
    }
    // Half a frame, and gone.
    socket(&pod).write_all(&[9, 0, 0]).unwrap();
    // More connections than are kept; the newest works.
    let many: Vec<UnixStream> = (0..40).map(|_| socket(&pod)).collect();
    pod.client = Client::new(socket(&pod));
    assert!(!pod.client.state().sandbox_id.is_empty());
    drop(many);
    pod.stop();
}

#[test]
fn a_peer_that_does_not_read_does_not_stop_the_agent() {
    let mut pod = Pod::new();
    let mut deaf = pod.connect();
    let start = Instant::now();
    for _ in 0..2000 {
        deaf.send(Some(Call::State(State {})), &[]);
    }
    // It asked for the state, so what starts comes from a newer one.
    reconnect(&mut pod);
    pod.run("fine", "exit 0");
    until("it has ended", || pod.path("state/exit-fine").exists());
    assert!(start.elapsed() < Duration::from_secs(10));
    drop(deaf);
    pod.stop();
}

#[test]
fn a_rotated_log_neither_loses_nor_doubles_a_line() {
    let mut pod = Pod::new();
    pod.run("writer", "i=0; while [ $i -lt 4000 ]; do echo $i; i=$((i+1)); done");
    let mut names = vec!["writer.log".to_owned()];
    for turn in 1..20 {
        let name = format!("writer.log.{turn}");
        let file = pod.open_log(&name);
        names.push(name);
        pod.client.done(Call::SetLog(SetLog { container_id: "writer".into(), log: 0 }), &[file.as_fd()]);
    }
    assert_eq!(pod.client.exited("writer").exit_code, 0);
    let lines: Vec<String> =
        names.iter().flat_map(|name| pod.log(name)).map(|(_, _, content)| content).collect();
    assert_eq!(lines, (0..4000).map(|i| i.to_string()).collect::<Vec<_>>());
    pod.stop();
}

#[test]
fn much_output_is_logged_exactly_and_the_exit_comes_after_it() {
    let mut pod = Pod::new();
    pod.run("loud", "seq 1 200000; head -c 100000 /dev/zero | tr '\\0' x >&2");
    assert_eq!(pod.client.exited("loud").exit_code, 0);
    let log = pod.log("loud.log");
    let text = |stream: &str| -> String {
        let entries = log.iter().filter(|(name, _, _)| name == stream);
        entries.map(|(_, tag, text)| if tag == "F" { format!("{text}\n") } else { text.clone() }).collect()
    };
    let numbers: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(text("stdout") == numbers);
    assert_eq!(text("stderr"), "x".repeat(100_000));
    pod.stop();
}

#[test]
fn a_full_log_device_does_not_hold_up_the_container() {
    let mut pod = Pod::new();
    pod.run("writer", "sleep 0.2; seq 1 100000; exit 3");
    let full = fs::OpenOptions::new().append(true).open("/dev/full").unwrap();
    pod.client.done(Call::SetLog(SetLog { container_id: "writer".into(), log: 0 }), &[full.as_fd()]);
    assert_eq!(pod.client.exited("writer").exit_code, 3);
    pod.stop();
}

#[test]
fn a_terminal_is_logged_as_stdout_and_can_be_resized() {
    let mut pod = Pod::new();
    let script = "trap 'stty size; exit 0' WINCH; tty; stty size; while :; do sleep 0.05; done";
    let mut spec = pod.container("tty", script);
    let process = spec.process.as_mut().unwrap();
    (process.terminal, process.terminal_rows, process.terminal_columns) = (true, 24, 80);
    pod.start(spec);
    until("it has its size", || pod.lines("tty").len() == 2);
    // The terminal ends lines with a carriage return too, which `lines` takes off.
    assert_eq!(pod.lines("tty"), ["/dev/pts/0", "24 80"]);
    let size = ResizeTerminal { container_id: "tty".into(), rows: 50, columns: 132, exec_request: 0 };
    pod.client.done(Call::ResizeTerminal(size), &[]);
    assert_eq!(pod.client.exited("tty").exit_code, 0);
    assert_eq!(pod.lines("tty")[2].trim_end(), "50 132");
    assert!(pod.log("tty.log").iter().all(|(stream, _, _)| stream == "stdout"));
    pod.stop();
}

#[test]
fn an_agent_whose_pod_has_no_record_any_more_ends_it() {
    let mut pod = Pod::new();
    let pid = pod.run("orphan", "sleep 1000");
    fs::remove_dir_all(pod.path("state")).unwrap();
    // As long as somebody is connected, it waits for orders.
    pod.client.state();
    let (gone, _) = UnixStream::pair().unwrap();
    pod.client = Client::new(gone);
    until("the agent has ended", || !is_alive(pod.agent_pid));
    assert!(!is_alive(pid));
    pod.forget();
}

#[test]
fn two_callers_that_stop_the_pod_both_get_an_answer() {
    let mut pod = Pod::new();
    pod.run("target", "trap '' TERM; sleep 1000");
    let mut second = pod.connect();
    second.state();
    let number = second.send(Some(Call::StopSandbox(StopSandbox {})), &[]);
    let state = fs::File::open(pod.path("state")).unwrap();
    // Whichever comes first, the other is answered or finds the agent gone with the work done.
    second.response(number);
    assert_eq!(exit_record::read(state.as_fd(), "target").unwrap().unwrap().exit_code, 137);
    assert!(second.is_closed());
    pod.forget();
}
