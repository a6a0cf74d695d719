//! `hull ps`

use std::collections::BTreeMap;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::{Format, Table, age, print, print_json, short_id};
use crate::api::runtime::{Container, ContainerState, ContainerStatusRequest};

/// List containers
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull ps -a
  hull ps --pod web
  hull stop $(hull ps -q)
  hull -o json ps -a | jq -r '.[].metadata.name'")]
pub(super) struct Ps {
    /// All of them, not only those that run
    #[arg(short, long)]
    all: bool,

    /// Only ids, one a line
    #[arg(short, long)]
    quiet: bool,

    /// Only containers of this pod
    #[arg(short, long)]
    pod: Option<String>,
}

impl Ps {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let mut containers = find::containers(client).await?;
        if !self.all {
            containers.retain(|container| container.state() == ContainerState::ContainerRunning);
        }
        if let Some(pod) = &self.pod {
            let pod = find::pod(client, pod).await?.id;
            containers.retain(|container| container.pod_sandbox_id == pod);
        }
        containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
        if self.quiet {
            return print(
                &containers.iter().map(|container| format!("{}\n", container.id)).collect::<String>(),
            );
        }
        if format == Format::Json {
            return print_json(&containers);
        }
        table(client, &containers).await?.print()
    }
}

async fn table(client: &mut Client, containers: &[Container]) -> Result<Table, CliError> {
    let pods = find::pods(client).await?;
    let pods: BTreeMap<&str, &str> = pods.iter().map(|pod| (pod.id.as_str(), find::pod_name(pod))).collect();
    let mut table = Table::new(&["CONTAINER ID", "NAME", "IMAGE", "STATE", "CREATED", "POD"]);
    for container in containers {
        let image = container
            .image
            .as_ref()
            .map_or("", |image| image_name(&image.image, &image.user_specified_image));
        table.row([
            short_id(&container.id).into(),
            find::container_name(container).into(),
            image.into(),
            state(client, container).await,
            age(container.created_at),
            pods.get(container.pod_sandbox_id.as_str()).copied().unwrap_or("-").into(),
        ]);
    }
    Ok(table)
}

/// What the container was asked for, or the beginning of an id.
fn image_name<'a>(image: &'a str, specified: &'a str) -> &'a str {
    match specified {
        "" if image.starts_with("sha256:") => short_id(image),
        "" => image,
        name => name,
    }
}

/// The state, with the exit code of what has ended; that is not in the list and may be gone by now.
async fn state(client: &mut Client, container: &Container) -> String {
    match container.state() {
        ContainerState::ContainerCreated => "created".into(),
        ContainerState::ContainerRunning => "running".into(),
        ContainerState::ContainerUnknown => "unknown".into(),
        ContainerState::ContainerExited => {
            let patience = client.patience();
            let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
            let status = answer("ask for a status", patience, client.runtime.container_status(request)).await;
            match status.ok().and_then(|answer| answer.status) {
                Some(status) => format!("exited ({}) {}", status.exit_code, age(status.finished_at)),
                None => "exited".into(),
            }
        }
    }
}
