//! `hull tag`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use crate::api::hull::TagImageRequest;

/// Give an image one more name
///
/// If another image has the name, it moves. `hull rmi NAME` takes a name away again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull tag busybox registry.example.com/base:1
  hull tag 3f2a1b7c app:stable")]
pub(super) struct Tag {
    /// Reference, id, or the beginning of an id
    image: String,

    /// The new name, with a tag or `latest`
    #[arg(value_name = "NAME")]
    name: String,
}

impl Tag {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let image = find::image(client, &self.image).await?.id;
        let patience = client.patience();
        let doing = format!("name the image {} {}", self.image, self.name);
        let call = client.hull.tag_image(TagImageRequest { image, name: self.name });
        answer(doing, patience, call).await.map(drop)
    }
}
