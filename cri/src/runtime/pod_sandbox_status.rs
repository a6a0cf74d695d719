//! PodSandboxStatus.

use std::collections::BTreeMap;

use serde_json::json;

use super::get_container_events::statuses;
use super::list_pod_sandbox::state;
use super::objects::Pod;
use super::{Result, Runtime, host};
use crate::api::runtime::{
    LinuxPodSandboxStatus, Namespace, PodIp, PodSandboxNetworkStatus, PodSandboxStatus,
    PodSandboxStatusRequest, PodSandboxStatusResponse,
};
use crate::store::record::SandboxRecord;

impl Runtime {
    /// Everything about one pod.
    pub fn pod_sandbox_status(&self, request: &PodSandboxStatusRequest) -> Result<PodSandboxStatusResponse> {
        let timestamp = host::now();
        let pod = self.objects.pod(&request.pod_sandbox_id)?;
        Ok(PodSandboxStatusResponse {
            status: Some(pod.with_record(status)),
            info: if request.verbose { verbose(&pod) } else { BTreeMap::new() },
            containers_statuses: statuses(&pod),
            // Before the look: what changes after it is told by an event with a later time.
            timestamp,
        })
    }
}

pub(super) fn status(record: &SandboxRecord) -> PodSandboxStatus {
    let config = record.config.clone().unwrap_or_default();
    let options = config
        .linux
        .and_then(|linux| linux.security_context)
        .and_then(|context| context.namespace_options)
        .unwrap_or_default();
    let mut addresses = record.addresses.iter().cloned();
    let network = PodSandboxNetworkStatus {
        ip: addresses.next().unwrap_or_default(),
        additional_ips: addresses.map(|ip| PodIp { ip }).collect(),
    };
    PodSandboxStatus {
        id: record.id.clone(),
        metadata: config.metadata,
        state: state(record.phase()).into(),
        created_at: record.created_at,
        network: Some(network),
        linux: Some(LinuxPodSandboxStatus { namespaces: Some(Namespace { options: Some(options) }) }),
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: record.runtime_handler.clone(),
    }
}

fn verbose(pod: &Pod) -> BTreeMap<String, String> {
    let record = pod.record();
    let info = json!({
        "pid": record.agent_pid,
        "reaperPid": record.reaper_pid,
        "phase": format!("{:?}", record.phase()),
        "agentConnected": pod.agent().is_some_and(|agent| agent.is_connected()),
        "networkNamespace": record.network_namespace,
        "network": record.network,
        "cgroupParent": record.cgroup_parent,
        "stateDirectory": pod.place().directory,
        "bootId": record.boot_id,
        "runtimeHandler": record.runtime_handler,
        "resources": record.resources,
        "overhead": record.overhead,
        "config": record.config,
    });
    BTreeMap::from([("info".to_owned(), info.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{PodSandboxConfig, PodSandboxState};
    use crate::store::record::PodPhase;

    #[test]
    fn a_lost_pod_keeps_its_addresses_and_is_not_ready() {
        let record = SandboxRecord {
            config: Some(PodSandboxConfig::default()),
            phase: PodPhase::Lost.into(),
            addresses: vec!["10.0.0.2".into(), "fd00::2".into()],
            ..Default::default()
        };
        let status = status(&record);
        assert_eq!(status.state(), PodSandboxState::SandboxNotready);
        let network = status.network.unwrap();
        assert_eq!((network.ip.as_str(), network.additional_ips.len()), ("10.0.0.2", 1));
    }
}
