//! Pods and containers on the real kernel, as root, with a directory of busybox for an image.
//!
//! Each test is a process of its own with one thread, as the agent is: namespaces belong to threads, and a process with
//! several cannot clone itself. So this program has its own small harness: it starts itself once for each test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests, though not marked as such without libtest"
)]

mod exec;
mod hostile;
mod pod;
mod processes;
mod support;
mod user_namespace;
mod view;
mod volumes;

use std::io::{Read, Seek};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

type Test = (&'static str, fn());

/// Everything there is, by module.
fn tests() -> Vec<Test> {
    [
        exec::TESTS,
        hostile::TESTS,
        pod::TESTS,
        processes::TESTS,
        user_namespace::TESTS,
        view::TESTS,
        volumes::TESTS,
    ]
    .concat()
}

#[macro_export]
/// The list of a module's tests, named as they are.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: &[$crate::Test] = &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name] = arguments.as_slice()
        && flag == "--inside"
    {
        let test = tests().into_iter().find(|(each, _)| each == name).expect("a test of this name");
        support::inside(test.1);
        return ExitCode::SUCCESS;
    }
    let listing = arguments.iter().any(|argument| argument == "--list");
    let exact = arguments.iter().any(|argument| argument == "--exact");
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen = |name: &str| {
        let hit =
            |filter: &&String| if exact { name == filter.as_str() } else { name.contains(filter.as_str()) };
        filters.is_empty() || filters.iter().any(hit)
    };
    let all: Vec<Test> = tests().into_iter().filter(|(name, _)| chosen(name)).collect();
    if listing {
        all.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("these tests make namespaces and mounts: run them as root");
        return ExitCode::FAILURE;
    }
    let show = arguments.iter().any(|argument| argument == "--nocapture" || argument == "--show-output");
    let failed = all.iter().filter(|test| !run(test, show)).count();
    println!("\ntest result: {} passed; {failed} failed", all.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Far more than any test needs.
const DEADLINE: Duration = Duration::from_secs(90);

fn run((name, _): &Test, show: bool) -> bool {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let output = tempfile::tempfile().expect("a temporary file");
    let copy = || output.try_clone().expect("a descriptor");
    let program = std::env::current_exe().expect("the path of this program");
    let mut child = Command::new(program)
        .args(["--inside", name])
        .env("HULL_TEST_SCRATCH", scratch.path())
        .stdin(Stdio::null())
        .stdout(copy())
        .stderr(copy())
        .spawn()
        .expect("this program starts");
    let passed = finished(&mut child, Instant::now() + DEADLINE);
    println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    if !passed || show {
        let mut output = output;
        let mut text = Vec::new();
        output.rewind().and_then(|()| output.read_to_end(&mut text)).expect("the output is read");
        print!("{}", String::from_utf8_lossy(&text));
    }
    passed
}

fn finished(child: &mut Child, deadline: Instant) -> bool {
    loop {
        if let Some(status) = child.try_wait().expect("the test is waited for") {
            return status.success();
        }
        if Instant::now() > deadline {
            println!("killed: it took longer than {DEADLINE:?}");
            child.kill().and_then(|()| child.wait()).expect("the test is killed");
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
