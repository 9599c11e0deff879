//! Arithmetic on address ranges: the n-th address, the n-th subnet, the first free one from a starting point. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Addresses of a range that are looked at: a larger range (IPv6) is used only up to here.
const MOST_ADDRESSES: u128 = 1 << 20;

/// Addresses a Service may have: the network address and the last one of an IPv4 range are left out.
fn usable(range: &IpNet) -> u128 {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let all = 1_u128.checked_shl(bits).unwrap_or(u128::MAX);
    let left_out = if range.addr().is_ipv4() { 2 } else { 1 };
    all.saturating_sub(left_out).min(MOST_ADDRESSES)
}

/// The n-th usable address, counted from 0: `nth_address(10.96.0.0/12, 0)` is `10.96.0.1`.
#[must_use]
pub(crate) fn nth_address(range: &IpNet, index: u128) -> Option<IpAddr> {
    (index < usable(range)).then(|| offset(range.network(), index + 1))
}

/// `base + n`, wrapping at the end of the family.
fn offset(base: IpAddr, n: u128) -> IpAddr {
    match base {
        #[allow(clippy::cast_possible_truncation)] // offsets inside an IPv4 range fit
        IpAddr::V4(it) => Ipv4Addr::from(u32::from(it).wrapping_add(n as u32)).into(),
        IpAddr::V6(it) => Ipv6Addr::from(u128::from(it).wrapping_add(n)).into(),
    }
}

/// A free address. The first addresses are left for explicit use while others are free (KEP-3070), as in Kubernetes:
/// min(max(16, size / 16), 256) of them.
pub(crate) fn free_address(range: &IpNet, random: u128, is_free: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let size = usable(range);
    let reserved = (size / 16).clamp(16, 256).min(size);
    rotated(reserved, size, random)
        .chain(0..reserved)
        .filter_map(|index| nth_address(range, index))
        .find(|address| is_free(*address))
}

/// All of `from..to`, beginning at a random place.
fn rotated(from: u128, to: u128, random: u128) -> Box<dyn Iterator<Item = u128>> {
    if from >= to {
        return Box::new(std::iter::empty());
    }
    let start = from + random % (to - from);
    Box::new((start..to).chain(from..start))
}

/// A free port of an inclusive range; the first 86 of the default range are left for explicit use (KEP-3668).
pub(crate) fn free_port(from: u64, to: u64, random: u128, is_free: impl Fn(u64) -> bool) -> Option<u64> {
    let size = to + 1 - from;
    let reserved = (size / 32).clamp(16, 128).min(size);
    let dynamic = rotated(u128::from(from + reserved), u128::from(to) + 1, random);
    dynamic
        .filter_map(|port| u64::try_from(port).ok())
        .chain(from..from + reserved)
        .find(|port| is_free(*port))
}

/// The subnets of a range with the given prefix length, in order.
pub(crate) fn subnets(range: &IpNet, prefix_length: u8) -> impl Iterator<Item = IpNet> {
    let network = range.network();
    let bits = prefix_length.saturating_sub(range.prefix_len());
    let step =
        1_u128.checked_shl(u32::from(range.max_prefix_len().saturating_sub(prefix_length))).unwrap_or(0);
    let count = 1_u128.checked_shl(u32::from(bits)).unwrap_or(u128::MAX);
    (0..count)
        .map_while(move |index| IpNet::new(offset(network, index.wrapping_mul(step)), prefix_length).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_leave_out_the_ends_of_the_range() {
        assert_eq!(nth_address(&net("10.96.0.0/30"), 0), Some("10.96.0.1".parse().unwrap()));
        assert_eq!(nth_address(&net("10.96.0.0/30"), 1), Some("10.96.0.2".parse().unwrap()));
        assert_eq!(nth_address(&net("10.96.0.0/30"), 2), None);
        assert_eq!(nth_address(&net("fd00::/112"), 0), Some("fd00::1".parse().unwrap()));
    }

    #[test]
    fn a_whole_range_can_be_given_out_and_then_there_is_none() {
        let range = net("10.0.0.0/27");
        let mut used = Vec::new();
        while let Some(address) = free_address(&range, 7, |it| !used.contains(&it)) {
            used.push(address);
        }
        assert_eq!(used.len(), 30);
        assert!(used[0] > "10.0.0.16".parse::<IpAddr>().unwrap(), "explicit addresses are spared");
    }

    #[test]
    fn ports_beyond_the_explicit_ones_come_first() {
        assert_eq!(free_port(30000, 32767, 0, |_| true), Some(30086));
        assert_eq!(free_port(30000, 30000, 5, |_| true), Some(30000));
        assert_eq!(free_port(30000, 32767, 5, |_| false), None);
    }

    #[test]
    fn subnets_come_in_order() {
        let ranges: Vec<IpNet> = subnets(&net("10.244.0.0/22"), 24).collect();
        assert_eq!(
            ranges,
            [net("10.244.0.0/24"), net("10.244.1.0/24"), net("10.244.2.0/24"), net("10.244.3.0/24")]
        );
        assert_eq!(subnets(&net("fd00:1::/56"), 64).nth(2), Some(net("fd00:1:0:2::/64")));
    }
}
