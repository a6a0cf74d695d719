use std::collections::{BTreeMap, BTreeSet};

use hull_agent::cgroup::stats::{
    Cpu, CpuLimits, DeviceIo, Hugepages, Limits, Memory, MemoryLimits, Pressure, Stall, Stalls, Usage,
};

use super::*;
use crate::stats::{Details, Interface, Measured, PodUsage};

fn everything() -> Measured {
    let stalls = Stalls { some: Stall { total: 7_900_000, ..Stall::default() }, ..Stalls::default() };
    let pressure = Pressure { cpu: Some(stalls), memory: Some(stalls), io: Some(stalls) };
    Measured {
        at: 5_000_000_000,
        usage: Usage {
            cpu: Some(Cpu { usage: 3_999_999_999, ..Cpu::default() }),
            memory: Some(Memory { working_set: 77, ..Memory::default() }),
            hugepages: vec![Hugepages { size: "2MB".into(), usage: 0, max_usage: Some(0) }],
            io: vec![DeviceIo { major: 254, minor: 9999, read_bytes: 1, ..DeviceIo::default() }],
            tasks: Some(2),
            tasks_limit: None,
            pressure,
        },
        limits: Limits {
            cpu: CpuLimits { shares: Some(2), quota: Some(1), period: Some(3) },
            memory: MemoryLimits::default(),
        },
        details: Some(Details { ulimits: vec![("max_open_files".into(), 1)], ..Details::default() }),
        ..Measured::default()
    }
}

fn layer() -> Layer {
    Layer { occupied: Some(Default::default()), ..Layer::default() }
}

#[test]
fn every_described_metric_is_told_with_the_labels_that_were_described() {
    let labels = Labels { container: "main".into(), ..Labels::default() };
    let mut told = container(&labels, &everything(), &layer(), 1);
    let interfaces = vec![Interface { name: "eth0".into(), ..Interface::default() }];
    told.extend(pod(&Labels::default(), &PodUsage { interfaces, ..PodUsage::default() }));
    let described: BTreeMap<_, _> =
        descriptors().into_iter().map(|one| (one.name, one.label_keys.len())).collect();
    for metric in &told {
        assert_eq!(described.get(&metric.name), Some(&metric.label_values.len()), "{}", metric.name);
    }
    let told: BTreeSet<_> = told.into_iter().map(|metric| metric.name).collect();
    assert_eq!(told, described.into_keys().collect());
}

#[test]
fn names_are_described_once_and_explained() {
    let descriptors = descriptors();
    let names: BTreeSet<_> = descriptors.iter().map(|one| &one.name).collect();
    assert_eq!(names.len(), descriptors.len());
    assert!(descriptors.iter().all(|one| !one.help.is_empty() && one.label_keys.len() >= LABELS.len()));
}

#[test]
fn values_are_in_cadvisors_units_and_labels_in_order() {
    let labels = Labels {
        id: "/kubepods/pod1/abc".into(),
        name: "abc".into(),
        image: "busybox".into(),
        namespace: "default".into(),
        pod: "web".into(),
        container: "main".into(),
    };
    let told = container(&labels, &everything(), &layer(), 2_500_000_000);
    let find = |name: &str| told.iter().find(|metric| metric.name == name).unwrap();
    let value = |name: &str| find(name).value.unwrap().value;
    assert_eq!(value("container_cpu_usage_seconds_total"), 3);
    assert_eq!(value("container_start_time_seconds"), 2);
    assert_eq!(value("container_last_seen"), 5);
    assert_eq!(value("container_memory_working_set_bytes"), 77);
    assert_eq!(value("container_pressure_io_waiting_seconds_total"), 7);
    assert_eq!(
        find("container_blkio_device_usage_total").label_values,
        ["/kubepods/pod1/abc", "abc", "busybox", "default", "web", "main", "254:9999", "254", "9999", "Read"]
    );
}

#[test]
fn a_container_without_a_quota_tells_nothing_of_throttling() {
    let mut measured = everything();
    measured.limits.cpu.quota = None;
    let told = container(&Labels::default(), &measured, &layer(), 0);
    assert!(told.iter().all(|metric| !metric.name.contains("_cfs_") && !metric.name.contains("_cpu_quota")));
}
