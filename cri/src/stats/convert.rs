//! From what was measured to CRI's messages. Pure.

use hull_agent::cgroup::stats::{Memory, Stall, Stalls};

use super::{Interface, Measured};
use crate::api::runtime::{
    CpuUsage, IoUsage, MemoryUsage, NetworkInterfaceUsage, NetworkUsage, ProcessUsage, PsiData, PsiStats,
    SwapUsage, UInt64Value,
};

/// What CNI and hull's own network call a pod's interface to the cluster.
const DEFAULT_INTERFACE: &str = "eth0";

fn number(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

/// Processor time; `rate` in billionths of a processor, if it is known.
pub fn cpu(measured: &Measured, rate: Option<u64>) -> Option<CpuUsage> {
    let cpu = measured.usage.cpu?;
    Some(CpuUsage {
        timestamp: measured.at,
        usage_core_nano_seconds: number(cpu.usage),
        usage_nano_cores: rate.and_then(number),
        psi: measured.usage.pressure.cpu.map(psi),
    })
}

/// Memory. `limit` in bytes, if there is one.
pub fn memory(measured: &Measured, limit: Option<u64>) -> Option<MemoryUsage> {
    let Memory { usage, working_set, rss, faults, major_faults, .. } = measured.usage.memory?;
    Some(MemoryUsage {
        timestamp: measured.at,
        working_set_bytes: number(working_set),
        available_bytes: limit.and_then(|limit| number(limit.saturating_sub(working_set))),
        usage_bytes: number(usage),
        rss_bytes: number(rss),
        page_faults: number(faults),
        major_page_faults: number(major_faults),
        psi: measured.usage.pressure.memory.map(psi),
    })
}

/// Swap; `limit` in bytes, if there is one. `None` where the kernel does not account it.
pub fn swap(measured: &Measured, limit: Option<u64>) -> Option<SwapUsage> {
    let used = measured.usage.memory?.swap?;
    Some(SwapUsage {
        timestamp: measured.at,
        swap_available_bytes: limit.and_then(|limit| number(limit.saturating_sub(used))),
        swap_usage_bytes: number(used),
    })
}

/// Pressure of block devices.
pub fn io(measured: &Measured) -> Option<IoUsage> {
    let stalls = measured.usage.pressure.io?;
    Some(IoUsage { timestamp: measured.at, psi: Some(psi(stalls)) })
}

/// How many processes.
pub fn processes(measured: &Measured) -> ProcessUsage {
    ProcessUsage { timestamp: measured.at, process_count: number(measured.processes) }
}

/// The interfaces, the pod's main one apart. `None` on the host's network.
pub fn network(at: i64, interfaces: &[Interface]) -> Option<NetworkUsage> {
    let main = interfaces.iter().position(|one| one.name == DEFAULT_INTERFACE).unwrap_or(0);
    let default_interface = interfaces.get(main).map(interface)?;
    let others = interfaces.iter().enumerate().filter(|(index, _)| *index != main);
    Some(NetworkUsage {
        timestamp: at,
        default_interface: Some(default_interface),
        interfaces: others.map(|(_, one)| interface(one)).collect(),
    })
}

fn interface(interface: &Interface) -> NetworkInterfaceUsage {
    NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: number(interface.received.bytes),
        rx_errors: number(interface.received.errors),
        tx_bytes: number(interface.sent.bytes),
        tx_errors: number(interface.sent.errors),
    }
}

/// The total stays in the kernel's microseconds, as every runtime and cAdvisor pass it on.
fn psi(stalls: Stalls) -> PsiStats {
    let data = |stall: Stall| PsiData {
        total: stall.total,
        avg10: stall.average_10,
        avg60: stall.average_60,
        avg300: stall.average_300,
    };
    PsiStats { full: Some(data(stalls.full)), some: Some(data(stalls.some)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_told_only_under_a_limit() {
        let mut measured = Measured::default();
        assert_eq!(memory(&measured, None), None);
        measured.usage.memory =
            Some(Memory { usage: 100, working_set: 60, swap: Some(5), ..Memory::default() });
        assert_eq!(memory(&measured, None).unwrap().available_bytes, None);
        assert_eq!(memory(&measured, Some(100)).unwrap().available_bytes, number(40));
        assert_eq!(memory(&measured, Some(50)).unwrap().available_bytes, number(0));
        assert_eq!(swap(&measured, Some(20)).unwrap().swap_available_bytes, number(15));
        assert_eq!(swap(&measured, None).unwrap().swap_available_bytes, None);
    }

    #[test]
    fn the_main_interface_stands_apart() {
        let named = |name: &str| Interface { name: name.into(), ..Interface::default() };
        let usage = network(1, &[named("net1"), named("eth0"), named("net2")]).unwrap();
        assert_eq!(usage.default_interface.unwrap().name, "eth0");
        assert_eq!(usage.interfaces.len(), 2);
        assert_eq!(network(1, &[]), None);
        assert_eq!(network(1, &[named("tun0")]).unwrap().default_interface.unwrap().name, "tun0");
    }
}
