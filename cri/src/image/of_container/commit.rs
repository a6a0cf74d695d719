use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hull_agent::protocol::messages::Archived;
use hull_agent::stdio;
use hull_archive::{ArchiveError, Marks, Options, Summary, write_tree};
use hull_images::Image;
use hull_images::store::{NewImage, NewImageError};

use super::{Place, changes, unreadable};
use crate::api::hull::{CommitContainerReply, CommitContainerRequest};
use crate::image::tag::tag;
use crate::runtime::objects::Container;
use crate::runtime::{Error, Result, Runtime, blocking};

impl Runtime {
    /// Makes an image of a container: its image's layers and its writable layer as one more.
    pub async fn commit_container(
        self: &Arc<Self>,
        request: CommitContainerRequest,
    ) -> Result<CommitContainerReply> {
        let name = match request.name.as_str() {
            "" => None,
            name => Some(tag(name)?),
        };
        let mut changes = Vec::new();
        for line in &request.changes {
            changes.extend(changes::parse(line).map_err(|error| Error::Invalid(error.to_string()))?);
        }
        let (container, place) = self.files_of(&request.container)?;
        let image = container.with_record(|record| record.image.clone()).unwrap_or_default();
        let command = container.with_record(|record| {
            let config = record.config.clone().unwrap_or_default();
            [config.command, config.args].concat().join(" ")
        });
        let new = NewImage {
            created: String::from_utf8_lossy(&stdio::rfc3339(stdio::now())).into_owned(),
            created_by: command,
            author: request.author,
            comment: request.message,
            changes,
        };
        let runtime = Arc::clone(self);
        let committed = blocking(move || -> Result<(Image, Archived)> {
            let make = |layer: &mut dyn Read| {
                runtime.images().make_image(&image.id, layer, &new, name.as_ref()).map_err(refused)
            };
            let pause = !request.no_pause;
            match place {
                Place::Here(upper) => {
                    let _paused = if pause { runtime.pause(&container)? } else { None };
                    let root = File::open(&upper).map_err(|error| unreadable(container.id(), &error))?;
                    of_directory(&root, &container, make)
                }
                Place::Guest => {
                    let mut archive = runtime.guest_archive(&container, pause)?;
                    let made = make(&mut archive)?;
                    Ok((made, archive.whole().unwrap_or_default()))
                }
            }
        });
        let (made, archived) = committed.await??;
        tracing::info!(id = made.id, container = request.container, "made an image of a container");
        Ok(CommitContainerReply { image_id: made.id, entries: archived.entries, bytes: archived.content })
    }
}

/// What `make` makes of the archive of an upper directory, which a thread of its own writes.
fn of_directory(
    root: &File,
    container: &Container,
    make: impl FnOnce(&mut dyn Read) -> Result<Image>,
) -> Result<(Image, Archived)> {
    let (reader, writer) = io::pipe().map_err(|error| unreadable(container.id(), &error))?;
    let whole = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let archive = scope.spawn(|| {
            let options = Options { marks: Marks::ToWhiteouts, ..Options::default() };
            let mut out = io::BufWriter::with_capacity(256 << 10, writer);
            let summary = write_tree(root.as_fd(), &mut out, &options)?;
            out.flush().map_err(ArchiveError::Output)?;
            whole.store(true, Ordering::Release);
            Ok::<Summary, ArchiveError>(summary)
        });
        let mut layer = Archive { pipe: reader, whole: &whole };
        let made = make(&mut layer);
        drop(layer);
        let archive = archive.join().map_err(|_| Error::Internal("the archive broke off".into()))?;
        match (made, archive) {
            // A layer that is refused closes the pipe, which is not why it failed.
            (Err(error), Ok(_) | Err(ArchiveError::Output(_))) => Err(error),
            (_, Err(error)) => Err(Error::Internal(error.to_string())),
            (Ok(made), Ok(Summary { entries, content, .. })) => Ok((made, Archived { entries, content })),
        }
    })
}

/// An archive as it comes through a pipe. One that breaks off is an error: half a layer may look like a whole one.
struct Archive<'w> {
    pipe: io::PipeReader,
    whole: &'w AtomicBool,
}

impl Read for Archive<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.pipe.read(buffer)? {
            0 if !buffer.is_empty() && !self.whole.load(Ordering::Acquire) => {
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the container's files cannot be read"))
            }
            read => Ok(read),
        }
    }
}

/// As whoever asked is to hear it.
pub(super) fn refused(error: NewImageError) -> Error {
    match error {
        NewImageError::NoBase(_) | NewImageError::Base { .. } => Error::FailedPrecondition(error.to_string()),
        NewImageError::Config(_) => Error::Invalid(error.to_string()),
        NewImageError::Store(error) => Error::Images(error),
        NewImageError::Layer(_) | NewImageError::Mount(_) => Error::Internal(error.to_string()),
    }
}
