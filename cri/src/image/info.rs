//! hull.v1 Info: what this daemon is, where it lives and what it holds.

use std::fs;
use std::sync::Arc;

use crate::api::hull::InfoReply;
use crate::runtime::{Result, Runtime, blocking};
use crate::store::record::{ContainerPhase, PodPhase};

impl Runtime {
    /// One look at everything.
    pub async fn info(&self) -> Result<InfoReply> {
        let images = Arc::clone(self.images());
        let usage = blocking(move || images.usage()).await??;
        let pods = self.objects().pods();
        let containers = self.objects().containers();
        let uname = rustix::system::uname();
        let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
        let layout = self.layout();
        let cgroup = match (layout.unified_controllers, layout.unified.is_empty()) {
            (true, _) => "v2",
            (false, false) => "hybrid",
            (false, true) => "v1",
        };
        let networks: Vec<String> =
            pods.iter().map(|pod| pod.with_record(|record| record.network.clone())).collect();
        let config = self.config();
        Ok(InfoReply {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            started_at: self.started_at(),
            root: config.root.to_string_lossy().into_owned(),
            state: config.state.to_string_lossy().into_owned(),
            cgroup: cgroup.into(),
            kernel: text(uname.release()),
            architecture: text(uname.machine()),
            network_mode: format!("{:?}", config.network.mode).to_lowercase(),
            network: networks.into_iter().find(|network| !network.is_empty()).unwrap_or_default(),
            network_problem: self.network().ready().err().unwrap_or_default(),
            runtime_handlers: config.runtimes.handlers.keys().cloned().collect(),
            images: self.images().list()?.len() as u64,
            image_bytes: usage.bytes,
            pods: pods.len() as u64,
            pods_ready: pods.iter().filter(|pod| pod.phase() == PodPhase::Ready).count() as u64,
            containers: containers.len() as u64,
            containers_running: containers
                .iter()
                .filter(|container| container.phase() == ContainerPhase::Running)
                .count() as u64,
            resident_bytes: resident_bytes(),
            handler_problems: self.handler_problems(),
            streaming_certificate: self.streaming_certificate().await,
        })
    }
}

/// Resident memory of this process (proc(5), status); 0 if it cannot be read.
fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kibibytes| kibibytes.parse::<u64>().ok()).unwrap_or(0) * 1024
}
