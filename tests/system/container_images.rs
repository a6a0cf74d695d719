//! Containers that become images, images that become files, and back again, by the `hull` command.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::registry::Registry;

use crate::cli::Hull;

fn listing(archive: &[u8]) -> Vec<String> {
    let mut tar = Command::new("tar").arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = tar.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(archive).unwrap());
        let output = tar.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    })
}

/// Of the container `maker`, which has made files, changed some and removed one.
fn what_it_changed_is_told_and_all_its_files_come(hull: &Hull) {
    let diff = hull.ok(&["diff", "maker"]);
    let lines: Vec<&str> = diff.lines().collect();
    for line in ["C /etc", "A /etc/made", "D /etc/group", "A /data/a", "A /data/linked"] {
        assert!(lines.contains(&line), "{line} in {diff}");
    }
    // Links whole, mounts left out
    let export = hull.command(&["export", "maker"]).output().unwrap();
    assert!(export.status.success(), "{export:?}");
    let names = listing(&export.stdout);
    for name in ["bin/busybox", "etc/made", "data/linked", "etc/passwd"] {
        assert!(names.iter().any(|listed| listed == name), "{name} in {names:?}");
    }
    assert!(!names.iter().any(|name| name == "etc/group" || name.starts_with("proc/1")), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_becomes_an_image_that_runs_elsewhere() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let here = Daemon::start().await;
    let hull = Hull::of(&here);
    hull.ok(&["pull", &name]);
    let script = "echo made here > /etc/made; rm /etc/group; mkdir -p /data/a; chown 1000:2000 /data/a; \
                  ln /etc/made /data/linked; exec sleep 1000";
    hull.ok(&["run", "-d", "--name", "maker", &name, "sh", "-c", script]);
    hull.ok(&["exec", "maker", "sh", "-c", "until [ -e /data/linked ]; do sleep 0.01; done"]);

    what_it_changed_is_told_and_all_its_files_come(&hull);

    // As an image, with another command, while it runs on
    let made = hull.ok(&[
        "commit",
        "-c",
        "CMD [\"cat\", \"/etc/made\"]",
        "-c",
        "ENV WHO=\"the maker\"",
        "-m",
        "a test",
        "maker",
        "example.com/made:1",
    ]);
    assert!(made.starts_with("sha256:"), "{made}");
    hull.ok(&["exec", "maker", "true"]);
    // Not even for a moment, if that is asked for; by id, and by the beginning of it
    for end in [71, 20] {
        let running = hull.ok(&["commit", "--no-pause", "-m", "running", "maker"]);
        hull.ok(&["rmi", &running.trim()[..end]]);
    }
    let history = hull.ok(&["history", "example.com/made:1"]);
    assert!(history.lines().nth(1).unwrap().ends_with("a test"), "{history}");
    let error = hull.fails(125, &["commit", "-c", "RUN make", "maker"]);
    assert!(error.contains("RUN make") && error.contains("ENTRYPOINT"), "{error}");
    hull.fails(125, &["commit", "maker", "Not/A/Name"]);

    // Into a file, and out of it on another node
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("made.tar");
    let file = file.to_str().unwrap();
    hull.ok(&["save", "-f", file, "example.com/made:1", &name]);
    assert!(hull.fails(125, &["save", "-f", file, "no/such/image"]).contains("no/such/image"));
    assert!(fs::metadata(file).unwrap().len() > 1 << 20, "a save that failed has replaced the file");
    hull.ok(&["rmp", "--all", "--force"]);
    here.finish().await;
    let there = Daemon::start().await;
    let other = Hull::of(&there);
    let loaded = other.ok(&["load", "-i", file]);
    assert_eq!(loaded.lines().count(), 2, "{loaded}");
    assert_eq!(other.json(&["inspect", "example.com/made:1"])["status"]["id"], made.trim());
    assert_eq!(other.ok(&["run", "--rm", "example.com/made:1"]), "made here\n");
    let inside = "echo $WHO; stat -c '%u:%g' /data/a; ls /etc/group; stat -c %h /etc/made";
    let said = other.run(&["run", "--rm", "example.com/made:1", "sh", "-c", inside]);
    assert_eq!(said.out, "the maker\n1000:2000\n2\n", "{said:?}");
    // To a registry, and from there like any other
    let pushed = format!("{}/made:1", registry.host());
    let digest = other.ok(&["push", "example.com/made:1", &pushed]);
    assert!(digest.starts_with("sha256:"), "{digest}");
    other.ok(&["rmi", "example.com/made:1"]);
    assert!(other.run(&["inspect", "example.com/made:1"]).code != 0);
    other.ok(&["pull", &pushed]);
    assert_eq!(other.json(&["inspect", &pushed])["status"]["id"], made.trim());
    assert!(other.fails(125, &["push", &pushed, "127.0.0.1:1/x"]).contains("refused"));
    let error = other.fails(125, &["load", "-i", "/etc/passwd"]);
    assert!(error.contains("archive"), "{error}");
    there.finish().await;
}

/// The same of a container whose files only a machine's own kernel reads.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_in_a_machine_becomes_an_image_that_runs_elsewhere() {
    let daemon = Daemon::start().await;
    if !hull_tests::microvm::available(&daemon).await {
        return daemon.finish().await;
    }
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    let script = "echo made here > /etc/made; rm /etc/group; mkdir -p /data/a; chown 1000:2000 /data/a; \
                  ln /etc/made /data/linked; i=0; while true; do echo $i > /counter; i=$((i+1)); done";
    hull.ok(&["run", "-d", "--runtime", "microvm", "--name", "maker", &name, "sh", "-c", script]);
    hull.ok(&["exec", "maker", "sh", "-c", "until [ -e /counter ]; do sleep 0.01; done"]);

    what_it_changed_is_told_and_all_its_files_come(&hull);

    // As an image, which is a process pod's as well, while it runs on
    hull.ok(&["commit", "maker", "made:1"]);
    let before = hull.ok(&["exec", "maker", "cat", "/counter"]);
    let changed = format!("while [ \"$(cat /counter)\" = {} ]; do sleep 0.01; done", before.trim());
    hull.ok(&["exec", "maker", "sh", "-c", &changed]);
    let inside = "cat /etc/made; stat -c '%u:%g' /data/a; ls /etc/group; stat -c %h /etc/made";
    let said = hull.run(&["run", "--rm", "made:1", "sh", "-c", inside]);
    assert_eq!(said.out, "made here\n1000:2000\n2\n", "{said:?}");

    // A machine that ends takes its files along
    hull.ok(&["stopp", "maker"]);
    let error = hull.fails(125, &["commit", "maker"]);
    assert!(error.contains("gone with the pod's machine"), "{error}");
    assert!(hull.ok(&["system", "check"]).contains("all is well"));
    hull.ok(&["rmp", "--all", "--force"]);
    daemon.finish().await;
}

/// A stopped container has its files still, and so has one whose pod was stopped.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_container_can_become_an_image() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    hull.ok(&["run", "-d", "--name", "short", &name, "sh", "-c", "echo kept > /kept"]);
    hull_tests::eventually("the container's end", hull_tests::patience(10), async || {
        hull.ok(&["ps", "-q"]).is_empty().then_some(())
    })
    .await;
    hull.ok(&["stopp", "short"]);
    hull.ok(&["commit", "short", "kept:1"]);
    assert_eq!(hull.ok(&["run", "--rm", "kept:1", "cat", "/kept"]), "kept\n");
    hull.ok(&["rmp", "--all", "--force"]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_disk_and_damage_are_looked_after() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    let id = hull.ok(&["images", "-q"]).trim().to_owned();

    // A second name goes alone, the image with its last one
    hull.ok(&["tag", &name, "mine:2"]);
    assert_eq!(hull.json(&["images"])[0]["repoTags"].as_array().unwrap().len(), 2);
    assert!(hull.fails(125, &["tag", &name, &format!("mine@{id}")]).contains("digest"));
    assert_eq!(hull.ok(&["rmi", "mine:2"]), "docker.io/library/mine:2\n");
    assert_eq!(hull.ok(&["images", "-q"]).trim(), id);

    // What occupies what
    hull.ok(&["run", "-d", "--name", "user", &name, "sleep", "1000"]);
    let df = hull.json(&["system", "df"]);
    assert_eq!(df["layers"].as_array().unwrap().len(), 3);
    assert!(df["layers"][0]["held"].as_bool().unwrap() && df["containers"][0]["running"].as_bool().unwrap());
    assert!(hull.ok(&["system", "df", "-v"]).contains("team/app:1"));
    assert!(
        hull.ok(&["system", "prune", "-a"]).starts_with("0 images removed"),
        "an image in use was pruned"
    );
    hull.ok(&["rmp", "--all", "--force"]);

    // One wrong bit is found, taken out, and pulled again
    assert!(hull.ok(&["system", "check"]).contains("all is well"));
    let layer = fs::read_dir(daemon.root().join("layers")).unwrap().map(|entry| entry.unwrap().path());
    let layer = layer.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let file = fs::File::options().read(true).write(true).open(layer).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 50_000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 50_000).unwrap();
    let said = hull.run(&["system", "check"]);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.out.contains("damaged") && said.out.contains("1 problems"), "{said:?}");
    hull.ok(&["system", "check", "--repair"]);
    assert_eq!(hull.ok(&["images", "-q"]), "");
    hull.ok(&["pull", &name]);
    assert!(hull.ok(&["system", "check"]).contains("all is well"));
    assert!(hull.ok(&["system", "prune", "-a"]).contains("1 images removed"));
    daemon.finish().await;
}

/// A hulld that is killed while a container stands still lets it go on when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_was_paused_by_a_killed_hulld_goes_on() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &image::busybox());
    let mut daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    // Enough files that reading them takes a while.
    let script = "mkdir /many; i=0; while [ $i -lt 3000 ]; do echo $i > /many/$i; i=$((i+1)); done; echo ready; exec sleep 1000";
    hull.ok(&["run", "-d", "--name", "many", &name, "sh", "-c", script]);
    hull_tests::eventually("the files", hull_tests::patience(30), async || {
        hull.ok(&["logs", "many"]).contains("ready").then_some(())
    })
    .await;
    let mut commit = hull.command(&["commit", "many", "many:1"]).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    daemon.kill();
    let _ = commit.wait().unwrap();
    daemon.restart().await;
    assert_eq!(hull.ok(&["exec", "many", "echo", "alive"]), "alive\n");
    assert!(hull.ok(&["system", "check"]).contains("all is well"));
    hull.ok(&["commit", "many", "many:2"]);
    hull.ok(&["rmp", "--all", "--force"]);
    daemon.finish().await;
}
