//! Records of pods and containers on disk: one small file for each, `ROOT/state/sandboxes/ID` and
//! `ROOT/state/containers/ID`, to which each change adds the record as it is from then on.
//!
//! A record is written before the effect that it describes and is not flushed. What a power cut or a full disk tears is
//! the end of a file, noticed by its checksum: the record before it, which nothing has touched since it was written,
//! stands. A file in which no record is whole is an orphan, reported once and swept.
//!
//! Adding costs a twentieth of replacing the file by renaming, which lets ext4 give out the new one's blocks at once and
//! take back the old one's. A file that has grown is replaced nevertheless, by one that has been flushed: no start and no
//! end makes it grow so far.

pub mod frame;
pub mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use prost::Message;

use self::record::{ContainerRecord, SandboxRecord};

/// A file that has more bytes than this, and twice those of the record that is to be added, is replaced by one that holds
/// that record alone.
const GROWN: u64 = 64 << 10;

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

    /// Writes the record, which from then on is the one of its id. If it fails, the one before it still is.
    pub fn put(&self, record: &R) -> Result<(), StoreError> {
        let bytes = frame::encode(record)
            .map_err(|source| StoreError::Encode { id: record.id().to_owned(), source })?;
        let path = self.directory.join(record.id());
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let mut file = file.map_err(io_error("open", &path))?;
        let size = file.metadata().map_err(io_error("look at", &path))?.len();
        if size > GROWN.max(2 * bytes.len() as u64) {
            return self.replace(&path, record.id(), &bytes);
        }
        // The caller orders the writes of one record, so its end is where it was.
        file.write_all(&bytes).map_err(|source| {
            // What is there of it would hide whatever is added after it.
            let undone = if size == 0 { fs::remove_file(&path) } else { file.set_len(size) };
            if let Err(error) = undone {
                tracing::error!(path = %path.display(), %error, "cannot take back half a record");
            }
            io_error("write", &path)(source)
        })
    }

    /// A file of this record alone. It is on the disk before its name leads to it: not every filesystem sees to that.
    fn replace(&self, path: &Path, id: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let temporary = self.directory.join(format!(".{id}"));
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_data()
        });
        written.map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, path).map_err(io_error("replace", path))
    }

    /// Removes the record; one that is not there is no error.
    pub fn remove(&self, id: &str) -> Result<(), StoreError> {
        remove(&self.directory.join(id))
    }

    /// All records that can be read. What cannot (torn, unknown, left over from a write) is removed with a warning.
    pub fn load(&self) -> Result<Vec<R>, StoreError> {
        let mut records = Vec::new();
        for path in self.files()? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match read::<R>(&path, name) {
                Ok(Found { record, torn: None }) => records.push(record),
                Ok(Found { record, torn: Some(end) }) => {
                    tracing::warn!(record = %path.display(), "the end of a record is torn; what it was before stands");
                    cut(&path, end)?;
                    records.push(record);
                }
                Err(failure) => {
                    tracing::warn!(record = %path.display(), %failure, "a record cannot be read; it is dropped");
                    remove(&path)?;
                }
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
}

/// Leaves the first `end` bytes: what is added comes after whole records only.
fn cut(path: &Path, end: u64) -> Result<(), StoreError> {
    let cut = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(end));
    cut.map_err(io_error("cut the torn end off", path))
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

struct Found<R> {
    record: R,
    /// Where the whole ones end, if something follows.
    torn: Option<u64>,
}

/// The record of this id.
fn read<R: Record>(path: &Path, id: &str) -> Result<Found<R>, String> {
    if !is_id(id) {
        return Err("it is left over from an interrupted write".into());
    }
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    // Up to three of the largest, see `GROWN`.
    if size > 3 * (frame::MAX_RECORD as u64 + 64) {
        return Err(format!("{size} bytes are too many"));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let (record, end) = frame::decode_last::<R>(&bytes).map_err(|error| error.to_string())?;
    if record.id() != id {
        return Err(format!("it belongs to {}", record.id()));
    }
    Ok(Found { record, torn: (end < bytes.len()).then_some(end as u64) })
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

    fn path(directory: &Path) -> PathBuf {
        directory.join("sandboxes").join("a".repeat(64))
    }

    #[test]
    fn what_is_torn_at_the_end_gives_way_to_what_was_before_and_hides_nothing_that_is_added() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (path, state) = (path(directory.path()), |at| SandboxRecord { created_at: at, ..record("a") });
        store.sandboxes.put(&state(1)).unwrap();
        store.sandboxes.put(&state(2)).unwrap();
        let whole = fs::read(&path).unwrap();
        for torn in [whole[..whole.len() - 1].to_vec(), [&whole[..whole.len() / 2], &[0; 4096]].concat()] {
            fs::write(&path, torn).unwrap();
            assert_eq!(store.sandboxes.load().unwrap(), [state(1)]);
            assert_eq!(fs::read(&path).unwrap(), whole[..whole.len() / 2]);
            store.sandboxes.put(&state(3)).unwrap();
            assert_eq!(store.sandboxes.load().unwrap(), [state(3)]);
        }
    }

    #[test]
    fn a_file_does_not_grow_for_ever_and_the_last_change_counts() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let hostname = "h".repeat(1000);
        let mut largest = 0;
        for created_at in 0..500 {
            let state = SandboxRecord { created_at, hostname: hostname.clone(), ..record("a") };
            store.sandboxes.put(&state).unwrap();
            largest = largest.max(fs::metadata(path(directory.path())).unwrap().len());
            if created_at % 50 == 49 {
                assert_eq!(store.sandboxes.load().unwrap(), [state]);
            }
        }
        assert!((GROWN..GROWN + 2000).contains(&largest), "{largest}");
        assert_eq!(fs::read_dir(directory.path().join("sandboxes")).unwrap().count(), 1);
    }

    #[test]
    fn what_the_disk_refuses_leaves_the_record_as_it_was() {
        let mounted = tempfile::tempdir().unwrap();
        let namespace = std::thread::spawn({
            let place = mounted.path().to_owned();
            move || {
                // A thread of its own, whose mount namespace ends with it.
                hull_sys::namespace::unshare(hull_sys::namespace::Namespaces::MOUNT).unwrap();
                let status = std::process::Command::new("sh")
                    .args(["-c", "mount --make-rprivate / && exec mount -t tmpfs -o size=16k tmpfs \"$0\""])
                    .arg(&place)
                    .status();
                assert!(status.unwrap().success());
                let store = Store::open(&place).unwrap();
                let state =
                    |at, size| SandboxRecord { created_at: at, hostname: "h".repeat(size), ..record("a") };
                store.sandboxes.put(&state(1, 10)).unwrap();
                assert!(store.sandboxes.put(&state(2, 20_000)).is_err());
                assert_eq!(store.sandboxes.load().unwrap(), [state(1, 10)]);
                store.sandboxes.put(&state(3, 10)).unwrap();
                assert_eq!(store.sandboxes.load().unwrap(), [state(3, 10)]);
                // One that never was there leaves no file
                assert!(
                    store.sandboxes.put(&SandboxRecord { id: "b".repeat(64), ..state(4, 20_000) }).is_err()
                );
                assert!(!place.join("sandboxes").join("b".repeat(64)).exists());
            }
        });
        namespace.join().unwrap();
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
