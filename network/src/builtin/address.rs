use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// An address is not given again for so long after its link is gone, if there is any other: peers and connection
/// tracking forget meanwhile.
const QUARANTINE: Duration = Duration::from_secs(60);

/// Chooses addresses in turn, so that one that was used is the last to be used again.
#[derive(Debug, Default)]
pub(super) struct Pool {
    /// For each range the address that was given last.
    last: HashMap<IpNet, IpAddr>,
    released: HashMap<IpAddr, Instant>,
}

/// What of a pool is kept across restarts.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cursors(Vec<(IpNet, IpAddr)>);

impl Pool {
    pub(super) fn restore(cursors: Cursors) -> Self {
        Self { last: cursors.0.into_iter().collect(), released: HashMap::new() }
    }

    pub(super) fn cursors(&self) -> Cursors {
        Cursors(self.last.iter().map(|(subnet, address)| (*subnet, *address)).collect())
    }

    /// A free address of the range with the range's prefix. `used` are those that pods have.
    pub(super) fn take(
        &mut self,
        pod: &str,
        subnet: IpNet,
        used: &HashSet<IpAddr>,
        now: Instant,
    ) -> Result<IpNet, NetworkError> {
        let exhausted = || NetworkError::NoAddress { pod: pod.to_owned(), subnet };
        self.released.retain(|_, since| now.duration_since(*since) < QUARANTINE);
        let (first, end) = usable(subnet);
        let from = self.last.get(&subnet).map_or(first, |last| number(*last) + 1);
        let from = if (first..end).contains(&from) { from } else { first };
        let free = |n: &u128| !used.contains(&address(subnet, *n));
        let number = (from..end)
            .chain(first..from)
            // Not more are ever in use or in quarantine, so one more candidate is enough.
            .take(used.len() + self.released.len() + 1)
            .find(|n| free(n) && !self.released.contains_key(&address(subnet, *n)))
            .or_else(|| self.longest_released(subnet).filter(free))
            .ok_or_else(exhausted)?;
        let chosen = address(subnet, number);
        self.released.remove(&chosen);
        self.last.insert(subnet, chosen);
        IpNet::new(chosen, subnet.prefix_len()).map_err(|_| exhausted())
    }

    /// The address is nobody's any more.
    pub(super) fn release(&mut self, address: IpAddr, now: Instant) {
        self.released.insert(address, now);
    }

    fn longest_released(&self, subnet: IpNet) -> Option<u128> {
        let inside = self.released.iter().filter(|(address, _)| subnet.contains(*address));
        inside.min_by_key(|(_, since)| **since).map(|(address, _)| number(*address))
    }
}

/// The bridge's own address in a range: its first.
pub(super) fn gateway(subnet: IpNet) -> IpNet {
    let first = address(subnet, number(subnet.network()) + 1);
    IpNet::new(first, subnet.prefix_len()).unwrap_or(subnet)
}

/// Whether pods can live in the range: room for the bridge and a few pods, and not absurdly wide.
pub(super) fn check(subnet: IpNet) -> Result<(), NetworkError> {
    let allowed = if subnet.addr().is_ipv4() { 8..=29 } else { 48..=120 };
    if allowed.contains(&subnet.prefix_len()) && !subnet.addr().is_multicast() && !subnet.addr().is_loopback()
    {
        return Ok(());
    }
    let (least, most) = (allowed.start(), allowed.end());
    Err(NetworkError::Config(format!(
        "{subnet} cannot be a range for pods: the prefix must be from {least} to {most}"
    )))
}

/// First number and the one after the last that pods get: not the network, the bridge, nor the broadcast address.
fn usable(subnet: IpNet) -> (u128, u128) {
    let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
    let network = number(subnet.network());
    (network + 2, network + (1u128 << bits) - 1)
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

fn address(subnet: IpNet, number: u128) -> IpAddr {
    match subnet {
        IpNet::V4(_) => Ipv4Addr::from(number as u32).into(),
        IpNet::V6(_) => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(
        pool: &mut Pool,
        subnet: &str,
        used: &HashSet<IpAddr>,
        now: Instant,
    ) -> Result<String, NetworkError> {
        pool.take("pod", subnet.parse().unwrap(), used, now).map(|net| net.to_string())
    }

    #[test]
    fn addresses_are_given_in_turn_and_the_range_ends_before_the_broadcast_address() {
        let (mut pool, mut used, now) = (Pool::default(), HashSet::new(), Instant::now());
        for last in 2..=6 {
            let net = pool.take("pod", "10.1.2.0/29".parse().unwrap(), &used, now).unwrap();
            assert_eq!(net.to_string(), format!("10.1.2.{last}/29"));
            used.insert(net.addr());
        }
        let error = take(&mut pool, "10.1.2.0/29", &used, now).unwrap_err().to_string();
        assert!(error.contains("no free address") && error.contains("10.1.2.0/29"), "{error}");
    }

    #[test]
    fn a_released_address_is_the_last_to_be_given_again() {
        let (mut pool, used, now) = (Pool::default(), HashSet::new(), Instant::now());
        let mut given = Vec::new();
        for round in 0..7 {
            let at = now + Duration::from_millis(round);
            let address = pool.take("pod", "10.1.2.0/29".parse().unwrap(), &used, at).unwrap();
            pool.release(address.addr(), at);
            given.push(address.addr().to_string());
        }
        // Five addresses, then the longest released ones although they are in quarantine.
        assert_eq!(given[..5].iter().collect::<HashSet<_>>().len(), 5);
        assert_eq!(given[5..], given[..2]);
    }

    #[test]
    fn the_turn_goes_on_after_a_restart() {
        let (mut pool, used, now) = (Pool::default(), HashSet::new(), Instant::now());
        take(&mut pool, "fd00::/64", &used, now).unwrap();
        let mut pool = Pool::restore(pool.cursors());
        assert_eq!(take(&mut pool, "fd00::/64", &used, now).unwrap(), "fd00::3/64");
    }

    #[test]
    fn the_bridge_has_the_first_address() {
        assert_eq!(gateway("10.1.2.0/24".parse().unwrap()).to_string(), "10.1.2.1/24");
        assert_eq!(gateway("fd00::/64".parse().unwrap()).to_string(), "fd00::1/64");
    }

    #[test]
    fn ranges_without_room_are_refused() {
        for subnet in ["10.0.0.0/30", "10.0.0.0/7", "fd00::/121", "fd00::/47", "127.0.0.0/8", "224.0.0.0/8"] {
            assert!(check(subnet.parse().unwrap()).is_err(), "{subnet}");
        }
        check("10.0.0.0/29".parse().unwrap()).unwrap();
        check("fd00::/64".parse().unwrap()).unwrap();
    }
}
