//! `hull rmi`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::runtime::{ImageSpec, RemoveImageRequest};

/// Remove images
///
/// An image goes with all its tags. Containers made from it keep running.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull rmi busybox
  hull rmi $(hull images -q)   all of them")]
pub(super) struct RemoveImage {
    /// References, ids, or beginnings of ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

impl RemoveImage {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        for name in &self.images {
            let found = find::image(client, name).await?;
            let patience = client.patience();
            let image = Some(ImageSpec { image: found.id, ..Default::default() });
            let call = client.image.remove_image(RemoveImageRequest { image });
            answer(format!("remove the image {name}"), patience, call).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}
