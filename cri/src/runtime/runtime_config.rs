//! RuntimeConfig: how kubelet and hull agree about cgroups.

use super::Runtime;
use crate::api::runtime::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeConfigRequest, RuntimeConfigResponse,
};

impl Runtime {
    /// hull writes cgroups itself; with this answer kubelet does likewise.
    pub fn runtime_config(&self, _request: &RuntimeConfigRequest) -> RuntimeConfigResponse {
        let linux = LinuxRuntimeConfiguration { cgroup_driver: CgroupDriver::Cgroupfs.into() };
        RuntimeConfigResponse { linux: Some(linux) }
    }
}
