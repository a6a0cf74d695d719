//! What the guest is given, made by the usual tools.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes that no filesystem would make by itself: three quarters of a layer of this size.
pub(crate) fn content(layer: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..layer / 4 * 3 / 8).flat_map(|_| next()).collect()
}

/// An EROFS image of exactly `length` bytes at `path`, with [`content`] as a file, opened for reading.
pub(crate) fn layer(path: &Path, length: u64) -> File {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("directory")).unwrap();
    fs::write(tree.path().join("directory/content"), content(length)).unwrap();
    run(Command::new("mkfs.erofs").arg("--all-root").arg(path).arg(tree.path()));
    let file = File::options().write(true).open(path).unwrap();
    assert!(file.metadata().unwrap().len() <= length);
    file.set_len(length).unwrap();
    File::open(path).unwrap()
}

/// A sparse disk of `length` bytes with an ext4 at `range` (offset, length).
pub(crate) fn scratch(path: &Path, length: u64, range: (u64, u64)) -> File {
    let disk = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    disk.set_len(length).unwrap();
    let offset = format!("offset={},nodiscard,lazy_itable_init=1,lazy_journal_init=1", range.0);
    let mut command = Command::new("mke2fs");
    run(command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-E", &offset])
        .arg(path)
        .arg(format!("{}k", range.1 / 1024)));
    assert_eq!(disk.metadata().unwrap().len(), length);
    disk
}

/// Busybox, dmsetup with its libraries, and the script.
pub(crate) fn initramfs(tree: &Path) -> File {
    for directory in ["bin", "dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    symlink("busybox", tree.join("bin/sh")).unwrap();
    let dmsetup = ["/usr/sbin/dmsetup", "/sbin/dmsetup"].into_iter().find(|path| Path::new(path).exists());
    let dmsetup = dmsetup.expect("dmsetup is not installed");
    fs::copy(dmsetup, tree.join("bin/dmsetup")).unwrap();
    for library in
        run(Command::new("ldd").arg(dmsetup)).split_whitespace().filter(|word| word.starts_with('/'))
    {
        let to = tree.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(library, to).unwrap();
    }
    fs::copy(script(), tree.join("init")).unwrap();
    run(Command::new("chmod").arg("755").arg(tree.join("init")));
    let archive = tree.with_extension("cpio");
    let pack = format!("find . | busybox cpio -o -H newc > {}", archive.display());
    run(Command::new("sh").arg("-ec").arg(pack).current_dir(tree));
    File::open(archive).unwrap()
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/disks/init.sh")
}

/// As md5sum says it.
pub(crate) fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}
