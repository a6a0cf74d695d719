//! The file `exit-<container id>` in a pod's state directory: how a container ended, written before it is reported.
//!
//! Content: `HULLEXIT`, a little-endian CRC-32 of the rest, the protobuf [`ExitRecord`]. It appears by rename, so it is
//! there whole or not at all; after a power cut it may be torn, which the checksum tells.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use prost::Message as _;
use rustix::fs::{Dir, Mode, OFlags};

use super::is_valid_id;
use super::messages::ExitRecord;

const MAGIC: &[u8; 8] = b"HULLEXIT";
const HEADER: usize = MAGIC.len() + size_of::<u32>();
const PREFIX: &str = "exit-";
/// Longest file in bytes; an id of 128 bytes and five numbers need far less.
const MAX_FILE: usize = 1024;

/// Name of the record's file.
pub fn file_name(container_id: &str) -> String {
    format!("{PREFIX}{container_id}")
}

/// Writes the record into the directory `dir`, replacing an older one in one step. Not synced: a record of another
/// boot means nothing.
pub fn write(dir: BorrowedFd<'_>, record: &ExitRecord) -> io::Result<()> {
    let name = checked_name(&record.container_id)?;
    let temporary = format!(".{name}.new");
    let body = record.encode_to_vec();
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&crc32(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(dir, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
    // One write: regular files take this little at once or not at all.
    if rustix::io::write(&file, &bytes)? != bytes.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(rustix::fs::renameat(dir, &temporary, dir, &name)?)
}

/// Reads the record of this container; `None` if there is none. `InvalidData` if the file is torn or another's.
pub fn read(dir: BorrowedFd<'_>, container_id: &str) -> io::Result<Option<ExitRecord>> {
    let name = checked_name(container_id)?;
    let record = match rustix::fs::openat(
        dir,
        &name,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    ) {
        Ok(file) => read_file(&file)?,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if record.container_id == container_id {
        Ok(Some(record))
    } else {
        Err(invalid("names another container"))
    }
}

/// All good records in the directory, in no order; torn ones are left out.
pub fn list(dir: BorrowedFd<'_>) -> io::Result<Vec<ExitRecord>> {
    let mut records = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().ok().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        match read(dir, id) {
            Ok(record) => records.extend(record),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

/// Removes the record of this container; one that is not there is fine.
pub fn remove(dir: BorrowedFd<'_>, container_id: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(dir, checked_name(container_id)?, rustix::fs::AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn read_file(file: &OwnedFd) -> io::Result<ExitRecord> {
    let mut bytes = [0; MAX_FILE + 1];
    let length = rustix::io::read(file, &mut bytes)?;
    if length > MAX_FILE {
        return Err(invalid("is too long"));
    }
    parse(&bytes[..length])
}

/// The record in a file's bytes. Public for its fuzz target.
#[doc(hidden)]
pub fn parse(bytes: &[u8]) -> io::Result<ExitRecord> {
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| invalid("does not begin like one"))?;
    let (sum, body) = rest.split_first_chunk().ok_or_else(|| invalid("is cut off"))?;
    if u32::from_le_bytes(*sum) != crc32(body) {
        return Err(invalid("is torn: its checksum does not match"));
    }
    ExitRecord::decode(body).map_err(|_| invalid("holds no exit record"))
}

fn checked_name(container_id: &str) -> io::Result<String> {
    if is_valid_id(container_id) {
        return Ok(file_name(container_id));
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "not a container id"))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the exit record's file {what}"))
}

/// CRC-32 as in IEEE 802.3 and zlib, bit by bit: records are a hundred bytes, and a table would be a kilobyte of memory
/// in every agent.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let mask = (crc & 1).wrapping_neg();
            crc = (crc >> 1) ^ (0xedb8_8320 & mask);
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn record(id: &str) -> ExitRecord {
        ExitRecord {
            container_id: id.into(),
            exit_code: 137,
            finished_at: 2,
            started_at: 1,
            oom_killed: true,
        }
    }

    #[test]
    fn the_checksum_is_the_usual_crc_32() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_written_record_is_read_back_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        assert_eq!(read(fd.as_fd(), "a").unwrap(), None);
        write(fd.as_fd(), &record("a")).unwrap();
        write(fd.as_fd(), &record("a")).unwrap();
        write(fd.as_fd(), &record("b")).unwrap();
        assert_eq!(read(fd.as_fd(), "a").unwrap(), Some(record("a")));
        assert_eq!(list(fd.as_fd()).unwrap().len(), 2);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file stays");
        remove(fd.as_fd(), "a").unwrap();
        remove(fd.as_fd(), "a").unwrap();
        assert_eq!(list(fd.as_fd()).unwrap(), [record("b")]);
    }

    #[test]
    fn a_record_torn_anywhere_is_noticed_and_left_out_of_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        write(fd.as_fd(), &record("a")).unwrap();
        let path = dir.path().join("exit-a");
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(read(fd.as_fd(), "a").unwrap_err().kind(), io::ErrorKind::InvalidData, "{length}");
        }
        for position in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[position] ^= 0x10;
            std::fs::write(&path, &bytes).unwrap();
            assert!(read(fd.as_fd(), "a").is_err(), "{position}");
        }
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert!(read(fd.as_fd(), "a").is_err());
        assert!(list(fd.as_fd()).unwrap().is_empty());
    }

    #[test]
    fn an_id_that_is_a_path_touches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        for id in ["", "../a", "a/b", ".hidden", "a\nb", &"x".repeat(129)] {
            assert_eq!(
                write(fd.as_fd(), &record(id)).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{id}"
            );
        }
    }

    #[test]
    fn a_symbolic_link_in_place_of_a_record_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        write(fd.as_fd(), &record("a")).unwrap();
        std::os::unix::fs::symlink("exit-a", dir.path().join("exit-b")).unwrap();
        assert!(read(fd.as_fd(), "b").is_err());
    }
}
