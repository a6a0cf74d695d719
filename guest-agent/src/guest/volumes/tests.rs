use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};

use super::generation::Generations;
use super::inside::{place, read, write_all};
use crate::protocol::messages::WriteVolume;
use crate::protocol::messages::write_volume::{Entry, entry::Content};

fn root(directory: &Path) -> OwnedFd {
    rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn file(path: &str, content: &str) -> Entry {
    let content = Some(Content::File(content.into()));
    Entry { path: path.into(), content, ..Entry::default() }
}

fn write(generations: &mut Generations, root: &OwnedFd, generation: u64, entries: Vec<Entry>, last: bool) {
    let call = WriteVolume { id: "v".into(), generation, entries, last };
    generations.write(root.as_fd(), &call).unwrap();
}

#[test]
fn a_generation_takes_the_place_of_the_one_before_in_one_step_as_kubelets_does() {
    let directory = tempfile::tempdir().unwrap();
    let (path, root) = (directory.path(), root(directory.path()));
    let mut generations = Generations::default();
    write(&mut generations, &root, 1, vec![file("a", "one"), file("sub/b", "two")], true);
    assert_eq!(fs::read_link(path.join("a")).unwrap(), Path::new("..data/a"));
    assert_eq!(fs::read_link(path.join("..data")).unwrap(), Path::new("..1"));
    assert_eq!(fs::read_to_string(path.join("sub/b")).unwrap(), "two");

    write(&mut generations, &root, 2, vec![file("a", "ONE"), file("c", "th")], false);
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one", "nothing changes before the last part");
    let more = Entry { append: true, ..file("c", "ree") };
    write(&mut generations, &root, 2, vec![more], true);
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "ONE");
    assert_eq!(fs::read_to_string(path.join("c")).unwrap(), "three");
    let mut left: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["..2", "..data", "a", "c"]);
}

#[test]
fn a_generation_that_is_in_place_changes_nothing_and_an_abandoned_one_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (path, root) = (directory.path(), root(directory.path()));
    let mut generations = Generations::default();
    write(&mut generations, &root, 7, vec![file("a", "7")], true);
    write(&mut generations, &root, 7, vec![file("a", "other")], true);
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "7");
    write(&mut generations, &root, 8, vec![file("sub/deep/a", "8")], false);
    write(&mut generations, &root, 9, vec![file("a", "9")], true);
    assert!(!path.join("..8").exists() && !path.join("..7").exists());
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "9");
}

#[test]
fn names_that_would_leave_a_generation_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let root = root(directory.path());
    for path in ["..data", "..1/x", "../x", "a/../../x", "/etc/x", "", "a\0b"] {
        let call = WriteVolume { id: "v".into(), generation: 1, entries: vec![file(path, "x")], last: true };
        assert!(Generations::default().write(root.as_fd(), &call).is_err(), "{path:?}");
    }
}

#[test]
fn entries_get_owner_and_mode_and_links_are_replaced_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, root) = (directory.path(), root(directory.path()));
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), path.join("way-out")).unwrap();
    symlink(outside.path().join("x"), path.join("file")).unwrap();
    for entry in [file("way-out/x", "x"), file("file", "x")] {
        assert!(write_all(root.as_fd(), &[entry]).is_err());
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    let link = Entry { path: "file".into(), content: Some(Content::Link("sub".into())), ..Entry::default() };
    let sub = Entry {
        path: "sub".into(),
        mode: 0o2770,
        gid: 1000,
        content: Some(Content::Directory(true)),
        ..Entry::default()
    };
    let inner = Entry { uid: 7, gid: 8, mode: 0o400, ..file("sub/inner", "secret") };
    write_all(root.as_fd(), &[link, sub, inner]).unwrap();
    let facts = |name: &str| fs::symlink_metadata(path.join(name)).unwrap();
    assert_eq!((facts("sub").mode() & 0o7777, facts("sub").gid()), (0o2770, 1000));
    let inner = facts("sub/inner");
    assert_eq!((inner.mode() & 0o7777, inner.uid(), inner.gid()), (0o400, 7, 8));
    assert_eq!(fs::read_link(path.join("file")).unwrap(), Path::new("sub"));
    let nobody = Entry { uid: u32::MAX, ..file("x", "x") };
    assert!(write_all(root.as_fd(), &[nobody]).is_err());
}

#[test]
fn a_place_stays_below_the_root_whatever_links_are_there() {
    let directory = tempfile::tempdir().unwrap();
    let (path, root) = (directory.path(), root(directory.path()));
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), path.join("out")).unwrap();
    symlink("inner", path.join("in")).unwrap();
    fs::create_dir(path.join("inner")).unwrap();
    let at = |path: &str, make| place(root.as_fd(), path, make);
    let same = |one: &OwnedFd, path: &Path| {
        rustix::fs::fstat(one).unwrap().st_ino == fs::metadata(path).unwrap().ino()
    };
    assert!(same(&at("in", None).unwrap(), &path.join("inner")));
    assert!(same(&at("", None).unwrap(), path));
    assert!(at("missing", None).is_err() && at("../x", None).is_err());
    for path in ["out", "out/x", "/etc"] {
        assert!(at(path, Some(Mode::RWXU)).is_err(), "{path}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    let made = at("in/new/deep", Some(Mode::from_raw_mode(0o2775))).unwrap();
    assert!(same(&made, &path.join("inner/new/deep")));
    assert_eq!(fs::metadata(path.join("inner/new")).unwrap().mode() & 0o7777, 0o2775);
}

#[test]
fn only_the_end_of_a_plain_file_is_read_and_no_link_of_a_container_followed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, root) = (directory.path(), root(directory.path()));
    fs::write(path.join("log"), "0123456789").unwrap();
    symlink("log", path.join("link")).unwrap();
    symlink("/etc/passwd", path.join("out")).unwrap();
    rustix::fs::mknodat(
        root.as_fd(),
        "pipe",
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        rustix::fs::makedev(0, 0),
    )
    .unwrap();
    let get = |path: &str, limit, links| read(root.as_fd(), path, limit, links);
    assert_eq!(get("log", 4, false).unwrap(), b"6789");
    assert_eq!(get("log", 100, false).unwrap(), b"0123456789");
    assert_eq!(get("link", 100, true).unwrap(), b"0123456789");
    for path in ["link", "out", "pipe", "", "missing"] {
        assert!(get(path, 100, false).is_err(), "{path}");
    }
    assert!(get("out", 100, true).is_err());
}
