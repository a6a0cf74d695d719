//! The birth of a machine: a VMM is started, gets everything as descriptors, and boots; then its agent makes the pod.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hull_agent::protocol::messages::{self as agent, request as agent_request, response as agent_response};
use hull_vmm::protocol::messages::{self as vmm, event, request, response};
use rustix::rand::GetRandomFlags;

use super::artifacts::Artifacts;
use super::cgroup::Entry;
use super::control::{Control, VmmEvents};
use super::door::Door;
use super::logs::{CONSOLE, VMM as LOG, tail};
use super::machine::{Machine, Parts, State, unexpected};
use super::network::Uplink;
use super::process::Process;
use super::record::MachineRecord;
use super::scratch::{self, CAPACITY, Scratch};
use super::{Inner, ids, network, size, watch};
use crate::api::runtime::PodSandboxConfig;
use crate::runtime::now;
use crate::sandbox::agent::ANSWER_TIME;
use crate::sandbox::program::Program;
use crate::sandbox::{Agent, Events as AgentEvents, Launched, Nascent, Outside, Place, SandboxError, Slots};

/// How long a guest may take to boot. On hardware it takes a fraction of a second; where KVM itself is emulated, many.
const BOOT: Duration = Duration::from_secs(90);
/// How often a guest that has not said that it is up is asked, and how long it may take to answer then.
const ASK: Duration = Duration::from_secs(2);
/// How long the agent may take to make the pod.
const BIRTH: Duration = Duration::from_secs(60);
/// Raw block volumes of one pod at a time.
const BLOCK_SLOTS: u32 = 8;
/// Open files of a VMM: layers, streams, logs.
const FILES: u64 = 65_536;
/// Until the first container says how important the pod is.
const OOM_SCORE: i32 = 0;
/// Below the root of the guest's cgroups.
const GUEST_CGROUP: &str = "/pod";

/// A VMM's program, started, that does not know yet what machine it is. Dropped, it ends by itself.
pub(super) struct Newborn {
    launcher: Arc<Inner>,
    place: Place,
    config: PodSandboxConfig,
    socket: UnixStream,
    /// The program's first process.
    first: u32,
    record: MachineRecord,
    home: PathBuf,
    scratch: File,
}

/// Records the machine, makes its disk and starts its VMM's program.
pub(super) fn begin(
    launcher: &Arc<Inner>,
    place: &Place,
    config: &PodSandboxConfig,
) -> Result<Newborn, SandboxError> {
    let artifacts = launcher.artifacts()?;
    let overhead = size::overhead(config, place.cgroup_levels > 0, &launcher.config);
    let size = size::of_pod(config, overhead, &launcher.config, launcher.node);
    let home = launcher.machines.directory(&place.id);
    for directory in [&home, &place.directory] {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(SandboxError::host("make the directory", directory))?;
    }
    let base = launcher.ids.take(&place.id).ok_or_else(|| {
        SandboxError::Unsupported(
            "there are as many machines on this node as there are ranges of user ids".into(),
        )
    })?;
    let begun = begin_with(launcher, place, config, &artifacts, size, base, home.clone());
    if begun.is_err() {
        // Nobody clears away what was never begun.
        let _ = fs::remove_dir_all(&home);
        launcher.ids.give_back(base, &place.id);
    }
    begun
}

fn begin_with(
    launcher: &Arc<Inner>,
    place: &Place,
    config: &PodSandboxConfig,
    artifacts: &Artifacts,
    size: size::Size,
    base: u32,
    home: PathBuf,
) -> Result<Newborn, SandboxError> {
    let record = MachineRecord {
        id: place.id.clone(),
        uid_base: base,
        vcpus: size.vcpus,
        memory: size.memory,
        memory_max: size.memory_max,
        block_slots: BLOCK_SLOTS,
        cgroup_parent: place.cgroup_parent.clone(),
        cgroup_levels: place.cgroup_levels,
        ..Default::default()
    };
    record.store(&home).map_err(SandboxError::host("write the machine's record in", &home))?;
    let scratch = scratch::make(&home)?;
    let (socket, first) = spawn(&artifacts.vmm, place)?;
    let (launcher, place, config) = (Arc::clone(launcher), place.clone(), config.clone());
    Ok(Newborn { launcher, place, config, socket, first, record, home, scratch })
}

fn spawn(program: &Path, place: &Place) -> Result<(UnixStream, u32), SandboxError> {
    let log = append(&place.directory.join(LOG))?;
    let started = Program::start(program, log, format!("the VMM of pod {}", place.id));
    let failed = |source| SandboxError::Spawn { program: program.to_owned(), source };
    started.map(|Program { socket, pid }| (socket, pid)).map_err(failed)
}

fn append(path: &Path) -> Result<File, SandboxError> {
    let opened = File::options().append(true).create(true).mode(0o600).open(path);
    opened.map_err(SandboxError::host("open", path))
}

/// What confines a process, its descriptors appended to `fds`.
pub(super) fn jail(
    uid_base: u32,
    entry: Entry,
    nofile: u64,
    oom_score: i32,
    fds: &mut Vec<OwnedFd>,
) -> vmm::Jail {
    let mut put = |fd: OwnedFd| {
        fds.push(fd);
        fds.len() as u32 - 1
    };
    vmm::Jail {
        uid_base,
        gid_base: uid_base,
        ids: ids::COUNT,
        high_base: 0,
        nofile,
        oom_score_adj: Some(oom_score),
        cgroup: entry.unified.map(&mut put),
        cgroup_tasks: entry.tasks.into_iter().map(put).collect(),
    }
}

impl Nascent for Newborn {
    fn create(
        self: Box<Self>,
        request: agent::CreateSandbox,
        outside: &Outside,
    ) -> BoxFuture<'_, Result<Launched, SandboxError>> {
        Box::pin(self.boot(request, outside))
    }
}

impl Newborn {
    async fn boot(
        self: Box<Self>,
        mut request: agent::CreateSandbox,
        outside: &Outside,
    ) -> Result<Launched, SandboxError> {
        let log = self.place.directory.join(LOG);
        let Self { launcher, place, config, socket, first, mut record, home, scratch } = *self;
        let uplink = network::attach(outside).await?;
        let limits = limits(&launcher, &place, &config, &request);
        let (cgroups, its_place) = (Arc::clone(&launcher.cgroups), place.clone());
        let entry = blocking(move || cgroups.make(&its_place, first, limits.as_ref())).await?;
        let created_levels = entry.created_levels;

        let door = Door::of(&place.directory);
        let (boot, fds) = boot_request(&launcher, &place, &record, &door, scratch, uplink.as_ref(), entry)?;
        let (control, mut events) = Control::connect(socket)?;
        let action = "boot";
        let answer = control.call(action, request::Call::Boot(boot), fds).await;
        record.vmm_pid = match answer.map_err(|error| with_log(error, &log))? {
            response::Outcome::Booted(booted) => booted.pid,
            _ => return Err(unexpected(action)),
        };
        // One that has ended already is found out below.
        record.vmm_started = Process::find(record.vmm_pid).and_then(|vmm| vmm.started()).unwrap_or(0);
        record.cgroup_levels = created_levels;
        record.store(&home).map_err(SandboxError::host("write the machine's record in", &home))?;
        let door = Arc::new(door);
        let (agent, agent_events) = wait_for_agent(&control, &mut events, &door, &place.directory).await?;
        fill_in(&mut request, uplink, record.vcpus)?;
        let call = agent_request::Call::CreateSandbox(request);
        match agent.call_within(BIRTH, "make the pod", call, Slots::default()).await? {
            agent_response::Outcome::SandboxCreated(_) => {}
            _ => return Err(SandboxError::Unexpected("the making of the pod")),
        }
        let vmm_pid = record.vmm_pid;
        let agent = Arc::new(agent);
        let scratch = Scratch::of(&home, launcher.machines.templates());
        let parts = Parts {
            id: place.id.clone(),
            state: State::new(record),
            home,
            directory: place.directory.clone(),
            cgroup_parent: place.cgroup_parent.clone(),
            control,
            door,
            agent: Arc::clone(&agent),
            scratch,
        };
        let machine = Machine::new(parts);
        launcher.add(&machine);
        watch::start(&launcher, &machine, place, events);
        // The host knows the pod's processes by their VMM.
        let created = agent::SandboxCreated {
            agent_pid: vmm_pid,
            reaper_pid: 0,
            cgroup_created_levels: created_levels,
            steps: Vec::new(),
        };
        Ok(Launched { agent, events: agent_events, created })
    }
}

/// Limits of the pod's cgroup, where that is hull's: the pod's own, and what the machine needs beside them.
fn limits(
    launcher: &Inner,
    place: &Place,
    config: &PodSandboxConfig,
    request: &agent::CreateSandbox,
) -> Option<agent::Resources> {
    let mut limits = request.pod_resources.clone()?;
    let overhead = size::overhead(config, place.cgroup_levels > 0, &launcher.config);
    let more = |limit: i64| limit.saturating_add(i64::try_from(overhead).unwrap_or(i64::MAX));
    limits.memory_limit = limits.memory_limit.map(|limit| if limit > 0 { more(limit) } else { limit });
    // With its memory the swap limit would have to grow; a guest does not swap.
    limits.memory_swap_limit = None;
    Some(limits)
}

fn boot_request(
    launcher: &Inner,
    place: &Place,
    record: &MachineRecord,
    door: &Door,
    scratch: File,
    uplink: Option<&Uplink>,
    entry: Entry,
) -> Result<(vmm::Boot, Vec<OwnedFd>), SandboxError> {
    let artifacts = launcher.artifacts()?;
    let open = |path: &Path| File::open(path).map_err(SandboxError::host("open", path));
    let path = Path::new("/dev/kvm");
    let kvm = File::options().read(true).write(true).open(path).map_err(SandboxError::host("open", path))?;
    let (vsock, control) =
        door.listen().map_err(SandboxError::host("listen on the VMM's sockets in", &place.directory))?;
    let mut fds: Vec<OwnedFd> = vec![
        kvm.into(),
        open(&artifacts.kernel)?.into(),
        open(&artifacts.initramfs)?.into(),
        scratch.into(),
        vsock.into(),
        control.into(),
        append(&place.directory.join(CONSOLE))?.into(),
    ];
    let tap = match uplink {
        Some(uplink) => {
            fds.push(uplink.tap.try_clone().map_err(SandboxError::machine("attach the network of"))?);
            Some(fds.len() as u32 - 1)
        }
        None => None,
    };
    let machine = vmm::Machine {
        id: place.id.clone(),
        cpus: record.vcpus,
        memory: record.memory,
        memory_max: record.memory_max,
        network: tap.is_some(),
        mac: uplink.map(|uplink| uplink.mac.to_vec()).unwrap_or_default(),
        mtu: uplink.map_or(0, |uplink| uplink.mtu),
        scratch_capacity: CAPACITY,
        block_slots: record.block_slots,
        cmdline_extra: launcher.config.kernel_arguments.clone(),
    };
    let jail = jail(record.uid_base, entry, FILES, OOM_SCORE, &mut fds);
    Ok((vmm::Boot { tap, ..vmm::Boot::in_order(machine, jail) }, fds))
}

/// Until the agent listens. Whatever ends the machine before that is the error.
async fn wait_for_agent(
    control: &Control,
    events: &mut VmmEvents,
    door: &Arc<Door>,
    directory: &Path,
) -> Result<(Agent, AgentEvents), SandboxError> {
    let failed = |reason: String| {
        let console = tail(&directory.join(CONSOLE), 1024);
        let reason =
            if console.is_empty() { reason } else { format!("{reason}; its console ends: {console}") };
        with_log(SandboxError::Machine { action: "boot", reason }, &directory.join(LOG))
    };
    let listening = async {
        while let Some(event) = events.recv().await {
            match event {
                event::Kind::AgentListening(times) => {
                    tracing::debug!(
                        micros = times.micros,
                        since_boot = times.micros_since_boot,
                        "a guest is up"
                    );
                    return Ok(());
                }
                event::Kind::AgentStarted(times) => {
                    tracing::debug!(micros = times.micros, "a guest's agent has started");
                }
                event::Kind::Panicked(panic) => {
                    return Err(failed(format!("the guest's kernel panicked: {}", panic.message)));
                }
                event::Kind::ShutDown(end) => return Err(failed(format!("it ended: {}", end.reason))),
                event::Kind::Fault(fault) => {
                    return Err(failed(format!("its device {} failed: {}", fault.device, fault.message)));
                }
            }
        }
        Err(failed("its VMM ended".into()))
    };
    // A guest whose kernel lets nobody write to I/O ports says nothing; it is asked now and then.
    let answering = async {
        loop {
            tokio::time::sleep(ASK).await;
            if let Ok(Ok(found)) = tokio::time::timeout(ASK, greet(door)).await {
                return found;
            }
        }
    };
    let up = async {
        tokio::select! {
            result = listening => {
                result?;
                greet(door).await
            }
            found = answering => Ok(found),
        }
    };
    match tokio::time::timeout(BOOT, up).await {
        Ok(result) => result,
        Err(_) => {
            let status = control.call("look at", request::Call::Status(vmm::GetStatus {}), Vec::new()).await;
            let devices = match status {
                Ok(response::Outcome::Status(status)) => status.activated.join(", "),
                _ => "unknown".into(),
            };
            let seconds = BOOT.as_secs();
            Err(failed(format!("the guest is not up after {seconds} s (devices in use: {devices})")))
        }
    }
}

/// A connection to an agent that answers.
async fn greet(door: &Arc<Door>) -> Result<(Agent, AgentEvents), SandboxError> {
    let connected = door.agent().await.map_err(SandboxError::machine("speak to the agent in"))?;
    let streams: Arc<Door> = Arc::clone(door);
    let (agent, events) = Agent::connect_apart(connected, streams)?;
    agent.state(ANSWER_TIME).await?;
    Ok((agent, events))
}

/// What the launcher has to say to the agent: the guest's part of the request.
fn fill_in(
    request: &mut agent::CreateSandbox,
    uplink: Option<Uplink>,
    vcpus: u32,
) -> Result<(), SandboxError> {
    let mut entropy = vec![0; 64];
    let filled = rustix::rand::getrandom(&mut entropy[..], GetRandomFlags::empty())
        .map_err(|errno| SandboxError::machine("find entropy for")(io::Error::from(errno)))?;
    entropy.truncate(filled);
    let guest = request.guest.get_or_insert_default();
    guest.entropy = entropy;
    guest.wall_clock_ns = now();
    guest.network = uplink.map(|uplink| uplink.guest);
    guest.cpus = vcpus;
    request.cgroup_parent = GUEST_CGROUP.into();
    request.cgroup_leaf = "agent".into();
    // The pod's limits are those of its machine, and of its cgroup on the host.
    request.pod_resources = None;
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(SandboxError::Source(format!("an operation broke off: {error}"))))
}

/// What the VMM wrote before it died is the best explanation there is.
fn with_log(error: SandboxError, log: &Path) -> SandboxError {
    match tail(log, 2048) {
        said if said.is_empty() => error,
        said => SandboxError::Machine { action: "boot", reason: format!("{error}; its VMM wrote: {said}") },
    }
}
