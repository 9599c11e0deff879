//! nftables rule sets as values: one [`Table`] is the whole desired state of one owner.
//!
//! Planners build these; `netstack::kernel::nft` diffs and encodes them; tests print and trace them. All tables are
//! of family `inet`. Elements are grouped by the object they come from, so that one change costs one group
//! (decision 16): groups that are the same `Arc` are not looked at.
//!
//! ```text
//!  Table (applied or observed) --+
//!                                +--diff--> [Op] in the order one transaction carries them out
//!  Table (desired) --------------+
//! ```
//!
//! `Display` prints nft's own syntax, elements sorted, for golden files and people.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::objects::Protocol;
use crate::shared_map::SharedMap;

mod diff;
mod elements;
#[cfg(test)]
mod fake;
mod print;
#[cfg(test)]
mod tests;

pub use diff::{Element, Op, diff};
pub use elements::{AsKey, Elements, Key, KeyBuffer};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub name: String,
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<String, Set>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// `None` for a chain that only jumps reach.
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    pub kind: ChainKind,
    pub hook: Hook,
    /// See `constants` for the reasoning of each.
    pub priority: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    Filter,
    Nat,
    /// Re-routes after the chain changed the mark of a locally generated packet.
    Route,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub statements: Vec<Statement>,
    /// For people who read `nft list ruleset`; at most 100 bytes.
    pub comment: Option<String>,
}

impl Rule {
    pub fn new(statements: Vec<Statement>) -> Self {
        Self { statements, comment: None }
    }

    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }
}

/// What another program's firewall must let through: a rule for its base chains of this hook that end in a drop. An accept in a
/// table of ours could not override that (decision 3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    pub hook: Hook,
    /// Ends in `accept`.
    pub rule: Rule,
}

/// One step of a rule. A statement that reads a field of one IP family holds only for packets of that family: the
/// encoder puts the `meta nfproto` match before it, the tracer behaves alike.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Statement {
    /// `field == value` (or `!=` when negated). An [`Datum::Net`] compares the prefix; [`Datum::NamePrefix`] likewise.
    Match {
        field: Field,
        negated: bool,
        value: Datum,
    },
    /// `meta mark & mask == value`.
    MarkIs {
        mask: u32,
        value: u32,
    },
    /// `key @set`, `key != @set`.
    Lookup {
        key: Vec<Field>,
        negated: bool,
        set: String,
    },
    /// `key vmap @map`: no verdict when the key is absent.
    VerdictMap {
        key: Vec<Field>,
        map: String,
    },
    /// `ct state { ... }`.
    CtState {
        states: Vec<CtState>,
        negated: bool,
    },
    /// `tcp flags syn / fin,syn,rst,ack`: the first packet of a TCP connection; implies `meta l4proto tcp`.
    TcpBegins {
        negated: bool,
    },
    /// `ct status dnat`: this connection's destination was translated.
    CtStatusDnat,
    /// `ct original ip daddr ADDRESS`: where the connection's first packet was sent to, before any translation.
    CtOriginalDestination(IpAddr),
    /// `fib daddr type local`.
    DestinationIsLocal {
        negated: bool,
    },
    /// `fib saddr type local`.
    SourceIsLocal {
        negated: bool,
    },
    /// `dnat ip to key map @map`: the map's data is an address and a port; nothing happens when the key is absent.
    DnatMap {
        ipv6: bool,
        key: Vec<Field>,
        map: String,
    },
    /// `update @map { key timeout T : ADDRESS . PORT }`: a live element keeps its data and its time begins anew, else there
    /// is one with this data. Does not hold when the map is full.
    Update {
        map: String,
        key: Vec<Field>,
        timeout_millis: u64,
        address: IpAddr,
        port: u16,
    },
    /// `add @set { key timeout T }`: the packet's key stands in the set from now on. Does not hold when the set is full.
    Remember {
        set: String,
        key: Vec<Field>,
        timeout_millis: u64,
        /// `update` for `add`: the time of a key that stands there begins anew.
        renewed: bool,
    },
    /// `limit rate N/second burst M packets`: holds for no more packets than this.
    Limit {
        per_second: u32,
        burst: u32,
    },
    /// `log prefix TEXT group N snaplen BYTES`: a copy of the packet's beginning for whoever listens to this group of nflog.
    Log {
        prefix: String,
        group: u16,
        bytes: u32,
    },
    /// `dnat ip to ADDRESS:PORT` of this family.
    Dnat {
        address: IpAddr,
        port: Option<u16>,
    },
    Snat {
        address: IpAddr,
    },
    /// `masquerade fully-random`.
    Masquerade,
    /// `meta mark set meta mark | bits`.
    SetMarkBits(u32),
    Notrack,
    Counter,
    Verdict(Verdict),
    /// TCP reset for TCP, ICMP port unreachable for the rest.
    Reject,
}

impl Statement {
    /// `field == value`.
    pub fn equals(field: Field, value: Datum) -> Self {
        Self::Match { field, negated: false, value }
    }

    /// `field != value`.
    pub fn differs(field: Field, value: Datum) -> Self {
        Self::Match { field, negated: true, value }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(Box<str>),
    Goto(Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CtState {
    New,
    Established,
    Related,
    Invalid,
    Untracked,
}

/// What a statement loads: the key of a match, look-up or map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Field {
    Ip4Source,
    Ip4Destination,
    Ip6Source,
    Ip6Destination,
    /// `meta nfproto`.
    Family,
    /// `meta l4proto`.
    L4Protocol,
    /// `th sport`.
    SourcePort,
    /// `th dport`.
    DestinationPort,
    /// `meta iifname`.
    InputLink,
    /// `meta oifname`.
    OutputLink,
    /// `icmp type`; implies `meta l4proto icmp`.
    Icmp4Type,
    /// In an ICMP error, the destination of the packet that it is about; nft has no name for it, and it implies nothing:
    /// [`Field::Icmp4Type`] comes before it.
    Icmp4ErrorDestination,
    /// The same in an ICMPv6 error.
    Icmp6ErrorDestination,
    /// `icmpv6 type`; implies `meta l4proto icmpv6`.
    Icmp6Type,
    /// `numgen random mod N`; as an element of a key it matches [`Datum::Index`].
    RandomModulo(u32),
}

impl Field {
    /// The source address of a family.
    pub fn source(ipv6: bool) -> Self {
        if ipv6 { Self::Ip6Source } else { Self::Ip4Source }
    }

    /// The destination address of a family.
    pub fn destination(ipv6: bool) -> Self {
        if ipv6 { Self::Ip6Destination } else { Self::Ip4Destination }
    }
}

/// A value of a field, an element's key or a map's data.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Datum {
    Ip(IpAddr),
    /// A prefix: in a `Match`, or an element of an interval set.
    Net(IpNet),
    Protocol(Protocol),
    /// Any other IANA protocol number.
    ProtocolNumber(u8),
    /// `meta nfproto`: true is IPv6.
    Ipv6(bool),
    Port(u16),
    /// From the first to the last, both included: in a `Match` only.
    PortRange(u16, u16),
    /// A whole link name.
    Name(Box<str>),
    /// `iifname "weftp*"`.
    NamePrefix(Box<str>),
    Icmp4Type(u8),
    Icmp6Type(u8),
    /// Result of `numgen`.
    Index(u32),
}

/// Elements by the object they come from (`default/echo`).
pub type Groups = SharedMap<Arc<str>, Arc<Elements>>;

/// A set, map or verdict map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub key: Vec<KeyType>,
    pub data: SetData,
    /// Elements are [`Datum::Net`]s that must not overlap (`flags interval`); the key is one address field.
    pub interval: bool,
    /// Elements expire this many milliseconds after they were added (`flags timeout`); such elements are never part of
    /// a plan: they are added and refreshed at run time by the owner or by rules, and the diff leaves them alone.
    pub timeout_millis: Option<u64>,
    /// Rules add elements as packets come (`flags dynamic`), at most this many; always with a timeout.
    pub dynamic_size: Option<u32>,
    /// How many elements the kernel keeps room for from the beginning; it refuses more. `None`: it makes room as they come, which
    /// takes it three times as long. Only for sets that no rule adds to; see [`Set::room_for`].
    pub room: Option<u32>,
    /// One key stands in one group only.
    pub groups: Groups,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    Ipv4Address,
    Ipv6Address,
    L4Protocol,
    Port,
    LinkName,
    /// Holds [`Datum::Index`]; nft prints it as a mark.
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetData {
    None,
    Verdict,
    /// An address of this family and a port.
    Ipv4AddressAndPort,
    Ipv6AddressAndPort,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ElementData {
    None,
    Verdict(Verdict),
    AddressAndPort(IpAddr, u16),
}

impl Set {
    pub fn new(key: Vec<KeyType>, data: SetData) -> Self {
        Self {
            key,
            data,
            interval: false,
            timeout_millis: None,
            dynamic_size: None,
            room: None,
            groups: Groups::new(),
        }
    }

    /// A power of two with as much free as `count` elements take, so that a set is seldom made anew.
    pub fn room_for(count: usize) -> u32 {
        const LEAST: usize = 256;
        let room = count.saturating_mul(2).max(LEAST).next_power_of_two();
        u32::try_from(room).unwrap_or(u32::MAX)
    }

    /// Every element of every group, in key order within a group.
    pub fn elements(&self) -> impl Iterator<Item = Element<'_>> {
        self.groups.values().flat_map(|group| group.iter())
    }
}
