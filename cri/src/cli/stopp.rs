//! `hull stopp`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::runtime::StopPodSandboxRequest;

/// Stop pods with all their containers
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull stopp web
  hull stopp $(hull pods -q -n hull)")]
pub(super) struct StopPod {
    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

impl StopPod {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        for name in &self.pods {
            let id = find::pod(client, name).await?.id;
            stop_pod(client, name, id).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}

/// Stops one pod; `name` is for messages.
pub(super) async fn stop_pod(
    client: &mut Client,
    name: &str,
    pod_sandbox_id: String,
) -> Result<(), CliError> {
    let patience = client.patience();
    let call = client.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id });
    answer(format!("stop the pod {name}"), patience, call).await?;
    Ok(())
}
