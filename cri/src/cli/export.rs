//! `hull export`

use std::path::PathBuf;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::sink::Sink;
use crate::api::hull::ContainerRequest;

/// Write all files of a container as a tar archive
///
/// The files are those that the container sees, without those of its volumes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull export -f web.tar web
  hull export web | tar -t")]
pub(super) struct Export {
    /// Write to this file, which is replaced when all is in it [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Name, id, or the beginning of an id
    container: String,
}

impl Export {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let container = find::container(client, &self.container).await?.id;
        let mut sink = Sink::open(self.file)?;
        let doing = format!("export the container {}", self.container);
        let patience = client.endless();
        let call = client.hull.export_container(ContainerRequest { container });
        let chunks = answer(doing.clone(), patience, call).await?;
        sink.take_all(&doing, chunks, |_| {}).await
    }
}
