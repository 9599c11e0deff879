//! The shape of the table `weft-proxy`: its chains, maps and how one Service's claims become elements. Pure.
//!
//! Decided here, with the reasons:
//! * DNAT marks the packet first, so that postrouting recognises what this proxy translated; others' port forwards are
//!   left alone.
//! * Masquerade only where the answer would not come back through this node or would be refused: a pod that was sent
//!   to itself; into the tunnel with a source outside this node's pod range (peers accept nothing else);
//!   out of an uplink with a source that is neither this host's nor a pod's of this node.
//! * Reject and drop look at what DNAT left, in prerouting and output: a ClusterIP needs no route to be refused. Only the
//!   first packets of connections are looked at, so that nothing is paid for the others.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::constants::{
    MARK_MASQUERADE, POD_LINK_PREFIX, PRIORITY_DNAT, PRIORITY_FILTER, PRIORITY_SNAT, TABLE_PROXY, TUNNEL_LINK,
};
use weft_model::objects::Protocol;
use weft_model::ruleset::{
    Base, Chain, ChainKind, CtState, Datum, ElementData, Elements, Field, Hook, KeyType, Rule, Set, SetData,
    Statement, Table, Verdict,
};

use super::service::{Claim, Frontend, Holding, Target};

/// What the chains depend on: the same for every Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    /// Where NodePorts answer, at most one a family.
    pub node_ips: Vec<IpAddr>,
    /// Pod ranges of this node.
    pub pod_cidrs: Vec<IpNet>,
    pub cluster_cidrs: Vec<IpNet>,
    pub service_cidrs: Vec<IpNet>,
    pub cluster_dns: Vec<IpAddr>,
}

/// The maps and sets of one family. Names are shared with people who read `nft list ruleset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SetName {
    /// vip . proto . port : goto `lb`.
    ServiceIps,
    /// vip . proto . port . index : endpoint.
    Endpoints,
    /// proto . port : goto `np`.
    NodePorts,
    NodePortEndpoints,
    /// The same for clients inside the cluster, where they are treated differently.
    InternalNodePorts,
    InternalNodePortEndpoints,
    /// vip . proto . port : goto reject, or drop.
    NoEndpoints,
    /// proto . port : goto reject, or drop.
    NoNodePortEndpoints,
    ClusterIps,
    /// Service addresses that are none of the proxy's business: cluster DNS, other proxies' Services.
    Foreign,
    NodeIps,
    /// pod . pod, for pods of this node behind a Service.
    Hairpin,
}

impl SetName {
    pub(super) const ALL: [Self; 12] = [
        Self::ServiceIps,
        Self::Endpoints,
        Self::NodePorts,
        Self::NodePortEndpoints,
        Self::InternalNodePorts,
        Self::InternalNodePortEndpoints,
        Self::NoEndpoints,
        Self::NoNodePortEndpoints,
        Self::ClusterIps,
        Self::Foreign,
        Self::NodeIps,
        Self::Hairpin,
    ];

    pub(super) fn of(self, ipv6: bool) -> String {
        let stem = match self {
            Self::ServiceIps => "service-ips",
            Self::Endpoints => "endpoints",
            Self::NodePorts => "nodeports",
            Self::NodePortEndpoints => "nodeport-endpoints",
            Self::InternalNodePorts => "internal-nodeports",
            Self::InternalNodePortEndpoints => "internal-nodeport-endpoints",
            Self::NoEndpoints => "no-endpoints",
            Self::NoNodePortEndpoints => "no-nodeport-endpoints",
            Self::ClusterIps => "cluster-ips",
            Self::Foreign => "foreign-ips",
            Self::NodeIps => "node-ips",
            Self::Hairpin => "hairpin",
        };
        format!("{stem}{}", version(ipv6))
    }

    fn set(self, ipv6: bool) -> Set {
        let address = if ipv6 { KeyType::Ipv6Address } else { KeyType::Ipv4Address };
        let endpoint = if ipv6 { SetData::Ipv6AddressAndPort } else { SetData::Ipv4AddressAndPort };
        let (proto, port, index) = (KeyType::L4Protocol, KeyType::Port, KeyType::Index);
        match self {
            Self::ServiceIps | Self::NoEndpoints => Set::new(vec![address, proto, port], SetData::Verdict),
            Self::Endpoints => Set::new(vec![address, proto, port, index], endpoint),
            Self::NodePorts | Self::InternalNodePorts | Self::NoNodePortEndpoints => {
                Set::new(vec![proto, port], SetData::Verdict)
            }
            Self::NodePortEndpoints | Self::InternalNodePortEndpoints => {
                Set::new(vec![proto, port, index], endpoint)
            }
            Self::ClusterIps | Self::Foreign | Self::NodeIps => Set::new(vec![address], SetData::None),
            Self::Hairpin => Set::new(vec![address, address], SetData::None),
        }
    }
}

fn version(ipv6: bool) -> char {
    if ipv6 { '6' } else { '4' }
}

/// A chain that spreads connections over `count` endpoints; shared by all Services with that many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Spread {
    pub scope: Scope,
    pub ipv6: bool,
    pub count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    Vip,
    NodePort,
    InternalNodePort,
}

impl Spread {
    pub(super) fn chain_name(self) -> String {
        let stem = match self.scope {
            Scope::Vip => "lb",
            Scope::NodePort => "np",
            Scope::InternalNodePort => "internal-np",
        };
        format!("{stem}{}-{}", version(self.ipv6), self.count)
    }

    pub(super) fn chain(self) -> Chain {
        let mut key = match self.scope {
            Scope::Vip => service_key(self.ipv6),
            Scope::NodePort | Scope::InternalNodePort => node_port_key(),
        };
        key.push(Field::RandomModulo(self.count));
        let map = self.scope.endpoints().of(self.ipv6);
        let rule = Rule::new(vec![
            Statement::SetMarkBits(MARK_MASQUERADE),
            Statement::DnatMap { ipv6: self.ipv6, key, map },
        ]);
        Chain { base: None, rules: vec![rule] }
    }
}

impl Scope {
    fn frontends(self) -> SetName {
        match self {
            Self::Vip => SetName::ServiceIps,
            Self::NodePort => SetName::NodePorts,
            Self::InternalNodePort => SetName::InternalNodePorts,
        }
    }

    fn endpoints(self) -> SetName {
        match self {
            Self::Vip => SetName::Endpoints,
            Self::NodePort => SetName::NodePortEndpoints,
            Self::InternalNodePort => SetName::InternalNodePortEndpoints,
        }
    }
}

/// The elements of one Service, by set and family.
#[derive(Default)]
pub(super) struct Emission {
    pub sets: BTreeMap<(SetName, bool), Elements>,
    pub spreads: Vec<Spread>,
}

impl Emission {
    pub(super) fn add(&mut self, claim: &Claim, holding: &Holding) {
        match (claim, holding) {
            (Claim::Address(ip), Holding::Foreign) => {
                self.insert(SetName::Foreign, ip.is_ipv6(), vec![Datum::Ip(*ip)], ElementData::None);
            }
            (Claim::Address(ip), _) => {
                self.insert(SetName::ClusterIps, ip.is_ipv6(), vec![Datum::Ip(*ip)], ElementData::None);
            }
            (Claim::Vip(ip, protocol, port), Holding::Frontend(frontend)) => {
                let key = vec![Datum::Ip(*ip), Datum::Protocol(*protocol), Datum::Port(*port)];
                self.add_frontend(Scope::Vip, ip.is_ipv6(), &key, &frontend.target);
            }
            (Claim::NodePort { ipv6, protocol, port }, Holding::Frontend(frontend)) => {
                self.add_node_port(*ipv6, *protocol, *port, frontend);
            }
            (Claim::Vip(..) | Claim::NodePort { .. }, Holding::Known | Holding::Foreign) => {}
        }
    }

    fn add_node_port(&mut self, ipv6: bool, protocol: Protocol, port: u16, frontend: &Frontend) {
        let key = vec![Datum::Protocol(protocol), Datum::Port(port)];
        self.add_frontend(Scope::NodePort, ipv6, &key, &frontend.target);
        if let Some(endpoints) = &frontend.internal {
            self.spread(Scope::InternalNodePort, ipv6, &key, endpoints);
        }
    }

    fn add_frontend(&mut self, scope: Scope, ipv6: bool, key: &[Datum], target: &Target) {
        let verdict = match target {
            Target::Endpoints(endpoints) => return self.spread(scope, ipv6, key, endpoints),
            Target::Reject => Verdict::Goto(REJECT.to_owned()),
            Target::Drop => Verdict::Drop,
        };
        let set = if scope == Scope::Vip { SetName::NoEndpoints } else { SetName::NoNodePortEndpoints };
        self.insert(set, ipv6, key.to_vec(), ElementData::Verdict(verdict));
    }

    fn spread(&mut self, scope: Scope, ipv6: bool, key: &[Datum], endpoints: &[SocketAddr]) {
        let mut count = 0;
        for endpoint in endpoints {
            let mut key = key.to_vec();
            key.push(Datum::Index(count));
            self.insert(
                scope.endpoints(),
                ipv6,
                key,
                ElementData::AddressAndPort(endpoint.ip(), endpoint.port()),
            );
            count += 1;
        }
        let spread = Spread { scope, ipv6, count };
        let verdict = Verdict::Goto(spread.chain_name());
        self.insert(scope.frontends(), ipv6, key.to_vec(), ElementData::Verdict(verdict));
        self.spreads.push(spread);
    }

    fn insert(&mut self, set: SetName, ipv6: bool, key: Vec<Datum>, data: ElementData) {
        self.sets.entry((set, ipv6)).or_default().insert(key, data);
    }
}

const REJECT: &str = "reject";
const SERVICES: &str = "services";
const UNANSWERED: &str = "unanswered";

/// The table without any Service.
pub(super) fn skeleton(site: &Site) -> Table {
    let mut table = Table { name: TABLE_PROXY.to_owned(), ..Table::default() };
    for ipv6 in [false, true] {
        for name in SetName::ALL {
            table.sets.insert(name.of(ipv6), name.set(ipv6));
        }
    }
    for (name, group, ips) in
        [(SetName::NodeIps, "node", &site.node_ips), (SetName::Foreign, "cluster-dns", &site.cluster_dns)]
    {
        for ipv6 in [false, true] {
            let elements: Elements = ips
                .iter()
                .filter(|ip| ip.is_ipv6() == ipv6)
                .map(|ip| (vec![Datum::Ip(*ip)], ElementData::None))
                .collect();
            if let Some(set) = table.sets.get_mut(&name.of(ipv6)).filter(|_| !elements.is_empty()) {
                set.groups.insert(group.to_owned(), Arc::new(elements));
            }
        }
    }
    table.chains = BTreeMap::from([
        ("prerouting".to_owned(), nat(Hook::Prerouting, PRIORITY_DNAT, prerouting(site))),
        ("output".to_owned(), nat(Hook::Output, PRIORITY_DNAT, output())),
        ("postrouting".to_owned(), nat(Hook::Postrouting, PRIORITY_SNAT, postrouting(site))),
        ("filter-prerouting".to_owned(), filter(Hook::Prerouting)),
        ("filter-output".to_owned(), filter(Hook::Output)),
        (SERVICES.to_owned(), Chain { base: None, rules: services() }),
        (UNANSWERED.to_owned(), Chain { base: None, rules: unanswered(site) }),
        (REJECT.to_owned(), Chain { base: None, rules: vec![Rule::new(vec![Statement::Reject])] }),
    ]);
    table
}

fn nat(hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { base: Some(Base { kind: ChainKind::Nat, hook, priority }), rules }
}

fn filter(hook: Hook) -> Chain {
    let base = Base { kind: ChainKind::Filter, hook, priority: PRIORITY_FILTER };
    let first_packet = Statement::CtState { states: vec![CtState::New], negated: false };
    let unanswered = Statement::Verdict(Verdict::Jump(UNANSWERED.to_owned()));
    Chain { base: Some(base), rules: vec![Rule::new(vec![first_packet, unanswered])] }
}

fn jump(chain: &str) -> Rule {
    Rule::new(vec![Statement::Verdict(Verdict::Jump(chain.to_owned()))])
}

/// Packets of pods and from outside. Those from anywhere in the cluster's pod ranges count as internal.
fn prerouting(site: &Site) -> Vec<Rule> {
    let internal = site.cluster_cidrs.iter().map(|cidr| {
        let ipv6 = cidr.addr().is_ipv6();
        let from_pods = matches(source(ipv6), false, Datum::Net(*cidr));
        Rule::new(vec![from_pods, to_node(ipv6), node_ports(SetName::InternalNodePorts, ipv6)])
    });
    internal.chain([jump(SERVICES)]).collect()
}

/// Packets of the host itself: always internal.
fn output() -> Vec<Rule> {
    let internal = [false, true]
        .map(|ipv6| Rule::new(vec![to_node(ipv6), node_ports(SetName::InternalNodePorts, ipv6)]));
    internal.into_iter().chain([jump(SERVICES)]).collect()
}

fn services() -> Vec<Rule> {
    let vips = [false, true].map(|ipv6| Rule::new(vec![vips(SetName::ServiceIps, ipv6)]));
    let ports =
        [false, true].map(|ipv6| Rule::new(vec![to_node(ipv6), node_ports(SetName::NodePorts, ipv6)]));
    vips.into_iter().chain(ports).collect()
}

/// What is still addressed to a Service after DNAT.
fn unanswered(site: &Site) -> Vec<Rule> {
    let both = [false, true];
    let mut rules: Vec<Rule> =
        both.map(|ipv6| Rule::new(vec![vips(SetName::NoEndpoints, ipv6)])).into_iter().collect();
    rules.extend(
        both.map(|ipv6| Rule::new(vec![to_node(ipv6), node_ports(SetName::NoNodePortEndpoints, ipv6)])),
    );
    rules.extend(both.map(|ipv6| {
        Rule::new(vec![to(SetName::Foreign, ipv6), Statement::Verdict(Verdict::Return)])
            .comment("not this proxy's: cluster DNS, other proxies")
    }));
    rules.extend(both.map(|ipv6| {
        let reject = Statement::Verdict(Verdict::Goto(REJECT.to_owned()));
        Rule::new(vec![to(SetName::ClusterIps, ipv6), reject])
            .comment("a port that the Service does not have")
    }));
    rules.extend(site.service_cidrs.iter().map(|cidr| {
        let to_range = matches(destination(cidr.addr().is_ipv6()), false, Datum::Net(*cidr));
        Rule::new(vec![to_range, Statement::Verdict(Verdict::Drop)]).comment("an address that no Service has")
    }));
    rules
}

fn postrouting(site: &Site) -> Vec<Rule> {
    let tunnel = || Datum::Name(TUNNEL_LINK.to_owned());
    let ours = || Statement::MarkIs { mask: MARK_MASQUERADE, value: MARK_MASQUERADE };
    let mut rules = Vec::new();
    for ipv6 in [false, true] {
        let pair = Statement::Lookup {
            key: vec![source(ipv6), destination(ipv6)],
            negated: false,
            set: SetName::Hairpin.of(ipv6),
        };
        rules.push(Rule::new(vec![ours(), pair, Statement::Masquerade]).comment("a pod sent to itself"));
        let elsewhere = match site.pod_cidrs.iter().find(|cidr| cidr.addr().is_ipv6() == ipv6) {
            Some(own) => matches(source(ipv6), true, Datum::Net(*own)),
            None => matches(Field::Family, false, Datum::Ipv6(ipv6)),
        };
        let into_tunnel = matches(Field::OutputLink, false, tunnel());
        rules.push(
            Rule::new(vec![ours(), into_tunnel, elsewhere.clone(), Statement::Masquerade])
                .comment("peers accept only this node's pods"),
        );
        let to_pod = matches(Field::OutputLink, true, Datum::NamePrefix(POD_LINK_PREFIX.to_owned()));
        let not_tunnel = matches(Field::OutputLink, true, tunnel());
        let routed = Statement::SourceIsLocal { negated: true };
        rules.push(
            Rule::new(vec![ours(), not_tunnel, to_pod, elsewhere, routed, Statement::Masquerade])
                .comment("the answer must come back here"),
        );
    }
    rules
}

fn matches(field: Field, negated: bool, value: Datum) -> Statement {
    Statement::Match { field, negated, value }
}

fn source(ipv6: bool) -> Field {
    if ipv6 { Field::Ip6Source } else { Field::Ip4Source }
}

fn destination(ipv6: bool) -> Field {
    if ipv6 { Field::Ip6Destination } else { Field::Ip4Destination }
}

fn service_key(ipv6: bool) -> Vec<Field> {
    vec![destination(ipv6), Field::L4Protocol, Field::DestinationPort]
}

fn node_port_key() -> Vec<Field> {
    vec![Field::L4Protocol, Field::DestinationPort]
}

fn to(set: SetName, ipv6: bool) -> Statement {
    Statement::Lookup { key: vec![destination(ipv6)], negated: false, set: set.of(ipv6) }
}

fn to_node(ipv6: bool) -> Statement {
    to(SetName::NodeIps, ipv6)
}

fn vips(map: SetName, ipv6: bool) -> Statement {
    Statement::VerdictMap { key: service_key(ipv6), map: map.of(ipv6) }
}

fn node_ports(map: SetName, ipv6: bool) -> Statement {
    Statement::VerdictMap { key: node_port_key(), map: map.of(ipv6) }
}
