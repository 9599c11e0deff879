//! Anti-spoofing (decision 4): a pod's packet must bear an address that is leased to the pod's link. Pure.
//!
//! One chain of table `weft-cni` at raw priority, before connection tracking and every NAT.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use weft_model::constants::{POD_LINK_PREFIX, PRIORITY_RAW};
use weft_model::ruleset::{
    Base, Chain, ChainKind, Datum, ElementData, Field, Hook, KeyType, Rule, Set, SetData, Statement, Table,
    Verdict,
};

use crate::store::Lease;

const SOURCES_V4: &str = "pod-sources-v4";
const SOURCES_V6: &str = "pod-sources-v6";
/// ICMPv6 neighbour solicitation (RFC 4861 section 4.3): its source may be unspecified (duplicate-address detection).
const NEIGHBOUR_SOLICITATION: u8 = 135;

/// A live lease's source address on its link.
pub(super) fn elements(
    address: IpAddr,
    lease: &Lease,
) -> impl Iterator<Item = (&'static str, Vec<Datum>, ElementData)> {
    let set = if address.is_ipv6() { SOURCES_V6 } else { SOURCES_V4 };
    let key = vec![Datum::Name(lease.link.as_str().into()), Datum::Ip(address)];
    std::iter::once((set, key, ElementData::None))
}

/// Adds chains and empty sets.
pub(super) fn declare(table: &mut Table) {
    let base = Base { kind: ChainKind::Filter, hook: Hook::Prerouting, priority: PRIORITY_RAW };
    for (name, chain) in [
        ("prerouting", Chain { base: Some(base), rules: vec![from_pods()] }),
        ("pod-source", Chain { base: None, rules: pod_source_rules() }),
    ] {
        table.chains.insert(name.to_owned(), chain);
    }
    for (name, address) in [(SOURCES_V4, KeyType::Ipv4Address), (SOURCES_V6, KeyType::Ipv6Address)] {
        table.sets.insert(name.to_owned(), Set::new(vec![KeyType::LinkName, address], SetData::None));
    }
}

fn from_pods() -> Rule {
    Rule::new(vec![
        Statement::equals(Field::InputLink, Datum::NamePrefix(POD_LINK_PREFIX.into())),
        Statement::Verdict(Verdict::Jump("pod-source".into())),
    ])
    .comment("what pods send")
}

/// Link-local IPv6 never leaves the link; everything else must be leased. Links of pods with a hostPort let the node's
/// loopback addresses pass (`route_localnet`), for the node's own clients only.
fn pod_source_rules() -> Vec<Rule> {
    let leased = |source: Field, set: &str| Statement::Lookup {
        key: vec![Field::InputLink, source],
        negated: false,
        set: set.to_owned(),
    };
    let accept = Statement::Verdict(Verdict::Return);
    let link_local = IpNet::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10);
    let loopback = IpNet::new_assert(Ipv4Addr::LOCALHOST.into(), 8).trunc();
    vec![
        Rule::new(vec![
            Statement::equals(Field::Ip4Destination, Datum::Net(loopback)),
            Statement::Counter,
            Statement::Verdict(Verdict::Drop),
        ])
        .comment("loopback is the node's own"),
        Rule::new(vec![leased(Field::Ip4Source, SOURCES_V4), accept.clone()]),
        Rule::new(vec![leased(Field::Ip6Source, SOURCES_V6), accept.clone()]),
        Rule::new(vec![Statement::equals(Field::Ip6Source, Datum::Net(link_local)), accept.clone()])
            .comment("link-local: neighbour discovery, never forwarded"),
        Rule::new(vec![
            Statement::equals(Field::Ip6Source, Datum::Ip(Ipv6Addr::UNSPECIFIED.into())),
            Statement::equals(Field::Icmp6Type, Datum::Icmp6Type(NEIGHBOUR_SOLICITATION)),
            accept,
        ])
        .comment("duplicate-address detection"),
        Rule::new(vec![Statement::Counter, Statement::Verdict(Verdict::Drop)])
            .comment("not an address leased to this pod"),
    ]
}
