use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use hull_images::store::PullErrorKind;
use hull_images::{ImageStore, StoreConfig};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use crate::image::{Layer, TestImage};
use crate::server::Server;
use crate::{files, in_own_mounts, reference};

const TAGS: [&str; 3] = ["one", "two", "three"];

/// Three images of some 700 KiB that share their lowest layer.
async fn three_images() -> Server {
    let image =
        |seed| TestImage::new(vec![Layer::noise("base", 300_000, 1), Layer::noise("own", 400_000, seed)]);
    let images = [image(3), image(5), image(7)];
    let names = TAGS.map(|tag| format!("app:{tag}"));
    let served: Vec<_> = names.iter().map(String::as_str).zip(&images).collect();
    Server::start(&served, |_| None).await
}

fn config(directory: &Path) -> StoreConfig {
    StoreConfig::new(directory.join("root"), directory.join("state"))
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Nothing is promised that is not there, and nothing is there that is not promised.
fn assert_whole(store: &Arc<ImageStore>, root: &Path) {
    let report = store.check(false, |_| true).unwrap();
    assert_eq!(report.problems, []);
    let layers = store.list().unwrap().into_iter().flat_map(|image| image.layers);
    let known: BTreeSet<String> = layers.map(|layer| format!("{}.erofs", layer.hex())).collect();
    let known: Vec<String> = known.into_iter().collect();
    // The other layers of a pull that failed are given up in the background.
    for _ in 0..250 {
        if files(&root.join("layers")) == known && unfinished_blobs(root).is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(files(&root.join("layers")), known);
    assert_eq!(unfinished_blobs(root), Vec::<String>::new());
    assert_eq!(store.check(false, |_| true).unwrap().problems, []);
}

fn unfinished_blobs(root: &Path) -> Vec<String> {
    let blobs = root.join("blobs");
    let names = if blobs.exists() { files(&blobs) } else { Vec::new() };
    names.into_iter().filter(|name| name.ends_with(".tmp")).collect()
}

/// What a pull that failed had open is closed in the background.
fn unmount_soon(directory: &Path) {
    for _ in 0..500 {
        match unmount(directory, UnmountFlags::empty()) {
            Err(rustix::io::Errno::BUSY) => std::thread::sleep(std::time::Duration::from_millis(20)),
            other => return other.unwrap(),
        }
    }
    panic!("{} stays in use", directory.display());
}

fn names(store: &Arc<ImageStore>) -> BTreeSet<String> {
    store.list().unwrap().into_iter().flat_map(|image| image.repo_tags).collect()
}

/// A disk that is full after any number of bytes: whatever the store is writing then.
#[test]
fn a_disk_that_is_full_after_any_number_of_bytes_leaves_the_store_whole() {
    on_full_disks((1..28).map(|step| 1_600_000 + step * 150_000), false);
}

/// Then layers need about twice the room.
#[test]
fn a_disk_that_is_full_while_blobs_are_kept_leaves_the_store_whole() {
    on_full_disks((1..19).map(|step| 2_600_000 + step * 210_000), true);
}

fn on_full_disks(rooms: impl Iterator<Item = u64> + Send, keep_blobs: bool) {
    in_own_mounts(|| async move {
        let config = |directory: &Path| StoreConfig { keep_blobs, ..config(directory) };
        let server = three_images().await;
        let name = |tag: &str| reference(&format!("{}/app:{tag}", server.host()));
        let disk = tempfile::tempdir().unwrap();
        let directory = disk.path();
        // Without the reserve, which an index of its own takes first, everything is some 4 MiB.
        let mut opened = 0;
        for room in rooms {
            let size = std::ffi::CString::new(format!("size={room}")).unwrap();
            mount("none", directory, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).unwrap();
            let Ok(store) = ImageStore::open(config(directory)) else {
                unmount(directory, UnmountFlags::DETACH).unwrap();
                continue;
            };
            opened += 1;
            let mut there = BTreeSet::new();
            for tag in TAGS {
                match store.pull(&name(tag), None, None).await {
                    Ok(_) => drop(there.insert(name(tag).to_string())),
                    Err(error) => assert_eq!(error.kind(), PullErrorKind::OutOfSpace, "{room}: {error}"),
                }
                assert_whole(&store, &directory.join("root"));
                assert_eq!(names(&store), there, "with room for {room} bytes");
            }
            // Removal works when nothing else does.
            if there.remove(&name("one").to_string()) {
                store.remove(&name("one").to_string()).unwrap();
                assert_eq!(names(&store), there, "after the removal, with room for {room} bytes");
                assert_whole(&store, &directory.join("root"));
            }
            drop(store);
            mount_remount(directory, MountFlags::empty(), c"size=64m").unwrap();
            let store = ImageStore::open(config(directory)).unwrap();
            assert_eq!(names(&store), there, "with room for {room} bytes");
            for tag in TAGS {
                store.pull(&name(tag), None, None).await.unwrap();
            }
            assert_whole(&store, &directory.join("root"));
            drop(store);
            unmount(directory, UnmountFlags::DETACH).unwrap();
        }
        assert!(opened > 10, "only {opened} disks had room for an index");
    });
}

/// A disk that fails: an ext4 on a loop device on a file that cannot grow any more, so that blocks that the filesystem
/// counted on cannot be written. What was reported as pulled before is there when the disk is mended.
#[test]
fn a_disk_that_fails_at_any_block_leaves_the_store_whole() {
    in_own_mounts(|| async {
        let server = three_images().await;
        let name = |tag: &str| reference(&format!("{}/app:{tag}", server.host()));
        let outer = tempfile::tempdir().unwrap();
        let mut failed = 0;
        for step in 0..10 {
            mount("none", outer.path(), "tmpfs", MountFlags::empty(), Some(c"size=64m")).unwrap();
            let image = outer.path().join("disk");
            let directory = outer.path().join("mounted");
            fs::create_dir(&directory).unwrap();
            fs::File::create(&image).unwrap().set_len(40 << 20).unwrap();
            let (image, mounted) = (image.to_str().unwrap(), directory.to_str().unwrap());
            run("mkfs.ext4", &["-q", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0", image]);
            run("mount", &["-o", "loop,errors=remount-ro", image, mounted]);
            let store = ImageStore::open(config(&directory)).unwrap();
            rustix::fs::sync();
            let used = {
                let facts = rustix::fs::statvfs(outer.path()).unwrap();
                (facts.f_blocks - facts.f_bfree) * facts.f_frsize
            };
            // From here on so many bytes of new blocks work.
            let limit = std::ffi::CString::new(format!("size={}", used + step * 260_000)).unwrap();
            mount_remount(outer.path(), MountFlags::empty(), limit.as_c_str()).unwrap();
            let mut there = BTreeSet::new();
            for tag in TAGS {
                match store.pull(&name(tag), None, None).await {
                    Ok(_) => drop(there.insert(name(tag).to_string())),
                    Err(_) => failed += 1,
                }
                assert_eq!(names(&store), there, "step {step}");
            }
            drop(store);
            // The machine starts again with a disk that works.
            mount_remount(outer.path(), MountFlags::empty(), c"size=64m").unwrap();
            unmount_soon(&directory);
            let checked = Command::new("e2fsck").args(["-fy", image]).output().unwrap();
            assert!(checked.status.code().is_some_and(|code| code & !3 == 0), "{checked:?}");
            run("mount", &["-o", "loop", image, mounted]);
            let store = ImageStore::open(config(&directory)).unwrap();
            let found = names(&store);
            assert!(found.is_superset(&there), "step {step}: {there:?} were pulled, {found:?} are there");
            assert_whole(&store, &directory.join("root"));
            for tag in TAGS {
                store.pull(&name(tag), None, None).await.unwrap();
            }
            assert_whole(&store, &directory.join("root"));
            drop(store);
            unmount_soon(&directory);
            unmount(outer.path(), UnmountFlags::DETACH).unwrap();
        }
        assert!(failed > 5, "the disk failed {failed} times only");
    });
}
