//! Records of pods and containers on disk: one small file for each, replaced by renaming.
//!
//! A record is written before the effect that it describes and is not flushed: what a power cut tears is an orphan,
//! noticed by its checksum, reported once and swept. `ROOT/state/sandboxes/ID` and `ROOT/state/containers/ID`.

pub mod frame;
pub mod record;

use std::fs;
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use prost::Message;

use self::record::{ContainerRecord, SandboxRecord};

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
        fs::rename(&temporary, &path).map_err(io_error("replace", &path))
    }

    /// Removes the record; one that is not there is no error.
    pub fn remove(&self, id: &str) -> Result<(), StoreError> {
        let path = self.directory.join(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// All records that can be read. What cannot (torn, unknown, left over from a write) is removed with a warning.
    pub fn load(&self) -> Result<Vec<R>, StoreError> {
        let mut records = Vec::new();
        let entries = fs::read_dir(&self.directory).map_err(io_error("list", &self.directory))?;
        for entry in entries {
            let path = entry.map_err(io_error("list", &self.directory))?.path();
            match read::<R>(&path) {
                Ok(record) => records.push(record),
                Err(reason) => {
                    tracing::warn!(record = %path.display(), %reason, "a record cannot be read; it is dropped");
                    fs::remove_file(&path).map_err(io_error("remove", &path))?;
                }
            }
        }
        Ok(records)
    }
}

fn read<R: Record>(path: &Path) -> Result<R, String> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !is_id(name) {
        return Err("it is left over from an interrupted write".into());
    }
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > frame::MAX_RECORD as u64 + 64 {
        return Err(format!("{size} bytes are too many"));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let record: R = frame::decode(&bytes).map_err(|error| error.to_string())?;
    if record.id() != name {
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
