//! Directories that an archive has entries in and does not name.

use super::archive::{Archive, Member};
use super::converted;
use crate::image::UpperDirectory;
use crate::layer::erofs::ImageReader;
use crate::layer::stack::{Overlaid, StackLayer, overlaid};

fn named(archive: Archive, path: &str, mode: u32, uid: u32) -> Archive {
    archive.member(Member { mode, uid, gid: uid, ..Member::new(b'5', path) }, b"")
}

fn layer(archive: Archive) -> StackLayer {
    let (file, report) = converted(&archive.end());
    StackLayer { image: ImageReader::new(file).unwrap(), implied: report.implied_directories }
}

fn looked_at(layers: Vec<Archive>) -> Overlaid {
    overlaid(&layers.into_iter().map(layer).collect::<Vec<_>>()).unwrap()
}

fn wanted(layers: Vec<Archive>) -> Vec<UpperDirectory> {
    looked_at(layers).directories
}

fn shown(layers: Vec<Archive>) -> Vec<(String, u16, u32)> {
    let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
    wanted(layers).iter().map(|directory| (text(&directory.path), directory.mode, directory.uid)).collect()
}

fn base() -> Archive {
    let archive = named(named(Archive::new(), "tmp", 0o1777, 0), "srv", 0o700, 7);
    named(named(archive, "srv/plain", 0o755, 0), "srv/plain/deep", 0o750, 8)
}

#[test]
fn directories_that_are_not_named_are_told_shallow_ones_first() {
    let archive =
        Archive::new().file("a/b/c", "").directory("a/b/d").file("a/b/d/e/f", "").file("x/.wh.y", "");
    let (_, report) = converted(&archive.file("o/.wh..wh..opq", "").file("o/p/q", "").end());
    let paths: Vec<&str> =
        report.implied_directories.iter().map(|path| str::from_utf8(path).unwrap()).collect();
    assert_eq!(paths, ["a", "o", "x", "a/b", "o/p", "a/b/d/e"]);
}

#[test]
fn an_implied_directory_looks_as_the_layer_below_has_it() {
    let upper = || Archive::new().file("tmp/x", "");
    assert_eq!(shown(vec![base(), upper()]), [("".into(), 0o755, 0), ("tmp".into(), 0o1777, 0)]);
    // Through layers that imply it too, and those that say nothing of it.
    let several = vec![base(), upper(), Archive::new().file("other/x", ""), upper()];
    assert_eq!(shown(several), [("".into(), 0o755, 0), ("tmp".into(), 0o1777, 0)]);
}

#[test]
fn directories_on_the_way_keep_what_they_show() {
    let upper = named(Archive::new(), "srv", 0o711, 9).file("srv/plain/deep/x", "");
    let expected = [("", 0o755, 0), ("srv", 0o711, 9), ("srv/plain", 0o755, 0), ("srv/plain/deep", 0o750, 8)];
    assert_eq!(shown(vec![base(), upper]), expected.map(|(path, mode, uid)| (path.to_owned(), mode, uid)));
}

/// The directory above was taken for one that only the upper layer has.
#[test]
fn a_directory_in_one_that_nobody_names_looks_as_the_layer_below_has_it() {
    let lower = || named(Archive::new(), "a/b", 0o700, 7);
    let expected = [("", 0o755, 0), ("a", 0o755, 0), ("a/b", 0o700, 7)];
    let expected = expected.map(|(path, mode, uid)| (path.to_owned(), mode, uid));
    let upper = || Archive::new().file("a/b/x", "");
    assert_eq!(shown(vec![lower(), upper()]), expected);
    // Also below a layer that has only the directory above it, be it named or not.
    assert_eq!(shown(vec![lower(), upper(), Archive::new().file("a/y", "")]), expected);
    assert_eq!(shown(vec![lower(), upper(), Archive::new().directory("a")]), expected);
}

#[test]
fn nothing_is_asked_for_where_overlayfs_is_right() {
    let upper = || Archive::new().file("tmp/x", "");
    assert!(shown(vec![base()]).is_empty());
    assert!(shown(vec![upper()]).is_empty(), "nothing below");
    assert!(shown(vec![Archive::new().directory("tmp"), upper()]).is_empty(), "as it is below");
    let again = named(Archive::new(), "tmp", 0o700, 0);
    assert!(shown(vec![base(), upper(), again]).is_empty(), "an upper layer names it");
    assert!(shown(vec![base(), Archive::new().file(".wh.tmp", ""), upper()]).is_empty(), "gone in between");
    assert!(shown(vec![base(), upper().file(".wh.tmp", "")]).is_empty(), "replaced in its own layer");
    assert!(shown(vec![base(), upper(), Archive::new().file(".wh.tmp", "")]).is_empty(), "gone in the end");
    assert!(shown(vec![base(), Archive::new().file("tmp", ""), upper()]).is_empty(), "a file in between");
    assert!(
        shown(vec![base(), Archive::new().symlink("tmp", "srv"), upper()]).is_empty(),
        "a link in between"
    );
    let opaque = Archive::new().file("srv/.wh..wh..opq", "").file("srv/plain/deep/x", "");
    let deep = |layers| shown(layers).iter().any(|(path, ..)| path == "srv/plain/deep");
    assert!(deep(vec![base(), Archive::new().file("srv/plain/deep/x", "")]));
    assert!(!deep(vec![base(), opaque.clone()]), "an opaque directory above it");
    assert!(!deep(vec![base(), opaque, Archive::new().file("srv/plain/deep/y", "")]), "and in between");
}

/// As with containerd's overlayfs snapshotter: nothing is written through the link, the directory takes its place and looks
/// like what it led to.
#[test]
fn a_link_below_an_implied_directory_is_hidden_and_told() {
    let links = |archive: Archive| archive.symlink("lib", "usr/lib").symlink("var/lock", "/run/../run/lock");
    let base = || {
        let archive = named(named(Archive::new(), "usr/lib", 0o750, 3), "run/lock", 0o1777, 4);
        links(named(archive, "usr/lib/modules", 0o711, 5))
    };
    let upper = || Archive::new().file("lib/modules/x", "").file("var/lock/y", "");
    let overlaid = looked_at(vec![base(), upper()]);
    assert_eq!(overlaid.hidden_links, [&b"lib"[..], b"var/lock"]);
    let expected = [
        ("", 0o755, 0),
        ("lib", 0o750, 3),
        ("lib/modules", 0o711, 5),
        ("var", 0o755, 0),
        ("var/lock", 0o1777, 4),
    ]
    .map(|(path, mode, uid)| (path.to_owned(), mode, uid));
    assert_eq!(shown(vec![base(), upper()]), expected);
    assert_eq!(shown(vec![base(), Archive::new().file("lib/z", ""), upper()]), expected, "twice");
    // What names the directory, or has the link itself, is as it says.
    assert!(looked_at(vec![base(), upper(), links(Archive::new())]).directories.is_empty());
    let named = looked_at(vec![base(), named(Archive::new(), "lib", 0o700, 1).file("lib/x", "")]);
    assert!(named.directories.is_empty() && named.hidden_links.is_empty());
    // Links in circles, to files, out of the layer.
    for target in ["lib", "./lib/../lib", "file", "nowhere", "usr/lib/nowhere", "file/x", "/"] {
        let base = Archive::new().file("file", "").symlink("lib", target).file("usr/lib/x", "");
        looked_at(vec![base, upper()]);
    }
}

#[test]
fn extended_attributes_come_along() {
    let acl: &[(&str, &[u8])] = &[("SCHILY.xattr.user.colour", b"blue"), ("SCHILY.xattr.trusted.x", b"no")];
    let named = |archive: Archive, path| archive.pax(acl).directory(path);
    // The second time it is stored it is shared.
    let lower = named(named(Archive::new(), "a"), "b");
    let upper = Archive::new().file("a/x", "").file("b/x", "");
    let found = wanted(vec![lower, upper]);
    let xattrs: Vec<_> = found.iter().map(|directory| directory.xattrs.clone()).collect();
    let blue = vec![(b"user.colour".to_vec(), b"blue".to_vec())];
    assert_eq!(xattrs, [vec![], blue.clone(), blue]);
}

#[test]
fn names_are_found_in_directories_of_many_blocks() {
    for count in [0, 1, 2, 3, 85, 86, 200, 1000, 5000] {
        let names: Vec<String> = (0..count).map(|n| format!("{:x}", n * 7919 % 65_536)).collect();
        let archive =
            names.iter().fold(Archive::new(), |archive, name| archive.file(&format!("d/{name}"), ""));
        let reader = layer(archive.directory("d")).image;
        let directory = reader.lookup(&reader.root().unwrap(), b"d").unwrap().unwrap();
        for name in &names {
            assert!(reader.lookup(&directory, name.as_bytes()).unwrap().is_some(), "{name} of {count}");
        }
        for missing in ["", "zzz", "00", "7777x", "!"] {
            assert!(reader.lookup(&directory, missing.as_bytes()).unwrap().is_none(), "{missing} of {count}");
        }
        assert!(reader.lookup(&directory, b"..").unwrap().is_some());
    }
}

#[test]
fn a_damaged_layer_file_is_an_error() {
    let (file, _) = converted(&base().end());
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    let (upper, report) = converted(&Archive::new().file("tmp/x", "").end());
    let read = |bytes: &[u8]| {
        let lower = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&lower, bytes, 0).unwrap();
        let upper = ImageReader::new(upper.try_clone().unwrap())?;
        let layers = [
            StackLayer { image: ImageReader::new(lower)?, implied: vec![] },
            StackLayer { image: upper, implied: report.implied_directories.clone() },
        ];
        overlaid(&layers).map(|overlaid| overlaid.directories)
    };
    assert_eq!(read(&bytes).unwrap().len(), 2);
    assert!(read(&bytes[..3000]).is_err());
    assert!(read(&vec![0; bytes.len()]).is_err());
    // Whatever the damage, there is an end and no panic.
    for at in 1024..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0xff;
        let _ = read(&damaged);
    }
}

#[test]
fn what_a_hostile_image_asks_for_is_bounded() {
    let many = |archive: Archive, each: &dyn Fn(Archive, String) -> Archive| {
        (0..3000).fold(archive, |archive, n| each(archive, format!("directory-{n}")))
    };
    let lower = many(Archive::new(), &|archive, path| named(archive, &path, 0o700, 1));
    let upper = many(Archive::new(), &|archive, path| archive.file(&format!("{path}/x"), ""));
    let found = wanted(vec![lower, upper]);
    assert_eq!(found.len(), 1024);
    let (_, report) =
        converted(&(0..20_000).fold(Archive::new(), |a, n| a.file(&format!("{n}/x"), "")).end());
    assert_eq!(report.implied_directories.len(), 1 << 14);
}
