//! `hull logs`

use std::io;
use std::path::Path;

use clap::Args;

use super::client::{Client, answer};
use super::container_log::{ContainerLog, Sink, follow};
use super::error::CliError;
use super::find;
use crate::api::runtime::ContainerStatusRequest;

/// Print a container's output
///
/// What went to its standard error is printed there. The log of a container that has ended stays until it is removed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull logs web
  hull logs -f -n 100 web      the last 100 lines, then what comes
  hull logs -t web 2>errors    with times; standard error elsewhere")]
pub(super) struct Logs {
    /// Go on until the container has ended
    #[arg(short, long)]
    follow: bool,

    /// Only so many lines from the end
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,

    /// Begin each line with its time
    #[arg(short, long)]
    timestamps: bool,

    /// Id, beginning of an id, or name
    container: String,
}

impl Logs {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let id = find::container(client, &self.container).await?.id;
        let patience = client.patience();
        let request = ContainerStatusRequest { container_id: id.clone(), verbose: false };
        let status = client.runtime.container_status(request);
        let status = answer(format!("find the log of {}", self.container), patience, status).await?;
        let path = status.status.map(|status| status.log_path).unwrap_or_default();
        if path.is_empty() {
            return Err(CliError::Refused(format!(
                "the container {} was made without a log",
                self.container
            )));
        }
        let failed = |error| CliError::local(format!("read {path}"), error);
        let mut log = ContainerLog::open(Path::new(&path), self.timestamps, self.tail).map_err(failed)?;
        if self.follow {
            follow(client, &id, Some(log)).await?;
            return Ok(());
        }
        let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
        log.copy_new(&mut Sink { out: &mut out, err: &mut err })
            .map_err(|error| CliError::local("copy the container's output", error))?;
        Ok(())
    }
}
