//! `hull image`: what is done to images as a whole.

use clap::{Args, Subcommand};

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, print, print_json, size};
use crate::api::hull::PruneImagesRequest;

/// Look after images
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull image prune -a    remove all that no container was made from")]
pub(super) struct Image {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Remove images that no tag leads to any more
    Prune(Prune),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull image prune       what newer images took the tags from
  hull image prune -a    all that no container was made from")]
struct Prune {
    /// All images that no container was made from
    #[arg(short, long)]
    all: bool,
}

impl Image {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        match self.command {
            ImageCommand::Prune(prune_what) => prune(client, prune_what.all, format).await,
        }
    }
}

/// Removes images that nobody needs and says how much room that made.
pub(super) async fn prune(client: &mut Client, all: bool, format: Format) -> Result<(), CliError> {
    let patience = client.endless();
    let call = client.hull.prune_images(PruneImagesRequest { all });
    let pruned = answer("prune images", patience, call).await?;
    if format == Format::Json {
        return print_json(&serde_json::json!({ "images": pruned.image_ids, "freed": pruned.freed }));
    }
    for id in &pruned.image_ids {
        print(&format!("{id}\n"))?;
    }
    print(&format!("{} images removed, {} freed\n", pruned.image_ids.len(), size(pruned.freed)))
}
