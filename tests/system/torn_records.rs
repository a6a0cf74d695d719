//! Records that a power cut, a full disk or a bad sector spoiled: swept with a warning, never a failed start, and what
//! they told of does not run on behind everybody's back.

use std::fs;
use std::path::{Path, PathBuf};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, networked_pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;

use super::survival::{agent_of, running};

type Tear = (&'static str, fn(Vec<u8>) -> Vec<u8>);

const TEARS: [Tear; 4] = [
    ("half of what was first", |bytes| bytes[..frames(&bytes)[0].len() / 2].to_vec()),
    ("nothing", |_| Vec::new()),
    ("zeros", |bytes| vec![0; bytes.len()]),
    ("garbage", |bytes| bytes.iter().map(|byte| byte.wrapping_mul(167) ^ 0x5a).collect()),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_record_is_torn_is_ended_and_no_other() {
    let mut ground = Ground::new().await;
    let mut healthy = ground.pod("healthy").await;
    let mut torn = Vec::new();
    for (_, tear) in TEARS {
        let pod = ground.pod(&format!("torn{}", torn.len())).await;
        torn.push((pod, tear));
    }
    ground.daemon.kill();
    for (pod, tear) in &torn {
        spoil(&ground.sandbox_record(&pod.pod.id), *tear);
    }
    ground.daemon.restart().await;

    assert!(ground.daemon.log().contains("a record cannot be read; it is dropped"));
    let request = cri::ListPodSandboxRequest::default();
    let pods = ground.daemon.runtime().await.list_pod_sandbox(request).await.unwrap().into_inner().items;
    assert_eq!(pods.iter().map(|pod| &pod.id).collect::<Vec<_>>(), [&healthy.pod.id]);
    for (pod, _) in &torn {
        gone(&pod.nap).await;
    }
    healthy.works(&ground.daemon).await;
    // Their names are free
    for (pod, _) in torn {
        Pod::run(&ground.daemon, pod.pod.config).await;
    }
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_record_is_torn_and_whose_agent_is_dead_leaves_nothing() {
    let mut ground = Ground::new().await;
    // All of it, or what changed when it was ready: then it seems that it was never made.
    for tear in [TEARS[0].1, |bytes| frames(&bytes)[0].to_vec()] {
        let pod = ground.pod("torn").await;
        let agent = agent_of(&ground.daemon, &pod.pod.id).await;
        ground.daemon.kill();
        let agent = rustix::process::Pid::from_raw(agent).unwrap();
        rustix::process::kill_process(agent, rustix::process::Signal::KILL).unwrap();
        // Nothing tells of it any more but its volatile directory
        spoil(&ground.sandbox_record(&pod.pod.id), tear);
        spoil(&ground.container_record(&pod.container), TEARS[1].1);
        spoil(&ground.network_record(&pod.pod.id), TEARS[2].1);
        ground.daemon.restart().await;
        gone(&pod.nap).await;
    }
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_whose_record_is_torn_is_ended_and_its_pod_lives() {
    let mut ground = Ground::new().await;
    let mut torn = Vec::new();
    for (_, tear) in TEARS {
        let pod = ground.pod(&format!("torn{}", torn.len())).await;
        torn.push((pod, tear));
    }
    ground.daemon.kill();
    for (pod, tear) in &torn {
        spoil(&ground.container_record(&pod.container), *tear);
    }
    ground.daemon.restart().await;

    for (mut pod, _) in torn {
        gone(&pod.nap).await;
        // Processes of a machine are not seen from here
        let files = ground.daemon.root().join("containers").join(&pod.container);
        hull_tests::eventually("its files are gone", hull_tests::patience(5), async || {
            (!files.exists()).then_some(())
        })
        .await;
        pod.pod.reconnect(&ground.daemon).await;
        assert_eq!(pod.pod.status().await.state(), cri::PodSandboxState::SandboxReady);
        // Its name is free, for hulld and for the agent
        pod.container = pod.pod.start(pod.config.clone()).await;
        pod.works(&ground.daemon).await;
    }
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_torn_at_the_end_of_a_record_is_what_changed_last_and_all_runs_on() {
    let mut ground = Ground::new().await;
    let mut pods = Vec::new();
    // Of a container's record the last is that it runs, before that it was about to start, before that it was made.
    for lost in 1..=2 {
        pods.push((ground.pod(&format!("torn{lost}")).await, lost));
    }
    ground.daemon.kill();
    for (pod, lost) in &pods {
        spoil(&ground.container_record(&pod.container), |bytes| {
            let frames = frames(&bytes);
            assert_eq!(frames.len(), 3);
            let whole: usize = frames[..3 - lost].iter().map(|frame| frame.len()).sum();
            bytes[..whole + frames[3 - lost].len() / 2].to_vec()
        });
    }
    ground.daemon.restart().await;

    assert!(ground.daemon.log().contains("the end of a record is torn"));
    for (mut pod, _) in pods {
        pod.works(&ground.daemon).await;
        let status = pod.pod.container(&pod.container).await;
        assert_eq!(status.state(), cri::ContainerState::ContainerRunning);
        assert!(status.started_at > 0);
        pod.pod.stop().await;
    }
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_networks_record_is_torn_is_ended_before_its_address_is_given_again() {
    let mut ground = Ground::new().await;
    let mut healthy = ground.pod("healthy").await;
    let mut torn = ground.pod("torn").await;
    ground.daemon.kill();
    spoil(&ground.network_record(&torn.pod.id), |bytes| bytes[..bytes.len() / 2].to_vec());
    ground.daemon.restart().await;

    gone(&torn.nap).await;
    torn.pod.reconnect(&ground.daemon).await;
    assert_eq!(torn.pod.status().await.state(), cri::PodSandboxState::SandboxNotready);
    let status = torn.pod.container(&torn.container).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "NetworkLost"));
    torn.pod.stop().await;
    torn.pod.remove().await;
    healthy.works(&ground.daemon).await;
    ground.daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_another_boot_are_of_pods_that_ended_with_it() {
    let mut ground = Ground::new().await;
    let mut pod = ground.pod("rebooted").await;
    let fresh = pod.pod.create(container_config("fresh", &ground.image, &["/bin/true"])).await.unwrap();
    let agent = agent_of(&ground.daemon, &pod.pod.id).await;
    // Given what a machine finds after a restart: records of the boot before, no process, no volatile directory
    restart_machine(&mut ground.daemon, agent).await;
    gone(&pod.nap).await;

    // Then the container ended then, nobody knows how, and the pod can only be removed
    pod.pod.reconnect(&ground.daemon).await;
    assert_eq!(pod.pod.status().await.state(), cri::PodSandboxState::SandboxNotready);
    let status = pod.pod.container(&pod.container).await;
    assert_eq!(status.state(), cri::ContainerState::ContainerExited);
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "NodeRebooted"));
    assert_eq!(pod.pod.container(&fresh).await.state(), cri::ContainerState::ContainerCreated);
    pod.pod.stop().await;
    let mut config = pod.pod.config.clone();
    config.metadata.as_mut().unwrap().attempt = 1;
    Pod::run(&ground.daemon, config).await.remove().await;
    pod.pod.remove().await;
    ground.daemon.finish().await;
}

/// As if the machine had been restarted: records of the boot before, no process, no volatile directory. `agent` is the
/// one of the only pod that lives.
pub(crate) async fn restart_machine(daemon: &mut Daemon, agent: i32) {
    daemon.kill();
    let agent = rustix::process::Pid::from_raw(agent).unwrap();
    rustix::process::kill_process(agent, rustix::process::Signal::KILL).unwrap();
    hull_tests::residue::end_cgroups(daemon.cgroup());
    fs::remove_dir_all(daemon.path("state/pods")).unwrap();
    let records = |directory: &str| {
        let entries = fs::read_dir(daemon.root().join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    for record in [records("state/sandboxes"), records("state/containers")].concat() {
        spoil(&record, as_of_another_boot);
    }
    for record in records("network/pods") {
        spoil(&record, |bytes| replace(&bytes, boot_id().as_bytes(), OTHER_BOOT.as_bytes()));
    }
    daemon.restart().await;
}

struct Ground {
    daemon: Daemon,
    image: String,
    number: u64,
    _registry: Registry,
}

/// A pod with one container whose processes can be told from all others.
struct Sleeping {
    pod: Pod,
    container: String,
    config: cri::ContainerConfig,
    nap: String,
}

impl Ground {
    async fn new() -> Ground {
        let registry = Registry::start();
        let image = registry.push("busybox", "v1", &image::busybox());
        let daemon = Daemon::start().await;
        daemon.pull(&image).await;
        Ground { daemon, image, number: 0, _registry: registry }
    }

    async fn pod(&mut self, name: &str) -> Sleeping {
        self.number += 1;
        let nap = format!("{}", 6_000_000 + u64::from(std::process::id()) * 1000 + self.number);
        let mut pod = Pod::run(&self.daemon, networked_pod_config(&self.daemon, name)).await;
        let config = container_config(
            "main",
            &self.image,
            &["/bin/sh", "-c", &format!("sleep {nap} & exec sleep {nap}")],
        );
        let container = pod.start(config.clone()).await;
        Sleeping { pod, container, config, nap }
    }

    fn sandbox_record(&self, id: &str) -> PathBuf {
        self.daemon.root().join("state/sandboxes").join(id)
    }

    fn container_record(&self, id: &str) -> PathBuf {
        self.daemon.root().join("state/containers").join(id)
    }

    fn network_record(&self, id: &str) -> PathBuf {
        self.daemon.root().join("network/pods").join(format!("{id}.json"))
    }
}

impl Sleeping {
    async fn works(&mut self, daemon: &Daemon) {
        self.pod.reconnect(daemon).await;
        assert_eq!(self.pod.status().await.state(), cri::PodSandboxState::SandboxReady);
        assert_eq!(self.pod.shell(&self.container, "echo works").await, "works\n");
    }
}

fn spoil(path: &Path, tear: impl Fn(Vec<u8>) -> Vec<u8>) {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    fs::write(path, tear(bytes)).unwrap();
}

async fn gone(nap: &str) {
    hull_tests::eventually("its processes are gone", hull_tests::patience(5), async || {
        (!running(&format!("sleep\u{0}{nap}"))).then_some(())
    })
    .await;
}

const OTHER_BOOT: &str = "00000000-1111-2222-3333-444444444444";

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()
}

/// What was added to a file, one after the other: a header of 16 bytes, of which the third four are the payload's length,
/// and the payload.
fn frames(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let length = 16 + u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
        let (frame, rest) = bytes.split_at(length);
        frames.push(frame);
        bytes = rest;
    }
    frames
}

/// The last four bytes of a record's header are the CRC-32 of its payload.
fn as_of_another_boot(bytes: Vec<u8>) -> Vec<u8> {
    let last = frames(&bytes).pop().unwrap();
    let mut bytes = replace(last, boot_id().as_bytes(), OTHER_BOOT.as_bytes());
    let checksum = crc32(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = bytes.windows(from.len()).position(|part| part == from).expect("the record tells its boot");
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

/// ISO-HDLC, as in gzip.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}
