//! `hull debug`: for those who want to know why.

mod trace;

use clap::{Args, Subcommand};

use super::client::Client;
use super::error::CliError;
use super::output::Format;

/// Look into the daemon's work
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull debug trace start            where the time of the last starts went
  hull debug trace start busybox    start a pod for it, and remove it again")]
pub(super) struct Debug {
    #[command(subcommand)]
    command: DebugCommand,
}

#[derive(Debug, Subcommand)]
enum DebugCommand {
    /// Print how long the steps of operations took
    #[command(subcommand)]
    Trace(TraceCommand),
}

#[derive(Debug, Subcommand)]
enum TraceCommand {
    /// Of the start of pods and containers
    Start(trace::Start),
}

impl Debug {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        match self.command {
            DebugCommand::Trace(TraceCommand::Start(start)) => start.run(client, format).await,
        }
    }
}
