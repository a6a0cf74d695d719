//! Archives that must be refused, with an error that names the entry.

use std::io::{self, Read};

use super::archive::{Archive, Member, seal};
use super::mounted::fsck;
use super::{refused, refused_with};
use crate::layer::{EntryProblem, LayerError, Limits, Target};

fn problem(archive: Archive) -> (String, EntryProblem) {
    match refused(&archive.end()) {
        LayerError::Entry { name, problem } => (name, problem),
        other => panic!("{other}"),
    }
}

fn malformed(archive: Vec<u8>) {
    match refused(&archive) {
        LayerError::Malformed { .. } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn paths_that_climb_out_are_refused() {
    for path in ["../evil", "a/../../evil", "/../evil", "a/..", "a/.wh..."] {
        let (name, problem) = problem(Archive::new().file(path, "x"));
        assert_eq!(name, path);
        assert!(matches!(problem, EntryProblem::ClimbsOut | EntryProblem::BadWhiteout));
    }
}

#[test]
fn names_that_no_file_system_takes_are_refused() {
    let long = "x".repeat(256);
    let deep = "d/".repeat(2100);
    for (path, text) in
        [(long.as_bytes(), "255"), (deep.as_bytes(), "4096"), (b"a\0b", "NUL"), (b"./.", "root")]
    {
        let archive = Archive::new().pax(&[("path", path)]).file("short", "");
        let error = refused(&archive.end()).to_string();
        assert!(error.contains(text), "{error}");
    }
    assert!(matches!(problem(Archive::new().file("", "")).1, EntryProblem::EmptyPath));
}

#[test]
fn messages_show_names_without_control_characters() {
    let (name, _) = problem(Archive::new().file("evil\n\x1b[31m/../x", ""));
    assert_eq!(name, "evil\\n\\u{1b}[31m/../x");
}

#[test]
fn hard_links_to_nowhere_directories_and_outside_are_refused() {
    let base = || Archive::new().directory("d").file("f", "");
    let (name, nowhere) = problem(base().hard_link("l", "missing"));
    assert_eq!(name, "l");
    assert!(matches!(nowhere, EntryProblem::LinkToNowhere(target) if target == "missing"));
    assert!(matches!(problem(base().hard_link("l", "d")).1, EntryProblem::LinkToDirectory(_)));
    assert!(matches!(problem(base().hard_link("l", "/")).1, EntryProblem::LinkToDirectory(_)));
    assert!(matches!(problem(base().hard_link("l", "../../etc/passwd")).1, EntryProblem::LinkClimbsOut(_)));
    assert!(matches!(problem(base().hard_link("f", "./f")).1, EntryProblem::LinkToItself));
    assert!(matches!(
        problem(base().hard_link("a", "b").hard_link("b", "a")).1,
        EntryProblem::LinkToNowhere(_)
    ));
    // A whiteout is nothing to link to, and a link to a directory that comes later is none either.
    assert!(matches!(
        problem(base().file(".wh.w", "").hard_link("l", "w")).1,
        EntryProblem::LinkToNowhere(_)
    ));
    assert!(matches!(problem(base().hard_link("l", "x").directory("x")).1, EntryProblem::LinkToDirectory(_)));
}

#[test]
fn a_file_is_no_parent() {
    let (name, problem) = problem(Archive::new().file("f", "").file("f/x", ""));
    assert_eq!(name, "f/x");
    assert!(matches!(problem, EntryProblem::ParentNotDirectory));
}

/// CVE-2025-62518: a PAX size and a header size that readers skip by differently.
#[test]
fn tar_crates_2025_62518_disagreeing_sizes_are_refused() {
    let hidden = Archive::new().file("smuggled", "x").unended();
    let archive = Archive::new().pax(&[("size", b"1024")]).file("visible", "12345").raw(&hidden);
    assert!(matches!(problem(archive).1, EntryProblem::SizesDisagree { pax: 1024, header: 5 }));
    // An empty field is how writers leave a size that does not fit: the PAX size then decides what is content.
    let member = Member { size: 0, ..Member::new(b'0', "visible") };
    let archive = Archive::new().pax(&[("size", b"1024")]).raw(&member.header()).raw(&hidden).end();
    let (_, report) = super::converted(&archive);
    assert_eq!((report.entries, report.content), (1, 1024));
}

#[test]
fn content_on_entries_without_content_is_refused() {
    for typeflag in [b'2', b'3', b'4', b'5', b'6'] {
        let member = Member { link: b"t", size: 512, ..Member::new(typeflag, "e") };
        let archive = Archive::new().raw(&member.header()).raw(&Archive::new().file("hidden", "").unended());
        assert!(matches!(problem(archive).1, EntryProblem::UnexpectedContent(512)));
    }
}

#[test]
fn ambiguous_headers_are_refused() {
    malformed(Archive::new().pax(&[("path", b"a")]).pax(&[("path", b"b")]).file("c", "").end());
    malformed(Archive::new().long(b'L', "a").long(b'L', "b").file("c", "").end());
    malformed(Archive::new().global(&[("size", b"5")]).file("c", "").end());
    malformed(Archive::new().global(&[("path", b"p")]).file("c", "").end());
    let both = Archive::new().pax(&[("path", b"a")]).long(b'L', "b").file("c", "");
    assert!(matches!(problem(both).1, EntryProblem::AmbiguousHeaders));
}

#[test]
fn what_is_no_archive_is_refused() {
    malformed(vec![b'x'; 2048]);
    malformed(b"<html>not found</html>".repeat(50));
    let mut flipped = Archive::new().file("a", "").end();
    flipped[0] ^= 1;
    malformed(flipped);
    // One zero block, then more: readers disagree whether that was the end.
    malformed(Archive::new().raw(&[0; 512]).file("hidden", "").end());
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    let set = |range: std::ops::Range<usize>, bytes: &[u8]| {
        let mut header = Member::new(b'0', "f").header();
        header[range].copy_from_slice(bytes);
        seal(&mut header);
        Archive::new().raw(&header).end()
    };
    malformed(set(124..136, b"-0000000001\0"));
    malformed(set(124..136, &[0xff; 12]));
    malformed(set(136..148, b"yesterday!!!"));
    malformed(set(100..108, b"rwxr-xr-"));
    for uid in [&b"4294967295"[..], b"4294967296", b"18446744073709551615", b"-1"] {
        let archive = Archive::new().pax(&[("uid", uid)]).file("f", "");
        assert!(matches!(problem(archive).1, EntryProblem::BadId("uid", _)));
    }
}

#[test]
fn unknown_types_are_refused() {
    for typeflag in [b'M', b'N', b'Z', b'8', 0xff] {
        assert!(matches!(
            problem(Archive::new().member(Member::new(typeflag, "f"), b"")).1,
            EntryProblem::UnsupportedType(_)
        ));
    }
}

#[test]
fn symbolic_link_targets_are_bounded() {
    assert!(matches!(problem(Archive::new().symlink("l", "")).1, EntryProblem::BadSymlinkTarget));
    let long = vec![b'x'; 4096];
    let archive = Archive::new().pax(&[("linkpath", &long)]).symlink("l", "x");
    assert!(matches!(problem(archive).1, EntryProblem::BadSymlinkTarget));
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let inline = |map: &str, size: &str| {
        let content = [map.as_bytes(), &vec![0; 512_usize.saturating_sub(map.len())], b"12345"].concat();
        Archive::new()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.realsize", size.as_bytes()),
            ])
            .file("s", content)
    };
    for (map, size) in [
        ("1\n0\n6\n", "100"),
        ("1\n99\n5\n", "100"),
        ("2\n10\n2\n5\n3\n", "100"),
        ("1\n18446744073709551615\n5\n", "100"),
        ("x\n", "100"),
        ("900\n", "100"),
    ] {
        assert!(matches!(problem(inline(map, size)).1, EntryProblem::BadSparseMap(_)), "{map:?}");
    }
    // More segments than allowed are refused before they are read.
    assert!(matches!(refused(&inline("99999999\n", "100").end()), LayerError::Limit { .. }));
    let text_map =
        Archive::new().pax(&[("GNU.sparse.map", b"0,3,2,2"), ("GNU.sparse.size", b"9")]).file("s", "12345");
    assert!(matches!(problem(text_map).1, EntryProblem::BadSparseMap(_)));
    let on_directory = Archive::new().pax(&[("GNU.sparse.realsize", b"9")]).directory("s");
    assert!(matches!(problem(on_directory).1, EntryProblem::BadSparseMap(_)));
}

#[test]
fn truncation_anywhere_is_noticed() {
    let archive = Archive::new()
        .pax(&[("path", b"long"), ("mtime", b"1.5")])
        .file("a", vec![7; 3000])
        .long(b'L', "name")
        .file("b", "x")
        .unended();
    let mut clean_ends = 0;
    for length in (1..archive.len()).step_by(97).chain((512..archive.len()).step_by(512)) {
        match super::convert(&archive[..length], &tempfile::tempfile().unwrap(), &Limits::default()) {
            Err(LayerError::Truncated { .. }) => {}
            // Between two entries the archive could have ended; the digest knows better.
            Ok(_) => clean_ends += 1,
            Err(other) => panic!("at {length}: {other}"),
        }
    }
    assert_eq!(clean_ends, 1);
}

#[test]
fn endless_streams_end_at_the_limit() {
    let limits = Limits { max_uncompressed: 64 << 20, ..Limits::default() };
    let exceeded = |error| matches!(error, LayerError::Limit { what: "uncompressed bytes", .. });
    // Zeros after the end, a file that claims too much, and headers without end.
    assert!(exceeded(refused_with(io::repeat(0), &limits)));
    let huge = Member { size: 1 << 32, ..Member::new(b'0', "huge") };
    assert!(exceeded(refused_with(huge.header().chain(io::repeat(1)), &limits)));
    let few = Limits { max_entries: 1000, ..Limits::default() };
    let entry = Archive::new().directory("d").unended();
    let error = refused_with(entry.repeat(2000).as_slice(), &few);
    assert!(matches!(error, LayerError::Limit { what: "entries", limit: 1000 }));
}

#[test]
fn headers_and_attributes_are_bounded() {
    let limits = Limits { max_extended_header: 1000, ..Limits::default() };
    let archive = Archive::new().pax(&[("comment", &[b'x'; 2000])]).file("f", "").end();
    assert!(matches!(refused_with(archive.as_slice(), &limits), LayerError::Limit { .. }));
    // A header that claims an exabyte is refused before anything is allocated for it.
    let mut header = Member::new(b'x', "pax").header();
    header[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    seal(&mut header);
    assert!(matches!(refused(&header), LayerError::Limit { .. }));
    let value = vec![b'v'; 60_000];
    let archive =
        Archive::new().pax(&[("SCHILY.xattr.user.a", &value), ("SCHILY.xattr.user.b", &value)]).file("f", "");
    assert!(matches!(problem(archive).1, EntryProblem::TooManyXattrs(_)));
    // Global headers apply to every entry and are bounded together.
    let mut archive = Archive::new();
    for name in ["SCHILY.xattr.user.a", "SCHILY.xattr.user.b"] {
        archive = archive.global(&[(name, &value)]);
    }
    assert!(matches!(refused(&archive.file("f", "").end()), LayerError::Limit { .. }));
    // A path of two thousand directories costs as many entries.
    let limits = Limits { max_entries: 1000, ..Limits::default() };
    let deep = "d/".repeat(2000);
    let archive = Archive::new().pax(&[("path", deep.as_bytes())]).directory("d").end();
    assert!(matches!(refused_with(archive.as_slice(), &limits), LayerError::Limit { .. }));
}

#[test]
fn links_upon_links_cannot_ask_for_endless_work() {
    // Each entry's way leads through forty links with two thousand components each.
    let target = "./".repeat(2000);
    let mut archive = Archive::new();
    for number in 0..39 {
        let target = format!("{target}l{}", number + 1);
        archive = archive.pax(&[("linkpath", target.as_bytes())]).symlink(&format!("l{number}"), "x");
    }
    archive = archive.directory("l39");
    for number in 0..10_000 {
        archive = archive.file(&format!("l0/d{number}/f"), "");
    }
    assert!(matches!(refused(&archive.end()), LayerError::Limit { .. }));
    let mut backwards = Archive::new();
    for number in 0..10_000 {
        backwards = backwards.hard_link(&format!("l{number}"), &format!("l{}", number + 1));
    }
    assert!(matches!(refused(&backwards.file("l10000", "").end()), LayerError::Limit { .. }));
}

/// Random damage to a good archive never panics, and what is accepted is a sound image. HULL_LAYER_DAMAGE sets the
/// number of attempts.
#[test]
fn damaged_archives_are_refused_or_become_sound_images() {
    let attempts = std::env::var("HULL_LAYER_DAMAGE").map_or(2000, |value| value.parse().unwrap());
    let good = Archive::new()
        .pax(&[("path", b"p"), ("SCHILY.xattr.user.a", b"b"), ("mtime", b"1.5")])
        .file("a", vec![1; 700])
        .directory("d")
        .symlink("d/l", "../p")
        .hard_link("h", "p")
        .file("d/.wh.x", "")
        .long(b'L', "a-long-name")
        .file("c", "content")
        .end();
    let limits = Limits { max_uncompressed: 1 << 20, max_content: 1 << 22, ..Limits::default() };
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for attempt in 0..attempts {
        let mut damaged = good.clone();
        for _ in 0..1 + next() % 4 {
            let at = next() % damaged.len();
            damaged[at] = next() as u8;
            // With a right checksum the damage gets further.
            let block = at / 512 * 512;
            let header: &mut [u8; 512] = (&mut damaged[block..block + 512]).try_into().unwrap();
            if header[257..262] == *b"ustar" {
                seal(header);
            }
        }
        let (file, scratch) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let target = Target { layer: &file, scratch: Some(&scratch) };
        if let Ok(converted) = super::convert(damaged.as_slice(), target, &limits) {
            assert_eq!(super::turned_back(&file, &converted).unwrap(), damaged);
            if attempt % 8 == 0 {
                fsck(&file);
            }
        }
    }
}
