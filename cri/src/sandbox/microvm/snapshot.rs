//! A directory of kubelet's as it is at one moment, to be written into a guest.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hull_agent::protocol::messages::write_volume::{Entry, entry::Content};

/// Bounds of what is copied: kubelet's own volumes hold a megabyte each.
const MAX_BYTES: usize = 16 << 20;
const MAX_ENTRIES: usize = 10_000;
const MAX_DEPTH: usize = 16;
/// Content of one request; frames to a guest hold 1 MiB.
const REQUEST: usize = 512 << 10;

/// What kubelet calls the link to the files of the present generation.
const PRESENT: &str = "..data";

/// All that a directory holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Snapshot {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Snapshot {
    /// Of a directory: of what `..data` leads to, if kubelet made one, or else of what it holds itself. Of a single
    /// file: that, called `name`.
    pub(super) fn take(path: &Path, name: &str) -> io::Result<Self> {
        let mut snapshot = Self::default();
        let metadata = fs::metadata(path)?;
        if metadata.is_file() {
            snapshot.file(path, name.to_owned())?;
            return Ok(snapshot);
        }
        let present = path.join(PRESENT);
        // Resolved once: an update in the middle does not mix two generations.
        let top = fs::canonicalize(&present).ok().filter(|top| top.starts_with(path) && top.is_dir());
        snapshot.directory(&top.unwrap_or_else(|| path.to_owned()), &PathBuf::new(), 0)?;
        Ok(snapshot)
    }

    fn directory(&mut self, top: &Path, below: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(too_much("its directories are too deep"));
        }
        let mut names: Vec<_> =
            fs::read_dir(top.join(below))?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            // What kubelet keeps for itself.
            if depth == 0 && name.as_encoded_bytes().starts_with(b"..") {
                continue;
            }
            let below = below.join(&name);
            let path = below.to_str().ok_or_else(|| too_much("a name is not UTF-8"))?.to_owned();
            let whole = top.join(&below);
            let metadata = fs::symlink_metadata(&whole)?;
            if metadata.is_dir() {
                self.add(Entry { content: Some(Content::Directory(true)), ..entry(path, &metadata) }, 0)?;
                self.directory(top, &below, depth + 1)?;
            } else if metadata.is_symlink() {
                let target = fs::read_link(&whole)?;
                let target = target.to_str().ok_or_else(|| too_much("a link is not UTF-8"))?.to_owned();
                self.add(Entry { content: Some(Content::Link(target)), ..entry(path, &metadata) }, 0)?;
            } else if metadata.is_file() {
                self.file(&whole, path)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, whole: &Path, path: String) -> io::Result<()> {
        let file = File::options().read(true).custom_flags(libc_nonblock()).open(whole)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(());
        }
        let room = (MAX_BYTES - self.bytes.min(MAX_BYTES)) as u64;
        let mut content = Vec::new();
        file.take(room + 1).read_to_end(&mut content)?;
        let length = content.len();
        self.add(Entry { content: Some(Content::File(content)), ..entry(path, &metadata) }, length)
    }

    fn add(&mut self, entry: Entry, bytes: usize) -> io::Result<()> {
        self.bytes += bytes + entry.path.len();
        if self.bytes > MAX_BYTES || self.entries.len() >= MAX_ENTRIES {
            return Err(too_much("it holds more than kubelet writes"));
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Its number: equal ones have the same. Never 0.
    pub(super) fn generation(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for entry in &self.entries {
            (&entry.path, entry.mode, entry.uid, entry.gid).hash(&mut hasher);
            match &entry.content {
                Some(Content::File(bytes)) => (0_u8, bytes).hash(&mut hasher),
                Some(Content::Link(target)) => (1_u8, target).hash(&mut hasher),
                Some(Content::Directory(_)) | None => 2_u8.hash(&mut hasher),
            }
        }
        hasher.finish().max(1)
    }

    /// In pieces that each fit into one request; there is always one.
    pub(super) fn into_requests(self) -> Vec<Vec<Entry>> {
        let mut requests = vec![Vec::new()];
        let mut room = REQUEST;
        let mut put = |entry: Entry, size: usize| {
            if size > room {
                requests.push(Vec::new());
                room = REQUEST;
            }
            room = room.saturating_sub(size);
            if let Some(last) = requests.last_mut() {
                last.push(entry);
            }
        };
        for mut entry in self.entries {
            let overhead = entry.path.len() + 64;
            let Some(Content::File(bytes)) = entry.content.take_if(|one| matches!(one, Content::File(_)))
            else {
                put(entry, overhead);
                continue;
            };
            let mut pieces = bytes.chunks(REQUEST - (8 << 10));
            let first = pieces.next().unwrap_or_default().to_vec();
            let size = overhead + first.len();
            put(Entry { content: Some(Content::File(first)), ..entry.clone() }, size);
            for piece in pieces {
                let more =
                    Entry { content: Some(Content::File(piece.to_vec())), append: true, ..entry.clone() };
                put(more, overhead + piece.len());
            }
        }
        requests
    }
}

fn entry(path: String, metadata: &fs::Metadata) -> Entry {
    Entry {
        path,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        ..Entry::default()
    }
}

fn too_much(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

/// So that a FIFO in a file's place makes nobody wait.
fn libc_nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(snapshot: &Snapshot) -> Vec<&str> {
        snapshot.entries.iter().map(|entry| entry.path.as_str()).collect()
    }

    /// As kubelet's AtomicWriter leaves it.
    fn kubelet_writes(volume: &Path, generation: &str, content: &str) {
        let payload = volume.join(generation);
        fs::create_dir_all(payload.join("sub")).unwrap();
        fs::write(payload.join("key"), content).unwrap();
        fs::write(payload.join("sub/other"), "x").unwrap();
        let _ = fs::remove_file(volume.join("..data_tmp"));
        symlink(generation, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        let _ = symlink("..data/key", volume.join("key"));
    }

    #[test]
    fn the_present_generation_is_taken_and_its_number_changes_with_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().canonicalize().unwrap();
        kubelet_writes(&volume, "..one", "1");
        let first = Snapshot::take(&volume, "").unwrap();
        assert_eq!(names(&first), ["key", "sub", "sub/other"]);
        assert_eq!(first.generation(), Snapshot::take(&volume, "").unwrap().generation());
        kubelet_writes(&volume, "..two", "2");
        let second = Snapshot::take(&volume, "").unwrap();
        assert_ne!(first.generation(), second.generation());
        assert_eq!(second.entries[0].content, Some(Content::File(b"2".to_vec())));
    }

    #[test]
    fn a_plain_directory_and_a_single_file_are_taken_as_they_are() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a"), "1").unwrap();
        symlink("/etc/shadow", directory.path().join("b")).unwrap();
        let snapshot = Snapshot::take(directory.path(), "").unwrap();
        assert_eq!(names(&snapshot), ["a", "b"]);
        assert_eq!(
            snapshot.entries[1].content,
            Some(Content::Link("/etc/shadow".into())),
            "never what it leads to"
        );
        let single = Snapshot::take(&directory.path().join("a"), "file").unwrap();
        assert_eq!(names(&single), ["file"]);
        assert_eq!(Snapshot::default().into_requests().len(), 1);
    }

    #[test]
    fn a_long_file_travels_in_pieces_and_too_much_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("long"), vec![7; 3 << 20]).unwrap();
        fs::write(directory.path().join("short"), "s").unwrap();
        let requests = Snapshot::take(directory.path(), "").unwrap().into_requests();
        assert!(requests.len() > 5);
        let all: Vec<&Entry> = requests.iter().flatten().collect();
        let bytes = |entry: &&Entry| match &entry.content {
            Some(Content::File(bytes)) => bytes.len(),
            _ => 0,
        };
        assert_eq!(all.iter().map(bytes).sum::<usize>(), (3 << 20) + 1);
        assert!(!all[0].append && all[1].append && !all[all.len() - 1].append);
        assert!(requests.iter().all(|one| one.iter().map(|entry| bytes(&entry)).sum::<usize>() <= REQUEST));
        fs::write(directory.path().join("huge"), vec![7; MAX_BYTES]).unwrap();
        assert!(Snapshot::take(directory.path(), "").is_err());
    }
}
