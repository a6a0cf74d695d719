//! `hull completion`

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::error::CliError;

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull completion bash > /etc/bash_completion.d/hull
  hull completion zsh > \"${fpath[1]}/_hull\"
  hull completion fish > ~/.config/fish/completions/hull.fish")]
pub(super) struct Completion {
    /// The shell
    shell: Shell,
}

impl Completion {
    pub(super) fn run(&self) -> ExitCode {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "hull", &mut script);
        match io::stdout().write_all(&script) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => CliError::local("print", error).report(),
        }
    }
}
