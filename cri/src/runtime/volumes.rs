//! The directories of an image's VOLUMEs, filled with what the image has there.
//!
//! They are directories of the container's own rather than parts of its overlay, so that they are writable under a
//! read-only root and another overlay can be made on them. What the image has at the path is copied, layer by layer as
//! overlayfs would stack them. All steps are relative to descriptors and follow no link: the content is the image's,
//! and hostile.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use hull_images::{ImageStore, LayerId};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::{Error, Result};

/// Deepest tree that is copied.
const MAX_DEPTH: usize = 256;
/// Extended attributes worth keeping: file capabilities. Overlayfs's own must not be.
const KEPT_ATTRIBUTE: &CStr = c"security.capability";

/// Makes and fills the directories: `volumes` maps a path in the image to a name below `directory`. Blocks.
pub(super) fn fill(
    directory: &Path,
    volumes: &BTreeMap<String, String>,
    images: &ImageStore,
    layers: &[LayerId],
) -> Result<()> {
    let trees = images
        .layer_trees(layers)
        .map_err(|error| Error::Internal(format!("cannot mount the image's layers: {error}")))?;
    for (path, name) in volumes {
        fill_one(&directory.join(name), path, &trees).map_err(|error| {
            Error::Internal(format!("cannot copy what the image has at its VOLUME {path}: {error}"))
        })?;
    }
    Ok(())
}

fn fill_one(target: &Path, path: &str, trees: &[OwnedFd]) -> io::Result<()> {
    std::fs::create_dir(target)?;
    let target = File::open(target)?;
    rustix::fs::fchmod(&target, Mode::from_raw_mode(0o755))?;
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for tree in trees {
        if let Some(found) = descend(tree.as_fd(), &parts, target.as_fd())? {
            copy_directory(found.as_fd(), target.as_fd(), 0)?;
        }
    }
    Ok(())
}

/// Where a layer has the path, if it has it as a directory. What hides the layers below empties the target.
fn descend(tree: BorrowedFd<'_>, parts: &[&str], target: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut here = open_directory(tree, ".")?;
    for part in parts {
        let status = match rustix::fs::statat(&here, *part, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if kind(&status) != FileType::Directory {
            empty(target)?;
            return Ok(None);
        }
        here = open_directory(here.as_fd(), *part)?;
        if is_opaque(here.as_fd()) {
            empty(target)?;
        }
    }
    Ok(Some(here))
}

fn copy_directory(source: BorrowedFd<'_>, target: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("its directories are more than {MAX_DEPTH} deep")));
    }
    for entry in Dir::read_from(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(source, target, name, depth)?;
        }
    }
    let status = rustix::fs::fstat(source)?;
    copy_attributes(target, &status)
}

fn copy_entry(source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    let status = rustix::fs::statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = kind(&status);
    if kind != FileType::Directory {
        remove(target, name)?;
    }
    match kind {
        FileType::Directory => {
            let from = open_directory(source, name)?;
            let into = enter_or_make(target, name)?;
            if is_opaque(from.as_fd()) {
                empty(into.as_fd())?;
            }
            copy_directory(from.as_fd(), into.as_fd(), depth + 1)
        }
        FileType::RegularFile => copy_file(source, target, name, &status),
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(source, name, Vec::new())?;
            rustix::fs::symlinkat(link.as_c_str(), target, name)?;
            Ok(rustix::fs::chownat(target, name, owner(&status), group(&status), AtFlags::SYMLINK_NOFOLLOW)?)
        }
        FileType::Fifo => {
            rustix::fs::mknodat(target, name, FileType::Fifo, mode(&status), 0)?;
            Ok(rustix::fs::chownat(target, name, owner(&status), group(&status), AtFlags::SYMLINK_NOFOLLOW)?)
        }
        // Whiteouts have done their work; devices and sockets have no place in a volume.
        _ => Ok(()),
    }
}

fn copy_file(source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &CStr, status: &Stat) -> io::Result<()> {
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut from = File::from(rustix::fs::openat(source, name, read, Mode::empty())?);
    let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut into = File::from(rustix::fs::openat(target, name, write, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut from, &mut into)?;
    // Changing the owner drops file capabilities, so they come last.
    copy_attributes(into.as_fd(), status)?;
    let mut value = [0; 64];
    match rustix::fs::fgetxattr(&from, KEPT_ATTRIBUTE, &mut value[..]) {
        Ok(length) => {
            Ok(rustix::fs::fsetxattr(&into, KEPT_ATTRIBUTE, &value[..length], XattrFlags::empty())?)
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn copy_attributes(target: BorrowedFd<'_>, status: &Stat) -> io::Result<()> {
    rustix::fs::fchown(target, owner(status), group(status))?;
    rustix::fs::fchmod(target, mode(status))?;
    let time = Timespec { tv_sec: status.st_mtime, tv_nsec: status.st_mtime_nsec as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::futimens(target, &times)?)
}

fn owner(status: &Stat) -> Option<rustix::fs::Uid> {
    Some(rustix::fs::Uid::from_raw(status.st_uid))
}

fn group(status: &Stat) -> Option<rustix::fs::Gid> {
    Some(rustix::fs::Gid::from_raw(status.st_gid))
}

fn mode(status: &Stat) -> Mode {
    Mode::from_raw_mode(status.st_mode & 0o7777)
}

fn kind(status: &Stat) -> FileType {
    FileType::from_raw_mode(status.st_mode)
}

fn open_directory(at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, name, flags, Mode::empty())?)
}

fn enter_or_make(at: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    match open_directory(at, name) {
        Ok(found) => return Ok(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(_) => remove(at, name)?,
    }
    rustix::fs::mkdirat(at, name, Mode::RWXU)?;
    open_directory(at, name)
}

fn is_opaque(directory: BorrowedFd<'_>) -> bool {
    let mut value = [0; 4];
    rustix::fs::fgetxattr(directory, c"trusted.overlay.opaque", &mut value[..])
        .is_ok_and(|length| value[..length] == *b"y")
}

fn empty(directory: BorrowedFd<'_>) -> io::Result<()> {
    let names: Vec<_> = Dir::read_from(directory)?
        .map(|entry| Ok(entry?.file_name().to_owned()))
        .collect::<io::Result<_>>()?;
    names
        .iter()
        .filter(|name| ***name != *c"." && ***name != *c"..")
        .try_for_each(|name| remove(directory, name))
}

/// Removes an entry with all below it; a missing one is fine.
fn remove(at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    empty(open_directory(at, name)?.as_fd())?;
    Ok(rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    /// Layers are plain directories here: overlayfs's marks are the same on every filesystem.
    fn layers(directory: &Path, count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|number| {
                let path = directory.join(number.to_string());
                fs::create_dir_all(&path).unwrap();
                File::open(path).unwrap().into()
            })
            .collect()
    }

    #[test]
    fn a_volume_begins_with_what_the_stacked_layers_show() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let trees = layers(root, 3);
        fs::create_dir_all(root.join("0/data/sub")).unwrap();
        fs::write(root.join("0/data/kept"), "one").unwrap();
        fs::write(root.join("0/data/hidden"), "two").unwrap();
        fs::write(root.join("0/data/sub/old"), "three").unwrap();
        fs::create_dir_all(root.join("1/data/sub")).unwrap();
        let upper = File::open(root.join("1/data")).unwrap();
        rustix::fs::mknodat(&upper, "hidden", FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        let sub = File::open(root.join("1/data/sub")).unwrap();
        rustix::fs::fsetxattr(&sub, c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        fs::write(root.join("1/data/sub/new"), "four").unwrap();
        symlink("/etc/shadow", root.join("1/data/link")).unwrap();
        fs::create_dir_all(root.join("2/data")).unwrap();
        fs::set_permissions(root.join("2/data"), fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::chown(root.join("2/data"), Some(7), Some(8)).unwrap();

        let target = root.join("volume");
        fill_one(&target, "/data", &trees).unwrap();
        assert_eq!(fs::read_to_string(target.join("kept")).unwrap(), "one");
        assert!(!target.join("hidden").exists() && !target.join("sub/old").exists());
        assert_eq!(fs::read_to_string(target.join("sub/new")).unwrap(), "four");
        assert_eq!(fs::read_link(target.join("link")).unwrap(), Path::new("/etc/shadow"));
        let metadata = fs::metadata(&target).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o1777, 7, 8));
    }

    #[test]
    fn a_volume_at_a_link_reads_nothing_of_the_host() {
        // containerd CVE-2022-23648
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let trees = layers(root, 1);
        symlink("/etc", root.join("0/data")).unwrap();
        symlink("/", root.join("0/up")).unwrap();
        for (number, path) in ["/data", "/up/etc"].iter().enumerate() {
            let target = root.join(format!("volume-{number}"));
            fill_one(&target, path, &trees).unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "{path}");
        }
    }

    #[test]
    fn a_path_that_the_image_does_not_have_is_an_empty_directory() {
        let directory = tempfile::tempdir().unwrap();
        let trees = layers(directory.path(), 2);
        let target = directory.path().join("volume");
        fill_one(&target, "/not/there", &trees).unwrap();
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o755);
    }
}
