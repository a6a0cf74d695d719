//! `hull exec`

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use tonic::Code;

use super::client::{Client, answer};
use super::error::{CliError, FAILED};
use super::find;
use super::session::{self, Ended, Wanted};
use crate::api::runtime::{ExecRequest, ExecSyncRequest};
use crate::config::value::parse_duration;

/// Run a command in a running container
///
/// hull ends with its exit status. Without -i and -t its output is printed when it has ended (at most 16 MiB of each
/// stream); with them it is passed on as it comes, and the command is killed when hull ends.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull exec web nginx -t
  hull exec -it web sh                          a shell, in a terminal
  hull exec -i db sh -c 'cat > /tmp/dump' < dump
  hull exec --time-limit 5s web sh -c 'wget -qO- localhost | head'

Exit status: that of the command; 126 if it cannot be executed, 127 if there is
no such program, 125 if hull or hulld failed.")]
pub(super) struct Exec {
    /// Kill the command after so long
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, conflicts_with_all = ["interactive", "tty"])]
    time_limit: Option<Duration>,

    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,

    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,

    /// Id, beginning of an id, or name
    container: String,

    /// The command and its arguments; it is not given to a shell
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(self, client: &mut Client) -> Result<u8, CliError> {
        let container_id = find::container(client, &self.container).await?.id;
        if self.interactive || self.tty {
            return self.stream(client, container_id).await;
        }
        // CRI counts whole seconds, and 0 means for ever.
        let limit = self.time_limit.map_or(0, |limit| limit.as_millis().div_ceil(1000).max(1));
        let timeout = i64::try_from(limit).unwrap_or(i64::MAX);
        let patience = client.endless();
        let call = client.runtime.exec_sync(ExecSyncRequest { container_id, cmd: self.command, timeout });
        let name = &self.container;
        let hint = format!("`hull ps -a` says how it ended, `hull logs {name}` what it printed last.");
        let done = answer(format!("run the command in {name}"), patience, call)
            .await
            .map_err(|error| error.hint(Code::FailedPrecondition, hint))?;
        let print = |mut out: Box<dyn Write>, text: &[u8]| out.write_all(text).and_then(|()| out.flush());
        print(Box::new(io::stdout().lock()), &done.stdout)
            .and_then(|()| print(Box::new(io::stderr().lock()), &done.stderr))
            .map_err(|error| CliError::local("print", error))?;
        Ok(u8::try_from(done.exit_code).unwrap_or(FAILED))
    }

    /// With streams that are passed on as they come.
    async fn stream(self, client: &mut Client, container_id: String) -> Result<u8, CliError> {
        let wanted = Wanted { stdin: self.interactive, tty: self.tty, detachable: false };
        session::check_terminal(wanted)?;
        let request = ExecRequest {
            container_id,
            cmd: self.command,
            tty: self.tty,
            stdin: self.interactive,
            stdout: true,
            stderr: !self.tty,
        };
        let name = &self.container;
        let doing = format!("run the command in {name}");
        let hint = format!("`hull ps -a` says how it ended, `hull logs {name}` what it printed last.");
        let patience = client.patience();
        let answered = answer(doing.clone(), patience, client.runtime.exec(request)).await;
        let url = answered.map_err(|error| error.hint(Code::FailedPrecondition, hint))?.url;
        let place = client.place(url).await?;
        match session::attend(&place, wanted, &doing, async { Ok(()) }).await? {
            Ended::Exit(code) => Ok(code),
            Ended::Detached => Ok(0),
        }
    }
}
