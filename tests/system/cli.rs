//! The `hull` command, end to end, as people and scripts use it.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use serde_json::Value;

/// `hull` on one daemon's socket.
pub(super) struct Hull {
    socket: PathBuf,
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) code: i32,
    pub(super) out: String,
    pub(super) err: String,
}

impl Hull {
    pub(super) fn of(daemon: &Daemon) -> Self {
        Hull { socket: daemon.socket() }
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(hull_tests::binaries::program("hull"));
        command.args(arguments).env("HULL_SOCKET", format!("unix://{}", self.socket.display()));
        command.stdin(Stdio::null());
        command
    }

    pub(super) fn run(&self, arguments: &[&str]) -> Said {
        said(self.command(arguments).output().unwrap())
    }

    /// Runs a command that must succeed, and returns its output.
    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        let said = self.run(arguments);
        assert_eq!(said.code, 0, "hull {arguments:?}: {said:?}");
        said.out
    }

    pub(super) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[&["-o", "json"], arguments].concat())).unwrap()
    }

    /// Runs a command that must fail with this exit status, and returns what it says.
    pub(super) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let said = self.run(arguments);
        assert_eq!(said.code, code, "hull {arguments:?}: {said:?}");
        said.err
    }
}

fn said(output: Output) -> Said {
    Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_listed_and_removed() {
    let registry = Registry::start();
    let busybox = image::busybox();
    let name = registry.push("team/app", "1.2", &busybox);
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);

    // Where there is no terminal, progress is plain lines on standard error, and the id is all of standard output
    let pulled = hull.run(&["pull", &name]);
    assert_eq!((pulled.code, pulled.out.trim()), (0, busybox.id().as_str()), "{pulled:?}");
    assert!(!pulled.err.contains('\u{1b}') && !pulled.err.contains('\r'), "{pulled:?}");
    assert!(pulled.err.contains("3 layers"), "{pulled:?}");
    assert_eq!(pulled.err.lines().filter(|line| line.contains(": done, ")).count(), 3, "{pulled:?}");
    let again = hull.run(&["pull", "--quiet", &name]);
    assert_eq!((again.out.trim(), again.err.as_str()), (busybox.id().as_str(), ""));

    // A table for people, everything for programs
    let table = hull.ok(&["images"]);
    let (head, row) = table.split_once('\n').unwrap();
    assert_eq!(head.split_whitespace().collect::<Vec<_>>(), ["REPOSITORY", "TAG", "IMAGE", "ID", "SIZE"]);
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[..2], [name.strip_suffix(":1.2").unwrap(), "1.2"]);
    assert!(busybox.id().contains(cells[2]) && cells[4] == "MiB", "{row}");
    let json = hull.json(&["images"]);
    assert_eq!(
        (json[0]["id"].as_str(), json[0]["repoTags"][0].as_str()),
        (Some(&*busybox.id()), Some(&*name))
    );
    assert_eq!(hull.json(&["inspect", &name])["status"]["id"], *busybox.id());

    // By the beginning of its id it goes, and is gone
    hull.ok(&["rmi", cells[2]]);
    assert_eq!(hull.ok(&["images", "--quiet"]), "");
    let error = hull.fails(125, &["rmi", &name]);
    assert!(error.contains("there is no image") && error.contains("`hull pull`"), "{error}");

    // What cannot be pulled says why and what to look at
    let error = hull.fails(125, &["pull", &format!("{}/team/nosuch", registry.host())]);
    assert!(
        error.contains("team/nosuch:latest") && error.contains("Are the name and the tag right?"),
        "{error}"
    );
    let error = hull.fails(125, &["pull", "127.0.0.1:1/app"]);
    assert!(error.contains("refused") && error.contains("/etc/hull/certs.d"), "{error}");
    assert!(hull.fails(125, &["pull", "Upper"]).contains("lower case"));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_prints_the_output_and_passes_the_exit_status_on() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);

    // Given an image that is not here yet
    let ran = hull.run(&["run", "--rm", &name, "sh", "-c", "cat /greeting; echo oops >&2; exit 7"]);
    assert_eq!((ran.code, ran.out.as_str()), (7, "hello from the top layer\n"), "{ran:?}");
    assert!(ran.err.starts_with("Pulling ") && ran.err.ends_with("\noops\n"), "{ran:?}");

    // What cannot be executed has a shell's exit status, what hull refuses has its own
    let error = hull.fails(127, &["run", "--rm", &name, "nosuch"]);
    assert!(error.contains("\"nosuch\": executable file not found in $PATH"), "{error}");
    assert_eq!(error.matches("cannot start").count(), 1, "said once: {error}");
    hull.fails(127, &["run", "--rm", &name, "/no/such"]);
    hull.fails(126, &["run", "--rm", &name, "/etc/passwd"]);
    assert!(hull.fails(125, &["run", "--rm", "--cap-add", "FLY", &name, "true"]).contains("FLY"));
    assert!(hull.fails(125, &["run", "--rm", "--runtime", "nosuch", &name, "true"]).contains("nosuch"));
    assert!(hull.fails(125, &["run", "-it", &name, "sh"]).contains("-t needs a terminal"));
    hull.fails(2, &["run", "--nosuch", &name]);

    // Flags arrive
    let script = "echo $MODE $FROM_IMAGE; id -u; hostname; pwd; cat /in/file; test -w /in/file || echo ro";
    std::fs::write(daemon.path("file"), "from the host\n").unwrap();
    let volume = format!("{}:/in/file:ro", daemon.path("file").display());
    let flags = [
        "run",
        "--rm",
        "-e",
        "MODE=test",
        "-u",
        "1000:1000",
        "-w",
        "/home/web",
        "--hostname",
        "h",
        "-v",
        &volume,
    ];
    let ran = hull.run(&[&flags[..], &[&name, "sh", "-c", script]].concat());
    assert_eq!(ran.out, "test yes\n1000\nh\n/home/web\nfrom the host\nro\n", "{ran:?}");

    // And of none of them anything is left; without --rm the pod stays, with its log
    assert_eq!(hull.ok(&["pods", "--quiet"]), "");
    assert_eq!(logs_kept(&daemon), 0);
    hull.ok(&["run", "--name", "kept", &name, "echo", "kept"]);
    assert_eq!(hull.ok(&["logs", "kept"]), "kept\n");
    assert!(hull.ok(&["ps", "--all"]).contains("exited (0)"));
    let error = hull.fails(125, &["run", "--name", "kept", &name, "true"]);
    assert!(error.contains("already") && error.contains("hull rm -f kept"), "{error}");
    hull.ok(&["rm", "kept"]);
    assert_eq!((hull.ok(&["pods", "--quiet"]), logs_kept(&daemon)), (String::new(), 0));
    daemon.finish().await;
}

/// Log directories of pods that `hull run` made.
fn logs_kept(daemon: &Daemon) -> usize {
    std::fs::read_dir(daemon.root().join("logs")).map_or(0, Iterator::count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_started_watched_and_stopped() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", "-q", &name]);

    // Given a service that prints a line for each file that appears
    let script = "echo ready; until test -e /go; do usleep 10000; done; echo done; exit 3";
    let id = hull.ok(&["run", "-d", "--name", "web", &name, "sh", "-c", script]);
    let id = id.trim();
    assert_eq!(id.len(), 64);

    // It is listed, with its pod
    let table = hull.ok(&["ps"]);
    let row = table.lines().nth(1).unwrap();
    assert!(row.starts_with(&id[..13]) && row.contains("running") && row.contains(&name), "{table}");
    assert_eq!(hull.ok(&["ps", "-q"]).trim(), id);
    assert_eq!(hull.json(&["ps"])[0]["metadata"]["name"], "web");
    let pods = hull.ok(&["pods"]);
    assert!(pods.contains("web") && pods.contains("ready") && !pods.contains("not ready"), "{pods}");
    assert_eq!(hull.ok(&["ps", "-q", "--pod", "web"]).trim(), id);

    // Commands run in it, with their own exit status
    assert_eq!(hull.ok(&["exec", "web", "cat", "/greeting"]), "hello from the top layer\n");
    let ran = hull.run(&["exec", &id[..6], "sh", "-c", "echo out; echo err >&2; exit 9"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (9, "out\n", "err\n"));
    let error = hull.fails(127, &["exec", "web", "nosuch"]);
    assert_eq!(error.matches("cannot").count(), 1, "said once: {error}");
    hull.fails(126, &["exec", "web", "/etc/passwd"]);
    assert!(hull.fails(125, &["exec", "--time-limit", "1s", "web", "sleep", "9"]).contains("within 1 s"));

    // Its output is followed to its end
    let mut follow = hull.command(&["logs", "-f", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    hull.ok(&["exec", "web", "touch", "/go"]);
    assert_eq!(lines.next().unwrap().unwrap(), "done");
    let ended = Instant::now();
    assert!(lines.next().is_none() && follow.wait().unwrap().success());
    assert!(ended.elapsed() < hull_tests::patience(5), "it ends with the container");
    assert_eq!(hull.ok(&["logs", "-n", "1", "web"]), "done\n");

    // What has ended says so
    assert!(hull.ok(&["ps", "-a"]).contains("exited (3)"));
    assert!(hull.fails(125, &["exec", "web", "true"]).contains("`hull logs web`"));
    let inspected = hull.json(&["inspect", "web"]);
    assert_eq!(
        (inspected["status"]["id"].as_str(), inspected["status"]["exitCode"].as_i64()),
        (Some(id), Some(3))
    );
    assert_eq!(hull.json(&["inspect", "--type", "pod", "web"])["status"]["state"], "SANDBOX_READY");
    hull.ok(&["rm", "web"]);

    // One that runs is stopped before it is removed
    hull.ok(&["run", "-d", "--name", "other", &name, "sleep", "1000"]);
    assert!(hull.fails(125, &["rm", "other"]).contains("`hull stop other`"));
    assert_eq!(hull.ok(&["stop", "-t", "0", "other"]), "other\n");
    assert!(hull.ok(&["ps", "-a"]).contains("exited (137)"));
    assert!(hull.fails(125, &["rmp", "other"]).contains("`hull stopp other`"));
    hull.ok(&["stopp", "other"]);
    assert!(hull.ok(&["pods"]).contains("not ready"));
    hull.ok(&["rmp", "other"]);
    assert_eq!(hull.ok(&["ps", "-aq"]) + &hull.ok(&["pods", "-q"]), "");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_leaves_nothing_behind() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", "-q", &name]);

    let script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do usleep 10000; done";
    let mut run = hull
        .command(&["run", "--rm", "--name", "patient", &name, "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(run.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "bye");
    assert_eq!(run.wait().unwrap().code(), Some(5));
    assert_eq!(hull.ok(&["pods", "-q"]), "");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_one_thing_says_what_to_do() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    daemon.pull(&name).await;

    // Given containers until two of them begin alike; 16 hexadecimal digits are soon used up
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "many")).await;
    let mut ids: Vec<String> = Vec::new();
    let digit = loop {
        let config = container_config(&format!("c{}", ids.len()), &name, &["/bin/true"]);
        let id = pod.create(config).await.unwrap();
        let digit = id[..1].to_owned();
        let alike = ids.iter().any(|other| other.starts_with(&digit));
        ids.push(id);
        if alike {
            break digit;
        }
    };
    let error = hull.fails(125, &["inspect", "--type", "container", &digit]);
    assert!(error.contains("could be any of these containers; give more of the id"), "{error}");
    let alike: Vec<&String> = ids.iter().filter(|id| id.starts_with(&digit)).collect();
    assert!(alike.len() == 2 && alike.iter().all(|id| error.contains(&id[..13])), "{error}");
    assert_eq!(hull.json(&["inspect", &ids[0]])["status"]["id"], *ids[0]);

    // And names that nothing has
    for (command, next) in [
        ("logs", "`hull ps -a`"),
        ("stop", "`hull ps -a`"),
        ("stopp", "`hull pods`"),
        ("inspect", "`hull images`"),
    ] {
        let error = hull.fails(125, &[command, "nosuch"]);
        assert!(
            error.contains("there is no") && error.contains("\"nosuch\"") && error.contains(next),
            "{error}"
        );
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_tells_of_itself_and_its_absence_is_explained() {
    let mut daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    let info = hull.ok(&["info"]);
    assert!(info.contains(&format!("pid {}", daemon.pid())), "{info}");
    assert!(info.contains(&daemon.root().display().to_string()), "{info}");
    assert_eq!(hull.json(&["info"])["pods"], 0);
    let version = runtime_version(&daemon).await;
    assert!(hull.ok(&["version"]).contains(&version));
    assert_eq!(hull.json(&["version"])["server"]["runtimeVersion"], *version);

    // Two ways to be absent
    daemon.kill();
    let error = hull.fails(125, &["ps"]);
    assert!(error.contains("cannot connect to hulld at") && error.contains("Start it again"), "{error}");
    let error = said(hull.command(&["ps"]).env("HULL_SOCKET", "unix:///nonexistent/s").output().unwrap()).err;
    assert!(error.contains("/nonexistent/s") && error.contains("Is hulld running?"), "{error}");
    daemon.restart().await;
    daemon.finish().await;
}

/// The daemon's version, as another client sees it.
async fn runtime_version(daemon: &Daemon) -> String {
    let answer = daemon.runtime().await.version(cri::VersionRequest::default()).await.unwrap();
    answer.into_inner().runtime_version
}

/// Every command has examples, and help fits 80 columns wherever it is read.
#[test]
fn help_fits_a_terminal_and_has_examples() {
    let help = hull_alone(&["--help"]);
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() >= 17, "{help}");
    for arguments in
        std::iter::once(vec!["--help"]).chain(commands.iter().map(|command| vec![command, "--help"]))
    {
        let help = hull_alone(&arguments);
        assert!(help.contains("Examples:\n"), "hull {arguments:?}: {help}");
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "hull {arguments:?}: {line}");
        }
    }
}

#[test]
fn completion_scripts_are_understood_by_their_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let script = hull_alone(&["completion", shell]);
        assert!(script.contains("hull") && script.contains("inspect"), "{shell}: {script}");
        let installed = Command::new(shell).args(["-c", "true"]).output().is_ok();
        assert!(installed || shell != "bash", "bash is missing");
        if installed {
            parses(shell, &script);
        }
    }
}

/// The shell reads the script without running it (`-n`).
fn parses(shell: &str, script: &str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(script.as_bytes()).unwrap();
    let checked = Command::new(shell).arg("-n").arg(file.path()).output().unwrap();
    assert!(checked.status.success() && checked.stderr.is_empty(), "{shell}: {checked:?}");
}

/// Output of a command that needs no daemon.
fn hull_alone(arguments: &[&str]) -> String {
    let output = Command::new(hull_tests::binaries::program("hull"))
        .args(arguments)
        .env_remove("HULL_SOCKET")
        .output()
        .unwrap();
    assert!(output.status.success(), "hull {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// How a script waits: `hull logs -f` and `hull run` end soon after the container.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_run_is_short() {
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["run", "--rm", &name, "true"]);
    let started = Instant::now();
    for _ in 0..5 {
        hull.ok(&["run", "--rm", "--network", "host", &name, "true"]);
    }
    let each = started.elapsed() / 5;
    assert!(each < hull_tests::patience(1), "{each:?}");
    daemon.finish().await;
}
