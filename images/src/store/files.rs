//! The files of the store: where they are, how they come and go.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, fallocate};
use rustix::io::Errno;

use crate::layer::LayerId;

use super::error::StoreError;

/// Suffix of files that are being written or deleted.
const TEMPORARY: &str = ".tmp";

/// Bytes kept for changes of the index on a full disk: many times what a removal writes.
const RESERVE: u64 = 2 << 20;

/// The directories and files below ROOT.
pub(super) struct Files {
    images: PathBuf,
    layers: PathBuf,
    /// Held for the life of the store: one daemon per root.
    _lock: File,
    /// Temporary names in use by this process; every other one is a leftover.
    temporaries: Mutex<HashSet<OsString>>,
    counter: AtomicU64,
}

/// What a sweep found in the layers' directory.
pub(super) struct Leftover {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
}

impl Files {
    /// Makes the directories and takes the lock.
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        let images = root.join("images");
        let layers = root.join("layers");
        for directory in [root, images.as_path(), layers.as_path()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(failed("create", directory))?;
        }
        let path = images.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(StoreError::InUse(root.to_owned())),
            Err(error) => return Err(failed("lock", &path)(error.into())),
        }
        Ok(Self { images, layers, _lock: lock, temporaries: Mutex::default(), counter: AtomicU64::new(0) })
    }

    /// The directory whose filesystem kubelet watches.
    pub(super) fn images(&self) -> &Path {
        &self.images
    }

    /// The index file.
    pub(super) fn index(&self) -> PathBuf {
        self.images.join("index.redb")
    }

    /// Allocates the reserve if it is not there. A disk without room for it has none to give.
    pub(super) fn take_reserve(&self) {
        let path = self.images.join("reserve");
        if fs::metadata(&path).is_ok_and(|found| found.len() == RESERVE) {
            return;
        }
        let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path);
        let allocated = file.and_then(|file| Ok(fallocate(&file, FallocateFlags::empty(), 0, RESERVE)?));
        if let Err(error) = allocated {
            tracing::debug!(%error, "no room for the image index's reserve");
            let _ = fs::remove_file(&path);
        }
    }

    /// Frees the reserve. False if there was none.
    pub(super) fn give_up_reserve(&self) -> bool {
        fs::remove_file(self.images.join("reserve")).is_ok()
    }

    /// The directory of all layer files.
    pub(super) fn layers(&self) -> &Path {
        &self.layers
    }

    /// The file of a committed layer.
    pub(super) fn layer(&self, id: &LayerId) -> PathBuf {
        self.layers.join(format!("{}.erofs", id.hex()))
    }

    /// A fresh file for a layer that is being converted, with a name that begins like this.
    pub(super) fn create_temporary(self: &Arc<Self>, stem: &str) -> Result<(Temporary, File), StoreError> {
        let temporary = self.reserve(stem);
        let file = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&temporary.path)
            .map_err(failed("create", &temporary.path))?;
        Ok((temporary, file))
    }

    /// An empty file without a name on the layers' filesystem, for what does not fit into memory.
    pub(super) fn scratch(self: &Arc<Self>) -> Result<File, StoreError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(&self.layers, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(File::from(file)),
            // Filesystems that have no files without a name, and kernels that take the flag for a directory.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
                let (_, file) = self.create_temporary("scratch")?;
                Ok(file)
            }
            Err(errno) => Err(failed("make a temporary file in", &self.layers)(errno.into())),
        }
    }

    /// Takes a committed layer out of sight: after this it is a temporary file, deleted when the value is dropped.
    pub(super) fn withdraw(self: &Arc<Self>, id: &LayerId) -> Result<Option<Temporary>, StoreError> {
        let path = self.layer(id);
        let temporary = self.reserve(id.hex());
        match fs::rename(&path, &temporary.path) {
            Ok(()) => Ok(Some(temporary)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("rename", &path)(error)),
        }
    }

    /// Makes all renames in the layers' directory durable.
    pub(super) fn sync_layers(&self) -> Result<(), StoreError> {
        File::open(&self.layers)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("sync", &self.layers))
    }

    /// Files in the layers' directory that are neither in use as temporaries nor wanted.
    pub(super) fn leftovers(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Leftover>, StoreError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.layers).map_err(failed("read", &self.layers))? {
            let entry = entry.map_err(failed("read", &self.layers))?;
            let name = entry.file_name();
            let layer = name.to_str().and_then(|name| name.strip_suffix(".erofs"));
            let in_use = self.temporaries.lock().unwrap_or_else(PoisonError::into_inner).contains(&name);
            if in_use || layer.is_some_and(&wanted) {
                continue;
            }
            let bytes = entry.metadata().map(|metadata| metadata.blocks() * 512).unwrap_or(0);
            found.push(Leftover { path: entry.path(), bytes });
        }
        Ok(found)
    }

    /// Bytes and inodes that the store's files and directories occupy.
    pub(super) fn occupied(&self) -> Result<(u64, u64), StoreError> {
        let (mut bytes, mut inodes) = (0, 0);
        for directory in [&self.images, &self.layers] {
            let own = fs::metadata(directory).map_err(failed("read", directory))?;
            bytes += own.blocks() * 512;
            inodes += 1;
            for entry in fs::read_dir(directory).map_err(failed("read", directory))? {
                // Files come and go while this runs; one that is gone occupies nothing.
                if let Ok(metadata) = entry.and_then(|entry| entry.metadata()) {
                    bytes += metadata.blocks() * 512;
                    inodes += 1;
                }
            }
        }
        Ok((bytes, inodes))
    }

    fn reserve(self: &Arc<Self>, stem: &str) -> Temporary {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let name = OsString::from(format!("{stem}.{number}{TEMPORARY}"));
        self.temporaries.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        Temporary { path: self.layers.join(&name), name, files: self.clone(), keep: false }
    }
}

/// A file under a temporary name, deleted on drop unless it was kept.
pub(super) struct Temporary {
    path: PathBuf,
    name: OsString,
    files: Arc<Files>,
    keep: bool,
}

impl Temporary {
    /// Where it is until it has its final name.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its final name.
    pub(super) fn publish(&mut self, id: &LayerId) -> Result<(), StoreError> {
        let path = self.files.layer(id);
        fs::rename(&self.path, &path).map_err(failed("rename", &path))?;
        self.keep = true;
        Ok(())
    }

    /// Takes the final name away again: what it was published for did not happen.
    pub(super) fn unpublish(&mut self, id: &LayerId) {
        let path = self.files.layer(id);
        match fs::rename(&path, &self.path) {
            Ok(()) => self.keep = false,
            // The next start sweeps it.
            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot take a layer file back"),
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot delete a temporary layer file");
        }
        self.files.temporaries.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// For `map_err`: the store's error for a file.
pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File { action, path, source: Arc::new(source) }
}
