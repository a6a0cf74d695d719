//! `hull start`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::runtime::StartContainerRequest;

/// Start a container that was created or has ended
#[derive(Debug, Args)]
pub(super) struct Start {
    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

impl Start {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        for name in &self.containers {
            let container_id = find::container(client, name).await?.id;
            let patience = client.patience();
            let start = client.runtime.start_container(StartContainerRequest { container_id });
            answer(format!("start the container {name}"), patience, start).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}
