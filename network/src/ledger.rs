//! What this daemon has outside its process, one small file per pod, written before the effect it describes.
//!
//! A file is replaced by rename, without fsync: after a power cut there is neither a namespace nor a link to undo, and
//! a file that is torn then is only dropped. Killing the daemon tears nothing.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::builtin::HostPort;
use crate::{NetworkError, PodNetwork};

/// Longest record that is read, in bytes: a CNI result and a configuration list fit many times.
const LONGEST: u64 = 4 << 20;

/// Everything needed to undo one pod's network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    /// Kernel boot in which it was written: of another boot, nothing but the record and plugins' state is left.
    pub(crate) boot: String,
    /// Torn down but for what goes in the background.
    #[serde(default)]
    pub(crate) released: bool,
    pub(crate) kind: Kind,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Builtin(BuiltinRecord),
    Cni(Box<CniRecord>),
}

/// What the built-in network gave to a pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BuiltinRecord {
    /// Each with the prefix of its range; the primary first.
    pub(crate) addresses: Vec<IpNet>,
    pub(crate) ports: Vec<HostPort>,
    /// Name of the host's end of the link.
    pub(crate) link: String,
}

/// How a pod was attached by CNI plugins: enough for CHECK and DEL, whatever becomes of the configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CniRecord {
    pub(crate) pod: PodNetwork,
    /// The configuration list as it was then.
    pub(crate) network: Value,
    /// Ranges for the capability `ipRanges` as they were then.
    #[serde(default)]
    pub(crate) pod_cidrs: Vec<IpNet>,
    /// Result of ADD; absent while it is under way or if it failed.
    #[serde(default)]
    pub(crate) result: Option<Value>,
}

/// The records of all pods, in memory and on disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    directory: PathBuf,
    boot: String,
    records: Mutex<BTreeMap<String, Record>>,
    _lock: File,
}

impl Ledger {
    /// Loads the records below `data`; refuses if another process has it open.
    pub(crate) fn open(data: &Path) -> Result<Self, NetworkError> {
        let directory = data.join("pods");
        make_directory(data)?;
        make_directory(&directory)?;
        let lock = lock(&data.join("lock"))?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|source| file_error("reading", Path::new("/proc/sys/kernel/random/boot_id"), source))?;
        let records = load(&directory).map_err(|source| file_error("reading", &directory, source))?;
        Ok(Self { directory, boot: boot.trim().to_owned(), records: Mutex::new(records), _lock: lock })
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, id: &str) -> Option<Record> {
        self.records().get(id).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Record> {
        self.records().values().cloned().collect()
    }

    /// Makes a record for `id` with knowledge of all others, and writes it, before anybody else can.
    pub(crate) fn reserve(
        &self,
        id: &str,
        make: impl FnOnce(&BTreeMap<String, Record>) -> Result<Kind, NetworkError>,
    ) -> Result<Record, NetworkError> {
        let mut records = self.records();
        let kind = make(&records)?;
        let record = Record { id: id.to_owned(), boot: self.boot.clone(), released: false, kind };
        self.write(&record)?;
        records.insert(id.to_owned(), record.clone());
        Ok(record)
    }

    pub(crate) fn update(&self, record: &Record) -> Result<(), NetworkError> {
        let mut records = self.records();
        self.write(record)?;
        records.insert(record.id.clone(), record.clone());
        Ok(())
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), NetworkError> {
        let mut records = self.records();
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(file_error("removing", &path, error));
            }
            _ => {}
        }
        records.remove(id);
        Ok(())
    }

    /// True if the record was written since the machine started.
    pub(crate) fn is_of_this_boot(&self, record: &Record) -> bool {
        record.boot == self.boot
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    fn write(&self, record: &Record) -> Result<(), NetworkError> {
        let path = self.path(&record.id);
        replace(&path, &serde_json::to_vec(record).map_err(|e| file_error("writing", &path, e.into()))?)
    }
}

/// Replaces a file as a whole, readable by its owner only.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), NetworkError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let write = || -> io::Result<()> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| file_error("writing", path, source))
}

pub(crate) fn file_error(action: &'static str, path: &Path, source: io::Error) -> NetworkError {
    NetworkError::File { action, path: path.to_owned(), source }
}

pub(crate) fn make_directory(path: &Path) -> Result<(), NetworkError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| file_error("creating directory", path, source))
}

fn lock(path: &Path) -> Result<File, NetworkError> {
    let open = || {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    };
    open().map_err(|source: io::Error| match source.kind() {
        ErrorKind::WouldBlock => {
            NetworkError::Config(format!("{} is locked: another daemon uses this directory", path.display()))
        }
        _ => file_error("locking", path, source),
    })
}

fn load(directory: &Path) -> io::Result<BTreeMap<String, Record>> {
    let mut records = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let is_record = path.extension().is_some_and(|extension| extension == "json");
        let record = if is_record { read(&path).ok().filter(|record| record.id == stem) } else { None };
        match record {
            Some(record) => {
                records.insert(record.id.clone(), record);
            }
            None => {
                tracing::warn!(path = %path.display(), "dropping a torn record of a pod's network");
                fs::remove_file(&path)?;
            }
        }
    }
    Ok(records)
}

fn read(path: &Path) -> io::Result<Record> {
    if fs::metadata(path)?.len() > LONGEST {
        return Err(ErrorKind::FileTooLarge.into());
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builtin(address: &str) -> Kind {
        Kind::Builtin(BuiltinRecord {
            addresses: vec![address.parse().unwrap()],
            ports: vec![],
            link: "hullabc".into(),
        })
    }

    #[test]
    fn records_outlive_a_killed_daemon() {
        let data = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(data.path()).unwrap();
        ledger.reserve("a", |_| Ok(builtin("10.0.0.2/24"))).unwrap();
        let mut record =
            ledger.reserve("b", |others| Ok(builtin(["10.0.0.3/24"][others.len() - 1]))).unwrap();
        record.released = true;
        ledger.update(&record).unwrap();
        ledger.remove("gone").unwrap();
        drop(ledger);

        let ledger = Ledger::open(data.path()).unwrap();
        let all = ledger.all();
        assert_eq!(
            all.iter().map(|r| (r.id.as_str(), r.released)).collect::<Vec<_>>(),
            [("a", false), ("b", true)]
        );
        assert!(ledger.is_of_this_boot(&all[0]));
        ledger.remove("a").unwrap();
        assert!(ledger.get("a").is_none());
    }

    #[test]
    fn a_second_daemon_on_the_same_directory_is_refused() {
        let data = tempfile::tempdir().unwrap();
        let _first = Ledger::open(data.path()).unwrap();
        let error = Ledger::open(data.path()).unwrap_err().to_string();
        assert!(error.contains("another daemon"), "{error}");
    }

    #[test]
    fn a_torn_record_is_dropped_and_does_not_fail_the_start() {
        let data = tempfile::tempdir().unwrap();
        drop(Ledger::open(data.path()).unwrap());
        for name in ["torn.json", "x.json.new", "other.json"] {
            fs::write(data.path().join("pods").join(name), "{\"id\":\"no").unwrap();
        }
        assert!(Ledger::open(data.path()).unwrap().all().is_empty());
        assert_eq!(fs::read_dir(data.path().join("pods")).unwrap().count(), 0);
    }

    #[test]
    fn a_reservation_that_fails_leaves_nothing() {
        let data = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(data.path()).unwrap();
        assert!(ledger.reserve("a", |_| Err(NetworkError::Config("no".into()))).is_err());
        assert!(ledger.all().is_empty());
        assert_eq!(fs::read_dir(data.path().join("pods")).unwrap().count(), 0);
    }
}
