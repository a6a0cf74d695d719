use std::io::BufRead;

use super::header::{BLOCK, Header};
use super::input::{Input, limit};
use super::pax::Records;
use super::sparse::{self, Segment};
use super::{Content, Device, Entry, EntryKind};
use crate::layer::erofs::Timestamp;
use crate::layer::error::{EntryProblem, LayerError};
use crate::layer::limits::Limits;
use crate::layer::tar_split::Recorder;

/// Reads entries in order. After [`next`](Self::next) gave an entry, its content is read by
/// [`content`](Self::content) or skipped by the following `next`.
pub(crate) struct TarReader<'l, R> {
    input: Input<'l, R>,
    entries: u64,
    globals: Records,
    body: Body,
}

// What is still unread of the current entry.
#[derive(Default)]
struct Body {
    stored: u64,
    padding: u64,
    size: u64,
    segments: Option<Vec<Segment>>,
}

// Extended headers that apply to the next entry.
#[derive(Default)]
struct Extensions {
    records: Option<Records>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<'l, R: BufRead> TarReader<'l, R> {
    /// Reads `input`; the recorder hears of every byte of it.
    pub(crate) fn new(input: R, limits: &'l Limits, recorder: Option<Recorder<'l>>) -> Self {
        Self {
            input: Input::new(input, limits, recorder),
            entries: 0,
            globals: Records::default(),
            body: Body::default(),
        }
    }

    /// Entries given so far.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes of the archive read so far: where the content of the entry given last begins.
    pub(crate) fn position(&self) -> u64 {
        self.input.position()
    }

    /// Whether the content of the entry given last is not in one piece.
    pub(crate) fn is_sparse(&self) -> bool {
        self.body.segments.is_some()
    }

    /// The next entry, or `None` at the archive's end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        self.input.skip(self.body.stored + self.body.padding)?;
        self.body = Body::default();
        let mut extensions = Extensions::default();
        let mut block = [0; BLOCK];
        loop {
            if !self.read_header_block(&mut block, &extensions)? {
                return Ok(None);
            }
            let header =
                Header::parse(&block).ok_or_else(|| self.input.malformed("a header's checksum is wrong"))?;
            if !self.take_extension(&header, &mut extensions)? {
                self.entries += 1;
                limit("entries", self.entries, self.input.limits.max_entries)?;
                return self.entry(&header, extensions).map(Some);
            }
        }
    }

    /// Hands the current entry's content to `sink`, in order and completely.
    pub(crate) fn content(
        &mut self,
        mut sink: impl FnMut(Content<'_>) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let body = std::mem::take(&mut self.body);
        match body.segments {
            None => self.input.content(0, body.stored, &mut sink)?,
            Some(segments) => {
                let mut at = 0;
                for segment in segments {
                    if segment.offset > at {
                        sink(Content::Hole(segment.offset - at))?;
                    }
                    self.input.content(segment.offset, segment.length, &mut sink)?;
                    at = segment.offset + segment.length;
                }
                if body.size > at {
                    sink(Content::Hole(body.size - at))?;
                }
            }
        }
        self.input.skip(body.padding)
    }

    /// Tells the recorder which inode holds the content that was read last.
    pub(crate) fn content_is_in(&mut self, inode: u64) -> Result<(), LayerError> {
        match &mut self.input.recorder {
            Some(recorder) => recorder.inode(inode).map_err(LayerError::WriteFile),
            None => Ok(()),
        }
    }

    /// The recorder, when all was read.
    pub(crate) fn into_recorder(self) -> Option<Recorder<'l>> {
        self.input.recorder
    }

    /// Reads what follows the archive's end, so that a digest over all bytes can be made.
    pub(crate) fn drain(&mut self) -> Result<(), LayerError> {
        self.input.drain()
    }

    // False at the end: two zero blocks, or the end of the stream where a header could start.
    fn read_header_block(
        &mut self,
        block: &mut [u8; BLOCK],
        extensions: &Extensions,
    ) -> Result<bool, LayerError> {
        let at_end = if !self.input.read_block(block)? {
            true
        } else if block.iter().any(|byte| *byte != 0) {
            false
        } else if self.input.read_block(block)? && block.iter().any(|byte| *byte != 0) {
            return Err(self.input.malformed("data follows a lone zero block"));
        } else {
            true
        };
        let pending =
            extensions.records.is_some() || extensions.long_name.is_some() || extensions.long_link.is_some();
        if at_end && pending {
            return Err(self.input.truncated("the entry of an extended header"));
        }
        Ok(!at_end)
    }

    // True when the header only says something about following ones.
    fn take_extension(
        &mut self,
        header: &Header<'_>,
        extensions: &mut Extensions,
    ) -> Result<bool, LayerError> {
        let twice = "an extended header appears twice for one entry";
        match header.typeflag() {
            b'x' | b'X' => {
                let content = self.extended_content(header)?;
                let mut records = self.globals.clone();
                records.read(&content).map_err(|reason| self.input.malformed(reason))?;
                if extensions.records.replace(records).is_some() {
                    return Err(self.input.malformed(twice));
                }
            }
            b'g' => {
                let content = self.extended_content(header)?;
                let mut globals = std::mem::take(&mut self.globals);
                globals.read(&content).map_err(|reason| self.input.malformed(reason))?;
                if globals.is_about_one_entry() {
                    return Err(self.input.malformed("a global header sets a path, a link or a size"));
                }
                // Each entry gets a copy.
                let bytes =
                    globals.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
                let bound = self.input.limits.max_xattr_bytes;
                limit("bytes of attributes in global headers", bytes as u64, bound)?;
                self.globals = globals;
            }
            b'L' => {
                let name = self.extended_content(header)?;
                if extensions.long_name.replace(until_nul(name)).is_some() {
                    return Err(self.input.malformed(twice));
                }
            }
            b'K' => {
                let link = self.extended_content(header)?;
                if extensions.long_link.replace(until_nul(link)).is_some() {
                    return Err(self.input.malformed(twice));
                }
            }
            // A volume label.
            b'V' => {
                let size = self.size_field(header)?;
                self.input.skip(padded(size, self.input.limits.max_uncompressed)?)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn entry(&mut self, header: &Header<'_>, extensions: Extensions) -> Result<Entry, LayerError> {
        let has_records = extensions.records.is_some();
        let mut records = extensions.records.unwrap_or_else(|| self.globals.clone());
        let refuse = |path: &[u8], problem| Err(LayerError::entry(path, problem));
        let ambiguous = (has_records && records.path.is_some() && extensions.long_name.is_some())
            || (records.link.is_some() && extensions.long_link.is_some());
        let sparse_name = records.sparse.name.take();
        let path =
            sparse_name.or(records.path.take()).or(extensions.long_name).unwrap_or_else(|| header.path());
        let link = records.link.take().or(extensions.long_link).unwrap_or_else(|| header.link());
        if ambiguous {
            return refuse(&path, EntryProblem::AmbiguousHeaders);
        }
        for (what, text) in [("path", &path), ("link target", &link)] {
            if text.contains(&0) {
                return refuse(&path, EntryProblem::Nul(what));
            }
        }
        let stored = self.stored_size(header, &records, &path)?;
        let kind = self.kind(header, &records, &path, link, stored)?;
        let number = |value: Option<i64>, what| value.ok_or_else(|| self.input.malformed(what));
        let mode = number(header.mode(), "a header's mode is not a number")?;
        let uid = match records.uid {
            Some(uid) => uid,
            None => number(header.uid(), "a header's uid is not a number")?.into(),
        };
        let gid = match records.gid {
            Some(gid) => gid,
            None => number(header.gid(), "a header's gid is not a number")?.into(),
        };
        let mtime = match records.mtime {
            Some(mtime) => mtime,
            None => Timestamp {
                seconds: number(header.mtime(), "a header's mtime is not a number")?,
                nanoseconds: 0,
            },
        };
        Ok(Entry {
            kind,
            mode: (mode & 0o7777) as u16,
            uid: id("uid", uid, &path)?,
            gid: id("gid", gid, &path)?,
            mtime,
            xattrs: records.xattrs,
            path,
        })
    }

    // The bytes that follow the header, by the PAX record if there is one.
    fn stored_size(&self, header: &Header<'_>, records: &Records, path: &[u8]) -> Result<u64, LayerError> {
        // What writers put into the field when the size does not fit: all sevens, or nothing.
        const FULL: u64 = 0o77_777_777_777;
        let field = self.size_field(header)?;
        match records.size {
            Some(pax) if field != 0 && field != pax && field != FULL => {
                Err(LayerError::entry(path, EntryProblem::SizesDisagree { pax, header: field }))
            }
            Some(pax) => Ok(pax),
            None => Ok(field),
        }
    }

    // Decides the type and sets up the body.
    fn kind(
        &mut self,
        header: &Header<'_>,
        records: &Records,
        path: &[u8],
        link: Vec<u8>,
        stored: u64,
    ) -> Result<EntryKind, LayerError> {
        let typeflag = header.typeflag();
        // V7 had no type for directories: a trailing slash made one. Go and GNU tar still read it so.
        let is_old_directory = matches!(typeflag, b'0' | 0) && path.ends_with(b"/");
        let kind = match typeflag {
            _ if is_old_directory => EntryKind::Directory,
            b'0' | 0 | b'7' => return self.file(header, records, path, stored, false).map(EntryKind::File),
            b'S' if header.is_gnu() => {
                return self.file(header, records, path, stored, true).map(EntryKind::File);
            }
            // Some writers keep the target's size here. All readers take it for zero.
            b'1' => return Ok(EntryKind::HardLink(link)),
            b'2' => EntryKind::Symlink(link),
            b'3' => EntryKind::CharDevice(self.device(header, path)?),
            b'4' => EntryKind::BlockDevice(self.device(header, path)?),
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            // An incremental dump's directory: its content is a list of names.
            b'D' => {
                self.set_body(stored, stored, None)?;
                return Ok(EntryKind::Directory);
            }
            other => {
                return Err(LayerError::entry(path, EntryProblem::UnsupportedType(char::from(other))));
            }
        };
        if stored != 0 {
            return Err(LayerError::entry(path, EntryProblem::UnexpectedContent(stored)));
        }
        if records.sparse.is_present() {
            let problem = EntryProblem::BadSparseMap("the entry is not a file");
            return Err(LayerError::entry(path, problem));
        }
        Ok(kind)
    }

    fn file(
        &mut self,
        header: &Header<'_>,
        records: &Records,
        path: &[u8],
        stored: u64,
        old_gnu: bool,
    ) -> Result<u64, LayerError> {
        let bad = |reason| LayerError::entry(path, EntryProblem::BadSparseMap(reason));
        let sparse = &records.sparse;
        if !old_gnu && !sparse.is_present() {
            self.set_body(stored, stored, None)?;
            return Ok(stored);
        }
        if old_gnu && sparse.is_present() {
            return Err(bad("it is given twice"));
        }
        let (segments, real_size, map_bytes) = if old_gnu {
            let (segments, real_size) = sparse::old_gnu_map(&mut self.input, header, path)?;
            (segments, real_size, 0)
        } else {
            let real_size = sparse.real_size.ok_or_else(|| bad("the file's size is missing"))?;
            match sparse.version {
                (Some(1), Some(0)) => {
                    let (segments, map_bytes) = sparse::inline_map(&mut self.input, stored, path)?;
                    (segments, real_size, map_bytes)
                }
                (None | Some(0), None | Some(0 | 1)) if sparse.has_map => {
                    (sparse.segments.clone(), real_size, 0)
                }
                _ => return Err(bad("its version is unknown or it has no map")),
            }
        };
        let data = stored.checked_sub(map_bytes).ok_or_else(|| bad("it is longer than the content"))?;
        sparse::check(&segments, real_size, data).map_err(bad)?;
        self.set_body(data, real_size, Some(segments))?;
        Ok(real_size)
    }

    fn set_body(&mut self, stored: u64, size: u64, segments: Option<Vec<Segment>>) -> Result<(), LayerError> {
        let whole = padded(stored, self.input.limits.max_uncompressed)?;
        limit("bytes of file content", size, self.input.limits.max_content)?;
        self.body = Body { stored, padding: whole - stored, size, segments };
        Ok(())
    }

    fn device(&self, header: &Header<'_>, path: &[u8]) -> Result<Device, LayerError> {
        let (major, minor) =
            header.device().ok_or_else(|| self.input.malformed("a device number is not a number"))?;
        // Linux has 12 bits for the major and 20 for the minor number.
        match (u32::try_from(major), u32::try_from(minor)) {
            (Ok(major @ 0..=0xfff), Ok(minor @ 0..=0xf_ffff)) => Ok(Device { major, minor }),
            _ => Err(LayerError::entry(path, EntryProblem::BadDevice(major, minor))),
        }
    }

    fn size_field(&self, header: &Header<'_>) -> Result<u64, LayerError> {
        header.size().ok_or_else(|| self.input.malformed("a header's size is not a number"))
    }

    fn extended_content(&mut self, header: &Header<'_>) -> Result<Vec<u8>, LayerError> {
        let size = self.size_field(header)?;
        limit("bytes of an extended header", size, self.input.limits.max_extended_header)?;
        let mut content = Vec::with_capacity(size as usize);
        self.input.data(size, &mut |piece| {
            if let Content::Data(bytes) = piece {
                content.extend_from_slice(bytes);
            }
            Ok(())
        })?;
        self.input.skip(size.next_multiple_of(BLOCK as u64) - size)?;
        Ok(content)
    }
}

fn padded(size: u64, limit: u64) -> Result<u64, LayerError> {
    if size > limit {
        return Err(LayerError::Limit { what: "uncompressed bytes", limit });
    }
    Ok(size.next_multiple_of(BLOCK as u64))
}

fn until_nul(mut name: Vec<u8>) -> Vec<u8> {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    name.truncate(end);
    name
}

// The last id means "no id" to the kernel.
fn id(what: &'static str, value: i128, path: &[u8]) -> Result<u32, LayerError> {
    match u32::try_from(value) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => Err(LayerError::entry(path, EntryProblem::BadId(what, value))),
    }
}
