//! Whiteouts, in any order, under the kernel's overlayfs.

use std::path::Path;

use super::archive::{Archive, Member};
use super::mounted::{Tree, snapshot, with_mounted, xattrs};
use super::{converted, refused};
use crate::layer::LayerError;

fn lower() -> Archive {
    Archive::new()
        .file("gone", "")
        .file("kept", "lower")
        .directory("d")
        .file("d/old", "")
        .directory("d/sub")
        .file("d/sub/deep", "")
        .file("e/old", "")
        .file("f", "a file below")
}

fn merged(upper: Archive) -> Tree {
    let (lower, upper) = (converted(&lower().end()).0, converted(&upper.end()).0);
    with_mounted(&[&lower, &upper], snapshot)
}

fn paths(tree: &Tree) -> Vec<&str> {
    tree.keys().map(|path| path.to_str().unwrap()).filter(|path| !path.is_empty()).collect()
}

#[test]
fn a_whiteout_hides_what_is_below() {
    let tree = merged(Archive::new().file(".wh.gone", "").file("d/.wh.sub", "").file("e/.wh.old", ""));
    assert_eq!(paths(&tree), ["d", "d/old", "e", "f", "kept"]);
}

#[test]
fn a_whiteout_spares_its_own_layer_before_and_after() {
    let device = Member::new(b'3', "f");
    let whiteout =
        |archive: Archive| archive.file(".wh.d", "").file(".wh.kept", "").member(device.clone(), b"");
    let entries = |archive: Archive| archive.file("d/new", "").file("kept", "upper").file("f/new", "");
    for upper in [entries(whiteout(Archive::new())), whiteout(entries(Archive::new()))] {
        let tree = merged(upper);
        assert_eq!(paths(&tree), ["d", "d/new", "e", "e/old", "f", "f/new", "gone", "kept"]);
        assert_eq!(tree[Path::new("kept")].size, 5);
    }
}

#[test]
fn an_opaque_mark_hides_the_directorys_lower_entries_in_any_order() {
    let mark = |archive: Archive| archive.file("d/.wh..wh..opq", "");
    let entries = |archive: Archive| archive.directory("d").file("d/sub/new", "");
    let (first, last) = (entries(mark(Archive::new())), mark(entries(Archive::new())));
    // A directory that comes again with other attributes stays opaque.
    let between = mark(Archive::new().directory("d"))
        .member(Member { mode: 0o755, mtime: 1, ..Member::new(b'5', "d") }, b"");
    for upper in [first, last, between.file("d/sub/new", "")] {
        let tree = merged(upper);
        assert_eq!(paths(&tree), ["d", "d/sub", "d/sub/new", "e", "e/old", "f", "gone", "kept"]);
    }
}

#[test]
fn whiteouts_have_overlayfs_own_form_and_share_an_inode() {
    let upper = Archive::new()
        .file(".wh.a", "")
        .file("x/.wh.b", "")
        .member(Member::new(b'3', "device"), b"")
        .file("o/.wh..wh..opq", "");
    let (file, _) = converted(&upper.end());
    with_mounted(&[&file], |root| {
        let tree = snapshot(root);
        for path in ["a", "x/b", "device"] {
            let seen = &tree[Path::new(path)];
            assert_eq!((seen.mode, seen.device, seen.links), (0o020_000, 0, 3), "{path}");
        }
        let marks = xattrs(&root.join("o"));
        assert_eq!(marks[&b"trusted.overlay.opaque"[..]], b"y");
    });
}

#[test]
fn an_opaque_root_is_reported_because_overlayfs_ignores_it() {
    let upper = Archive::new().file(".wh..wh..opq", "").file("new", "");
    let (_, report) = converted(&upper.clone().end());
    assert!(report.opaque_root);
    assert!(!converted(&lower().end()).1.opaque_root);
    // The day this fails, the kernel has learnt it and the report is no longer needed.
    assert!(paths(&merged(upper)).contains(&"kept"));
}

#[test]
fn leftovers_of_aufs_are_ignored_and_false_whiteouts_refused() {
    let tree = merged(
        Archive::new().directory(".wh..wh.plnk").file(".wh..wh.plnk/1.2", "").file("d/.wh..wh.orph", ""),
    );
    assert_eq!(paths(&tree).len(), paths(&merged(Archive::new())).len());
    for bad in [".wh.", "d/.wh..", ".wh...", ".wh.d/file"] {
        let error = refused(&Archive::new().file(bad, "").end());
        assert!(error.to_string().contains("whiteout"), "{bad}: {error}");
        assert!(matches!(error, LayerError::Entry { name, .. } if name == bad));
    }
}

/// They were listed by overlayfs as names that lead to nothing.
#[test]
fn whiteouts_where_everything_below_is_hidden_are_left_out() {
    let upper = Archive::new()
        .file("d/.wh..wh..opq", "")
        .file("d/.wh.old", "")
        .file("d/sub/.wh.deep", "")
        .file("e/new", "")
        .file("e/.wh.old", "")
        .file(".wh.e", "")
        .file(".wh.kept", "");
    let (image, report) = converted(&upper.end());
    let tree = with_mounted(&[&image], snapshot);
    assert_eq!(paths(&tree), ["d", "d/sub", "e", "e/new", "kept"], "of the layer itself");
    assert_eq!(report.entries, 7);
    let lower = converted(&lower().end()).0;
    let names = with_mounted(&[&lower, &image], |root| {
        let listed = std::fs::read_dir(root.join("d")).unwrap();
        listed.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(names, ["sub"]);
}
