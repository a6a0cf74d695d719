//! `hull pods`

use clap::Args;

use super::client::Client;
use super::error::CliError;
use super::find;
use super::output::{Format, Table, age, print, print_json, short_id};
use crate::api::runtime::{PodSandbox, PodSandboxState};

/// List pods
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull pods
  hull pods -n kube-system
  hull -o json pods | jq -r '.[].id'")]
pub(super) struct Pods {
    /// Only ids, one a line
    #[arg(short, long)]
    quiet: bool,

    /// Only pods of this Kubernetes namespace
    #[arg(short, long)]
    namespace: Option<String>,
}

impl Pods {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let mut pods = find::pods(client).await?;
        if let Some(wanted) = &self.namespace {
            pods.retain(|pod| namespace(pod) == wanted);
        }
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
        if self.quiet {
            return print(&pods.iter().map(|pod| format!("{}\n", pod.id)).collect::<String>());
        }
        if format == Format::Json {
            return print_json(&pods);
        }
        let mut table = Table::new(&["POD ID", "NAME", "NAMESPACE", "STATE", "CREATED", "HANDLER"]);
        for pod in &pods {
            table.row([
                short_id(&pod.id).into(),
                find::pod_name(pod).into(),
                namespace(pod).into(),
                state(pod).into(),
                age(pod.created_at),
                match pod.runtime_handler.as_str() {
                    "" => "(default)".into(),
                    handler => handler.into(),
                },
            ]);
        }
        table.print()
    }
}

fn namespace(pod: &PodSandbox) -> &str {
    pod.metadata.as_ref().map_or("", |metadata| &metadata.namespace)
}

fn state(pod: &PodSandbox) -> &'static str {
    match pod.state() {
        PodSandboxState::SandboxReady => "ready",
        PodSandboxState::SandboxNotready => "not ready",
    }
}
