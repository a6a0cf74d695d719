//! Devices: those that CRI names, and all of the host's for a privileged container.

use hull_agent::protocol::messages;

use super::invalid;
use crate::api::runtime::Device;
use crate::runtime::Error;
use crate::security::devices;

/// What a container may see and use beyond the default set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Devices {
    /// Nodes to make; each may be used as its `access` says.
    pub nodes: Vec<messages::Device>,
    /// Rules beyond those of the nodes.
    pub rules: Vec<messages::DeviceRule>,
}

/// Looks the devices up on the host. A privileged container on the host's kernel gets all of the host's devices; on
/// another one it may use whatever that kernel has. Blocks for a little while.
pub fn look_up(cri: &[Device], privileged: bool, on_hosts_kernel: bool) -> Result<Devices, Error> {
    let mut found = Devices::default();
    if privileged && on_hosts_kernel {
        found.nodes = devices::host().map_err(|error| Error::Internal(error.to_string()))?;
    }
    if privileged {
        found.rules.push(devices::allow_everything());
    }
    for device in cri {
        let nodes = devices::from_cri(&device.host_path, &device.container_path, &device.permissions)
            .map_err(|error| invalid(error.to_string()))?;
        // What is named wins over what comes with being privileged.
        found.nodes.retain(|known| !nodes.iter().any(|node| node.path == known.path));
        found.nodes.extend(nodes);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_device_replaces_the_hosts_at_the_same_path() {
        let device = Device {
            host_path: "/dev/zero".into(),
            container_path: "/dev/null".into(),
            ..Default::default()
        };
        let found = look_up(&[device], true, true).unwrap();
        let null: Vec<_> = found.nodes.iter().filter(|node| node.path == "/dev/null").collect();
        assert_eq!(null.len(), 1);
        assert_eq!((null[0].major, null[0].minor), (1, 5));
        assert_eq!(found.rules, [devices::allow_everything()]);
    }

    #[test]
    fn on_another_kernel_being_privileged_brings_none_of_the_hosts_devices() {
        let found = look_up(&[], true, false).unwrap();
        assert_eq!((found.nodes.len(), found.rules), (0, vec![devices::allow_everything()]));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let device = Device { host_path: "/etc/passwd".into(), ..Default::default() };
        assert!(matches!(look_up(&[device], false, true), Err(Error::Invalid(_))));
    }
}
