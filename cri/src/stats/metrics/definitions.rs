//! Names, meanings and labels.

use super::LABELS;
use crate::api::runtime::{MetricDescriptor, MetricType};

/// One metric.
#[derive(Debug)]
pub(super) struct Definition {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: MetricType,
    /// Keys of the labels that it has beside those of all.
    pub labels: &'static [&'static str],
}

/// What hull can tell, for ListMetricDescriptors.
pub fn descriptors() -> Vec<MetricDescriptor> {
    let keys = |own: &[&str]| LABELS.iter().chain(own).map(|key| (*key).to_owned()).collect();
    let describe = |definition: &&Definition| MetricDescriptor {
        name: definition.name.to_owned(),
        help: definition.help.to_owned(),
        label_keys: keys(definition.labels),
    };
    ALL.iter().map(describe).collect()
}

macro_rules! metrics {
    ($($constant:ident $kind:ident $name:literal $labels:tt $help:literal;)*) => {
        $(pub(super) const $constant: Definition = Definition {
            name: $name,
            help: $help,
            kind: MetricType::$kind,
            labels: &$labels,
        };)*
        /// All of them.
        pub(super) const ALL: &[&Definition] = &[$(&$constant),*];
    };
}

metrics! {
    LAST_SEEN Gauge "container_last_seen" [] "When the runtime last saw the container, in seconds since 1970.";
    START_TIME Gauge "container_start_time_seconds" [] "When the container was started, in seconds since 1970.";

    CPU_USAGE Counter "container_cpu_usage_seconds_total" ["cpu"] "Processor time used, in seconds.";
    CPU_USER Counter "container_cpu_user_seconds_total" [] "Processor time used in user mode, in seconds.";
    CPU_SYSTEM Counter "container_cpu_system_seconds_total" [] "Processor time used in the kernel, in seconds.";
    CFS_PERIODS Counter "container_cpu_cfs_periods_total" [] "Periods of the CPU quota that have passed.";
    CFS_THROTTLED Counter "container_cpu_cfs_throttled_periods_total" []
        "Periods in which the CPU quota ran out.";
    CFS_THROTTLED_TIME Counter "container_cpu_cfs_throttled_seconds_total" []
        "Time spent waiting for CPU quota, in seconds.";

    MEMORY_USAGE Gauge "container_memory_usage_bytes" [] "Memory in use, with all page cache, in bytes.";
    MEMORY_MAX_USAGE Gauge "container_memory_max_usage_bytes" [] "Most memory ever in use at once, in bytes.";
    MEMORY_WORKING_SET Gauge "container_memory_working_set_bytes" []
        "Memory in use without inactive file pages, in bytes.";
    MEMORY_RSS Gauge "container_memory_rss" [] "Anonymous memory, in bytes.";
    MEMORY_CACHE Gauge "container_memory_cache" [] "Page cache, in bytes.";
    MEMORY_MAPPED_FILE Gauge "container_memory_mapped_file" [] "Mapped pages of files, in bytes.";
    MEMORY_KERNEL Gauge "container_memory_kernel_usage" [] "Memory of the kernel, in bytes.";
    MEMORY_SWAP Gauge "container_memory_swap" [] "Swap in use, in bytes.";
    MEMORY_FAILCNT Counter "container_memory_failcnt" [] "How often the memory limit was hit.";
    MEMORY_FAILURES Counter "container_memory_failures_total" ["failure_type", "scope"]
        "Page faults, by kind, of the container's own cgroup and of all below it.";
    OOM_EVENTS Counter "container_oom_events_total" [] "Processes that the kernel killed for want of memory.";

    HUGETLB_USAGE Gauge "container_hugetlb_usage_bytes" ["pagesize"] "Huge pages in use, in bytes.";
    HUGETLB_MAX_USAGE Gauge "container_hugetlb_max_usage_bytes" ["pagesize"]
        "Most huge pages ever in use at once, in bytes; not kept on cgroup v2.";

    FS_USAGE Gauge "container_fs_usage_bytes" ["device"] "What the writable layer occupies, in bytes.";
    FS_LIMIT Gauge "container_fs_limit_bytes" ["device"] "Size of the filesystem of the writable layer, in bytes.";
    FS_INODES Gauge "container_fs_inodes_total" ["device"] "Inodes of the filesystem of the writable layer.";
    FS_INODES_FREE Gauge "container_fs_inodes_free" ["device"] "Free inodes of that filesystem.";
    FS_READS_BYTES Counter "container_fs_reads_bytes_total" ["device"] "Bytes read from the device.";
    FS_READS Counter "container_fs_reads_total" ["device"] "Finished reads from the device.";
    FS_WRITES_BYTES Counter "container_fs_writes_bytes_total" ["device"] "Bytes written to the device.";
    FS_WRITES Counter "container_fs_writes_total" ["device"] "Finished writes to the device.";
    BLKIO Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"]
        "Bytes moved to or from the device, by operation.";

    NETWORK_RX_BYTES Counter "container_network_receive_bytes_total" ["interface"] "Bytes received.";
    NETWORK_RX_PACKETS Counter "container_network_receive_packets_total" ["interface"] "Packets received.";
    NETWORK_RX_DROPPED Counter "container_network_receive_packets_dropped_total" ["interface"]
        "Packets dropped when received.";
    NETWORK_RX_ERRORS Counter "container_network_receive_errors_total" ["interface"] "Errors when receiving.";
    NETWORK_TX_BYTES Counter "container_network_transmit_bytes_total" ["interface"] "Bytes sent.";
    NETWORK_TX_PACKETS Counter "container_network_transmit_packets_total" ["interface"] "Packets sent.";
    NETWORK_TX_DROPPED Counter "container_network_transmit_packets_dropped_total" ["interface"]
        "Packets dropped when sent.";
    NETWORK_TX_ERRORS Counter "container_network_transmit_errors_total" ["interface"] "Errors when sending.";

    PROCESSES Gauge "container_processes" [] "Processes that exist.";
    THREADS Gauge "container_threads" [] "Threads that exist.";
    THREADS_MAX Gauge "container_threads_max" [] "Most threads that may exist; 0 for no limit.";
    DESCRIPTORS Gauge "container_file_descriptors" [] "Open file descriptors of all processes.";
    SOCKETS Gauge "container_sockets" [] "Open sockets of all processes.";
    ULIMITS Gauge "container_ulimits_soft" ["ulimit"]
        "Soft limits of the first process; one without a limit is left out.";

    SPEC_CPU_PERIOD Gauge "container_spec_cpu_period" [] "Period of the CPU quota, in microseconds.";
    SPEC_CPU_QUOTA Gauge "container_spec_cpu_quota" [] "CPU quota for each period, in microseconds.";
    SPEC_CPU_SHARES Gauge "container_spec_cpu_shares" [] "CPU shares.";
    SPEC_MEMORY_LIMIT Gauge "container_spec_memory_limit_bytes" [] "Memory limit in bytes; 0 for none.";
    SPEC_MEMORY_RESERVATION Gauge "container_spec_memory_reservation_limit_bytes" []
        "Memory reservation in bytes; 0 for none.";
    SPEC_MEMORY_SWAP Gauge "container_spec_memory_swap_limit_bytes" []
        "Swap limit in bytes, on cgroup v1 that of memory and swap together; 0 for none.";

    PRESSURE_CPU_WAITING Counter "container_pressure_cpu_waiting_seconds_total" []
        "Time in which some task waited for a processor, in seconds.";
    PRESSURE_CPU_STALLED Counter "container_pressure_cpu_stalled_seconds_total" []
        "Time in which all tasks waited for a processor, in seconds.";
    PRESSURE_MEMORY_WAITING Counter "container_pressure_memory_waiting_seconds_total" []
        "Time in which some task waited for memory, in seconds.";
    PRESSURE_MEMORY_STALLED Counter "container_pressure_memory_stalled_seconds_total" []
        "Time in which all tasks waited for memory, in seconds.";
    PRESSURE_IO_WAITING Counter "container_pressure_io_waiting_seconds_total" []
        "Time in which some task waited for a block device, in seconds.";
    PRESSURE_IO_STALLED Counter "container_pressure_io_stalled_seconds_total" []
        "Time in which all tasks waited for a block device, in seconds.";
}
