//! hull.v1 CommitContainer, DiffContainer and ExportContainer: what is in a container, for those outside it.
//!
//! Of a process pod's container: its writable layer is a directory of this machine. That of a microVM's is a filesystem
//! which only its own kernel may read.

mod changes;
mod commit;
mod diff;
mod export;
mod merged;
mod pause;

use std::path::PathBuf;
use std::sync::Arc;

use crate::runtime::objects::Container;
use crate::runtime::{Error, Result, Runtime};

impl Runtime {
    /// A container of which the files are here, and the directory of its writable layer.
    fn files_of(&self, id: &str) -> Result<(Arc<Container>, PathBuf)> {
        let container = self.objects().container(id)?;
        if container.pod.launcher.name() != "process" {
            return Err(Error::Unimplemented(format!(
                "the container {} is in a machine of its own, whose files only its own kernel reads",
                container.id()
            )));
        }
        let upper = self.config().root.join("containers").join(container.id()).join("writable/upper");
        Ok((container, upper))
    }
}
