//! What turns a machine like every other into its pod's.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use rustix::fd::AsFd;

use super::{Doing, GuestError, network};
use crate::protocol::messages::Guest;
use crate::sandbox::{self, IdMap, PodNamespaces};

/// Fewest random bytes that a machine begins with.
const MIN_ENTROPY: usize = 32;
/// Most processors that are brought online by one request; the kernel is built for so many.
const MAX_CPUS: u32 = 64;

/// Entropy first, before anything that may draw a random number; then processors, network and sysctls. With `ids`, the
/// user and group ids of the pod's user namespace, that namespace and those that belong to it are made; the machine's
/// interface moves into them, and so does the caller's network.
pub(crate) fn become_the_pods(
    guest: &Guest,
    ids: Option<(IdMap, IdMap)>,
) -> Result<Option<PodNamespaces>, GuestError> {
    add_entropy(&guest.entropy)?;
    bring_online(guest.cpus.max(1))?;
    let own = ids.map(|(uids, gids)| PodNamespaces::make(uids, gids)).transpose();
    let own = own.doing(|| "make the pod's user namespace".into())?;
    let interface = network::interface()?;
    if let Some(own) = &own {
        network::enter(own.network.as_fd(), interface)?;
    }
    if let Some(network) = &guest.network {
        network::configure(network, interface)?;
    }
    write_sysctls(&guest.kernel_sysctls)?;
    Ok(own)
}

fn add_entropy(bytes: &[u8]) -> Result<(), GuestError> {
    if !(MIN_ENTROPY..=hull_sys::random::MAX_ENTROPY).contains(&bytes.len()) {
        return Err(GuestError::invalid(format!(
            "cannot use {} random bytes: {MIN_ENTROPY} to {} are needed",
            bytes.len(),
            hull_sys::random::MAX_ENTROPY
        )));
    }
    let add = || hull_sys::random::reseed(fs::File::open("/dev/urandom")?.as_fd(), bytes);
    add().doing(|| "add entropy".into())
}

fn write_sysctls(sysctls: &BTreeMap<String, String>) -> Result<(), GuestError> {
    let proc = fs::File::open("/proc").doing(|| "open /proc".into())?;
    sandbox::write_sysctls(proc.as_fd(), sysctls).map_err(|error| GuestError::invalid(error.to_string()))
}

/// Processors that are online.
pub(crate) fn online() -> u32 {
    fs::read_to_string("/sys/devices/system/cpu/online").map_or(1, |text| count(text.trim()))
}

/// How many numbers a list like `0-3,5` has.
fn count(list: &str) -> u32 {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()?.saturating_sub(first.parse().ok()?).saturating_add(1))
    });
    ranges.sum::<u32>().max(1)
}

/// Brings processors 1 to `cpus - 1` online and takes those above offline. The first one is always there.
pub(crate) fn bring_online(cpus: u32) -> Result<(), GuestError> {
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(GuestError::invalid(format!(
            "cannot run with {cpus} processors: 1 to {MAX_CPUS} are possible"
        )));
    }
    for number in 1..MAX_CPUS {
        let path = format!("/sys/devices/system/cpu/cpu{number}/online");
        let wanted = if number < cpus { "1" } else { "0" };
        let is = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && number < cpus => {
                return Err(GuestError::invalid(format!(
                    "cannot run with {cpus} processors: the machine was born with {number}"
                )));
            }
            Err(_) => return Ok(()),
        };
        if is.trim() != wanted {
            fs::write(&path, wanted).doing(|| format!("change processor {number}"))?;
        }
    }
    Ok(())
}

/// Memory of the machine and what of it is available, in bytes.
pub(crate) fn memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    let bytes = |name| field(name).unwrap_or(0).saturating_mul(1024);
    (bytes("MemTotal"), bytes("MemAvailable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_counted() {
        for (list, number) in [("0", 1), ("0-3", 4), ("0-1,3,5-6", 5), ("", 1), ("x", 1), ("3-1", 1)] {
            assert_eq!(count(list), number, "{list}");
        }
    }

    #[test]
    fn too_little_entropy_is_refused_before_anything_is_done() {
        let error = become_the_pods(&Guest { entropy: vec![1; 31], ..Guest::default() }, None).unwrap_err();
        assert!(error.to_string().contains("31 random bytes"), "{error}");
    }

    #[test]
    fn the_machines_memory_is_known() {
        let (total, available) = memory();
        assert!(total > available && available > 0);
        assert!(online() >= 1);
    }
}
