//! `hull start`

use clap::Args;
use tonic::Code;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::runtime::StartContainerRequest;

/// Start containers that were created and not started yet
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull start $(crictl create POD container.json pod.json)

A container runs once: what `hull run` makes is started already, and one that
has ended is not started again.")]
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
            let hint = "A container runs once. `hull run` makes a new one, `hull rm` removes this one.";
            answer(format!("start the container {name}"), patience, start)
                .await
                .map_err(|error| error.hint(Code::FailedPrecondition, hint))?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}
