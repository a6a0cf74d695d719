//! A pod's link: made in one go from a thread that is already in the pod's namespace.

use std::os::fd::BorrowedFd;

use ipnet::IpNet;
use rustix::io::Errno;

use super::address::gateway;
use super::marks::Marks;
use crate::netlink::route::Veth;
use crate::netlink::{Batch, Socket};
use crate::{Bandwidth, NetworkError, sysctl};

const POD_LINK: &str = "eth0";
const LOOPBACK_INDEX: u32 = 1;

/// What a pod's link is to be.
pub(super) struct Plan {
    pub(super) pod: String,
    pub(super) marks: Marks,
    pub(super) name: String,
    pub(super) bridge: u32,
    pub(super) mtu: u32,
    pub(super) addresses: Vec<IpNet>,
    pub(super) bandwidth: Option<Bandwidth>,
}

/// Sets up the calling thread's namespace: loopback, eth0 with its addresses and routes, and the other end on the
/// bridge. `host` is a socket of the host's namespace, `namespace` the calling thread's.
pub(super) fn connect(plan: &Plan, host: &Socket, namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    let pod = Socket::route()?;
    if plan.addresses.iter().any(|address| address.addr().is_ipv6()) {
        // Before eth0 exists: addresses are given by us alone, and usable at once.
        for setting in ["accept_ra", "accept_dad", "autoconf"] {
            sysctl::set(&format!("ipv6/conf/default/{setting}"), "0")?;
        }
    }
    make_pair(plan, host, namespace)?;
    let index = pod.link_index(POD_LINK)?;
    let mut batch = Batch::new();
    batch.set_up(LOOPBACK_INDEX, "loopback");
    batch.set_up(index, POD_LINK);
    for address in &plan.addresses {
        batch.add_address(index, *address);
        batch.add_default_route(index, gateway(address.trunc()).addr());
    }
    shape(&mut batch, index, plan.bandwidth.map(|b| (b.egress_rate, b.egress_burst)), "what leaves the pod");
    pod.execute(&batch)?;
    if let Some(bandwidth) = plan.bandwidth.filter(|bandwidth| bandwidth.ingress_rate != 0) {
        let mut batch = Batch::new();
        let rate = Some((bandwidth.ingress_rate, bandwidth.ingress_burst));
        shape(&mut batch, host.link_index(&plan.name)?, rate, "what enters the pod");
        host.execute(&batch)?;
    }
    Ok(())
}

fn make_pair(plan: &Plan, host: &Socket, namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    let alias = plan.marks.link_alias(&plan.pod);
    let veth = Veth {
        host_name: &plan.name,
        host_mac: plan.marks.host_mac(&plan.pod),
        alias: &alias,
        bridge: plan.bridge,
        mtu: plan.mtu,
        pod_name: POD_LINK,
        pod_mac: plan.marks.pod_mac(&plan.pod, &plan.addresses),
        pod_namespace: namespace,
    };
    let mut pair = Batch::new();
    pair.add_veth(&veth);
    match host.execute(&pair) {
        // Left by an attempt for the same pod whose namespace is still going away.
        Err(error) if error.errno == Errno::EXIST => {
            let mut removal = Batch::new();
            removal.delete_link(&plan.name);
            host.execute(&removal)?;
            host.execute(&pair)?;
        }
        other => other?,
    }
    let mut attachment = Batch::new();
    attachment.attach_veth(&veth);
    Ok(host.execute(&attachment)?)
}

/// `rate` is in bits per second and bits.
fn shape(batch: &mut Batch, index: u32, rate: Option<(u64, u64)>, what: &str) {
    // The bucket must hold a whole packet with its offloads, or nothing ever passes.
    const LEAST_BURST: u64 = 64 * 1024;
    if let Some((rate, burst)) = rate.filter(|(rate, _)| *rate != 0) {
        // An unbounded burst, as Kubernetes gives it, means a second's worth here.
        let burst = (burst / 8).min(rate / 8).clamp(LEAST_BURST, u64::from(u32::MAX / 2));
        batch.add_token_bucket(index, (rate / 8).max(1), burst as u32, what);
    }
}
