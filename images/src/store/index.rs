//! The image index on disk: one redb file, every change one transaction.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::image::UpperDirectory;
use crate::layer::LayerId;

use super::error::StoreError;

/// Image id → [`ImageRecord`] as JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Tag or digest reference in normal form → image id.
const NAMES: TableDefinition<'_, &str, &str> = TableDefinition::new("names");
/// Layer id → [`LayerRecord`] as JSON.
const LAYERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("layers");
/// Digest → the exact bytes of an index, manifest or configuration.
const BLOBS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("blobs");
/// Layer id → the directories that the layer implies, separated by NUL bytes. Only for layers that imply any.
const IMPLIED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("implied");
/// Facts about the index itself.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Key in [`META`]: the format of all records.
const FORMAT_KEY: &str = "format";
/// The newest format that this code reads and the one it writes.
const FORMAT: u64 = 1;

/// What the index keeps of one image besides its blobs and names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// Layers, lowest first.
    pub(super) layers: Vec<LayerId>,
    /// Digests of the stored index and manifests that led to this image.
    pub(super) documents: Vec<Digest>,
    /// Bytes of the stored documents and the configuration.
    pub(super) documents_size: u64,
    /// Exempt from garbage collection.
    #[serde(default)]
    pub(super) pinned: bool,
    /// Nanoseconds since the epoch at the first pull.
    pub(super) pulled_at: i64,
    /// What containers need in their writable directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) upper_directories: Vec<UpperDirectory>,
}

/// What the index keeps of one layer file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    /// Bytes of the layer file.
    pub(super) size: u64,
    /// Bytes at its end that lead back to the tar stream; the file system is before them. 0 in layers that hull 0.1.0
    /// pulled before it kept them.
    #[serde(default)]
    pub(super) tar_split: u64,
    /// Entries of the tar stream.
    pub(super) entries: u64,
    /// Sum of the sizes of its regular files.
    pub(super) content: u64,
    /// Hides all layers below it.
    #[serde(default)]
    pub(super) opaque_root: bool,
    /// How many directories it implies ([`Change::put_implied`] has them).
    #[serde(default)]
    pub(super) implied: u64,
}

/// Everything that the index says, read once at start.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) images: Vec<(String, ImageRecord, Vec<u8>)>,
    pub(super) names: Vec<(String, String)>,
    pub(super) layers: Vec<(LayerId, LayerRecord)>,
}

/// One change of the index, committed as a whole or not at all.
#[derive(Default)]
pub(super) struct Change {
    pub(super) put_images: Vec<(String, ImageRecord)>,
    pub(super) put_names: Vec<(String, String)>,
    pub(super) put_layers: Vec<(LayerId, LayerRecord)>,
    /// Directories that a layer implies.
    pub(super) put_implied: Vec<(LayerId, Vec<Vec<u8>>)>,
    pub(super) put_blobs: Vec<(Digest, bytes::Bytes)>,
    pub(super) delete_images: Vec<String>,
    pub(super) delete_names: Vec<String>,
    pub(super) delete_layers: Vec<LayerId>,
    pub(super) delete_blobs: Vec<String>,
}

/// The open database. A database that met an I/O error (a full disk) refuses further work until it is opened again, so
/// it is, before the next change.
pub(super) struct Index {
    path: PathBuf,
    database: Mutex<Option<Database>>,
}

impl Index {
    /// Opens or creates the index and reads it all.
    pub(super) fn open(path: &Path) -> Result<(Self, Contents), StoreError> {
        let index = Self { path: path.to_owned(), database: Mutex::new(None) };
        if !path.exists() {
            index.create().map_err(|error| index.failed("create", error))?;
        }
        // An older version's index may lack a table.
        index.with_database("open", |database| {
            let transaction = database.begin_write()?;
            create_tables(&transaction)?;
            Ok(transaction.commit()?)
        })?;
        let contents = index.read()?;
        Ok((index, contents))
    }

    /// Makes an empty index, which has its name only once it is whole: a half-made one would never open again.
    fn create(&self) -> Result<(), redb::Error> {
        let unfinished = self.path.with_extension("redb.new");
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let database = Database::create(&unfinished)?;
        let transaction = database.begin_write()?;
        create_tables(&transaction)?;
        transaction.commit()?;
        drop(database);
        fs::rename(&unfinished, &self.path)?;
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        Ok(fs::File::open(directory)?.sync_all()?)
    }

    /// Commits one change durably. After an error nothing of it has happened.
    pub(super) fn commit(&self, change: &Change) -> Result<(), StoreError> {
        let mut images = Vec::with_capacity(change.put_images.len());
        for (id, record) in &change.put_images {
            images.push((id.as_str(), self.encode(id, record)?));
        }
        let mut layers = Vec::with_capacity(change.put_layers.len());
        for (id, record) in &change.put_layers {
            layers.push((id.to_string(), self.encode(id.to_string().as_str(), record)?));
        }
        self.with_database("write", |database| {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(IMAGES)?;
                change.delete_images.iter().try_for_each(|id| table.remove(id.as_str()).map(drop))?;
                images.iter().try_for_each(|(id, record)| table.insert(*id, record.as_slice()).map(drop))?;
                let mut table = transaction.open_table(NAMES)?;
                change.delete_names.iter().try_for_each(|name| table.remove(name.as_str()).map(drop))?;
                change
                    .put_names
                    .iter()
                    .try_for_each(|(n, id)| table.insert(n.as_str(), id.as_str()).map(drop))?;
                let mut table = transaction.open_table(LAYERS)?;
                change
                    .delete_layers
                    .iter()
                    .try_for_each(|id| table.remove(id.to_string().as_str()).map(drop))?;
                layers
                    .iter()
                    .try_for_each(|(id, record)| table.insert(id.as_str(), record.as_slice()).map(drop))?;
                let mut table = transaction.open_table(IMPLIED)?;
                change
                    .delete_layers
                    .iter()
                    .try_for_each(|id| table.remove(id.to_string().as_str()).map(drop))?;
                change.put_implied.iter().try_for_each(|(id, paths)| {
                    table.insert(id.to_string().as_str(), paths.join(&0).as_slice()).map(drop)
                })?;
                let mut table = transaction.open_table(BLOBS)?;
                change.delete_blobs.iter().try_for_each(|digest| table.remove(digest.as_str()).map(drop))?;
                change.put_blobs.iter().try_for_each(|(digest, bytes)| {
                    table.insert(digest.to_string().as_str(), &bytes[..]).map(drop)
                })?;
            }
            Ok(transaction.commit()?)
        })
    }

    /// The exact bytes of a stored document.
    pub(super) fn blob(&self, digest: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.with_database("read", |database| {
            let table = database.begin_read()?.open_table(BLOBS)?;
            Ok(table.get(digest)?.map(|value| value.value().to_vec()))
        })
    }

    /// The directories that a layer implies.
    pub(super) fn implied(&self, layer: &LayerId) -> Result<Vec<Vec<u8>>, StoreError> {
        self.with_database("read", |database| {
            let table = database.begin_read()?.open_table(IMPLIED)?;
            let paths = table.get(layer.to_string().as_str())?;
            Ok(paths.map(|paths| paths.value().split(|byte| *byte == 0).map(<[u8]>::to_vec).collect()))
        })
        .map(Option::unwrap_or_default)
    }

    fn read(&self) -> Result<Contents, StoreError> {
        let mut raw_images = Vec::new();
        let mut raw_layers = Vec::new();
        let mut contents = Contents::default();
        let format = self.with_database("read", |database| {
            let transaction = database.begin_read()?;
            let blobs = transaction.open_table(BLOBS)?;
            for entry in transaction.open_table(IMAGES)?.iter()? {
                let (id, record) = entry?;
                let config = blobs.get(id.value())?.map(|value| value.value().to_vec());
                raw_images.push((id.value().to_owned(), record.value().to_vec(), config));
            }
            for entry in transaction.open_table(NAMES)?.iter()? {
                let (name, id) = entry?;
                contents.names.push((name.value().to_owned(), id.value().to_owned()));
            }
            for entry in transaction.open_table(LAYERS)?.iter()? {
                let (id, record) = entry?;
                raw_layers.push((id.value().to_owned(), record.value().to_vec()));
            }
            Ok(transaction.open_table(META)?.get(FORMAT_KEY)?.map(|format| format.value()))
        })?;
        if let Some(found) = format.filter(|found| *found > FORMAT) {
            return Err(StoreError::Format { path: self.path.clone(), found, known: FORMAT });
        }
        for (id, record, config) in raw_images {
            let record = self.decode(&id, &record)?;
            let config = config.ok_or_else(|| self.bad_record(&id, "its configuration is missing"))?;
            contents.images.push((id, record, config));
        }
        for (id, record) in raw_layers {
            let record = self.decode(&id, &record)?;
            let id = id.parse().map_err(|_| self.bad_record(&id, "not a layer id"))?;
            contents.layers.push((id, record));
        }
        Ok(contents)
    }

    /// Runs `work` on the database, opening it if it is not open. After any error it is closed.
    fn with_database<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match slot.take() {
            Some(database) => database,
            None => Database::open(&self.path).map_err(|error| self.failed("open", error.into()))?,
        };
        let result = work(&database).map_err(|error| self.failed(action, error))?;
        *slot = Some(database);
        Ok(result)
    }

    fn failed(&self, action: &'static str, source: redb::Error) -> StoreError {
        StoreError::Index { action, path: self.path.clone(), source: Arc::new(source) }
    }

    fn bad_record(&self, key: &str, reason: &str) -> StoreError {
        StoreError::Record { path: self.path.clone(), key: key.to_owned(), reason: reason.to_owned() }
    }

    fn encode(&self, key: &str, record: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(record).map_err(|error| self.bad_record(key, &error.to_string()))
    }

    fn decode<T: for<'de> Deserialize<'de>>(&self, key: &str, bytes: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| self.bad_record(key, &error.to_string()))
    }
}

/// Makes all tables, so that reading never meets a missing one, and marks a new index with the format.
fn create_tables(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    transaction.open_table(IMAGES)?;
    transaction.open_table(NAMES)?;
    transaction.open_table(LAYERS)?;
    transaction.open_table(IMPLIED)?;
    transaction.open_table(BLOBS)?;
    let mut meta = transaction.open_table(META)?;
    if meta.get(FORMAT_KEY)?.is_none() {
        meta.insert(FORMAT_KEY, FORMAT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Killed in its first start, hulld never started again.
    #[test]
    fn an_index_that_was_being_made_when_the_daemon_was_killed_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index.redb");
        let (index, _) = Index::open(&path).unwrap();
        drop(index);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // redb writes its magic number last
        let mut torn = whole;
        torn[..9].fill(0);
        fs::write(directory.path().join("index.redb.new"), torn).unwrap();

        let (_index, contents) = Index::open(&path).unwrap();
        assert!(contents.images.is_empty());
        let names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["index.redb"]);
    }
}
