//! hull, the command line: the same socket and the same calls as kubelet, for people.
//!
//! One file for each command; beside them `client` (the connection), `find` (ids, prefixes and names), `output`
//! (tables and JSON) and `container_log` (CRI log files).

mod attach;
mod client;
mod commit;
mod completion;
mod container_log;
mod debug;
mod diff;
mod error;
mod events;
mod exec;
mod export;
mod find;
mod history;
mod image;
mod images;
mod info;
mod inspect;
mod load;
mod login;
mod logs;
mod output;
mod pods;
mod port_forward;
mod progress;
mod ps;
mod pull;
mod push;
mod rm;
mod rmi;
mod rmp;
mod run;
mod save;
mod session;
mod sink;
mod start;
mod stats;
mod stop;
mod stopp;
mod system;
mod tag;
mod version;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::config::value;
use client::Client;
use error::CliError;
use output::Format;

/// Run and look after pods, containers and images on this node
///
/// hull speaks to hulld over its socket, as kubelet and crictl do. What kubelet started can be seen and stopped here
/// too; kubelet will start it again.
#[derive(Debug, Parser)]
#[command(name = "hull", version, max_term_width = WIDTH, after_help = EXAMPLES)]
struct Cli {
    /// Socket of the daemon
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        env = "HULL_SOCKET",
        hide_env_values = true,
        value_name = "SOCKET",
        default_value = "unix:///run/hull/hull.sock",
        value_parser = value::parse_endpoint
    )]
    socket: PathBuf,

    /// Give up a request that takes longer, e.g. 30s [default: 2m; pull and exec may take as long as they need]
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        value_name = "DURATION",
        value_parser = value::parse_duration
    )]
    timeout: Option<Duration>,

    /// Form of the output: for people or for programs
    #[arg(short, long, global = true, help_heading = GLOBAL, value_name = "FORMAT", default_value = "table")]
    output: Format,

    #[command(subcommand)]
    command: Command,
}

/// Columns of help texts, however wide the terminal: what is longer is hard to read.
const WIDTH: usize = 80;

const GLOBAL: &str = "Options of every command";

const EXAMPLES: &str = "\
Examples:
  hull run --rm busybox echo hello         run a command, print its output
  hull run -d --name web -p 8080:80 nginx  run a service in the background
  hull run --rm -it alpine sh              a shell in a container of its own
  hull exec web nginx -t                   run a command in it
  hull exec -it web sh                     a shell in it
  hull port-forward web 8080:80            reach its port from here
  hull logs -f web                         follow its output
  hull stop web && hull rm web             stop it, remove it with its pod
  hull ps -a                               all containers, ended ones too
  hull pull ghcr.io/team/app:1.2           fetch an image
  hull inspect web                         everything that is known of it

Pods, containers and images are named by id, by the beginning of an id, or by
name.

Exit status: for run and exec that of the command, 126 if it cannot be executed,
127 if there is no such program. Otherwise 0, 125 if hull or hulld failed, 2 if
the command line is wrong.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a new container in a pod of its own
    Run(Box<run::Run>),
    /// Run a command in a running container
    Exec(exec::Exec),
    /// Connect to the streams of a running container
    Attach(attach::Attach),
    /// Reach ports of a pod from here
    PortForward(port_forward::PortForward),
    /// Print a container's output
    Logs(logs::Logs),
    /// Show what running containers use
    Stats(stats::Stats),
    /// Print what happens to pods and containers, as it happens
    Events(events::Events),
    /// List containers
    Ps(ps::Ps),
    /// Start containers that were created, or have ended
    Start(start::Start),
    /// Stop containers
    Stop(stop::Stop),
    /// Remove containers, and the pods that `hull run` made for them
    Rm(rm::Rm),
    /// List pods
    Pods(pods::Pods),
    /// Stop pods with all their containers
    Stopp(stopp::StopPod),
    /// Remove pods with all their containers
    Rmp(rmp::RemovePod),
    /// Fetch an image from its registry
    Pull(pull::Pull),
    /// List images
    Images(images::Images),
    /// Remove images, or one of their names
    Rmi(rmi::RemoveImage),
    /// Give an image one more name
    Tag(tag::Tag),
    /// Show how an image was made
    History(history::History),
    /// Send an image to a registry
    Push(push::Push),
    /// Write images to a file
    Save(save::Save),
    /// Read images from a file
    Load(load::Load),
    /// Make an image of a container
    Commit(commit::Commit),
    /// Show what a container has changed of its image
    Diff(diff::Diff),
    /// Write all files of a container as a tar archive
    Export(export::Export),
    /// Look after images
    Image(image::Image),
    /// Look after the node: disk, damage
    System(system::System),
    /// Look into the daemon's work
    Debug(debug::Debug),
    /// Print everything known of containers, pods or images as JSON
    Inspect(inspect::Inspect),
    /// Print what the daemon is, where it lives and what it holds
    #[command(after_help = info::EXAMPLES)]
    Info,
    /// Print the versions of hull and of the daemon
    #[command(after_help = version::EXAMPLES)]
    Version,
    /// Print a completion script for a shell
    Completion(completion::Completion),
}

/// The whole of hull's main function.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Completion(completion) = &cli.command {
        return completion.run();
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CliError::local("start", error).report(),
    };
    match runtime.block_on(dispatch(cli)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => error.report(),
    }
}

async fn dispatch(mut cli: Cli) -> Result<u8, CliError> {
    if let Command::System(system) = &mut cli.command {
        // What the machine lacks may be why there is no daemon.
        system.look_at_machine(cli.output).await?;
    }
    // What `stop` calls --timeout is the container's time and not the request's.
    let timeout = cli.timeout.filter(|_| !matches!(cli.command, Command::Stop(_)));
    let mut client = Client::connect(&cli.socket, timeout).await?;
    let (client, format) = (&mut client, cli.output);
    match cli.command {
        Command::Run(run) => return run.run(client).await,
        Command::Exec(exec) => return exec.run(client).await,
        Command::Attach(attach) => return attach.run(client).await,
        Command::PortForward(forward) => return forward.run(client).await,
        Command::Stats(stats) => stats.run(client, format).await?,
        Command::Events(events) => events.run(client, format).await?,
        Command::Logs(logs) => logs.run(client).await?,
        Command::Ps(ps) => ps.run(client, format).await?,
        Command::Start(start) => start.run(client).await?,
        Command::Stop(stop) => stop.run(client).await?,
        Command::Rm(rm) => rm.run(client).await?,
        Command::Pods(pods) => pods.run(client, format).await?,
        Command::Stopp(stop) => stop.run(client).await?,
        Command::Rmp(remove) => remove.run(client).await?,
        Command::Pull(pull) => pull.run(client, format).await?,
        Command::Images(images) => images.run(client, format).await?,
        Command::Rmi(remove) => remove.run(client).await?,
        Command::Tag(tag) => tag.run(client).await?,
        Command::History(history) => history.run(client, format).await?,
        Command::Push(push) => push.run(client, format).await?,
        Command::Save(save) => save.run(client).await?,
        Command::Load(load) => load.run(client, format).await?,
        Command::Commit(commit) => commit.run(client, format).await?,
        Command::Diff(diff) => diff.run(client, format).await?,
        Command::Export(export) => export.run(client).await?,
        Command::Image(image) => image.run(client, format).await?,
        Command::System(system) => return system.run(client, format).await,
        Command::Debug(debug) => debug.run(client, format).await?,
        Command::Inspect(inspect) => inspect.run(client).await?,
        Command::Info => info::run(client, format).await?,
        Command::Version => version::run(client, format).await?,
        // Needs no daemon; done before.
        Command::Completion(_) => {}
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_stop_has_its_own_timeout_in_seconds() {
        for (arguments, wanted) in [
            (&["stop", "web"][..], 10),
            (&["stop", "-t", "1", "web"], 1),
            (&["stop", "--timeout", "1m", "web"], 60),
        ] {
            let cli = Cli::try_parse_from([&["hull"], arguments].concat()).unwrap();
            let Command::Stop(stop) = cli.command else { panic!("not a stop") };
            assert_eq!(stop.timeout, Duration::from_secs(wanted), "{arguments:?}");
        }
    }

    #[test]
    fn a_command_after_the_image_keeps_its_own_flags() {
        let cli = Cli::try_parse_from(["hull", "run", "--rm", "-e", "A=b", "busybox", "sh", "-c", "echo $A"])
            .unwrap();
        let Command::Run(run) = cli.command else { panic!("not a run") };
        assert_eq!(run.command(), ["sh", "-c", "echo $A"]);
        let cli = Cli::try_parse_from(["hull", "run", "busybox", "--rm", "-v"]).unwrap();
        let Command::Run(run) = cli.command else { panic!("not a run") };
        assert_eq!(run.command(), ["--rm", "-v"]);
        assert!(Cli::try_parse_from(["hull", "run", "--unknown", "busybox"]).is_err());
        let cli = Cli::try_parse_from(["hull", "exec", "web", "ls", "-o", "json", "--timeout"]).unwrap();
        let Command::Exec(exec) = cli.command else { panic!("not an exec") };
        assert_eq!(exec.command, ["ls", "-o", "json", "--timeout"]);
    }
}
