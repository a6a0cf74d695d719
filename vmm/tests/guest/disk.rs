//! Filesystems for a machine's disks, made by the usual tools.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use hull_agent::protocol::messages::Range;

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The tree as an EROFS image at `path`, open for reading.
pub(crate) fn erofs(tree: &Path, path: &Path) -> File {
    run(Command::new("mkfs.erofs").arg("--all-root").arg(path).arg(tree));
    let file = File::options().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len().next_multiple_of(4096);
    file.set_len(length).unwrap();
    File::open(path).unwrap()
}

/// A fresh ext4 in a range of `disk`.
pub(crate) fn ext4(disk: &File, range: &Range) {
    let mut template = tempfile::NamedTempFile::new().unwrap();
    template.as_file().set_len(range.length).unwrap();
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-E", "lazy_itable_init=0"])
        .arg(template.path()));
    let (mut block, mut offset) = (vec![0; 4096], range.offset);
    while template.read(&mut block).unwrap() == block.len() {
        if block.iter().any(|byte| *byte != 0) {
            disk.write_all_at(&block, offset).unwrap();
        }
        offset += block.len() as u64;
    }
}

/// A directory tree with busybox and all its applets, and these files beside.
pub(crate) fn busybox(tree: &Path, files: &[(&str, &str)]) {
    for directory in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let busybox = tree.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox).expect("/bin/busybox (Debian package busybox-static)");
    let applets = Command::new(&busybox).arg("--list").output().unwrap().stdout;
    for applet in String::from_utf8(applets).unwrap().lines().filter(|name| *name != "busybox") {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    for (path, content) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(path).unwrap().write_all(content.as_bytes()).unwrap();
    }
}

/// Compiles a C program, static, over whatever is at `path`.
pub(crate) fn compile(source: &str, path: &Path) {
    let _ = fs::remove_file(path);
    let mut compiler = Command::new("cc")
        .args(["-static", "-O1", "-x", "c", "-", "-o"])
        .arg(path)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("cc (Debian package gcc)");
    compiler.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    assert!(compiler.wait().unwrap().success());
}
