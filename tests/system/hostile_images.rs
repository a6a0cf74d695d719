//! Images made to do harm: each is refused with a clear error or contained, and nothing is written outside.

use std::path::Path;

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Packing};
use hull_tests::liar::{Answer, Liar};
use hull_tests::pod::{Pod, container_config, pod_config};
use k8s_cri::v1 as cri;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread")]
async fn the_corpus_is_refused_or_contained() {
    let corpus = tempfile::tempdir().unwrap();
    let script = hull_tests::binaries::workspace().join("tests/hostile/make.py");
    assert!(
        std::process::Command::new("python3").arg(&script).arg(corpus.path()).status().unwrap().success()
    );
    let liar = Liar::start().await;
    let daemon = Daemon::start().await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "hostile")).await;
    let passwd = std::fs::read("/etc/passwd").unwrap();

    let mut cases: Vec<_> =
        std::fs::read_dir(corpus.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() > 25);
    let mut failures = Vec::new();
    for case in cases {
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        let wanted: Value = serde_json::from_slice(&std::fs::read(case.join("case.json")).unwrap()).unwrap();
        let reference = offer(&liar, &name, &case);
        let before = stored(&daemon);
        let pulled = daemon.try_pull(&reference).await;
        match (wanted["expect"].as_str().unwrap(), pulled) {
            ("refused", Ok(_)) => failures.push(format!("{name}: was pulled")),
            ("refused", Err(error)) => {
                let text = error.message();
                for word in wanted["say"].as_array().unwrap() {
                    if !text.contains(word.as_str().unwrap()) {
                        failures.push(format!("{name}: the error does not say {word}: {text}"));
                    }
                }
                if !text.contains(&name) {
                    failures.push(format!("{name}: the error does not name the image: {text}"));
                }
                if stored(&daemon) != before {
                    failures.push(format!("{name}: left {:?}", stored(&daemon)));
                }
            }
            ("contained", Ok(_)) => failures.extend(contained(&mut pod, &name, &reference).await),
            (_, Err(error)) => failures.push(format!("{name}: should be contained: {error}")),
            (other, _) => failures.push(format!("{name}: unknown expectation {other}")),
        }
    }
    assert!(!Path::new("/tmp/hull-e2e-escaped").exists(), "written outside");
    assert_eq!(std::fs::read("/etc/passwd").unwrap(), passwd);
    assert!(failures.is_empty(), "{failures:#?}");
    daemon.finish().await;
}

/// The container either does not start, or runs and sees its own files and no others.
async fn contained(pod: &mut Pod, name: &str, reference: &str) -> Vec<String> {
    let script = "ls -d /absolute /way /disk 2>/dev/null; cat /proc/1/cmdline; exec sleep 1000";
    let mut config = container_config(name, reference, &["/bin/sh", "-c", script]);
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().capabilities =
        Some(cri::Capability { drop_capabilities: vec!["SYS_ADMIN".into()], ..Default::default() });
    let Ok(id) = pod.create(config).await else { return Vec::new() };
    let request = cri::StartContainerRequest { container_id: id.clone() };
    if pod.client().start_container(request).await.is_err() {
        return Vec::new();
    }
    let mut failures = Vec::new();
    for (what, script) in [
        ("a disk of the host can be read", "head -c 1 /disk || cat /disk | head -c 1"),
        ("the memory of the host can be read", "head -c 1 /mem"),
        ("the host's files are there", "test -e /work || test -e /etc/debian_version"),
        ("the working directory is a descriptor of the host", "test -e ./etc/debian_version"),
    ] {
        let answer = pod.exec(&id, &["/bin/sh", "-c", script]).await;
        if answer.exit_code == 0 && (what.starts_with("the host") || !answer.stdout.is_empty()) {
            failures.push(format!("{name}: {what}"));
        }
    }
    pod.stop_container(&id, 0).await;
    failures
}

fn offer(liar: &Liar, name: &str, case: &Path) -> String {
    for blob in std::fs::read_dir(case.join("blobs")).unwrap() {
        let blob = blob.unwrap();
        let digest = blob.file_name().to_str().unwrap().replacen('-', ":", 1);
        let content = std::fs::read(blob.path()).unwrap();
        liar.answer(
            &format!("/v2/{name}/blobs/{digest}"),
            Answer::Body(content, "application/octet-stream".into()),
        );
    }
    let manifest = std::fs::read(case.join("manifest.json")).unwrap();
    liar.offer_manifest(name, "v1", &manifest, "application/vnd.oci.image.manifest.v1+json");
    format!("{}/{name}:v1", liar.host())
}

/// Names of all layer files and everything temporary below the image root.
fn stored(daemon: &Daemon) -> Vec<String> {
    fn walk(directory: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&path, found);
            } else {
                found.push(path.display().to_string());
            }
        }
    }
    let mut found = Vec::new();
    walk(&daemon.root().join("layers"), &mut found);
    walk(&daemon.root().join("images"), &mut found);
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_end_too_early_or_never_are_refused() {
    let liar = Liar::start().await;
    let daemon = Daemon::start().await;
    let busybox = Image::new(vec![(image::busybox_layer(), Packing::Gzip)], serde_json::json!({}));
    let layer = busybox.blobs().next().unwrap().to_vec();
    let path = |name: &str| format!("/v2/{name}/blobs/{}", image::digest(&layer));
    let empty = stored(&daemon);

    let cut = liar.offer("cut", "v1", &busybox);
    liar.answer(&path("cut"), Answer::Truncated(layer[..layer.len() / 2].to_vec(), layer.len() as u64));
    let error = daemon.try_pull(&cut).await.expect_err("a cut stream");
    assert!(error.message().contains("cut") && error.message().contains(&image::digest(&layer)), "{error}");

    let endless = liar.offer("endless", "v1", &busybox);
    liar.answer(&path("endless"), Answer::Endless(layer.clone()));
    let error = daemon.try_pull(&endless).await.expect_err("an endless stream");
    assert!(error.message().contains("endless"), "{error}");
    assert_eq!(stored(&daemon), empty);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_leaves_nothing_behind() {
    let liar = Liar::start().await;
    // The layers on a filesystem of 4 MiB
    let mut daemon = Daemon::start().await;
    daemon.stop();
    let layers = daemon.root().join("layers");
    std::fs::create_dir_all(&layers).unwrap();
    let mount = |arguments: &[&str]| {
        assert!(std::process::Command::new("mount").args(arguments).status().unwrap().success())
    };
    mount(&["-t", "tmpfs", "-o", "size=4m", "none", layers.to_str().unwrap()]);
    daemon.restart().await;
    let mut noise = vec![0_u8; 16 << 20];
    let mut state = 1_u32;
    for byte in &mut noise {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    let large = Image::new(
        vec![(image::Layer::default().file("noise", 0o644, &noise), Packing::Gzip)],
        serde_json::json!({}),
    );
    let reference = liar.offer("large", "v1", &large);

    let error = daemon.try_pull(&reference).await.expect_err("the disk is full");
    assert!(error.message().contains("No space left"), "{error}");
    let left: Vec<_> = std::fs::read_dir(&layers).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");

    daemon.stop();
    assert!(std::process::Command::new("umount").arg(&layers).status().unwrap().success());
    daemon.restart().await;
    daemon.pull(&reference).await;
    daemon.finish().await;
}
