//! One pod's machine while it runs, as hulld holds it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_agent::protocol::messages::{self as agent, request as agent_request};
use hull_vmm::protocol::messages::{self as vmm, request as vmm_request, response as vmm_response};
use tokio_util::sync::CancellationToken;

use super::control::Control;
use super::door::Door;
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
    record: Mutex<MachineRecord>,
    /// Held by whoever changes what the machine has: disks, volumes, slots. Such work blocks, on threads that may.
    pub(super) order: Mutex<()>,
    pub(super) control: Control,
    pub(super) door: Arc<Door>,
    pub(super) agent: Arc<Agent>,
    pub(super) scratch: Scratch,
    /// Held by whoever copies a volume into it: generations arrive in the order in which they were read.
    pub(super) writing: tokio::sync::Mutex<()>,
    /// oom_score_adj of its containers, as far as this hulld started them.
    scores: Mutex<BTreeMap<String, i32>>,
    /// Why it ended, or is being ended, if anybody said so. What came first counts.
    cause: Mutex<Option<Obituary>>,
    /// Ends with the machine: its watch, its followers.
    pub(super) over: CancellationToken,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

/// What a machine is made of.
pub(super) struct Parts {
    pub(super) record: MachineRecord,
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
        let Parts { record, home, directory, cgroup_parent, control, door, agent, scratch } = parts;
        Arc::new(Self {
            id: record.id.clone(),
            home,
            directory,
            cgroup_parent,
            record: Mutex::new(record),
            order: Mutex::new(()),
            control,
            door,
            agent,
            scratch,
            writing: tokio::sync::Mutex::new(()),
            scores: Mutex::default(),
            cause: Mutex::new(None),
            over: CancellationToken::new(),
        })
    }

    fn locked(&self) -> MutexGuard<'_, MachineRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut scores = self.scores.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut scores);
        let Some(score) = scores.values().min() else { return };
        let path = format!("/proc/{}/oom_score_adj", self.with_record(|record| record.vmm_pid));
        if let Err(error) = std::fs::write(path, score.to_string()) {
            tracing::debug!(pod = self.id, score, %error, "cannot set how the kernel spares a VMM");
        }
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

/// The end of a text file, or nothing.
pub(super) fn tail(path: &Path, length: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(length)..]).trim().to_owned()
}
