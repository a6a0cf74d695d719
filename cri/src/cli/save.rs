//! `hull save`

use std::path::PathBuf;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::sink::Sink;
use crate::api::hull::SaveImagesRequest;

/// Write images to a file
///
/// The file is an OCI image layout and a docker archive at once: `hull load`, `docker load`, `podman load`, skopeo and
/// `ctr images import` read it. Layers are in it as they were before compression, and images keep their ids.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull save -f app.tar app:1.2 app:1.3
  hull save app:1.2 | zstd | ssh other 'zstd -d | hull load'")]
pub(super) struct Save {
    /// Write to this file, which is replaced when all is in it [default: standard output]
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// References, ids, or beginnings of ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

impl Save {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let mut sink = Sink::open(self.file)?;
        let doing = format!("save {}", self.images.join(" "));
        let patience = client.endless();
        let request = SaveImagesRequest { images: self.images };
        let chunks = answer(doing.clone(), patience, client.hull.save_images(request)).await?;
        sink.take_all(&doing, chunks).await
    }
}
