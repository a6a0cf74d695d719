//! RuntimeConfig: how kubelet and hull agree about cgroups.

use super::Runtime;
use crate::api::runtime::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeConfigRequest, RuntimeConfigResponse,
};

impl Runtime {
    /// Who owns cgroups; kubelet does likewise.
    pub fn runtime_config(&self, _request: &RuntimeConfigRequest) -> RuntimeConfigResponse {
        let driver = if self.systemd.is_some() { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
        let linux = LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        RuntimeConfigResponse { linux: Some(linux) }
    }
}
