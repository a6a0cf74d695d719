//! `hull run`

mod request;
mod values;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::attach;
use super::client::{Client, answer};
use super::container_log::{ContainerLog, follow};
use super::error::{CliError, FAILED};
use super::find;
use super::output::print;
use super::pull::{Credentials, pull};
use super::rmp::remove_pod;
use super::session::{self, Ended, Wanted};
use super::stop::stop;
use super::stopp::stop_pod;
use crate::api::hull::{InfoRequest, RUN_LABEL};
use crate::api::runtime::{
    ContainerStatus, CreateContainerRequest, PodSandbox, PodSandboxConfig, RunPodSandboxRequest,
    StartContainerRequest,
};
use crate::config::value;
use values::{Port, Volume};

/// Time to end by itself that a container has after SIGINT or SIGTERM; a second signal ends it at once.
const GRACE: Duration = Duration::from_secs(10);
/// Where logs are kept by a daemon that does not say where its directory is.
const OTHER_ROOT: &str = "/var/log/hull";

/// Run a command in a new container in a pod of its own
///
/// The image is fetched if it is not here. The output is printed while the command runs, and hull ends with its exit
/// status. SIGINT and SIGTERM stop the container.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull run --rm busybox echo hello
  hull run -d --name web -p 8080:80 -v ./site:/usr/share/nginx/html:ro nginx
  hull run --rm -m 256MiB --cpus 0.5 -e MODE=test alpine sh -c 'echo $MODE'
  hull run --rm --network host --cap-add NET_ADMIN alpine ip link

Exit status: that of the command; 126 if it cannot be executed, 127 if there is
no such program, 125 if hull or hulld failed.")]
pub(super) struct Run {
    /// Name of the pod and the container [default: the image's name and a random number]
    #[arg(long)]
    name: Option<String>,

    /// Remove the pod when the command has ended
    #[arg(long, conflicts_with = "detach")]
    rm: bool,

    /// Print the container's id and leave it running
    #[arg(short, long)]
    detach: bool,

    /// Environment variable; without =VALUE its value here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,

    /// Mount a file or directory of the host
    #[arg(short, long, value_name = "HOST:CONTAINER[:OPTIONS]", value_parser = values::volume,
          long_help = "Mount a file or directory of the host; a directory is made where there is nothing. \
                       OPTIONS are ro, rw, rprivate, rslave and rshared, with commas")]
    volume: Vec<Volume>,

    /// Forward a port of the host
    #[arg(short, long, value_name = "[ADDRESS:]HOST:CONTAINER[/udp]", value_parser = values::port)]
    publish: Vec<Port>,

    /// Which network: the pod's own or the host's
    #[arg(long, default_value = "pod")]
    network: Scope,

    /// Whose processes it sees: its own or all of the host's
    #[arg(long, default_value = "pod")]
    pid: Scope,

    /// Host name in the container [default: the name]
    #[arg(long)]
    hostname: Option<String>,

    /// User, by name or number, and group by number
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = values::user)]
    user: Option<values::User>,

    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,

    /// Program to run instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,

    /// Grant a capability, e.g. NET_ADMIN, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,

    /// Take a capability away, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,

    /// Every capability and device, no seccomp: as good as root on the host
    #[arg(long)]
    privileged: bool,

    /// System calls: default, unconfined, or the path of a profile
    #[arg(long, value_name = "PROFILE", default_value = "default")]
    seccomp: String,

    /// The root file system cannot be written to
    #[arg(long)]
    read_only: bool,

    /// Most memory, e.g. 256MiB
    #[arg(short, long, value_name = "SIZE", value_parser = value::parse_size)]
    memory: Option<u64>,

    /// Most processor time, in processors, e.g. 0.5
    #[arg(long, value_name = "NUMBER", value_parser = values::cpus)]
    cpus: Option<f64>,

    /// Label of the container
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = values::label)]
    label: Vec<(String, String)>,

    /// Runtime handler, as a RuntimeClass names it
    #[arg(long, value_name = "HANDLER", default_value = "")]
    runtime: String,

    #[command(flatten)]
    credentials: Credentials,

    /// Pass standard input on; with -d it stays open for `hull attach`
    #[arg(short, long)]
    interactive: bool,

    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,

    /// The image, and arguments for its entrypoint, or the command if it has none
    // One argument, so that flags after the image are the command's.
    #[arg(required = true, trailing_var_arg = true, num_args = 1.., value_names = ["IMAGE", "COMMAND"])]
    pub(super) image_and_command: Vec<String>,
}

/// Its own or the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scope {
    Pod,
    Host,
}

/// A pod that exists, and what it needs to be undone.
struct Made {
    pod: PodSandboxConfig,
    pod_id: String,
    uid: String,
    name: String,
}

impl Run {
    fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    pub(super) fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }

    pub(super) async fn run(self, client: &mut Client) -> Result<u8, CliError> {
        let attended = (self.interactive || self.tty) && !self.detach;
        let wanted = Wanted { stdin: self.interactive, tty: self.tty, detachable: true };
        if attended {
            session::check_terminal(wanted)?;
        }
        let image = self.image_id(client).await?;
        // From here on a signal must not leave a pod behind; one that comes early is acted upon when it can be.
        let mut signals = Signals::new().map_err(|error| CliError::local("take signals", error))?;
        let made = self.make_pod(client).await?;
        let wanted = attended.then_some(wanted);
        let result = self.run_in(client, &made, image, wanted, &mut signals).await;
        let tidied = match &result {
            Ok(Done::Left) => Ok(()),
            // Its log and its status stay; its network and its processes go.
            Ok(Done::Ended(_)) if !self.rm => stop_pod(client, &made.name, made.pod_id).await,
            // Nothing of a pod whose container never ran is of use.
            _ => remove_pod(client, &made.name, &made.pod_id, Some(&made.uid)).await,
        };
        let done = result?;
        tidied?;
        Ok(match done {
            Done::Left => 0,
            Done::Ended(code) => code,
        })
    }

    /// The id of the image, fetched if need be.
    async fn image_id(&self, client: &mut Client) -> Result<String, CliError> {
        match find::image_if_here(client, self.image()).await? {
            Some(image) => Ok(image.id),
            None => pull(client, self.image(), &self.credentials, false).await,
        }
    }

    async fn make_pod(&self, client: &mut Client) -> Result<Made, CliError> {
        let uid = request::random_hex(16);
        let name = self.name.clone().unwrap_or_else(|| request::name_for(self.image()));
        if find::pods(client).await?.iter().any(|pod| uid_of(pod).is_some() && find::pod_name(pod) == name) {
            let hint = format!("`hull rm -f {name}` removes it; --name gives another name.");
            return Err(CliError::Refused(format!("there is a pod \"{name}\" already\n{hint}")));
        }
        let logs = log_directory(client, &uid).await?;
        std::fs::create_dir_all(&logs)
            .map_err(|error| CliError::local(format!("make the log directory {}", logs.display()), error))?;
        let pod = self.pod_config(&name, &uid, &logs);
        let patience = client.patience();
        let request =
            RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: self.runtime.clone() };
        let answered =
            answer(format!("make the pod {name}"), patience, client.runtime.run_pod_sandbox(request)).await;
        match answered {
            Ok(answered) => Ok(Made { pod, pod_id: answered.pod_sandbox_id, uid, name }),
            Err(error) => {
                remove_logs(client, &uid).await?;
                Err(error)
            }
        }
    }

    async fn run_in(
        &self,
        client: &mut Client,
        made: &Made,
        image: String,
        wanted: Option<Wanted>,
        signals: &mut Signals,
    ) -> Result<Done, CliError> {
        let name = &made.name;
        let config = self.container_config(name, image)?;
        let log_path = Path::new(&made.pod.log_directory).join(&config.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: made.pod_id.clone(),
            config: Some(config),
            sandbox_config: Some(made.pod.clone()),
        };
        let patience = client.patience();
        let call = client.runtime.create_container(request);
        let container_id = answer(format!("create the container {name}"), patience, call).await?.container_id;
        let start = StartContainerRequest { container_id: container_id.clone() };
        let mut starter = client.clone();
        let started = async move {
            let call = starter.runtime.start_container(start);
            answer(format!("start the container {name}"), patience, call).await.map(drop)
        };
        if let Some(wanted) = wanted {
            return attended(client, name, container_id, wanted, started, signals).await;
        }
        started.await?;
        if self.detach {
            print(&format!("{container_id}\n"))?;
            return Ok(Done::Left);
        }
        let log = ContainerLog::open(&log_path, false, None)
            .map_err(|error| CliError::local(format!("read {}", log_path.display()), error))?;
        let status = attend(client, name, &container_id, log, signals).await?;
        Ok(Done::Ended(exit_code(status)))
    }
}

/// What became of the container.
#[derive(Clone, Copy, Debug)]
enum Done {
    /// It ended, with this exit status.
    Ended(u8),
    /// It goes on.
    Left,
}

/// Starts a container with its streams here, until it ends or is left. Signals stop it; with a terminal the keys for them
/// go to the container itself.
async fn attended(
    client: &mut Client,
    name: &str,
    id: String,
    wanted: Wanted,
    started: impl Future<Output = Result<(), CliError>>,
    signals: &mut Signals,
) -> Result<Done, CliError> {
    let place = attach::place(client, name, &id, wanted).await?;
    let doing = format!("attach to {name}");
    let mut session = std::pin::pin!(session::attend(&place, wanted, &doing, started));
    let mut grace = GRACE;
    let ended = loop {
        tokio::select! {
            ended = &mut session => break ended?,
            () = signals.next() => {
                let (mut client, name, id) = (client.clone(), name.to_owned(), id.clone());
                // A second one is not asked twice.
                let grace = std::mem::take(&mut grace);
                tokio::spawn(async move {
                    if let Err(error) = stop(&mut client, &name, id, grace).await {
                        error.report();
                    }
                });
            }
        }
    };
    let left = ended == Ended::Detached;
    let code = attach::finish(client, name, id, ended).await?;
    Ok(if left { Done::Left } else { Done::Ended(code) })
}

/// SIGINT and SIGTERM since this was made.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Prints the container's output until it has ended; signals stop it.
async fn attend(
    client: &mut Client,
    name: &str,
    container_id: &str,
    log: ContainerLog,
    signals: &mut Signals,
) -> Result<Option<ContainerStatus>, CliError> {
    let other = client.clone();
    let mut followed = std::pin::pin!(follow(client, container_id, Some(log)));
    for grace in [GRACE, Duration::ZERO] {
        tokio::select! {
            status = &mut followed => return status,
            () = signals.next() => {}
        }
        let (mut client, name, id) = (other.clone(), name.to_owned(), container_id.to_owned());
        // Beside the output, which goes on until the container has ended.
        tokio::spawn(async move {
            if let Err(error) = stop(&mut client, &name, id, grace).await {
                error.report();
            }
        });
    }
    followed.await
}

/// What a shell would see; a container that somebody removed has no exit code to pass on.
fn exit_code(status: Option<ContainerStatus>) -> u8 {
    status.and_then(|status| u8::try_from(status.exit_code).ok()).unwrap_or(FAILED)
}

/// The uid of a pod made by `hull run`, which also names its log directory.
pub(super) fn uid_of(pod: &PodSandbox) -> Option<&str> {
    let uid = pod.metadata.as_ref().map(|metadata| metadata.uid.as_str())?;
    // It becomes a part of a path, and anybody can make a pod with that label.
    let harmless = uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit());
    (pod.labels.contains_key(RUN_LABEL) && harmless).then_some(uid)
}

/// Where the logs of one pod are: below the daemon's root, whichever daemon it is.
async fn log_directory(client: &mut Client, uid: &str) -> Result<PathBuf, CliError> {
    let patience = client.patience();
    let root =
        match answer("ask the daemon for its directory", patience, client.hull.info(InfoRequest {})).await {
            Ok(info) => PathBuf::from(info.root).join("logs"),
            Err(CliError::Call { status, .. }) if status.code() == tonic::Code::Unimplemented => {
                OTHER_ROOT.into()
            }
            Err(error) => return Err(error),
        };
    Ok(root.join(uid))
}

/// Removes the logs of one pod; they may be gone already.
pub(super) async fn remove_logs(client: &mut Client, uid: &str) -> Result<(), CliError> {
    let directory = log_directory(client, uid).await?;
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CliError::local(format!("remove the logs in {}", directory.display()), error))
        }
        _ => Ok(()),
    }
}
