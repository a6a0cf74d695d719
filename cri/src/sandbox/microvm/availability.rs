//! Whether machines can be run here, found out once, in the background, in bounded time.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::artifacts::Artifacts;
use crate::config::MachineConfig;

/// How long a request waits for the answer when hulld has only just started.
const PATIENCE: Duration = Duration::from_secs(20);

/// The answer: what machines are made of, or why there can be none.
type Answer = Result<Arc<Artifacts>, String>;

/// Whether machines can be run.
#[derive(Clone, Debug)]
pub(super) struct Availability(watch::Receiver<Option<Answer>>);

impl Availability {
    /// Begins to find out. Must be called inside the runtime.
    pub(super) fn find_out(config: &MachineConfig) -> Self {
        let (sender, receiver) = watch::channel(None);
        let config = config.clone();
        tokio::task::spawn_blocking(move || {
            let answer = look(&config);
            match &answer {
                Ok(_) => tracing::debug!("machines can be run"),
                Err(reason) => tracing::info!(reason, "machines cannot be run"),
            }
            // Nobody waits any more: hulld ends.
            let _ = sender.send(Some(answer));
        });
        Self(receiver)
    }

    /// The answer as far as it is known.
    pub(super) fn now(&self) -> Answer {
        let known = self.0.borrow().clone();
        known.unwrap_or_else(|| Err("whether KVM can run a machine is still being found out".into()))
    }

    /// Waits for the answer, not for long.
    pub(super) async fn settled(&self) -> Answer {
        let mut receiver = self.0.clone();
        // What it is told by then, whatever the reason.
        let _ = tokio::time::timeout(PATIENCE, receiver.wait_for(Option::is_some)).await;
        self.now()
    }
}

/// Everything that a machine needs, one after the other. Blocks, for some seconds at most.
fn look(config: &MachineConfig) -> Answer {
    let artifacts = Artifacts::find(config)?;
    find_mke2fs()?;
    let kvm = hull_vmm::probe::open().map_err(|reason| reason.to_string())?;
    hull_vmm::probe::probe(kvm.as_fd(), hull_vmm::probe::LIMIT).map_err(|reason| reason.to_string())?;
    Ok(Arc::new(artifacts))
}

/// mke2fs, where package e2fsprogs puts it.
pub(super) fn find_mke2fs() -> Result<(), String> {
    let directories = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    if directories.iter().any(|directory| std::path::Path::new(directory).join("mke2fs").is_file()) {
        return Ok(());
    }
    Err("there is no mke2fs: install e2fsprogs".into())
}
