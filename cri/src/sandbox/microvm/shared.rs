//! Host paths in a machine: one hull-virtiofsd for a pod, started when the first is asked for. Each path is a mount of
//! its own below /volumes in that process's mount namespace, and nothing else is there.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use hull_vmm::attach::Server;
use hull_vmm::protocol::messages::{self as vmm, request, response};

use super::cgroup::Cgroups;
use super::control::Control;
use super::machine::{Machine, tail, unexpected};
use super::record::Volume;
use crate::sandbox::{Place, SandboxError};

/// What hull-virtiofsd writes to stderr.
const LOG: &str = "virtiofsd.log";
/// Most files that are open for one guest at a time.
const OPEN_FILES: u64 = 200_000;
/// It has little memory of its own.
const OOM_SCORE: i32 = 0;

/// Starts servers and gives them volumes.
#[derive(Debug)]
pub(super) struct Exporter {
    cgroups: Arc<Cgroups>,
    /// Machines whose server was started, or found, by this hulld; the connection is kept for as long as it lives.
    servers: Mutex<Vec<(String, Arc<Control>)>>,
}

impl Exporter {
    pub(super) fn new(cgroups: Arc<Cgroups>) -> Self {
        Self { cgroups, servers: Mutex::default() }
    }

    /// Makes the volume available under its number. One that is there already stays as it is. `program` is
    /// hull-virtiofsd.
    pub(super) async fn export(
        &self,
        machine: &Arc<Machine>,
        program: &Path,
        volume: &Volume,
        place: OwnedFd,
    ) -> Result<(), SandboxError> {
        let pid = match machine.with_record(|record| record.virtiofsd_pid) {
            0 => self.start(machine, program).await?,
            pid => pid,
        };
        let (vmm, volume) = (machine.with_record(|record| record.vmm_pid), volume.clone());
        let attaching = tokio::task::spawn_blocking(move || attach(vmm, pid, &volume, &place));
        attaching.await.map_err(|error| SandboxError::Source(error.to_string()))?
    }

    async fn start(&self, machine: &Arc<Machine>, program: &Path) -> Result<i32, SandboxError> {
        let (control, pid) = self.launch(machine, program).await?;
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        servers.retain(|(id, _)| *id != machine.id);
        servers.push((machine.id.clone(), Arc::new(control)));
        Ok(pid)
    }

    async fn launch(&self, machine: &Arc<Machine>, program: &Path) -> Result<(Control, i32), SandboxError> {
        let action = "start the server of volumes for";
        let failed = |error: io::Error| SandboxError::machine(action)(error);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let log = machine.directory.join(LOG);
        let stderr = File::options().append(true).create(true).mode(0o600).open(&log).map_err(failed)?;
        let mut child = tokio::process::Command::new(program)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(stderr)
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .spawn()
            .map_err(|source| SandboxError::Spawn { program: program.to_owned(), source })?;
        tokio::spawn(async move { child.wait().await });

        let vmm_pid = machine.with_record(|record| record.vmm_pid);
        let namespace = File::open(format!("/proc/{vmm_pid}/ns/user")).map_err(failed)?;
        let (to_vmm, to_server) = UnixStream::pair().map_err(failed)?;
        let place = machine.place();
        let cgroups = Arc::clone(&self.cgroups);
        let entering = tokio::task::spawn_blocking(move || cgroups.entry(&place));
        let entry = entering.await.map_err(|error| failed(io::Error::other(error)))??;

        let mut fds: Vec<OwnedFd> = vec![namespace.into(), to_vmm.into()];
        let jail = super::birth::jail(0, entry, OPEN_FILES + 4096, OOM_SCORE, &mut fds);
        let boot = vmm::BootVolumes { jail: Some(jail), user_namespace: 0, vmm: 1, open_files: OPEN_FILES };
        let (control, _events) = Control::connect(ours)?;
        let answer = control.call(action, request::Call::BootVolumes(boot), fds).await;
        let pid = match answer.map_err(|error| with_log(error, &log))? {
            response::Outcome::Booted(booted) => booted.pid,
            _ => return Err(unexpected(action)),
        };
        machine.change(|record| record.virtiofsd_pid = pid)?;
        let serve = request::Call::ServeVolumes(vmm::ServeVolumes { server: 0 });
        machine.control.order("serve volumes to", serve, vec![to_server.into()]).await?;
        Ok((control, pid))
    }

    /// The machine is gone, and its server with it.
    pub(super) fn forget(&self, id: &str) {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != id);
    }
}

fn with_log(error: SandboxError, log: &Path) -> SandboxError {
    match (error, tail(log, 1024)) {
        (error, said) if said.is_empty() => error,
        (error, said) => SandboxError::Machine {
            action: "start the server of volumes for",
            reason: format!("{error}; it wrote: {said}"),
        },
    }
}

/// Puts the path, reached as `place`, under its number into the server's mount namespace. Blocks.
fn attach(vmm: i32, server: i32, volume: &Volume, place: &OwnedFd) -> Result<(), SandboxError> {
    let failed = |error: &dyn std::fmt::Display| {
        SandboxError::Source(format!("cannot share a host path with the pod's machine: {error}"))
    };
    // A number may belong to somebody else by now; nobody else is in the pod's user namespace.
    let users = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/user"));
    if users(server).map_err(|error| failed(&error))? != users(vmm).map_err(|error| failed(&error))? {
        return Err(failed(&"the server of its volumes is gone"));
    }
    Server::of(server)
        .map_err(|error| failed(&error))?
        .attach(volume.index, Path::new(&volume.host_path), place.as_fd(), volume.readonly)
        .map(drop)
        .map_err(|error| failed(&error))
}

impl Machine {
    /// As far as its cgroup is concerned. The levels are not this caller's to remove.
    fn place(&self) -> Place {
        Place {
            id: self.id.clone(),
            directory: self.directory.clone(),
            cgroup_parent: self.cgroup_parent.clone(),
            cgroup_levels: 0,
        }
    }
}
