use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use tokio::sync::OwnedMutexGuard;

use crate::builtin::{Builtin, blocking, check_subnets, namespace_path};
use crate::cni::Cni;
use crate::ledger::{self, Kind, Ledger, Record, make_directory};
use crate::{Attachment, Mode, NetworkConfig, NetworkError, PodNetwork, namespace};

/// Linux' limit for the name of an interface, without the terminating zero.
const LONGEST_LINK_NAME: usize = 15;
const LONGEST_ID: usize = 128;
const BUILTIN: &str = "builtin";

/// The network of all pods of one daemon. Cheap to share: all state is inside.
#[derive(Debug)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: NetworkConfig,
    ledger: Arc<Ledger>,
    builtin: Arc<Builtin>,
    cni: Cni,
    /// One operation at a time for each pod.
    pods: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Network {
    /// Loads the records of a former daemon and goes on removing what it had begun to remove. Makes nothing on the host
    /// before the first pod. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A configuration that cannot be used, or a data directory that is not accessible or another daemon's.
    pub async fn open(config: NetworkConfig) -> Result<Arc<Self>, NetworkError> {
        check_name(&config.bridge)?;
        make_directory(&config.state)?;
        let ledger = Arc::new(Ledger::open(&config.data)?);
        let cidrs = load_pod_cidrs(&config);
        let configured = if config.subnets.is_empty() {
            NetworkConfig::default_subnets(&config.bridge)
        } else {
            config.subnets.clone()
        };
        let subnets = if check_subnets(&cidrs).is_ok() { cidrs.clone() } else { configured };
        let subnets = subnets.iter().map(IpNet::trunc).collect();
        let builtin = Builtin::open(&config, subnets, ledger.clone())?;
        let cni = Cni::new(&config, cidrs, ledger.clone());
        Ok(Arc::new(Self { inner: Arc::new(Inner { config, ledger, builtin, cni, pods: Mutex::default() }) }))
    }

    /// Where the namespace of the pod with this id is, or will be, pinned.
    pub fn namespace_path(&self, id: &str) -> PathBuf {
        namespace_path(&self.inner.config.netns_dir, id)
    }

    /// Whether the network still knows what it gave to the pod with this id.
    pub fn has_record(&self, id: &str) -> bool {
        self.inner.ledger.get(id).is_some_and(|record| !record.released)
    }

    /// Makes and pins the pod's namespace and attaches it. On an error everything is undone. A repeated call for a pod
    /// that is attached returns the same attachment. Runs to its end even if the caller stops waiting.
    pub async fn set_up(&self, pod: &PodNetwork) -> Result<Attachment, NetworkError> {
        self.set_up_in(pod, None).await
    }

    /// Like [`Network::set_up`], with a namespace that was made before: one that belongs to the pod's user namespace. It
    /// must be new.
    pub async fn set_up_in(
        &self,
        pod: &PodNetwork,
        namespace: Option<OwnedFd>,
    ) -> Result<Attachment, NetworkError> {
        check_id(&pod.id)?;
        let (inner, pod) = (self.inner.clone(), pod.clone());
        to_its_end(pod.id.clone(), async move { inner.set_up(&pod, namespace).await }).await
    }

    /// Detaches the pod and removes its namespace. Idempotent; needs neither the namespace nor the boot in which the pod
    /// lived, only the id and the records. The pod's processes should have ended: what still runs keeps the namespace,
    /// without a link.
    pub async fn tear_down(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        check_id(&pod.id)?;
        let (inner, id) = (self.inner.clone(), pod.id.clone());
        to_its_end(pod.id.clone(), async move { inner.tear_down(&id).await }).await
    }

    /// Checks that the pod is still attached as it was recorded (CNI: CHECK).
    pub async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        check_id(&pod.id)?;
        let (inner, id) = (self.inner.clone(), pod.id.clone());
        to_its_end(pod.id.clone(), async move { inner.check(&id).await }).await
    }

    /// Whether a pod could be attached now; the error is a sentence for NetworkReady=false. Cheap: reads the CNI
    /// directory at most; plugins' STATUS is asked in the background.
    pub fn ready(&self) -> Result<(), String> {
        match self.inner.config.mode {
            Mode::Builtin => Ok(()),
            Mode::Cni => self.inner.cni.ready(),
            Mode::Auto if self.inner.cni.is_configured() => self.inner.cni.ready(),
            Mode::Auto => Ok(()),
        }
    }

    /// Like [`Network::ready`], but where plugins have STATUS and their last answer is older than 5 s, waits for a new
    /// one (5 s for each plugin at most).
    pub async fn status(&self) -> Result<(), String> {
        match self.inner.config.mode {
            Mode::Builtin => Ok(()),
            Mode::Auto if !self.inner.cni.is_configured() => Ok(()),
            Mode::Auto | Mode::Cni => self.inner.cni.status().await,
        }
    }

    /// The ranges that kubelet assigned to the node (UpdateRuntimeConfig), kept across restarts. The built-in network
    /// gives new pods addresses from them; CNI plugins get them as capability `ipRanges`. Empty: no change.
    pub async fn set_pod_cidrs(&self, cidrs: &[IpNet]) -> Result<(), NetworkError> {
        let cidrs: Vec<IpNet> = cidrs.iter().map(IpNet::trunc).collect();
        if cidrs.is_empty() || cidrs == self.inner.cni.pod_cidrs() {
            return Ok(());
        }
        if self.inner.config.mode != Mode::Cni {
            self.inner.builtin.set_subnets(cidrs.clone()).await?;
        }
        let bytes = serde_json::to_vec(&cidrs).unwrap_or_default();
        ledger::replace(&pod_cidrs_path(&self.inner.config), &bytes)?;
        self.inner.cni.set_pod_cidrs(cidrs);
        Ok(())
    }

    /// Takes back what belongs to pods that are not in `live` (ids): namespaces, links, addresses, rules, CNI
    /// attachments. For the start of the daemon and from time to time; it also repairs the bridge and the rules if
    /// somebody removed them. Pods whose set-up is under way are spared only if they are in `live`.
    ///
    /// # Errors
    /// All that failed; everything is tried, and the next call tries it again.
    pub async fn collect(&self, live: &BTreeSet<String>) -> Result<(), NetworkError> {
        let (inner, live) = (self.inner.clone(), live.clone());
        to_its_end("(all)".into(), async move { inner.collect(live).await }).await
    }

    /// Waits until what is removed in the background is gone, and removes the bridge and the rules if no pod is left.
    /// For a graceful end of the daemon; the next `set_up` makes them again.
    pub async fn release(&self) -> Result<(), NetworkError> {
        self.inner.builtin.release().await
    }
}

impl Inner {
    async fn lock(&self, id: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            pods.retain(|_, lock| Arc::strong_count(lock) > 1);
            pods.entry(id.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }

    async fn set_up(&self, pod: &PodNetwork, given: Option<OwnedFd>) -> Result<Attachment, NetworkError> {
        let _turn = self.lock(&pod.id).await;
        if let Some(record) = self.ledger.get(&pod.id) {
            match self.recall(&record).await {
                // What is attached is another namespace than the one that was made now.
                Ok(_) if given.is_some() => {}
                Ok(attachment) => return Ok(attachment),
                Err(error) => tracing::info!(pod = pod.id, %error, "setting up a half-made network anew"),
            }
            self.undo(&pod.id, false).await?;
            self.builtin.reap().await?;
        }
        let attached = self.attach(pod, given).await;
        if let Err(error) = &attached
            && let Err(second) = self.undo(&pod.id, true).await
        {
            // The record stays, so collect() will try again.
            tracing::warn!(pod = pod.id, %error, %second, "a network that could not be set up is not undone yet");
        }
        attached
    }

    async fn attach(&self, pod: &PodNetwork, given: Option<OwnedFd>) -> Result<Attachment, NetworkError> {
        let namespace = namespace_path(&self.config.netns_dir, &pod.id);
        let use_cni = match self.config.mode {
            Mode::Builtin => false,
            Mode::Cni => true,
            Mode::Auto => self.cni.is_configured(),
        };
        if use_cni {
            let (network, addresses) = self.cni.attach(pod, namespace.clone(), given).await?;
            return Ok(Attachment { namespace, addresses, network });
        }
        let addresses = self.builtin.attach(pod, namespace.clone(), given).await?;
        Ok(Attachment { namespace, addresses, network: BUILTIN.into() })
    }

    async fn tear_down(&self, id: &str) -> Result<(), NetworkError> {
        let _turn = self.lock(id).await;
        self.undo(id, false).await
    }

    /// Undoes what the pod's record tells of; without a record only the pin can be there.
    async fn undo(&self, id: &str, even_if_plugins_fail: bool) -> Result<(), NetworkError> {
        let pin = namespace_path(&self.config.netns_dir, id);
        match self.ledger.get(id) {
            None => blocking(move || namespace::remove(&pin)).await,
            Some(record) if matches!(record.kind, Kind::Cni(_)) => {
                self.cni.detach(&record, pin, even_if_plugins_fail).await
            }
            Some(record) => {
                let builtin = self.builtin.clone();
                blocking(move || builtin.detach(record, &pin)).await
            }
        }
    }

    async fn check(&self, id: &str) -> Result<(), NetworkError> {
        let _turn = self.lock(id).await;
        let missing = || NetworkError::Invalid { pod: id.to_owned(), reason: "it is not attached".into() };
        let record = self.ledger.get(id).ok_or_else(missing)?;
        match record.kind {
            Kind::Cni(_) => self.cni.check(&record, &namespace_path(&self.config.netns_dir, id)).await,
            Kind::Builtin(_) => self.recall(&record).await.map(drop),
        }
    }

    /// The attachment of a pod that is attached as it was recorded.
    async fn recall(&self, record: &Record) -> Result<Attachment, NetworkError> {
        let namespace = namespace_path(&self.config.netns_dir, &record.id);
        if matches!(record.kind, Kind::Cni(_)) {
            let (network, addresses) = self.cni.recall(record, &namespace)?;
            return Ok(Attachment { namespace, addresses, network });
        }
        let (builtin, record, pin) = (self.builtin.clone(), record.clone(), namespace.clone());
        let addresses = blocking(move || builtin.check(&record, &pin)).await?;
        Ok(Attachment { namespace, addresses, network: BUILTIN.into() })
    }

    async fn collect(&self, live: BTreeSet<String>) -> Result<(), NetworkError> {
        let mut failures = Vec::new();
        for record in self.ledger.all() {
            if live.contains(&record.id) || record.released {
                continue;
            }
            tracing::info!(pod = record.id, "removing the network of an unknown pod");
            failures.extend(self.tear_down(&record.id).await.err());
        }
        failures.extend(self.builtin.collect(live).await.err());
        failures.extend(self.builtin.reap().await.err());
        failures.extend(self.cni.collect().await.err());
        NetworkError::all(failures)
    }
}

/// Runs an operation that must not stop half-way because its caller went away.
async fn to_its_end<T: Send + 'static>(
    pod: String,
    work: impl Future<Output = Result<T, NetworkError>> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(NetworkError::Interrupted { pod, reason: error.to_string() }))
}

fn check_id(id: &str) -> Result<(), NetworkError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if (1..=LONGEST_ID).contains(&id.len())
        && id.chars().all(allowed)
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        return Ok(());
    }
    Err(NetworkError::Invalid { pod: format!("{id:.80?}"), reason: "this cannot be a pod's id".into() })
}

fn check_name(bridge: &str) -> Result<(), NetworkError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if (1..=LONGEST_LINK_NAME).contains(&bridge.len())
        && bridge.starts_with(|c: char| c.is_ascii_alphabetic())
        && bridge.chars().all(allowed)
    {
        return Ok(());
    }
    Err(NetworkError::Config(format!(
        "{bridge:?} cannot name a bridge: a letter, then at most 14 letters, digits, dashes or underscores"
    )))
}

fn pod_cidrs_path(config: &NetworkConfig) -> PathBuf {
    config.data.join("pod-cidrs.json")
}

/// The ranges that kubelet gave last; what cannot be read was never given.
fn load_pod_cidrs(config: &NetworkConfig) -> Vec<IpNet> {
    fs::read(pod_cidrs_path(config))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}
