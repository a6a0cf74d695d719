//! Host paths in a machine: one hull-virtiofsd for a pod, started when the first is asked for. Each path is a mount of
//! its own below /volumes in that process's mount namespace, and nothing else is there.

use std::fs::File;
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
use super::logs::{VIRTIOFSD as LOG, tail};
use super::machine::{Machine, unexpected};
use super::process::Process;
use super::record::{MachineRecord, Volume};
use crate::sandbox::reach::reach;
use crate::sandbox::{Place, SandboxError};

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
        // One that the VMM never took ended with the hulld that had started it.
        if !machine.with_record(|record| record.volumes_served) {
            self.start(machine, program).await?;
        }
        let (record, volume) = (machine.with_record(Clone::clone), volume.clone());
        let attaching = tokio::task::spawn_blocking(move || attach(&record, &volume, &place));
        attaching.await.map_err(|error| SandboxError::Source(error.to_string()))?
    }

    async fn start(&self, machine: &Arc<Machine>, program: &Path) -> Result<(), SandboxError> {
        let control = self.launch(machine, program).await?;
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        servers.retain(|(id, _)| *id != machine.id);
        servers.push((machine.id.clone(), Arc::new(control)));
        Ok(())
    }

    async fn launch(&self, machine: &Arc<Machine>, program: &Path) -> Result<Control, SandboxError> {
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
        let started = Process::find(pid).and_then(|process| process.started()).map_err(failed)?;
        machine.change(|record| (record.virtiofsd_pid, record.virtiofsd_started) = (pid, started))?;
        let serve = request::Call::ServeVolumes(vmm::ServeVolumes { server: 0 });
        machine.control.order("serve volumes to", serve, vec![to_server.into()]).await?;
        machine.change(|record| record.volumes_served = true)?;
        Ok(control)
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
fn attach(record: &MachineRecord, volume: &Volume, place: &OwnedFd) -> Result<(), SandboxError> {
    let failed = |error: &dyn std::fmt::Display| {
        SandboxError::Source(format!("cannot share a host path with the pod's machine: {error}"))
    };
    let vmm = Process::of(record.vmm_pid, record.vmm_started)
        .map_err(|error| failed(&format_args!("its VMM is gone: {error}")))?;
    server(record, &vmm)
        .map_err(|error| failed(&format_args!("the server of its volumes is gone: {error}")))?
        .attach(volume.index, Path::new(&volume.host_path), place.as_fd(), volume.readonly)
        .map(drop)
        .map_err(|error| failed(&error))
}

/// The machine's hull-virtiofsd. Its number may be somebody else's by now, in whose mounts nothing must be changed.
fn server(record: &MachineRecord, vmm: &Process) -> io::Result<Server> {
    let process = Process::of(record.virtiofsd_pid, record.virtiofsd_started)?;
    let server = Server::at(process.as_fd())?.reaching_by(reach);
    // Nobody else lives in the pod's user namespace, and the pod not in hulld's.
    let hulld = Process::find(std::process::id().cast_signed())?;
    if server.shares_users_with(vmm.as_fd())? && !server.shares_users_with(hulld.as_fd())? {
        return Ok(server);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "another process has its number"))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn child(program: &str, arguments: &[&str]) -> (Child, i32, u64) {
        let child = Command::new(program).args(arguments).spawn().unwrap();
        let pid = child.id().cast_signed();
        let started = Process::find(pid).unwrap().started().unwrap();
        (child, pid, started)
    }

    #[test]
    fn a_volume_is_never_attached_to_a_process_that_only_has_the_number() {
        // Two of the host's own processes, as those that came after VMM and server would be.
        let (mut first, vmm_pid, vmm_started) = child("sleep", &["100"]);
        let (mut second, virtiofsd_pid, virtiofsd_started) = child("sleep", &["100"]);
        let record =
            MachineRecord { vmm_pid, vmm_started, virtiofsd_pid, virtiofsd_started, ..Default::default() };
        let place = File::open("/tmp").unwrap().into();
        let refused = |record: &MachineRecord, why: &str| {
            let error = attach(record, &Volume::default(), &place).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&record, "another process has its number");
        refused(&MachineRecord { virtiofsd_started: 1, ..record.clone() }, "server of its volumes is gone");
        refused(&MachineRecord { vmm_started: 1, ..record }, "its VMM is gone");
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
