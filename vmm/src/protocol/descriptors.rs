//! The descriptors of one frame, taken by number, each asserted to be what the request says.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

/// Why a descriptor was not taken.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// No descriptor has the number, or it was taken already.
    #[error("descriptor {number}, the {what}, did not come with the request or is named twice")]
    Missing {
        /// Number on the frame.
        number: u32,
        /// What the request calls it.
        what: &'static str,
    },
    /// It is another kind of file.
    #[error("descriptor {number}, the {what}, is {found} where {wanted} is needed")]
    WrongType {
        /// Number on the frame.
        number: u32,
        /// What the request calls it.
        what: &'static str,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// It is open for too much or too little.
    #[error("descriptor {number}, the {what}, must be open {wanted}")]
    WrongAccess {
        /// Number on the frame.
        number: u32,
        /// What the request calls it.
        what: &'static str,
        /// How it should be open.
        wanted: &'static str,
    },
    /// The kernel would not tell what it is.
    #[error("cannot examine descriptor {number}, the {what}: {errno}")]
    Examine {
        /// Number on the frame.
        number: u32,
        /// What the request calls it.
        what: &'static str,
        /// Why.
        errno: Errno,
    },
}

/// What a descriptor may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Open for reading and nothing else.
    ReadOnly,
    /// Open for reading and writing.
    ReadWrite,
    /// Open for writing, each write at the end.
    Append,
    /// Open for writing; reading as well does not matter.
    Write,
}

impl Access {
    const fn name(self) -> &'static str {
        match self {
            Self::ReadOnly => "for reading only",
            Self::ReadWrite => "for reading and writing",
            Self::Append => "for append",
            Self::Write => "for writing",
        }
    }

    fn is_given_by(self, flags: OFlags) -> bool {
        if flags.contains(OFlags::PATH) {
            return false;
        }
        let mode = flags & OFlags::RWMODE;
        match self {
            Self::ReadOnly => mode == OFlags::RDONLY,
            Self::ReadWrite => mode == OFlags::RDWR,
            Self::Append => mode != OFlags::RDONLY && flags.contains(OFlags::APPEND),
            Self::Write => mode != OFlags::RDONLY,
        }
    }
}

/// The descriptors of a frame; what nobody takes is closed in the end.
#[derive(Debug)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// The descriptors as they came.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes the descriptor, whatever it is.
    pub fn take(&mut self, number: u32, what: &'static str) -> Result<OwnedFd, DescriptorError> {
        let place = usize::try_from(number).ok().and_then(|index| self.0.get_mut(index));
        place.and_then(Option::take).ok_or(DescriptorError::Missing { number, what })
    }

    /// Takes a regular file that is open like this.
    pub fn file(
        &mut self,
        number: u32,
        what: &'static str,
        access: Access,
    ) -> Result<OwnedFd, DescriptorError> {
        let fd = self.of_type(number, what, &[FileType::RegularFile], "a regular file")?;
        check_access(fd, number, what, access)
    }

    /// Takes a block device or regular file that is open like this.
    pub fn disk(
        &mut self,
        number: u32,
        what: &'static str,
        access: Access,
    ) -> Result<OwnedFd, DescriptorError> {
        let types = [FileType::BlockDevice, FileType::RegularFile];
        let fd = self.of_type(number, what, &types, "a block device or a regular file")?;
        check_access(fd, number, what, access)
    }

    /// Takes a character device that is open for reading and writing.
    pub fn character_device(&mut self, number: u32, what: &'static str) -> Result<OwnedFd, DescriptorError> {
        let fd = self.of_type(number, what, &[FileType::CharacterDevice], "a character device")?;
        check_access(fd, number, what, Access::ReadWrite)
    }

    /// Takes a unix stream socket, listening or not.
    pub fn socket(
        &mut self,
        number: u32,
        what: &'static str,
        listening: bool,
    ) -> Result<OwnedFd, DescriptorError> {
        use rustix::net::{AddressFamily, SocketType, sockopt};
        let wanted = if listening { "a listening unix stream socket" } else { "a unix stream socket" };
        let fd = self.of_type(number, what, &[FileType::Socket], wanted)?;
        let examine = |errno| DescriptorError::Examine { number, what, errno };
        let unix = sockopt::socket_domain(&fd).map_err(examine)? == AddressFamily::UNIX;
        let stream = sockopt::socket_type(&fd).map_err(examine)? == SocketType::STREAM;
        if unix && stream && sockopt::socket_acceptconn(&fd).map_err(examine)? == listening {
            return Ok(fd);
        }
        Err(DescriptorError::WrongType { number, what, found: "another kind of socket", wanted })
    }

    fn of_type(
        &mut self,
        number: u32,
        what: &'static str,
        types: &[FileType],
        wanted: &'static str,
    ) -> Result<OwnedFd, DescriptorError> {
        let fd = self.take(number, what)?;
        let stat =
            rustix::fs::fstat(&fd).map_err(|errno| DescriptorError::Examine { number, what, errno })?;
        let found = FileType::from_raw_mode(stat.st_mode);
        if types.contains(&found) {
            return Ok(fd);
        }
        Err(DescriptorError::WrongType { number, what, found: name(found), wanted })
    }
}

fn check_access(
    fd: OwnedFd,
    number: u32,
    what: &'static str,
    access: Access,
) -> Result<OwnedFd, DescriptorError> {
    let flags =
        rustix::fs::fcntl_getfl(&fd).map_err(|errno| DescriptorError::Examine { number, what, errno })?;
    if access.is_given_by(flags) {
        return Ok(fd);
    }
    Err(DescriptorError::WrongAccess { number, what, wanted: access.name() })
}

const fn name(found: FileType) -> &'static str {
    match found {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "no file (an eventfd, a memory, …)",
    }
}
