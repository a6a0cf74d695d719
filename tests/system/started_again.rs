//! A container that has ended is started again and finds what it left; and how much that is.

use std::fs;

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use serde_json::Value;

use crate::cli::Hull;
use crate::survival::agent_of;
use crate::torn_records::restart_machine;

/// Counts its runs in its writable layer and ends with that number.
const COUNTER: &str = "echo run >> /runs; n=$(wc -l < /runs); echo this is run $n; exit $n";

async fn ended(hull: &Hull, name: &str) -> Value {
    hull_tests::eventually("the container's end", hull_tests::patience(10), async || {
        let status = hull.json(&["inspect", name])["status"].clone();
        (status["state"] == "CONTAINER_EXITED").then_some(status)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_has_ended_starts_again_with_what_it_wrote() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let mut daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    hull.ok(&["run", "-d", "--name", "counter", &name, "sh", "-c", COUNTER]);
    let first = ended(&hull, "counter").await;
    assert_eq!(first["exitCode"], 1);

    // By itself, and after hulld was killed
    hull.ok(&["start", "counter"]);
    let second = hull_tests::eventually("the second end", hull_tests::patience(10), async || {
        let status = ended(&hull, "counter").await;
        (status["exitCode"] == 2).then_some(status)
    })
    .await;
    let number = |status: &Value, field: &str| status[field].as_i64().unwrap();
    assert!(number(&second, "startedAt") > number(&first, "finishedAt"), "{second} after {first}");
    assert!(number(&second, "finishedAt") > number(&second, "startedAt"));
    assert_eq!(second["createdAt"], first["createdAt"]);
    daemon.kill();
    daemon.restart().await;
    assert_eq!(ended(&hull, "counter").await["exitCode"], 2, "an exit of before is not told again");
    hull.ok(&["start", "counter"]);
    hull_tests::eventually("the third end", hull_tests::patience(10), async || {
        (ended(&hull, "counter").await["exitCode"] == 3).then_some(())
    })
    .await;
    assert_eq!(hull.ok(&["logs", "counter"]), "this is run 1\nthis is run 2\nthis is run 3\n");

    // One that runs is not started, and one that is stopped and started is the same that can be stopped again
    hull.ok(&[
        "run",
        "-d",
        "--name",
        "sleeper",
        &name,
        "sh",
        "-c",
        "trap 'exit 5' TERM; while :; do usleep 10000; done",
    ]);
    assert!(hull.fails(125, &["start", "sleeper"]).contains("Running"));
    for _ in 0..3 {
        hull.ok(&["stop", "sleeper"]);
        assert_eq!(ended(&hull, "sleeper").await["exitCode"], 5);
        hull.ok(&["start", "sleeper"]);
        assert_eq!(hull.ok(&["exec", "sleeper", "echo", "here"]), "here\n");
        let status = hull.json(&["inspect", "sleeper"])["status"].clone();
        assert_eq!(
            (status["finishedAt"].as_i64(), status["exitCode"].as_i64()),
            (Some(0), Some(0)),
            "{status}"
        );
    }
    hull.ok(&["rm", "-f", "--all"]);
    daemon.finish().await;
}

/// The pod of `hull run` is there for its one container; it comes back when that is started.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_starts_again_after_its_pod_has_ended() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let mut daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    hull.ok(&["run", "-d", "--name", "web", &name, "sh", "-c", "echo run >> /runs; exec sleep 1000"]);
    let runs = |count: usize| assert_eq!(hull.ok(&["exec", "web", "cat", "/runs"]), "run\n".repeat(count));
    runs(1);
    hull.ok(&["stopp", "web"]);
    hull.ok(&["start", "web"]);
    runs(2);
    assert!(hull.ok(&["exec", "web", "ip", "addr", "show", "eth0"]).contains("inet 10.241."));

    // Its agent dies: everything in the pod ends, and can be had again
    let pod = hull.json(&["ps", "-a"])[0]["podSandboxId"].as_str().unwrap().to_owned();
    let agent = rustix::process::Pid::from_raw(agent_of(&daemon, &pod).await).unwrap();
    rustix::process::kill_process(agent, rustix::process::Signal::KILL).unwrap();
    assert_eq!(ended(&hull, "web").await["reason"], "AgentLost");
    hull.ok(&["start", "web"]);
    runs(3);

    let agent = agent_of(&daemon, &pod).await;
    restart_machine(&mut daemon, agent).await;
    assert_eq!(ended(&hull, "web").await["reason"], "NodeRebooted");
    hull.ok(&["start", "web"]);
    runs(4);
    daemon.kill();
    daemon.restart().await;
    runs(4);
    hull.ok(&["rm", "-f", "web"]);
    assert!(hull.json(&["pods"]).as_array().unwrap().is_empty());
    daemon.finish().await;
}

/// The same in a machine, where the files are on its own disk: as long as it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_of_a_machine_starts_again_with_what_it_wrote() {
    let mut daemon = Daemon::start().await;
    if !hull_tests::microvm::available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let layers = vec![
        (image::busybox_layer(), Packing::Gzip),
        (
            Layer::default().directory("data").owned_file("data/seed", 0o640, 1000, b"from the image\n"),
            Packing::Plain,
        ),
    ];
    let config = serde_json::json!({"Env": ["PATH=/bin"], "Volumes": {"/data": {}}});
    let name = registry.push("team/app", "1", &Image::new(layers, config));
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    let shared = daemon.path("shared");
    fs::create_dir(&shared).unwrap();
    let volume = format!("{}:/shared", shared.display());
    let counter = format!("cat /data/seed && echo x >> /data/runs && echo x >> /shared/runs && {COUNTER}");
    let run = ["run", "-d", "--runtime", "microvm", "--name", "counter", "-v", &volume, &name, "sh", "-c"];
    hull.ok(&[&run[..], &[&counter]].concat());
    assert_eq!(ended(&hull, "counter").await["exitCode"], 1);
    let first = hull.json(&["inspect", "counter"])["status"].clone();

    for count in 2..=3 {
        hull.ok(&["start", "counter"]);
        let status = hull_tests::eventually("the next end", hull_tests::patience(20), async || {
            let status = ended(&hull, "counter").await;
            (status["exitCode"] == count).then_some(status)
        })
        .await;
        assert!(status["startedAt"].as_i64() > first["finishedAt"].as_i64(), "{status} after {first}");
        // hulld's successor does as well
        daemon.kill();
        daemon.restart().await;
        assert_eq!(ended(&hull, "counter").await["exitCode"], count);
    }
    let line = |run| format!("from the image\nthis is run {run}\n");
    assert_eq!(hull.ok(&["logs", "counter"]), [line(1), line(2), line(3)].concat());
    assert_eq!(fs::read_to_string(shared.join("runs")).unwrap(), "x\nx\nx\n");

    // Its files are the machine's
    hull.ok(&["stopp", "counter"]);
    let error = hull.fails(125, &["start", "counter"]);
    assert!(error.contains("gone with the pod's machine"), "{error}");
    hull.ok(&["rm", "-f", "--all"]);
    daemon.finish().await;
}

/// kubelet starts an attempt once, and makes its pods itself.
#[tokio::test(flavor = "multi_thread")]
async fn cri_starts_a_container_once_and_a_pod_of_others_is_not_brought_back() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, networked_pod_config(&daemon, "theirs")).await;
    let id = pod.start(container_config("main", &name, &["/bin/sh", "-c", COUNTER])).await;
    assert_eq!(pod.ended(&id).await.exit_code, 1);
    let request = cri::StartContainerRequest { container_id: id.clone() };
    let refused = daemon.runtime().await.start_container(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    hull.ok(&["start", &id]);
    hull_tests::eventually("the second end", hull_tests::patience(10), async || {
        (pod.ended(&id).await.exit_code == 2).then_some(())
    })
    .await;
    pod.stop().await;
    let error = hull.fails(125, &["start", &id]);
    assert!(error.contains("pod sandbox") && error.contains("has ended"), "{error}");
    assert_eq!(pod.container(&id).await.exit_code, 2);
    pod.remove().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containers_have_written_is_counted_to_the_block() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    let script = "dd if=/dev/zero of=/big bs=1024 count=3000 2>/dev/null; echo done; exec sleep 1000";
    hull.ok(&["run", "-d", "--name", "writer", &name, "sh", "-c", script]);
    hull_tests::eventually("the file", hull_tests::patience(10), async || {
        hull.ok(&["logs", "writer"]).contains("done").then_some(())
    })
    .await;
    // Delayed allocation: blocks are there once they are written
    rustix::fs::sync();
    let du = |path: &std::path::Path| -> u64 {
        let out = std::process::Command::new("du").args(["-s", "-B1"]).arg(path).output().unwrap();
        String::from_utf8(out.stdout).unwrap().split_whitespace().next().unwrap().parse().unwrap()
    };
    let listed = hull.json(&["ps", "-s"])[0].clone();
    let id = listed["id"].as_str().unwrap();
    let written = listed["writableBytes"].as_u64().unwrap();
    assert_eq!(written, du(&daemon.root().join("containers").join(id)));
    assert!(written >= 3000 << 10);
    let image = hull.json(&["images"])[0].clone();
    assert!(listed["virtualBytes"].as_u64().unwrap() > written + 500_000, "{listed} of {image}");
    let table = hull.ok(&["ps", "-s"]);
    assert!(table.lines().next().unwrap().ends_with("SIZE") && table.contains("MiB (virtual "), "{table}");
    assert!(!hull.ok(&["ps"]).contains("virtual"));

    // The node as a whole
    let df = hull.json(&["system", "df"]);
    let images = du(&daemon.root().join("images")) + du(&daemon.root().join("layers"));
    assert_eq!(df["imagesBytes"].as_u64().unwrap(), images);
    let layers: u64 = df["layers"].as_array().unwrap().iter().map(|one| one["bytes"].as_u64().unwrap()).sum();
    assert_eq!(layers, du_of_files(&daemon.root().join("layers")));
    assert_eq!(df["containers"][0]["writable"].as_u64().unwrap(), written);
    hull.ok(&["rm", "-f", "--all"]);
    daemon.finish().await;
}

/// Bytes of disk blocks of the files in a directory.
fn du_of_files(directory: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fs::read_dir(directory).unwrap();
    files.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}
