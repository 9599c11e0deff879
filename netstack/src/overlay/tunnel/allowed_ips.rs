//! Cryptokey routing: from an address to the peer with the longest matching prefix.
//!
//! A table of hash maps by prefix length, longest first: a cluster uses two or three lengths a family, so a look-up is
//! as many probes. Built once per change, then only read.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// `T` names a peer.
#[derive(Debug)]
pub(super) struct AllowedIps<T> {
    v4: Vec<(u32, HashMap<u32, T>)>,
    v6: Vec<(u128, HashMap<u128, T>)>,
}

impl<T: Copy> AllowedIps<T> {
    /// Of two equal prefixes the later wins, as with `wg set`.
    pub(super) fn new(prefixes: impl IntoIterator<Item = (IpNet, T)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (prefix, peer) in prefixes {
            match prefix {
                IpNet::V4(net) => insert(&mut v4, net.netmask().to_bits(), net.network().to_bits(), peer),
                IpNet::V6(net) => insert(&mut v6, net.netmask().to_bits(), net.network().to_bits(), peer),
            }
        }
        v4.sort_by_key(|(mask, _)| std::cmp::Reverse(*mask));
        v6.sort_by_key(|(mask, _)| std::cmp::Reverse(*mask));
        Self { v4, v6 }
    }

    pub(super) fn lookup(&self, address: IpAddr) -> Option<T> {
        match address {
            IpAddr::V4(address) => longest(&self.v4, |mask| address.to_bits() & mask),
            IpAddr::V6(address) => longest(&self.v6, |mask| address.to_bits() & mask),
        }
    }
}

fn insert<M: PartialEq, A: Eq + std::hash::Hash, T>(
    lengths: &mut Vec<(M, HashMap<A, T>)>,
    mask: M,
    network: A,
    peer: T,
) {
    if let Some((_, networks)) = lengths.iter_mut().find(|(known, _)| *known == mask) {
        networks.insert(network, peer);
    } else {
        lengths.push((mask, HashMap::from([(network, peer)])));
    }
}

fn longest<M: Copy, A: Eq + std::hash::Hash, T: Copy>(
    lengths: &[(M, HashMap<A, T>)],
    masked: impl Fn(M) -> A,
) -> Option<T> {
    lengths.iter().find_map(|(mask, networks)| networks.get(&masked(*mask)).copied())
}

/// Source and destination of an IP packet and its true length, if the headers are whole and agree with each other.
pub(super) fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr, usize)> {
    match packet.first()? >> 4 {
        4 => {
            let header: &[u8; 20] = packet.first_chunk()?;
            let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
            let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
            let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
            (len >= 20 && len <= packet.len()).then_some((source.into(), destination.into(), len))
        }
        6 => {
            let header: &[u8; 40] = packet.first_chunk()?;
            let len = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
            let source: [u8; 16] = header[8..24].try_into().ok()?;
            let destination: [u8; 16] = header[24..40].try_into().ok()?;
            (len <= packet.len()).then_some((
                Ipv6Addr::from(source).into(),
                Ipv6Addr::from(destination).into(),
                len,
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_of_the_family_wins() {
        let table = AllowedIps::new([
            (net("0.0.0.0/0"), 0),
            (net("10.1.0.0/16"), 1),
            (net("10.1.2.0/24"), 2),
            (net("10.1.2.3/32"), 3),
            (net("fd00::/16"), 4),
            (net("fd00:1::/64"), 5),
        ]);
        let peer = |text: &str| table.lookup(text.parse().unwrap());
        assert_eq!(peer("10.1.2.3"), Some(3));
        assert_eq!(peer("10.1.2.4"), Some(2));
        assert_eq!(peer("10.1.3.4"), Some(1));
        assert_eq!(peer("192.0.2.1"), Some(0));
        assert_eq!(peer("fd00:1::9"), Some(5));
        assert_eq!(peer("fd00:2::9"), Some(4));
        assert_eq!(peer("2001:db8::1"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_address_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Some((source, destination, len)) = addresses(&bytes) {
                prop_assert!(len <= bytes.len());
                prop_assert_eq!(source.is_ipv4(), destination.is_ipv4());
            }
        }

        #[test]
        fn a_lookup_agrees_with_a_linear_search(
            prefixes in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..40), address in any::<u32>(),
        ) {
            let nets: Vec<_> = prefixes.iter().enumerate()
                .map(|(i, (bits, len))| (IpNet::new(Ipv4Addr::from(*bits).into(), *len).unwrap(), i)).collect();
            let address = IpAddr::from(Ipv4Addr::from(address));
            let naive = nets.iter().filter(|(net, _)| net.contains(&address))
                .max_by_key(|(net, i)| (net.prefix_len(), *i)).map(|(_, i)| *i);
            prop_assert_eq!(AllowedIps::new(nets.clone()).lookup(address), naive);
        }
    }
}
