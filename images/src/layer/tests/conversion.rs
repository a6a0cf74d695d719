//! What archives of every dialect become.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::archive::{Archive, Member, seal};
use super::mounted::{Tree, snapshot, with_mounted, xattrs};
use super::{converted, refused};
use crate::layer::{EntryProblem, LayerError, Limits, convert};

fn layer(archive: Archive) -> Tree {
    with_mounted(&[&converted(&archive.end()).0], snapshot)
}

fn paths(tree: &Tree) -> Vec<&str> {
    tree.keys().map(|path| path.to_str().unwrap()).filter(|path| !path.is_empty()).collect()
}

#[test]
fn an_empty_archive_is_an_empty_layer() {
    for archive in [Archive::new().end(), Vec::new(), vec![0; 10_240]] {
        let (file, report) = converted(&archive);
        assert_eq!((report.entries, report.content), (0, 0));
        let tree = with_mounted(&[&file], snapshot);
        assert!(paths(&tree).is_empty());
        assert_eq!(tree[Path::new("")].mode, 0o40755);
    }
}

#[test]
fn the_same_archive_gives_the_same_bytes() {
    let archive = Archive::new().file("a/b", "content").symlink("l", "a").file("z", [7; 9000]).end();
    let read = |mut file: std::fs::File| {
        let mut bytes = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    };
    let (first, report) = converted(&archive);
    let first = read(first);
    assert_eq!(first, read(converted(&archive).0));
    assert_eq!(report.size + report.tar_split, first.len() as u64);
    assert_eq!((report.entries, report.content), (3, 9007));
}

#[test]
fn long_names_of_every_dialect_arrive_whole() {
    let deep = format!("{}/{}", "d".repeat(120), "f".repeat(130));
    let target = "t/".repeat(150);
    let mut prefixed = Member::new(b'0', "name").header();
    prefixed[345..351].copy_from_slice(b"prefix");
    seal(&mut prefixed);
    let tree = layer(
        Archive::new()
            .long(b'L', &deep)
            .file("short", "gnu")
            .pax(&[("path", "pax-ünïcödé".as_bytes())])
            .file("short", "pax")
            .long(b'K', &target)
            .symlink("gnu-link", "short")
            .pax(&[("linkpath", target.as_bytes())])
            .symlink("pax-link", "short")
            .raw(&prefixed),
    );
    let expected: [&str; 6] = [&"d".repeat(120), &deep, "gnu-link", "pax-link", "pax-ünïcödé", "prefix"];
    assert_eq!(paths(&tree)[..6], expected);
    assert_eq!(paths(&tree)[6], "prefix/name");
    for link in ["gnu-link", "pax-link"] {
        assert_eq!(tree[Path::new(link)].content, target.as_bytes());
    }
}

#[test]
fn an_old_v7_archive_is_read() {
    let v7 = |typeflag, path| Member { magic: &[0; 8], ..Member::new(typeflag, path) };
    let tree = layer(
        Archive::new()
            .member(v7(0, "directory/"), b"")
            .member(v7(0, "directory/file"), b"text")
            .member(Member { link: b"directory/file", ..v7(b'1', "hard") }, b"")
            .member(Member { link: b"hard", ..v7(b'2', "soft") }, b""),
    );
    assert_eq!(tree[Path::new("directory")].mode & 0o170_000, 0o040_000);
    assert_eq!(tree[Path::new("directory/file")].links, 2);
    assert_eq!(tree[Path::new("soft")].content, b"hard");
}

#[test]
fn pax_numbers_and_base_256_reach_the_inode() {
    let mut wide = Member::new(b'0', "base256").header();
    wide[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xb2, 0xd0, 0x5e, 0]); // 3,000,000,000
    wide[136..148].copy_from_slice(&[0xff; 12]);
    seal(&mut wide);
    let tree = layer(
        Archive::new()
            .pax(&[("uid", b"3000000000"), ("gid", b"4294967294"), ("mtime", b"-1.25")])
            .file("pax", "")
            .raw(&wide),
    );
    let seen = &tree[Path::new("pax")];
    assert_eq!((seen.uid, seen.gid, seen.mtime), (3_000_000_000, u32::MAX - 1, (-2, 750_000_000)));
    let seen = &tree[Path::new("base256")];
    assert_eq!((seen.uid, seen.mtime), (3_000_000_000, (-1, 0)));
}

#[test]
fn a_global_header_applies_until_an_entry_says_otherwise() {
    let tree = layer(
        Archive::new()
            .global(&[("comment", b"0123abcd"), ("uid", b"7"), ("mtime", b"5.5")])
            .file("a", "")
            .pax(&[("uid", b"8"), ("mtime", b"")])
            .file("b", ""),
    );
    let at = |path: &str| (tree[Path::new(path)].uid, tree[Path::new(path)].mtime);
    assert_eq!(at("a"), (7, (5, 500_000_000)));
    assert_eq!(at("b"), (8, (1_600_000_000, 0)));
}

#[test]
fn attributes_of_the_image_are_kept_and_the_hosts_are_not() {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let acl: Vec<u8> = [
        &[2, 0, 0, 0][..],
        &[1, 0, 6, 0, 255, 255, 255, 255],
        &[4, 0, 4, 0, 255, 255, 255, 255],
        &[32, 0, 4, 0, 255, 255, 255, 255],
    ]
    .concat();
    let large = vec![b'x'; 9000];
    let archive = Archive::new()
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.large", &large),
            ("SCHILY.xattr.user.empty", b""),
            ("SCHILY.xattr.system.posix_acl_access", &acl),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.trusted.overlay.metacopy", b""),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("SCHILY.xattr.security.selinux", b"label"),
        ])
        .file("file", vec![1; 5000]);
    let (file, _) = converted(&archive.end());
    let (seen, acl_seen) = with_mounted(&[&file], |root| {
        let mut value = [0; 64];
        let path = root.join("file");
        let length = rustix::fs::lgetxattr(&path, "system.posix_acl_access", &mut value).unwrap();
        (xattrs(&path), value[..length].to_vec())
    });
    assert_eq!(acl_seen, acl);
    let names: Vec<_> = seen.keys().filter(|name| !name.starts_with(b"system.")).map(Vec::as_slice).collect();
    assert_eq!(names, [&b"security.capability"[..], b"user.empty", b"user.large"]);
    assert_eq!(seen[&b"user.large"[..]], large);
}

#[test]
fn attributes_that_repeat_are_shared_and_still_right() {
    let mut archive = Archive::new();
    for number in 0..300_u32 {
        let own = number.to_string();
        archive = archive
            .pax(&[("SCHILY.xattr.user.same", &[b's'; 400]), ("SCHILY.xattr.user.own", own.as_bytes())])
            .file(&format!("f{number}"), "x");
    }
    let (file, report) = converted(&archive.end());
    assert!(report.size < 300 * 400, "{}", report.size);
    let tree = with_mounted(&[&file], snapshot);
    for number in 0..300 {
        let xattrs = &tree[Path::new(&format!("f{number}"))].xattrs;
        assert_eq!(xattrs[&b"user.own"[..]], number.to_string().as_bytes());
        assert_eq!(xattrs[&b"user.same"[..]], [b's'; 400]);
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    let tree = layer(
        Archive::new()
            .file("file", "one")
            .file("file", "two!")
            .directory("d")
            .file("d/inner", "kept")
            .member(Member { mode: 0o700, ..Member::new(b'5', "d") }, b"")
            .directory("gone")
            .file("gone/inner", "lost")
            .file("gone", "now a file")
            .symlink("link", "d")
            .directory("link")
            .file("link/own", "not in d")
            .hard_link("hard", "file")
            .file("file", "three"),
    );
    let expected = ["d", "d/inner", "file", "gone", "hard", "link", "link/own"];
    assert_eq!(paths(&tree), expected);
    assert_eq!(tree[Path::new("d")].mode, 0o40700);
    assert_eq!(tree[Path::new("file")].size, 5);
    // The other name keeps the old inode, with one link.
    assert_eq!((tree[Path::new("hard")].size, tree[Path::new("hard")].links), (4, 1));
    assert_eq!(tree[Path::new("gone")].size, 10);
}

#[test]
fn missing_parents_are_made() {
    let tree = layer(
        Archive::new().file("a/b/c", "").member(Member { mode: 0o700, ..Member::new(b'5', "a/b") }, b""),
    );
    assert_eq!(paths(&tree), ["a", "a/b", "a/b/c"]);
    assert_eq!((tree[Path::new("a")].mode, tree[Path::new("a")].uid), (0o40755, 0));
    assert_eq!(tree[Path::new("a/b")].mode, 0o40700);
}

#[test]
fn a_link_in_the_parents_leads_within_the_layer() {
    let tree = layer(
        Archive::new()
            .directory("real/sub")
            .symlink("absolute", "/real")
            .symlink("real/up", "../../../real/./sub/")
            .symlink("dangling", "made/by/need")
            .symlink("chain", "absolute/up")
            .file("absolute/one", "")
            .file("chain/two", "")
            .file("dangling/three", "")
            .hard_link("absolute/four", "chain/two"),
    );
    for path in ["real/one", "real/sub/two", "made/by/need/three", "real/four"] {
        assert!(tree.contains_key(Path::new(path)), "{path}: {:?}", paths(&tree));
    }
    assert_eq!(tree[Path::new("real/four")].same_as, tree[Path::new("real/sub/two")].same_as);
    let circle = Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", "").end();
    assert!(matches!(refused(&circle), LayerError::Entry { problem: EntryProblem::SymlinkLoop, .. }));
}

#[test]
fn hard_links_may_come_in_any_order() {
    let tree = layer(
        Archive::new()
            .hard_link("a", "b")
            .hard_link("b", "c")
            .hard_link("early", "d/target")
            .hard_link("replaced", "nowhere")
            .file("replaced", "")
            .file("c", "content")
            .hard_link("z", "a")
            .file("d/target", "other")
            .hard_link("e", "z"),
    );
    for path in ["a", "b", "c", "e", "z"] {
        let seen = &tree[Path::new(path)];
        assert_eq!((seen.links, seen.same_as.as_deref()), (5, Some(Path::new("a"))), "{path}");
    }
    assert_eq!(tree[Path::new("early")].same_as.as_deref(), Some(Path::new("d/target")));
}

#[test]
fn devices_are_made_and_numbers_out_of_range_refused() {
    let device =
        |typeflag, path, major, minor| Member { device: (major, minor), ..Member::new(typeflag, path) };
    let tree = layer(
        Archive::new()
            .member(device(b'3', "null", 1, 3), b"")
            .member(device(b'4', "disk", 0xfff, 0xf_ffff), b"")
            .member(Member::new(b'6', "fifo"), b""),
    );
    assert_eq!(tree[Path::new("null")].device, rustix::fs::makedev(1, 3));
    assert_eq!(tree[Path::new("disk")].device, rustix::fs::makedev(0xfff, 0xf_ffff));
    assert_eq!(tree[Path::new("fifo")].mode & 0o170_000, 0o010_000);
    let error = refused(&Archive::new().member(device(b'3', "bad", 0x1000, 0), b"").end());
    assert!(matches!(error, LayerError::Entry { problem: EntryProblem::BadDevice(..), .. }));
}

#[test]
fn a_sparse_file_of_five_gigabytes_costs_no_disk() {
    const SIZE: u64 = 5 << 30;
    let map = format!("2\n10000\n5\n{}\n4\n", SIZE - 4);
    let content = [map.as_bytes(), &vec![0; 512 - map.len()], b"hello", b"last"].concat();
    let (file, report) = converted(
        &Archive::new()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"huge"),
                ("GNU.sparse.realsize", SIZE.to_string().as_bytes()),
            ])
            .file("GNUSparseFile.0/huge", &content)
            .file("after", "x")
            .end(),
    );
    assert_eq!(report.content, SIZE + 1);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert!(blocks * 512 < 1 << 20, "{blocks} sectors on disk");
    with_mounted(&[&file], |root| {
        let huge = std::fs::File::open(root.join("huge")).unwrap();
        assert_eq!(huge.metadata().unwrap().len(), SIZE);
        let (mut start, mut end) = ([9; 8], [9; 6]);
        huge.read_exact_at(&mut start, 9998).unwrap();
        huge.read_exact_at(&mut end, SIZE - 6).unwrap();
        assert_eq!((&start, &end), (b"\0\0hello\0", b"\0\0last"));
        assert_eq!(std::fs::read(root.join("after")).unwrap(), b"x");
    });
}

#[test]
fn a_directory_of_a_hundred_thousand_names_finds_each() {
    const COUNT: usize = 100_000;
    let mut archive = Archive::new();
    for number in 0..COUNT {
        archive = archive.file(&format!("d/{:x}-{number}", number * 7919), "");
    }
    let (file, report) = converted(&archive.end());
    assert_eq!(report.entries, COUNT as u64);
    with_mounted(&[&file], |root| {
        let directory = root.join("d");
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), COUNT);
        for number in (0..COUNT).step_by(997) {
            let path = directory.join(format!("{:x}-{number}", number * 7919));
            assert!(path.symlink_metadata().is_ok(), "{}", path.display());
        }
        assert!(directory.join("0-1").symlink_metadata().is_err());
    });
}

#[test]
fn a_file_that_cannot_be_read_back_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(directory.path().join("write-only")).unwrap();
    let error = convert(&b""[..], &file, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("reading and writing"), "{error}");
}

#[test]
fn a_full_disk_is_reported_as_such() {
    let full = std::fs::File::options().read(true).write(true).open("/dev/full").unwrap();
    let archive = Archive::new().file("a", vec![1; 3 << 20]).end();
    match convert(archive.as_slice(), &full, &Limits::default()).unwrap_err() {
        LayerError::WriteFile(error) => assert_eq!(error.kind(), std::io::ErrorKind::StorageFull),
        other => panic!("{other}"),
    }
}
