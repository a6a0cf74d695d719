//! What is told of a pod as a whole, as cAdvisor tells it of the pod's cgroup and of its network.

use super::super::{Interface, PodUsage};
use super::container::common;
use super::definitions::*;
use super::{Labels, Sheet};
use crate::api::runtime::Metric;

/// The metrics of a pod.
pub fn pod(labels: &Labels, usage: &PodUsage) -> Vec<Metric> {
    let mut sheet = Sheet::new(labels);
    if let Some(whole) = &usage.whole {
        common(&mut sheet, whole);
    }
    for interface in &usage.interfaces {
        network(&mut sheet, interface);
    }
    sheet.metrics
}

fn network(sheet: &mut Sheet<'_>, Interface { name, received, sent }: &Interface) {
    let name = [name.as_str()];
    sheet.add(&NETWORK_RX_BYTES, &name, received.bytes);
    sheet.add(&NETWORK_RX_PACKETS, &name, received.packets);
    sheet.add(&NETWORK_RX_DROPPED, &name, received.dropped);
    sheet.add(&NETWORK_RX_ERRORS, &name, received.errors);
    sheet.add(&NETWORK_TX_BYTES, &name, sent.bytes);
    sheet.add(&NETWORK_TX_PACKETS, &name, sent.packets);
    sheet.add(&NETWORK_TX_DROPPED, &name, sent.dropped);
    sheet.add(&NETWORK_TX_ERRORS, &name, sent.errors);
}
