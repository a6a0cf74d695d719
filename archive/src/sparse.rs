//! Files with holes: GNU's sparse format 1.0 ("Storing Sparse Files" in the GNU tar manual), which GNU tar, Go and Python
//! read as well.

use std::fs::File;
use std::io;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Holes smaller than this are written as zeros: not every reader of archives knows sparse files.
const MIN_HOLE: u64 = 1 << 20;
/// More segments than this are not written; the file's later holes become zeros.
const MAX_SEGMENTS: usize = 1 << 12;

/// A stretch of a file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The stretches of data in a file of `size` bytes. None: there is no hole that is worth telling of.
pub(crate) fn segments(file: &File, size: u64) -> io::Result<Option<Vec<Segment>>> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut position = 0;
    while position < size && segments.len() < MAX_SEGMENTS {
        let data = match seek(file, SeekFrom::Data(position)) {
            Ok(data) if data < size => data,
            Ok(_) | Err(Errno::NXIO) => break,
            // Filesystems that know no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let hole = match seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(size),
            // Shorter by now.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        match segments.last_mut() {
            Some(last) if data - (last.offset + last.length) < MIN_HOLE => last.length = hole - last.offset,
            None if data < MIN_HOLE => segments.push(Segment { offset: 0, length: hole }),
            _ => segments.push(Segment { offset: data, length: hole - data }),
        }
        position = hole.max(data + 1);
    }
    if segments.len() == MAX_SEGMENTS
        && let Some(last) = segments.last_mut()
    {
        last.length = size - last.offset;
    }
    let end = segments.last().map_or(0, |last| last.offset + last.length);
    let is_whole = segments.len() <= 1 && segments.iter().all(|only| only.offset == 0);
    if is_whole && size - end < MIN_HOLE {
        return Ok(None);
    }
    Ok(Some(segments))
}

/// The map that comes before the data, padded to a whole block. A trailing segment of no length at the end of the file
/// says how long it is, as GNU tar writes it.
pub(crate) fn map(segments: &[Segment], size: u64) -> Vec<u8> {
    let end = segments.last().map_or(0, |last| last.offset + last.length);
    let closing = (end < size).then_some(Segment { offset: size, length: 0 });
    let all: Vec<Segment> = segments.iter().copied().chain(closing).collect();
    let mut map = format!("{}\n", all.len());
    for segment in all {
        map.push_str(&format!("{}\n{}\n", segment.offset, segment.length));
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(512), 0);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(size: u64, data: &[(u64, usize)]) -> File {
        // Not a tmpfs everywhere, but every filesystem that tests run on knows holes.
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(size).unwrap();
        for (offset, length) in data {
            file.write_all_at(&vec![7; *length], *offset).unwrap();
        }
        file
    }

    #[test]
    fn a_file_without_large_holes_is_written_whole() {
        assert_eq!(segments(&file(0, &[]), 0).unwrap(), None);
        assert_eq!(segments(&file(5, &[(0, 5)]), 5).unwrap(), None);
        assert_eq!(segments(&file(400_000, &[(0, 5), (200_000, 5)]), 400_000).unwrap(), None);
    }

    #[test]
    fn large_holes_are_left_out() {
        let size = 64 << 20;
        assert_eq!(segments(&file(size, &[]), size).unwrap(), Some(vec![]));
        let found = segments(&file(size, &[(0, 4096), (8 << 20, 4096)]), size).unwrap().unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].offset, 0);
        assert!(found[1].offset <= 8 << 20 && found[1].length < 1 << 20);
        assert!(String::from_utf8(map(&found, size)).unwrap().starts_with("3\n0\n"));
    }
    /// As `echo >file` does it.
    #[test]
    fn a_file_that_is_written_anew_meanwhile_is_no_error() {
        let file = file(5, &[(0, 5)]);
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    file.set_len(0).unwrap();
                    file.write_all_at(b"again", 0).unwrap();
                }
            });
            let failed = (0..20_000).find_map(|_| segments(&file, 5).err());
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(failed.is_none(), "{failed:?}");
        });
    }
}
