//! `hull stats`

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::{Format, Table, print, print_json, short_id, size};
use crate::api::runtime::{ContainerStats, ListContainerStatsRequest};
use crate::config::value::parse_duration;

/// Show what running containers use
///
/// Processor time is in percent of one processor, measured between two looks. Memory is the working set: what cannot be
/// had back without swapping. Disk is what the writable layer occupies.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull stats
  hull stats --once
  hull -o json stats --once web | jq '.[].memory'")]
pub(super) struct Stats {
    /// Look once and end
    #[arg(long)]
    once: bool,

    /// Time between two looks
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = parse_duration)]
    interval: Duration,

    /// Only these; ids, beginnings of ids, or names
    containers: Vec<String>,
}

impl Stats {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let mut wanted = Vec::new();
        for name in &self.containers {
            wanted.push(find::container(client, name).await?.id);
        }
        let live = !self.once && format == Format::Table && std::io::stdout().is_terminal();
        let mut before = look(client, &wanted).await?;
        loop {
            // Rates need two looks.
            let pause = if self.once { self.interval.min(Duration::from_secs(1)) } else { self.interval };
            tokio::time::sleep(pause).await;
            let now = look(client, &wanted).await?;
            if format == Format::Json {
                print_json(&now.values().collect::<Vec<_>>())?;
            } else {
                if live {
                    // Home, and clear what was there.
                    print("\u{1b}[H\u{1b}[2J")?;
                }
                table(&before, &now).print()?;
            }
            if self.once {
                return Ok(());
            }
            before = now;
        }
    }
}

async fn look(client: &mut Client, wanted: &[String]) -> Result<BTreeMap<String, ContainerStats>, CliError> {
    let patience = client.patience();
    let call = client.runtime.list_container_stats(ListContainerStatsRequest::default());
    let stats = answer("measure the containers", patience, call).await?.stats;
    let id = |stats: &ContainerStats| stats.attributes.as_ref().map(|of| of.id.clone());
    let all = stats.into_iter().filter_map(|stats| Some((id(&stats)?, stats)));
    Ok(all.filter(|(id, _)| wanted.is_empty() || wanted.contains(id)).collect())
}

fn table(before: &BTreeMap<String, ContainerStats>, now: &BTreeMap<String, ContainerStats>) -> Table {
    let mut table = Table::new(&["CONTAINER ID", "NAME", "CPU %", "MEMORY", "DISK"]);
    for (id, stats) in now {
        let name = stats.attributes.as_ref().and_then(|of| of.metadata.as_ref()).map_or("", |it| &it.name);
        let memory = stats.memory.as_ref().and_then(|memory| memory.working_set_bytes);
        let disk = stats.writable_layer.as_ref().and_then(|layer| layer.used_bytes);
        let bytes = |value: Option<u64>| value.map_or_else(|| "-".into(), size);
        let share = before.get(id).and_then(|before| percent(before, stats));
        table.row([
            short_id(id).into(),
            name.into(),
            share.map_or_else(|| "-".into(), |share| format!("{share:.1}")),
            bytes(memory.map(|value| value.value)),
            bytes(disk.map(|value| value.value)),
        ]);
    }
    table
}

/// Of one processor, between two looks.
fn percent(before: &ContainerStats, now: &ContainerStats) -> Option<f64> {
    let (before, now) = (before.cpu.as_ref()?, now.cpu.as_ref()?);
    let used = |cpu: &crate::api::runtime::CpuUsage| cpu.usage_core_nano_seconds.map(|value| value.value);
    let time = now.timestamp.checked_sub(before.timestamp).filter(|time| *time > 0)?;
    Some(used(now)?.checked_sub(used(before)?)? as f64 / time as f64 * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{CpuUsage, UInt64Value};

    #[test]
    fn processor_time_is_a_share_of_one_processor() {
        let at = |timestamp, value| ContainerStats {
            cpu: Some(CpuUsage {
                timestamp,
                usage_core_nano_seconds: Some(UInt64Value { value }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(percent(&at(0, 0), &at(2_000_000_000, 3_000_000_000)), Some(150.0));
        assert_eq!(percent(&at(5, 0), &at(5, 1)), None, "the same look twice");
        assert_eq!(percent(&at(0, 9), &at(5, 1)), None, "it was started anew");
    }
}
