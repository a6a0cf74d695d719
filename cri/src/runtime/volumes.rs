//! The directories of an image's VOLUMEs, filled with what the image has there.
//!
//! They are directories of the container's own rather than parts of its overlay, so that they are writable under a
//! read-only root and another overlay can be made on them. What the image has at the path is copied, layer by layer as
//! overlayfs would stack them. All steps are relative to descriptors and follow no link: the content is the image's,
//! and hostile.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use hull_images::{Image, ImageStore, UpperDirectory};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::{Error, Result};

/// Deepest tree that is copied.
const MAX_DEPTH: usize = 256;
/// Most bytes of names that are remembered for hard links.
const MAX_LINKS: usize = 16 << 20;
/// Extended attributes worth keeping: file capabilities. Overlayfs's own must not be.
const KEPT_ATTRIBUTE: &CStr = c"security.capability";

/// Makes and fills the directories: `volumes` maps a path in the image to a name below `directory`. Blocks.
pub(super) fn fill(
    directory: &Path,
    volumes: &BTreeMap<String, String>,
    images: &ImageStore,
    image: &Image,
) -> Result<()> {
    let trees = images
        .layer_trees(&image.layers)
        .map_err(|error| Error::Internal(format!("cannot mount the image's layers: {error}")))?;
    // One VOLUME may lie in another, so some content is copied twice. A hostile image would have it copied many times.
    let mut room = image.size.saturating_mul(2);
    for (path, name) in volumes {
        let target = directory.join(name);
        let filled = fill_one(&target, path, &trees, &mut room)
            .and_then(|()| correct(&target, path, &image.upper_directories));
        filled.map_err(|error| {
            Error::Internal(format!("cannot copy what the image has at its VOLUME {path}: {error}"))
        })?;
    }
    Ok(())
}

fn fill_one(target: &Path, path: &str, trees: &[OwnedFd], room: &mut u64) -> io::Result<()> {
    std::fs::create_dir(target)?;
    let target = File::open(target)?;
    rustix::fs::fchmod(&target, Mode::from_raw_mode(0o755))?;
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for tree in trees {
        if let Some(found) = descend(tree.as_fd(), &parts, target.as_fd())? {
            let mut copy =
                Copy { root: target.as_fd(), path: Vec::new(), linked: BTreeMap::new(), remembered: 0, room };
            copy.directory(found.as_fd(), target.as_fd(), 0)?;
        }
    }
    Ok(())
}

/// Gives directories that an upper layer only implies the attributes that the layers below name, as the container's own
/// root has them.
fn correct(target: &Path, path: &str, directories: &[UpperDirectory]) -> io::Result<()> {
    let parts: Vec<&[u8]> = components(path.as_bytes()).collect();
    for directory in directories {
        let names: Vec<&[u8]> = components(&directory.path).collect();
        let Some(below) = names.strip_prefix(parts.as_slice()) else { continue };
        let found = below
            .iter()
            .try_fold(OwnedFd::from(File::open(target)?), |at, name| open_directory(at.as_fd(), *name));
        let found = match found {
            Ok(found) => found,
            // Not a directory that was copied.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let (uid, gid) = (rustix::fs::Uid::from_raw(directory.uid), rustix::fs::Gid::from_raw(directory.gid));
        rustix::fs::fchown(&found, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&found, Mode::from_raw_mode(directory.mode.into()))?;
    }
    Ok(())
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}

/// The copy of one layer's part of a volume.
struct Copy<'a> {
    /// The volume's own directory.
    root: BorrowedFd<'a>,
    /// Where the copy is, below `root`.
    path: Vec<u8>,
    /// Files with several names: number of the inode → the first name, below `root`.
    linked: BTreeMap<u64, CString>,
    /// Bytes of these names.
    remembered: usize,
    /// Bytes that may still be copied.
    room: &'a mut u64,
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

impl Copy<'_> {
    fn directory(&mut self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other(format!("its directories are more than {MAX_DEPTH} deep")));
        }
        for entry in Dir::read_from(source)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                let length = self.path.len();
                if length > 0 {
                    self.path.push(b'/');
                }
                self.path.extend_from_slice(name.to_bytes());
                self.entry(source, target, name, depth)?;
                self.path.truncate(length);
            }
        }
        let status = rustix::fs::fstat(source)?;
        copy_attributes(target, &status)
    }

    fn entry(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        depth: usize,
    ) -> io::Result<()> {
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
                self.directory(from.as_fd(), into.as_fd(), depth + 1)
            }
            FileType::RegularFile => self.file(source, target, name, &status),
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(source, name, Vec::new())?;
                rustix::fs::symlinkat(link.as_c_str(), target, name)?;
                own(target, name, &status)
            }
            FileType::Fifo => {
                rustix::fs::mknodat(target, name, FileType::Fifo, mode(&status), 0)?;
                own(target, name, &status)
            }
            // Whiteouts have done their work; devices and sockets have no place in a volume.
            _ => Ok(()),
        }
    }

    /// A file with several names stays one: a million names of one large file would fill any disk.
    fn file(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        status: &Stat,
    ) -> io::Result<()> {
        if status.st_nlink > 1 {
            if let Some(first) = self.linked.get(&status.st_ino) {
                match rustix::fs::linkat(self.root, first, target, name, AtFlags::empty()) {
                    // It has all the names that the filesystem allows: the next ones are another file's.
                    Err(Errno::MLINK) => {}
                    result => return Ok(result?),
                }
            }
            self.remembered += self.path.len();
            if self.remembered > MAX_LINKS {
                return Err(io::Error::other("it has too many hard links"));
            }
            self.linked.insert(status.st_ino, CString::new(self.path.clone())?);
        }
        self.content(source, target, name, status)
    }

    fn content(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        status: &Stat,
    ) -> io::Result<()> {
        let size = u64::try_from(status.st_size).unwrap_or(0);
        let Some(rest) = self.room.checked_sub(size) else {
            return Err(io::Error::other("the VOLUMEs together are larger than the image"));
        };
        *self.room = rest;
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
}

fn own(target: BorrowedFd<'_>, name: &CStr, status: &Stat) -> io::Result<()> {
    Ok(rustix::fs::chownat(target, name, owner(status), group(status), AtFlags::SYMLINK_NOFOLLOW)?)
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

pub(super) fn open_directory(at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
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

pub(super) fn is_opaque(directory: BorrowedFd<'_>) -> bool {
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
        fill_one(&target, "/data", &trees, &mut 100).unwrap();
        assert_eq!(fs::read_to_string(target.join("kept")).unwrap(), "one");
        assert!(!target.join("hidden").exists() && !target.join("sub/old").exists());
        assert_eq!(fs::read_to_string(target.join("sub/new")).unwrap(), "four");
        assert_eq!(fs::read_link(target.join("link")).unwrap(), Path::new("/etc/shadow"));
        let metadata = fs::metadata(&target).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o1777, 7, 8));
    }

    #[test]
    fn directories_that_a_layer_only_implies_keep_their_attributes_in_a_volume() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let trees = layers(root, 1);
        fs::create_dir_all(root.join("0/var/lib/db/sub")).unwrap();
        let wanted = |path: &str, mode, owner| UpperDirectory {
            path: path.into(),
            mode,
            uid: owner,
            gid: owner + 1,
            xattrs: Vec::new(),
        };
        let wanted = [
            wanted("", 0o700, 9),
            wanted("var", 0o700, 9),
            wanted("var/lib/db", 0o1770, 70),
            wanted("var/lib/db/sub", 0o2750, 80),
            wanted("var/lib/db2", 0o700, 9),
            wanted("var/lib/db/gone", 0o700, 9),
        ];
        let target = root.join("volume");
        fill_one(&target, "/var/lib/db/", &trees, &mut 100).unwrap();
        correct(&target, "/var/lib/db/", &wanted).unwrap();
        let attributes = |path: &Path| {
            let found = fs::symlink_metadata(path).unwrap();
            (found.mode() & 0o7777, found.uid(), found.gid())
        };
        assert_eq!(attributes(&target), (0o1770, 70, 71));
        assert_eq!(attributes(&target.join("sub")), (0o2750, 80, 81));
        // A link is never followed out of the volume.
        symlink("/", target.join("gone")).unwrap();
        correct(&target, "/var/lib/db/", &wanted).unwrap_err();
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
            fill_one(&target, path, &trees, &mut 100).unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "{path}");
        }
    }

    #[test]
    fn a_file_with_many_names_is_copied_once() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let trees = layers(root, 2);
        fs::create_dir_all(root.join("0/data/sub")).unwrap();
        fs::write(root.join("0/data/one"), "sixty bytes".repeat(6)).unwrap();
        for name in ["two", "sub/three"] {
            fs::hard_link(root.join("0/data/one"), root.join("0/data").join(name)).unwrap();
        }
        // An upper layer's file of one of the names leaves the others alone.
        fs::create_dir_all(root.join("1/data")).unwrap();
        fs::write(root.join("1/data/two"), "new").unwrap();
        let target = root.join("volume");
        fill_one(&target, "/data", &trees, &mut 100).unwrap();
        let one = fs::metadata(target.join("one")).unwrap();
        assert_eq!((one.nlink(), one.ino()), (2, fs::metadata(target.join("sub/three")).unwrap().ino()));
        assert_eq!(fs::read_to_string(target.join("two")).unwrap(), "new");

        let refused = fill_one(&root.join("another"), "/data", &trees, &mut 50).unwrap_err();
        assert!(refused.to_string().contains("larger than the image"), "{refused}");
    }

    #[test]
    fn a_path_that_the_image_does_not_have_is_an_empty_directory() {
        let directory = tempfile::tempdir().unwrap();
        let trees = layers(directory.path(), 2);
        let target = directory.path().join("volume");
        fill_one(&target, "/not/there", &trees, &mut 100).unwrap();
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o755);
    }
}
