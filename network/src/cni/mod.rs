//! Pod networks by CNI plugins: the runtime's side of the CNI specification, versions 0.3.1 to 1.1.0.

mod list;
mod plugin;
mod result;
mod status;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use serde_json::{Map, Value, json};
use tokio::sync::RwLock;

use self::list::NetworkList;
use self::plugin::{Invocation, PluginError};
use self::status::Status;
use crate::builtin::blocking;
use crate::ledger::{CniRecord, Kind, Ledger, Record};
use crate::netlink::{Batch, Socket};
use crate::{NetworkConfig, NetworkError, PodNetwork, namespace};

/// Name of a pod's interface (CRI runtimes all use this one).
const INTERFACE: &str = "eth0";
const LOOPBACK_INDEX: u32 = 1;

/// The CNI networks of one daemon.
#[derive(Clone, Debug)]
pub(crate) struct Cni(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    ledger: Arc<Ledger>,
    pod_cidrs: Mutex<Vec<IpNet>>,
    /// Held for writing by GC: no attachment may come or go meanwhile (specification, "GC").
    gate: RwLock<()>,
    status: Status,
}

impl Cni {
    pub(crate) fn new(config: &NetworkConfig, pod_cidrs: Vec<IpNet>, ledger: Arc<Ledger>) -> Self {
        Self(Arc::new(Inner {
            conf_dir: config.cni_conf_dir.clone(),
            bin_dirs: config.cni_bin_dirs.clone(),
            ledger,
            pod_cidrs: Mutex::new(pod_cidrs),
            gate: RwLock::default(),
            status: Status::default(),
        }))
    }

    /// Whether there is a configuration that loads.
    pub(crate) fn is_configured(&self) -> bool {
        self.load().is_ok()
    }

    fn load(&self) -> Result<NetworkList, String> {
        NetworkList::load_first(&self.0.conf_dir)
    }

    /// Whether a pod could be attached, with the plugins' own STATUS as it was asked last.
    pub(crate) fn ready(&self) -> Result<(), String> {
        let list = self.usable()?;
        if !list.version.has_status() {
            return Ok(());
        }
        let (known, is_fresh) = self.0.status.recall(&list);
        if !is_fresh && let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let this = self.clone();
            runtime.spawn(async move { this.ask_status(&list).await });
        }
        known.unwrap_or_else(|| Err("the CNI plugins are being asked for their STATUS".into()))
    }

    /// Like `ready`, but waits for the plugins' answer if the last one is old.
    pub(crate) async fn status(&self) -> Result<(), String> {
        let list = self.usable()?;
        if list.version.has_status() { self.ask_status(&list).await } else { Ok(()) }
    }

    /// The configuration, if all its plugins are installed.
    fn usable(&self) -> Result<NetworkList, String> {
        let list = self.load()?;
        for plugin in &list.plugins {
            plugin::find(&self.0.bin_dirs, &plugin.kind)?;
        }
        Ok(list)
    }

    async fn ask_status(&self, list: &NetworkList) -> Result<(), String> {
        let ask = async {
            for plugin in &list.plugins {
                let config = plugin.execution_config(list, &Map::new(), None);
                let call = Invocation::for_network("STATUS", &self.0.bin_dirs, &plugin.kind, &config);
                call.run()
                    .await
                    .map_err(|error| format!("CNI network {}: plugin {}: {error}", list.name, plugin.kind))?;
            }
            Ok(())
        };
        self.0.status.ask(list, ask).await
    }

    pub(crate) fn pod_cidrs(&self) -> Vec<IpNet> {
        self.0.pod_cidrs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_pod_cidrs(&self, cidrs: Vec<IpNet>) {
        *self.0.pod_cidrs.lock().unwrap_or_else(PoisonError::into_inner) = cidrs;
    }

    /// Gives the pod a namespace (this one, or a new one), pinned at `pin`, and runs ADD. On an error what was begun must be undone with
    /// `detach`.
    pub(crate) async fn attach(
        &self,
        pod: &PodNetwork,
        pin: PathBuf,
        given: Option<OwnedFd>,
    ) -> Result<(String, Vec<IpAddr>), NetworkError> {
        // A plugin that is not installed is found out before another one has done something that only DEL undoes.
        let list = self.usable().map_err(NetworkError::NotReady)?;
        let attachment = Attachment::new(pod, &pin)?;
        let _gate = self.0.gate.read().await;
        let directory = pin.parent().unwrap_or(Path::new("/")).to_owned();
        let mut record = self.0.ledger.reserve(&pod.id, |_| {
            Ok(Kind::Cni(Box::new(CniRecord {
                pod: pod.clone(),
                network: list.raw.clone(),
                pod_cidrs: self.pod_cidrs(),
                result: None,
            })))
        })?;
        blocking(move || namespace::prepare_directory(&directory)).await?;
        namespace::make(pin, given, || Ok(()), |(), _| set_loopback_up()).await?;
        let runtime = runtime_config(pod, &self.pod_cidrs());
        let mut result = None;
        for plugin in &list.plugins {
            let config = plugin.execution_config(&list, &runtime, result.as_ref());
            result =
                Some(self.invoke("ADD", &list, &plugin.kind, &attachment, &config).await?.ok_or_else(
                    || failure(&list.name, &plugin.kind, "ADD", "it printed no result".into()),
                )?);
        }
        let result = result.unwrap_or_default();
        let addresses = addresses(&list, &result)?;
        if let Kind::Cni(cni) = &mut record.kind {
            cni.result = Some(result);
        }
        self.0.ledger.update(&record)?;
        Ok((list.name, addresses))
    }

    /// What was recorded when the pod was attached, if that was completed and its namespace is there.
    pub(crate) fn recall(&self, record: &Record, pin: &Path) -> Result<(String, Vec<IpAddr>), NetworkError> {
        let (list, cni) = recorded_list(record)?;
        let incomplete =
            || NetworkError::Invalid { pod: record.id.clone(), reason: "ADD was not completed".into() };
        let result = cni.result.as_ref().ok_or_else(incomplete)?;
        namespace::open(pin)?;
        Ok((list.name.clone(), addresses(&list, result)?))
    }

    /// CHECK, where the version and the configuration have it.
    pub(crate) async fn check(&self, record: &Record, pin: &Path) -> Result<(), NetworkError> {
        self.recall(record, pin)?;
        let (list, cni) = recorded_list(record)?;
        if !list.version.has_check() || list.disable_check {
            return Ok(());
        }
        let attachment = Attachment::new(&cni.pod, pin)?;
        let runtime = runtime_config(&cni.pod, &cni.pod_cidrs);
        for plugin in &list.plugins {
            let config = plugin.execution_config(&list, &runtime, cni.result.as_ref());
            self.invoke("CHECK", &list, &plugin.kind, &attachment, &config).await?;
        }
        Ok(())
    }

    /// DEL, with the configuration and the result that were recorded, whether or not the namespace is still there;
    /// then the pin and the record are removed. If DEL fails the record stays, and so does the pin unless
    /// `even_if_it_fails`.
    pub(crate) async fn detach(
        &self,
        record: &Record,
        pin: PathBuf,
        even_if_it_fails: bool,
    ) -> Result<(), NetworkError> {
        let _gate = self.0.gate.read().await;
        let deleted = self.delete(record, &pin).await;
        if deleted.is_ok() || even_if_it_fails {
            blocking(move || namespace::remove(&pin)).await?;
        }
        deleted?;
        self.0.ledger.remove(&record.id)
    }

    /// Every plugin gets its DEL, whatever becomes of the others: each holds something else (an address, a rule).
    async fn delete(&self, record: &Record, pin: &Path) -> Result<(), NetworkError> {
        let (list, cni) = recorded_list(record)?;
        let mut attachment = Attachment::new(&cni.pod, pin)?;
        if namespace::open(pin).is_err() {
            attachment.namespace = PathBuf::new();
        }
        let runtime = runtime_config(&cni.pod, &cni.pod_cidrs);
        let previous = cni.result.as_ref().filter(|_| list.version.has_check());
        let mut failures = Vec::new();
        for plugin in list.plugins.iter().rev() {
            let config = plugin.execution_config(&list, &runtime, previous);
            let deleted = self.invoke("DEL", &list, &plugin.kind, &attachment, &config).await;
            failures.extend(deleted.err());
        }
        NetworkError::all(failures)
    }

    /// GC, where the version and the configuration have it: plugins drop what belongs to no recorded pod.
    pub(crate) async fn collect(&self) -> Result<(), NetworkError> {
        let Ok(list) = self.load() else { return Ok(()) };
        if !list.version.has_status() || list.disable_gc {
            return Ok(());
        }
        let _gate = self.0.gate.write().await;
        let of_list = |record: &Record| match &record.kind {
            Kind::Cni(cni) => cni.network.get("name").and_then(Value::as_str) == Some(&list.name),
            Kind::Builtin(_) => false,
        };
        let valid: Vec<Value> = self
            .0
            .ledger
            .all()
            .iter()
            .filter(|record| of_list(record))
            .map(|record| json!({ "containerID": record.id, "ifname": INTERFACE }))
            .collect();
        let mut outcome = Ok(());
        for plugin in &list.plugins {
            let mut config = plugin.execution_config(&list, &Map::new(), None);
            config.insert("cni.dev/valid-attachments".into(), valid.clone().into());
            let call = Invocation::for_network("GC", &self.0.bin_dirs, &plugin.kind, &config);
            let done =
                call.run().await.map_err(|error| failure(&list.name, &plugin.kind, "GC", error.to_string()));
            outcome = outcome.and(done.map(drop));
        }
        outcome
    }

    /// Runs one plugin for one pod; `None` if it printed nothing.
    async fn invoke(
        &self,
        command: &'static str,
        list: &NetworkList,
        plugin: &str,
        attachment: &Attachment,
        config: &Map<String, Value>,
    ) -> Result<Option<Value>, NetworkError> {
        let wrong = |error: PluginError| failure(&list.name, plugin, command, error.to_string());
        let mut call = Invocation::for_network(command, &self.0.bin_dirs, plugin, config);
        call.environment("CNI_CONTAINERID", &attachment.id);
        call.environment("CNI_NETNS", &attachment.namespace);
        call.environment("CNI_IFNAME", INTERFACE);
        call.environment("CNI_ARGS", &attachment.arguments);
        let output = call.run().await.map_err(wrong)?;
        if output.is_empty() || command != "ADD" {
            return Ok(None);
        }
        let result: Value = serde_json::from_slice(&output).map_err(|error| {
            failure(&list.name, plugin, command, format!("its result is no JSON: {error}"))
        })?;
        Ok(Some(result).filter(Value::is_object))
    }
}

/// What identifies a pod to plugins.
struct Attachment {
    id: String,
    namespace: PathBuf,
    arguments: String,
}

impl Attachment {
    fn new(pod: &PodNetwork, pin: &Path) -> Result<Self, NetworkError> {
        let mut arguments = String::from("IgnoreUnknown=1");
        for (key, value) in [
            ("K8S_POD_NAMESPACE", &pod.namespace),
            ("K8S_POD_NAME", &pod.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &pod.id),
            ("K8S_POD_UID", &pod.uid),
        ] {
            // The format has no quoting: such a value would add arguments of its own.
            if value.contains([';', '=']) || value.chars().any(char::is_control) {
                let reason = format!("{key} {value:?} cannot be passed to CNI plugins");
                return Err(NetworkError::Invalid { pod: pod.id.clone(), reason });
            }
            arguments.push_str(&format!(";{key}={value}"));
        }
        Ok(Self { id: pod.id.clone(), namespace: pin.to_owned(), arguments })
    }
}

fn set_loopback_up() -> Result<(), NetworkError> {
    let mut batch = Batch::new();
    batch.set_up(LOOPBACK_INDEX, "loopback");
    Ok(Socket::route()?.execute(&batch)?)
}

/// All capability arguments that this runtime has for a pod; each plugin gets those that it declares
/// (CNI's CONVENTIONS.md).
fn runtime_config(pod: &PodNetwork, pod_cidrs: &[IpNet]) -> Map<String, Value> {
    let mut all = Map::new();
    let ports: Vec<Value> = pod
        .port_mappings
        .iter()
        .filter(|mapping| mapping.host_port != 0)
        .map(|mapping| {
            let mut entry = json!({
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": mapping.protocol,
            });
            if let Some(address) = mapping.host_ip.filter(|address| !address.is_unspecified()) {
                entry["hostIP"] = json!(address);
            }
            entry
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".into(), ports.into());
    }
    if let Some(bandwidth) = pod.bandwidth {
        all.insert("bandwidth".into(), json!(bandwidth));
    }
    if let Some(dns) = &pod.dns {
        all.insert("dns".into(), json!(dns));
    }
    if !pod_cidrs.is_empty() {
        let ranges: Vec<Value> = pod_cidrs.iter().map(|cidr| json!([{ "subnet": cidr }])).collect();
        all.insert("ipRanges".into(), ranges.into());
    }
    if !pod.annotations.is_empty() {
        // What containerd and CRI-O call it.
        all.insert("io.kubernetes.cri.pod-annotations".into(), json!(pod.annotations));
    }
    all
}

fn recorded_list(record: &Record) -> Result<(NetworkList, &CniRecord), NetworkError> {
    let Kind::Cni(cni) = &record.kind else {
        return Err(NetworkError::Invalid {
            pod: record.id.clone(),
            reason: "it is not attached by CNI".into(),
        });
    };
    let list = NetworkList::parse(cni.network.clone())
        .map_err(|reason| NetworkError::Invalid { pod: record.id.clone(), reason })?;
    Ok((list, cni))
}

fn addresses(list: &NetworkList, result: &Value) -> Result<Vec<IpAddr>, NetworkError> {
    let plugin = list.plugins.last().map_or("?", |plugin| &plugin.kind);
    result::addresses(result, INTERFACE).map_err(|reason| failure(&list.name, plugin, "ADD", reason))
}

fn failure(network: &str, plugin: &str, command: &'static str, reason: String) -> NetworkError {
    NetworkError::Cni { network: network.to_owned(), plugin: plugin.to_owned(), command, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bandwidth, PortMapping, Protocol};

    #[test]
    fn capability_arguments_have_the_conventions_shape() {
        let pod = PodNetwork {
            port_mappings: vec![
                PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 8080, host_ip: None },
                PortMapping {
                    protocol: Protocol::Udp,
                    container_port: 53,
                    host_port: 53,
                    host_ip: Some("127.0.0.1".parse().unwrap()),
                },
                PortMapping { protocol: Protocol::Tcp, container_port: 1, host_port: 0, host_ip: None },
            ],
            bandwidth: Some(Bandwidth { ingress_rate: 1000, ingress_burst: 2000, ..Bandwidth::default() }),
            ..PodNetwork::default()
        };
        let config = runtime_config(&pod, &["10.1.0.0/24".parse().unwrap()]);
        assert_eq!(
            Value::from(config),
            json!({
                "portMappings": [
                    { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
                    { "hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1" },
                ],
                "bandwidth": { "ingressRate": 1000, "ingressBurst": 2000, "egressRate": 0, "egressBurst": 0 },
                "ipRanges": [[{ "subnet": "10.1.0.0/24" }]],
            })
        );
    }

    #[test]
    fn a_pods_name_cannot_add_arguments() {
        let pod = PodNetwork { id: "a".into(), name: "x;K8S_POD_UID=evil".into(), ..PodNetwork::default() };
        assert!(Attachment::new(&pod, Path::new("/run/netns/a")).is_err());
        let pod = PodNetwork { name: "web-0".into(), namespace: "default".into(), uid: "u".into(), ..pod };
        assert_eq!(
            Attachment::new(&pod, Path::new("/run/netns/a")).unwrap().arguments,
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=a;K8S_POD_UID=u"
        );
    }
}
