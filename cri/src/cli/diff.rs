//! `hull diff`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::{Format, print, print_json, printable};
use crate::api::hull::ContainerRequest;
use crate::api::hull::difference::Kind;

/// Show what a container has changed of its image: A added, C changed, D deleted
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull diff web
  hull diff web | grep '^A /etc'")]
pub(super) struct Diff {
    /// Name, id, or the beginning of an id
    container: String,
}

impl Diff {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let container = find::container(client, &self.container).await?.id;
        let doing = format!("compare the container {} with its image", self.container);
        let patience = client.endless();
        let call = client.hull.diff_container(ContainerRequest { container });
        let mut differences = answer(doing.clone(), patience, call).await?;
        let failed = |status| CliError::Call { doing: doing.clone(), status: Box::new(status) };
        let mut all = Vec::new();
        while let Some(difference) = differences.message().await.map_err(failed)? {
            let letter = match difference.kind() {
                Kind::Added => "A",
                Kind::Changed => "C",
                Kind::Deleted => "D",
            };
            let path = String::from_utf8_lossy(&difference.path).into_owned();
            match format {
                Format::Table => print(&format!("{letter} {}\n", printable(&path)))?,
                Format::Json => all.push(serde_json::json!({ "kind": letter, "path": path })),
            }
        }
        if format == Format::Json { print_json(&all) } else { Ok(()) }
    }
}
