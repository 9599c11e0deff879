//! The nft table `weft-host`: strictness, masquerade towards the outside, cluster DNS. Pure.
//!
//! ```text
//!  raw-prerouting (-300)  from the underlay --> from-underlay: with a pod's source: drop
//!  masquerade       (95)  own pod -> outside: masquerade
//!  underlay-out    (300)  to the underlay --> to-underlay: with a pod's source or destination: drop
//! ```
//!
//! The rules of `cluster_dns` stand among them. Every packet of the node passes here, so each is asked once over which link it
//! goes, and answers of cluster DNS, which are what the node sends most of by itself, leave at the first rules.
//!
//! And what the firewalls of other programs must let through, since an accept here cannot override their drop.
//!
//! The table holds without the tunnel device, without peers and without the agent (decision 5).

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::ClusterConfig;
use weft_model::constants::{
    POD_LINK_PREFIX, PRIORITY_DNAT, PRIORITY_LAST, PRIORITY_RAW, PRIORITY_SNAT, TABLE_HOST, TUNNEL_LINK,
};
use weft_model::ruleset::{
    Base, Chain, ChainKind, Datum, ElementData, Elements, Field, Groups, Hook, KeyType, Passage, Rule, Set,
    SetData, Statement, Table, Verdict,
};

use super::cluster_dns::{self, Resolvers, TRANSPORTS};
use super::quarantine::Accepted;

const FROM_UNDERLAY: &str = "from-underlay";
const TO_UNDERLAY: &str = "to-underlay";

/// Names of sets and fields of one family.
pub(super) struct Family {
    cluster: &'static str,
    nodes: &'static str,
    /// DNS addresses that give signs of life.
    pub(super) answering: &'static str,
    pub(super) key: KeyType,
    pub(super) source: Field,
    pub(super) destination: Field,
    pub(super) icmp: Field,
    pub(super) icmp_error_destination: Field,
    /// Type "destination unreachable" (RFC 792, RFC 4443).
    pub(super) unreachable: Datum,
}

const V4: Family = Family {
    cluster: "cluster4",
    nodes: "nodes4",
    answering: "answering4",
    key: KeyType::Ipv4Address,
    source: Field::Ip4Source,
    destination: Field::Ip4Destination,
    icmp: Field::Icmp4Type,
    icmp_error_destination: Field::Icmp4ErrorDestination,
    unreachable: Datum::Icmp4Type(3),
};
const V6: Family = Family {
    cluster: "cluster6",
    nodes: "nodes6",
    answering: "answering6",
    key: KeyType::Ipv6Address,
    source: Field::Ip6Source,
    destination: Field::Ip6Destination,
    icmp: Field::Icmp6Type,
    icmp_error_destination: Field::Icmp6ErrorDestination,
    unreachable: Datum::Icmp6Type(1),
};

pub(super) fn family_of(address: IpAddr) -> &'static Family {
    if address.is_ipv4() { &V4 } else { &V6 }
}

/// `own_pod_cidrs` are this node's; `nodes` are all that were accepted, this one included.
pub(super) fn table(
    config: &ClusterConfig,
    nodes: &[Accepted<'_>],
    own_pod_cidrs: &[IpNet],
    resolvers: &Resolvers<'_>,
) -> Table {
    let mut table = Table { name: TABLE_HOST.to_owned(), ..Table::default() };
    for family in [&V4, &V6] {
        table.sets.insert(family.cluster.to_owned(), cluster_set(family, config));
        table.sets.insert(family.nodes.to_owned(), node_set(family, nodes));
    }
    table.sets.extend(Resolvers::sets([&V4, &V6]));
    let mut raw_prerouting = vec![over_underlay(Field::InputLink, FROM_UNDERLAY)];
    raw_prerouting.extend(Resolvers::prerouting());
    let underlay_out = vec![over_underlay(Field::OutputLink, TO_UNDERLAY)];
    let mut from_underlay: Vec<Rule> = [&V4, &V6].map(from_underlay).into();
    from_underlay.extend(Resolvers::from_underlay());
    let to_underlay = [&V4, &V6].iter().flat_map(|family| to_underlay(family)).collect();
    let mut masquerade: Vec<Rule> = own_pod_cidrs.iter().map(masquerade).collect();
    masquerade.extend(resolvers.masquerade());
    let to_stand_in = resolvers.to_stand_in();
    let chains = [
        ("raw-prerouting", ChainKind::Filter, Hook::Prerouting, PRIORITY_RAW, raw_prerouting),
        ("raw-output", ChainKind::Filter, Hook::Output, PRIORITY_RAW, resolvers.output()),
        ("stand-in", ChainKind::Nat, Hook::Prerouting, PRIORITY_DNAT, to_stand_in.clone()),
        ("stand-in-output", ChainKind::Nat, Hook::Output, PRIORITY_DNAT, to_stand_in),
        ("masquerade", ChainKind::Nat, Hook::Postrouting, PRIORITY_SNAT, masquerade),
        ("underlay-out", ChainKind::Filter, Hook::Postrouting, PRIORITY_LAST, underlay_out),
    ];
    for (name, kind, hook, priority, rules) in chains {
        let chain = Chain { base: Some(Base { kind, hook, priority }), rules };
        table.chains.insert(name.to_owned(), chain);
    }
    let strict = [(FROM_UNDERLAY, from_underlay), (TO_UNDERLAY, to_underlay)];
    for (name, rules) in strict.into_iter().chain(resolvers.chains()) {
        table.chains.insert(name.to_owned(), Chain { base: None, rules });
    }
    table
}

/// Forwarded: whatever comes from or goes to a pod or the tunnel; who may talk to whom is for network policy to say. To the
/// node itself: pods' DNS, of other nodes too. Written so that iptables can list it.
pub(super) fn passages(config: &ClusterConfig, hosts: &[IpAddr]) -> Vec<Passage> {
    let pods = || Datum::NamePrefix(POD_LINK_PREFIX.into());
    let tunnel = || Datum::Name(TUNNEL_LINK.into());
    let accept = |hook, mut statements: Vec<Statement>, comment: &str| {
        statements.extend([Statement::Counter, Statement::Verdict(Verdict::Accept)]);
        Passage { hook, rule: Rule::new(statements).comment(comment) }
    };
    let mut passages = Vec::new();
    for (comment, link) in [("weft: pods", pods as fn() -> Datum), ("weft: other nodes' pods", tunnel)] {
        for field in [Field::InputLink, Field::OutputLink] {
            passages.push(accept(Hook::Forward, vec![Statement::equals(field, link())], comment));
        }
    }
    passages.extend(config.resolver_addresses().map(|address| {
        let to_dns = Statement::equals(family_of(address).destination, Datum::Ip(address));
        accept(Hook::Input, vec![Statement::equals(Field::InputLink, pods()), to_dns], "weft: pods' DNS")
    }));
    for host in hosts {
        passages.extend(TRANSPORTS.map(|protocol| {
            let mut statements = vec![Statement::equals(Field::InputLink, tunnel())];
            statements.extend(cluster_dns::to(host, protocol));
            accept(Hook::Input, statements, "weft: other nodes' DNS")
        }));
    }
    passages
}

fn cluster_set(family: &Family, config: &ClusterConfig) -> Set {
    let elements = config
        .cluster_cidrs
        .iter()
        .filter(|cidr| family_of(cidr.addr()).cluster == family.cluster)
        .map(|cidr| (vec![Datum::Net(cidr.trunc())], ElementData::None));
    let mut set = Set::new(vec![family.key], SetData::None);
    set.interval = true;
    set.groups = Groups::from([("cluster".into(), Arc::new(elements.collect()))]);
    set
}

fn node_set(family: &Family, nodes: &[Accepted<'_>]) -> Set {
    let mut set = Set::new(vec![family.key], SetData::None);
    for node in nodes {
        let of_family = node.addresses.iter().filter(|ip| family_of(**ip).nodes == family.nodes);
        let elements: Elements = of_family.map(|ip| (vec![Datum::Ip(*ip)], ElementData::None)).collect();
        if !elements.is_empty() {
            set.groups.insert((&*node.node.name.0).into(), Arc::new(elements));
        }
    }
    set
}

/// Every link but the tunnel, pods' links and loopback.
fn not_ours(field: Field) -> [Statement; 3] {
    let other_than = |value| Statement::Match { field, negated: true, value };
    [
        other_than(Datum::Name(TUNNEL_LINK.into())),
        other_than(Datum::NamePrefix(POD_LINK_PREFIX.into())),
        other_than(Datum::Name("lo".into())),
    ]
}

fn in_cluster(family: &Family, key: Field) -> Statement {
    Statement::Lookup { key: vec![key], negated: false, set: family.cluster.to_owned() }
}

fn over_underlay(field: Field, chain: &str) -> Rule {
    let mut statements = not_ours(field).to_vec();
    statements.push(Statement::Verdict(Verdict::Jump(chain.into())));
    Rule::new(statements)
}

fn dropped_if_in_cluster(family: &Family, key: Field) -> Rule {
    Rule::new(vec![in_cluster(family, key), Statement::Counter, Statement::Verdict(Verdict::Drop)])
}

fn from_underlay(family: &Family) -> Rule {
    dropped_if_in_cluster(family, family.source).comment("a pod's source in clear on the underlay is forged")
}

fn to_underlay(family: &Family) -> [Rule; 2] {
    [(family.source, "source"), (family.destination, "destination")].map(|(field, name)| {
        dropped_if_in_cluster(family, field).comment(format!("strict: no pod {name} on the underlay"))
    })
}

/// What goes to a node stays as it is: it takes the tunnel, or is dropped.
fn masquerade(pod_cidr: &IpNet) -> Rule {
    let family = family_of(pod_cidr.addr());
    let not_in =
        |set: &str| Statement::Lookup { key: vec![family.destination], negated: true, set: set.to_owned() };
    let source = Statement::Match { field: family.source, negated: false, value: Datum::Net(*pod_cidr) };
    let [not_tunnel, not_pod, _] = not_ours(Field::OutputLink);
    let statements = vec![
        source,
        not_in(family.cluster),
        not_in(family.nodes),
        not_tunnel,
        not_pod,
        Statement::Masquerade,
    ];
    Rule::new(statements).comment("pod to outside")
}
