//! What one Service puts into the table `weft-proxy`: elements of the maps, the chains that Services with equally many
//! endpoints share, and the chain and set of its source ranges. Pure.
//!
//! A Service with affinity sends a connection to a random endpoint's chain, which remembers that endpoint for the client
//! unless one is remembered already, and then goes by what is remembered: one map for all, and nothing that nft cannot
//! list (it has no words for a looked-up value in a key or an element).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use weft_model::constants::MARK_MASQUERADE;
use weft_model::ruleset::{
    Chain, Datum, ElementData, Elements, Field, Rule, Set, SetData, Statement, Verdict,
};

use super::layout::{REJECT, Scope, SetName, address, version};
use super::service::{Claim, Firewall, Frontend, Holding, Reach, Target};

/// A chain that Services share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shared {
    Spread(Spread),
    Stay(Stay),
}

/// Spreads connections over `count` endpoints, for all Services with that many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Spread {
    scope: Scope,
    ipv6: bool,
    count: u32,
    sticky: bool,
}

/// Sends a client where it went last, within that time, else to `endpoint`: for all Services that this endpoint is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stay {
    endpoint: SocketAddr,
    seconds: u32,
}

impl Shared {
    pub(super) fn chain_name(self) -> String {
        match self {
            Self::Spread(spread) => spread.chain_name(),
            Self::Stay(stay) => stay.chain_name(),
        }
    }

    pub(super) fn chain(self) -> Chain {
        let rules = match self {
            Self::Spread(spread) => vec![Rule::new(spread.statements())],
            Self::Stay(stay) => stay.rules(),
        };
        Chain { base: None, rules }
    }
}

impl Spread {
    fn chain_name(self) -> String {
        let Self { scope, ipv6, count, sticky } = self;
        let stem = if scope.is_node_port() { "np" } else { "lb" };
        let sticky = if sticky { "sticky-" } else { "" };
        format!("{}{sticky}{stem}{}-{count}", scope.prefix(), version(ipv6))
    }

    fn statements(self) -> Vec<Statement> {
        let Self { scope, ipv6, count, sticky } = self;
        let key = [scope.key(ipv6), vec![Field::RandomModulo(count)]].concat();
        if sticky {
            return vec![Statement::VerdictMap { key, map: SetName::Sticky(scope).of(ipv6).into() }];
        }
        let map = SetName::Endpoints(scope).of(ipv6).into();
        vec![Statement::SetMarkBits(MARK_MASQUERADE), Statement::DnatMap { ipv6, key, map }]
    }
}

impl Stay {
    /// nft has no `:` in names.
    fn chain_name(self) -> String {
        let Self { endpoint, seconds } = self;
        let ip = endpoint.ip().to_string().replace(':', ".");
        format!("stay{}-{ip}-{}-{seconds}s", version(endpoint.is_ipv6()), endpoint.port())
    }

    /// The look-up comes after the update, so that it finds what was there before or else this endpoint.
    fn rules(self) -> Vec<Rule> {
        let Self { endpoint, seconds } = self;
        let ipv6 = endpoint.is_ipv6();
        let (ip, port) = (endpoint.ip(), endpoint.port());
        let map = SetName::Affinity.of(ipv6).to_owned();
        let key = [vec![Field::source(ipv6)], Scope::Vip.key(ipv6)].concat();
        let timeout_millis = u64::from(seconds) * 1000;
        let update =
            Statement::Update { map: map.clone(), key: key.clone(), timeout_millis, address: ip, port };
        vec![
            Rule::new(vec![Statement::SetMarkBits(MARK_MASQUERADE)]),
            Rule::new(vec![update]),
            Rule::new(vec![Statement::DnatMap { ipv6, key, map }]),
            Rule::new(vec![Statement::Dnat { address: ip, port: Some(port) }])
                .comment("no more can be remembered"),
        ]
    }
}

/// The elements of one Service, by set and family, and the chains and sets that they lead to.
#[derive(Default)]
pub(super) struct Emission {
    pub sets: BTreeMap<(SetName, bool), Elements>,
    pub shared: Vec<Shared>,
    /// Of this Service alone.
    pub own_chains: BTreeMap<String, Chain>,
    pub own_sets: BTreeMap<String, Set>,
}

impl Emission {
    pub(super) fn add(&mut self, claim: &Claim, holding: &Holding) {
        match (claim, holding) {
            (Claim::Address(ip), Holding::Foreign) => {
                self.insert(SetName::Foreign, ip.is_ipv6(), vec![Datum::Ip(*ip)], ElementData::None);
            }
            (Claim::Address(ip), Holding::Known) => {
                self.insert(SetName::ClusterIps, ip.is_ipv6(), vec![Datum::Ip(*ip)], ElementData::None);
            }
            (Claim::Vip(ip, protocol, port), Holding::Frontend(frontend)) => {
                let key = vec![Datum::Ip(*ip), Datum::Protocol(*protocol), Datum::Port(*port)];
                self.add_frontend([Scope::Vip, Scope::InternalVip], ip.is_ipv6(), &key, frontend);
            }
            (Claim::NodePort { ipv6, protocol, port }, Holding::Frontend(frontend)) => {
                let key = vec![Datum::Protocol(*protocol), Datum::Port(*port)];
                self.add_frontend([Scope::NodePort, Scope::InternalNodePort], *ipv6, &key, frontend);
            }
            _ => {}
        }
    }

    /// The frontends of `claims` that only some clients may reach; `group` is the name of their Service.
    pub(super) fn add_firewall<'a>(
        &mut self,
        group: &str,
        firewall: &Firewall,
        claims: impl Iterator<Item = (&'a Claim, &'a Holding)>,
    ) {
        for (claim, holding) in claims {
            let (
                Claim::Vip(ip, protocol, port),
                Holding::Frontend(Frontend { reach: Reach::External { firewalled: true }, .. }),
            ) = (claim, holding)
            else {
                continue;
            };
            let ipv6 = ip.is_ipv6();
            let chain = format!("firewall{}-{group}", version(ipv6));
            let key = vec![Datum::Ip(*ip), Datum::Protocol(*protocol), Datum::Port(*port)];
            let verdict = ElementData::Verdict(Verdict::Jump(chain.as_str().into()));
            self.insert(SetName::Firewalls, ipv6, key, verdict);
            let sources = format!("sources{}-{group}", version(ipv6));
            self.own_chains.insert(chain, firewall_chain(firewall, ipv6, &sources));
            self.own_sets.insert(sources, sources_set(firewall, ipv6, group));
        }
    }

    fn add_frontend(
        &mut self,
        [outside, inside]: [Scope; 2],
        ipv6: bool,
        key: &[Datum],
        frontend: &Frontend,
    ) {
        let verdict = match &frontend.target {
            Target::Endpoints(endpoints) => {
                self.spread(outside, ipv6, key, endpoints, frontend.affinity_seconds);
                None
            }
            Target::Reject => Some(Verdict::Goto(REJECT.into())),
            Target::Drop => Some(Verdict::Drop),
        };
        if let Some(verdict) = verdict {
            let set =
                if outside.is_node_port() { SetName::NoNodePortEndpoints } else { SetName::NoEndpoints };
            self.insert(set, ipv6, key.to_vec(), ElementData::Verdict(verdict));
        }
        if let Some(endpoints) = &frontend.internal {
            self.spread(inside, ipv6, key, endpoints, frontend.affinity_seconds);
        }
    }

    fn spread(
        &mut self,
        scope: Scope,
        ipv6: bool,
        key: &[Datum],
        endpoints: &[SocketAddr],
        seconds: Option<u32>,
    ) {
        let mut count = 0;
        for endpoint in endpoints {
            let mut key = key.to_vec();
            key.push(Datum::Index(count));
            match seconds {
                None => {
                    let data = ElementData::AddressAndPort(endpoint.ip(), endpoint.port());
                    self.insert(SetName::Endpoints(scope), ipv6, key, data);
                }
                Some(seconds) => {
                    let stay = Shared::Stay(Stay { endpoint: *endpoint, seconds });
                    let verdict = ElementData::Verdict(Verdict::Goto(stay.chain_name().into()));
                    self.insert(SetName::Sticky(scope), ipv6, key, verdict);
                    self.shared.push(stay);
                }
            }
            count += 1;
        }
        let spread = Shared::Spread(Spread { scope, ipv6, count, sticky: seconds.is_some() });
        let verdict = ElementData::Verdict(Verdict::Goto(spread.chain_name().into()));
        self.insert(SetName::Frontends(scope), ipv6, key.to_vec(), verdict);
        self.shared.push(spread);
    }

    fn insert(&mut self, set: SetName, ipv6: bool, key: Vec<Datum>, data: ElementData) {
        self.sets.entry((set, ipv6)).or_default().insert(&key, &data);
    }
}

/// Returns for whoever may come.
fn firewall_chain(firewall: &Firewall, ipv6: bool, sources: &str) -> Chain {
    let back = || Statement::Verdict(Verdict::Return);
    let listed =
        Statement::Lookup { key: vec![Field::source(ipv6)], negated: false, set: sources.to_owned() };
    let mut rules = vec![Rule::new(vec![listed, back()])];
    if firewall.own.contains(&ipv6) {
        let own = Statement::SourceIsLocal { negated: false };
        rules.push(Rule::new(vec![own, back()]).comment("an address of this node is in the list"));
    }
    rules.push(Rule::new(vec![Statement::Verdict(Verdict::Drop)]));
    Chain { base: None, rules }
}

fn sources_set(firewall: &Firewall, ipv6: bool, group: &str) -> Set {
    let ranges = firewall.ranges.iter().filter(|range| range.addr().is_ipv6() == ipv6);
    let elements: Elements = ranges.map(|range| (vec![Datum::Net(*range)], ElementData::None)).collect();
    let mut set = Set { interval: true, ..Set::new(vec![address(ipv6)], SetData::None) };
    if !elements.is_empty() {
        set.groups.insert(group.into(), Arc::new(elements));
    }
    set
}
