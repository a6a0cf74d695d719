//! `hull load`

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;

use clap::Args;
use tokio::sync::mpsc;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, print, print_json};
use crate::api::hull::Chunk;

/// Bytes of one message.
const CHUNK: usize = 256 << 10;

/// Read images from a file
///
/// The file is what `hull save`, `docker save`, `podman save` or skopeo write: an OCI image layout or a docker archive in
/// a tar archive, which may be compressed with gzip or zstd. Images get the tags that the file names.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull load -i app.tar
  curl -fsS https://example.com/app.tar.zst | hull load")]
pub(super) struct Load {
    /// Read this file [default: standard input]
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
}

impl Load {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let input: Box<dyn Read + Send> = match &self.input {
            Some(path) => Box::new(
                File::open(path)
                    .map_err(|error| CliError::local(format!("open {}", path.display()), error))?,
            ),
            None if io::stdin().is_terminal() => {
                return Err(CliError::Refused("no archive: name a file with --input, or pipe one in".into()));
            }
            None => Box::new(io::stdin()),
        };
        let (sender, chunks) = mpsc::channel(4);
        let reading = tokio::task::spawn_blocking(move || read_all(input, &sender));
        let chunks = futures::stream::unfold(chunks, |mut chunks| async move {
            chunks.recv().await.map(|chunk: Chunk| (chunk, chunks))
        });
        let patience = client.endless();
        let loaded = answer("load images", patience, client.hull.load_images(chunks)).await;
        if let Ok(Err(error)) = reading.await {
            return Err(CliError::local("read the archive", error));
        }
        let mut loaded = loaded?;
        let failed = |status| CliError::Call { doing: "load images".into(), status: Box::new(status) };
        let mut images = Vec::new();
        while let Some(image) = loaded.message().await.map_err(failed)? {
            if format == Format::Table {
                let name = image.names.first().unwrap_or(&image.image_id);
                print(&format!("{name}\n"))?;
            }
            images.push(serde_json::json!({ "id": image.image_id, "names": image.names }));
        }
        if format == Format::Json { print_json(&images) } else { Ok(()) }
    }
}

/// Ends early, without an error, when nobody wants more: the answer says why.
fn read_all(mut input: Box<dyn Read + Send>, sender: &mpsc::Sender<Chunk>) -> io::Result<()> {
    loop {
        let mut bytes = Vec::with_capacity(CHUNK);
        input.by_ref().take(CHUNK as u64).read_to_end(&mut bytes)?;
        if bytes.is_empty() || sender.blocking_send(Chunk { bytes, fetched: None }).is_err() {
            return Ok(());
        }
    }
}
