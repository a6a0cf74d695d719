//! Archives made byte by byte, so that they can be wrong in any way.

/// An archive under construction.
#[derive(Default, Clone)]
pub(super) struct Archive {
    bytes: Vec<u8>,
}

/// One header's fields.
#[derive(Clone)]
pub(super) struct Member<'a> {
    pub(super) path: &'a [u8],
    pub(super) typeflag: u8,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: u64,
    pub(super) link: &'a [u8],
    pub(super) device: (u32, u32),
    pub(super) magic: &'a [u8; 8],
}

impl<'a> Member<'a> {
    pub(super) fn new(typeflag: u8, path: &'a str) -> Self {
        Self {
            path: path.as_bytes(),
            typeflag,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 1_600_000_000,
            link: b"",
            device: (0, 0),
            magic: b"ustar\x0000",
        }
    }

    pub(super) fn header(&self) -> [u8; 512] {
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, self.path);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, format!("{:07o}", self.uid).as_bytes());
        put(116, format!("{:07o}", self.gid).as_bytes());
        put(124, format!("{:011o}", self.size).as_bytes());
        put(136, format!("{:011o}", self.mtime).as_bytes());
        put(156, &[self.typeflag]);
        put(157, self.link);
        put(257, self.magic);
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        seal(&mut header);
        header
    }
}

/// Sets the checksum.
pub(super) fn seal(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

impl Archive {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn content(mut self, content: &[u8]) -> Self {
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// A member whose size field is that of `content`.
    pub(super) fn member(self, member: Member<'_>, content: &[u8]) -> Self {
        let member = Member { size: content.len() as u64, ..member };
        self.raw(&member.header()).content(content)
    }

    pub(super) fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.member(Member::new(b'0', path), content.as_ref())
    }

    pub(super) fn directory(self, path: &str) -> Self {
        self.member(Member { mode: 0o755, ..Member::new(b'5', path) }, b"")
    }

    pub(super) fn symlink(self, path: &str, target: &str) -> Self {
        self.member(Member { link: target.as_bytes(), ..Member::new(b'2', path) }, b"")
    }

    pub(super) fn hard_link(self, path: &str, target: &str) -> Self {
        self.member(Member { link: target.as_bytes(), ..Member::new(b'1', path) }, b"")
    }

    /// An extended header for the next member.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.extended(b'x', records)
    }

    pub(super) fn global(self, records: &[(&str, &[u8])]) -> Self {
        self.extended(b'g', records)
    }

    fn extended(self, typeflag: u8, records: &[(&str, &[u8])]) -> Self {
        let content: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.member(Member::new(typeflag, "pax"), &content)
    }

    /// A GNU long name (`L`) or link (`K`).
    pub(super) fn long(self, typeflag: u8, name: &str) -> Self {
        let member = Member { magic: b"ustar  \0", ..Member::new(typeflag, "././@LongLink") };
        self.member(member, &[name.as_bytes(), b"\0"].concat())
    }

    pub(super) fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }

    /// Without the two zero blocks.
    pub(super) fn unended(self) -> Vec<u8> {
        self.bytes
    }
}

// The length counts itself.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest != length {
        length += 1;
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}
