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

use crate::digest::{Algorithm, Digest};
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
    /// Kept blobs in a directory for each algorithm, and those that are being written. Not there unless some were ever
    /// kept.
    blobs: PathBuf,
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

/// A file below the directory of kept blobs.
pub(super) struct BlobFile {
    /// What its name says that it is; None for what is no kept blob.
    pub(super) digest: Option<Digest>,
    pub(super) path: PathBuf,
    /// Bytes of disk that it occupies.
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
        let blobs = root.join("blobs");
        let (temporaries, counter) = (Mutex::default(), AtomicU64::new(0));
        Ok(Self { images, layers, blobs, _lock: lock, temporaries, counter })
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
        self.create_in(&self.layers, stem)
    }

    fn create_in(self: &Arc<Self>, directory: &Path, stem: &str) -> Result<(Temporary, File), StoreError> {
        let temporary = self.reserve(directory, stem);
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
        self.withdraw_file(&self.layer(id), self.reserve(&self.layers, id.hex()))
    }

    fn withdraw_file(&self, path: &Path, temporary: Temporary) -> Result<Option<Temporary>, StoreError> {
        match fs::rename(path, &temporary.path) {
            Ok(()) => Ok(Some(temporary)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("rename", path)(error)),
        }
    }

    /// Makes all renames in the layers' directory durable.
    pub(super) fn sync_layers(&self) -> Result<(), StoreError> {
        sync_directory(&self.layers)
    }

    /// Files in the layers' directory that are neither in use as temporaries nor wanted.
    pub(super) fn leftovers(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Leftover>, StoreError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.layers).map_err(failed("read", &self.layers))? {
            let entry = entry.map_err(failed("read", &self.layers))?;
            let name = entry.file_name();
            let layer = name.to_str().and_then(|name| name.strip_suffix(".erofs"));
            if self.is_in_use(&name) || layer.is_some_and(&wanted) {
                continue;
            }
            // A temporary file that went meanwhile is none.
            let Ok(metadata) = entry.metadata() else { continue };
            found.push(Leftover { path: entry.path(), bytes: metadata.blocks() * 512 });
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
        // Not there unless blobs were ever kept. The directories of the algorithms are entries of that of all.
        let mut kept: Vec<fs::Metadata> = fs::metadata(&self.blobs).into_iter().collect();
        for directory in self.blob_directories() {
            kept.extend(entries(&directory)?.iter().filter_map(|entry| entry.metadata().ok()));
        }
        bytes += kept.iter().map(|metadata| metadata.blocks() * 512).sum::<u64>();
        inodes += kept.len() as u64;
        Ok((bytes, inodes))
    }

    /// Makes the directories of kept blobs.
    pub(super) fn make_blob_directories(&self) -> Result<(), StoreError> {
        for directory in self.blob_directories() {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
            made.map_err(failed("create", &directory))?;
        }
        Ok(())
    }

    /// The file of a kept blob.
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.algorithm().name()).join(digest.encoded())
    }

    /// A fresh file for a blob that is being received.
    pub(super) fn create_blob(self: &Arc<Self>, digest: &Digest) -> Result<(Temporary, File), StoreError> {
        self.create_in(&self.blobs, digest.encoded())
    }

    /// Takes a kept blob out of sight, as [`Files::withdraw`] does with a layer.
    pub(super) fn withdraw_blob(self: &Arc<Self>, digest: &Digest) -> Result<Option<Temporary>, StoreError> {
        self.withdraw_file(&self.blob(digest), self.reserve(&self.blobs, digest.encoded()))
    }

    /// Makes the names of kept blobs durable.
    pub(super) fn sync_blobs(&self) -> Result<(), StoreError> {
        self.blob_directories()[1..].iter().try_for_each(|directory| sync_directory(directory))
    }

    /// All files below the directory of kept blobs but those in use as temporaries.
    pub(super) fn blobs(&self) -> Result<Vec<BlobFile>, StoreError> {
        let mut found = Vec::new();
        for directory in self.blob_directories() {
            let algorithm = directory.strip_prefix(&self.blobs).ok().and_then(Path::to_str);
            for entry in entries(&directory)? {
                let name = entry.file_name();
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if self.is_in_use(&name) || is_directory && directory == self.blobs {
                    continue;
                }
                let digest =
                    name.to_str().zip(algorithm).map(|(name, algorithm)| format!("{algorithm}:{name}"));
                let digest = digest.and_then(|digest| digest.parse().ok());
                // A temporary file that went meanwhile is none.
                let Ok(metadata) = entry.metadata() else { continue };
                found.push(BlobFile { digest, path: entry.path(), bytes: metadata.blocks() * 512 });
            }
        }
        Ok(found)
    }

    /// That of all blobs first.
    fn blob_directories(&self) -> [PathBuf; 3] {
        let of = |algorithm: Algorithm| self.blobs.join(algorithm.name());
        [self.blobs.clone(), of(Algorithm::Sha256), of(Algorithm::Sha512)]
    }

    fn is_in_use(&self, name: &OsString) -> bool {
        self.temporaries.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    fn reserve(self: &Arc<Self>, directory: &Path, stem: &str) -> Temporary {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let name = OsString::from(format!("{stem}.{number}{TEMPORARY}"));
        self.temporaries.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        Temporary { path: directory.join(&name), name, files: self.clone(), keep: false }
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

    /// Gives the file its final name as a layer.
    pub(super) fn publish(&mut self, id: &LayerId) -> Result<(), StoreError> {
        self.publish_as(&self.files.layer(id))
    }

    /// Gives the file its final name as a kept blob.
    pub(super) fn publish_blob(&mut self, digest: &Digest) -> Result<(), StoreError> {
        self.publish_as(&self.files.blob(digest))
    }

    fn publish_as(&mut self, path: &Path) -> Result<(), StoreError> {
        fs::rename(&self.path, path).map_err(failed("rename", path))?;
        self.keep = true;
        Ok(())
    }

    /// Takes the final name away again: what it was published for did not happen.
    pub(super) fn unpublish(&mut self, id: &LayerId) {
        self.unpublish_from(&self.files.layer(id));
    }

    /// The same for a kept blob, if it was published.
    pub(super) fn unpublish_blob(&mut self, digest: &Digest) {
        if self.keep {
            self.unpublish_from(&self.files.blob(digest));
        }
    }

    fn unpublish_from(&mut self, path: &Path) {
        match fs::rename(path, &self.path) {
            Ok(()) => self.keep = false,
            // The next start sweeps it.
            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot take a file back"),
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot delete a temporary file");
        }
        self.files.temporaries.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(failed("sync", path))
}

/// None of a directory that is not there.
fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.collect::<Result<_, _>>().map_err(failed("read", directory)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed("read", directory)(error)),
    }
}

/// For `map_err`: the store's error for a file.
pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File { action, path, source: Arc::new(source) }
}
