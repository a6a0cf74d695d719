//! `hull rmi`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::hull::UntagImageRequest;
use crate::api::runtime::{ImageSpec, RemoveImageRequest};

/// Remove images, or one of their names
///
/// A name goes alone while the image has others; an id takes the image with all its names. Containers made from an image
/// keep running.
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
            if found.repo_tags.len() > 1 && !is_id(name, &found.id) {
                let call = client.hull.untag_image(UntagImageRequest { name: name.clone() });
                let removed = answer(format!("remove the name {name}"), patience, call).await?.removed;
                print(&removed.iter().map(|name| format!("{name}\n")).collect::<String>())?;
                continue;
            }
            let image = Some(ImageSpec { image: found.id, ..Default::default() });
            let call = client.image.remove_image(RemoveImageRequest { image });
            answer(format!("remove the image {name}"), patience, call).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}

/// Whether the image was named by its id or the beginning of it.
fn is_id(name: &str, id: &str) -> bool {
    let bare = |text: &str| text.strip_prefix("sha256:").unwrap_or(text).to_owned();
    bare(id).starts_with(&bare(name))
}
