//! `hull ps`

use std::collections::BTreeMap;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::{Format, Table, age, print, print_json, short_id, size};
use crate::api::hull::{ContainerUse, DiskUsageRequest};
use crate::api::runtime::{Container, ContainerState, ContainerStatusRequest};

/// List containers
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull ps -a
  hull ps --pod web
  hull ps -as                   with what each has written
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

    /// Count what each has written, and say how much it is with its image
    #[arg(short, long, conflicts_with = "quiet")]
    size: bool,
}

/// What containers occupy, by id.
type Sizes = BTreeMap<String, ContainerUse>;

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
        let sizes = match self.size {
            true => Some(sizes(client).await?),
            false => None,
        };
        match (format, &sizes) {
            (Format::Json, None) => print_json(&containers),
            (Format::Json, Some(sizes)) => print_json(&with_sizes(&containers, sizes)?),
            (Format::Table, _) => table(client, &containers, sizes.as_ref()).await?.print(),
        }
    }
}

/// Counted at this moment, which takes as long as there are files.
async fn sizes(client: &mut Client) -> Result<Sizes, CliError> {
    let patience = client.endless();
    let call = client.hull.disk_usage(DiskUsageRequest { count: true });
    let usage = answer("count what containers have written", patience, call).await?;
    Ok(usage.containers.into_iter().map(|one| (one.id.clone(), one)).collect())
}

/// The containers as JSON, each with `writableBytes` and `virtualBytes`.
fn with_sizes(containers: &[Container], sizes: &Sizes) -> Result<Vec<serde_json::Value>, CliError> {
    let with_size = |container: &Container| {
        let mut value =
            serde_json::to_value(container).map_err(|error| CliError::local("write JSON", error.into()))?;
        if let Some(one) = sizes.get(&container.id) {
            value["writableBytes"] = one.writable.into();
            value["virtualBytes"] = (one.writable + one.image_bytes).into();
        }
        Ok(value)
    };
    containers.iter().map(with_size).collect()
}

async fn table(
    client: &mut Client,
    containers: &[Container],
    sizes: Option<&Sizes>,
) -> Result<Table, CliError> {
    let pods = find::pods(client).await?;
    let pods: BTreeMap<&str, &str> = pods.iter().map(|pod| (pod.id.as_str(), find::pod_name(pod))).collect();
    const COLUMNS: [&str; 7] = ["CONTAINER ID", "NAME", "IMAGE", "STATE", "CREATED", "POD", "SIZE"];
    let columns = if sizes.is_some() { &COLUMNS[..] } else { &COLUMNS[..6] };
    let mut table = Table::new(columns);
    for container in containers {
        let image = container
            .image
            .as_ref()
            .map_or("", |image| image_name(&image.image, &image.user_specified_image));
        let cells = [
            short_id(&container.id).into(),
            find::container_name(container).into(),
            image.into(),
            state(client, container).await,
            age(container.created_at),
            pods.get(container.pod_sandbox_id.as_str()).copied().unwrap_or("-").into(),
        ];
        match sizes {
            None => table.row(cells),
            Some(sizes) => {
                let [id, name, image, state, created, pod] = cells;
                let size = sizes.get(&container.id).map_or("-".into(), size_cell);
                table.row([id, name, image, state, created, pod, size]);
            }
        }
    }
    Ok(table)
}

/// As docker writes it.
fn size_cell(one: &ContainerUse) -> String {
    format!("{} (virtual {})", size(one.writable), size(one.writable + one.image_bytes))
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
