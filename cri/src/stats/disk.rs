//! What a container's writable layer occupies: counted in the background, one layer at a time, and remembered.
//!
//! The tree belongs to the container, which may change it while it is counted: directories are opened by descriptor,
//! symbolic links are never followed, and the way back up is taken only if it leads to where the way down came from.

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, open, openat, statat};

/// A layer is not counted more often than this.
const INTERVAL: Duration = Duration::from_secs(10);
/// Nor so often that counting takes more than this part of the time.
const SHARE: u32 = 50;
/// Entries of the first look, which a caller waits for so that a new container has a number at once.
const FIRST_LOOK: u64 = 64;
/// Entries that are counted at most; a layer with more is told as having at least these.
const MAX_ENTRIES: u64 = 4_000_000;
/// Hard-linked files that are told apart, and directories that wait to be entered: these cost memory.
const MAX_REMEMBERED: usize = 1_000_000;

/// What a tree occupies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupied {
    /// Blocks on the disk, in bytes.
    pub bytes: u64,
    /// Files, directories and all else, the top directory included.
    pub inodes: u64,
    /// False: there may be more, as counting was bounded or the tree changed meanwhile.
    pub complete: bool,
}

/// What a filesystem has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filesystem {
    /// The device as cAdvisor names it, e.g. `/dev/vda1`.
    pub device: String,
    /// Bytes in all.
    pub bytes: u64,
    /// Inodes in all; 0 where the filesystem makes them as needed.
    pub inodes: u64,
    /// Inodes left.
    pub free_inodes: u64,
}

impl Occupied {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            inodes: self.inodes.saturating_add(other.inodes),
            complete: self.complete && other.complete,
        }
    }
}

impl Filesystem {
    /// Of the filesystem that `path` is on.
    pub fn of(path: &Path) -> io::Result<Self> {
        let facts = rustix::fs::statvfs(path)?;
        let device = rustix::fs::stat(path)?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Ok(Self {
            device: device_name(major, minor),
            bytes: facts.f_blocks.saturating_mul(facts.f_frsize),
            inodes: facts.f_files,
            free_inodes: facts.f_ffree,
        })
    }
}

/// `/dev/NAME` of a block device; `MAJOR:MINOR` for one without a name.
pub fn device_name(major: u32, minor: u32) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link.ok().and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}

/// The remembered usage of one container's writable layer.
#[derive(Debug, Default)]
pub struct DiskUsage(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    known: Option<(i64, Occupied)>,
    next: Option<Instant>,
    busy: bool,
}

/// What to do now about a layer's usage.
#[derive(Debug, PartialEq, Eq)]
pub enum Need {
    /// What is known will do.
    Nothing,
    /// Count it in the background, and tell by [`DiskUsage::counted`].
    Count,
}

impl DiskUsage {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known, and when it was counted (nanoseconds since 1970).
    pub fn known(&self) -> Option<(i64, Occupied)> {
        self.lock().known
    }

    /// A first look at a layer of which nothing is known; `elsewhere` is what of it lies outside the directory. Blocks
    /// for a fraction of a millisecond.
    pub fn look(&self, directory: &Path, now: i64, elsewhere: impl FnOnce() -> Occupied) {
        if self.lock().known.is_none()
            && let Ok(occupied) = count(directory, FIRST_LOOK)
        {
            let occupied = occupied.and(elsewhere());
            self.lock().known.get_or_insert((now, occupied));
        }
    }

    /// Whether it should be counted; the answer [`Need::Count`] is given to one caller only. `final_since`: when the
    /// layer became what it will stay (its container's end), in nanoseconds since 1970.
    pub fn need(&self, final_since: Option<i64>) -> Need {
        let mut state = self.lock();
        let settled =
            state.known.zip(final_since).is_some_and(|((at, occupied), end)| occupied.complete && at > end);
        if state.busy || settled || state.next.is_some_and(|next| Instant::now() < next) {
            return Need::Nothing;
        }
        state.busy = true;
        Need::Count
    }

    /// Takes the result of a count that began at `at` and took `cost`.
    pub fn counted(&self, at: i64, cost: Duration, result: io::Result<Occupied>) {
        let mut state = self.lock();
        state.busy = false;
        state.next = Some(Instant::now() + INTERVAL.max(cost * SHARE));
        match result {
            Ok(occupied) => state.known = Some((at, occupied)),
            // The container was removed meanwhile, usually.
            Err(error) => tracing::debug!(%error, "cannot count what a writable layer occupies"),
        }
    }
}

/// Counts what is in `directory`, all of it. Blocks; a second for a few hundred thousand entries.
pub fn count_all(directory: &Path) -> io::Result<Occupied> {
    count(directory, MAX_ENTRIES)
}

/// A directory on the way down.
struct Level {
    /// Of the directory, to know it again.
    identity: (u64, u64),
    /// Directories in it that are still to be entered.
    waiting: Vec<CString>,
}

struct Count {
    occupied: Occupied,
    limit: u64,
    /// Hard-linked files that have been counted.
    linked: HashSet<(u64, u64)>,
    remembered: usize,
}

fn count(directory: &Path, limit: u64) -> io::Result<Occupied> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut current = open(directory, flags, Mode::empty())?;
    let top = fstat(&current)?;
    let mut count = Count {
        occupied: Occupied { complete: true, ..Occupied::default() },
        limit,
        linked: HashSet::new(),
        remembered: 0,
    };
    count.add(&top);
    let mut levels = vec![Level { identity: identity(&top), waiting: count.entries(&current)? }];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.waiting.pop() {
            count.remembered -= 1;
            let entered = openat(&current, &name, flags, Mode::empty()).and_then(|fd| Ok((fstat(&fd)?, fd)));
            // One that is gone, or has become something else, is not there any more.
            let Ok((stat, fd)) = entered else { continue };
            // Nothing is mounted in a layer; should something be, it is not the layer's.
            if stat.st_dev != top.st_dev {
                continue;
            }
            levels.push(Level { identity: identity(&stat), waiting: count.entries(&fd)? });
            current = fd;
        } else {
            levels.pop();
            let Some(above) = levels.last() else { break };
            let up = openat(&current, "..", flags, Mode::empty())?;
            if identity(&fstat(&up)?) != above.identity {
                // It was moved while it was counted; the rest is for the next time.
                count.occupied.complete = false;
                break;
            }
            current = up;
        }
        if count.is_full() {
            break;
        }
    }
    Ok(count.occupied)
}

impl Count {
    fn is_full(&mut self) -> bool {
        let full = self.occupied.inodes >= self.limit || self.remembered >= MAX_REMEMBERED;
        if full {
            self.occupied.complete = false;
        }
        full
    }

    fn add(&mut self, stat: &Stat) {
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_directory && stat.st_nlink > 1 {
            if self.linked.len() >= MAX_REMEMBERED {
                self.occupied.complete = false;
            } else if !self.linked.insert(identity(stat)) {
                return;
            }
        }
        self.occupied.inodes += 1;
        // stat(2): in units of 512 bytes, whatever the block size.
        self.occupied.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
    }

    /// Adds the entries of a directory, and returns the directories among them.
    fn entries(&mut self, directory: &OwnedFd) -> io::Result<Vec<CString>> {
        let mut directories = Vec::new();
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if self.is_full() {
                break;
            }
            let Ok(stat) = statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            self.add(&stat);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                directories.push(name.to_owned());
                self.remembered += 1;
            }
        }
        Ok(directories)
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn blocks_and_inodes_are_counted_once_and_links_lead_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::create_dir(at("d")).unwrap();
        fs::write(at("a/b/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(at("a/b/file"), at("d/again")).unwrap();
        std::os::unix::fs::symlink("/", at("a/root")).unwrap();
        let empty = count_all(&at("a/b/c")).unwrap();
        let occupied = count_all(directory.path()).unwrap();
        // The directory itself, a, b, c, d, the file once, the link.
        assert_eq!((occupied.inodes, occupied.complete), (7, true));
        assert!(occupied.bytes >= 100_000 && occupied.bytes < 100_000 + 7 * 8192, "{occupied:?}");
        assert_eq!((empty.inodes, empty.complete), (1, true));
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut current = open(directory.path(), flags, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&current, "deeper", Mode::from_raw_mode(0o755)).unwrap();
            current = openat(&current, "deeper", flags, Mode::empty()).unwrap();
        }
        let occupied = count_all(directory.path()).unwrap();
        assert_eq!((occupied.inodes, occupied.complete), (3001, true));
    }

    #[test]
    fn counting_is_bounded_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..100 {
            fs::create_dir(directory.path().join(number.to_string())).unwrap();
        }
        let occupied = count(directory.path(), 10).unwrap();
        assert_eq!((occupied.inodes, occupied.complete), (10, false));
    }

    #[test]
    fn a_layer_is_counted_by_one_and_not_again_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let usage = DiskUsage::default();
        usage.look(directory.path(), 5, || Occupied { complete: true, ..Occupied::default() });
        assert_eq!(usage.known().unwrap().1.inodes, 1);
        assert_eq!(usage.need(None), Need::Count);
        assert_eq!(usage.need(None), Need::Nothing, "somebody is at it");
        usage.counted(7, Duration::ZERO, count_all(directory.path()));
        assert_eq!(usage.need(None), Need::Nothing, "it was done just now");
        assert_eq!(usage.known().unwrap().0, 7);
    }

    #[test]
    fn an_ended_container_is_counted_once_after_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let usage = DiskUsage::default();
        assert_eq!(usage.need(Some(10)), Need::Count);
        usage.counted(11, Duration::ZERO, count_all(directory.path()));
        usage.lock().next = None;
        assert_eq!(usage.need(Some(10)), Need::Nothing);
        assert_eq!(usage.need(Some(12)), Need::Count);
    }

    #[test]
    fn a_filesystem_tells_its_size_and_device() {
        let filesystem = Filesystem::of(Path::new("/")).unwrap();
        assert!(filesystem.bytes > 0 && !filesystem.device.is_empty(), "{filesystem:?}");
    }
}
