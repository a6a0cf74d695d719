//! `hull exec -it`, `run -it`, `attach`, `port-forward`, `events` and `stats`: at a terminal, and in pipes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config, pod_config};
use hull_tests::registry::Registry;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

fn hull(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(hull_tests::binaries::program("hull"));
    command.args(arguments).env("HULL_SOCKET", format!("unix://{}", daemon.socket().display()));
    command
}

/// hull at a terminal of 33 rows and 77 columns.
struct AtTerminal {
    keys: File,
    shown: Arc<Mutex<String>>,
    process: Child,
}

impl AtTerminal {
    fn start(daemon: &Daemon, arguments: &[&str]) -> Self {
        let primary = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&primary).unwrap();
        unlockpt(&primary).unwrap();
        let name = ptsname(&primary, Vec::new()).unwrap().into_string().unwrap();
        let size = Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&primary, size).unwrap();
        let replica = || {
            let options = std::fs::OpenOptions::new().read(true).write(true).open(&name);
            Stdio::from(options.unwrap())
        };
        let mut command = hull(daemon, arguments);
        let process = command.stdin(replica()).stdout(replica()).stderr(replica()).spawn().unwrap();
        let primary = File::from(primary);
        let mut screen = primary.try_clone().unwrap();
        let shown = Arc::new(Mutex::new(String::new()));
        let screen_text = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = screen.read(&mut buffer) {
                screen_text.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        Self { keys: primary, shown, process }
    }

    fn shows(&self, wanted: &str) {
        let started = Instant::now();
        loop {
            let shown = self.shown.lock().unwrap().clone();
            if shown.contains(wanted) {
                return;
            }
            assert!(started.elapsed() < hull_tests::patience(20), "{wanted:?} is not shown, but {shown:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn types(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    fn ends(&mut self) -> i32 {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            let shown = self.shown.lock().unwrap().clone();
            assert!(started.elapsed() < hull_tests::patience(20), "hull does not end; it shows {shown:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_standard_input_and_a_terminal() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "web")).await;
    pod.start(container_config("main", &name, &["/bin/sleep", "1000"])).await;

    // Through pipes: what goes in comes out, and the exit status is the command's
    let mut child = hull(&daemon, &["exec", "-i", "main", "sh", "-c", "wc -c; echo oops >&2; exit 7"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&vec![b'x'; 3 << 20]).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), (3 << 20).to_string());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "oops\n");

    // At a terminal: it has its size, and keys arrive as they are
    let mut terminal = AtTerminal::start(&daemon, &["exec", "-it", "main", "sh"]);
    terminal.types(b"stty size\n");
    terminal.shows("33 77");
    // Only what is shown says that the shell has left its line editor, for which the key means less; and the trap is set by
    // then, while a command that is just being started could miss the key.
    let waits =
        b"sh -c 'trap \"exit 3\" INT; echo from $((20+1)); while :; do sleep 0.1; done'; echo ended $?\n";
    terminal.types(waits);
    terminal.shows("from 21");
    terminal.types(b"\x03");
    terminal.shows("ended 3");
    terminal.types(b"echo still $((40+2))\n");
    terminal.shows("still 42");
    terminal.types(b"exit 9\n");
    assert_eq!(terminal.ends(), 9);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_run_left_and_come_back_to() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;

    // Nothing of the output is missed, however early it comes
    for round in 0..5 {
        let mut first = AtTerminal::start(
            &daemon,
            &["run", "--rm", "-it", &name, "sh", "-c", "printf prompt:; read x; exit $x"],
        );
        first.shows("prompt:");
        first.types(format!("{}\n", 10 + round).as_bytes());
        assert_eq!(first.ends(), 10 + round);
    }
    // Left by Ctrl-P Ctrl-Q it goes on, and can be come back to
    let mut shell = AtTerminal::start(&daemon, &["run", "--name", "shell", "-it", &name, "sh"]);
    shell.types(b"X=kept\n");
    shell.types(b"echo $X-1\n");
    shell.shows("kept-1");
    shell.types(b"\x10\x11");
    assert_eq!(shell.ends(), 0);
    let mut again = AtTerminal::start(&daemon, &["attach", "shell"]);
    again.types(b"echo $X-2\n");
    again.shows("kept-2");
    again.types(b"exit 5\n");
    assert_eq!(again.ends(), 5);
    assert!(hull(&daemon, &["rm", "-f", "shell"]).status().unwrap().success());

    // Input through a pipe ends the command's
    let mut child = hull(&daemon, &["run", "--rm", "-i", &name, "sh", "-c", "cat; exit 4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"through a pipe\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(4), &b"through a pipe\n"[..]));
    std::fs::remove_dir_all(daemon.root().join("logs")).unwrap();
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded_and_what_happens_is_told() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut events = hull(&daemon, &["-o", "json", "events"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(events.stdout.take().unwrap()).lines();
    std::thread::sleep(Duration::from_millis(500));
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "web")).await;
    let server = ["/bin/nc", "-ll", "-p", "8080", "-e", "/bin/echo", "-n", "answer"];
    pod.start(container_config("main", &name, &server)).await;

    let mut forward = hull(&daemon, &["port-forward", "web", ":8080", ":9999"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(forward.stdout.take().unwrap()).lines();
    let mut address = || lines.next().unwrap().unwrap().split(' ').next().unwrap().to_owned();
    let (open, closed) = (address(), address());
    for _ in 0..3 {
        let answer = hull_tests::eventually("the port answers", hull_tests::patience(10), async || {
            let mut socket = TcpStream::connect(&open).ok()?;
            socket.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            let mut text = String::new();
            socket.read_to_string(&mut text).ok()?;
            (!text.is_empty()).then_some(text)
        })
        .await;
        assert_eq!(answer, "answer");
    }
    let mut nobody = TcpStream::connect(&closed).unwrap();
    assert_eq!(nobody.read(&mut [0; 8]).unwrap_or(0), 0);
    // Attempts before the server listened may have been complained of first.
    let complaints = BufReader::new(forward.stderr.take().unwrap()).lines();
    let mut said = complaints
        .map(Result::unwrap)
        .inspect(|line| assert!(line.contains("8080") || line.contains("9999")));
    assert!(said.any(|line| line.contains("9999")));
    forward.kill().unwrap();
    forward.wait().unwrap();

    let output = hull(&daemon, &["-o", "json", "stats", "--once", "main"]).output().unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(stats[0]["attributes"]["metadata"]["name"], "main");
    let table = hull(&daemon, &["stats", "--once"]).output().unwrap();
    assert!(String::from_utf8_lossy(&table.stdout).contains("main"), "{table:?}");

    pod.stop().await;
    pod.remove().await;
    let mut seen = Vec::new();
    while seen.last() != Some(&("pod".to_owned(), "deleted".to_owned())) {
        let event: serde_json::Value = serde_json::from_str(&told.next().unwrap().unwrap()).unwrap();
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        seen.push((text("kind"), text("event")));
    }
    for wanted in [("pod", "created"), ("container", "started"), ("container", "stopped"), ("pod", "stopped")]
    {
        assert!(seen.contains(&(wanted.0.to_owned(), wanted.1.to_owned())), "{wanted:?} of {seen:?}");
    }
    events.kill().unwrap();
    events.wait().unwrap();
    daemon.finish().await;
}
