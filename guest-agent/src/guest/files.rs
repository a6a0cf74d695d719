//! Small files that came with the request for a container, kept until it is forgotten.

use std::fs::File;
use std::io::Write;

use hull_sys::mount::{self, MountAttrFlags as Attr, OpenTreeFlags};
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode};

use super::place::{FILES, attach, detach, directory, filesystem};
use super::{Doing, GuestError};

/// Room beside the contents, for a container that writes more into a file than it got.
const ROOM: u64 = 1 << 20;

/// The files of one container, on a tmpfs of their own so that no container can fill another's.
#[derive(Debug)]
pub(crate) struct Files {
    path: String,
    number: u32,
}

impl Files {
    /// A place for the files of the container `id`, a valid one, of `size` bytes together.
    pub(crate) fn new(id: &str, size: u64) -> Result<Self, GuestError> {
        let path = format!("{FILES}/{id}");
        let size = size.saturating_add(ROOM).to_string();
        let tree = filesystem("tmpfs", &[("size", &size), ("mode", "700")], Attr::MOUNT_ATTR_NODEV)?;
        directory(&path)?;
        attach(tree, &path)?;
        Ok(Self { path, number: 0 })
    }

    /// A detached mount of a new file with this content.
    pub(crate) fn add(&mut self, content: &[u8]) -> Result<OwnedFd, GuestError> {
        self.number += 1;
        let path = format!("{}/{}", self.path, self.number);
        let write = || {
            let mut file = File::create_new(&path)?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
            file.write_all(content)
        };
        write().doing(|| "write a file for the container".into())?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        mount::open_tree(CWD, &path, flags).doing(|| "mount a file for the container".into())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Whoever uses one has a mount of his own.
        let _ = detach(&self.path, true);
    }
}
