//! The way back from a layer to its archive, beyond what every other test checks by the way.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::archive::{Archive, Member};
use super::{Converted, converted, turned_back};
use crate::layer::{Limits, Target, convert};

/// Content that is written but belongs to nothing in the end must still be found.
#[test]
fn what_an_archive_replaces_is_part_of_it() {
    let tar = Archive::new()
        .file("a", vec![1; 9000])
        .file("a", "shorter")
        .directory("d")
        .file("d/x", vec![2; 4096])
        .file("d", vec![3; 4097])
        .file("empty", "")
        .pax(&[
            ("GNU.sparse.major", b"0"),
            ("GNU.sparse.minor", b"1"),
            ("GNU.sparse.name", b"s"),
            ("GNU.sparse.map", b"0,512,100000,700,200000,0"),
            ("GNU.sparse.realsize", b"200000"),
        ])
        .member(Member::new(b'0', "sparse"), &[7; 1212])
        .end();
    converted(&tar);
}

#[test]
fn what_follows_the_end_of_an_archive_is_part_of_it() {
    let mut tar = Archive::new().file("a", "x").end();
    tar.extend_from_slice(&[0; 9000]);
    tar.extend_from_slice(b"trailing garbage");
    converted(&tar);
}

#[test]
fn the_way_back_takes_little_room() {
    let mut archive = Archive::new();
    for number in 0..2000 {
        archive =
            archive.file(&format!("usr/lib/node_modules/package-{number}/index.js"), vec![b'x'; number]);
    }
    let (_, converted) = converted(&archive.end());
    assert!(converted.tar_split < 2000 * 48, "{} bytes for 2000 entries", converted.tar_split);
}

/// A disk that lies must not make hulld fall over.
#[test]
fn damage_is_an_error_or_another_archive_but_never_a_panic() {
    let tar = Archive::new().file("a", vec![1; 5000]).directory("d").file("d/b", "text").end();
    let (layer, scratch) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let target = Target { layer: &layer, scratch: Some(&scratch) };
    let made = convert(tar.as_slice(), target, &Limits::default()).unwrap();
    let length = made.size + made.tar_split;
    let mut whole = vec![0; length as usize];
    layer.read_exact_at(&mut whole, 0).unwrap();
    for at in (0..whole.len()).step_by(3) {
        let damaged = tempfile::tempfile().unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        damaged.write_all_at(&bytes, 0).unwrap();
        let _ = turned_back(&damaged, &made);
    }
    // What says how to turn back has a checksum of its own.
    for at in made.size as usize..whole.len() {
        let damaged = tempfile::tempfile().unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        damaged.write_all_at(&bytes, 0).unwrap();
        // All but a few bits of the frame's header matter.
        if let Ok(again) = turned_back(&damaged, &made) {
            assert!(again == tar, "byte {at}");
        }
    }
}

#[test]
fn a_cut_off_layer_file_is_an_error() {
    let tar = Archive::new().file("a", vec![1; 50_000]).end();
    let (layer, made): (File, Converted) = converted(&tar);
    for length in [0, 100, 4096, made.size / 2, made.size, made.size + made.tar_split - 1] {
        layer.set_len(length).unwrap();
        assert!(turned_back(&layer, &made).is_err(), "{length} bytes");
    }
}
