//! `hull attach`

use clap::Args;
use serde_json::Value;
use tonic::Code;

use super::client::{Client, answer};
use super::error::{CliError, FAILED};
use super::find;
use super::session::{self, Ended, Wanted, attend};
use crate::api::runtime::{AttachRequest, ContainerStatusRequest};
use crate::streaming::dial::Place;

/// Connect to the streams of a running container
///
/// What it prints from now on is printed here too, and hull ends with its exit status. What is typed goes to it if it was
/// made with an open standard input. Ctrl-P Ctrl-Q leaves a container with a terminal running; without one Ctrl-C does.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull attach web
  hull attach --no-stdin web     only look

Exit status: that of the container; 0 after Ctrl-P Ctrl-Q.")]
pub(super) struct Attach {
    /// Do not pass standard input on
    #[arg(long)]
    no_stdin: bool,

    /// Id, beginning of an id, or name
    container: String,
}

impl Attach {
    pub(super) async fn run(self, client: &mut Client) -> Result<u8, CliError> {
        let id = find::container(client, &self.container).await?.id;
        let (stdin, tty) = streams_of(client, &id).await?;
        attach(client, &self.container, id, Wanted { stdin: stdin && !self.no_stdin, tty, detachable: true })
            .await
    }
}

/// Attaches to a container that runs, or is about to, and gives its exit status.
pub(super) async fn attach(
    client: &mut Client,
    name: &str,
    id: String,
    wanted: Wanted,
) -> Result<u8, CliError> {
    let place = place(client, name, &id, wanted).await?;
    let ended = attend(&place, wanted, &format!("attach to {name}"), async { Ok(()) }).await?;
    finish(client, name, id, ended).await
}

/// Where the streams of a container are.
pub(super) async fn place(
    client: &mut Client,
    name: &str,
    id: &str,
    wanted: Wanted,
) -> Result<Place, CliError> {
    session::check_terminal(wanted)?;
    let Wanted { stdin, tty, .. } = wanted;
    let request = AttachRequest { container_id: id.to_owned(), stdin, tty, stdout: true, stderr: !tty };
    let patience = client.patience();
    let hint = format!("`hull ps -a` says how it ended, `hull logs {name}` what it printed last.");
    let answered = answer(format!("attach to {name}"), patience, client.runtime.attach(request)).await;
    let url = answered.map_err(|error| error.hint(Code::FailedPrecondition, hint))?.url;
    client.place(url).await
}

/// The exit status after a session: the container's own.
pub(super) async fn finish(
    client: &mut Client,
    name: &str,
    id: String,
    ended: Ended,
) -> Result<u8, CliError> {
    if ended == Ended::Detached {
        eprintln!("\nhull: {name} goes on; `hull attach {name}` comes back to it");
        return Ok(0);
    }
    let patience = client.patience();
    let request = ContainerStatusRequest { container_id: id, verbose: false };
    let status = answer("ask how it ended", patience, client.runtime.container_status(request)).await;
    // Somebody may have removed it already.
    let code = status.ok().and_then(|answer| answer.status).map(|status| status.exit_code);
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED))
}

/// Whether the container has an open standard input, and a terminal. Only hulld says so, in its verbose answer.
async fn streams_of(client: &mut Client, id: &str) -> Result<(bool, bool), CliError> {
    let patience = client.patience();
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let status = answer("look at the container", patience, client.runtime.container_status(request)).await?;
    let info: Value =
        status.info.get("info").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let is = |name: &str| info["config"][name].as_bool().unwrap_or(false);
    Ok((is("stdin"), is("tty")))
}
