//! hull.v1 CommitContainer, DiffContainer and ExportContainer: what is in a container, for those outside it.
//!
//! The writable layer of a process pod's container is a directory of this machine. That of a microVM's is a filesystem
//! which only its own kernel may read: its agent archives it, and what comes is taken as an image's layer is, from whoever
//! sent it.

mod changes;
mod commit;
mod diff;
mod export;
mod guest;
mod merged;
mod pause;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use crate::runtime::objects::Container;
use crate::runtime::{Error, Result, Runtime};
use crate::store::record::ContainerPhase;

/// Where a container's writable layer is.
enum Place {
    /// A directory of this machine, which the container's first start makes.
    Here(PathBuf),
    /// In a machine.
    Guest,
}

/// A writable layer that can be looked at.
enum Upper {
    /// A directory that is there.
    Directory(PathBuf),
    /// A detached mount.
    Mount(OwnedFd),
}

impl Upper {
    /// Open for reading.
    fn root(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Directory(directory) => Ok(File::open(directory)?.into()),
            Self::Mount(mount) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(rustix::fs::openat(mount, ".", flags, Mode::empty())?)
            }
        }
    }
}

impl Runtime {
    /// A container and where its writable layer is.
    fn files_of(&self, id: &str) -> Result<(Arc<Container>, Place)> {
        let container = self.objects().container(id)?;
        let place = match container.pod.launcher.name() {
            "process" => {
                let own = self.config().root.join("containers").join(container.id());
                Place::Here(own.join("writable/upper"))
            }
            _ => Place::Guest,
        };
        Ok((container, place))
    }

    /// The writable layer, None for a container that never ran. Blocking, inside the runtime.
    fn upper(self: &Arc<Self>, container: &Arc<Container>, place: &Place) -> Result<Option<Upper>> {
        match place {
            Place::Here(upper) => match upper.try_exists() {
                Ok(true) => Ok(Some(Upper::Directory(upper.clone()))),
                Ok(false) => Ok(None),
                Err(error) => Err(unreadable(container.id(), &error)),
            },
            Place::Guest if container.phase() == ContainerPhase::Created => Ok(None),
            Place::Guest => {
                let archive = self.guest_archive(container, false)?;
                Ok(Some(Upper::Mount(self.images().archive_tree(archive).map_err(commit::refused)?)))
            }
        }
    }
}

fn unreadable(id: &str, error: &io::Error) -> Error {
    Error::Internal(format!("cannot read the writable layer of the container {id}: {error}"))
}
