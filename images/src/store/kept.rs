//! Blobs that are kept as they came, if the store is to keep them: `blobs/<algorithm>/<hex>`, for as long as the manifest
//! of an image refers to them. The directory says which there are. A blob is written beside the conversion under a
//! temporary name, and gets its own, verified and synced, before the layer does; what no image refers to is swept at
//! start, so that a crash in between leaves nothing. Whoever uses one verifies it again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::digest::{Digest, Hasher};
use crate::layer::LayerId;
use crate::registry::{Descriptor, Document};

use super::ImageStore;
use super::check::{CheckReport, Problem};
use super::error::StoreError;
use super::files::{Files, Leftover, Temporary, failed};
use super::push::MANIFEST;
use super::staged::sync;

/// Bytes after which the kernel is asked to write what it has.
const WRITEBACK_STEP: u64 = 16 << 20;
/// Bytes read at a time to be hashed.
const BUFFER: usize = 256 << 10;

/// What one kept blob occupies, and who refers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobUsage {
    /// Of the compressed bytes.
    pub digest: Digest,
    /// Bytes of disk that it occupies.
    pub bytes: u64,
    /// Ids of the images whose manifests refer to it.
    pub images: Vec<String>,
}

/// A blob that is being written.
pub(super) struct Keeping {
    digest: Digest,
    temporary: Temporary,
    file: File,
    written: u64,
    written_back: u64,
    failure: Option<io::Error>,
}

impl Keeping {
    pub(super) fn begin(files: &Arc<Files>, digest: &Digest) -> Result<Self, StoreError> {
        let (temporary, file) = files.create_blob(digest)?;
        Ok(Self { digest: digest.clone(), temporary, file, written: 0, written_back: 0, failure: None })
    }

    /// A reader that gives what `blob` does, and writes it down.
    pub(super) fn tee<R: Read>(&mut self, blob: R) -> Tee<'_, R> {
        Tee { blob, keeping: self }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        let length = self.written - self.written_back;
        if length >= WRITEBACK_STEP {
            // Only a hint: what it cannot write, the sync finds out.
            let _ = hull_sys::writeback::start(&self.file, self.written_back, length);
            self.written_back = self.written;
        }
        Ok(())
    }

    /// Whether it could not be written.
    pub(super) fn look_for_failure(&mut self) -> Result<(), StoreError> {
        match self.failure.take() {
            Some(error) => Err(failed("write", self.temporary.path())(error)),
            None => Ok(()),
        }
    }

    /// Makes it durable. The caller has verified what came through the reader.
    pub(super) fn finish(self) -> Result<KeptBlob, StoreError> {
        sync(&self.file).map_err(failed("sync", self.temporary.path()))?;
        Ok(KeptBlob { digest: self.digest, file: Mutex::new(self.temporary) })
    }
}

/// See [`Keeping::tee`].
pub(super) struct Tee<'k, R> {
    blob: R,
    keeping: &'k mut Keeping,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.blob.read(buffer)?;
        match self.keeping.write(&buffer[..length]) {
            Ok(()) => Ok(length),
            Err(error) => {
                self.keeping.failure = Some(error);
                Err(io::Error::other("the blob cannot be kept"))
            }
        }
    }
}

/// A whole blob under a temporary name. Deleted with the value unless it was published.
pub(super) struct KeptBlob {
    pub(super) digest: Digest,
    file: Mutex<Temporary>,
}

impl KeptBlob {
    pub(super) fn publish(&self) -> Result<(), StoreError> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).publish_blob(&self.digest)
    }

    pub(super) fn unpublish(&self) {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).unpublish_blob(&self.digest);
    }
}

/// The layer of a blob, and the images that have it.
struct Users {
    layer: LayerId,
    images: Vec<String>,
}

impl ImageStore {
    /// A kept blob, open and at its beginning; None if it is not there.
    pub(super) fn kept(&self, digest: &Digest) -> Option<File> {
        File::open(self.files.blob(digest)).ok()
    }

    /// The same, verified, and so read to its end. A damaged one is dropped.
    pub(super) fn verified(&self, descriptor: &Descriptor) -> Option<File> {
        let file = self.kept(&descriptor.digest)?;
        let is_whole = hash(&file, &descriptor.digest)
            .is_ok_and(|(size, found)| size == descriptor.size && found == descriptor.digest);
        if is_whole {
            return Some(file);
        }
        self.drop_kept(&descriptor.digest);
        None
    }

    /// Takes a damaged blob away. What needs it asks where it came from.
    pub(super) fn drop_kept(&self, digest: &Digest) {
        match self.files.withdraw_blob(digest) {
            Ok(Some(_)) => tracing::warn!(%digest, "a kept blob was damaged and is dropped"),
            Ok(None) => {}
            Err(error) => tracing::warn!(%digest, %error, "cannot drop a damaged blob"),
        }
    }

    /// Every kept blob, ordered by algorithm and digest.
    pub fn blob_usage(&self) -> Result<Vec<BlobUsage>, StoreError> {
        let files = self.files.blobs()?;
        let users = if files.is_empty() { BTreeMap::new() } else { self.users_of_blobs()? };
        let usage = |file: super::files::BlobFile| {
            let digest = file.digest?;
            let images = users.get(&digest).map(|users| users.images.clone()).unwrap_or_default();
            Some(BlobUsage { digest, bytes: file.bytes, images })
        };
        let mut usage: Vec<BlobUsage> = files.into_iter().filter_map(usage).collect();
        usage.sort_by(|one, other| one.digest.cmp(&other.digest));
        Ok(usage)
    }

    /// Takes kept blobs that no image refers to any more out of sight. The files go when the result is dropped, which the
    /// caller does after it has let the writer lock go.
    pub(super) fn withdraw_blobs(&self) -> Result<Vec<Temporary>, StoreError> {
        let mut withdrawn = Vec::new();
        for digest in self.unused_blobs()?.into_iter().filter_map(|file| file.digest) {
            withdrawn.extend(self.files.withdraw_blob(&digest)?);
        }
        Ok(withdrawn)
    }

    /// Files among the kept blobs that no image needs. The caller holds the writer lock.
    pub(super) fn blob_leftovers(&self) -> Result<Vec<Leftover>, StoreError> {
        let unused = self.unused_blobs()?.into_iter();
        Ok(unused.map(|file| Leftover { path: file.path, bytes: file.bytes }).collect())
    }

    fn unused_blobs(&self) -> Result<Vec<super::files::BlobFile>, StoreError> {
        let mut files = self.files.blobs()?;
        if !files.is_empty() {
            let users = self.users_of_blobs()?;
            files.retain(|file| file.digest.as_ref().is_none_or(|digest| !users.contains_key(digest)));
        }
        Ok(files)
    }

    /// The blobs that the manifests of images refer to; none if no blob is to be kept.
    fn users_of_blobs(&self) -> Result<BTreeMap<Digest, Users>, StoreError> {
        let mut all: BTreeMap<Digest, Users> = BTreeMap::new();
        if !self.config.keep_blobs {
            return Ok(all);
        }
        let images: Vec<(String, Vec<Digest>, Vec<LayerId>)> = {
            let catalogue = self.read();
            let images = catalogue.images.iter();
            images
                .map(|(id, entry)| (id.clone(), entry.record.documents.clone(), entry.record.layers.clone()))
                .collect()
        };
        for (id, documents, layers) in images {
            for known in self.manifests(documents, layers.len())? {
                for (descriptor, layer) in known.manifest.layers.into_iter().zip(&layers) {
                    let users = all
                        .entry(descriptor.digest)
                        .or_insert_with(|| Users { layer: layer.clone(), images: Vec::new() });
                    if users.images.last() != Some(&id) {
                        users.images.push(id.clone());
                    }
                }
            }
        }
        Ok(all)
    }

    /// Hashes every kept blob and returns those that are damaged; None if `progress` ended the check.
    pub(super) fn check_blobs(
        &self,
        report: &mut CheckReport,
        progress: &mut impl FnMut(&LayerId) -> bool,
    ) -> Result<Option<Vec<Digest>>, StoreError> {
        let (files, mut bad) = (self.files.blobs()?, Vec::new());
        let users = if files.is_empty() { BTreeMap::new() } else { self.users_of_blobs()? };
        for digest in files.into_iter().filter_map(|file| file.digest) {
            // What nobody refers to is a leftover and told of as such.
            let Some(users) = users.get(&digest) else { continue };
            if !progress(&users.layer) {
                return Ok(None);
            }
            // Removed since it was listed.
            let Some(file) = self.kept(&digest) else { continue };
            report.blobs += 1;
            let hashed = hash(&file, &digest);
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            let reason = match hashed {
                Ok((bytes, found)) if found == digest => {
                    report.bytes += bytes;
                    continue;
                }
                Ok((_, found)) => format!("the kept blob is damaged: it has the digest {found}"),
                Err(error) => format!("the kept blob cannot be read: {error}"),
            };
            // The image lacks nothing: what needs the blob fetches it again.
            report.problems.push(Problem { subject: digest.to_string(), reason, images: Vec::new() });
            bad.push(digest);
        }
        Ok(Some(bad))
    }
}

/// The digests of the layers that manifests among these documents describe.
pub(super) fn layer_digests(documents: &[(Digest, Bytes)]) -> BTreeSet<Digest> {
    let mut digests = BTreeSet::new();
    for (digest, bytes) in documents {
        if let Ok(Document::Manifest(manifest)) = Document::parse(digest, MANIFEST, bytes) {
            digests.extend(manifest.layers.into_iter().map(|layer| layer.digest));
        }
    }
    digests
}

/// Size and digest of a file, by the algorithm of the digest that is expected.
fn hash(mut file: &File, expected: &Digest) -> io::Result<(u64, Digest)> {
    let mut hasher = Hasher::new(expected.algorithm());
    let (mut size, mut buffer) = (0, vec![0; BUFFER]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                size += length as u64;
                hasher.update(&buffer[..length]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((size, hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeping(directory: &std::path::Path, content: &[u8]) -> (Arc<Files>, Keeping) {
        let files = Arc::new(Files::open(directory).unwrap());
        files.make_blob_directories().unwrap();
        let keeping = Keeping::begin(&files, &Digest::sha256(content)).unwrap();
        (files, keeping)
    }

    #[test]
    fn what_is_read_is_written_and_has_its_name_only_once_it_is_published() {
        let directory = tempfile::tempdir().unwrap();
        let content = vec![7; 100_000];
        let digest = Digest::sha256(&content);
        let (files, mut keeping) = keeping(directory.path(), &content);
        let mut read = Vec::new();
        keeping.tee(content.as_slice()).read_to_end(&mut read).unwrap();
        keeping.look_for_failure().unwrap();
        let blob = keeping.finish().unwrap();
        assert!(read == content && !files.blob(&digest).exists());
        assert!(files.blobs().unwrap().is_empty(), "it is in use, and no leftover");
        blob.publish().unwrap();
        assert!(std::fs::read(files.blob(&digest)).unwrap() == content);
        blob.unpublish();
        assert!(!files.blob(&digest).exists());
        // A second time, or without having been published, is nothing.
        blob.unpublish();
        drop(blob);
        assert_eq!(std::fs::read_dir(directory.path().join("blobs")).unwrap().count(), 2);
    }

    /// Not a fault of the layer or the registry.
    #[test]
    fn a_blob_that_cannot_be_written_is_a_failure_of_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let (_files, mut keeping) = keeping(directory.path(), b"x");
        keeping.file = File::options().write(true).open("/dev/full").unwrap();
        assert!(keeping.tee(&b"content"[..]).read(&mut [0; 16]).is_err());
        let error = keeping.look_for_failure().unwrap_err();
        assert!(error.is_out_of_space() && error.to_string().contains("blobs"), "{error}");
    }

    #[test]
    fn a_file_is_hashed_by_the_algorithm_of_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"content").unwrap();
        for algorithm in [crate::digest::Algorithm::Sha256, crate::digest::Algorithm::Sha512] {
            let expected = Digest::of(algorithm, b"content");
            let found = hash(&File::open(&path).unwrap(), &expected).unwrap();
            assert_eq!(found, (7, expected));
        }
    }
}
