//! How often a start asks for memory on its way from a request's bytes to those of the agent's: a promise of
//! docs/SPECIFICATION.md that depends on no clock. The bounds are a little above what was counted.

use std::path::Path;

use hull_agent::protocol::messages;
use hull_sys::memory::count_allocations;
use prost::Message;

use super::container::{self, Facts};
use super::pod::{self, Host};
use crate::api::runtime::{
    Capability, ContainerConfig, ContainerMetadata, CreateContainerRequest, DnsConfig, ImageSpec, KeyValue,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RunPodSandboxRequest,
};
use crate::store::frame;
use crate::store::record::{ContainerRecord, ImageFacts, RunningUser, SandboxRecord};

/// From a pod's request to the agent's, both records included.
const POD: u64 = 80;
/// From a container's request to the agent's, three records included.
const CONTAINER: u64 = 700;

/// As kubelet asks for one with its labels.
fn pod_config() -> PodSandboxConfig {
    let metadata = PodSandboxMetadata {
        name: "web-7d9c5bbf4-x2x9q".into(),
        uid: "6f1b9a52-7f0c-4c4e-9a53-9a1c7c6d0a11".into(),
        namespace: "default".into(),
        attempt: 0,
    };
    let labels = ["app", "pod-template-hash", "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"];
    let security = LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption::default()),
        ..Default::default()
    };
    PodSandboxConfig {
        metadata: Some(metadata),
        hostname: "web-7d9c5bbf4-x2x9q".into(),
        log_directory: "/var/log/pods/default_web-7d9c5bbf4-x2x9q_6f1b9a52".into(),
        dns_config: Some(DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: ["default.svc", "svc", ""].map(|name| format!("{name}.cluster.local")).into(),
            options: vec!["ndots:5".into()],
        }),
        labels: labels.map(|name| (name.to_owned(), "web-7d9c5bbf4".to_owned())).into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/burstable/pod6f1b9a52-7f0c-4c4e-9a53-9a1c7c6d0a11".into(),
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// With the mounts and variables that kubelet gives to every container, and limits.
fn container_config() -> ContainerConfig {
    let mount = |at: &str| Mount {
        container_path: at.into(),
        host_path: format!("/var/lib/kubelet/pods/6f1b9a52{at}"),
        ..Default::default()
    };
    let at =
        ["/var/run/secrets/kubernetes.io/serviceaccount", "/etc/hosts", "/dev/termination-log", "/config"];
    let variable = |number: u32| KeyValue {
        key: format!("KUBERNETES_SERVICE_{number}"),
        value: "tcp://10.96.0.1:443".into(),
    };
    let masked =
        ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/sys/firmware"];
    let context = LinuxContainerSecurityContext {
        namespace_options: Some(NamespaceOption::default()),
        capabilities: Some(Capability { drop_capabilities: vec!["NET_RAW".into()], ..Default::default() }),
        masked_paths: masked.map(str::to_owned).into(),
        readonly_paths: ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"].map(str::to_owned).into(),
        ..Default::default()
    };
    let resources = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 256,
        memory_limit_in_bytes: 128 << 20,
        oom_score_adj: 900,
        ..Default::default()
    };
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "web".into(), attempt: 0 }),
        image: Some(ImageSpec { image: format!("sha256:{}", "a".repeat(64)), ..Default::default() }),
        envs: (0..8).map(variable).collect(),
        mounts: at.map(mount).into(),
        labels: [("io.kubernetes.container.name".to_owned(), "web".to_owned())].into(),
        log_path: "web/0.log".into(),
        linux: Some(LinuxContainerConfig { resources: Some(resources), security_context: Some(context) }),
        ..Default::default()
    }
}

fn request(call: messages::request::Call) -> Vec<u8> {
    let request = messages::Request { slots: Vec::new(), call: Some(call) };
    let body = Some(messages::message::Body::Request(request));
    messages::Message { id: 1, body }.encode_to_vec()
}

#[test]
fn a_start_asks_for_memory_no_more_often_than_promised() {
    let run =
        RunPodSandboxRequest { config: Some(pod_config()), runtime_handler: String::new() }.encode_to_vec();
    let host = Host { hosts: b"127.0.0.1 localhost\n".to_vec(), ..Default::default() };
    let id = "a".repeat(64);
    let (mut sandbox, of_pod) = count_allocations(|| {
        let config = RunPodSandboxRequest::decode(run.as_slice()).unwrap().config.unwrap();
        // Once to find out what is wrong with it, once with the addresses.
        let make = || pod::create_sandbox(&id, &config, &[], &host, 0, false, false).unwrap();
        drop(make());
        let bytes = request(messages::request::Call::CreateSandbox(make()));
        assert!(!bytes.is_empty());
        let record = SandboxRecord { id: id.clone(), config: Some(config), ..Default::default() };
        for _ in 0..2 {
            frame::encode(&record).unwrap();
        }
        record
    });
    sandbox.hostname = "web".into();

    let create = CreateContainerRequest {
        pod_sandbox_id: id.clone(),
        config: Some(container_config()),
        sandbox_config: Some(pod_config()),
    };
    let create = create.encode_to_vec();
    let image = ImageFacts {
        layers: ["a", "b", "c", "d"].map(|digit| format!("sha256:{}", digit.repeat(64))).into(),
        entrypoint: vec!["/usr/sbin/nginx".into()],
        cmd: ["-g", "daemon off;"].map(str::to_owned).into(),
        ..Default::default()
    };
    let ((), of_container) = count_allocations(|| {
        let config = CreateContainerRequest::decode(create.as_slice()).unwrap().config.unwrap();
        container::check(&config, sandbox.config.as_ref().unwrap()).unwrap();
        let mut record = ContainerRecord {
            id: "c".repeat(64),
            config: Some(config),
            image: Some(image.clone()),
            log_path: "/var/log/pods/web/0.log".into(),
            ..Default::default()
        };
        let plan = |record: &ContainerRecord| {
            container::plan(record, &sandbox, Path::new("/var/lib/hull/containers/c"), &Facts::default())
                .unwrap()
        };
        drop(plan(&record));
        frame::encode(&record).unwrap();
        assert!(record.begin_start("boot"));
        frame::encode(&record).unwrap();
        let bytes = request(messages::request::Call::StartContainer(plan(&record).start));
        assert!(!bytes.is_empty());
        record.started(7, 8, RunningUser::default());
        frame::encode(&record).unwrap();
    });
    println!("allocations of hulld's own for a pod: {of_pod}, for a container: {of_container}");
    assert!((20..=POD).contains(&of_pod), "{of_pod}");
    assert!((100..=CONTAINER).contains(&of_container), "{of_container}");
}
