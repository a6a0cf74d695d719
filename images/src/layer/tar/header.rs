use super::number;

/// Bytes of a tar block; headers are one, content is padded to whole ones.
pub(super) const BLOCK: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// One header block whose checksum has been verified.
pub(super) struct Header<'a> {
    block: &'a [u8; BLOCK],
    format: Format,
}

impl<'a> Header<'a> {
    /// `None` when the checksum is wrong.
    pub(super) fn parse(block: &'a [u8; BLOCK]) -> Option<Self> {
        let declared = number::field(&block[148..156])?;
        // POSIX sums unsigned bytes; some old implementations summed signed ones.
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (index, byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&index) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if declared != unsigned && declared != signed {
            return None;
        }
        let format = match &block[257..263] {
            b"ustar\0" if &block[508..512] == b"tar\0" => Format::Star,
            b"ustar\0" => Format::Ustar,
            b"ustar " => Format::Gnu,
            _ => Format::V7,
        };
        Some(Self { block, format })
    }

    pub(super) fn is_gnu(&self) -> bool {
        self.format == Format::Gnu
    }

    pub(super) fn typeflag(&self) -> u8 {
        self.block[156]
    }

    /// The path with the ustar prefix before it.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.block[..100]);
        let prefix = match self.format {
            Format::Ustar => text(&self.block[345..500]),
            Format::Star => text(&self.block[345..476]),
            Format::V7 | Format::Gnu => &[],
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.block[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Option<i64> {
        number::field(&self.block[100..108])
    }

    pub(super) fn uid(&self) -> Option<i64> {
        number::field(&self.block[108..116])
    }

    pub(super) fn gid(&self) -> Option<i64> {
        number::field(&self.block[116..124])
    }

    pub(super) fn size(&self) -> Option<u64> {
        number::field(&self.block[124..136]).and_then(|size| u64::try_from(size).ok())
    }

    pub(super) fn mtime(&self) -> Option<i64> {
        number::field(&self.block[136..148])
    }

    /// Major and minor; V7 headers have none.
    pub(super) fn device(&self) -> Option<(i64, i64)> {
        if self.format == Format::V7 {
            return Some((0, 0));
        }
        Some((number::field(&self.block[329..337])?, number::field(&self.block[337..345])?))
    }

    /// The four places for a sparse map in an old GNU header, whether more follow, and the expanded size.
    pub(super) fn gnu_sparse(&self) -> Option<(&'a [u8], bool, u64)> {
        let real = number::field(&self.block[483..495]).and_then(|size| u64::try_from(size).ok())?;
        Some((&self.block[386..482], self.block[482] != 0, real))
    }
}

// Up to the first NUL; a full field has none.
fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    &field[..end]
}
