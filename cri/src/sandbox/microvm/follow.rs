//! Volumes that kubelet writes, copied into machines and followed: one inotify instance for all pods of the node.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hull_agent::protocol::messages::{WriteVolume, request};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::net::unix::pipe;

use super::machine::Machine;
use super::record::{Volume, VolumeKind};
use super::snapshot::Snapshot;
use crate::sandbox::SandboxError;

/// Name of a single file in its volume.
pub(super) const SINGLE: &str = "file";
/// kubelet writes a new generation in several steps; the last one is a rename.
const SETTLED: Duration = Duration::from_millis(50);

/// Follows volumes.
#[derive(Clone, Debug)]
pub(super) struct Follower(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// None: the machine has no more instances; then volumes are looked at from time to time only.
    inotify: Option<OwnedFd>,
    watched: Mutex<HashMap<i32, Watched>>,
}

#[derive(Debug)]
struct Watched {
    path: PathBuf,
    machines: Vec<Weak<Machine>>,
}

impl Follower {
    /// Begins to listen. Must be called inside the runtime.
    pub(super) fn start() -> Self {
        let opened = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let inotify = opened.inspect_err(
            |error| tracing::warn!(%error, "volumes of machines are looked at from time to time only"),
        );
        let follower = Self(Arc::new(Shared { inotify: inotify.ok(), watched: Mutex::default() }));
        if let Some(fd) = follower.0.inotify.as_ref().and_then(|fd| fd.try_clone().ok()) {
            let shared = Arc::downgrade(&follower.0);
            tokio::spawn(async move {
                if let Err(error) = listen(fd, shared).await {
                    tracing::warn!(%error, "cannot follow the volumes of machines");
                }
            });
        }
        follower
    }

    /// Copies the volume whenever it changes, as long as the machine is there.
    pub(super) fn follow(&self, machine: &Arc<Machine>, volume: &Volume) {
        let Some(inotify) = &self.0.inotify else { return };
        let flags = WatchFlags::MOVED_TO
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ONLYDIR;
        match inotify::add_watch(inotify, volume.host_path.as_str(), flags) {
            Ok(number) => {
                let mut watched = self.0.watched();
                let entry = watched.entry(number).or_insert_with(|| Watched {
                    path: PathBuf::from(&volume.host_path),
                    machines: Vec::new(),
                });
                entry.machines.retain(|one| one.strong_count() > 0);
                if !entry.machines.iter().any(|one| one.as_ptr() == Arc::as_ptr(machine)) {
                    entry.machines.push(Arc::downgrade(machine));
                }
            }
            Err(error) => tracing::warn!(
                path = volume.host_path, %error, "a volume is looked at from time to time only"
            ),
        }
    }

    /// Writes the volume into the machine as it is now, unless the machine has it so already.
    pub(super) async fn write(&self, machine: &Machine, volume: &Volume) -> Result<(), SandboxError> {
        write(machine, volume).await
    }

    /// Everything of the machine's that may have changed without anybody noticing; for hulld's start, and now and then.
    pub(super) async fn catch_up(&self, machine: &Arc<Machine>) {
        for volume in followed(machine, None) {
            self.follow(machine, &volume);
            bring_up_to_date(machine, &volume).await;
        }
    }
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, HashMap<i32, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The machine's volumes that are followed; of this path, if one is given.
fn followed(machine: &Machine, path: Option<&Path>) -> Vec<Volume> {
    let is_followed = |one: &&Volume| {
        one.kind() == VolumeKind::Copied
            && one.container.is_empty()
            && path.is_none_or(|path| Path::new(&one.host_path) == path)
    };
    machine.with_record(|record| record.volumes.iter().filter(is_followed).cloned().collect())
}

async fn bring_up_to_date(machine: &Machine, volume: &Volume) {
    match write(machine, volume).await {
        Ok(()) => {}
        // kubelet removes volumes only after their pod.
        Err(error) => {
            tracing::debug!(pod = machine.id, path = volume.host_path, %error, "a volume is not up to date");
        }
    }
}

async fn write(machine: &Machine, volume: &Volume) -> Result<(), SandboxError> {
    let mut written = machine.written().await;
    let path = PathBuf::from(&volume.host_path);
    let failed = SandboxError::host("copy the volume", path.clone());
    let taking = tokio::task::spawn_blocking(move || Snapshot::take(&path, SINGLE));
    let snapshot = taking.await.map_err(io::Error::other).and_then(|taken| taken).map_err(failed)?;
    let generation = snapshot.generation();
    if written.get(&volume.id) == Some(&generation) {
        return Ok(());
    }
    // Until the last piece is there nobody knows what the machine has.
    written.remove(&volume.id);
    let mut requests = snapshot.into_requests().into_iter().peekable();
    while let Some(entries) = requests.next() {
        let last = requests.peek().is_none();
        let call = WriteVolume { id: volume.id.clone(), generation, entries, last };
        machine.tell("write a volume", request::Call::WriteVolume(call)).await?;
    }
    written.insert(volume.id.clone(), generation);
    Ok(())
}

async fn listen(inotify: OwnedFd, shared: Weak<Shared>) -> io::Result<()> {
    // To tokio it is as good as a pipe: bytes come when it is readable.
    let inotify = pipe::Receiver::from_owned_fd_unchecked(inotify)?;
    let mut buffer = [0; 4096];
    loop {
        inotify.readable().await?;
        let mut changed = BTreeSet::new();
        loop {
            match inotify.try_read(&mut buffer) {
                Ok(length) => changed.extend(events(&buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        tokio::time::sleep(SETTLED).await;
        let Some(shared) = shared.upgrade() else { return Ok(()) };
        for (path, machines) in changed.iter().filter_map(|event| shared.take(event)) {
            for machine in machines {
                let path = path.clone();
                tokio::spawn(async move {
                    for volume in followed(&machine, Some(&path)) {
                        bring_up_to_date(&machine, &volume).await;
                    }
                });
            }
        }
    }
}

/// What happened to which watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Changed(i32),
    /// The watch ended with its directory.
    Ended(i32),
}

/// `struct inotify_event` (inotify(7)): number, mask, cookie, length of the name, name.
fn events(bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    let mut rest = bytes;
    while let Some((header, behind)) = rest.split_first_chunk::<16>() {
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let number = word(0).cast_signed();
        let ignored = ReadFlags::from_bits_retain(word(4)).contains(ReadFlags::IGNORED);
        events.push(if ignored { Event::Ended(number) } else { Event::Changed(number) });
        rest = behind.get(word(12) as usize..).unwrap_or_default();
    }
    events
}

impl Shared {
    /// Whom a change concerns. A watch that concerns nobody any more is given up.
    fn take(&self, event: &Event) -> Option<(PathBuf, Vec<Arc<Machine>>)> {
        let mut watched = self.watched();
        let number = match *event {
            Event::Changed(number) => number,
            Event::Ended(number) => {
                watched.remove(&number);
                return None;
            }
        };
        let entry = watched.get(&number)?;
        let machines: Vec<_> = entry.machines.iter().filter_map(Weak::upgrade).collect();
        if !machines.is_empty() {
            return Some((entry.path.clone(), machines));
        }
        watched.remove(&number);
        if let Some(inotify) = &self.inotify {
            // It may be gone with its directory.
            let _ = inotify::remove_watch(inotify, number);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_the_kernel_tells_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let number =
            inotify::add_watch(&fd, directory.path(), WatchFlags::CREATE | WatchFlags::MOVED_TO).unwrap();
        let receiver = pipe::Receiver::from_owned_fd_unchecked(fd).unwrap();
        std::fs::write(directory.path().join("a-name-of-some-length"), "").unwrap();
        std::fs::rename(directory.path().join("a-name-of-some-length"), directory.path().join("b")).unwrap();
        drop(directory);
        receiver.readable().await.unwrap();
        let mut buffer = [0; 4096];
        let length = receiver.try_read(&mut buffer).unwrap();
        assert_eq!(
            events(&buffer[..length]),
            [Event::Changed(number), Event::Changed(number), Event::Ended(number)]
        );
        assert_eq!(events(&[1; 20]), [Event::Changed(0x0101_0101)], "a cut one ends the list");
    }
}
