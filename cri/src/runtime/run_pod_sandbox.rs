//! RunPodSandbox: a pod with its agent, its cgroup and its network.

use std::net::IpAddr;
use std::sync::Arc;

use hull_agent::sandbox::PodNamespaces;
use hull_network::{Attachment, PodNetwork};
use rustix::rand::GetRandomFlags;

use super::names::Claim;
use super::objects::{Pod, pod_key};
use super::trace::Trace;
use super::translate::pod;
use super::{Error, PodRequest, Result, Runtime, host};
use crate::api::runtime::{NamespaceMode, PodSandboxConfig, RunPodSandboxRequest};
use crate::sandbox::{Launched, Launcher, Nascent, Outside, Place};
use crate::security::selinux::{self, Labels, Promise};
use crate::store::record::{PodPhase, SandboxRecord};
use crate::systemd::slice;

impl Runtime {
    /// Makes a pod and returns its id. A repeated request joins the one under way, or gets the pod that it made.
    pub async fn run_pod_sandbox(self: &Arc<Self>, request: RunPodSandboxRequest) -> Result<String> {
        let config = request.config.ok_or_else(|| Error::Invalid("the request has no pod config".into()))?;
        let metadata = pod::check(&config)?;
        let launcher = self.launcher(&request.runtime_handler)?;
        let admitted = launcher.admit(&config).await;
        admitted.map_err(Error::sandbox(format!("cannot make the pod {}", metadata.name)))?;
        let wanted: PodRequest = (config, request.runtime_handler);
        match self.pod_names.claim(pod_key(&metadata), wanted.clone()) {
            Claim::New(reservation) => {
                let runtime = Arc::clone(self);
                let making = async move {
                    let result = runtime.make_pod(wanted, launcher).await;
                    reservation.complete(&result);
                    result
                };
                self.to_the_end(making).await
            }
            Claim::Joined(joined) => joined.result().await,
            Claim::Conflict => Err(Error::AlreadyExists(format!(
                "another pod sandbox {}/{} (attempt {}) is being made at this moment",
                metadata.namespace, metadata.name, metadata.attempt
            ))),
            Claim::Held(id) => self.same_pod(&id, &wanted),
        }
    }

    /// The pod that has the name already, if it is the one that is asked for.
    fn same_pod(&self, id: &str, (config, handler): &PodRequest) -> Result<String> {
        let pod = self.objects.pod(id)?;
        let same = pod.with_record(|record| {
            record.config.as_ref() == Some(config) && record.runtime_handler == *handler
        });
        match pod.phase() {
            PodPhase::Ready if same => Ok(id.to_owned()),
            PodPhase::Ready => Err(Error::AlreadyExists(format!(
                "the pod sandbox {id} has this name and attempt with another config"
            ))),
            _ => Err(Error::AlreadyExists(format!(
                "the pod sandbox {id}, which is not ready, has this name and attempt; remove it first"
            ))),
        }
    }

    async fn make_pod(self: &Arc<Self>, wanted: PodRequest, launcher: Arc<dyn Launcher>) -> Result<String> {
        let mut trace = Trace::begin("RunPodSandbox");
        let (config, runtime_handler) = wanted;
        let id = new_id()?;
        let (cgroup_parent, cgroup_levels) =
            pod::cgroup(&config, &self.config.cgroup.parent, self.systemd.is_some(), &id)?;
        let namespaces = pod::namespaces(&config)?;
        if pod::mapping(&config)?.is_some() && !launcher.has_own_kernel() {
            self.user_namespaces.clone().map_err(Error::FailedPrecondition)?;
        }
        let host = host::host();
        let hostname = pod::hostname(&config, namespaces, &host);
        let network = match namespaces.host_network {
            true => None,
            false => Some(pod::network(&id, &config, &hostname)?),
        };
        // Everything that could be wrong with the request is found out before anything is made.
        let own_kernel = launcher.has_own_kernel();
        let shm_size = self.config.pod.shm_size;
        pod::create_sandbox(&id, &config, &[], &host, shm_size, cgroup_levels > 0, own_kernel)?;

        let (labels, _promise) = self.labels_of_pod(&id, &config, namespaces, own_kernel)?;

        let record = SandboxRecord {
            id: id.clone(),
            config: Some(config.clone()),
            runtime_handler,
            boot_id: self.boot_id.clone(),
            phase: PodPhase::Creating.into(),
            created_at: host::now(),
            network_held: network.is_some(),
            cgroup_parent,
            cgroup_levels,
            hostname,
            process_label: labels.process,
            mount_label: labels.mount,
            ..Default::default()
        };
        trace.step("check the request");
        self.store.sandboxes.put(&record)?;
        trace.step("write the record");
        let pod = Pod::new(record, launcher, self.pod_directory(&id));
        match self.bring_up(&pod, &config, network, &host, &mut trace).await {
            Ok(()) => {
                self.traces.keep(trace, &id);
                Ok(id)
            }
            Err(error) => {
                self.undo(&pod).await;
                Err(error)
            }
        }
    }

    /// The SELinux labels of a new pod. A machine's kernel has none, and its processes are not the host's.
    fn labels_of_pod(
        &self,
        id: &str,
        config: &PodSandboxConfig,
        namespaces: pod::Namespaces,
        own_kernel: bool,
    ) -> Result<(Labels, Option<Promise>)> {
        let wanted = pod::security(config).selinux_options.unwrap_or_default();
        let policy = self.selinux.as_ref().filter(|_| !own_kernel);
        let Some(policy) = policy else {
            selinux::refuse(&wanted).map_err(Error::selinux)?;
            return Ok(Default::default());
        };
        let shared = namespaces.host_ipc || namespaces.pid == NamespaceMode::Node;
        let is_taken = |level: &str| {
            let has = |record: &SandboxRecord| selinux::level_of(&record.process_label) == level;
            self.objects.pods().iter().any(|pod| pod.with_record(has))
        };
        policy.of_pod(&wanted, shared, id, is_taken).map_err(Error::selinux)
    }

    /// Makes the pod of a record; it is ready then, and visible if it was not.
    pub(super) async fn bring_up(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        config: &PodSandboxConfig,
        network: Option<PodNetwork>,
        host: &pod::Host,
        trace: &mut Trace,
    ) -> Result<()> {
        let namespaces = self.user_namespace(pod, config).await?;
        let (attachment, nascent) = self.network_and_agent(pod, network, namespaces.as_deref()).await?;
        trace.step("spawn the agent, make the network");
        let addresses: Vec<IpAddr> =
            attachment.as_ref().map_or_else(Vec::new, |attachment| attachment.addresses.clone());
        // Of a slice only the launcher knows whether somebody has made it.
        let ours =
            pod.with_record(|record| record.cgroup_levels > 0 || slice::is_slice(&record.cgroup_parent));
        let shm_size = self.config.pod.shm_size;
        let own_kernel = pod.launcher.has_own_kernel();
        let mut request =
            pod::create_sandbox(pod.id(), config, &addresses, host, shm_size, ours, own_kernel)?;
        // Brought up again after a boot without SELinux, it has labels that this kernel takes from nobody.
        if self.selinux.is_some() {
            request.mount_label = pod.with_record(|record| record.mount_label.clone());
        }
        let outside = Outside {
            network_namespace: attachment.as_ref().map(|attachment| attachment.namespace.clone()),
            host_shm: pod::namespaces(config)?.host_ipc,
            namespaces,
        };
        let launched = nascent.create(request, &outside).await;
        let Launched { agent, events, mut created } =
            launched.map_err(Error::sandbox(format!("cannot make the pod sandbox {}", pod.id())))?;
        trace.step("the agent starts and makes the pod");
        trace.parts(std::mem::take(&mut created.steps));
        pod.try_change(&self.store, |record| {
            record.set_phase(PodPhase::Ready);
            record.agent_pid = created.agent_pid;
            record.reaper_pid = created.reaper_pid;
            record.cgroup_levels = record.cgroup_levels.max(created.cgroup_created_levels);
            if let Some(attachment) = attachment {
                record.network_namespace = attachment.namespace.to_string_lossy().into_owned();
                record.addresses = attachment.addresses.iter().map(IpAddr::to_string).collect();
                record.network = attachment.network;
            }
        })?;
        pod.set_agent(Some(agent));
        pod.set_agent_has_rdt(true);
        if self.objects.pod(pod.id()).is_err() {
            self.objects.add_pod(Arc::clone(pod));
        }
        pod.set_ending(false);
        self.follow(pod, events);
        trace.step("write the record again, tell of it");
        Ok(())
    }

    /// The pod's user namespace with those that belong to it, if it asks for one; a machine makes them itself.
    async fn user_namespace(
        &self,
        pod: &Arc<Pod>,
        config: &PodSandboxConfig,
    ) -> Result<Option<Arc<PodNamespaces>>> {
        let mapping = pod::mapping(config)?.filter(|_| !pod.launcher.has_own_kernel());
        let Some(mapping) = mapping else { return Ok(None) };
        let made = pod.launcher.user_namespace(mapping.uids, mapping.gids).await;
        made.map(|made| Some(Arc::new(made)))
            .map_err(Error::sandbox(format!("cannot make the pod sandbox {}", pod.id())))
    }

    /// The agent's program starts while the network is made.
    async fn network_and_agent(
        &self,
        pod: &Arc<Pod>,
        network: Option<PodNetwork>,
        namespaces: Option<&PodNamespaces>,
    ) -> Result<(Option<Attachment>, Box<dyn Nascent>)> {
        let place = pod.place();
        let config = pod.with_record(|record| record.config.clone()).unwrap_or_default();
        let begin = |place: &Place| {
            let begun = pod.launcher.begin(place, &config);
            begun.map_err(Error::sandbox(format!("cannot make the pod sandbox {}", pod.id())))
        };
        let Some(network) = network else { return Ok((None, begin(&place)?)) };
        let namespace = namespaces.map(|own| own.network.try_clone()).transpose();
        let namespace = namespace
            .map_err(|error| Error::Internal(format!("cannot keep the pod's network namespace: {error}")))?;
        let attacher = Arc::clone(&self.network);
        let attaching = tokio::spawn(async move { attacher.set_up_in(&network, namespace).await });
        let nascent = begin(&place);
        let attachment = attaching.await.map_err(|error| {
            Error::Internal(format!("the making of the pod's network broke off: {error}"))
        })??;
        Ok((Some(attachment), nascent?))
    }

    /// Takes back a pod that could not be made. What cannot be taken back stays as a pod that is not ready and has no
    /// right to its name, so that its owner sees it and its removal is tried again.
    async fn undo(self: &Arc<Self>, pod: &Arc<Pod>) {
        match self.dismantle(pod).await {
            Ok(()) => {
                if let Err(error) = self.store.sandboxes.remove(pod.id()) {
                    tracing::warn!(pod = pod.id(), %error, "the record of a pod that was not made stays");
                }
            }
            Err(error) => {
                tracing::warn!(pod = pod.id(), %error, "a pod that was not made cannot be cleared away yet");
                pod.change(&self.store, |record| record.set_phase(PodPhase::Lost));
                self.objects.add_pod(Arc::clone(pod));
            }
        }
    }
}

/// 64 random hex digits.
pub(super) fn new_id() -> Result<String> {
    let mut bytes = [0; 32];
    let filled = rustix::rand::getrandom(&mut bytes[..], GetRandomFlags::empty())
        .map_err(|errno| Error::Internal(format!("cannot draw a random id: {errno}")))?;
    if filled != bytes.len() {
        return Err(Error::Internal("cannot draw a random id: too few bytes".into()));
    }
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_64_hex_digits_and_differ() {
        let (one, other) = (new_id().unwrap(), new_id().unwrap());
        assert!(crate::store::is_id(&one) && crate::store::is_id(&other));
        assert_ne!(one, other);
    }
}
