//! Answers that would lead a name of somebody else inside (DNS rebinding): addresses that only have a meaning on this side.
//! Pure.
//!
//! dnsmasq's `stop-dns-rebind`, unbound's `private-address`. What is found makes the answer empty, as theirs: "no such
//! record" ends a look-up at once, where REFUSED is no answer to musl, which would wait for five seconds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::Message;
use hickory_proto::rr::RData;
use hickory_proto::rr::rdata::svcb::{SVCB, SvcParamValue};
use ipnet::IpNet;

use crate::custom::Rebinding;

/// The first address of the answers that the rule keeps out; `ranges` are those of the cluster.
pub(super) fn leads_inside(message: &Message, rule: &Rebinding, ranges: &[IpNet]) -> Option<IpAddr> {
    let mut addresses = message.answers.iter().flat_map(|record| addresses(&record.data));
    addresses.find(|address| {
        let address = canonical(*address);
        ranges.iter().any(|range| range.contains(&address))
            || is_private(address)
            || !rule.localhost_ok && is_of_this_host(address)
    })
}

/// Every address that a client may take from the data.
fn addresses(data: &RData) -> Vec<IpAddr> {
    match data {
        RData::A(address) => vec![IpAddr::V4(address.0)],
        RData::AAAA(address) => vec![IpAddr::V6(address.0)],
        RData::HTTPS(https) => hints(&https.0),
        RData::SVCB(svcb) => hints(svcb),
        _ => Vec::new(),
    }
}

/// `ipv4hint`, `ipv6hint` (RFC 9460 section 7.3).
fn hints(svcb: &SVCB) -> Vec<IpAddr> {
    let hinted = svcb.svc_params.iter().flat_map(|(_, value)| match value {
        SvcParamValue::Ipv4Hint(hint) => hint.0.iter().map(|address| IpAddr::V4(address.0)).collect(),
        SvcParamValue::Ipv6Hint(hint) => hint.0.iter().map(|address| IpAddr::V6(address.0)).collect(),
        _ => Vec::new(),
    });
    hinted.collect()
}

/// An IPv4 address in any of its IPv6 dresses: mapped, compatible, NAT64 (RFC 6052 section 2.1).
fn canonical(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] if high != 0 => v4(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        _ => address,
    }
}

fn v4(high: u16, low: u16) -> IpAddr {
    let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

/// RFC 1918, RFC 3927; RFC 4193, RFC 4291 section 2.5.6, and the site-local ones that RFC 3879 gave up.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local() || is_site_local(v6),
    }
}

fn is_site_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfec0
}

/// Loopback, and 0.0.0.0/8 and ::, which systems take for it.
fn is_of_this_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{MessageType, OpCode};
    use hickory_proto::rr::rdata::svcb::{IpHint, SvcParamKey};
    use hickory_proto::rr::rdata::{A, AAAA, HTTPS};
    use hickory_proto::rr::{Name, Record};

    use super::*;

    fn found(data: Vec<RData>, rule: &Rebinding) -> Option<String> {
        let ranges = ["100.64.0.0/16".parse().unwrap(), "2001:db8:42::/48".parse().unwrap()];
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        let record = |data| Record::from_rdata(Name::from_ascii("www.example.com.").unwrap(), 60, data);
        message.answers = data.into_iter().map(record).collect();
        leads_inside(&message, rule, &ranges).map(|address| address.to_string())
    }

    fn found_address(text: &str, rule: &Rebinding) -> bool {
        let data = match text.parse().unwrap() {
            IpAddr::V4(v4) => RData::A(A(v4)),
            IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
        };
        found(vec![data], rule).is_some()
    }

    #[test]
    fn private_loopback_and_cluster_addresses_are_inside_and_others_are_not() {
        let rule = Rebinding::default();
        for inside in [
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "127.0.0.1",
            "0.0.0.0",
            "100.64.3.4",
            "::1",
            "::",
            "fd00::1",
            "fe80::1",
            "fec0::1",
            "2001:db8:42::7",
            "::ffff:10.1.2.3",
            "::10.1.2.3",
            "64:ff9b::a01:203",
            "::ffff:127.0.0.1",
        ] {
            assert!(found_address(inside, &rule), "{inside}");
        }
        for outside in
            ["192.0.2.1", "8.8.8.8", "172.32.0.1", "100.65.0.1", "2001:db8:43::1", "64:ff9b::808:808"]
        {
            assert!(!found_address(outside, &rule), "{outside}");
        }
    }

    #[test]
    fn loopback_can_be_let_in_by_itself() {
        let rule = Rebinding { localhost_ok: true, ..Rebinding::default() };
        assert!(!found_address("127.0.0.2", &rule), "as lists of blocked senders answer");
        assert!(!found_address("0.0.0.0", &rule) && !found_address("::1", &rule));
        assert!(found_address("10.0.0.1", &rule));
    }

    #[test]
    fn one_address_among_others_and_a_hint_are_seen() {
        let a = |text: &str| RData::A(A(text.parse().unwrap()));
        let rule = Rebinding::default();
        assert_eq!(found(vec![a("192.0.2.1"), a("192.168.0.1")], &rule).as_deref(), Some("192.168.0.1"));
        let hint = SvcParamValue::Ipv4Hint(IpHint(vec![A::new(10, 0, 0, 1)]));
        let https = HTTPS(SVCB::new(1, Name::root(), vec![(SvcParamKey::Ipv4Hint, hint)]));
        assert_eq!(found(vec![RData::HTTPS(https)], &rule).as_deref(), Some("10.0.0.1"));
    }
}
