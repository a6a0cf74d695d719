//! `hull commit`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::{Format, print, print_json};
use crate::api::hull::CommitContainerRequest;

/// Make an image of a container
///
/// What the container has changed becomes one more layer on its image. It stands still while its files are read. Volumes
/// are not part of it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull commit web web:debugged
  hull commit -c 'CMD [\"/bin/app\", \"-v\"]' -c 'ENV MODE=test' -m 'with traces' web app:traces")]
pub(super) struct Commit {
    /// Name, id, or the beginning of an id
    container: String,

    /// Name of the new image
    name: Option<String>,

    /// Who made it, for its history
    #[arg(short, long, default_value = "", hide_default_value = true)]
    author: String,

    /// A remark for its history
    #[arg(short, long, default_value = "", hide_default_value = true)]
    message: String,

    /// Change its configuration: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR, as in a
    /// Dockerfile
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,

    /// Let the container run meanwhile; files that it writes may be in the image half
    #[arg(long)]
    no_pause: bool,
}

impl Commit {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let container = find::container(client, &self.container).await?.id;
        let patience = client.endless();
        let doing = format!("make an image of the container {}", self.container);
        let call = client.hull.commit_container(CommitContainerRequest {
            container,
            name: self.name.unwrap_or_default(),
            author: self.author,
            message: self.message,
            no_pause: self.no_pause,
            changes: self.change,
        });
        let made = answer(doing, patience, call).await?;
        match format {
            Format::Table => print(&format!("{}\n", made.image_id)),
            Format::Json => print_json(&serde_json::json!({
                "id": made.image_id, "entries": made.entries, "bytes": made.bytes
            })),
        }
    }
}
