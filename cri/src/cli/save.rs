//! `hull save`

use std::path::PathBuf;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::pull::Credentials;
use super::sink::Sink;
use crate::api::hull::SaveImagesRequest;

/// Write images to a file
///
/// The file is an OCI image layout and a docker archive at once: `hull load`, `docker load`, `podman load`, skopeo and
/// `ctr images import` read it. Layers are in it as they were before compression, and images keep their ids. With --exact
/// everything is in it as it came, so that images keep their digests too, also when `hull load` reads it: layers
/// that were not kept compressed (image.keep_blobs) are fetched again from the registries that the images came from. Saved
/// logins are used as by `hull pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull save -f app.tar app:1.2 app:1.3
  hull save app:1.2 | zstd | ssh other 'zstd -d | hull load'
  hull save --exact -f app.tar quay.io/team/app:1.2")]
pub(super) struct Save {
    /// Write to this file, which is replaced when all is in it [default: standard output]
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Keep the digests that the images came with: layers that were not kept are fetched again from where they came
    /// from
    #[arg(long)]
    exact: bool,

    /// User and password for where the images came from, with --exact
    #[arg(long, value_name = "USER:PASSWORD", requires = "exact")]
    source_creds: Option<String>,

    /// References, ids, or beginnings of ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

impl Save {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let mut sink = Sink::open(self.file)?;
        let doing = format!("save {}", self.images.join(" "));
        let patience = client.endless();
        let mut source_auths = Vec::new();
        if self.exact {
            let credentials = Credentials::of(self.source_creds);
            for image in &self.images {
                source_auths.push(credentials.config(image).await?.unwrap_or_default());
            }
        }
        let request = SaveImagesRequest { images: self.images, exact: self.exact, source_auths };
        let chunks = answer(doing.clone(), patience, client.hull.save_images(request)).await?;
        sink.take_all(&doing, chunks).await
    }
}
