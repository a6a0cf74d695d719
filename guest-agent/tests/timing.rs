//! Times of the agent's own part of a start and an exec; run by hand with
//! `HULL_AGENT=… cargo test -p hull-agent --test timing -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::time::{Duration, Instant};

use common::Pod;
use hull_agent::protocol::messages::{Exec, request::Call, response::Outcome};

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "prints numbers, promises nothing"]
fn times_of_birth_start_exec_and_end() {
    let (mut births, mut starts, mut execs, mut ends, mut stops) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..10 {
        let begin = Instant::now();
        let mut pod = Pod::new();
        births.push(begin.elapsed());
        for number in 0..5 {
            let id = format!("c{number}");
            let mut spec = pod.container(&id, "");
            spec.process.as_mut().unwrap().args = vec!["/bin/sleep".into(), "1000".into()];
            let begin = Instant::now();
            pod.start(spec);
            starts.push(begin.elapsed());
        }
        for _ in 0..10 {
            let mut process = common::shell("");
            process.args = vec!["/bin/true".into()];
            let call =
                Exec { container_id: "c0".into(), process: Some(process), inherit: true, ..Exec::default() };
            let begin = Instant::now();
            let Outcome::ExecEnded(ended) = pod.client.call(Call::Exec(call), &[]) else { panic!() };
            execs.push(begin.elapsed());
            assert_eq!(ended.exit_code, 0);
        }
        let begin = Instant::now();
        let kill =
            hull_agent::protocol::messages::Signal { container_id: "c1".into(), signal: 9, all: false };
        pod.client.done(Call::Signal(kill), &[]);
        pod.client.exited("c1");
        ends.push(begin.elapsed());
        let begin = Instant::now();
        pod.stop();
        stops.push(begin.elapsed());
    }
    println!("median: birth with its tree {:?}", median(births));
    println!("median: start {:?}, exec of true {:?}", median(starts), median(execs));
    println!("median: kill to event {:?}, stop {:?}", median(ends), median(stops));
}

#[test]
#[ignore = "prints numbers, promises nothing"]
fn throughput_of_the_log() {
    const BYTES: usize = 300_000_000;
    for (name, script) in [
        ("lines of 100 bytes", format!("yes $(seq -s x 1 36) | head -c {BYTES}")),
        ("lines of 2 bytes", format!("yes | head -c {}", BYTES / 10)),
        ("no lines at all", format!("head -c {BYTES} /dev/zero")),
    ] {
        let mut pod = Pod::new();
        let mut spec = pod.container("loud", &script);
        spec.log = None;
        let begin = Instant::now();
        pod.start(spec);
        pod.client.exited("loud");
        let unlogged = begin.elapsed();
        let begin = Instant::now();
        pod.run("logged", &script);
        pod.client.exited("logged");
        println!("{name}: dropped in {unlogged:?}, logged in {:?}", begin.elapsed());
        pod.stop();
    }
}
