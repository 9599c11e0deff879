//! The shape of the table `weft-policy`: chains, sets, and how one Side becomes rules. Pure.
//!
//! Names of chains and sets come from what they mean, so that the same meaning is the same object whoever needs it and
//! whatever was there before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};
use weft_model::constants::{
    LOG_GROUP_DENIED, POD_LINK_PREFIX, PRIORITY_BEFORE_DNAT, PRIORITY_FILTER, TABLE_POLICY,
};
use weft_model::objects::{Pod, Protocol};
use weft_model::ruleset::{
    Base, Chain, ChainKind, CtState, Datum, ElementData, Elements, Field, Hook, KeyType, Rule, Set, SetData,
    Statement, Table, Verdict,
};

use super::directory::Directory;
use super::meaning::{Allow, Direction, PeerKey, PortSet, Side, named_numbers};

/// Prefixes of sets of peers: what is added to one of these denies nobody.
pub(super) const PEER_SETS: [&str; 3] = ["pods", "nets", "named"];
/// ICMPv6 types of neighbour discovery (RFC 4861 section 4).
const NEIGHBOUR_DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
/// An nft comment holds at most 128 bytes.
const LONGEST_COMMENT: usize = 100;

/// What several chains may look addresses or ports up in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SetKey {
    Peer(PeerKey),
    /// Address, protocol and port, for names of ports that each destination resolves; without peers: of everybody.
    Named {
        peers: Option<Vec<PeerKey>>,
        names: BTreeSet<(Protocol, String)>,
    },
    Ports(BTreeSet<(Protocol, u16)>),
}

impl SetKey {
    /// Those that a Side's chain refers to.
    pub(super) fn of_side(side: &Side) -> BTreeSet<Self> {
        let mut keys = BTreeSet::new();
        for allow in &side.allows {
            let unnamed = allow.ports.as_ref().is_none_or(has_unnamed);
            keys.extend(allow.peers.iter().flatten().filter(|_| unnamed).cloned().map(Self::Peer));
            if let Some(ports) = &allow.ports {
                keys.extend((ports.exact.len() > 1).then(|| Self::Ports(ports.exact.clone())));
                keys.extend(Self::named(allow, ports));
            }
        }
        keys
    }

    fn named(allow: &Allow, ports: &PortSet) -> Option<Self> {
        let named = Self::Named { peers: allow.peers.clone(), names: ports.named.clone() };
        (!ports.named.is_empty()).then_some(named)
    }

    /// Name and declaration of each nft set of this key, with the elements that never change.
    pub(super) fn sets(&self, directory: &Directory) -> Vec<(String, Set)> {
        let exact = |more: &[KeyType]| {
            [false, true].map(|ipv6| {
                let key = [&[address_type(ipv6)], more].concat();
                (self.name(ipv6), Set::new(key, SetData::None))
            })
        };
        match self {
            Self::Peer(PeerKey::Pods { .. }) => exact(&[]).into(),
            Self::Named { .. } => exact(&[KeyType::L4Protocol, KeyType::Port]).into(),
            Self::Peer(PeerKey::Block { cidr, except }) => {
                let ipv6 = cidr.addr().is_ipv6();
                let mut set = Set::new(vec![address_type(ipv6)], SetData::None);
                set.interval = true;
                let nets = block_nets(*cidr, except, &directory.place.hosts);
                let elements = nets.into_iter().map(|net| (vec![Datum::Net(net)], ElementData::None));
                fill(&mut set, "block", elements.collect());
                vec![(self.name(ipv6), set)]
            }
            Self::Ports(ports) => {
                let mut set = Set::new(vec![KeyType::L4Protocol, KeyType::Port], SetData::None);
                let elements = ports.iter().map(|(protocol, port)| {
                    (vec![Datum::Protocol(*protocol), Datum::Port(*port)], ElementData::None)
                });
                fill(&mut set, "ports", elements.collect());
                vec![(self.name(false), set)]
            }
        }
    }

    /// Elements that stand for an address because of who bears it.
    pub(super) fn elements(&self, address: IpAddr, bearers: &[&Arc<Pod>], directory: &Directory) -> Elements {
        match self {
            Self::Peer(peer @ PeerKey::Pods { .. }) if peer.means(address, bearers, directory) => {
                Elements::from([(vec![Datum::Ip(address)], ElementData::None)])
            }
            Self::Named { peers, names } => {
                let meant = peers
                    .as_ref()
                    .is_none_or(|peers| peers.iter().any(|peer| peer.means(address, bearers, directory)));
                let numbers = if meant { named_numbers(names, bearers) } else { BTreeSet::new() };
                let key =
                    |(protocol, port)| vec![Datum::Ip(address), Datum::Protocol(protocol), Datum::Port(port)];
                numbers.into_iter().map(|number| (key(number), ElementData::None)).collect()
            }
            _ => Elements::new(),
        }
    }

    /// Every address that [`Self::elements`] may give something for.
    pub(super) fn candidates(&self, directory: &Directory) -> BTreeSet<IpAddr> {
        match self {
            Self::Peer(PeerKey::Pods { namespaces, .. }) => {
                directory.addresses_in(|name| namespaces.select(name, directory))
            }
            Self::Named { .. } => directory.addresses_in(|_| true),
            Self::Peer(PeerKey::Block { .. }) | Self::Ports(_) => BTreeSet::new(),
        }
    }

    /// Name of the set whose elements [`Self::elements`] gives; `None` where there are none.
    pub(super) fn of_addresses(&self, ipv6: bool) -> Option<String> {
        match self {
            Self::Peer(PeerKey::Pods { .. }) | Self::Named { .. } => Some(self.name(ipv6)),
            Self::Peer(PeerKey::Block { .. }) | Self::Ports(_) => None,
        }
    }

    fn name(&self, ipv6: bool) -> String {
        let hash = hash(self);
        match self {
            Self::Peer(PeerKey::Pods { .. }) => format!("pods{}-{hash}", version(ipv6)),
            Self::Peer(PeerKey::Block { .. }) => format!("nets{}-{hash}", version(ipv6)),
            Self::Named { .. } => format!("named{}-{hash}", version(ipv6)),
            Self::Ports(_) => format!("ports-{hash}"),
        }
    }
}

fn has_unnamed(ports: &PortSet) -> bool {
    !(ports.exact.is_empty() && ports.ranges.is_empty() && ports.protocols.is_empty())
}

/// Twelve digits: a node has thousands of names, so that two meet by chance once in ten million clusters.
fn hash(meaning: &impl std::fmt::Debug) -> String {
    let digest = Sha256::digest(format!("{meaning:?}"));
    digest[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn version(ipv6: bool) -> char {
    if ipv6 { '6' } else { '4' }
}

fn address_type(ipv6: bool) -> KeyType {
    if ipv6 { KeyType::Ipv6Address } else { KeyType::Ipv4Address }
}

fn fill(set: &mut Set, group: &str, elements: Elements) {
    if !elements.is_empty() {
        set.groups.insert(group.into(), Arc::new(elements));
    }
}

/// The block without its exceptions, and the `host` addresses of nodes that it covers: disjoint.
fn block_nets(cidr: IpNet, except: &[IpNet], hosts: &BTreeMap<IpAddr, Vec<IpAddr>>) -> Vec<IpNet> {
    let covers = |ip: &IpAddr| cidr.contains(ip) && !except.iter().any(|net| net.contains(ip));
    let covered = hosts.iter().filter(|(_, node)| node.iter().any(covers));
    let mut nets: Vec<IpNet> = covered.map(|(host, _)| IpNet::from(*host)).collect();
    without(cidr, except, &mut nets);
    IpNet::aggregate(&nets)
}

/// Halves the range until each part is either outside of every exception or inside one.
fn without(net: IpNet, except: &[IpNet], kept: &mut Vec<IpNet>) {
    let touching: Vec<IpNet> =
        except.iter().copied().filter(|other| other.contains(&net) || net.contains(other)).collect();
    if touching.is_empty() {
        kept.push(net);
    } else if !touching.iter().any(|other| other.contains(&net)) {
        let halves = net.subnets(net.prefix_len() + 1);
        halves.into_iter().flatten().for_each(|half| without(half, &touching, kept));
    }
}

pub(super) fn chain_name(direction: Direction, side: &Side, ipv6: bool) -> String {
    let stem = match direction {
        Direction::Ingress => "in",
        Direction::Egress => "out",
    };
    format!("{stem}{}-{}", version(ipv6), hash(side))
}

/// Returns for what is allowed; the rest is denied. Of one family, since each packet and, at each transaction, the kernel's
/// search for loops walks all of it.
pub(super) fn chain(direction: Direction, side: &Side, ipv6: bool) -> Chain {
    let allowing = side.allows.iter().flat_map(|allow| allow_rules(direction, allow, ipv6));
    // Of policies that allow the same the first is named.
    let mut told = BTreeSet::new();
    let mut rules: Vec<Rule> = allowing.filter(|rule| told.insert(rule.statements.clone())).collect();
    let drop = Rule::new(vec![Statement::Counter, denied()]);
    let others = side.policies.len() - 1;
    let more = if others > 0 { format!(" and {others} more") } else { String::new() };
    let policy = side.policies.first().map(ToString::to_string).unwrap_or_default();
    rules.push(drop.comment(cut(&format!("isolated by {policy}{more}"))));
    Chain { base: None, rules }
}

fn allow_rules(direction: Direction, allow: &Allow, ipv6: bool) -> Vec<Rule> {
    let mut matches: Vec<Vec<Statement>> = Vec::new();
    let addresses = address_tests(direction, allow, ipv6);
    for ports in port_tests(allow.ports.as_ref()) {
        matches.extend(addresses.iter().map(|address| [address.clone(), ports.clone()].concat()));
    }
    let named = allow.ports.as_ref().and_then(|ports| SetKey::named(allow, ports));
    matches.extend(named.iter().map(|key| {
        let field = Field::destination(ipv6);
        vec![look_up(&[field, Field::L4Protocol, Field::DestinationPort], key.name(ipv6))]
    }));
    let comment = cut(&format!("{} {}[{}]", allow.policy, direction.name(), allow.index));
    let rule = |mut statements: Vec<Statement>| {
        statements.push(Statement::Verdict(Verdict::Return));
        Rule::new(statements).comment(comment.clone())
    };
    matches.into_iter().map(rule).collect()
}

/// One test a set of peers; a single empty one where everybody is meant.
fn address_tests(direction: Direction, allow: &Allow, ipv6: bool) -> Vec<Vec<Statement>> {
    let Some(peers) = &allow.peers else { return vec![Vec::new()] };
    let field = match direction {
        Direction::Ingress => Field::source(ipv6),
        Direction::Egress => Field::destination(ipv6),
    };
    let of_family = peers.iter().filter(|peer| match peer {
        PeerKey::Pods { .. } => true,
        PeerKey::Block { cidr, .. } => cidr.addr().is_ipv6() == ipv6,
    });
    of_family.map(|peer| vec![look_up(&[field], SetKey::Peer(peer.clone()).name(ipv6))]).collect()
}

/// One test each of what has to be compared in its own way; a single empty one where every port is meant.
fn port_tests(ports: Option<&PortSet>) -> Vec<Vec<Statement>> {
    let Some(ports) = ports else { return vec![Vec::new()] };
    let protocol = |protocol| Statement::equals(Field::L4Protocol, Datum::Protocol(protocol));
    let exact = match ports.exact.first().filter(|_| ports.exact.len() == 1) {
        _ if ports.exact.is_empty() => None,
        Some((p, port)) => {
            Some(vec![protocol(*p), Statement::equals(Field::DestinationPort, Datum::Port(*port))])
        }
        None => {
            let name = SetKey::Ports(ports.exact.clone()).name(false);
            Some(vec![look_up(&[Field::L4Protocol, Field::DestinationPort], name)])
        }
    };
    let ranges = ports.ranges.iter().map(|(p, first, last)| {
        vec![protocol(*p), Statement::equals(Field::DestinationPort, Datum::PortRange(*first, *last))]
    });
    let protocols = ports.protocols.iter().map(|p| vec![protocol(*p)]);
    exact.into_iter().chain(ranges).chain(protocols).collect()
}

fn cut(text: &str) -> String {
    text.chars().take(LONGEST_COMMENT).collect()
}

/// Maps and sets of the isolated pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SubjectSet {
    /// Address : jump to the chain of its Side.
    Side(Direction),
    /// The pair of a pod with itself.
    Itself,
    /// Every isolated pod, in whichever direction.
    Isolated,
}

impl SubjectSet {
    pub(super) const ALL: [Self; 4] =
        [Self::Side(Direction::Ingress), Self::Side(Direction::Egress), Self::Itself, Self::Isolated];

    pub(super) fn name(self, ipv6: bool) -> String {
        let stem = match self {
            Self::Side(direction) => direction.name(),
            Self::Itself => "itself",
            Self::Isolated => "isolated",
        };
        format!("{stem}{}", version(ipv6))
    }

    fn set(self, ipv6: bool) -> Set {
        let address = address_type(ipv6);
        match self {
            Self::Side(_) => Set::new(vec![address], SetData::Verdict),
            Self::Itself => Set::new(vec![address, address], SetData::None),
            Self::Isolated => Set::new(vec![address], SetData::None),
        }
    }
}

const MID_STREAM: &str = "mid-stream";
/// Drops what comes here; the first packets of what is denied are told before.
const DENIED: &str = "denied";
const TELL: &str = "tell";
/// Ends of connections that were denied of late, by family: each is told once in this time.
const TOLD_MILLIS: u64 = 5_000;
/// A scan of more than this finds the set full, and what does not fit is not told.
const TOLD_SIZE: u32 = 8_192;
/// Of a scan of a node's pods so much is told; beyond it a denied packet costs a look-up and a comparison.
const TOLD_PER_SECOND: u32 = 200;
const TOLD_BURST: u32 = 1_000;
const DNS_PORT: u16 = 53;
const STAND_IN_EGRESS: &str = "stand-in-egress";
const STAND_IN_PASSAGE: &str = "stand-in-passage";
/// An IPv6 header with room for extensions, and the ports behind it.
const TOLD_BYTES: u32 = 128;
/// Prefixes of nflog: whether the client called a Service, whose address the packet no longer bears.
pub const TOLD_OF_SERVICE: &str = "weft service";
const TOLD_DIRECT: &str = "weft direct";

/// The table without any isolated pod. `ingresses` are the addresses of this node's own ingress.
pub(super) fn skeleton(ingresses: &BTreeSet<IpAddr>, cluster_dns: &[IpAddr]) -> Table {
    let mut table = Table { name: TABLE_POLICY.to_owned(), ..Table::default() };
    for ipv6 in [false, true] {
        for set in SubjectSet::ALL {
            table.sets.insert(set.name(ipv6), set.set(ipv6));
        }
        table.sets.insert(told_name(ipv6), told(ipv6));
    }
    table.chains = BTreeMap::from([
        ("stand-in".to_owned(), stand_in()),
        (STAND_IN_EGRESS.to_owned(), Chain { base: None, rules: stand_in_egress(cluster_dns) }),
        (STAND_IN_PASSAGE.to_owned(), Chain { base: None, rules: stand_in_passage(cluster_dns) }),
        ("forward".to_owned(), base(Hook::Forward, forward())),
        ("input".to_owned(), base(Hook::Input, input())),
        ("output".to_owned(), base(Hook::Output, output(ingresses))),
        (DENIED.to_owned(), Chain { base: None, rules: drop_and_tell() }),
        (TELL.to_owned(), Chain { base: None, rules: tell() }),
        (MID_STREAM.to_owned(), Chain { base: None, rules: [false, true].map(picked_up).concat() }),
    ]);
    table
}

fn base(hook: Hook, rules: Vec<Rule>) -> Chain {
    Chain { base: Some(Base { kind: ChainKind::Filter, hook, priority: PRIORITY_FILTER }), rules }
}

/// A question that another node's resolver answers, because this node's gives no sign of life, is judged before it is sent there.
/// Of type `nat`, so that only first packets of connections come here.
fn stand_in() -> Chain {
    let base = Base { kind: ChainKind::Nat, hook: Hook::Prerouting, priority: PRIORITY_BEFORE_DNAT };
    Chain { base: Some(base), rules: to_dns(STAND_IN_EGRESS) }
}

fn stand_in_egress(cluster_dns: &[IpAddr]) -> Vec<Rule> {
    let judge = |address: &IpAddr| {
        let ipv6 = address.is_ipv6();
        let mut rule = side_of(Direction::Egress, Field::source(ipv6), ipv6);
        rule.statements.insert(0, Statement::equals(Field::destination(ipv6), Datum::Ip(*address)));
        rule
    };
    cluster_dns.iter().map(judge).collect()
}

/// The same on its way: what may leave is not asked again, but a pod of this node that bears the address where it goes.
fn stand_in_passage(cluster_dns: &[IpAddr]) -> Vec<Rule> {
    let pass = |address: &IpAddr| {
        let ipv6 = address.is_ipv6();
        let sent = Statement::CtOriginalDestination(*address);
        let mut judge = side_of(Direction::Ingress, Field::destination(ipv6), ipv6);
        judge.statements.insert(0, sent.clone());
        [judge, Rule::new(vec![sent, Statement::Verdict(Verdict::Accept)])]
    };
    cluster_dns.iter().flat_map(pass).collect()
}

fn to_dns(chain: &str) -> Vec<Rule> {
    let rule = |protocol| {
        Rule::new(vec![
            Statement::equals(Field::L4Protocol, Datum::Protocol(protocol)),
            Statement::equals(Field::DestinationPort, Datum::Port(DNS_PORT)),
            Statement::Verdict(Verdict::Jump(chain.into())),
        ])
        .comment("cluster DNS, to the resolver of another node")
    };
    [Protocol::Udp, Protocol::Tcp].map(rule).into()
}

fn forward() -> Vec<Rule> {
    let accept = Statement::Verdict(Verdict::Accept);
    let mut rules = vec![established(), mid_stream()];
    rules.extend(to_dns(STAND_IN_PASSAGE));
    rules.extend([false, true].map(|ipv6| {
        let pair = look_up(&[Field::source(ipv6), Field::destination(ipv6)], SubjectSet::Itself.name(ipv6));
        Rule::new(vec![pair, accept.clone()]).comment("a pod reaches itself")
    }));
    rules.extend([false, true].map(|ipv6| side_of(Direction::Egress, Field::source(ipv6), ipv6)));
    rules.extend([false, true].map(|ipv6| side_of(Direction::Ingress, Field::destination(ipv6), ipv6)));
    rules
}

/// What pods send to this node itself. Queries to its resolver are not tracked, so each one is judged.
fn input() -> Vec<Rule> {
    let accept = Statement::Verdict(Verdict::Accept);
    let not_from_pod = Statement::Match {
        field: Field::InputLink,
        negated: true,
        value: Datum::NamePrefix(POD_LINK_PREFIX.into()),
    };
    let mut rules = vec![Rule::new(vec![not_from_pod, accept.clone()]), established(), mid_stream()];
    rules.extend(NEIGHBOUR_DISCOVERY.map(|kind| {
        Rule::new(vec![Statement::equals(Field::Icmp6Type, Datum::Icmp6Type(kind)), accept.clone()])
            .comment("neighbour discovery")
    }));
    rules.extend([false, true].map(|ipv6| side_of(Direction::Egress, Field::source(ipv6), ipv6)));
    rules
}

/// What this node sends to its pods is allowed, but for what its ingress sends: clients of anywhere speak through that.
fn output(ingresses: &BTreeSet<IpAddr>) -> Vec<Rule> {
    let mut rules = vec![mid_stream()];
    if !ingresses.is_empty() {
        rules.push(established());
    }
    rules.extend(ingresses.iter().map(|ingress| {
        let ipv6 = ingress.is_ipv6();
        let map = SubjectSet::Side(Direction::Ingress).name(ipv6);
        let sent = Statement::equals(Field::source(ipv6), Datum::Ip(*ingress));
        Rule::new(vec![sent, Statement::VerdictMap { key: vec![Field::destination(ipv6)], map }])
            .comment("from this node's ingress")
    }));
    rules
}

fn established() -> Rule {
    let states = vec![CtState::Established, CtState::Related];
    Rule::new(vec![Statement::CtState { states, negated: false }, Statement::Verdict(Verdict::Accept)])
        .comment("replies, and errors about them")
}

/// A connection whose tracking was ended is not to be picked up again by a packet from its middle, in either direction.
fn mid_stream() -> Rule {
    let new = Statement::CtState { states: vec![CtState::New], negated: false };
    let jump = Statement::Verdict(Verdict::Jump(MID_STREAM.into()));
    Rule::new(vec![new, Statement::TcpBegins { negated: true }, jump])
}

fn picked_up(ipv6: bool) -> [Rule; 2] {
    [Field::source(ipv6), Field::destination(ipv6)].map(|field| {
        let isolated = look_up(&[field], SubjectSet::Isolated.name(ipv6));
        Rule::new(vec![isolated, Statement::Counter, denied()]).comment("not the beginning of a connection")
    })
}

fn denied() -> Statement {
    Statement::Verdict(Verdict::Goto(DENIED.into()))
}

fn told_name(ipv6: bool) -> String {
    format!("told{}", version(ipv6))
}

fn told(ipv6: bool) -> Set {
    let address = address_type(ipv6);
    let mut set = Set::new(vec![address, address, KeyType::L4Protocol, KeyType::Port], SetData::None);
    set.timeout_millis = Some(TOLD_MILLIS);
    set.dynamic_size = Some(TOLD_SIZE);
    set
}

fn ends(ipv6: bool) -> Vec<Field> {
    vec![Field::source(ipv6), Field::destination(ipv6), Field::L4Protocol, Field::DestinationPort]
}

fn drop_and_tell() -> Vec<Rule> {
    let new = |ipv6| {
        let unknown = Statement::Lookup { key: ends(ipv6), negated: true, set: told_name(ipv6) };
        let limit = Statement::Limit { per_second: TOLD_PER_SECOND, burst: TOLD_BURST };
        Rule::new(vec![unknown, limit, Statement::Verdict(Verdict::Jump(TELL.into()))])
    };
    let drop = Rule::new(vec![Statement::Verdict(Verdict::Drop)]);
    vec![new(false), new(true), drop]
}

fn tell() -> Vec<Rule> {
    let remember = |ipv6| {
        let (set, key) = (told_name(ipv6), ends(ipv6));
        Rule::new(vec![Statement::Remember { set, key, timeout_millis: TOLD_MILLIS, renewed: false }])
    };
    let log = |prefix: &str| Statement::Log {
        prefix: prefix.to_owned(),
        group: LOG_GROUP_DENIED,
        bytes: TOLD_BYTES,
    };
    let of_service = vec![Statement::CtStatusDnat, log(TOLD_OF_SERVICE), Statement::Verdict(Verdict::Return)];
    vec![remember(false), remember(true), Rule::new(of_service), Rule::new(vec![log(TOLD_DIRECT)])]
}

fn side_of(direction: Direction, field: Field, ipv6: bool) -> Rule {
    let map = SubjectSet::Side(direction).name(ipv6);
    Rule::new(vec![Statement::VerdictMap { key: vec![field], map }])
}

fn look_up(key: &[Field], set: String) -> Statement {
    Statement::Lookup { key: key.to_vec(), negated: false, set }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_block_without_its_exceptions_is_disjoint_and_whole() {
        let nets =
            block_nets(net("10.0.0.0/8"), &[net("10.1.0.0/16"), net("10.128.0.0/9")], &BTreeMap::new());
        let covers =
            |ip: &str| nets.iter().filter(|net| net.contains(&ip.parse::<IpAddr>().unwrap())).count();
        for (ip, times) in [
            ("10.0.0.0", 1),
            ("10.0.255.255", 1),
            ("10.1.0.0", 0),
            ("10.1.255.255", 0),
            ("10.2.0.0", 1),
            ("10.127.255.255", 1),
            ("10.128.0.0", 0),
            ("11.0.0.0", 0),
        ] {
            assert_eq!(covers(ip), times, "{ip} in {nets:?}");
        }
        assert_eq!(block_nets(net("0.0.0.0/0"), &[], &BTreeMap::new()), [net("0.0.0.0/0")]);
        assert_eq!(block_nets(net("fd00::/64"), &[net("fd00::/64")], &BTreeMap::new()), []);
    }

    #[test]
    fn a_block_that_covers_a_node_covers_what_it_sends_from_its_pod_range() {
        let host: IpAddr = "10.244.2.1".parse().unwrap();
        let hosts = BTreeMap::from([(host, vec!["192.0.2.2".parse().unwrap()])]);
        let nets = |cidr: &str, except: &[IpNet]| block_nets(net(cidr), except, &hosts);
        assert!(nets("192.0.2.0/24", &[]).contains(&IpNet::from(host)));
        assert!(!nets("192.0.2.0/24", &[net("192.0.2.2/32")]).contains(&IpNet::from(host)));
        assert_eq!(nets("10.244.0.0/16", &[]), [net("10.244.0.0/16")]);
    }

    #[test]
    fn the_peer_sets_are_told_by_their_prefix() {
        let named = SetKey::Named { peers: None, names: BTreeSet::new() };
        let pods = SetKey::Peer(PeerKey::Pods {
            namespaces: super::super::meaning::Namespaces::One("a".into()),
            pods: weft_model::policy::Selector::default(),
        });
        let nets = SetKey::Peer(PeerKey::Block { cidr: net("10.0.0.0/8"), except: vec![] });
        for name in [pods.name(false), nets.name(true), named.name(false)] {
            assert!(PEER_SETS.iter().any(|prefix| name.starts_with(prefix)), "{name}");
        }
        let others = SubjectSet::ALL.map(|set| set.name(false));
        assert!(others.iter().all(|name| !PEER_SETS.iter().any(|prefix| name.starts_with(prefix))));
    }
}
