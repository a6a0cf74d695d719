//! One layer, three readers: the file system it was packed from, this machine's kernel and a guest's.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::Path;
use std::process::Command;

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::microvm::available;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// Everything about the tree in the working directory that all file systems must agree on. Sizes and links of directories
/// are their own affair.
const LOOK: &str = r#"
export PATH=/bin:/usr/bin
busybox find . -type d -exec busybox stat -c '%n %f %u %g %y' {} + | busybox sort
busybox find . ! -type d -exec busybox stat -c '%n %f %u %g %s %y %t %T %h' {} + | busybox sort
busybox find . -type f -exec busybox sha256sum {} + | busybox sort
busybox find . -type l | busybox sort | while read -r link; do echo "$link -> $(busybox readlink "$link")"; done
exec perl -e '
    sub look {
        my ($path) = @_;
        my $names = "\0" x 65536;
        my $length = syscall(195, $path, $names, 65536);
        for my $name (sort split /\0/, substr($names, 0, $length)) {
            my $value = "\0" x 65536;
            my $size = syscall(192, $path, $name, $value, 65536);
            print "$path $name ", unpack("H*", substr($value, 0, $size)), "\n";
        }
        return if -l $path or not -d $path;
        opendir(my $directory, $path) or die "$path: $!";
        look("$path/$_") for sort grep { $_ ne "." and $_ ne ".." } readdir $directory;
    }
    look(".")'
"#;

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// What layouts of inodes, directories and attributes depend on: sizes around blocks, links, devices, owners, times.
fn grow(root: &Path) {
    let at = |name: &str| root.join(name);
    for (number, size) in
        [0, 1, 60, 2000, 3070, 4032, 4095, 4096, 4097, 8192, 12_345, 100_000, 1_048_581].iter().enumerate()
    {
        fs::write(at(&format!("file-{size}")), noise(*size, number as u64 + 1)).unwrap();
    }
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(20 << 20).unwrap();
    for place in [0, 5 << 20, (20 << 20) - 7] {
        sparse.write_all_at(b"island!", place).unwrap();
    }
    fs::create_dir(at("many")).unwrap();
    for number in 0..1500 {
        fs::write(at(&format!("many/entry-number-{number}")), format!("{number}\n")).unwrap();
    }
    let mut deep = at("deep");
    for level in 0..30 {
        deep = deep.join(format!("level-{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "down here\n").unwrap();
    fs::hard_link(at("file-8192"), at("deep/second-name")).unwrap();
    fs::hard_link(at("file-8192"), at("third-name")).unwrap();
    symlink("file-1", at("link")).unwrap();
    symlink("x/".repeat(1500), at("long-link")).unwrap();
    for (name, kind) in [("character", FileType::CharacterDevice), ("block", FileType::BlockDevice)] {
        let device = rustix::fs::makedev(4095, 0xf_ffff);
        rustix::fs::mknodat(CWD, at(name), kind, Mode::from(0o640), device).unwrap();
    }
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
    for (number, name) in ["file-60", "many", "deep/level-0", "sparse"].iter().enumerate() {
        let set = |key: &str, value: &[u8]| {
            rustix::fs::setxattr(at(name), key, value, XattrFlags::empty()).unwrap();
        };
        set("user.same", b"shared by all");
        set("user.own", &noise(300 * number, 77));
        lchown(at(name), Some(65_536 + number as u32), Some(3_000_000_000)).unwrap();
    }
    fs::set_permissions(at("file-60"), fs::Permissions::from_mode(0o6755)).unwrap();
    let mut capability = [0; 20];
    capability[..8].copy_from_slice(&[1, 0, 0, 2, 0, 4, 0, 0]);
    rustix::fs::setxattr(at("file-2000"), "security.capability", &capability, XattrFlags::empty()).unwrap();
    for (name, tv_sec, tv_nsec) in
        [("file-0", -5, 1), ("file-1", 0, 0), ("link", 4_000_000_000, 999_999_999), ("deep", 1, 123_456_789)]
    {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, at(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// The first line that differs tells more than two long texts.
fn same(seen: &str, expected: &str, reader: &str) {
    for (seen, expected) in seen.lines().zip(expected.lines()) {
        assert_eq!(seen, expected, "{reader}");
    }
    assert_eq!(seen.lines().count(), expected.lines().count(), "{reader}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_the_same_tree_for_both_kernels() {
    let daemon = Daemon::start().await;
    let work = tempfile::tempdir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir(&tree).unwrap();
    grow(&tree);
    let look = Command::new("/bin/sh").args(["-c", LOOK]).current_dir(&tree).output().unwrap();
    assert!(look.status.success(), "{}", String::from_utf8_lossy(&look.stderr));
    let expected = String::from_utf8(look.stdout).unwrap();
    assert!(expected.contains("security.capability 01000002") && expected.contains("user.own"), "{expected}");
    let mut pack = Command::new("tar");
    pack.args(["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "-cf"]);
    let packed = work.path().join("layer.tar");
    let status = pack.arg(&packed).arg("-C").arg(work.path()).arg("tree").status().unwrap();
    assert!(status.success());
    let layers = vec![
        (image::busybox_layer().finish(), Packing::Gzip),
        (image::perl_layer().finish(), Packing::Plain),
        (fs::read(&packed).unwrap(), Packing::Zstd),
        (Layer::default().file("other", 0o644, b"").finish(), Packing::Gzip),
    ];
    let image = Image::from_tars(layers, serde_json::json!({"WorkingDir": "/tree"}));
    let registry = Registry::start();
    let name = registry.push("team/tree", "1", &image);
    daemon.pull(&name).await;

    let readers: &[&str] = match available(&daemon).await {
        true => &["", "microvm"],
        false => &[""],
    };
    for handler in readers {
        let pod = Pod::try_run_by(&daemon, handler, networked_pod_config(&daemon, "reader")).await;
        let mut pod = pod.unwrap_or_else(|status| panic!("RunPodSandbox: {status}"));
        let container = container_config("reader", &name, &["/bin/sleep", "1000"]);
        let container = pod.start(container).await;
        same(&pod.shell(&container, LOOK).await, &expected, &format!("by the handler {handler:?}"));
        pod.stop().await;
        pod.remove().await;
    }
    daemon.finish().await;
}
