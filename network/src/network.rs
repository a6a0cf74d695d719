use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;

use crate::{Attachment, NetworkConfig, NetworkError, PodNetwork};

/// The network of all pods of one daemon.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
}

impl Network {
    /// Loads the records and looks at what a former daemon left; changes nothing outside its own directories. Must be
    /// called inside a tokio runtime.
    pub async fn open(config: NetworkConfig) -> Result<Arc<Self>, NetworkError> {
        Ok(Arc::new(Self { config }))
    }

    /// Where the namespace of the pod with this id is, or will be, pinned.
    pub fn namespace_path(&self, id: &str) -> PathBuf {
        self.config.netns_dir.join(format!("hull-{id}"))
    }

    /// Makes and pins the pod's namespace and attaches it. On an error everything is undone. A repeated call for a pod
    /// that is attached returns the same attachment. Runs to its end even if the caller stops waiting.
    pub async fn set_up(&self, pod: &PodNetwork) -> Result<Attachment, NetworkError> {
        Err(NetworkError::NotReady(pod.id.clone()))
    }

    /// Detaches the pod and removes its namespace. Idempotent; needs neither the namespace nor a living boot, only the
    /// id and the records. The pod's processes must have ended, or the namespace lives on without its pin until they do.
    pub async fn tear_down(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        Err(NetworkError::NotReady(pod.id.clone()))
    }

    /// Checks that the pod is still attached as it was recorded (CNI: CHECK).
    pub async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        Err(NetworkError::NotReady(pod.id.clone()))
    }

    /// Whether a pod could be attached now; the error is a sentence for NetworkReady=false. Cheap: reads the CNI
    /// directory at most, plugins' STATUS is asked in the background.
    pub fn ready(&self) -> Result<(), String> {
        Err("the network is starting".into())
    }

    /// The ranges that kubelet assigned to the node (UpdateRuntimeConfig). The built-in network gives new pods
    /// addresses from them and remembers them across restarts; CNI plugins get them as capability `ipRanges`. Empty: no
    /// change.
    pub async fn set_pod_cidrs(&self, cidrs: &[IpNet]) -> Result<(), NetworkError> {
        Err(NetworkError::Config(format!("{cidrs:?}")))
    }

    /// Takes back what belongs to pods that are not in `live` (ids): namespaces, links, addresses, rules, CNI
    /// attachments. For the start of the daemon and from time to time; pods that are being set up now are spared.
    pub async fn collect(&self, live: &BTreeSet<String>) -> Result<(), NetworkError> {
        Err(NetworkError::Config(format!("{live:?}")))
    }

    /// Waits until what is removed in the background is gone, and removes the bridge and the rules if no pod is left.
    /// For a graceful end of the daemon; the next `set_up` makes them again.
    pub async fn release(&self) -> Result<(), NetworkError> {
        Ok(())
    }
}
