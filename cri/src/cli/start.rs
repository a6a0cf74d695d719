//! `hull start`

use clap::Args;
use tonic::Code;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::hull::ContainerRequest;

/// Start containers that were created, or have ended
///
/// One that has ended runs its command again, with the files that it has written, into the same log.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull stop web && hull start web
  hull start $(crictl create POD container.json pod.json)

What `hull run` has made starts also when its pod has ended, as it has after a
restart of the machine. A pod that kubelet or crictl made is theirs to make
again.")]
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
            let start = client.hull.start_container(ContainerRequest { container: container_id });
            let hint = "`hull ps -a` shows how it stands, `hull rm` removes it, `hull run` makes a new one.";
            answer(format!("start the container {name}"), patience, start)
                .await
                .map_err(|error| error.hint(Code::FailedPrecondition, hint))?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}
