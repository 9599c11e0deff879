//! The shape of the table `weft-proxy`: its chains and maps without any Service. Pure; `emission` fills them.
//!
//! Decided here, with the reasons:
//! * DNAT marks the packet first, so that postrouting recognises what this proxy translated; others' port forwards are
//!   left alone.
//! * Masquerade only where the answer would not come back through this node or would be refused: a pod that was sent
//!   to itself; into the tunnel with a source outside this node's pod range (peers accept nothing else);
//!   out of an uplink with a source that is neither this host's nor a pod's of this node.
//! * Who may come to a load balancer's address is judged in the same chain before that, on the packet as the client sent it.
//! * Reject and drop look at what DNAT left, in prerouting and output: a ClusterIP needs no route to be refused. Only the
//!   first packets of connections, and those that conntrack knows nothing of, are looked at, so that nothing is paid for the others.
//! * Maps that few clusters fill, and the rules that look into them, are there only while something is in them. The kernel finds a
//!   set by walking its table's list of them, and reads a rule for each packet that begins a connection.

use std::collections::BTreeMap;
use std::net::IpAddr;
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

/// What the chains depend on: the same for every Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    /// Where NodePorts answer.
    pub node_ips: Vec<IpAddr>,
    /// Pod ranges of this node.
    pub pod_cidrs: Vec<IpNet>,
    pub cluster_cidrs: Vec<IpNet>,
    pub service_cidrs: Vec<IpNet>,
    pub cluster_dns: Vec<IpAddr>,
}

/// At what a frontend is looked up, and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    /// An address of the Service's own: vip . proto . port.
    Vip,
    NodePort,
    /// The same for clients inside the cluster, where they are treated differently.
    InternalVip,
    InternalNodePort,
}

impl Scope {
    const ALL: [Self; 4] = [Self::Vip, Self::NodePort, Self::InternalVip, Self::InternalNodePort];

    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Vip | Self::NodePort => "",
            Self::InternalVip | Self::InternalNodePort => "internal-",
        }
    }

    pub(super) fn is_node_port(self) -> bool {
        matches!(self, Self::NodePort | Self::InternalNodePort)
    }

    pub(super) fn key(self, ipv6: bool) -> Vec<Field> {
        let ports = [Field::L4Protocol, Field::DestinationPort];
        if self.is_node_port() { ports.to_vec() } else { [&[Field::destination(ipv6)], &ports[..]].concat() }
    }

    fn key_types(self, ipv6: bool) -> Vec<KeyType> {
        let ports = [KeyType::L4Protocol, KeyType::Port];
        if self.is_node_port() { ports.to_vec() } else { [&[address(ipv6)], &ports[..]].concat() }
    }
}

/// The maps and sets of one family. Names are shared with people who read `nft list ruleset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SetName {
    /// [vip .] proto . port : goto `lb` or `np`.
    Frontends(Scope),
    /// [vip .] proto . port . index : endpoint.
    Endpoints(Scope),
    /// [vip .] proto . port . index : goto `stay`, of Services with affinity.
    Sticky(Scope),
    /// vip . proto . port : goto reject, or drop.
    NoEndpoints,
    /// proto . port : goto reject, or drop.
    NoNodePortEndpoints,
    /// vip . proto . port : jump to who may come, of load balancers with source ranges.
    Firewalls,
    /// client . address . proto . port : endpoint; the rules add to it.
    Affinity,
    ClusterIps,
    /// Service addresses that are none of the proxy's business: cluster DNS, other proxies' Services.
    Foreign,
    NodeIps,
    /// pod . pod, for pods of this node behind a Service.
    Hairpin,
}

/// How many clients of Services with affinity a node remembers, at most (about 150 bytes each); beyond that, new ones are
/// spread as without affinity.
const AFFINITY_SIZE: u32 = 262_144;
/// Default of the API; each rule that adds an element gives the time of its Service.
const AFFINITY_MILLIS: u64 = 10_800_000;

impl SetName {
    pub(super) fn all() -> Vec<Self> {
        let scoped = Scope::ALL
            .iter()
            .flat_map(|scope| [Self::Frontends(*scope), Self::Endpoints(*scope), Self::Sticky(*scope)]);
        let others = [
            Self::NoEndpoints,
            Self::NoNodePortEndpoints,
            Self::Firewalls,
            Self::Affinity,
            Self::ClusterIps,
            Self::Foreign,
            Self::NodeIps,
            Self::Hairpin,
        ];
        scoped.chain(others).collect()
    }

    /// Whether it is there without an element too: those that nearly every node needs, and those that come and go with single
    /// endpoints, so that the rules do not change with them.
    fn is_permanent(self) -> bool {
        matches!(
            self,
            Self::Frontends(Scope::Vip)
                | Self::Endpoints(Scope::Vip)
                | Self::NoEndpoints
                | Self::ClusterIps
                | Self::NodeIps
                | Self::Hairpin
        )
    }

    pub(super) fn of(self, ipv6: bool) -> &'static str {
        macro_rules! of_both {
            ($stem:literal) => {
                [concat!($stem, "4"), concat!($stem, "6")]
            };
        }
        let names = match self {
            Self::Frontends(Scope::Vip) => of_both!("service-ips"),
            Self::Frontends(Scope::NodePort) => of_both!("nodeports"),
            Self::Frontends(Scope::InternalVip) => of_both!("internal-service-ips"),
            Self::Frontends(Scope::InternalNodePort) => of_both!("internal-nodeports"),
            Self::Endpoints(Scope::Vip) => of_both!("endpoints"),
            Self::Endpoints(Scope::NodePort) => of_both!("nodeport-endpoints"),
            Self::Endpoints(Scope::InternalVip) => of_both!("internal-endpoints"),
            Self::Endpoints(Scope::InternalNodePort) => of_both!("internal-nodeport-endpoints"),
            Self::Sticky(Scope::Vip) => of_both!("sticky-endpoints"),
            Self::Sticky(Scope::NodePort) => of_both!("sticky-nodeport-endpoints"),
            Self::Sticky(Scope::InternalVip) => of_both!("internal-sticky-endpoints"),
            Self::Sticky(Scope::InternalNodePort) => of_both!("internal-sticky-nodeport-endpoints"),
            Self::NoEndpoints => of_both!("no-endpoints"),
            Self::NoNodePortEndpoints => of_both!("no-nodeport-endpoints"),
            Self::Firewalls => of_both!("firewalls"),
            Self::Affinity => of_both!("affinity"),
            Self::ClusterIps => of_both!("cluster-ips"),
            Self::Foreign => of_both!("foreign-ips"),
            Self::NodeIps => of_both!("node-ips"),
            Self::Hairpin => of_both!("hairpin"),
        };
        names[usize::from(ipv6)]
    }

    /// Without elements.
    pub(super) fn set(self, ipv6: bool) -> Set {
        let set = self.declaration(ipv6);
        // The rules add to one with a timeout.
        let room = set.timeout_millis.is_none().then(|| Set::room_for(0));
        Set { room, ..set }
    }

    /// Made where it is missing.
    pub(super) fn in_table(self, table: &mut Table, ipv6: bool) -> &mut Set {
        table.sets.entry(self.of(ipv6).to_owned()).or_insert_with(|| self.set(ipv6))
    }

    fn declaration(self, ipv6: bool) -> Set {
        let address = address(ipv6);
        let endpoint = if ipv6 { SetData::Ipv6AddressAndPort } else { SetData::Ipv4AddressAndPort };
        let with_index = |scope: Scope| [scope.key_types(ipv6), vec![KeyType::Index]].concat();
        match self {
            Self::Frontends(scope) => Set::new(scope.key_types(ipv6), SetData::Verdict),
            Self::Endpoints(scope) => Set::new(with_index(scope), endpoint),
            Self::Sticky(scope) => Set::new(with_index(scope), SetData::Verdict),
            Self::NoEndpoints | Self::Firewalls => Set::new(Scope::Vip.key_types(ipv6), SetData::Verdict),
            Self::NoNodePortEndpoints => Set::new(Scope::NodePort.key_types(ipv6), SetData::Verdict),
            Self::Affinity => {
                let key = vec![address, address, KeyType::L4Protocol, KeyType::Port];
                let (timeout_millis, dynamic_size) = (Some(AFFINITY_MILLIS), Some(AFFINITY_SIZE));
                Set { timeout_millis, dynamic_size, ..Set::new(key, endpoint) }
            }
            Self::ClusterIps | Self::Foreign | Self::NodeIps => Set::new(vec![address], SetData::None),
            Self::Hairpin => Set::new(vec![address, address], SetData::None),
        }
    }
}

pub(super) fn version(ipv6: bool) -> char {
    if ipv6 { '6' } else { '4' }
}

pub(super) fn address(ipv6: bool) -> KeyType {
    if ipv6 { KeyType::Ipv6Address } else { KeyType::Ipv4Address }
}

/// Answers that nobody is there.
pub(super) const REJECT: &str = "reject";
const UNANSWERED: &str = "unanswered";
const UNTRANSLATED: &str = "untranslated";

/// The table without any Service.
pub(super) fn skeleton(site: &Site) -> Table {
    let mut table = Table { name: TABLE_PROXY.to_owned(), ..Table::default() };
    for (name, group, ips) in
        [(SetName::NodeIps, "node", &site.node_ips), (SetName::Foreign, "cluster-dns", &site.cluster_dns)]
    {
        for ipv6 in [false, true] {
            let elements: Elements = ips
                .iter()
                .filter(|ip| ip.is_ipv6() == ipv6)
                .map(|ip| (vec![Datum::Ip(*ip)], ElementData::None))
                .collect();
            if !elements.is_empty() {
                let set = name.in_table(&mut table, ipv6);
                set.room = Some(Set::room_for(elements.len()));
                set.groups.insert(group.into(), Arc::new(elements));
            }
        }
    }
    table.chains = BTreeMap::from([
        ("postrouting".to_owned(), nat(Hook::Postrouting, PRIORITY_SNAT, postrouting(site))),
        ("filter-prerouting".to_owned(), filter(Hook::Prerouting)),
        ("filter-output".to_owned(), filter(Hook::Output)),
        (UNTRANSLATED.to_owned(), Chain { base: None, rules: untranslated(site) }),
        (REJECT.to_owned(), Chain { base: None, rules: vec![Rule::new(vec![Statement::Reject])] }),
    ]);
    fit(&mut table, site);
    table
}

/// Gives the table the sets that have to be there, and the chains that look into those.
pub(super) fn fit(table: &mut Table, site: &Site) {
    for ipv6 in [false, true] {
        for name in SetName::all() {
            let is_filled =
                |name: SetName| table.sets.get(name.of(ipv6)).is_some_and(|set| !set.groups.is_empty());
            let is_needed = match name {
                // The rules fill it.
                SetName::Affinity => Scope::ALL.iter().any(|scope| is_filled(SetName::Sticky(*scope))),
                _ => name.is_permanent() || is_filled(name),
            };
            if is_needed {
                name.in_table(table, ipv6);
            } else {
                table.sets.remove(name.of(ipv6));
            }
        }
    }
    let rules = [
        ("prerouting", nat(Hook::Prerouting, PRIORITY_DNAT, prerouting(site))),
        ("output", nat(Hook::Output, PRIORITY_DNAT, output())),
        (UNANSWERED, Chain { base: None, rules: unanswered(site) }),
    ];
    for (name, mut chain) in rules {
        chain.rules.retain(|rule| {
            rule.statements.iter().filter_map(Statement::set_name).all(|set| table.sets.contains_key(set))
        });
        table.chains.insert(name.to_owned(), chain);
    }
}

/// How many elements stand in which sets.
pub(super) fn filled(table: &Table) -> impl Iterator<Item = ((SetName, bool), usize)> {
    let names = SetName::all().into_iter().flat_map(|name| [(name, false), (name, true)]);
    let count =
        |(name, ipv6): (SetName, bool)| table.sets.get(name.of(ipv6)).map(|set| set.elements().count());
    names.filter_map(move |name| Some((name, count(name)?))).filter(|(_, count)| *count > 0)
}

fn nat(hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { base: Some(Base { kind: ChainKind::Nat, hook, priority }), rules }
}

fn filter(hook: Hook) -> Chain {
    let base = Base { kind: ChainKind::Filter, hook, priority: PRIORITY_FILTER };
    let jump = |state, chain: &str| {
        let state = Statement::CtState { states: vec![state], negated: false };
        Rule::new(vec![state, Statement::Verdict(Verdict::Jump(chain.into()))])
    };
    let mut rules = vec![jump(CtState::New, UNANSWERED)];
    if hook == Hook::Prerouting {
        rules.push(jump(CtState::Invalid, UNTRANSLATED));
    }
    Chain { base: Some(base), rules }
}

/// The kernel translates no TCP segment that is outside its connection's window: a client of a Service would see it come from
/// the pod, and end the connection (kubernetes issue 74839). To a Service's address it would leave for nowhere.
fn untranslated(site: &Site) -> Vec<Rule> {
    let from = site.cluster_cidrs.iter().map(|cidr| (cidr, Field::source(cidr.addr().is_ipv6())));
    let to = site.service_cidrs.iter().map(|cidr| (cidr, Field::destination(cidr.addr().is_ipv6())));
    let rule = |(cidr, field): (&IpNet, Field)| {
        let tcp = Statement::equals(Field::L4Protocol, Datum::Protocol(Protocol::Tcp));
        let range = Statement::equals(field, Datum::Net(*cidr));
        Rule::new(vec![tcp, range, Statement::Verdict(Verdict::Drop)])
            .comment("outside its connection's window")
    };
    from.chain(to).map(rule).collect()
}

/// Packets of pods and from outside. Those from anywhere in the cluster's pod ranges count as internal.
fn prerouting(site: &Site) -> Vec<Rule> {
    let internal = site.cluster_cidrs.iter().map(|cidr| {
        let ipv6 = cidr.addr().is_ipv6();
        (ipv6, vec![Statement::equals(Field::source(ipv6), Datum::Net(*cidr))])
    });
    destinations(&internal.collect::<Vec<_>>())
}

/// Packets of the host itself: always internal.
fn output() -> Vec<Rule> {
    destinations(&[(false, Vec::new()), (true, Vec::new())])
}

/// Who may come, then Services' own addresses, then node ports; `internal` tells clients inside the cluster, by family.
fn destinations(internal: &[(bool, Vec<Statement>)]) -> Vec<Rule> {
    let both = [false, true];
    let inside = |find: &dyn Fn(bool) -> Vec<Statement>| -> Vec<Rule> {
        let rules = internal.iter().map(|(ipv6, client)| [client.clone(), find(*ipv6)].concat());
        rules.map(Rule::new).collect()
    };
    let node_ports = |scope: Scope| move |ipv6: bool| vec![to_node(ipv6), frontends(scope, ipv6)];
    let mut rules: Vec<Rule> =
        both.map(|ipv6| Rule::new(vec![look_up(Scope::Vip, SetName::Firewalls, ipv6)])).into();
    rules.extend(inside(&|ipv6| vec![frontends(Scope::InternalVip, ipv6)]));
    rules.extend(both.map(|ipv6| Rule::new(vec![frontends(Scope::Vip, ipv6)])));
    rules.extend(inside(&node_ports(Scope::InternalNodePort)));
    rules.extend(both.map(|ipv6| Rule::new(node_ports(Scope::NodePort)(ipv6))));
    rules
}

/// What is still addressed to a Service after DNAT.
fn unanswered(site: &Site) -> Vec<Rule> {
    let both = [false, true];
    let sent_on = Statement::MarkIs { mask: MARK_MASQUERADE, value: MARK_MASQUERADE };
    let back = Statement::Verdict(Verdict::Return);
    let mut rules = vec![Rule::new(vec![sent_on, back]).comment("sent to an endpoint")];
    rules.extend(both.map(|ipv6| Rule::new(vec![look_up(Scope::Vip, SetName::NoEndpoints, ipv6)])));
    rules.extend(both.map(|ipv6| {
        Rule::new(vec![to_node(ipv6), look_up(Scope::NodePort, SetName::NoNodePortEndpoints, ipv6)])
    }));
    rules.extend(both.map(|ipv6| {
        Rule::new(vec![to(SetName::Foreign, ipv6), Statement::Verdict(Verdict::Return)])
            .comment("not this proxy's: cluster DNS, other proxies")
    }));
    rules.extend(both.map(|ipv6| {
        let reject = Statement::Verdict(Verdict::Goto(REJECT.into()));
        Rule::new(vec![to(SetName::ClusterIps, ipv6), reject])
            .comment("a port that the Service does not have")
    }));
    rules.extend(site.service_cidrs.iter().map(|cidr| {
        let to_range = Statement::equals(Field::destination(cidr.addr().is_ipv6()), Datum::Net(*cidr));
        Rule::new(vec![to_range, Statement::Verdict(Verdict::Drop)]).comment("an address that no Service has")
    }));
    rules
}

fn postrouting(site: &Site) -> Vec<Rule> {
    let tunnel = || Datum::Name(TUNNEL_LINK.into());
    let ours = || Statement::MarkIs { mask: MARK_MASQUERADE, value: MARK_MASQUERADE };
    let mut rules = Vec::new();
    for ipv6 in [false, true] {
        let pair = Statement::Lookup {
            key: vec![Field::source(ipv6), Field::destination(ipv6)],
            negated: false,
            set: SetName::Hairpin.of(ipv6).into(),
        };
        rules.push(Rule::new(vec![ours(), pair, Statement::Masquerade]).comment("a pod sent to itself"));
        let elsewhere = match site.pod_cidrs.iter().find(|cidr| cidr.addr().is_ipv6() == ipv6) {
            Some(own) => Statement::differs(Field::source(ipv6), Datum::Net(*own)),
            None => Statement::equals(Field::Family, Datum::Ipv6(ipv6)),
        };
        let into_tunnel = Statement::equals(Field::OutputLink, tunnel());
        rules.push(
            Rule::new(vec![ours(), into_tunnel, elsewhere.clone(), Statement::Masquerade])
                .comment("peers accept only this node's pods"),
        );
        let to_pod = Statement::differs(Field::OutputLink, Datum::NamePrefix(POD_LINK_PREFIX.into()));
        let not_tunnel = Statement::differs(Field::OutputLink, tunnel());
        let routed = Statement::SourceIsLocal { negated: true };
        rules.push(
            Rule::new(vec![ours(), not_tunnel, to_pod, elsewhere, routed, Statement::Masquerade])
                .comment("the answer must come back here"),
        );
    }
    rules
}

fn to(set: SetName, ipv6: bool) -> Statement {
    Statement::Lookup { key: vec![Field::destination(ipv6)], negated: false, set: set.of(ipv6).into() }
}

fn to_node(ipv6: bool) -> Statement {
    to(SetName::NodeIps, ipv6)
}

fn frontends(scope: Scope, ipv6: bool) -> Statement {
    look_up(scope, SetName::Frontends(scope), ipv6)
}

fn look_up(scope: Scope, map: SetName, ipv6: bool) -> Statement {
    Statement::VerdictMap { key: scope.key(ipv6), map: map.of(ipv6).into() }
}
