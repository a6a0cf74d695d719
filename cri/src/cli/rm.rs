//! `hull rm`

use std::time::Duration;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::print;
use super::rmp::remove_pod;
use super::stop::stop;
use super::{find, run};
use crate::api::runtime::{Container, ContainerState, RemoveContainerRequest};

/// Remove containers, and the pods that `hull run` made for them
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull rm web
  hull rm -f web     kill it first if it runs
  hull rm -f --all   nothing is left")]
pub(super) struct Rm {
    /// Kill a container first that still runs
    #[arg(short, long)]
    force: bool,

    /// Ids, beginnings of ids, or names
    #[arg(required_unless_present = "all", value_name = "CONTAINER")]
    containers: Vec<String>,

    /// All of them
    #[arg(short, long, conflicts_with = "containers")]
    all: bool,
}

impl Rm {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let names = match self.all {
            true => find::containers(client).await?.into_iter().map(|container| container.id).collect(),
            false => self.containers,
        };
        for name in &names {
            let container = find::container(client, name).await?;
            if container.state() == ContainerState::ContainerRunning {
                if !self.force {
                    let hint =
                        format!("`hull stop {name}` stops it, `hull rm -f {name}` kills and removes it.");
                    return Err(CliError::Refused(format!("the container {name} still runs\n{hint}")));
                }
                stop(client, name, container.id.clone(), Duration::ZERO).await?;
            }
            remove(client, name, container).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}

async fn remove(client: &mut Client, name: &str, container: Container) -> Result<(), CliError> {
    let patience = client.patience();
    let call = client.runtime.remove_container(RemoveContainerRequest { container_id: container.id });
    answer(format!("remove the container {name}"), patience, call).await?;
    let pods = find::pods(client).await?;
    match pods.into_iter().find(|pod| pod.id == container.pod_sandbox_id) {
        Some(pod) if run::uid_of(&pod).is_some() => {
            remove_pod(client, find::pod_name(&pod), &pod.id, run::uid_of(&pod)).await
        }
        _ => Ok(()),
    }
}
