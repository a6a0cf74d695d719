use k8s_cri::v1 as cri;

use crate::daemon::Daemon;

/// The runtime handler of pods that say nothing else: HULL_TEST_RUNTIME, or none.
pub fn default_handler() -> String {
    std::env::var("HULL_TEST_RUNTIME").unwrap_or_default()
}

/// Whether pods are machines unless a test says otherwise.
pub fn by_default() -> bool {
    default_handler() == "microvm"
}

/// For tests of what is different for machines (docs/operating.md, "microVM pods"): true, with the reason printed, where
/// pods are machines.
pub fn excepted(reason: &str) -> bool {
    if by_default() {
        println!("not for machines: {reason}");
    }
    by_default()
}

/// Why containers ended whose agent was killed.
pub fn lost() -> &'static str {
    if by_default() { "VMMLost" } else { "AgentLost" }
}

/// Whether this machine can run machines. If not the reason is printed, and in the emulated machine, where it must be
/// possible, the test fails.
pub async fn available(daemon: &Daemon) -> bool {
    let Some(reason) = problem(daemon).await else { return true };
    assert!(std::env::var_os("HULL_IN_NODE").is_none(), "hack/node can run machines, but: {reason}");
    println!("not run here: {reason}");
    false
}

/// Why the daemon says that there can be no machines.
pub async fn problem(daemon: &Daemon) -> Option<String> {
    crate::eventually("KVM has been looked at", crate::patience(20), async || {
        let status = daemon.runtime().await.status(cri::StatusRequest::default()).await.unwrap().into_inner();
        let conditions = status.status.expect("a status").conditions;
        let ready = conditions.into_iter().find(|one| one.r#type == "RuntimeHandlerReady/microvm")?;
        match ready.status {
            true => Some(None),
            false if ready.message.contains("still being found out") => None,
            false => Some(Some(ready.message)),
        }
    })
    .await
}
