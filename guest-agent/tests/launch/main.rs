//! Pods and containers on the real kernel, as root, with a directory of busybox for an image.
//!
//! Each test is a process of its own with one thread, as the agent is: namespaces belong to threads, and a process with
//! several cannot clone itself. So this program has its own small harness: it starts itself once for each test.

mod exec;
mod hostile;
mod pod;
mod processes;
mod support;
mod view;
mod volumes;

use std::process::{Command, ExitCode};

type Test = (&'static str, fn());

/// Everything there is, by module.
fn tests() -> Vec<Test> {
    [exec::TESTS, hostile::TESTS, pod::TESTS, processes::TESTS, view::TESTS, volumes::TESTS].concat()
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

fn run((name, _): &Test, show: bool) -> bool {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let program = std::env::current_exe().expect("the path of this program");
    let output = Command::new(program)
        .args(["--inside", name])
        .env("HULL_TEST_SCRATCH", scratch.path())
        .output()
        .expect("this program starts");
    let passed = output.status.success();
    println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
    if !passed || show {
        print!("{}", String::from_utf8_lossy(&output.stdout));
        print!("{}", String::from_utf8_lossy(&output.stderr));
    }
    passed
}
