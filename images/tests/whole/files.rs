//! Images out of files and into files, with the tools that others use.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use hull_images::store::{ImageChange, NewImage};
use hull_images::{Image, Reference};
use serde_json::{Value, json};

use crate::image::{Layer, Packing, TestImage, digest};
use crate::server::Server;
use crate::{TestStore, reference};

fn three_layers() -> TestImage {
    TestImage::new(vec![
        Layer::new(&[("etc/passwd", b"root:x:0:0::/:/bin/sh\n")], Packing::Gzip),
        Layer::new(&[("bin/large", &[9; 70_000])], Packing::Zstd),
        Layer::new(&[("srv/a", b"a")], Packing::Plain),
    ])
}

async fn pulled(test: &TestStore, image: &TestImage) -> String {
    let server = Server::start(&[("team/app:v1", image)], |_| None).await;
    let name = format!("{}/team/app:v1", server.host());
    test.pull(&name).await.unwrap();
    name
}

fn save(test: &TestStore, names: &[&str], to: &Path) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    test.store.save(&names).unwrap().write(File::create(to).unwrap()).unwrap();
}

fn load(test: &TestStore, path: &Path) -> Vec<Image> {
    let mut images = Vec::new();
    test.store.load(File::open(path).unwrap(), |image| images.push(image.clone())).unwrap();
    images
}

fn refused(test: &TestStore, path: &Path) -> String {
    test.store.load(File::open(path).unwrap(), |_| panic!("it was loaded")).unwrap_err().to_string()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_saved_is_the_same_image_elsewhere() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let image = three_layers();
    let name = pulled(&here, &image).await;
    let mine = reference("example.com/mine:2");
    here.store.tag(&name, &mine).unwrap();
    let file = here.directory.path().join("images.tar");
    save(&here, &[&name, "example.com/mine:2"], &file);
    let again = here.directory.path().join("again.tar");
    save(&here, &[&name, "example.com/mine:2"], &again);
    assert!(fs::read(&file).unwrap() == fs::read(&again).unwrap(), "two saves differ");

    let loaded = load(&there, &file);
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].id, image.id());
    assert_eq!(loaded[0].repo_tags.len(), 2, "{:?}", loaded[0].repo_tags);
    assert_eq!(loaded[0].config.raw, image.config);
    assert_eq!(there.store.check(false, |_| true).unwrap().problems, []);
    assert_eq!(load(&there, &file)[0].id, image.id(), "a second time is no error");
    // Compressed as people send them.
    let packed = here.directory.path().join("images.tar.gz");
    run(Command::new("sh").args(["-c", "gzip -c \"$0\" > \"$1\""]).arg(&file).arg(&packed));
    let third = TestStore::new();
    assert_eq!(load(&third, &packed)[0].id, image.id());
}

/// skopeo reads both faces of what we save, and we read both that it writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_and_hull_read_each_others_files() {
    let test = TestStore::new();
    let image = three_layers();
    let name = pulled(&test, &image).await;
    test.store.tag(&name, &reference("example.com/mine:2")).unwrap();
    let directory = test.directory.path();
    let file = directory.join("saved.tar");
    save(&test, &["example.com/mine:2"], &file);
    let skopeo = |arguments: &[&str]| run(Command::new("skopeo").args(["--insecure-policy"]).args(arguments));
    for from in ["docker-archive", "oci-archive"] {
        let source = format!("{from}:{}", file.display());
        let inspected: Value = serde_json::from_str(&skopeo(&["inspect", "--config", &source])).unwrap();
        assert_eq!(inspected["rootfs"]["diff_ids"].as_array().unwrap().len(), 3, "{from}");
        for to in ["docker-archive", "oci-archive"] {
            let copy = directory.join(format!("{from}-{to}.tar"));
            skopeo(&["copy", "-q", &source, &format!("{to}:{}:example.com/other:3", copy.display())]);
            let other = TestStore::new();
            let loaded = load(&other, &copy);
            assert_eq!(loaded.len(), 1, "{from} to {to}");
            assert_eq!(
                loaded[0].config.diff_ids,
                test.store.find(&image.id()).unwrap().unwrap().config.diff_ids
            );
            assert_eq!(loaded[0].repo_tags, ["example.com/other:3"], "{from} to {to}");
        }
    }
}

/// Docker's older archives: a folder for each layer, equal layers as links.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_docker_archive_with_linked_layers_is_read() {
    let test = TestStore::new();
    let work = test.directory.path().join("old");
    fs::create_dir_all(work.join("one")).unwrap();
    fs::create_dir_all(work.join("two")).unwrap();
    let layer = Layer::new(&[("f", b"x")], Packing::Plain);
    let image = TestImage::new(vec![layer.clone(), layer.clone()]);
    fs::write(work.join("one/layer.tar"), &image.layers[0].blob).unwrap();
    symlink("../one/layer.tar", work.join("two/layer.tar")).unwrap();
    fs::write(work.join("config.json"), &image.config).unwrap();
    let manifest = json!([{"Config": "config.json", "RepoTags": ["old:1"], "Layers": ["one/layer.tar", "two/layer.tar"]}]);
    fs::write(work.join("manifest.json"), manifest.to_string()).unwrap();
    let file = test.directory.path().join("old.tar");
    run(Command::new("tar").arg("-cf").arg(&file).arg("-C").arg(&work).arg("."));
    let loaded = load(&test, &file);
    assert_eq!(loaded[0].repo_tags, ["docker.io/library/old:1"]);
    assert_eq!(loaded[0].id, digest(&image.config));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_lies_leaves_nothing() {
    let test = TestStore::new();
    let file = test.directory.path().join("bad.tar");
    fs::write(&file, "no archive at all, only text that is long enough for a header".repeat(20)).unwrap();
    assert!(refused(&test, &file).contains("the archive cannot be read"));
    fs::write(&file, "").unwrap();
    assert!(refused(&test, &file).contains("holds no images"));
    let layer = Layer::new(&[("f", b"x")], Packing::Plain);
    let good = TestImage::new(vec![layer]);
    let other = Layer::new(&[("f", b"another")], Packing::Plain);
    let swapped = TestImage::new(vec![other]);
    let archive = |manifest: Value, layer: &[u8], config: &[u8]| {
        let work = test.directory.path().join("lie");
        let _ = fs::remove_dir_all(&work);
        fs::create_dir(&work).unwrap();
        fs::write(work.join("layer.tar"), layer).unwrap();
        fs::write(work.join("config.json"), config).unwrap();
        fs::write(work.join("manifest.json"), manifest.to_string()).unwrap();
        run(Command::new("tar").arg("-cf").arg(&file).arg("-C").arg(&work).arg("."));
    };
    let entry = |layers: Value| json!([{"Config": "config.json", "RepoTags": ["a:1"], "Layers": layers}]);
    archive(entry(json!(["layer.tar"])), &swapped.layers[0].blob, &good.config);
    assert!(refused(&test, &file).contains("layer"), "{}", refused(&test, &file));
    archive(entry(json!([])), &good.layers[0].blob, &good.config);
    assert!(refused(&test, &file).contains("its manifest has 0 layers"));
    archive(entry(json!(["../layer.tar"])), &good.layers[0].blob, &good.config);
    assert!(refused(&test, &file).contains("is missing"));
    archive(entry(json!(["layer.tar"])), &good.layers[0].blob, b"{}");
    refused(&test, &file);
    archive(json!({"not": "a list"}), &good.layers[0].blob, &good.config);
    assert!(refused(&test, &file).contains("manifest.json cannot be read"));
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_on_top_makes_a_new_image() {
    let test = TestStore::new();
    let base = three_layers();
    let name = pulled(&test, &base).await;
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o644);
    layer.append_data(&mut header, "new", &b"new"[..]).unwrap();
    let layer = layer.into_inner().unwrap();
    let new = NewImage {
        created: "2026-11-21T00:00:00Z".into(),
        created_by: "a test".into(),
        changes: vec![ImageChange::User("7".into())],
        ..NewImage::default()
    };
    let tag: Reference = reference("example.com/new:1");
    let made = test.store.make_image(&base.id(), layer.as_slice(), &new, Some(&tag)).unwrap();
    assert_eq!((made.config.diff_ids.len(), made.config.user.as_str()), (4, "7"));
    assert_eq!(made.repo_tags, ["example.com/new:1"]);
    assert_eq!(made.config.diff_ids[3].as_str(), digest(&layer));
    // It stands by itself when its base has gone.
    test.store.remove(&name).unwrap();
    let file = test.directory.path().join("new.tar");
    save(&test, &["example.com/new:1"], &file);
    let there = TestStore::new();
    assert_eq!(load(&there, &file)[0].id, made.id);
    assert!(test.store.make_image("sha256:00", &b""[..], &new, None).is_err());
}
