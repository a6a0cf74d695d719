//! One pod's machine while it runs, as hulld holds it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_agent::protocol::messages::{self as agent, request as agent_request};
use hull_vmm::protocol::messages::{self as vmm, request as vmm_request, response as vmm_response};
use tokio_util::sync::CancellationToken;

use super::control::Control;
use super::door::Door;
use super::process::Process;
use super::record::MachineRecord;
use super::scratch::Scratch;
use crate::sandbox::{Agent, Obituary, SandboxError, Slots};

/// The images disk's block size; what a layer's last block lacks reads as zeros.
const IMAGES_BLOCK: u64 = 4096;

/// A machine that was taken up, or just born.
#[derive(Debug)]
pub(super) struct Machine {
    /// The pod's id.
    pub(super) id: String,
    /// `ROOT/machines/ID`.
    pub(super) home: PathBuf,
    /// The pod's volatile directory.
    pub(super) directory: PathBuf,
    /// As in [`crate::sandbox::Place`].
    pub(super) cgroup_parent: String,
    state: Arc<State>,
    pub(super) control: Control,
    pub(super) door: Arc<Door>,
    pub(super) agent: Arc<Agent>,
    pub(super) scratch: Scratch,
    /// Why it ended, or is being ended, if anybody said so. What came first counts.
    cause: Mutex<Option<Obituary>>,
    /// Ends with the machine: its watch, its followers.
    pub(super) over: CancellationToken,
}

/// What is the same however often hulld connects to the machine anew: two with a record each would forget what the other
/// one wrote.
#[derive(Debug)]
pub(super) struct State {
    record: Mutex<MachineRecord>,
    /// Held by whoever changes what the machine has: disks, volumes, slots. Such work blocks, on threads that may.
    order: Mutex<()>,
    /// The generations of copied volumes that the machine has for certain, by the volume's id. Held by whoever copies
    /// one: generations arrive in the order in which they were read.
    written: tokio::sync::Mutex<BTreeMap<String, u64>>,
    /// oom_score_adj of its containers, as far as this hulld started them.
    scores: Mutex<BTreeMap<String, i32>>,
}

impl State {
    /// Of a machine that this hulld had nothing to do with yet.
    pub(super) fn new(record: MachineRecord) -> Arc<Self> {
        Arc::new(Self {
            record: Mutex::new(record),
            order: Mutex::default(),
            written: tokio::sync::Mutex::default(),
            scores: Mutex::default(),
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) id: String,
    pub(super) state: Arc<State>,
    pub(super) home: PathBuf,
    pub(super) directory: PathBuf,
    pub(super) cgroup_parent: String,
    pub(super) control: Control,
    pub(super) door: Arc<Door>,
    pub(super) agent: Arc<Agent>,
    pub(super) scratch: Scratch,
}

impl Machine {
    pub(super) fn new(parts: Parts) -> Arc<Self> {
        let Parts { id, state, home, directory, cgroup_parent, control, door, agent, scratch } = parts;
        Arc::new(Self {
            id,
            home,
            directory,
            cgroup_parent,
            state,
            control,
            door,
            agent,
            scratch,
            cause: Mutex::new(None),
            over: CancellationToken::new(),
        })
    }

    /// For another connection to the same machine.
    pub(super) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state)
    }

    fn locked(&self) -> MutexGuard<'_, MachineRecord> {
        self.state.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the record.
    pub(super) fn with_record<T>(&self, look: impl FnOnce(&MachineRecord) -> T) -> T {
        look(&self.locked())
    }

    /// Changes the record, on disk first.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut MachineRecord) -> T) -> Result<T, SandboxError> {
        let mut current = self.locked();
        let mut next = current.clone();
        let result = change(&mut next);
        next.store(&self.home).map_err(SandboxError::host("write the machine's record in", &self.home))?;
        *current = next;
        Ok(result)
    }

    /// The turn to change what the machine has.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.state.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn to copy a volume into the machine, with the generations that it has.
    pub(super) async fn written(&self) -> tokio::sync::MutexGuard<'_, BTreeMap<String, u64>> {
        self.state.written.lock().await
    }

    /// A container is (about to be) in it. All memory of the pod is the VMM's, so the kernel is told to spare the VMM as
    /// it would spare the pod's most important container.
    pub(super) fn started(&self, container: &str, oom_score_adj: i32) {
        self.change_scores(|scores| {
            scores.insert(container.to_owned(), oom_score_adj);
        });
    }

    /// A container is gone.
    pub(super) fn gone(&self, container: &str) {
        self.change_scores(|scores| {
            scores.remove(container);
        });
    }

    fn change_scores(&self, change: impl FnOnce(&mut BTreeMap<String, i32>)) {
        let mut scores = self.state.scores.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut scores);
        let Some(score) = scores.values().min() else { return };
        let set = self.vmm().and_then(|vmm| vmm.set_oom_score_adj(*score));
        if let Err(error) = set {
            tracing::debug!(pod = self.id, score, %error, "cannot set how the kernel spares a VMM");
        }
    }

    /// Its VMM, if it has not ended.
    pub(super) fn vmm(&self) -> io::Result<Process> {
        let (pid, started) = self.with_record(|record| (record.vmm_pid, record.vmm_started));
        Process::of(pid, started)
    }

    /// Notes why it ends.
    pub(super) fn blame(&self, cause: Obituary) {
        let mut known = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert(cause);
    }

    /// Why it ended, if anybody said so.
    pub(super) fn cause(&self) -> Option<Obituary> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For calls of the agent that are answered with `done`.
    pub(super) async fn tell(
        &self,
        what: &'static str,
        call: agent_request::Call,
    ) -> Result<(), SandboxError> {
        self.agent.order(what, call, Slots::default()).await
    }

    /// Maps a layer's file on the images disk and says where it is.
    pub(super) async fn map_layer(
        &self,
        key: &str,
        file: OwnedFd,
        length: u64,
    ) -> Result<agent::Range, SandboxError> {
        let call = vmm::AddExtent { key: key.to_owned(), length, file: 0 };
        let call = vmm_request::Call::AddExtent(call);
        match self.control.call("map an image's layer into", call, vec![file]).await? {
            vmm_response::Outcome::Extent(extent) => {
                let length = extent.length.next_multiple_of(IMAGES_BLOCK);
                Ok(agent::Range { offset: extent.offset, length })
            }
            _ => Err(unexpected("map an image's layer into")),
        }
    }

    /// Where a container's output goes from now on.
    pub(super) async fn set_log(&self, container: &str, file: OwnedFd) -> Result<(), SandboxError> {
        let call = vmm::SetLog { container_id: container.to_owned(), file: 0 };
        self.control.order("write the log of", vmm_request::Call::SetLog(call), vec![file]).await
    }

    /// What the VMM says of itself.
    pub(super) async fn status(&self) -> Result<vmm::Status, SandboxError> {
        let call = vmm_request::Call::Status(vmm::GetStatus {});
        match self.control.call("ask for the state of", call, Vec::new()).await? {
            vmm_response::Outcome::Status(status) => Ok(status),
            _ => Err(unexpected("ask for the state of")),
        }
    }
}

pub(super) fn unexpected(action: &'static str) -> SandboxError {
    SandboxError::Machine { action, reason: "its VMM gave an answer that does not fit".into() }
}
