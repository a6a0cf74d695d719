//! The namespaces of a pod with a user namespace, made by a short-lived process: hulld has threads, and no process with
//! threads can enter a user namespace.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use hull_agent::protocol::messages;
use hull_agent::sandbox::{IdMap, PodNamespaces, user_namespace};

use super::{SandboxError, Slots};

/// Far more than a few namespaces take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes them with the agent's own program.
pub(super) async fn make(program: &Path, uids: IdMap, gids: IdMap) -> Result<PodNamespaces, SandboxError> {
    let spawn = |source| SandboxError::Spawn { program: program.to_owned(), source };
    let (ours, theirs) = UnixStream::pair().map_err(spawn)?;
    let mut child = tokio::process::Command::new(program)
        .args([user_namespace::COMMAND, &uids.argument(), &gids.argument()])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_clear()
        .current_dir("/")
        .kill_on_drop(true)
        .spawn()
        .map_err(spawn)?;
    ours.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let received = tokio::task::spawn_blocking(move || PodNamespaces::receive(ours.as_fd())).await;
    // It ends with its answer.
    let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
    let namespaces = received.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)?;
    match ended {
        Ok(Ok(_)) => Ok(namespaces),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(SandboxError::Silent("make the pod's user namespace")),
    }
}

fn failed(error: io::Error) -> SandboxError {
    SandboxError::Source(format!(
        "cannot make the pod's user namespace: {error} (does the kernel allow user namespaces, and hulld these ids?)"
    ))
}

/// Hands them to a new agent; the network namespace goes its own way.
pub(super) fn give(
    namespaces: &PodNamespaces,
    request: &mut messages::CreateSandbox,
    slots: &mut Slots,
) -> Result<(), SandboxError> {
    let places = [
        (&namespaces.user, &mut request.user_namespace),
        (&namespaces.ipc, &mut request.ipc_namespace),
        (&namespaces.uts, &mut request.uts_namespace),
    ];
    for (namespace, slot) in places {
        *slot = Some(slots.descriptor(namespace.try_clone().map_err(failed)?));
    }
    Ok(())
}
