//! Images go through other people's tools and come back as they were.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::registry::Registry;
use serde_json::{Value, json};

use crate::cli::Hull;

fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn skopeo(arguments: &[&str]) -> Vec<u8> {
    run("skopeo", &[&["--insecure-policy"], arguments].concat())
}

/// Busybox and two layers, of which the upper one hides what the lower one has.
fn layered() -> Image {
    let lower = Layer::default()
        .directory("data")
        .file("data/hidden", 0o644, b"hidden\n")
        .owned_file("data/kept", 0o4750, 1000, b"kept\n")
        .symlink("data/link", "kept");
    let upper = Layer::default().without("data/hidden").file("data/new", 0o600, b"new\n");
    let layers =
        vec![(image::busybox_layer(), Packing::Gzip), (lower, Packing::Gzip), (upper, Packing::Gzip)];
    Image::new(layers, json!({"Env": ["PATH=/bin"], "Cmd": ["cat", "/data/kept"]}))
}

fn diff_ids(config: &[u8]) -> Value {
    serde_json::from_slice::<Value>(config).unwrap()["rootfs"]["diff_ids"].clone()
}

/// pull → save → skopeo (to a layout, to an archive, to a registry) → load and pull elsewhere → run
#[tokio::test(flavor = "multi_thread")]
async fn skopeo_carries_what_hull_saved_and_pushed() {
    let registry = Registry::start();
    let original = layered();
    let name = registry.push("team/app", "1", &original);
    let here = Daemon::start().await;
    let hull = Hull::of(&here);
    hull.ok(&["pull", &name]);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let saved = path("saved.tar");
    hull.ok(&["save", "-f", &saved, &name]);

    // Written by a container, committed, pushed
    hull.ok(&[
        "run",
        "-d",
        "--name",
        "writer",
        &name,
        "sh",
        "-c",
        "echo made > /made; rm /data/new; exec sleep 1000",
    ]);
    hull.ok(&["exec", "writer", "sh", "-c", "while [ -e /data/new ]; do usleep 10000; done"]);
    let committed = hull.ok(&["commit", "writer", "made:1"]).trim().to_owned();
    let pushed = format!("{}/made:1", registry.host());
    let digest = hull.ok(&["push", "-q", "made:1", &pushed]).trim().to_owned();
    // The same manifest elsewhere, to the byte
    let exact = format!("{}/mirror/app:1", registry.host());
    let kept = hull.ok(&["push", "-q", "--exact", &name, &exact]).trim().to_owned();
    assert_eq!(kept, image::digest(original.manifest()));
    hull.ok(&["rm", "-f", "--all"]);
    here.finish().await;

    let inspected = |source: &str| -> Value {
        serde_json::from_slice(&skopeo(&["inspect", "--tls-verify=false", source])).unwrap()
    };
    assert_eq!(inspected(&format!("docker://{pushed}"))["Digest"], digest.as_str());
    assert_eq!(inspected(&format!("docker://{exact}"))["Digest"], kept.as_str());

    let there = Daemon::start().await;
    let hull = Hull::of(&there);
    // A layout in a directory and an archive of docker's, out of what was saved
    let layout = format!("oci:{}:app", path("layout"));
    skopeo(&["copy", "-q", &format!("oci-archive:{saved}"), &layout]);
    let wanted = diff_ids(&skopeo(&["inspect", "--config", "--raw", &format!("oci-archive:{saved}")]));
    assert_eq!(diff_ids(&skopeo(&["inspect", "--config", "--raw", &layout])), wanted);
    let docker = path("docker.tar");
    skopeo(&[
        "copy",
        "-q",
        &format!("docker-archive:{saved}"),
        &format!("docker-archive:{docker}:carried:1"),
    ]);
    hull.ok(&["load", "-i", &docker]);
    assert_eq!(hull.ok(&["run", "--rm", "carried:1"]), "kept\n");
    // A layout as a file, by standard input
    let tar = Command::new("tar").args(["-C", &path("layout"), "-c", "."]).output().unwrap();
    let loaded = {
        let mut load = hull.command(&["load"]);
        let file = path("layout.tar");
        fs::write(&file, &tar.stdout).unwrap();
        load.stdin(fs::File::open(&file).unwrap()).output().unwrap()
    };
    assert!(loaded.status.success(), "{loaded:?}");
    assert_eq!(hull.json(&["inspect", "carried:1"])["status"]["id"], original.id());
    // What was pushed, by skopeo into a file and by itself
    let copied = path("copied.tar");
    let source = format!("docker://{pushed}");
    skopeo(&["copy", "-q", "--src-tls-verify=false", &source, &format!("oci-archive:{copied}:made:2")]);
    hull.ok(&["load", "-i", &copied]);
    hull.ok(&["pull", &pushed]);
    for image in ["made:2", &pushed] {
        assert_eq!(hull.json(&["inspect", image])["status"]["id"], committed.as_str(), "{image}");
        assert_eq!(hull.ok(&["run", "--rm", image, "sh", "-c", "cat /made; ls /data"]), "made\nkept\nlink\n");
    }
    hull.ok(&["rmp", "--all", "--force"]);
    there.finish().await;
}

/// save → skopeo → umoci unpack → change → umoci repack → load → run: whiteouts, owners, modes and attributes
#[tokio::test(flavor = "multi_thread")]
async fn umoci_unpacks_what_hull_saved_and_hull_loads_what_umoci_packed() {
    let registry = Registry::start();
    let name = registry.push("team/app", "1", &layered());
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    hull.ok(&["pull", &name]);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let saved = path("saved.tar");
    hull.ok(&["save", "-f", &saved, &name]);
    let layout = path("layout");
    skopeo(&["copy", "-q", &format!("oci-archive:{saved}"), &format!("oci:{layout}:app")]);
    let (image, bundle) = (format!("{layout}:app"), path("bundle"));
    run("umoci", &["unpack", "--image", &image, &bundle]);
    let rootfs = Path::new(&bundle).join("rootfs");
    assert_eq!(fs::read_to_string(rootfs.join("data/new")).unwrap(), "new\n");
    assert!(!rootfs.join("data/hidden").exists());
    let kept = fs::metadata(rootfs.join("data/kept")).unwrap();
    assert_eq!((kept.uid(), kept.gid(), kept.mode() & 0o7777), (1000, 1000, 0o4750));
    assert_eq!(fs::read_link(rootfs.join("data/link")).unwrap(), Path::new("kept"));

    // A directory goes and comes back as another, a file goes, one gets an attribute
    fs::remove_file(rootfs.join("data/new")).unwrap();
    fs::remove_dir_all(rootfs.join("home")).unwrap();
    fs::create_dir(rootfs.join("home")).unwrap();
    fs::write(rootfs.join("home/only"), "only\n").unwrap();
    let attribute = fs::File::open(rootfs.join("data/kept")).unwrap();
    rustix::fs::fsetxattr(&attribute, "user.hull", b"seen", rustix::fs::XattrFlags::empty()).unwrap();
    std::os::unix::fs::chown(rootfs.join("home/only"), Some(70_000), Some(7)).unwrap();
    run("umoci", &["repack", "--image", &format!("{layout}:changed"), &bundle]);
    let packed = path("packed.tar");
    skopeo(&["copy", "-q", &format!("oci:{layout}:changed"), &format!("oci-archive:{packed}:packed:1")]);
    hull.ok(&["load", "-i", &packed]);
    let script = "ls /data /home; stat -c '%u:%g' /home/only; stat -c %a /data/kept";
    let said = hull.ok(&["run", "--rm", "packed:1", "sh", "-c", script]);
    assert_eq!(said, "/data:\nkept\nlink\n\n/home:\nonly\n70000:7\n4750\n");
    // The attribute is in the container's files, and in what is made of them
    hull.ok(&["run", "-d", "--name", "files", "packed:1", "sleep", "1000"]);
    let exported = hull.command(&["export", "files"]).output().unwrap();
    assert!(exported.status.success(), "{exported:?}");
    let attribute = b"SCHILY.xattr.user.hull=seen";
    assert!(exported.stdout.windows(attribute.len()).any(|part| part == attribute), "the attribute is lost");
    hull.ok(&["rmp", "--all", "--force"]);
    daemon.finish().await;
}
