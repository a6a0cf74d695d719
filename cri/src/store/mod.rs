//! Records of pods and containers on disk: one small file for each, replaced by renaming.
//!
//! A record is written before the effect that it describes and is not flushed: what a power cut tears is an orphan,
//! noticed by its checksum, reported once and swept. `ROOT/state/sandboxes/ID` and `ROOT/state/containers/ID`.
//!
//! An object that is older than that must not be lost, for a stopped container can be started again with what it has
//! written. Where renaming does not flush what is renamed (XFS), a power cut soon after leaves an empty file in place of
//! both records. So one that has been there for long enough to be on the disk is kept as `ID~` when another takes its
//! place, until the next one that has; it stands in for a torn one.

pub mod frame;
pub mod record;

use std::fs;
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;

use self::record::{ContainerRecord, SandboxRecord};

/// After so long, a file that was written is on the disk: the kernel writes what is older than half a minute
/// (Documentation/admin-guide/sysctl/vm.rst, dirty_expire_centisecs), and journals are as quick.
const SETTLED: Duration = Duration::from_secs(120);

/// Why a record could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The filesystem refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The record cannot be written down.
    #[error("cannot encode the record {id}: {source}")]
    Encode {
        /// Of which object.
        id: String,
        /// Why not.
        source: frame::FrameError,
    },
}

/// A kind of record with an id.
pub trait Record: Message + Default {
    /// 64 hex digits; the file's name.
    fn id(&self) -> &str;
}

impl Record for SandboxRecord {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Record for ContainerRecord {
    fn id(&self) -> &str {
        &self.id
    }
}

/// True for the ids that hull gives: 64 lower-case hex digits.
pub fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The records of one kind.
#[derive(Debug)]
pub struct Table<R> {
    directory: PathBuf,
    kind: PhantomData<fn() -> R>,
}

impl<R: Record> Table<R> {
    fn open(directory: PathBuf) -> Result<Self, StoreError> {
        fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
        Ok(Self { directory, kind: PhantomData })
    }

    /// Writes the record, in place of an older one of the same id.
    pub fn put(&self, record: &R) -> Result<(), StoreError> {
        let bytes = frame::encode(record)
            .map_err(|source| StoreError::Encode { id: record.id().to_owned(), source })?;
        let path = self.directory.join(record.id());
        // The caller orders the writes of one record, so the name is free.
        let temporary = self.directory.join(format!(".{}", record.id()));
        let written = fs::File::create(&temporary).and_then(|mut file| file.write_all(&bytes));
        written.map_err(io_error("write", &temporary))?;
        if is_settled(&path) {
            // Without it a power cut may cost this object: no reason to refuse the change.
            let kept = self.kept(record.id());
            let linked =
                remove(&kept).and_then(|()| fs::hard_link(&path, &kept).map_err(io_error("keep", &path)));
            if let Err(error) = linked {
                tracing::debug!(%error, "no earlier record is kept");
            }
        }
        fs::rename(&temporary, &path).map_err(io_error("replace", &path))
    }

    /// Removes the record; one that is not there is no error.
    pub fn remove(&self, id: &str) -> Result<(), StoreError> {
        // In this order: what is kept stands for nothing by itself.
        remove(&self.kept(id))?;
        remove(&self.directory.join(id))
    }

    /// All records that can be read. What cannot (torn, unknown, left over from a write) is removed with a warning, unless
    /// what was kept of an earlier time stands in for it.
    pub fn load(&self) -> Result<Vec<R>, StoreError> {
        let mut records = Vec::new();
        for path in self.files()? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let failure = match read::<R>(&path, name) {
                Ok(record) => {
                    records.push(record);
                    continue;
                }
                Err(failure) => failure,
            };
            let kept = self.kept(name);
            if let Ok(record) = read::<R>(&kept, name) {
                tracing::warn!(record = %path.display(), %failure, "a record cannot be read; an earlier one stands in");
                fs::rename(&kept, &path).map_err(io_error("replace", &path))?;
                records.push(record);
            } else if !self.is_kept_beside_another(name) {
                tracing::warn!(record = %path.display(), %failure, "a record cannot be read; it is dropped");
                remove(&path)?;
            }
        }
        Ok(records)
    }

    /// Everything in the directory.
    fn files(&self) -> Result<Vec<PathBuf>, StoreError> {
        let entries = fs::read_dir(&self.directory).map_err(io_error("list", &self.directory))?;
        let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        paths.map_err(io_error("list", &self.directory))
    }

    /// Where the earlier record is.
    fn kept(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}~"))
    }

    /// Whether the file is an earlier record of one that is there.
    fn is_kept_beside_another(&self, name: &str) -> bool {
        name.strip_suffix('~').is_some_and(|id| is_id(id) && self.directory.join(id).exists())
    }
}

/// Whether there is a record that a power cut does not tear any more.
fn is_settled(path: &Path) -> bool {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age >= SETTLED))
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The record of this id.
fn read<R: Record>(path: &Path, id: &str) -> Result<R, String> {
    if !is_id(id) {
        return Err("it is left over from an interrupted write".into());
    }
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > frame::MAX_RECORD as u64 + 64 {
        return Err(format!("{size} bytes are too many"));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let record: R = frame::decode(&bytes).map_err(|error| error.to_string())?;
    if record.id() != id {
        return Err(format!("it belongs to {}", record.id()));
    }
    Ok(record)
}

/// All records of a hulld.
#[derive(Debug)]
pub struct Store {
    /// Pods.
    pub sandboxes: Table<SandboxRecord>,
    /// Containers.
    pub containers: Table<ContainerRecord>,
}

impl Store {
    /// Opens, or makes, the records below `directory` (`ROOT/state`).
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            sandboxes: Table::open(directory.join("sandboxes"))?,
            containers: Table::open(directory.join("containers"))?,
        })
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(digit: &str) -> SandboxRecord {
        SandboxRecord { id: digit.repeat(64), ..Default::default() }
    }

    #[test]
    fn what_was_put_is_loaded_and_what_was_removed_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.sandboxes.put(&record("a")).unwrap();
        store.sandboxes.put(&SandboxRecord { created_at: 3, ..record("a") }).unwrap();
        store.sandboxes.put(&record("b")).unwrap();
        store.sandboxes.remove(&record("b").id).unwrap();
        store.sandboxes.remove(&record("b").id).unwrap();
        let loaded = Store::open(directory.path()).unwrap().sandboxes.load().unwrap();
        assert_eq!(loaded, [SandboxRecord { created_at: 3, ..record("a") }]);
    }

    fn settle(path: &Path) {
        let long_ago = std::time::SystemTime::now() - 2 * SETTLED;
        fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
    }

    /// XFS: a power cut soon after a rename leaves an empty file. Neither the container nor its writable layer is lost.
    #[test]
    fn an_old_record_stands_in_for_a_younger_one_that_a_power_cut_has_torn() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let state = |created_at| SandboxRecord { created_at, ..record("a") };
        let path = directory.path().join("sandboxes").join("a".repeat(64));
        store.sandboxes.put(&state(1)).unwrap();
        settle(&path);
        // Of these nothing may be on the disk yet.
        store.sandboxes.put(&state(2)).unwrap();
        store.sandboxes.put(&state(3)).unwrap();
        assert_eq!(store.sandboxes.load().unwrap(), [state(3)]);
        fs::write(&path, b"").unwrap();
        assert_eq!(store.sandboxes.load().unwrap(), [state(1)]);
        assert_eq!(store.sandboxes.load().unwrap(), [state(1)], "it has the name again");
        // A later one takes its place.
        settle(&path);
        store.sandboxes.put(&state(4)).unwrap();
        settle(&path);
        store.sandboxes.put(&state(5)).unwrap();
        fs::write(&path, b"").unwrap();
        assert_eq!(store.sandboxes.load().unwrap(), [state(4)]);
    }

    #[test]
    fn nothing_is_left_of_a_record_that_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let sandboxes = directory.path().join("sandboxes");
        let path = sandboxes.join("a".repeat(64));
        for _ in 0..2 {
            store.sandboxes.put(&record("a")).unwrap();
            settle(&path);
        }
        assert_eq!(fs::read_dir(&sandboxes).unwrap().count(), 2);
        store.sandboxes.remove(&record("a").id).unwrap();
        assert_eq!(fs::read_dir(&sandboxes).unwrap().count(), 0);
        // By itself an earlier one is no record.
        store.sandboxes.put(&record("a")).unwrap();
        fs::rename(&path, sandboxes.join(format!("{}~", "a".repeat(64)))).unwrap();
        assert_eq!(store.sandboxes.load().unwrap(), []);
        assert_eq!(fs::read_dir(&sandboxes).unwrap().count(), 0);
    }

    #[test]
    fn torn_and_misplaced_records_are_swept_and_never_stop_a_start() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.sandboxes.put(&record("a")).unwrap();
        let sandboxes = directory.path().join("sandboxes");
        let whole = fs::read(sandboxes.join("a".repeat(64))).unwrap();
        fs::write(sandboxes.join("b".repeat(64)), &whole[..whole.len() - 1]).unwrap();
        fs::write(sandboxes.join("c".repeat(64)), &whole).unwrap();
        fs::write(sandboxes.join("d".repeat(64)), b"").unwrap();
        fs::write(sandboxes.join(format!(".{}", "e".repeat(64))), &whole).unwrap();
        assert_eq!(store.sandboxes.load().unwrap(), [record("a")]);
        assert_eq!(fs::read_dir(&sandboxes).unwrap().count(), 1);
    }
}
