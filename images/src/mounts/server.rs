//! The thread that lives in the namespace of layer mounts.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::fs::{CWD, Mode, mkdir, statfs};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::layer::LayerId;

use super::error::MountError;
use super::namespace::Pin;

/// Magic number of EROFS (linux/magic.h).
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

/// A handle to the thread. Clones share it; it ends when the last is dropped.
#[derive(Clone)]
pub(super) struct Server {
    requests: Sender<Request>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

enum Request {
    /// A clone of each mount, None where the layer is not mounted.
    Clone { layers: Vec<LayerId>, reply: SyncSender<Result<Vec<Option<OwnedFd>>, MountError>> },
    /// Mounts a layer's detached file system.
    Attach { layer: LayerId, mount: OwnedFd, reply: SyncSender<Result<(), MountError>> },
    /// Unmounts layers; those that are not mounted are skipped.
    Unmount { layers: Vec<LayerId>, reply: SyncSender<Result<(), MountError>> },
    /// Ends the thread.
    Stop,
}

impl Server {
    /// Starts the thread in the pinned namespace, with the layers that are mounted there.
    pub(super) fn enter(namespace: OwnedFd, pin: &Pin) -> Result<Self, MountError> {
        let inside = pin.clone();
        let (server, ()) = Self::start(pin, move || {
            inside.enter(&namespace)?;
            let mounted = mounted_layers().map_err(inside.failed("list the mounts"))?;
            Ok((mounted, ()))
        })?;
        Ok(server)
    }

    /// Starts the thread in a new namespace and pins it.
    ///
    /// The kernel lets a namespace be pinned only in one with a smaller number (fs/namespace.c, mnt_ns_loop). Since
    /// Linux 6.18 processors take numbers in batches, so a newer namespace may have a smaller number than this daemon's,
    /// unless that is the machine's first. A namespace made on the processor where the daemon's own was made always has
    /// a greater one, hence one attempt for each.
    pub(super) fn create(pin: &Pin) -> Result<Self, MountError> {
        pin.prepare()?;
        let allowed = sched_getaffinity(None).map_err(pin.failed("list the processors"))?;
        let processors = (0..CpuSet::MAX_CPU).filter(|processor| allowed.is_set(*processor)).map(Some);
        let mut failure = MountError::Closed;
        for processor in std::iter::once(None).chain(processors) {
            match Self::create_on(processor, allowed, pin) {
                Err(MountError::Namespace { path, step: "pin", source: Errno::INVAL }) => {
                    failure = MountError::Namespace { path, step: "pin", source: Errno::INVAL };
                }
                other => return other,
            }
        }
        Err(failure)
    }

    /// Makes the namespace on one processor, or wherever the thread happens to run.
    fn create_on(processor: Option<usize>, allowed: CpuSet, pin: &Pin) -> Result<Self, MountError> {
        let inside = pin.clone();
        let (server, tid) = Self::start(pin, move || {
            if let Some(processor) = processor {
                let mut only = CpuSet::new();
                only.set(processor);
                sched_setaffinity(None, &only).map_err(inside.failed("choose a processor"))?;
            }
            inside.unshare_empty()?;
            sched_setaffinity(None, &allowed).map_err(inside.failed("choose all processors"))?;
            Ok((HashSet::new(), rustix::thread::gettid().as_raw_nonzero().get()))
        })?;
        match pin.set(tid) {
            Ok(()) => Ok(server),
            Err(error) => {
                server.stop();
                Err(error)
            }
        }
    }

    /// Starts the thread, waits until `set_up` has run on it, and hands on what `set_up` gave.
    fn start<T: Send + 'static>(
        pin: &Pin,
        set_up: impl FnOnce() -> Result<(HashSet<LayerId>, T), MountError> + Send + 'static,
    ) -> Result<(Self, T), MountError> {
        let (requests, receiver) = mpsc::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let body = move || match set_up() {
            Ok((mounted, value)) => {
                if ready.send(Ok(value)).is_ok() {
                    Mounts { mounted }.serve(&receiver);
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let thread = thread::Builder::new().name("layer-mounts".into()).spawn(body).map_err(|error| {
            pin.failed("start its thread")(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
        })?;
        let value = is_ready.recv().map_err(|_| MountError::Closed)??;
        Ok((Self { requests, thread: Arc::new(Mutex::new(Some(thread))) }, value))
    }

    /// Whether the thread still serves.
    pub(super) fn is_alive(&self) -> bool {
        super::lock(&self.thread).as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Clones of the layers' mounts, None for those that are not mounted.
    pub(super) fn clone_trees(&self, layers: Vec<LayerId>) -> Result<Vec<Option<OwnedFd>>, MountError> {
        self.ask(|reply| Request::Clone { layers, reply })
    }

    /// Mounts a detached file system as the layer.
    pub(super) fn attach(&self, layer: LayerId, mount: OwnedFd) -> Result<(), MountError> {
        self.ask(|reply| Request::Attach { layer, mount, reply })
    }

    /// Unmounts the layers.
    pub(super) fn unmount(&self, layers: Vec<LayerId>) -> Result<(), MountError> {
        self.ask(|reply| Request::Unmount { layers, reply })
    }

    /// Ends the thread and waits for it.
    pub(super) fn stop(self) {
        let _ = self.requests.send(Request::Stop);
        if let Some(thread) = super::lock(&self.thread).take() {
            let _ = thread.join();
        }
    }

    fn ask<T>(
        &self,
        request: impl FnOnce(SyncSender<Result<T, MountError>>) -> Request,
    ) -> Result<T, MountError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.requests.send(request(reply)).map_err(|_| MountError::Closed)?;
        answer.recv().map_err(|_| MountError::Closed)?
    }
}

/// What is mounted, as the thread knows it.
struct Mounts {
    mounted: HashSet<LayerId>,
}

impl Mounts {
    fn serve(mut self, requests: &Receiver<Request>) {
        // Whoever asked may have stopped waiting; a reply that nobody takes closes its descriptors.
        while let Ok(request) = requests.recv() {
            match request {
                Request::Clone { layers, reply } => drop(reply.send(self.clone_trees(&layers))),
                Request::Attach { layer, mount, reply } => drop(reply.send(self.attach(layer, &mount))),
                Request::Unmount { layers, reply } => drop(reply.send(self.unmount(&layers))),
                Request::Stop => return,
            }
        }
    }

    fn clone_trees(&self, layers: &[LayerId]) -> Result<Vec<Option<OwnedFd>>, MountError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = |layer: &LayerId| match self.mounted.contains(layer) {
            true => open_tree(CWD, place(layer), flags).map(Some).map_err(failed(layer, "open_tree")),
            false => Ok(None),
        };
        layers.iter().map(tree).collect()
    }

    fn attach(&mut self, layer: LayerId, mount: &OwnedFd) -> Result<(), MountError> {
        let place = place(&layer);
        match mkdir(place.as_str(), Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(&layer, "mkdir")(error)),
        }
        move_mount(mount.as_fd(), "", CWD, place.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed(&layer, "move_mount"))?;
        self.mounted.insert(layer);
        Ok(())
    }

    fn unmount(&mut self, layers: &[LayerId]) -> Result<(), MountError> {
        for layer in layers {
            if !self.mounted.remove(layer) {
                continue;
            }
            let place = place(layer);
            unmount(place.as_str(), UnmountFlags::DETACH).map_err(failed(layer, "umount"))?;
            // An empty directory of a tmpfs; it is used again should the layer come back.
            let _ = fs::remove_dir(&place);
        }
        Ok(())
    }
}

/// Where a layer is mounted inside the namespace.
fn place(layer: &LayerId) -> String {
    format!("/{}", layer.hex())
}

/// The layers that an earlier daemon mounted.
fn mounted_layers() -> Result<HashSet<LayerId>, Errno> {
    let failed = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let mut mounted = HashSet::new();
    for entry in fs::read_dir("/").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let layer =
            entry.file_name().to_str().and_then(|name| format!("sha256:{name}").parse::<LayerId>().ok());
        let is_mounted = statfs(entry.path()).is_ok_and(|found| found.f_type as u64 == EROFS_MAGIC);
        if let Some(layer) = layer.filter(|_| is_mounted) {
            mounted.insert(layer);
        }
    }
    Ok(mounted)
}

fn failed(layer: &LayerId, step: &'static str) -> impl FnOnce(Errno) -> MountError {
    let layer = layer.clone();
    move |source| MountError::Mount { layer, step, source, log: String::new() }
}
