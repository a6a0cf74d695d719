//! `hull stop`

use std::time::Duration;

use clap::Args;

use super::client::{Client, answer};
use super::error::CliError;
use super::find;
use super::output::print;
use crate::api::runtime::StopContainerRequest;
use crate::config::value::parse_duration;

/// Stop containers
///
/// A container gets its stop signal (SIGTERM unless its image says otherwise) and, if it still runs when the time is
/// up, SIGKILL.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull stop web
  hull stop -t 1m database    a minute to write everything down
  hull stop -t 0 hung         at once")]
pub(super) struct Stop {
    /// How long it may take to end by itself, e.g. 30 or 30s; 0 kills it at once
    // The same id as the option of every command, whose place it takes here: what people know from docker and crictl.
    #[arg(short, long, value_name = "DURATION", default_value = "10s", value_parser = seconds_or_duration)]
    pub(super) timeout: Duration,

    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

impl Stop {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        for name in &self.containers {
            let id = find::container(client, name).await?.id;
            stop(client, name, id, self.timeout).await?;
            print(&format!("{name}\n"))?;
        }
        Ok(())
    }
}

/// A bare number counts seconds, as with docker and crictl.
fn seconds_or_duration(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).or_else(|_| parse_duration(text))
}

/// Stops one container; `name` is for messages.
pub(super) async fn stop(
    client: &mut Client,
    name: &str,
    container_id: String,
    grace: Duration,
) -> Result<(), CliError> {
    // CRI counts whole seconds; half a second must not become none.
    let timeout = i64::try_from(grace.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
    // The call ends when the container has.
    let patience = client.patience().map(|patience| patience.saturating_add(grace));
    let call = client.runtime.stop_container(StopContainerRequest { container_id, timeout });
    answer(format!("stop the container {name}"), patience, call).await?;
    Ok(())
}
