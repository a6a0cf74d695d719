//! Pods as machines: one VMM for each, whose guest's PID 1 is the agent. Past the launch hulld speaks to that agent as
//! to any other; what differs is how things from outside get in ([`pour`]).
//!
//! `ROOT/machines/ID` holds the machine's record and its scratch disk, the pod's volatile directory the sockets of its
//! VMM and what VMM and guest wrote for people.

pub mod artifacts;
mod availability;
mod birth;
mod cgroup;
mod classify;
mod control;
mod door;
mod follow;
mod ids;
mod logs;
mod machine;
mod measure;
mod network;
mod obituary;
mod pour;
mod process;
mod record;
mod refuse;
mod scratch;
mod shared;
mod size;
mod snapshot;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use hull_agent::cgroup::Hierarchies;
use hull_agent::protocol::messages::{self, request};
use hull_images::ImageStore;
use hull_vmm::protocol::messages::{self as vmm, request as vmm_request};

use self::artifacts::Artifacts;
use self::availability::Availability;
use self::cgroup::Cgroups;
use self::control::Control;
use self::door::Door;
use self::follow::Follower;
use self::ids::IdRanges;
use self::machine::{Machine, Parts, State};
use self::pour::Pour;
use self::record::{MachineRecord, Machines};
use self::scratch::Scratch;
use self::shared::Exporter;
use super::source::open_log;
use super::{
    Agent, Connection, Events, Launcher, LogPlace, Nascent, Obituary, Place, PodLimits, SandboxError, Slots,
    Source,
};
use crate::api::runtime::{ContainerConfig, PodSandboxConfig};
use crate::config::MachineConfig;
use crate::stats::disk::Occupied;
use crate::stats::{PodUsage, Subject};
use crate::systemd::Systemd;

/// How long a VMM whose guest has ended may take to end as well.
const LAST_WORDS: Duration = Duration::from_millis(1500);
/// How long the reading of a termination message may hold up the news of a container's end.
const READ_BACK: Duration = Duration::from_secs(5);
/// kubelet reads no more of it (pkg/kubelet/kuberuntime, maxTerminationMessageLength).
const MESSAGE: u32 = 4096;

/// Runs pods as machines.
pub struct MicrovmLauncher(Arc<Inner>);

/// What the launcher's tasks share.
struct Inner {
    config: MachineConfig,
    availability: Availability,
    machines: Machines,
    ids: Arc<IdRanges>,
    node: size::Node,
    images: Arc<ImageStore>,
    cgroups: Arc<Cgroups>,
    follower: Follower,
    exporter: Exporter,
    running: Mutex<BTreeMap<String, Arc<Machine>>>,
}

impl Inner {
    fn artifacts(&self) -> Result<Arc<Artifacts>, SandboxError> {
        self.availability.now().map_err(|reason| unavailable(&reason))
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Machine>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, machine: &Arc<Machine>) {
        self.running().insert(machine.id.clone(), Arc::clone(machine));
    }

    fn machine(&self, place: &Place) -> Result<Arc<Machine>, SandboxError> {
        let found = self.running().get(&place.id).cloned();
        found.ok_or_else(|| SandboxError::Lost("its machine is not running".into()))
    }

    async fn reconnect(self: &Arc<Self>, place: &Place) -> Result<(Arc<Agent>, Events), SandboxError> {
        let gone = |error: io::Error| SandboxError::Lost(error.to_string());
        let home = self.machines.directory(&place.id);
        let known = self.running().get(&place.id).map(|machine| machine.state());
        let state = match known {
            Some(state) => state,
            None => State::new(
                MachineRecord::load(&home)
                    .ok_or_else(|| SandboxError::Lost("the record of its machine is lost".into()))?,
            ),
        };
        let door = Arc::new(Door::of(&place.directory));
        let (control, events) = Control::connect(door.vmm().await.map_err(gone)?)?;
        let streams = Arc::clone(&door);
        let (agent, agent_events) = Agent::connect_apart(door.agent().await.map_err(gone)?, streams)?;
        let agent = Arc::new(agent);
        let scratch = Scratch::of(&home, self.machines.templates());
        let parts = Parts {
            id: place.id.clone(),
            state,
            home,
            directory: place.directory.clone(),
            cgroup_parent: place.cgroup_parent.clone(),
            control,
            door,
            agent: Arc::clone(&agent),
            scratch,
        };
        let machine = Machine::new(parts);
        // Asked only now, so that nothing that it tells meanwhile is missed.
        let status = machine.status().await?;
        self.add(&machine);
        watch::start(self, &machine, place.clone(), events);
        if machine.with_record(|record| record.volumes_served) && !status.volumes_served {
            // It went while no hulld listened: what the guest has open of it is lost.
            watch::end(self, &machine, place, "hull-virtiofsd has gone").await;
            return Err(SandboxError::Lost("the server of its volumes is gone".into()));
        }
        let (follower, followed) = (self.follower.clone(), Arc::clone(&machine));
        tokio::spawn(async move { follower.catch_up(&followed).await });
        Ok((agent, agent_events))
    }

    async fn forget(&self, place: &Place, container: &str) -> Result<(), SandboxError> {
        // What a machine had is gone with it.
        let Ok(machine) = self.machine(place) else { return Ok(()) };
        let (container, runtime) = (container.to_owned(), tokio::runtime::Handle::current());
        blocking(move || machine.forget(&container, &runtime)).await
    }

    /// Brings back what kubelet wants to read once a container has ended.
    async fn read_back(&self, place: &Place, container: &str) -> Result<(), SandboxError> {
        let machine = self.machine(place)?;
        let volumes: Vec<_> = machine.with_record(|record| {
            let wanted = |one: &&record::Volume| one.container == container && !one.read_back.is_empty();
            record.volumes.iter().filter(wanted).cloned().collect()
        });
        for volume in volumes {
            let call = messages::ReadVolume { id: volume.id, path: volume.read_back, limit: MESSAGE };
            let call = request::Call::ReadVolume(call);
            let answer =
                machine.agent.call_within(READ_BACK, "read a volume", call, Slots::default()).await?;
            let messages::response::Outcome::VolumeContent(read) = answer else {
                return Err(SandboxError::Unexpected("the reading of a volume"));
            };
            let path = PathBuf::from(volume.host_path);
            // It was asked for no more, but a guest says what it likes.
            let content = read.content.get(..MESSAGE as usize).unwrap_or(&read.content).to_vec();
            blocking(move || {
                // kubelet made the file; nobody else can write where it is.
                let written = fs::OpenOptions::new().write(true).truncate(true).open(&path);
                let written = written.and_then(|mut file| io::Write::write_all(&mut file, &content));
                written.map_err(SandboxError::host("write the termination message to", &path))
            })
            .await?;
        }
        Ok(())
    }

    fn clear(&self, place: &Place) -> Result<(), SandboxError> {
        let machine = self.running().remove(&place.id);
        self.exporter.forget(&place.id);
        // A machine that ends by itself writes its containers' last words first.
        if machine.as_ref().is_some_and(|machine| !machine.agent.is_connected()) {
            self.cgroups.wait_for_end(place, LAST_WORDS);
        }
        self.cgroups.clear(place)?;
        drop(machine);
        let home = self.machines.directory(&place.id);
        let record = MachineRecord::load(&home);
        match fs::remove_dir_all(&home) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(SandboxError::host("remove", home)(error));
            }
            _ => {}
        }
        if let Some(record) = record {
            self.ids.give_back(record.uid_base, &place.id);
        }
        Ok(())
    }

    /// Of a machine whose pod nobody knows: whatever of it still runs, and its disk.
    fn clear_unknown(&self, id: &str) -> Result<(), SandboxError> {
        let home = self.machines.directory(id);
        let record = MachineRecord::load(&home);
        match record.as_ref().and_then(|record| record.place(Path::new(""))) {
            Some(place) => self.clear(&place),
            // Without a record nothing was ever started.
            None => {
                fs::remove_dir_all(&home).map_err(SandboxError::host("remove", home))?;
                if let Some(record) = record {
                    self.ids.give_back(record.uid_base, id);
                }
                Ok(())
            }
        }
    }
}

fn unavailable(reason: &str) -> SandboxError {
    SandboxError::Unsupported(format!("machines cannot be run on this node: {reason}"))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(SandboxError::Source(format!("an operation broke off: {error}"))))
}

impl MicrovmLauncher {
    /// The machines of `root`; `systemd`: slices are its. Begins to find out whether there can be any. Must be called inside the runtime.
    pub fn new(
        config: MachineConfig,
        root: &Path,
        ids: Arc<IdRanges>,
        images: Arc<ImageStore>,
        layout: &messages::CgroupLayout,
        systemd: Option<Arc<Systemd>>,
    ) -> Result<Self, SandboxError> {
        let machines =
            Machines::open(root).map_err(SandboxError::host("make the directory of machines in", root))?;
        for id in machines.ids() {
            if let Some(record) = MachineRecord::load(&machines.directory(&id)) {
                ids.hold(record.uid_base, &id);
            }
        }
        let hierarchies = Hierarchies::open(layout).map_err(|error| SandboxError::Cgroup {
            action: "open the hierarchies of",
            reason: error.to_string(),
        })?;
        let cgroups = Cgroups::new(hierarchies, systemd);
        let availability = Availability::find_out(&config);
        Ok(Self(Arc::new(Inner {
            availability,
            machines,
            ids,
            node: size::Node::look(),
            images,
            exporter: Exporter::new(Arc::clone(&cgroups)),
            cgroups,
            follower: Follower::start(),
            running: Mutex::default(),
            config,
        })))
    }
}

pub use self::ids::IdRanges as UserIds;

impl fmt::Debug for MicrovmLauncher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MicrovmLauncher").field("config", &self.0.config).finish_non_exhaustive()
    }
}

impl Launcher for MicrovmLauncher {
    fn name(&self) -> &'static str {
        "microvm"
    }

    fn has_own_kernel(&self) -> bool {
        true
    }

    fn problem(&self) -> Option<String> {
        self.0.availability.now().err()
    }

    fn admit<'a>(&'a self, config: &'a PodSandboxConfig) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async move {
            if let Some(reason) = refuse::pod(config) {
                return Err(SandboxError::Unsupported(reason));
            }
            self.0.availability.settled().await.map(drop).map_err(|reason| unavailable(&reason))
        })
    }

    fn admit_container(&self, config: &ContainerConfig) -> Result<(), SandboxError> {
        refuse::container(config).map_or(Ok(()), |reason| Err(SandboxError::Unsupported(reason)))
    }

    fn begin(&self, place: &Place, config: &PodSandboxConfig) -> Result<Box<dyn Nascent>, SandboxError> {
        Ok(Box::new(birth::begin(&self.0, place, config)?))
    }

    fn reconnect<'a>(
        &'a self,
        place: &'a Place,
    ) -> BoxFuture<'a, Result<(Arc<Agent>, Events), SandboxError>> {
        Box::pin(self.0.reconnect(place))
    }

    fn open(
        &self,
        place: &Place,
        start: &mut messages::StartContainer,
        sources: &[Source],
        _is_over: &dyn Fn() -> bool,
    ) -> Result<Slots, SandboxError> {
        let container = start.id.clone();
        let pour = Pour {
            machine: &self.0.machine(place)?,
            config: &self.0.config,
            images: &self.0.images,
            follower: &self.0.follower,
            exporter: &self.0.exporter,
            program: &self.0.artifacts()?.virtiofsd,
            container: &container,
            runtime: tokio::runtime::Handle::current(),
        };
        pour.all(start, sources)
    }

    fn reopen_log<'a>(
        &'a self,
        place: &'a Place,
        _agent: &'a Agent,
        container: &'a str,
        log: LogPlace,
    ) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async move {
            let machine = self.0.machine(place)?;
            let file = blocking(move || open_log(&log)).await?;
            machine.set_log(container, file).await
        })
    }

    fn ended<'a>(&'a self, place: &'a Place, container: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            match tokio::time::timeout(READ_BACK, self.0.read_back(place, container)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(container, %error, "a container's termination message is lost");
                }
                Err(_) => tracing::warn!(container, "a container's termination message was not read in time"),
            }
        })
    }

    fn archive<'a>(
        &'a self,
        place: &'a Place,
        container: &'a str,
        pause: bool,
        to: OwnedFd,
    ) -> BoxFuture<'a, Result<messages::Archived, SandboxError>> {
        Box::pin(async move {
            let gone = |_| SandboxError::Unsupported("its files have gone with the pod's machine".into());
            let machine = self.0.machine(place).map_err(gone)?;
            let mut slots = Slots::default();
            let call =
                messages::Archive { container_id: container.to_owned(), slot: slots.output(to), pause };
            match machine.agent.call(request::Call::Archive(call), slots).await? {
                messages::response::Outcome::Archived(archived) => Ok(archived),
                _ => Err(SandboxError::Unexpected("the archive of a container")),
            }
        })
    }

    fn forget<'a>(&'a self, place: &'a Place, container: &'a str) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(self.0.forget(place, container))
    }

    fn dial<'a>(
        &'a self,
        place: &'a Place,
        _network_namespace: Option<PathBuf>,
        port: u16,
    ) -> BoxFuture<'a, io::Result<Connection>> {
        Box::pin(async move {
            let machine = self.0.machine(place).map_err(io::Error::other)?;
            let (kind, connection) = machine.door.dial().await?;
            let mut slots = Slots::default();
            let call = messages::Dial { port: port.into(), slot: slots.named(kind) };
            let dialled = machine.agent.order("connect to a port", request::Call::Dial(call), slots).await;
            dialled.map_err(io::Error::other)?;
            Ok(connection)
        })
    }

    fn measure(&self, place: &Place, subject: Subject) -> BoxFuture<'static, Result<PodUsage, SandboxError>> {
        let (machine, cgroups) = (self.0.machine(place), Arc::clone(&self.0.cgroups));
        let place = place.clone();
        Box::pin(async move { measure::measure(machine?, cgroups, place, subject).await })
    }

    fn scratch(&self, place: &Place, container: &str) -> Occupied {
        let mut all = Occupied { complete: true, ..Occupied::default() };
        let Ok(machine) = self.0.machine(place) else { return all };
        let ranges: Vec<_> = machine.with_record(|record| {
            record.ranges.iter().filter(|one| one.container == container).cloned().collect()
        });
        for range in ranges {
            match machine.scratch.occupied(range.offset, range.length) {
                Ok(occupied) => all = all.and(occupied),
                Err(error) => tracing::debug!(container, %error, "cannot look at the scratch disk"),
            }
        }
        all
    }

    fn obituary(&self, place: &Place) -> Obituary {
        let told = self.0.machine(place).ok().and_then(|machine| machine.cause());
        let kills = self.0.cgroups.oom_kills(place);
        obituary::write(kills, told, &place.directory)
    }

    fn resize<'a>(
        &'a self,
        place: &'a Place,
        _agent: Arc<Agent>,
        limits: &'a PodLimits,
    ) -> BoxFuture<'a, Result<(), SandboxError>> {
        Box::pin(async move {
            let machine = self.0.machine(place)?;
            let born = machine.with_record(|record| size::Size {
                vcpus: record.vcpus,
                memory: record.memory,
                memory_max: record.memory_max,
            });
            let after = size::after(limits, born, place.cgroup_levels > 0, &self.0.config);
            if let Some(memory) = after.memory {
                let call = vmm_request::Call::ResizeMemory(vmm::ResizeMemory { memory });
                machine.control.order("resize the memory of", call, Vec::new()).await?;
            }
            if let Some(cpus) = after.vcpus {
                machine.tell("resize", request::Call::Resize(messages::Resize { cpus })).await?;
            }
            let (cgroups, place) = (Arc::clone(&self.0.cgroups), place.clone());
            blocking(move || cgroups.limit(&place, &after.cgroup)).await
        })
    }

    fn clear(&self, place: &Place, _leaves: &[String]) -> Result<(), SandboxError> {
        self.0.clear(place)
    }

    fn remembers(&self, id: &str, directory: &Path) -> Option<Place> {
        MachineRecord::load(&self.0.machines.directory(id))?.place(directory)
    }

    fn sweep(&self, pods: &BTreeSet<String>) {
        for id in self.0.machines.ids().iter().filter(|id| !pods.contains(*id)) {
            match self.0.clear_unknown(id) {
                Ok(()) => tracing::warn!(pod = id, "a machine without a pod is removed"),
                Err(error) => tracing::warn!(pod = id, %error, "cannot remove a machine without a pod"),
            }
        }
    }
}
