//! hulld's command line.

use std::path::PathBuf;

use clap::Parser;

use crate::config::{LogFormat, Overrides, value};

/// The hull node daemon: answers kubelet, crictl and hull on a unix socket
///
/// hulld runs pods for Kubernetes through CRI, the Container Runtime Interface. Pods live on while it is stopped,
/// upgraded or restarted.
#[derive(Debug, Parser)]
#[command(name = "hulld", version, max_term_width = 110, after_help = EXAMPLES)]
pub struct Args {
    /// Directory for what must survive a reboot: images, records, writable layers [default: /var/lib/hull]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,

    /// Directory for what a reboot may take: sockets, pinned namespaces [default: /run/hull]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Socket to listen on, unix:///PATH [default: hull.sock in the state directory]
    #[arg(long, value_name = "SOCKET", value_parser = value::parse_endpoint)]
    pub listen: Option<PathBuf>,

    /// Configuration file [default: /etc/hull/hull.toml, which need not exist]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// error, warn, info, debug or trace; single modules after commas: info,hull_network=debug [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,

    /// Form of log lines on standard error [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Print the configuration in force (file, flags and defaults) as TOML, and end
    #[arg(long)]
    pub print_config: bool,

    /// Say whether the configuration is right, and end
    #[arg(long, conflicts_with = "print_config")]
    pub check_config: bool,

    /// Leave the machine as it was found, and end: no layer mounts, no bridge, no cgroups. Needs that no pods are left
    #[arg(long, conflicts_with_all = ["print_config", "check_config"])]
    pub release: bool,
}

const EXAMPLES: &str = "\
Examples:
  hulld                                         as root, everything at its default
  hulld --state /tmp/a/state --root /tmp/a/root a second one beside it, on /tmp/a/state/hull.sock
  hulld --check-config --config ./hull.toml     what is wrong with this file?
  crictl --runtime-endpoint unix:///run/hull/hull.sock info
  hull run busybox echo hello

Flags win over the file, the file over the defaults. Every key of the file is explained in the
hull.toml that comes with hull. SIGTERM and SIGINT end hulld after the requests under way (at most
5 s); pods go on running.";

impl Args {
    /// What the flags say about the configuration.
    pub fn overrides(&self) -> Overrides {
        Overrides {
            root: self.root.clone(),
            state: self.state.clone(),
            listen: self.listen.clone(),
            log_level: self.log_level.clone(),
            log_format: self.log_format,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
