//! Rules about the cluster's DNS addresses: this node's resolver answers without conntrack, another node's while this one gives no
//! sign of life. Pure.
//!
//! ```text
//!  raw-prerouting  (-300)  from the underlay: drop;  to a resolver of this node: notrack
//!  raw-output      (-300)  a pulse: its address answers for another 600 ms;  from or to a resolver: notrack
//!  stand-in        (-105)  of a DNS address that does not answer: to the stand-in's resolver, with conntrack
//!  masquerade        (95)  a question of the host itself to the stand-in
//! ```
//!
//! A pulse is a datagram from a DNS address to itself, from port 53 to port 53, and goes nowhere: the thread that answers sends it
//! while it can answer. A rule renews the time of the address by it, so that no transaction is needed. The resolver listens on the
//! node's `host` addresses too, where others find it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_model::constants::TUNNEL_LINK;
use weft_model::objects::{Protocol, host_address};
use weft_model::ruleset::{Datum, Field, Rule, Set, SetData, Statement, Verdict};
use weft_model::{ClusterConfig, NodeName};

use super::quarantine::Accepted;
use super::rules::{Family, family_of};

pub(super) const TRANSPORTS: [Protocol; 2] = [Protocol::Udp, Protocol::Tcp];
const DNS_PORT: u16 = 53;
/// Three pulses.
const ANSWERS_MILLIS: u64 = 600;
/// As many addresses as may give a sign of life.
const ADDRESSES: u32 = 64;
const QUESTIONS: &str = "dns-questions";
const ANSWERS: &str = "dns-answers";
const SENT: &str = "dns-sent";
const FROM_OUTSIDE: &str = "dns-from-outside";

/// Who answers where, seen from one node.
pub(super) struct Resolvers<'a> {
    /// What every node answers on.
    cluster: Vec<IpAddr>,
    /// This node's `host` addresses.
    hosts: &'a [IpAddr],
    /// Nodes that answer while this one does not, and where: at most one a family.
    stand_ins: Vec<(NodeName, IpAddr)>,
}

impl<'a> Resolvers<'a> {
    /// `others` are the nodes that this one has a tunnel to. The stand-in is the next by name that is ready, in a circle, so that the
    /// load of one that fails does not come upon the same node as another's.
    pub(super) fn new<'b>(
        config: &'a ClusterConfig,
        hosts: &'a [IpAddr],
        own: &NodeName,
        others: impl Iterator<Item = &'b Accepted<'b>>,
    ) -> Self {
        let mut others: Vec<_> = others.filter(|other| !other.node.unready && !other.node.leaving).collect();
        others.sort_by_key(|Accepted { node, .. }| (node.name < *own, &node.name));
        let theirs = || {
            others.iter().flat_map(|other| {
                let hosts = other.pod_cidrs.iter().filter_map(host_address);
                hosts.map(|host| (other.node.name.clone(), host))
            })
        };
        let stand_in = |ipv6: bool| theirs().find(|(_, host)| host.is_ipv6() == ipv6);
        let cluster: Vec<IpAddr> = config.resolver_addresses().collect();
        let ipv6: BTreeSet<bool> = cluster.iter().map(IpAddr::is_ipv6).collect();
        Self { cluster, hosts, stand_ins: ipv6.into_iter().filter_map(stand_in).collect() }
    }

    /// Names of the nodes that stand in, once each.
    pub(super) fn stand_ins(&self) -> BTreeSet<NodeName> {
        self.stand_ins.iter().map(|(name, _)| name.clone()).collect()
    }

    fn stand_in(&self, address: &IpAddr) -> Option<IpAddr> {
        let mut hosts = self.stand_ins.iter().map(|(_, host)| *host);
        hosts.find(|host| host.is_ipv6() == address.is_ipv6())
    }

    fn own(&self) -> impl Iterator<Item = &IpAddr> {
        self.cluster.iter().chain(self.hosts)
    }

    /// Sets of the addresses that answer now.
    pub(super) fn sets(families: [&Family; 2]) -> [(String, Set); 2] {
        families.map(|family| {
            let mut set = Set::new(vec![family.key], SetData::None);
            set.timeout_millis = Some(ANSWERS_MILLIS);
            set.dynamic_size = Some(ADDRESSES);
            (family.answering.to_owned(), set)
        })
    }

    /// What the port decides is asked first, so that other packets pass by the rest.
    pub(super) fn prerouting() -> Vec<Rule> {
        [on_port(Field::DestinationPort, QUESTIONS), on_port(Field::SourcePort, ANSWERS)].concat()
    }

    pub(super) fn output(&self) -> Vec<Rule> {
        let mut rules =
            [on_port(Field::SourcePort, SENT), on_port(Field::DestinationPort, QUESTIONS)].concat();
        rules.extend(self.own().map(silence));
        rules
    }

    pub(super) fn from_underlay() -> Vec<Rule> {
        on_port(Field::DestinationPort, FROM_OUTSIDE).into()
    }

    /// What the others jump to.
    pub(super) fn chains(&self) -> [(&'static str, Vec<Rule>); 4] {
        let mut sent: Vec<Rule> = self.cluster.iter().map(pulse).collect();
        sent.extend(self.answers());
        [(QUESTIONS, self.questions()), (ANSWERS, self.answers()), (SENT, sent), (FROM_OUTSIDE, self.shut())]
    }

    fn questions(&self) -> Vec<Rule> {
        let rule = |address: &IpAddr| {
            let family = family_of(*address);
            let mut statements = vec![Statement::equals(family.destination, Datum::Ip(*address))];
            if self.cluster.contains(address) && self.stand_in(address).is_some() {
                let (key, set) = (vec![family.destination], family.answering.to_owned());
                statements.push(Statement::Lookup { key, negated: false, set });
            }
            untracked(statements)
        };
        self.own().map(rule).collect()
    }

    fn answers(&self) -> Vec<Rule> {
        let rule = |address: &IpAddr| {
            untracked(vec![Statement::equals(family_of(*address).source, Datum::Ip(*address))])
        };
        self.own().map(rule).collect()
    }

    /// The resolver is for the nodes and their pods.
    fn shut(&self) -> Vec<Rule> {
        let rule = |address: &IpAddr| {
            let to = Statement::equals(family_of(*address).destination, Datum::Ip(*address));
            Rule::new(vec![to, Statement::Counter, Statement::Verdict(Verdict::Drop)])
                .comment("cluster DNS is for nodes and pods")
        };
        self.own().map(rule).collect()
    }

    /// For a connection's first packet, on its way in and out of this host.
    pub(super) fn to_stand_in(&self) -> Vec<Rule> {
        let rule = |address: &IpAddr, stand_in: IpAddr, protocol| {
            let mut statements = to(address, protocol);
            let translation = Statement::Dnat { address: stand_in, port: Some(DNS_PORT) };
            statements.extend([Statement::Counter, translation]);
            Rule::new(statements).comment("the resolver of this node gives no sign of life")
        };
        let pairs = self.cluster.iter().filter_map(|address| Some((address, self.stand_in(address)?)));
        pairs
            .flat_map(|(address, stand_in)| TRANSPORTS.map(|protocol| rule(address, stand_in, protocol)))
            .collect()
    }

    /// The host's own questions have the address itself as their source, since it is local.
    pub(super) fn masquerade(&self) -> Vec<Rule> {
        let rule = |address: &IpAddr| {
            Rule::new(vec![
                Statement::equals(Field::OutputLink, Datum::Name(TUNNEL_LINK.into())),
                Statement::equals(family_of(*address).source, Datum::Ip(*address)),
                Statement::Masquerade,
            ])
        };
        self.cluster.iter().filter(|address| self.stand_in(address).is_some()).map(rule).collect()
    }
}

/// Questions by this transport.
pub(super) fn to(address: &IpAddr, protocol: Protocol) -> Vec<Statement> {
    let to = Statement::equals(family_of(*address).destination, Datum::Ip(*address));
    [vec![to], port(Field::DestinationPort, protocol)].concat()
}

fn port(field: Field, protocol: Protocol) -> Vec<Statement> {
    let protocol = Statement::equals(Field::L4Protocol, Datum::Protocol(protocol));
    vec![protocol, Statement::equals(field, Datum::Port(DNS_PORT))]
}

fn on_port(field: Field, chain: &str) -> [Rule; 2] {
    TRANSPORTS.map(|protocol| {
        let mut statements = port(field, protocol);
        statements.push(Statement::Verdict(Verdict::Jump(chain.into())));
        Rule::new(statements)
    })
}

fn untracked(mut statements: Vec<Statement>) -> Rule {
    statements.extend([Statement::Notrack, Statement::Verdict(Verdict::Accept)]);
    Rule::new(statements)
}

fn pulse(address: &IpAddr) -> Rule {
    let family = family_of(*address);
    let mut statements = to(address, Protocol::Udp);
    statements.push(Statement::equals(family.source, Datum::Ip(*address)));
    statements.push(Statement::Remember {
        set: family.answering.to_owned(),
        key: vec![family.source],
        timeout_millis: ANSWERS_MILLIS,
        renewed: true,
    });
    statements.push(Statement::Verdict(Verdict::Drop));
    Rule::new(statements).comment("a sign of life")
}

/// While the agent restarts nobody listens on the address. A resolver that is told so gives up at once; one that hears nothing
/// asks again. The error's own source is the address in IPv4 only.
fn silence(address: &IpAddr) -> Rule {
    let family = family_of(*address);
    let statements = vec![
        Statement::equals(family.icmp, family.unreachable.clone()),
        Statement::equals(family.icmp_error_destination, Datum::Ip(*address)),
        Statement::Counter,
        Statement::Verdict(Verdict::Drop),
    ];
    Rule::new(statements).comment("a restarting resolver is asked again")
}
