//! Random trees: what the kernel shows of a layer is what GNU tar extracts from its archive, whoever made it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::mounted::{fsck, snapshot, with_mounted};
use crate::layer::{Limits, Target, convert, rebuild};

/// More cases than the default with HULL_LAYER_CASES; the first seed with HULL_LAYER_SEED.
#[test]
fn layers_of_random_trees_are_what_tar_extracts() {
    let variable = |name: &str, default| std::env::var(name).map_or(default, |value| value.parse().unwrap());
    let first: u64 = variable("HULL_LAYER_SEED", 1);
    for seed in first..first + variable("HULL_LAYER_CASES", 24) {
        compare(seed);
    }
}

fn compare(seed: u64) {
    let mut random = Random::new(seed);
    let work = tempfile::tempdir().unwrap();
    let (source, extracted) = (work.path().join("source"), work.path().join("extracted"));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&extracted).unwrap();
    grow(&mut random, &source);
    let archive = work.path().join("layer.tar");
    let packer = [Packer::GnuTar, Packer::Python, Packer::GnuTar, Packer::Hull][seed as usize % 4];
    packer.pack(&mut random, &source, &archive);
    let mut unpack = Command::new("tar");
    unpack.args(["--xattrs", "--xattrs-include=*", "--same-owner", "--numeric-owner", "-p", "-xf"]);
    run(unpack.arg(&archive).arg("-C").arg(&extracted));

    let image = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(work.path().join("layer.erofs"))
        .unwrap();
    let scratch = tempfile::tempfile().unwrap();
    let target = Target { layer: &image, scratch: Some(&scratch) };
    let converted = convert(File::open(&archive).unwrap(), target, &Limits::default()).unwrap();
    fsck(&image);
    let mut again = Vec::new();
    rebuild(&image, converted.size, converted.tar_split, &mut again).unwrap();
    assert!(again == fs::read(&archive).unwrap(), "seed {seed}: the layer does not lead back to its archive");
    let expected = snapshot(&extracted);
    let seen = with_mounted(&[&image], snapshot);
    // What an export holds of the root itself is nothing.
    let named = |path: &Path| packer != Packer::Hull || path != Path::new("");
    for (path, expected) in expected.iter().filter(|(path, _)| named(path)) {
        let seen = seen.get(path).unwrap_or_else(|| panic!("seed {seed}: {} is missing", path.display()));
        assert_eq!(seen, expected, "seed {seed}, {packer:?}: {}", path.display());
    }
    assert_eq!(seen.len(), expected.len(), "seed {seed}: the layer has more than the archive");
}

/// Who makes the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packer {
    GnuTar,
    /// Python's tarfile.
    Python,
    /// What `hull export` and `hull commit` do.
    Hull,
}

impl Packer {
    fn pack(self, random: &mut Random, source: &Path, archive: &Path) {
        match self {
            Self::GnuTar => gnu_tar(random, source, archive),
            Self::Python => {
                // Whole seconds: of a nanosecond it makes "1e-09", which GNU tar does not extract.
                let script = "import sys, tarfile\n\
                              def whole(entry):\n    entry.mtime = int(entry.mtime)\n    return entry\n\
                              with tarfile.open(sys.argv[2], 'w', format=int(sys.argv[3])) as archive:\n    \
                              archive.add(sys.argv[1], arcname='.', filter=whole)";
                // GNU_FORMAT and PAX_FORMAT.
                let format = ["1", "2"][random.below(2)];
                let mut python = Command::new("python3");
                python.env("LC_ALL", "C.UTF-8").args(["-c", script]).arg(source).arg(archive).arg(format);
                run(&mut python);
            }
            Self::Hull => {
                let out = std::io::BufWriter::new(File::create(archive).unwrap());
                let root = File::open(source).unwrap();
                hull_archive::write_tree(root.as_fd(), out, &hull_archive::Options::default()).unwrap();
            }
        }
    }
}

fn gnu_tar(random: &mut Random, source: &Path, archive: &Path) {
    let format = ["pax", "gnu", "pax", "posix"][random.below(4)];
    let mut pack = Command::new("tar");
    pack.arg(format!("--format={format}"));
    if format != "gnu" {
        pack.args(["--xattrs", "--xattrs-include=*"]);
        if random.chance(2) {
            pack.arg(
                ["--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"][random.below(3)],
            );
        }
    }
    if random.chance(2) {
        pack.arg("--sparse");
    }
    run(pack.arg("-cf").arg(archive).arg("-C").arg(source).arg("."));
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

// Directories, files of telling sizes, links, devices, attributes, strange names.
fn grow(random: &mut Random, root: &Path) {
    let mut directories = vec![root.to_owned()];
    let mut others: Vec<PathBuf> = Vec::new();
    for _ in 0..20 + random.below(120) {
        let parent = directories[random.below(directories.len())].clone();
        let path = parent.join(random.name());
        if path.symlink_metadata().is_ok() || path.as_os_str().len() > 3000 {
            continue;
        }
        match random.below(12) {
            0..=2 => {
                fs::create_dir(&path).unwrap();
                directories.push(path.clone());
            }
            3..=6 => write_file(random, &path),
            7 => {
                let length = [1, 20, 99, 100, 101, 500, 3500, 4095][random.below(8)];
                symlink(random.text(length), &path).unwrap();
            }
            8 | 9 if !others.is_empty() => {
                fs::hard_link(&others[random.below(others.len())], &path).unwrap();
            }
            10 => {
                let kind =
                    [FileType::CharacterDevice, FileType::BlockDevice, FileType::Fifo][random.below(3)];
                let device = rustix::fs::makedev(1 + random.below(4095) as u32, random.below(1 << 20) as u32);
                rustix::fs::mknodat(CWD, &path, kind, Mode::from(0o600), device).unwrap();
            }
            _ => write_file(random, &path),
        }
        decorate(random, &path);
        if !path.symlink_metadata().unwrap().is_dir() {
            others.push(path);
        }
    }
    // Times of directories last: making entries changes them.
    for directory in &directories {
        set_time(random, directory);
    }
}

fn write_file(random: &mut Random, path: &Path) {
    let file = File::create(path).unwrap();
    let size = match random.below(10) {
        0 => 0,
        1 => 4096,
        2 => 4096 * (1 + random.below(20)),
        3 => 4095 + random.below(3),
        4 => 3070 + random.below(6),
        5 => 4096 * random.below(5) + random.below(4096),
        6 => 100_000 + random.below(2_000_000),
        _ => random.below(3000),
    };
    if random.chance(6) {
        // Sparse: a few islands.
        file.set_len((size * 10) as u64).unwrap();
        for _ in 0..random.below(6) {
            let at = random.below(size * 10 + 1);
            let length = 1 + random.below(5000);
            let island = random.bytes(length);
            file.write_all_at(&island, at as u64).unwrap();
        }
    } else {
        file.write_all_at(&random.bytes(size), 0).unwrap();
    }
}

fn decorate(random: &mut Random, path: &Path) {
    let metadata = path.symlink_metadata().unwrap();
    let owner = |random: &mut Random| [0, 1000, 65_535, 65_536, 3_000_000_000][random.below(5)];
    if random.chance(3) {
        lchown(path, Some(owner(random)), Some(owner(random))).unwrap();
    }
    if !metadata.is_symlink() {
        fs::set_permissions(path, fs::Permissions::from_mode(random.below(0o10000) as u32)).unwrap();
        if random.chance(4) {
            let _ = chown(path, None, Some(5));
        }
    }
    if metadata.is_file() || metadata.is_dir() {
        for _ in 0..random.below(4) {
            let name = [&b"user.colour"[..], b"user.size", b"user.a=b", b"user.long"][random.below(4)];
            let length = [1, 4, 5, 300, 1500][random.below(5)];
            let value = if random.chance(2) { b"common".to_vec() } else { random.bytes(length) };
            // The file system below may have too little room for all of them.
            if name != b"user.a=b" {
                let _ = rustix::fs::setxattr(path, name, &value, XattrFlags::empty());
            }
        }
    }
    if metadata.is_file() && random.chance(6) {
        let mut capability = [0; 20];
        capability[..8].copy_from_slice(&[1, 0, 0, 2, 0, 4, 0, 0]);
        rustix::fs::setxattr(path, "security.capability", &capability, XattrFlags::empty()).unwrap();
    }
    set_time(random, path);
}

fn set_time(random: &mut Random, path: &Path) {
    let tv_sec = [0, 1_700_000_000, -5, 1, 4_000_000_000][random.below(5)];
    let time = Timespec { tv_sec, tv_nsec: [0, 1, 999_999_999, 123_456_789][random.below(4)] };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

// xorshift64*: the seed in a failure's message is enough to repeat it.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 20) as usize % bound
    }

    pub(super) fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }

    fn text(&mut self, length: usize) -> OsString {
        OsString::from_vec((0..length).map(|_| b"abcdefgh/.-_"[self.below(12)]).collect())
    }

    fn name(&mut self) -> OsString {
        const STRANGE: [&[u8]; 8] =
            [b"!", b"-dash", b"...", b" space ", "grün".as_bytes(), b"new\nline", b"\xff\xfe", b"..x"];
        let mut name = match self.below(8) {
            0 => STRANGE[self.below(8)].to_vec(),
            1 => vec![b'a' + self.below(26) as u8; [100, 101, 155, 255][self.below(4)]],
            _ => format!("{:x}", self.next() >> (8 * self.below(8))).into_bytes(),
        };
        name.truncate(255);
        OsString::from_vec(name)
    }
}
