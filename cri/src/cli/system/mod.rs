//! `hull system`: the node as a whole.

mod df;
mod requirements;
mod store;

use clap::{Args, Subcommand};

use super::client::Client;
use super::error::CliError;
use super::image;
use super::output::Format;

/// Look after the node: what occupies its disk, whether everything is whole
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull system check    what this node can, and whether its images are whole
  hull system df -v    what occupies its disk")]
pub(super) struct System {
    #[command(subcommand)]
    command: SystemCommand,
}

#[derive(Debug, Subcommand)]
enum SystemCommand {
    /// Show what occupies the disk
    Df(df::Df),
    /// Look at what the machine lacks, and compare every image layer with its digest
    Check(store::Check),
    /// Remove images that no container was made from
    Prune(Prune),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull system prune       images that no tag leads to, and leftovers
  hull system prune -a    all images that no container was made from")]
struct Prune {
    /// Tagged images too
    #[arg(short, long)]
    all: bool,
}

impl System {
    /// For a check: what the machine has of what hull needs, which takes no daemon.
    pub(super) async fn look_at_machine(&mut self, format: Format) -> Result<(), CliError> {
        match &mut self.command {
            SystemCommand::Check(check) => check.look_at_machine(format).await,
            _ => Ok(()),
        }
    }

    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<u8, CliError> {
        match self.command {
            SystemCommand::Df(df) => df.run(client, format).await?,
            SystemCommand::Check(check) => return check.run(client, format).await,
            SystemCommand::Prune(prune) => image::prune(client, prune.all, format).await?,
        }
        Ok(0)
    }
}
