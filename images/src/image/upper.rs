use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid, XattrFlags, fchmod, fchown, fsetxattr, mkdirat, openat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A directory that an image's layers cannot show as it should be: an upper layer has entries in it and does not name it,
/// and the directory that it has of necessity hides the attributes that a lower layer gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpperDirectory {
    /// Relative to the root, without `.`, `..` or empty components; empty for the root itself. At most 4096 bytes.
    pub path: Vec<u8>,
    /// Permission bits, those for set-id and sticky included.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
    /// Extended attributes, names and values: ACLs and `user.*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl UpperDirectory {
    /// Bytes of what is variable in it.
    pub(crate) fn bytes(&self) -> usize {
        self.path.len() + self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
    }
}

/// Makes the directories of [`Image::upper_directories`](super::Image::upper_directories) below `upper` in a container's
/// writable directory, which nobody else uses yet. Does nothing when there are none. Blocking; follows no link.
pub fn make_upper_directories(writable: BorrowedFd<'_>, directories: &[UpperDirectory]) -> io::Result<()> {
    if directories.is_empty() {
        return Ok(());
    }
    let upper = enter(writable, b"upper", true)?;
    for directory in directories {
        let mut at = upper.try_clone()?;
        let mut names = directory.path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).peekable();
        while let Some(name) = names.next() {
            at = enter(at.as_fd(), name, names.peek().is_none())?;
        }
        let (uid, gid) = (Uid::from_raw(directory.uid), Gid::from_raw(directory.gid));
        fchown(&at, Some(uid), Some(gid))?;
        fchmod(&at, Mode::from_raw_mode(u32::from(directory.mode)))?;
        for (name, value) in &directory.xattrs {
            match fsetxattr(&at, name.as_slice(), value, XattrFlags::empty()) {
                // A file system that has no such attributes; nothing copied there would keep them either.
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn enter(at: BorrowedFd<'_>, name: &[u8], make: bool) -> io::Result<OwnedFd> {
    if make {
        match mkdirat(at, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn directory(path: &str, mode: u16) -> UpperDirectory {
        UpperDirectory { path: path.into(), mode, uid: 5, gid: 6, xattrs: Vec::new() }
    }

    #[test]
    fn directories_are_made_with_their_attributes() {
        let place = tempfile::tempdir().unwrap();
        let writable = File::open(place.path()).unwrap();
        make_upper_directories(writable.as_fd(), &[]).unwrap();
        assert!(!place.path().join("upper").exists());
        let wanted = [directory("", 0o755), directory("var", 0o2750), directory("var/tmp", 0o1777)];
        make_upper_directories(writable.as_fd(), &wanted).unwrap();
        for directory in &wanted {
            let path = place.path().join("upper").join(str::from_utf8(&directory.path).unwrap());
            let found = fs::symlink_metadata(&path).unwrap();
            assert_eq!((found.mode() & 0o7777) as u16, directory.mode, "{path:?}");
            assert_eq!((found.uid(), found.gid()), (5, 6), "{path:?}");
        }
    }

    #[test]
    fn links_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("upper")).unwrap();
        symlink(elsewhere.path(), place.path().join("upper/link")).unwrap();
        let writable = File::open(place.path()).unwrap();
        for path in ["link", "link/made"] {
            make_upper_directories(writable.as_fd(), &[directory(path, 0o777)]).unwrap_err();
        }
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
