//! `hull rmp`

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::print;
use super::stopp::stop_pod;
use super::{find, run};
use crate::api::runtime::{PodSandboxState, RemovePodSandboxRequest};

/// Remove pods with all their containers
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull rmp web
  hull rmp -f web     stop it first if it is ready
  hull rmp -f --all   every pod of this node")]
pub(super) struct RemovePod {
    /// Stop a pod first that is still ready
    #[arg(short, long)]
    force: bool,

    /// Ids, beginnings of ids, or names
    #[arg(required_unless_present = "all", value_name = "POD")]
    pods: Vec<String>,

    /// All of them
    #[arg(short, long, conflicts_with = "pods")]
    all: bool,
}

impl RemovePod {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let names = match self.all {
            true => find::pods(client).await?.into_iter().map(|pod| pod.id).collect(),
            false => self.pods,
        };
        for name in &names {
            let pod = find::pod(client, name).await?;
            if pod.state() == PodSandboxState::SandboxReady && !self.force {
                let hint = format!("`hull stopp {name}` stops it, `hull rmp -f {name}` does both.");
                return Err(CliError::Refused(format!("the pod {name} is still ready\n{hint}")));
            }
            remove_pod(client, name, &pod.id, run::uid_of(&pod)).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}

/// Stops and removes one pod, and the logs that `hull run` keeps under `run_uid`; `name` is for messages.
pub(super) async fn remove_pod(
    client: &mut Client,
    name: &str,
    id: &str,
    run_uid: Option<&str>,
) -> Result<(), CliError> {
    stop_pod(client, name, id.into()).await?;
    let patience = client.patience();
    let call = client.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.into() });
    answer(format!("remove the pod {name}"), patience, call).await?;
    match run_uid {
        Some(uid) => run::remove_logs(client, uid).await,
        None => Ok(()),
    }
}
