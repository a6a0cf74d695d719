//! What the kernel shows of an image, in a mount namespace that lasts for one look.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use hull_sys::namespace::{Namespaces, unshare, unshare_filesystem_attributes};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use sha2::{Digest, Sha256};

/// All that can be seen of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// 0 for directories: it is each file system's own affair.
    pub(super) size: u64,
    pub(super) mtime: (i64, i64),
    /// 0 for directories.
    pub(super) links: u64,
    pub(super) device: u64,
    /// A symbolic link's target or the SHA-256 of a file's content.
    pub(super) content: Vec<u8>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode, in byte order.
    pub(super) same_as: Option<PathBuf>,
}

pub(super) type Tree = BTreeMap<PathBuf, Seen>;

/// Runs `fsck.erofs` over the file and all its contents.
pub(super) fn fsck(file: &File) {
    let mut command = Command::new("fsck.erofs");
    // Version 1.5 takes memory for each file as a whole: the contents of huge ones are left to the kernel.
    if file.metadata().unwrap().len() < 1 << 30 {
        command.arg("--extract");
    }
    let output =
        command.arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "fsck.erofs: {}: {text}", output.status);
}

/// Mounts the images, lowest first, alone or under an overlay, and looks at the result.
pub(super) fn with_mounted<T: Send>(images: &[&File], look: impl FnOnce(&Path) -> T + Send) -> T {
    with_mounted_below(images, None, look)
}

/// The same below a directory that is no image.
pub(super) fn with_mounted_below<T: Send>(
    images: &[&File],
    top: Option<&Path>,
    look: impl FnOnce(&Path) -> T + Send,
) -> T {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare_filesystem_attributes().unwrap();
            unshare(Namespaces::MOUNT).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            let layers: Vec<PathBuf> = (0..images.len()).map(|layer| base.join(layer.to_string())).collect();
            for (image, layer) in images.iter().zip(&layers) {
                fs::create_dir(layer).unwrap();
                mount_image(image, layer);
            }
            let root = if let ([only], None) = (layers.as_slice(), top) {
                only.clone()
            } else {
                let merged = base.join("merged");
                fs::create_dir(&merged).unwrap();
                let all = layers.iter().map(PathBuf::as_path).chain(top);
                let lower: Vec<&str> = all.rev().map(|layer| layer.to_str().unwrap()).collect();
                let options = std::ffi::CString::new(format!("lowerdir={}", lower.join(":"))).unwrap();
                rustix::mount::mount("overlay", &merged, "overlay", MountFlags::RDONLY, options.as_c_str())
                    .unwrap();
                merged
            };
            let result = look(&root);
            for mount in [&root].into_iter().chain(&layers) {
                let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH);
            }
            result
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

// By its descriptor's path: the test's files have no names.
fn mount_image(image: &File, target: &Path) {
    let source = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
    rustix::mount::mount(&source, target, "erofs", MountFlags::RDONLY, c"")
        .unwrap_or_else(|error| panic!("mounting an EROFS image at {}: {error}", target.display()));
}

/// Everything below `root` and `root` itself (as the empty path).
pub(super) fn snapshot(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut first: HashMap<u64, PathBuf> = HashMap::new();
    let mut open = vec![PathBuf::new()];
    let mut all = Vec::new();
    while let Some(path) = open.pop() {
        let full = root.join(&path);
        let metadata = match fs::symlink_metadata(&full) {
            // Overlayfs lists whiteouts of directories that only one layer has; there is nothing behind them.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata.unwrap(),
        };
        if metadata.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                open.push(path.join(entry.unwrap().file_name()));
            }
        }
        all.push(path);
    }
    all.sort();
    for path in all {
        let metadata = fs::symlink_metadata(root.join(&path)).unwrap();
        let mut seen = look(&root.join(&path), &metadata);
        if !metadata.is_dir() && metadata.nlink() > 1 {
            seen.same_as = Some(first.entry(metadata.ino()).or_insert_with(|| path.clone()).clone());
        }
        tree.insert(path, seen);
    }
    tree
}

fn look(path: &Path, metadata: &fs::Metadata) -> Seen {
    let kind = metadata.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    let content = if kind.is_symlink() {
        fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec()
    } else if kind.is_file() {
        let mut hash = Sha256::new();
        std::io::copy(&mut File::open(path).unwrap(), &mut HashWriter(&mut hash)).unwrap();
        hash.finalize().to_vec()
    } else {
        Vec::new()
    };
    Seen {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: if kind.is_dir() { 0 } else { metadata.size() },
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        links: if kind.is_dir() { 0 } else { metadata.nlink() },
        device: if is_device { metadata.rdev() } else { 0 },
        content,
        xattrs: xattrs(path),
        same_as: None,
    }
}

/// All extended attributes of a file, links not followed.
pub(super) fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}

struct HashWriter<'h>(&'h mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
