//! `hull events`

use std::collections::BTreeMap;

use clap::Args;
use serde_json::json;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::{Format, print, short_id};
use crate::api::runtime::{ContainerEventResponse, ContainerEventType, GetEventsRequest};

/// Print what happens to pods and containers, as it happens
///
/// One line for each change, from now on, until hull is interrupted. A change is told once it is committed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull events
  hull -o json events | jq -c 'select(.event == \"stopped\")'")]
pub(super) struct Events {}

impl Events {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let patience = client.patience();
        // Names of what is there already; the rest comes with its events.
        let mut names: BTreeMap<String, String> = BTreeMap::new();
        let call = client.runtime.get_container_events(GetEventsRequest {});
        let mut events = answer("follow events", patience, call).await?;
        for pod in find::pods(client).await? {
            names.insert(pod.id.clone(), find::pod_name(&pod).to_owned());
        }
        for container in find::containers(client).await? {
            names.insert(container.id.clone(), find::container_name(&container).to_owned());
        }
        let failed = |status| CliError::Call { doing: "follow events".into(), status: Box::new(status) };
        while let Some(event) = events.message().await.map_err(failed)? {
            learn(&event, &mut names);
            print(&line(&event, &names, format))?;
        }
        Err(CliError::Refused("hulld has ended the stream of events: it was stopped".into()))
    }
}

fn learn(event: &ContainerEventResponse, names: &mut BTreeMap<String, String>) {
    for status in &event.containers_statuses {
        if let Some(metadata) = &status.metadata {
            names.insert(status.id.clone(), metadata.name.clone());
        }
    }
    if let Some(status) = &event.pod_sandbox_status
        && let Some(metadata) = &status.metadata
    {
        names.insert(status.id.clone(), metadata.name.clone());
    }
}

fn line(event: &ContainerEventResponse, names: &BTreeMap<String, String>, format: Format) -> String {
    let what = match event.container_event_type() {
        ContainerEventType::ContainerCreatedEvent => "created",
        ContainerEventType::ContainerStartedEvent => "started",
        ContainerEventType::ContainerStoppedEvent => "stopped",
        ContainerEventType::ContainerDeletedEvent => "deleted",
    };
    let pod = event.pod_sandbox_status.as_ref().map_or("", |status| &status.id);
    let kind = if event.container_id == pod { "pod" } else { "container" };
    let name = names.get(&event.container_id).map_or("-", String::as_str);
    let status = event.containers_statuses.iter().find(|status| status.id == event.container_id);
    let ended = status.filter(|_| what == "stopped");
    if format == Format::Json {
        let line = json!({
            "time": event.created_at,
            "event": what,
            "kind": kind,
            "id": event.container_id,
            "name": name,
            "pod": pod,
            "exitCode": ended.map(|status| status.exit_code),
            "reason": ended.map(|status| &status.reason),
        });
        return format!("{line}\n");
    }
    let how = ended.map_or_else(String::new, |status| format!(" ({}, {})", status.exit_code, status.reason));
    let id = short_id(&event.container_id);
    // Names come from outside.
    let name: String = name.chars().filter(|letter| !letter.is_control()).collect();
    format!("{} {kind:9} {what:8} {id}  {name}{how}\n", clock(event.created_at))
}

/// UTC, to the millisecond.
fn clock(nanos: i64) -> String {
    let of_day = nanos.rem_euclid(86_400_000_000_000) / 1_000_000;
    let (seconds, millis) = (of_day / 1000, of_day % 1000);
    format!("{:02}:{:02}:{:02}.{millis:03}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{ContainerMetadata, ContainerStatus};

    #[test]
    fn an_end_is_told_with_its_exit_code() {
        let metadata = Some(ContainerMetadata { name: "web\u{1b}[2J".into(), attempt: 0 });
        let status = ContainerStatus {
            id: "aa".into(),
            metadata,
            exit_code: 3,
            reason: "Error".into(),
            ..Default::default()
        };
        let event = ContainerEventResponse {
            container_id: "aa".into(),
            container_event_type: ContainerEventType::ContainerStoppedEvent.into(),
            created_at: 3_723_004_000_000,
            containers_statuses: vec![status],
            ..Default::default()
        };
        let mut names = BTreeMap::new();
        learn(&event, &mut names);
        let text = line(&event, &names, Format::Table);
        assert_eq!(text, "01:02:03.004Z container stopped  aa  web[2J (3, Error)\n");
        let json: serde_json::Value = serde_json::from_str(&line(&event, &names, Format::Json)).unwrap();
        assert_eq!((json["event"].as_str(), json["exitCode"].as_i64()), (Some("stopped"), Some(3)));
    }
}
