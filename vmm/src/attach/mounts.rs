use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};

use super::Reach;

/// The mounts that this process sees, as /proc/self/mountinfo lists them.
pub(super) struct Mounts(Vec<Mount>);

pub(super) struct Mount {
    id: u64,
    point: PathBuf,
    /// Type of the file system.
    pub(super) filesystem: String,
}

/// The number of the mount that the file is on.
pub(super) fn id_of(directory: BorrowedFd<'_>, path: &Path, flags: AtFlags) -> io::Result<u64> {
    // Nobody's server need be asked for that.
    let flags = flags | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(directory, path, flags, StatxFlags::MNT_ID)?;
    Ok(statx.stx_mnt_id)
}

/// The plain way to open a mount point; waits for its server for as long as that takes.
pub(super) fn open(point: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, point, flags, Mode::empty())?)
}

impl Mounts {
    pub(super) fn read() -> io::Result<Self> {
        Ok(Self(fs::read("/proc/self/mountinfo")?.split(|byte| *byte == b'\n').filter_map(parse).collect()))
    }

    /// The mount that the file is on.
    pub(super) fn of(&self, file: BorrowedFd<'_>) -> io::Result<&Mount> {
        let id = id_of(file, Path::new(""), AtFlags::EMPTY_PATH)?;
        self.0.iter().find(|mount| mount.id == id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Mounts below the directory that can be seen there (nothing else lies over them), opened, parents first, with
    /// their paths below it. One that does not answer is an error: without it the directory would not be what it is.
    pub(super) fn below(
        &self,
        directory: BorrowedFd<'_>,
        reach: Reach,
    ) -> io::Result<Vec<(PathBuf, OwnedFd)>> {
        let own = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        let mut found = Vec::new();
        for mount in &self.0 {
            let Ok(below) = mount.point.strip_prefix(&own) else { continue };
            if below.as_os_str().is_empty() {
                continue;
            }
            let opened = match reach(&mount.point) {
                Ok(opened) => opened,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
                // One that went away meanwhile, or lies under another, is not to be seen.
                Err(_) => continue,
            };
            if id_of(opened.as_fd(), Path::new(""), AtFlags::EMPTY_PATH).ok() == Some(mount.id) {
                found.push((below.to_owned(), opened));
            }
        }
        found.sort_by_key(|(path, _)| path.components().count());
        Ok(found)
    }
}

/// proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, `-`, type, …
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let point = unescape(fields.nth(3)?);
    fields.find(|field| *field == b"-")?;
    let filesystem = std::ffi::OsStr::from_bytes(fields.next()?).to_string_lossy().into_owned();
    Some(Mount { id, point, filesystem })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => bytes.push(*first),
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_number_place_and_type() {
        let line = br"36 35 98:0 /mnt1 /a\040b\134c rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.point.to_str().unwrap()), (36, r"/a b\c"));
        assert_eq!(mount.filesystem, "ext3");
        assert!(parse(b"").is_none());
        assert!(parse(b"x 1 2 3 4 5 - t").is_none());
        assert!(parse(b"1 2 3 4 5 6 7 8").is_none());
    }

    #[test]
    fn a_mount_below_that_does_not_answer_is_an_error_and_one_that_is_gone_is_not() {
        let mounts = Mounts::read().unwrap();
        let root = fs::File::open("/").unwrap();
        let silent: Reach = |_| Err(io::ErrorKind::TimedOut.into());
        let error = mounts.below(root.as_fd(), silent).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let gone: Reach = |_| Err(io::ErrorKind::NotFound.into());
        assert!(mounts.below(root.as_fd(), gone).unwrap().is_empty());
        let found = mounts.below(root.as_fd(), open).unwrap();
        assert!(found.iter().any(|(path, _)| path == Path::new("proc")), "{found:?}");
    }

    #[test]
    fn every_file_is_on_a_mount_that_is_listed() {
        let mounts = Mounts::read().unwrap();
        let proc = fs::File::open("/proc/version").unwrap();
        assert_eq!(mounts.of(proc.as_fd()).unwrap().filesystem, "proc");
    }
}
