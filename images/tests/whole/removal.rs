use std::fs;

use hull_images::store::PullErrorKind;
use hull_images::{ImageStore, StoreConfig};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::image::{Layer, Packing, TestImage};
use crate::server::Server;
use crate::{TestStore, in_own_mounts, reference};

fn layer(name: &str) -> Layer {
    Layer::new(&[(name, name.as_bytes())], Packing::Gzip)
}

/// A server with two images that share their lowest layer.
async fn two_images() -> (Server, TestImage, TestImage) {
    let one = TestImage::new(vec![layer("base"), layer("one")]);
    let two = TestImage::new(vec![layer("base"), layer("two")]);
    let images = [("app:1", &one), ("app:again", &one), ("app:2", &two)];
    (Server::start(&images, |_| None).await, one, two)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removing_an_image_takes_all_its_names_and_only_its_own_layers() {
    let (server, one, two) = two_images().await;
    let test = TestStore::new();
    let name = |tag: &str| format!("{}/app:{tag}", server.host());
    for tag in ["1", "again", "2"] {
        test.pull(&name(tag)).await.unwrap();
    }
    assert_eq!(test.layer_files().len(), 3);
    let removed = test.store.remove(&name("again")).unwrap();
    assert_eq!(removed.len(), 4, "two tags, one digest, the id: {removed:?}");
    assert!(removed.contains(&name("1")) && removed.contains(&one.id()));
    assert_eq!(test.layer_files().len(), 2);
    assert_eq!(test.store.remove(&name("again")).unwrap(), Vec::<String>::new());
    assert_eq!(test.store.remove(&one.id()).unwrap(), Vec::<String>::new());
    assert_eq!(test.store.remove(&two.id()[7..20]).unwrap().len(), 3);
    test.assert_nothing_left();
    assert_eq!(test.store.document(&two.id()).unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_layers_outlive_their_image() {
    let (server, one, _) = two_images().await;
    let test = TestStore::new();
    let image = test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let hold = test.store.hold(&image.layers);
    let again = test.store.hold(&image.layers[..1]);
    test.store.remove(&one.id()).unwrap();
    assert_eq!(test.layer_files().len(), 2);
    assert!(test.store.sweep().unwrap().layers.is_empty());
    // A restart: the daemon takes the holds of its containers before it sweeps.
    drop((hold, again));
    for _ in 0..100 {
        if test.layer_files().is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opening_keeps_unused_layers_until_the_first_sweep() {
    let (server, one, _) = two_images().await;
    let test = TestStore::new();
    let image = test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let hold = test.store.hold(&image.layers);
    test.store.remove(&one.id()).unwrap();
    // A daemon that is killed drops nothing.
    std::mem::forget(hold);
    let test = test.reopen();
    assert_eq!(test.layer_files().len(), 2);
    let hold = test.store.hold(&image.layers[..1]);
    assert_eq!(test.store.sweep().unwrap().layers, image.layers[1..]);
    assert_eq!(test.layer_files().len(), 1);
    drop(hold);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leftovers_of_a_crash_are_swept_at_open() {
    let (server, ..) = two_images().await;
    let test = TestStore::new();
    let image = test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let layers = test.root().join("layers");
    fs::write(layers.join(format!("{}.7.tmp", "a".repeat(64))), "half").unwrap();
    fs::write(layers.join(format!("{}.erofs", "b".repeat(64))), "renamed, never committed").unwrap();
    let test = test.reopen();
    assert_eq!(test.layer_files().len(), 2);
    assert_eq!(test.store.list().unwrap(), [image]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_with_a_torn_layer_is_gone_and_can_be_pulled_again() {
    let (server, _, two) = two_images().await;
    let test = TestStore::new();
    let name = format!("{}/app:1", server.host());
    let image = test.pull(&name).await.unwrap();
    test.pull(&format!("{}/app:2", server.host())).await.unwrap();
    let file = test.root().join("layers").join(format!("{}.erofs", image.layers[1].hex()));
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(10).unwrap();
    let test = test.reopen();
    let ids: Vec<String> = test.store.list().unwrap().into_iter().map(|image| image.id).collect();
    assert_eq!(ids, [two.id()]);
    assert!(!file.exists());
    assert_eq!(test.pull(&name).await.unwrap().layers, image.layers);
    assert_eq!(test.store.sweep().unwrap(), Default::default());
}

#[test]
fn a_full_disk_fails_the_pull_and_leaves_nothing_and_the_next_pull_works() {
    in_own_mounts(|| async {
        let disk = tempfile::tempdir().unwrap();
        let directory = disk.path();
        mount("none", directory, "tmpfs", MountFlags::empty(), Some(c"size=10m")).unwrap();
        let store_config = || StoreConfig::new(directory.join("root"), directory.join("state"));
        let store = ImageStore::open(store_config()).unwrap();
        let big = TestImage::new(vec![Layer::noise("big", 12 << 20, 1)]);
        let small = TestImage::new(vec![Layer::noise("small", 100_000, 2)]);
        let server = Server::start(&[("app:big", &big), ("app:small", &small)], |_| None).await;
        let name = |tag: &str| reference(&format!("{}/app:{tag}", server.host()));
        let error = store.pull(&name("big"), None, None).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::OutOfSpace, "{error}");
        assert_eq!(crate::files(&directory.join("root/layers")), Vec::<String>::new());
        // Room for the layer but not for a byte more: the index itself cannot grow.
        let filler = directory.join("filler");
        let _ = fs::write(&filler, vec![1; 16 << 20]);
        let error = store.pull(&name("small"), None, None).await.unwrap_err();
        assert_eq!(error.kind(), PullErrorKind::OutOfSpace, "{error}");
        assert_eq!(crate::files(&directory.join("root/layers")), Vec::<String>::new());
        assert!(store.list().unwrap().is_empty());
        fs::remove_file(&filler).unwrap();
        store.pull(&name("small"), None, None).await.unwrap();
        drop(store);
        let store = ImageStore::open(store_config()).unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        // And full again: removing an image is what makes room.
        let _ = fs::write(&filler, vec![1; 16 << 20]);
        store.remove(&name("small").to_string()).unwrap();
        assert_eq!(crate::files(&directory.join("root/layers")), Vec::<String>::new());
        drop(store);
        unmount(directory, UnmountFlags::DETACH).unwrap();
    });
}

/// The daemon of the next test: pulls, removes and pulls again until it is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a child process of another test"]
async fn child_that_is_killed() {
    let Ok(directory) = std::env::var("HULL_TEST_DIRECTORY") else { return };
    let names = std::env::var("HULL_TEST_IMAGES").unwrap();
    let store = ImageStore::open(crate::config(directory.as_ref())).unwrap();
    loop {
        for name in names.split(' ') {
            store.pull(&reference(name), None, None).await.unwrap();
        }
        store.remove(names.split(' ').next().unwrap()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_killed_at_any_moment_leaves_whole_images_or_none() {
    let (server, one, two) = two_images().await;
    let test = TestStore::new();
    let directory = test.directory;
    drop(test.store);
    let names = format!("{0}/app:1 {0}/app:2", server.host());
    for round in 0..12 {
        let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "removal::child_that_is_killed"])
            .env("HULL_TEST_DIRECTORY", directory.path())
            .env("HULL_TEST_IMAGES", &names)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(60 + 17 * round)).await;
        assert!(daemon.try_wait().unwrap().is_none(), "the daemon runs until it is killed");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        let store = ImageStore::open(crate::config(directory.path())).unwrap();
        store.sweep().unwrap();
        let mut expected = std::collections::BTreeSet::new();
        for image in store.list().unwrap() {
            assert!([one.id(), two.id()].contains(&image.id));
            assert_eq!(image.layers.len(), 2);
            assert!(!image.repo_digests.is_empty());
            expected.extend(image.layers.iter().map(|layer| format!("{}.erofs", layer.hex())));
        }
        let found: Vec<String> = crate::files(&directory.path().join("root/layers"));
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "exactly the files of the images");
    }
    assert!(server.requests().len() > 12, "the daemon did something");
}
