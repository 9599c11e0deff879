//! Follows the first packet of a connection through a rule-set value, as the kernel would: base chains by hook and priority,
//! jumps, gotos, verdict maps, DNAT, masquerade. Knows nothing of Services.
//!
//! Later packets of a connection are the kernel's business: conntrack repeats what the first one decided. What rules add to
//! dynamic maps is kept in a [`Memory`] from packet to packet.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use weft_model::objects::Protocol;
use weft_model::ruleset::{
    Chain, ChainKind, CtState, Datum, ElementData, Field, Hook, Key, Rule, Set, Statement, Table, Verdict,
};

/// What the rules can see of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub protocol: Protocol,
}

/// Where a packet enters the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// Received on this link.
    Link(&'a str),
    /// Sent by the host itself.
    Host,
}

/// The node as far as routing goes.
pub trait Routes {
    /// The link towards `destination`; `None` when it is this node's own.
    fn link(&self, destination: IpAddr) -> Option<String>;

    fn is_local(&self, address: IpAddr) -> bool;
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Rejected,
    Dropped,
    /// Delivered or sent on to `destination`; `masqueraded` when the source became this node's.
    Passed {
        destination: SocketAddr,
        masqueraded: bool,
    },
}

/// Elements that rules added, by map and key.
pub type Memory = BTreeMap<(String, Vec<Datum>), ElementData>;

/// Runs the packet through; `random` stands for every random number.
///
/// # Panics
/// When the table is not well-formed (an unknown chain or map, a statement out of place): the kernel would refuse it.
pub fn trace(
    table: &Table,
    routes: &impl Routes,
    origin: Origin<'_>,
    packet: &Packet,
    random: u32,
    memory: &mut Memory,
) -> Outcome {
    let mut run = Run {
        table,
        routes,
        random,
        memory,
        packet: packet.clone(),
        mark: 0,
        masqueraded: false,
        input: None,
        output: None,
    };
    let ended = match origin {
        Origin::Link(link) => run.received(link),
        Origin::Host => run.sent(),
    };
    match ended {
        Err(outcome) => outcome,
        Ok(()) => Outcome::Passed { destination: run.packet.destination, masqueraded: run.masqueraded },
    }
}

struct Run<'a, R> {
    table: &'a Table,
    routes: &'a R,
    random: u32,
    memory: &'a mut Memory,
    packet: Packet,
    mark: u32,
    masqueraded: bool,
    input: Option<String>,
    output: Option<String>,
}

/// How a chain or a rule ends.
#[derive(PartialEq, Eq)]
enum End {
    /// At its end: on with what comes after it.
    Through,
    /// Back to where this chain was jumped to from.
    Return,
    /// This base chain is done: accepted, or translated.
    Accept,
}

impl<'a, R: Routes> Run<'a, R> {
    fn received(&mut self, link: &str) -> Result<(), Outcome> {
        self.input = Some(link.to_owned());
        self.hook(Hook::Prerouting, true)?;
        self.output = self.routes.link(self.packet.destination.ip());
        if self.output.is_none() {
            return self.hook(Hook::Input, true);
        }
        self.hook(Hook::Forward, true)?;
        self.hook(Hook::Postrouting, true)
    }

    /// Routed before the output hook and again after it; what stays on the host comes in again by `lo`, its translations
    /// decided already.
    fn sent(&mut self) -> Result<(), Outcome> {
        let lo = || Some("lo".to_owned());
        self.output = self.routes.link(self.packet.destination.ip()).or_else(lo);
        self.hook(Hook::Output, true)?;
        self.output = self.routes.link(self.packet.destination.ip()).or_else(lo);
        self.hook(Hook::Postrouting, true)?;
        if self.routes.is_local(self.packet.destination.ip()) {
            self.input = self.output.take();
            self.hook(Hook::Prerouting, false)?;
            self.hook(Hook::Input, false)?;
        }
        Ok(())
    }

    fn hook(&mut self, hook: Hook, first: bool) -> Result<(), Outcome> {
        let mut chains: Vec<(i32, &'a Chain)> = Vec::new();
        let table: &'a Table = self.table;
        for chain in table.chains.values() {
            if let Some(base) = chain.base.filter(|base| base.hook == hook)
                && (first || base.kind != ChainKind::Nat)
            {
                chains.push((base.priority, chain));
            }
        }
        chains.sort_by_key(|(priority, _)| *priority);
        for (_, chain) in chains {
            let _ = self.chain(&chain.rules)?;
        }
        Ok(())
    }

    fn chain(&mut self, rules: &[Rule]) -> Result<End, Outcome> {
        for rule in rules {
            match self.rule(&rule.statements)? {
                End::Through => {}
                end => return Ok(end),
            }
        }
        Ok(End::Through)
    }

    fn rule(&mut self, statements: &[Statement]) -> Result<End, Outcome> {
        for statement in statements {
            if !self.families_fit(statement) {
                return Ok(End::Through);
            }
            let holds = match statement {
                Statement::Match { field, negated, value } => self.matches(*field, value) != *negated,
                Statement::MarkIs { mask, value } => self.mark & mask == *value,
                Statement::Lookup { key, negated, set } => self.find(set, key).is_some() != *negated,
                Statement::SourceIsLocal { negated } => {
                    self.routes.is_local(self.packet.source.ip()) != *negated
                }
                Statement::DestinationIsLocal { negated } => {
                    self.routes.is_local(self.packet.destination.ip()) != *negated
                }
                Statement::SetMarkBits(bits) => {
                    self.mark |= bits;
                    true
                }
                Statement::CtState { states, negated } => states.contains(&CtState::New) != *negated,
                Statement::TcpBegins { negated } => self.packet.protocol == Protocol::Tcp && !negated,
                Statement::Counter | Statement::Limit { .. } | Statement::Log { .. } => true,
                Statement::CtStatusDnat | Statement::CtOriginalDestination(_) => false,
                Statement::Remember { set, key, .. } => {
                    if let Some(key) = self.load_all(key) {
                        self.memory.entry((set.clone(), key)).or_insert(ElementData::None);
                    }
                    true
                }
                Statement::VerdictMap { key, map } => match self.find(map, key) {
                    Some(ElementData::Verdict(verdict)) => return self.verdict(&verdict),
                    Some(other) => panic!("map {map} holds {other:?}, not a verdict"),
                    None => false,
                },
                Statement::Verdict(verdict) => return self.verdict(verdict),
                Statement::Reject => return Err(Outcome::Rejected),
                Statement::DnatMap { key, map, .. } => match self.find(map, key) {
                    Some(ElementData::AddressAndPort(address, port)) => {
                        self.packet.destination = SocketAddr::new(address, port);
                        return Ok(End::Accept);
                    }
                    Some(other) => panic!("map {map} holds {other:?}, not an address"),
                    None => false,
                },
                Statement::Update { map, key, address, port, .. } => {
                    assert!(
                        self.table.sets[map].dynamic_size.is_some(),
                        "map {map} takes no elements of rules"
                    );
                    if let Some(key) = self.load_all(key) {
                        let data = ElementData::AddressAndPort(*address, *port);
                        self.memory.entry((map.clone(), key)).or_insert(data);
                    }
                    true
                }
                Statement::Dnat { address, port } => {
                    let port = port.unwrap_or(self.packet.destination.port());
                    self.packet.destination = SocketAddr::new(*address, port);
                    return Ok(End::Accept);
                }
                Statement::Masquerade => {
                    self.masqueraded = true;
                    return Ok(End::Accept);
                }
                other => panic!("the tracer does not know {other:?}"),
            };
            if !holds {
                return Ok(End::Through);
            }
        }
        Ok(End::Through)
    }

    fn verdict(&mut self, verdict: &Verdict) -> Result<End, Outcome> {
        match verdict {
            Verdict::Accept => Ok(End::Accept),
            Verdict::Drop => Err(Outcome::Dropped),
            Verdict::Return => Ok(End::Return),
            Verdict::Jump(name) => match self.chain(self.rules_of(name))? {
                End::Accept => Ok(End::Accept),
                End::Through | End::Return => Ok(End::Through),
            },
            // Whatever ends a chain that was gone to ends the chain it was gone to from.
            Verdict::Goto(name) => match self.chain(self.rules_of(name))? {
                End::Accept => Ok(End::Accept),
                End::Through | End::Return => Ok(End::Return),
            },
        }
    }

    fn rules_of(&self, name: &str) -> &'a [Rule] {
        let table: &'a Table = self.table;
        &table.chains.get(name).unwrap_or_else(|| panic!("no chain {name}")).rules
    }

    /// A statement that reads one family holds only for packets of it.
    fn families_fit(&self, statement: &Statement) -> bool {
        let fits = |field: &Field| match field {
            Field::Ip4Source | Field::Ip4Destination => self.packet.destination.is_ipv4(),
            Field::Ip6Source | Field::Ip6Destination => self.packet.destination.is_ipv6(),
            _ => true,
        };
        match statement {
            Statement::Match { field, .. } => fits(field),
            Statement::Lookup { key, .. }
            | Statement::VerdictMap { key, .. }
            | Statement::Remember { key, .. }
            | Statement::Update { key, .. } => key.iter().all(fits),
            Statement::Dnat { address, .. } => address.is_ipv6() == self.packet.destination.is_ipv6(),
            Statement::DnatMap { ipv6, key, .. } => {
                *ipv6 == self.packet.destination.is_ipv6() && key.iter().all(fits)
            }
            _ => true,
        }
    }

    fn matches(&self, field: Field, value: &Datum) -> bool {
        match (self.load(field), value) {
            (Some(Datum::Ip(ip)), Datum::Net(net)) => net.contains(&ip),
            (Some(Datum::Port(port)), Datum::PortRange(first, last)) => (*first..=*last).contains(&port),
            (Some(Datum::Name(name)), Datum::NamePrefix(prefix)) => name.starts_with(&**prefix),
            (Some(loaded), value) => loaded == *value,
            (None, _) => false,
        }
    }

    fn load(&self, field: Field) -> Option<Datum> {
        let packet = &self.packet;
        Some(match field {
            Field::Ip4Source | Field::Ip6Source => Datum::Ip(packet.source.ip()),
            Field::Ip4Destination | Field::Ip6Destination => Datum::Ip(packet.destination.ip()),
            Field::Family => Datum::Ipv6(packet.destination.is_ipv6()),
            Field::L4Protocol => Datum::Protocol(packet.protocol),
            Field::SourcePort => Datum::Port(packet.source.port()),
            Field::DestinationPort => Datum::Port(packet.destination.port()),
            Field::InputLink => Datum::Name(self.input.as_deref()?.into()),
            Field::OutputLink => Datum::Name(self.output.as_deref()?.into()),
            Field::RandomModulo(count) => Datum::Index(self.random % count),
            Field::Icmp4Type
            | Field::Icmp4ErrorDestination
            | Field::Icmp6Type
            | Field::Icmp6ErrorDestination => return None,
        })
    }

    fn load_all(&self, key: &[Field]) -> Option<Vec<Datum>> {
        key.iter().map(|field| self.load(*field)).collect()
    }

    fn find(&self, name: &str, key: &[Field]) -> Option<ElementData> {
        let set: &Set = self.table.sets.get(name).unwrap_or_else(|| panic!("no set {name}"));
        assert_eq!(set.key.len(), key.len(), "key of another shape");
        let key = self.load_all(key)?;
        if set.dynamic_size.is_some() {
            return self.memory.get(&(name.to_owned(), key)).cloned();
        }
        let holds = |element: Key<'_>| match (element.to_vec().as_slice(), key.as_slice()) {
            ([Datum::Net(net)], [Datum::Ip(address)]) => net.contains(address),
            _ => false,
        };
        let intervals = set.elements().filter(|(element, _)| set.interval && holds(*element));
        let mut found =
            set.groups.values().filter_map(|group| group.get(&key)).chain(intervals.map(|(_, data)| data));
        let first = found.next();
        assert!(found.next().is_none(), "{key:?} stands in two groups or intervals");
        first
    }
}
