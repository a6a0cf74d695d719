//! Execs with a terminal and with input. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;

use common::{Pod, shell};
use hull_agent::protocol::messages::{
    Exec, ExecEnded, ResizeTerminal, error::Code, request::Call, response::Outcome,
};

/// An exec with both ends of the caller: its number, what is typed, what is shown.
fn begin(pod: &mut Pod, script: &str, terminal: bool) -> (u64, PipeWriter, PipeReader) {
    let (stdin, typist) = std::io::pipe().unwrap();
    let (screen, stdout) = std::io::pipe().unwrap();
    let mut process = shell(script);
    if terminal {
        (process.terminal, process.terminal_rows, process.terminal_columns) = (true, 24, 80);
    }
    let call = Exec {
        container_id: "target".into(),
        process: Some(process),
        stdin: Some(0),
        stdout: Some(1),
        inherit: true,
        ..Exec::default()
    };
    (pod.client.send(Some(Call::Exec(call)), &[stdin.as_fd(), stdout.as_fd()]), typist, screen)
}

fn ended(pod: &mut Pod, number: u64) -> ExecEnded {
    match pod.client.response(number) {
        Outcome::ExecEnded(ended) => ended,
        other => panic!("{other:?}"),
    }
}

/// Reads until this has been shown.
fn shown(screen: &mut PipeReader, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        let mut bytes = [0; 1024];
        let length = screen.read(&mut bytes).unwrap();
        assert_ne!(length, 0, "{text:?} and then the end, without {wanted:?}");
        text.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
    }
    text
}

#[test]
fn an_exec_reads_its_input_to_the_end() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let (number, mut typist, mut screen) = begin(&mut pod, "cat; exit 3", false);
    typist.write_all(b"one\ntwo").unwrap();
    drop(typist);
    assert_eq!(ended(&mut pod, number).exit_code, 3);
    let mut text = String::new();
    screen.read_to_string(&mut text).unwrap();
    assert_eq!(text, "one\ntwo");
    pod.stop();
}

#[test]
fn an_exec_with_a_terminal_is_interactive_and_can_be_resized() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let script = "tty; stty size; read word; echo got $word; trap 'stty size' WINCH; echo ready; \
                  while :; do read line; test \"$line\" = quit && exit 6; done";
    let (number, mut typist, mut screen) = begin(&mut pod, script, true);
    let text = shown(&mut screen, "24 80");
    assert!(text.contains("/dev/pts/0"), "{text:?}");
    typist.write_all(b"hello\n").unwrap();
    let text = shown(&mut screen, "ready");
    assert!(text.contains("got hello"), "{text:?}");
    let resize = |rows, exec_request| {
        Call::ResizeTerminal(ResizeTerminal {
            container_id: "target".into(),
            rows,
            columns: 132,
            exec_request,
        })
    };
    pod.client.done(resize(50, number), &[]);
    // The container itself has no terminal, and no other exec has one either.
    for other in [0, number + 1000] {
        assert_eq!(pod.client.error(resize(50, other), &[]).code(), Code::FailedPrecondition);
    }
    assert_eq!(pod.client.error(resize(70_000, number), &[]).code(), Code::Invalid);
    typist.write_all(b"\n").unwrap();
    shown(&mut screen, "50 132");
    typist.write_all(b"quit\n").unwrap();
    assert_eq!(ended(&mut pod, number).exit_code, 6);
    let mut rest = String::new();
    screen.read_to_string(&mut rest).unwrap();
    pod.stop();
}

#[test]
fn everything_a_terminal_showed_arrives_although_the_process_has_ended() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let (number, typist, mut screen) = begin(&mut pod, "seq 1 5000", true);
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        screen.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(ended(&mut pod, number).exit_code, 0);
    drop(typist);
    let wanted: String = (1..=5000).map(|number| format!("{number}\r\n")).collect();
    assert_eq!(reader.join().unwrap(), wanted);
    pod.stop();
}

#[test]
fn a_caller_that_goes_away_does_not_hold_up_what_it_started() {
    let mut pod = Pod::new();
    pod.run("target", "sleep 1000");
    let (number, typist, screen) = begin(&mut pod, "seq 1 50000; touch /tmp/done", true);
    drop((typist, screen));
    assert_eq!(ended(&mut pod, number).exit_code, 0);
    assert_eq!(pod.exec("target", "test -e /tmp/done", 0).0.exit_code, 0);
    pod.stop();
}
