//! What is told of a container, and what of that also of a pod as a whole.

use hull_agent::cgroup::stats::{DeviceIo, Limits, Stalls, Usage};

use super::super::disk::{Filesystem, Occupied, device_name};
use super::super::{Details, Measured};
use super::definitions::*;
use super::{Labels, Sheet};
use crate::api::runtime::Metric;

const NANOSECONDS: u64 = 1_000_000_000;
const MICROSECONDS: u64 = 1_000_000;

/// A container's writable layer.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    /// What it occupies; `None` if that is not known yet.
    pub occupied: Option<Occupied>,
    /// What it lies on.
    pub filesystem: Filesystem,
}

/// The metrics of a running container. `started_at` is in nanoseconds since 1970.
pub fn container(labels: &Labels, measured: &Measured, layer: &Layer, started_at: i64) -> Vec<Metric> {
    let mut sheet = Sheet::new(labels);
    sheet.add(&START_TIME, &[], u64::try_from(started_at).unwrap_or(0) / NANOSECONDS);
    common(&mut sheet, measured);
    filesystem(&mut sheet, layer);
    spec(&mut sheet, &measured.limits);
    if let Some(Details { descriptors, sockets, ulimits }) = &measured.details {
        sheet.add(&DESCRIPTORS, &[], *descriptors);
        sheet.add(&SOCKETS, &[], *sockets);
        for (name, value) in ulimits {
            sheet.add(&ULIMITS, &[name], *value);
        }
    }
    sheet.metrics
}

/// What containers and pods both have.
pub(super) fn common(sheet: &mut Sheet<'_>, measured: &Measured) {
    sheet.add(&LAST_SEEN, &[], u64::try_from(measured.at).unwrap_or(0) / NANOSECONDS);
    cpu(sheet, measured);
    memory(sheet, &measured.usage);
    for device in &measured.usage.io {
        transfers(sheet, device);
    }
    let usage = &measured.usage;
    sheet.add(&PROCESSES, &[], measured.processes);
    if let Some(tasks) = usage.tasks {
        sheet.add(&THREADS, &[], tasks);
        sheet.add(&THREADS_MAX, &[], usage.tasks_limit.unwrap_or(0));
    }
    let pressure = &usage.pressure;
    stalls(sheet, &PRESSURE_CPU_WAITING, &PRESSURE_CPU_STALLED, pressure.cpu);
    stalls(sheet, &PRESSURE_MEMORY_WAITING, &PRESSURE_MEMORY_STALLED, pressure.memory);
    stalls(sheet, &PRESSURE_IO_WAITING, &PRESSURE_IO_STALLED, pressure.io);
}

fn cpu(sheet: &mut Sheet<'_>, measured: &Measured) {
    let Some(cpu) = measured.usage.cpu else { return };
    // kubelet's cAdvisor does not tell processors apart either.
    sheet.add(&CPU_USAGE, &["total"], cpu.usage / NANOSECONDS);
    sheet.add(&CPU_USER, &[], cpu.user / NANOSECONDS);
    sheet.add(&CPU_SYSTEM, &[], cpu.system / NANOSECONDS);
    // As cAdvisor: without a quota there is nothing to tell.
    if measured.limits.cpu.quota.is_some() {
        sheet.add(&CFS_PERIODS, &[], cpu.periods);
        sheet.add(&CFS_THROTTLED, &[], cpu.throttled_periods);
        sheet.add(&CFS_THROTTLED_TIME, &[], cpu.throttled / NANOSECONDS);
    }
}

fn memory(sheet: &mut Sheet<'_>, usage: &Usage) {
    for pages in &usage.hugepages {
        sheet.add(&HUGETLB_USAGE, &[&pages.size], pages.usage);
        sheet.add_known(&HUGETLB_MAX_USAGE, &[&pages.size], pages.max_usage);
    }
    let Some(memory) = &usage.memory else { return };
    sheet.add(&MEMORY_USAGE, &[], memory.usage);
    // Before 5.19 v2 does not keep it; what is used now is the best that is known.
    sheet.add(&MEMORY_MAX_USAGE, &[], memory.max_usage.unwrap_or(memory.usage));
    sheet.add(&MEMORY_WORKING_SET, &[], memory.working_set);
    sheet.add(&MEMORY_RSS, &[], memory.rss);
    sheet.add(&MEMORY_CACHE, &[], memory.cache);
    sheet.add(&MEMORY_MAPPED_FILE, &[], memory.mapped_file);
    sheet.add(&MEMORY_KERNEL, &[], memory.kernel);
    sheet.add(&MEMORY_SWAP, &[], memory.swap.unwrap_or(0));
    sheet.add(&MEMORY_FAILCNT, &[], memory.limit_hits);
    sheet.add(&OOM_EVENTS, &[], memory.oom_kills);
    sheet.add(&MEMORY_FAILURES, &["pgfault", "container"], memory.own_faults);
    sheet.add(&MEMORY_FAILURES, &["pgmajfault", "container"], memory.own_major_faults);
    sheet.add(&MEMORY_FAILURES, &["pgfault", "hierarchy"], memory.faults);
    sheet.add(&MEMORY_FAILURES, &["pgmajfault", "hierarchy"], memory.major_faults);
}

fn transfers(sheet: &mut Sheet<'_>, io: &DeviceIo) {
    let device = device_name(io.major, io.minor);
    sheet.add(&FS_READS_BYTES, &[&device], io.read_bytes);
    sheet.add(&FS_READS, &[&device], io.reads);
    sheet.add(&FS_WRITES_BYTES, &[&device], io.written_bytes);
    sheet.add(&FS_WRITES, &[&device], io.writes);
    let (major, minor) = (io.major.to_string(), io.minor.to_string());
    sheet.add(&BLKIO, &[&device, &major, &minor, "Read"], io.read_bytes);
    sheet.add(&BLKIO, &[&device, &major, &minor, "Write"], io.written_bytes);
}

fn stalls(sheet: &mut Sheet<'_>, waiting: &Definition, stalled: &Definition, stalls: Option<Stalls>) {
    if let Some(stalls) = stalls {
        sheet.add(waiting, &[], stalls.some.total / MICROSECONDS);
        sheet.add(stalled, &[], stalls.full.total / MICROSECONDS);
    }
}

fn filesystem(sheet: &mut Sheet<'_>, layer: &Layer) {
    let Filesystem { device, bytes, inodes, free_inodes } = &layer.filesystem;
    sheet.add_known(&FS_USAGE, &[device], layer.occupied.map(|occupied| occupied.bytes));
    sheet.add(&FS_LIMIT, &[device], *bytes);
    sheet.add(&FS_INODES, &[device], *inodes);
    sheet.add(&FS_INODES_FREE, &[device], *free_inodes);
}

fn spec(sheet: &mut Sheet<'_>, limits: &Limits) {
    let Limits { cpu, memory } = limits;
    sheet.add_known(&SPEC_CPU_PERIOD, &[], cpu.period);
    sheet.add_known(&SPEC_CPU_QUOTA, &[], cpu.quota);
    sheet.add_known(&SPEC_CPU_SHARES, &[], cpu.shares);
    sheet.add(&SPEC_MEMORY_LIMIT, &[], memory.memory.unwrap_or(0));
    sheet.add(&SPEC_MEMORY_RESERVATION, &[], memory.reservation.unwrap_or(0));
    sheet.add(&SPEC_MEMORY_SWAP, &[], memory.swap_as_written.unwrap_or(0));
}
