//! A container's output until it ends.

use std::io;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;

use super::changes::Changes;
use super::{ContainerLog, Sink};
use crate::api::runtime::{ContainerState, ContainerStatus, ContainerStatusRequest};
use crate::cli::client::{Client, answer};
use crate::cli::error::CliError;

/// How soon to ask again whether the container has ended; doubled each time up to the last.
const SOON: Duration = Duration::from_millis(5);
const LATER: Duration = Duration::from_millis(250);

/// How long the daemon may be away: an upgrade or a restart, during which containers and their logs go on.
const AWAY: Duration = Duration::from_secs(30);

/// Copies the log to standard output and standard error until the container has ended and all of it is printed.
/// Returns its last status; `None` if it was removed meanwhile.
pub(in crate::cli) async fn follow(
    client: &mut Client,
    container_id: &str,
    mut log: Option<ContainerLog>,
) -> Result<Option<ContainerStatus>, CliError> {
    let mut changes = log.as_ref().map(|log| Changes::of(log.directory()));
    let (mut interval, mut ask_at, mut answered_at) = (SOON, Instant::now(), Instant::now());
    loop {
        copy(&mut log)?;
        if Instant::now() >= ask_at {
            match status(client, container_id).await {
                Ok(status) if status.as_ref().is_none_or(has_ended) => {
                    // Everything was written before the end was known.
                    copy(&mut log)?;
                    return Ok(status);
                }
                Ok(_) => answered_at = Instant::now(),
                Err(error) if is_away(&error) && answered_at.elapsed() < AWAY => {}
                Err(error) => return Err(error),
            }
            ask_at = Instant::now() + interval;
            interval = (interval * 2).min(LATER);
        }
        tokio::select! {
            () = next(&mut changes) => {}
            () = tokio::time::sleep_until(ask_at) => {}
        }
    }
}

fn has_ended(status: &ContainerStatus) -> bool {
    status.state() == ContainerState::ContainerExited
}

/// Nobody answers at the moment.
fn is_away(error: &CliError) -> bool {
    matches!(error, CliError::Call { status, .. } if status.code() == Code::Unavailable)
}

async fn next(changes: &mut Option<Changes>) {
    match changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    }
}

fn copy(log: &mut Option<ContainerLog>) -> Result<(), CliError> {
    let Some(log) = log else { return Ok(()) };
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    let copied = log.copy_new(&mut Sink { out: &mut out, err: &mut err });
    copied.map_err(|error| CliError::local("copy the container's output", error))?;
    Ok(())
}

async fn status(client: &mut Client, container_id: &str) -> Result<Option<ContainerStatus>, CliError> {
    let patience = client.patience();
    let request = ContainerStatusRequest { container_id: container_id.into(), verbose: false };
    match answer("ask for the container's status", patience, client.runtime.container_status(request)).await {
        Ok(answer) => Ok(answer.status),
        Err(CliError::Call { status, .. }) if status.code() == Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
