//! hull.v1 SaveImages and LoadImages: images as files, and how files go over the socket.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use hull_images::store::{LoadError, SaveError, SaveProgress};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::check::received;
use super::pull_image::credentials;
use crate::api::hull::chunk::Fetched;
use crate::api::hull::{Chunk, LoadedImage, SaveImagesRequest};
use crate::runtime::{Error, Result, Runtime, blocking};

/// Bytes of one message: large enough to be quick, small enough for every limit.
const CHUNK: usize = 256 << 10;

impl Runtime {
    /// Images as one archive.
    pub async fn save_images(
        &self,
        request: SaveImagesRequest,
    ) -> Result<BoxStream<'static, std::result::Result<Chunk, Status>>> {
        if request.images.is_empty() {
            return Err(Error::Invalid("the request names no image".into()));
        }
        let images = Arc::clone(self.images());
        let SaveImagesRequest { images: names, exact, source_auths } = request;
        let saving = if exact {
            if !source_auths.is_empty() && source_auths.len() != names.len() {
                return Err(Error::Invalid("the request has not one login for each image".into()));
            }
            let logins = source_auths.into_iter().map(credentials).collect::<Result<Vec<_>>>()?;
            images.save_exactly(&names, &logins).await
        } else {
            blocking(move || images.save(&names)).await?
        };
        let saving = saving.map_err(save_error)?;
        let stream = chunks_and_more(move |out, more| {
            saving.write_and_tell(out, |step| tell(more, &step)).map_err(save_error)
        });
        Ok(stream.boxed())
    }

    /// Images out of an archive. The stream begins when the archive is here, which needs as much disk.
    pub async fn load_images(
        &self,
        mut archive: Streaming<Chunk>,
    ) -> Result<impl Stream<Item = std::result::Result<LoadedImage, Status>> + Send + use<>> {
        let images = Arc::clone(self.images());
        let mut file = images.scratch_file()?;
        while let Some(chunk) = archive.message().await.map_err(broken_off)? {
            let written = blocking(move || file.write_all(&chunk.bytes).map(|()| file)).await?;
            file = written.map_err(LoadError::Read).map_err(load_error)?;
        }
        let (sender, receiver) = mpsc::channel(8);
        tokio::task::spawn_blocking(move || {
            let loaded = images.load(file, |image| {
                tracing::info!(id = image.id, names = ?image.repo_tags, "loaded");
                let loaded = LoadedImage { image_id: image.id.clone(), names: image.repo_tags.clone() };
                // What is loaded stays loaded, whether anybody hears of it or not.
                let _ = sender.blocking_send(Ok(loaded));
            });
            if let Err(error) = loaded {
                let _ = sender.blocking_send(Err(load_error(error).into()));
            }
        });
        Ok(received(receiver))
    }
}

/// What `write` writes on a thread of its own, as a stream. A stream that is dropped ends the writing.
pub(super) fn chunks<F: FnOnce(&mut (dyn Write + Send)) -> Result<()> + Send + 'static>(
    write: F,
) -> impl Stream<Item = std::result::Result<Chunk, Status>> + Send + use<F> {
    chunks_and_more(|out, _| write(out))
}

type Outgoing = mpsc::Sender<std::result::Result<Chunk, Status>>;

/// The same; `write` may send chunks of its own in between.
fn chunks_and_more<F: FnOnce(&mut (dyn Write + Send), &Outgoing) -> Result<()> + Send + 'static>(
    write: F,
) -> impl Stream<Item = std::result::Result<Chunk, Status>> + Send + use<F> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        let mut out = BufWriter::with_capacity(CHUNK, Sender(sender.clone()));
        let written = write(&mut out, &sender).and_then(|()| {
            out.flush().map_err(|error| Error::Internal(format!("cannot send the archive: {error}")))
        });
        if let Err(error) = written {
            let _ = sender.blocking_send(Err(error.into()));
        }
    });
    received(receiver)
}

/// How far a layer has come. Whoever reads too slowly misses a step on the way, but never the last one.
fn tell(more: &Outgoing, step: &SaveProgress) {
    let SaveProgress { layer, bytes, of } = step;
    let fetched = Some(Fetched { layer: layer.to_string(), bytes: *bytes, of: *of });
    let chunk = Ok(Chunk { bytes: Vec::new(), fetched });
    // If nobody reads any more, the next write says so.
    if step.is_last() {
        let _ = more.blocking_send(chunk);
    } else {
        let _ = more.try_send(chunk);
    }
}

struct Sender(Outgoing);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(CHUNK);
        let chunk = Chunk { bytes: bytes[..length].to_vec(), fetched: None };
        self.0.blocking_send(Ok(chunk)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn broken_off(status: Status) -> Error {
    Error::Unavailable(format!("the archive broke off: {}", status.message()))
}

fn save_error(error: SaveError) -> Error {
    match error {
        SaveError::NoImage(name) => Error::NotFound { what: "image", id: name },
        SaveError::Store(error) => Error::Images(error),
        SaveError::NoWayBack { .. } | SaveError::NotExact { .. } | SaveError::Damaged(_) => {
            Error::FailedPrecondition(error.to_string())
        }
        SaveError::Output(_) => Error::Unavailable(error.to_string()),
    }
}

fn load_error(error: LoadError) -> Error {
    match error {
        LoadError::Store { source, .. } => Error::Images(source),
        LoadError::Read(_) => Error::Internal(error.to_string()),
        error => Error::Invalid(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_reader_misses_steps_of_progress_but_not_the_last() {
        let layer = hull_images::Digest::sha256(b"layer");
        let step = |bytes| SaveProgress { layer: layer.clone(), bytes, of: 3 };
        let (sender, mut receiver) = mpsc::channel(1);
        tell(&sender, &step(1));
        // There is room for one
        tell(&sender, &step(2));
        let last = step(3);
        let mut telling = tokio::task::spawn_blocking(move || tell(&sender, &last));
        let early = tokio::time::timeout(std::time::Duration::from_millis(100), &mut telling).await;
        assert!(early.is_err(), "the last step did not wait for room");
        let mut seen = Vec::new();
        while let Some(chunk) = receiver.recv().await {
            seen.push(chunk.unwrap().fetched.unwrap().bytes);
        }
        telling.await.unwrap();
        assert_eq!(seen, [1, 3]);
    }
}
