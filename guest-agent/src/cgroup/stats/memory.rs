//! Memory, swap and huge pages.

use super::super::CgroupError;
use super::super::hierarchies::Version;
use super::{Reader, field};

/// v1 shows "no limit" as the largest number of whole pages; nobody has this much.
const UNLIMITED: u64 = 1 << 62;
/// Sizes that Linux has on any architecture, as its control files name them.
const PAGE_SIZES: [&str; 7] = ["64KB", "2MB", "16MB", "32MB", "512MB", "1GB", "16GB"];

/// Memory in use, in bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All that is charged, page cache and kernel memory included.
    pub usage: u64,
    /// Most that was ever charged at once; `None` on v2 before 5.19.
    pub max_usage: Option<u64>,
    /// [`Self::usage`] without the file pages that have not been used lately: what cAdvisor and kubelet call the
    /// working set, and what evictions go by.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Pages of files.
    pub cache: u64,
    /// Pages of files that are mapped.
    pub mapped_file: u64,
    /// Memory of the kernel's own.
    pub kernel: u64,
    /// Swap in use.
    pub swap: Option<u64>,
    /// Page faults so far.
    pub faults: u64,
    /// Page faults so far that waited for a disk.
    pub major_faults: u64,
    /// The same two without those of cgroups below this one; on v2 nobody counts them apart.
    pub own_faults: u64,
    /// See [`Self::own_faults`].
    pub own_major_faults: u64,
    /// How often the limit was hit.
    pub limit_hits: u64,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: u64,
}

/// Limits of memory in bytes; `None` for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Of memory.
    pub memory: Option<u64>,
    /// Of swap alone, whatever the version.
    pub swap: Option<u64>,
    /// v1: memory and swap together. v2: swap. As cAdvisor shows it.
    pub swap_as_written: Option<u64>,
    /// What is kept for it when memory is short (v1: the soft limit).
    pub reservation: Option<u64>,
}

/// Huge pages of one size, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hugepages {
    /// "2MB", "1GB" …
    pub size: String,
    /// In use.
    pub usage: u64,
    /// Most that was ever in use; v2 does not keep it.
    pub max_usage: Option<u64>,
}

pub(super) fn usage(reader: Reader<'_>) -> Result<Option<Memory>, CgroupError> {
    match reader.version("memory") {
        None => Ok(None),
        Some(version @ Version::V1(_)) => v1(reader, version),
        Some(version @ Version::V2) => v2(reader, version),
    }
}

fn v1(reader: Reader<'_>, version: Version) -> Result<Option<Memory>, CgroupError> {
    let Some(usage) = reader.number_in(version, "memory.usage_in_bytes")? else { return Ok(None) };
    let stat = reader.text(version, "memory.stat")?.unwrap_or_default();
    // Of the cgroups below, too: a container may have made some.
    let total = |key: &str| field(&stat, &format!("total_{key}")).or(field(&stat, key));
    let events = reader.text(version, "memory.oom_control")?.unwrap_or_default();
    Ok(Some(Memory {
        usage,
        max_usage: reader.number_in(version, "memory.max_usage_in_bytes")?,
        working_set: usage.saturating_sub(total("inactive_file").unwrap_or(0)),
        rss: total("rss").unwrap_or(0),
        cache: total("cache").unwrap_or(0),
        mapped_file: total("mapped_file").unwrap_or(0),
        kernel: reader.number_in(version, "memory.kmem.usage_in_bytes")?.unwrap_or(0),
        swap: total("swap"),
        faults: total("pgfault").unwrap_or(0),
        major_faults: total("pgmajfault").unwrap_or(0),
        own_faults: field(&stat, "pgfault").unwrap_or(0),
        own_major_faults: field(&stat, "pgmajfault").unwrap_or(0),
        limit_hits: reader.number_in(version, "memory.failcnt")?.unwrap_or(0),
        oom_kills: field(&events, "oom_kill").unwrap_or(0),
    }))
}

fn v2(reader: Reader<'_>, version: Version) -> Result<Option<Memory>, CgroupError> {
    let Some(usage) = reader.number_in(version, "memory.current")? else { return Ok(None) };
    let stat = reader.text(version, "memory.stat")?.unwrap_or_default();
    let events = reader.text(version, "memory.events")?.unwrap_or_default();
    let number = |key| field(&stat, key).unwrap_or(0);
    // The sum is there since 5.18; before that its largest parts are.
    let kernel = field(&stat, "kernel").unwrap_or_else(|| {
        ["kernel_stack", "pagetables", "percpu", "sock", "slab"].into_iter().map(number).sum()
    });
    Ok(Some(Memory {
        usage,
        max_usage: reader.number_in(version, "memory.peak")?,
        working_set: usage.saturating_sub(number("inactive_file")),
        rss: number("anon"),
        cache: number("file"),
        mapped_file: number("file_mapped"),
        kernel,
        swap: reader.number_in(version, "memory.swap.current")?,
        faults: number("pgfault"),
        major_faults: number("pgmajfault"),
        own_faults: number("pgfault"),
        own_major_faults: number("pgmajfault"),
        limit_hits: field(&events, "max").unwrap_or(0),
        oom_kills: field(&events, "oom_kill").unwrap_or(0),
    }))
}

pub(super) fn limits(reader: Reader<'_>) -> Result<MemoryLimits, CgroupError> {
    let Some(version) = reader.version("memory") else { return Ok(MemoryLimits::default()) };
    let read = |file| {
        let limit = reader.number_in(version, file)?;
        Ok::<_, CgroupError>(limit.filter(|limit| *limit < UNLIMITED))
    };
    match version {
        Version::V1(_) => {
            let memory = read("memory.limit_in_bytes")?;
            let both = read("memory.memsw.limit_in_bytes")?;
            let swap = memory.zip(both).map(|(memory, both)| both.saturating_sub(memory));
            let reservation = read("memory.soft_limit_in_bytes")?;
            Ok(MemoryLimits { memory, swap, swap_as_written: both, reservation })
        }
        Version::V2 => {
            let swap = read("memory.swap.max")?;
            let reservation = read("memory.min")?.filter(|bytes| *bytes > 0);
            Ok(MemoryLimits { memory: read("memory.max")?, swap, swap_as_written: swap, reservation })
        }
    }
}

pub(super) fn hugepages(reader: Reader<'_>) -> Result<Vec<Hugepages>, CgroupError> {
    let Some(version) = reader.version("hugetlb") else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for size in PAGE_SIZES {
        let (usage, max_usage) = match version {
            Version::V1(_) => (
                reader.number_in(version, &format!("hugetlb.{size}.usage_in_bytes"))?,
                reader.number_in(version, &format!("hugetlb.{size}.max_usage_in_bytes"))?,
            ),
            Version::V2 => (reader.number_in(version, &format!("hugetlb.{size}.current"))?, None),
        };
        if let Some(usage) = usage {
            found.push(Hugepages { size: size.to_owned(), usage, max_usage });
        }
    }
    Ok(found)
}
