//! `hull debug trace start`

use std::fmt::Write;

use clap::Args;
use serde_json::json;

use crate::api::hull::{Trace, TraceStep, TracesRequest};
use crate::api::runtime::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RunPodSandboxRequest, StartContainerRequest,
};
use crate::cli::client::{Client, answer};
use crate::cli::error::CliError;
use crate::cli::find;
use crate::cli::output::{Format, print, print_json, printable, short_id};
use crate::cli::rmp::remove_pod;

/// Print how long the steps of the last starts took
///
/// hulld remembers the last 64 calls of RunPodSandbox, CreateContainer and StartContainer that succeeded. Lines with a
/// dash are parts of the line before them: what the pod's agent says.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull debug trace start                   the last pod's
  hull debug trace start -n 12             the last twelve calls
  hull debug trace start busybox           start a pod for it, and remove it again
  hull -o json debug trace start -n 64")]
pub(super) struct Start {
    /// Start a pod on the host's network with this image, which must be here, and remove it again
    image: Option<String>,

    /// How many calls
    #[arg(short = 'n', long, default_value = "3")]
    number: usize,
}

impl Start {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        if let Some(image) = &self.image {
            start_one(client, image).await?;
        }
        let patience = client.patience();
        let call = client.hull.traces(TracesRequest {});
        let traces = answer("ask for traces", patience, call).await?.traces;
        let wanted = &traces[traces.len().saturating_sub(self.number)..];
        if format == Format::Json {
            return print_json(&wanted.iter().map(as_json).collect::<Vec<_>>());
        }
        if wanted.is_empty() {
            return print("nothing was started since hulld started\n");
        }
        print(&wanted.iter().map(as_text).collect::<Vec<_>>().join("\n"))
    }
}

/// A pod on the host's network, whose container runs what its image says.
async fn start_one(client: &mut Client, image: &str) -> Result<(), CliError> {
    let image = find::image(client, image).await?.id;
    let name = format!("trace-{}", std::process::id());
    let (network, pid) = (NamespaceMode::Node.into(), NamespaceMode::Container.into());
    let options = NamespaceOption { network, pid, ..Default::default() };
    let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.clone(),
            uid: name.clone(),
            namespace: "hull".into(),
            attempt: 0,
        }),
        linux: Some(LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() }),
        ..Default::default()
    };
    let patience = client.patience();
    let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let pod = answer("start a pod", patience, client.runtime.run_pod_sandbox(request)).await?;
    let pod = pod.pod_sandbox_id;
    let started = start_container(client, &pod, config, image).await;
    remove_pod(client, &name, &pod, None).await?;
    started
}

async fn start_container(
    client: &mut Client,
    pod: &str,
    pod_config: PodSandboxConfig,
    image: String,
) -> Result<(), CliError> {
    let patience = client.patience();
    let config = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "trace".into(), attempt: 0 }),
        image: Some(ImageSpec { image, ..Default::default() }),
        ..Default::default()
    };
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(pod_config),
    };
    let made = answer("make a container", patience, client.runtime.create_container(request)).await?;
    let request = StartContainerRequest { container_id: made.container_id };
    answer("start a container", patience, client.runtime.start_container(request)).await.map(drop)
}

fn total(trace: &Trace) -> u64 {
    trace.steps.iter().filter(|step| !step.is_part).map(|step| step.micros).sum()
}

fn as_text(trace: &Trace) -> String {
    let id = printable(short_id(&trace.id));
    let mut text = format!("{:>9} ms  {} {id}\n", milliseconds(total(trace)), printable(&trace.operation));
    for step in &trace.steps {
        let mark = if step.is_part { "  - " } else { "  " };
        let _ = writeln!(text, "{:>9}     {mark}{}", milliseconds(step.micros), printable(&step.name));
    }
    text
}

fn milliseconds(micros: u64) -> String {
    format!("{}.{:03}", micros / 1000, micros % 1000)
}

fn as_json(trace: &Trace) -> serde_json::Value {
    let step = |step: &TraceStep| json!({"name": step.name, "micros": step.micros, "isPart": step.is_part});
    json!({
        "operation": trace.operation,
        "id": trace.id,
        "beganAt": trace.began_at,
        "micros": total(trace),
        "steps": trace.steps.iter().map(step).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_listed_under_their_call_and_parts_are_not_counted_twice() {
        let step = |name: &str, micros, is_part| TraceStep { name: name.into(), micros, is_part };
        let steps = vec![step("plan", 250, false), step("agent", 3000, false), step("clone\n", 2900, true)];
        let (operation, id) = ("StartContainer".into(), "a".repeat(64));
        let text = as_text(&Trace { operation, id, began_at: 1, steps });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with("    3.250 ms  StartContainer aaaa"), "{text}");
        assert!(lines[3].starts_with("    2.900       - clone"), "{text}");
    }
}
