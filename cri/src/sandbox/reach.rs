//! Reaching host paths behind which a dead server may be (NFS, FUSE): such an open waits for ever, and a thread that
//! waits in it cannot even be killed.
//!
//! What the kernel has in its caches is opened at once. Anything else, and everything below a mount of a remote file
//! system, is opened by a process of its own, which passes the descriptor back and is given up after a while. It holds
//! nothing of hulld's: an unkillable one keeps neither the lock nor a socket.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use hull_sys::descriptor::{recv_with_fds, send_with_fds};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How long a file system may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most processes that may hang at the same time.
const MOST_STUCK: usize = 64;
/// The name under which the program knows what it is started for.
const HELPER: &str = "hulld-reach";

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
static STUCK: Mutex<Vec<Child>> = Mutex::new(Vec::new());
static REMOTE: Mutex<Option<RemoteMounts>> = Mutex::new(None);

const PATH: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// To be called first by the program that hulld is: does the work of the helper if that is what it was started for.
/// From then on [`reach`] starts the same program when it has to.
pub fn serve_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    if arguments.next().as_deref() != Some(OsStr::new(HELPER)) {
        // The running program, even if its file has been replaced meanwhile.
        let _ = PROGRAM.set("/proc/self/exe".into());
        return None;
    }
    let Some(path) = arguments.next() else { return Some(ExitCode::from(2)) };
    let sent = match rustix::fs::open(&path, PATH, Mode::empty()) {
        Ok(file) => send_with_fds(rustix::stdio::stdin(), &0_i32.to_le_bytes(), &[file.as_fd()]),
        Err(errno) => send_with_fds(rustix::stdio::stdin(), &errno.raw_os_error().to_le_bytes(), &[]),
    };
    Some(if sent.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An `O_PATH` descriptor of `path`, links followed. `TimedOut` if its file system does not answer.
pub(super) fn reach(path: &Path) -> io::Result<OwnedFd> {
    if !is_remote(path) {
        match rustix::fs::openat2(CWD, path, PATH, Mode::empty(), ResolveFlags::CACHED) {
            Err(Errno::AGAIN) => {}
            opened => return Ok(opened?),
        }
    }
    match PROGRAM.get() {
        Some(program) => by_helper(program, path, PATIENCE),
        None => Ok(rustix::fs::open(path, PATH, Mode::empty())?),
    }
}

fn by_helper(program: &Path, path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    if stuck_processes() >= MOST_STUCK {
        return Err(io::Error::other("too many mount sources do not answer"));
    }
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(patience))?;
    let mut child = Command::new(program)
        .arg0(HELPER)
        .arg(path)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_clear()
        .current_dir("/")
        .spawn()?;
    let answer = receive(&ours);
    if answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
        // Waiting for its end could take as long as the open; it is reaped by and by.
        let _ = child.kill();
        STUCK.lock().unwrap_or_else(PoisonError::into_inner).push(child);
    } else {
        // It has answered, or has ended without an answer.
        child.wait()?;
    }
    answer
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let (mut bytes, mut fds) = ([0; 4], Vec::new());
    match recv_with_fds(socket.as_fd(), &mut bytes, &mut fds) {
        Ok(4) => match (i32::from_le_bytes(bytes), fds.pop()) {
            (0, Some(file)) => Ok(file),
            (errno, _) => Err(io::Error::from_raw_os_error(errno)),
        },
        Ok(_) => Err(io::Error::other("the process that was to open it ended without an answer")),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("its file system has not answered for {} seconds", PATIENCE.as_secs()),
        )),
        Err(error) => Err(error),
    }
}

/// How many still hang; reaps the others.
fn stuck_processes() -> usize {
    let mut stuck = STUCK.lock().unwrap_or_else(PoisonError::into_inner);
    stuck.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    stuck.len()
}

/// Mount points of file systems that somebody else serves. The root of such a mount may be asked for anew even if it
/// is cached (`d_weak_revalidate`), so a look into the caches is no protection there.
#[derive(Debug)]
struct RemoteMounts {
    table: fs::File,
    points: Vec<Vec<u8>>,
}

fn is_remote(path: &Path) -> bool {
    let mut known = REMOTE.lock().unwrap_or_else(PoisonError::into_inner);
    if known.is_none() {
        *known = fs::File::open("/proc/self/mountinfo")
            .ok()
            .map(|table| RemoteMounts { table, points: Vec::new() });
        if let Some(mounts) = &mut *known {
            mounts.read();
        }
    }
    // Without a table nothing could be mounted either.
    let Some(mounts) = &mut *known else { return false };
    if mounts.have_changed() {
        mounts.read();
    }
    mounts.points.iter().any(|point| path.starts_with(OsStr::from_bytes(point)))
}

impl RemoteMounts {
    /// proc_pid_mountinfo(5): a change of the table is told by POLLERR and POLLPRI.
    fn have_changed(&self) -> bool {
        let mut look = [PollFd::new(&self.table, PollFlags::PRI)];
        let told = poll(&mut look, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }));
        told.is_ok_and(|count| count > 0)
    }

    fn read(&mut self) {
        let mut text = Vec::new();
        let read = self.table.seek(SeekFrom::Start(0)).and_then(|_| self.table.read_to_end(&mut text));
        if let Err(error) = read {
            tracing::debug!(%error, "cannot read the mount table");
        }
        self.points = remote_points(&text);
    }
}

fn remote_points(table: &[u8]) -> Vec<Vec<u8>> {
    let lines = table.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| {
        let separator = line.windows(3).position(|window| window == b" - ")?;
        let kind = line[separator + 3..].split(|byte| *byte == b' ').next()?;
        let point = line.split(|byte| *byte == b' ').nth(4)?;
        is_remote_kind(kind).then(|| unescape(point))
    });
    points.collect()
}

fn is_remote_kind(kind: &[u8]) -> bool {
    let known: [&[u8]; 11] =
        [b"nfs", b"nfs4", b"9p", b"ceph", b"cifs", b"smb3", b"afs", b"fuse", b"fuseblk", b"lustre", b"gpfs"];
    known.contains(&kind) || kind.starts_with(b"fuse.")
}

/// Undoes the octal escapes of the table.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                after
            }
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_reached_and_what_is_not_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let file = reach(directory.path()).unwrap();
        let (there, found) = (fs::metadata(directory.path()).unwrap(), rustix::fs::fstat(&file).unwrap());
        assert_eq!(std::os::unix::fs::MetadataExt::ino(&there), found.st_ino);
        let missing = reach(&directory.path().join("missing")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_helper_that_never_answers_is_given_up_and_reaped() {
        // Ignores its argument, reads what never comes.
        let error = by_helper(Path::new("/bin/cat"), Path::new("-"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        while stuck_processes() > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let error = by_helper(Path::new("/bin/true"), Path::new("-"), PATIENCE).unwrap_err();
        assert!(error.to_string().contains("without an answer"), "{error}");
    }

    #[test]
    fn mounts_of_others_are_told_by_their_kind() {
        let table = b"22 1 0:1 / / rw - ext4 /dev/sda rw\n\
            23 22 0:2 / /mnt/a\\040b rw shared:1 - nfs4 server:/x rw\n\
            24 22 0:3 / /mnt/c rw - fuse.sshfs x rw\n25 22 0:4 / /t rw - tmpfs t rw\n";
        assert_eq!(remote_points(table), [b"/mnt/a b".to_vec(), b"/mnt/c".to_vec()]);
        assert!(!is_remote(Path::new("/proc/self")));
    }
}
