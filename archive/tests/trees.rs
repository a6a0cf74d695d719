//! Trees of a real filesystem, written here and read by GNU tar and Python.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use hull_archive::{ArchiveError, Ids, Marks, Options, Summary, write_tree};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};

fn archive(tree: &Path, options: &Options<'_>) -> Result<(Vec<u8>, Summary), ArchiveError> {
    let root = File::open(tree).unwrap();
    let mut bytes = Vec::new();
    let summary = write_tree(root.as_fd(), &mut bytes, options)?;
    assert_eq!(summary.bytes, bytes.len() as u64);
    Ok((bytes, summary))
}

fn extract(archive: &[u8], to: &Path) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), archive).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
        .arg(file.path())
        .arg("-C")
        .arg(to);
    assert!(tar.status().unwrap().success());
}

/// Names of an archive's entries as GNU tar lists them.
fn names(archive: &[u8]) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), archive).unwrap();
    let listed = Command::new("tar").arg("-tf").arg(file.path()).stderr(Stdio::inherit()).output().unwrap();
    assert!(listed.status.success());
    String::from_utf8(listed.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Everything that an archive carries, by path.
fn describe(tree: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![tree.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let status = fs::symlink_metadata(&path).unwrap();
            let content = match status.file_type() {
                kind if kind.is_file() => format!("{:x?}", blocks(&path)),
                kind if kind.is_symlink() => format!("{:?}", fs::read_link(&path).unwrap()),
                _ => String::new(),
            };
            let mut value = [0; 64];
            let xattr = rustix::fs::getxattr(&path, c"user.note", &mut value[..]).map_or(0, |length| length);
            let line = format!(
                "{:o} {}:{} {} {} {}.{:09} {:?} {content}",
                status.mode(),
                status.uid(),
                status.gid(),
                status.rdev(),
                if status.is_file() { status.nlink() } else { 0 },
                status.mtime(),
                status.mtime_nsec(),
                &value[..xattr],
            );
            if status.is_dir() {
                pending.push(path.clone());
            }
            found.insert(path.strip_prefix(tree).unwrap().to_str().unwrap().to_owned(), line);
        }
    }
    found
}

/// A file's size and those of its blocks that are not zero.
fn blocks(path: &Path) -> (u64, Vec<(usize, u8)>) {
    let bytes = fs::read(path).unwrap();
    let block = |(number, block): (usize, &[u8])| {
        block
            .iter()
            .copied()
            .reduce(|a, b| a.wrapping_mul(31).wrapping_add(b))
            .filter(|sum| *sum != 0)
            .map(|sum| (number, sum))
    };
    (bytes.len() as u64, bytes.chunks(4096).enumerate().filter_map(block).collect())
}

#[test]
fn a_tree_comes_back_from_gnu_tar_as_it_was() {
    let (from, to) = (tempfile::tempdir_in("/var/tmp").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap());
    let root = from.path();
    let deep = root.join(format!("{0}/{0}/{0}", "d".repeat(90)));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("n".repeat(200)), "deep").unwrap();
    fs::write(root.join("ünicode \n name"), "x").unwrap();
    fs::write(root.join("a"), vec![b'a'; 5000]).unwrap();
    fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(root.join("a"), Some(70_000), Some(3_000_000)).unwrap();
    fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(root.join("a"), root.join("z")).unwrap();
    symlink("t".repeat(150), root.join("link")).unwrap();
    symlink("/etc/passwd", root.join("absolute")).unwrap();
    setxattr(root.join("a"), c"user.note", b"va\0lue", XattrFlags::empty()).unwrap();
    mknodat(CWD, root.join("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3))
        .unwrap();
    mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let old = File::create(root.join("old")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH - std::time::Duration::from_millis(1500)).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"middle", 32 << 20).unwrap();
    File::create(root.join("hole")).unwrap().set_len(8 << 20).unwrap();

    let (bytes, summary) = archive(root, &Options::default()).unwrap();
    assert_eq!(summary.entries, describe(root).len() as u64);
    assert!(bytes.len() < 1 << 20, "holes are in the archive: {} bytes", bytes.len());
    extract(&bytes, to.path());
    assert_eq!(describe(root), describe(to.path()));
    assert_eq!(archive(root, &Options::default()).unwrap().0, bytes, "the same tree gives the same bytes");
}

#[test]
fn sockets_and_what_is_skipped_are_left_out() {
    let from = tempfile::tempdir().unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(from.path().join("socket")).unwrap();
    fs::create_dir_all(from.path().join("proc/1")).unwrap();
    fs::write(from.path().join("file"), "").unwrap();
    let options = Options { skip: &[b"proc"], ..Options::default() };
    assert_eq!(names(&archive(from.path(), &options).unwrap().0), ["file"]);
}

#[test]
fn overlay_marks_become_whiteouts() {
    let from = tempfile::tempdir_in("/var/tmp").unwrap();
    let root = from.path();
    fs::create_dir_all(root.join("etc/new")).unwrap();
    fs::write(root.join("etc/new/file"), "x").unwrap();
    let device = |name: &str| {
        mknodat(CWD, root.join(name), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    };
    device("gone");
    device("etc/shadow");
    setxattr(root.join("etc/new"), c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    setxattr(root.join("etc/new"), c"trusted.overlay.origin", b"secret", XattrFlags::empty()).unwrap();
    let options = Options { marks: Marks::ToWhiteouts, ..Options::default() };
    let (bytes, summary) = archive(root, &options).unwrap();
    let listed = names(&bytes);
    let expected = ["etc/", "etc/new/", "etc/new/.wh..wh..opq", "etc/new/file", "etc/.wh.shadow", ".wh.gone"];
    assert_eq!(listed, expected);
    assert_eq!(summary.entries, 6);
    assert!(!bytes.windows(6).any(|window| window == b"secret"));

    let mut told = Vec::new();
    hull_archive::list_upper(File::open(root).unwrap().as_fd(), |name| {
        told.push((String::from_utf8(name.path).unwrap(), name.is_whiteout));
        true
    })
    .unwrap();
    let expected =
        [("etc", false), ("etc/new", false), ("etc/new/file", false), ("etc/shadow", true), ("gone", true)];
    assert_eq!(told, expected.map(|(path, is_whiteout)| (path.to_owned(), is_whiteout)));

    fs::write(root.join("etc/.wh.lie"), "").unwrap();
    let refused = archive(root, &options).unwrap_err();
    assert!(refused.to_string().contains("etc/.wh.lie cannot be in an archive"), "{refused}");
}

#[test]
fn owners_are_seen_from_inside_their_user_namespace() {
    let from = tempfile::tempdir().unwrap();
    for (name, uid) in [("root", 100_000), ("user", 101_000), ("stranger", 5)] {
        fs::write(from.path().join(name), "").unwrap();
        std::os::unix::fs::chown(from.path().join(name), Some(uid), Some(uid)).unwrap();
    }
    let to = tempfile::tempdir().unwrap();
    let options = Options { ids: Ids::From { base: 100_000, count: 65_536 }, ..Options::default() };
    extract(&archive(from.path(), &options).unwrap().0, to.path());
    let owner = |name: &str| fs::metadata(to.path().join(name)).unwrap().uid();
    assert_eq!([owner("root"), owner("user"), owner("stranger")], [0, 1000, 65_534]);
}

#[test]
fn a_tree_that_is_too_large_is_refused() {
    let from = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::write(from.path().join(name), "").unwrap();
    }
    let options = Options { max_entries: 2, ..Options::default() };
    let refused = archive(from.path(), &options).unwrap_err();
    assert_eq!(refused.to_string(), "the tree has more than 2 entries");
}

#[test]
fn python_reads_a_sparse_file_too() {
    let from = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = File::create(from.path().join("sparse")).unwrap();
    file.set_len(16 << 20).unwrap();
    file.write_all_at(b"end", (16 << 20) - 3).unwrap();
    let (bytes, _) = archive(from.path(), &Options::default()).unwrap();
    let stored = tempfile::NamedTempFile::new().unwrap();
    fs::write(stored.path(), bytes).unwrap();
    let script = "import sys,tarfile; t=tarfile.open(sys.argv[1]); m=t.getmember('sparse'); \
                  d=t.extractfile(m).read(); print(m.size, d.count(0), d[-3:].decode())";
    let output = Command::new("python3").args(["-c", script]).arg(stored.path()).output().unwrap();
    let expected = format!("{} {} end\n", 16 << 20, (16 << 20) - 3);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}
