//! nft's own syntax for rule sets, as `nft list ruleset` prints it, as far as nft has one: deterministic, with
//! elements sorted by key. Two liberties: numbers of `numgen` are decimal, and elements stand one a line.

use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use super::{
    Base, Chain, ChainKind, CtState, Datum, ElementData, Field, Hook, Key, KeyType, Rule, Set, SetData,
    Statement, Table, Verdict,
};

/// `table inet NAME { ... }` with a final line break.
impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        let mut first = true;
        for (name, set) in &self.sets {
            let kind = if set.data == SetData::None { "set" } else { "map" };
            block(f, &mut first, kind, name, set)?;
        }
        for (name, chain) in &self.chains {
            block(f, &mut first, "chain", name, chain)?;
        }
        writeln!(f, "}}")
    }
}

fn block(f: &mut Formatter<'_>, first: &mut bool, kind: &str, name: &str, body: &dyn Display) -> fmt::Result {
    if !std::mem::take(first) {
        writeln!(f)?;
    }
    writeln!(f, "\t{kind} {name} {{")?;
    for line in body.to_string().lines() {
        writeln!(f, "\t\t{line}")?;
    }
    writeln!(f, "\t}}")
}

/// What stands between the braces: the hook, then one rule a line.
impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(base) = &self.base {
            writeln!(f, "{base}")?;
        }
        self.rules.iter().try_for_each(|rule| writeln!(f, "{rule}"))
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
            ChainKind::Route => "route",
        };
        let hook = match self.hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        write!(f, "type {kind} hook {hook} priority {}; policy accept;", self.priority)
    }
}

/// What stands between the braces: type, size, flags, timeout, elements.
impl Display for Set {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("type ")?;
        joined(f, &self.key, " . ")?;
        match self.data {
            SetData::None => writeln!(f)?,
            SetData::Verdict => writeln!(f, " : verdict")?,
            SetData::Ipv4AddressAndPort => writeln!(f, " : ipv4_addr . inet_service")?,
            SetData::Ipv6AddressAndPort => writeln!(f, " : ipv6_addr . inet_service")?,
        }
        let flags = [
            (self.interval, "interval"),
            (self.dynamic_size.is_some(), "dynamic"),
            (self.timeout_millis.is_some(), "timeout"),
        ];
        if let Some(size) = self.dynamic_size.or(self.room) {
            writeln!(f, "size {size}")?;
        }
        let flags: Vec<_> = flags.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
        if !flags.is_empty() {
            writeln!(f, "flags {}", flags.join(","))?;
        }
        if let Some(millis) = self.timeout_millis {
            writeln!(f, "timeout {}", Duration(millis))?;
        }
        let mut elements: Vec<_> = self.elements().collect();
        elements.sort();
        if elements.is_empty() {
            return Ok(());
        }
        writeln!(f, "elements = {{")?;
        for (key, data) in elements {
            writeln!(f, "\t{},", ElementText(key, &data))?;
        }
        writeln!(f, "}}")
    }
}

/// Milliseconds as nft writes them: `10s`, `600ms`, `1s500ms`, `1d2h3m`.
struct Duration(u64);

impl Display for Duration {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(all) = *self;
        if all == 0 {
            return f.write_str("0ms");
        }
        let parts = [
            (all / 86_400_000, "d"),
            (all / 3_600_000 % 24, "h"),
            (all / 60_000 % 60, "m"),
            (all / 1000 % 60, "s"),
            (all % 1000, "ms"),
        ];
        parts.iter().filter(|(count, _)| *count > 0).try_for_each(|(count, unit)| write!(f, "{count}{unit}"))
    }
}

pub(super) struct ElementText<'a>(pub(super) Key<'a>, pub(super) &'a ElementData);

impl Display for ElementText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        joined(f, &self.0.to_vec(), " . ")?;
        match self.1 {
            ElementData::None => Ok(()),
            data => write!(f, " : {data}"),
        }
    }
}

impl Display for ElementData {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Verdict(verdict) => verdict.fmt(f),
            Self::AddressAndPort(address, port) => write!(f, "{address} . {port}"),
        }
    }
}

/// Statements, then the comment.
impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        joined(f, &self.statements, " ")?;
        match &self.comment {
            Some(comment) => write!(f, " comment \"{comment}\""),
            None => Ok(()),
        }
    }
}

impl Display for Statement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match {
                field: field @ (Field::Icmp4ErrorDestination | Field::Icmp6ErrorDestination),
                negated,
                value: Datum::Ip(address),
            } => write!(f, "{field} {}{:#x}", not(*negated), as_number(*address)),
            Self::Match { field, negated, value } => write!(f, "{field} {}{value}", not(*negated)),
            Self::MarkIs { mask, value } => write!(f, "meta mark & {mask:#010x} == {value:#010x}"),
            Self::Lookup { key, negated, set } => {
                joined(f, key, " . ")?;
                write!(f, " {}@{set}", not(*negated))
            }
            Self::VerdictMap { key, map } => {
                joined(f, key, " . ")?;
                write!(f, " vmap @{map}")
            }
            Self::CtState { states, negated } => {
                f.write_str(if *negated { "ct state ! " } else { "ct state " })?;
                joined(f, states, ",")
            }
            Self::TcpBegins { negated } => write!(f, "tcp flags {}syn / fin,syn,rst,ack", not(*negated)),
            Self::CtStatusDnat => f.write_str("ct status dnat"),
            Self::DestinationIsLocal { negated } => write!(f, "fib daddr type {}local", not(*negated)),
            Self::SourceIsLocal { negated } => write!(f, "fib saddr type {}local", not(*negated)),
            Self::DnatMap { ipv6, key, map } => {
                write!(f, "dnat {} to ", if *ipv6 { "ip6" } else { "ip" })?;
                joined(f, key, " . ")?;
                write!(f, " map @{map}")
            }
            Self::Update { map, key, timeout_millis, address, port } => {
                write!(f, "update @{map} {{ ")?;
                joined(f, key, " . ")?;
                write!(f, " timeout {} : {address} . {port} }}", Duration(*timeout_millis))
            }
            Self::CtOriginalDestination(address) => {
                write!(f, "ct original {} daddr {address}", if address.is_ipv6() { "ip6" } else { "ip" })
            }
            Self::Remember { set, key, timeout_millis, renewed } => {
                write!(f, "{} @{set} {{ ", if *renewed { "update" } else { "add" })?;
                joined(f, key, " . ")?;
                write!(f, " timeout {} }}", Duration(*timeout_millis))
            }
            Self::Limit { per_second, burst } => {
                write!(f, "limit rate {per_second}/second burst {burst} packets")
            }
            Self::Log { prefix, group, bytes } => {
                write!(f, "log prefix \"{prefix}\" group {group} snaplen {bytes}")
            }
            Self::Dnat { address, port } => nat(f, "dnat", *address, *port),
            Self::Snat { address } => nat(f, "snat", *address, None),
            Self::Masquerade => f.write_str("masquerade fully-random"),
            Self::SetMarkBits(bits) => write!(f, "meta mark set meta mark | {bits:#010x}"),
            Self::Notrack => f.write_str("notrack"),
            Self::Counter => f.write_str("counter"),
            Self::Verdict(verdict) => verdict.fmt(f),
            Self::Reject => f.write_str("reject"),
        }
    }
}

fn nat(f: &mut Formatter<'_>, verb: &str, address: IpAddr, port: Option<u16>) -> fmt::Result {
    match (address, port) {
        (IpAddr::V4(address), None) => write!(f, "{verb} ip to {address}"),
        (IpAddr::V4(address), Some(port)) => write!(f, "{verb} ip to {address}:{port}"),
        (IpAddr::V6(address), None) => write!(f, "{verb} ip6 to {address}"),
        (IpAddr::V6(address), Some(port)) => write!(f, "{verb} ip6 to [{address}]:{port}"),
    }
}

fn not(negated: bool) -> &'static str {
    if negated { "!= " } else { "" }
}

fn joined<T: Display>(f: &mut Formatter<'_>, parts: &[T], separator: &str) -> fmt::Result {
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            f.write_str(separator)?;
        }
        part.fmt(f)?;
    }
    Ok(())
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl Display for CtState {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "new",
            Self::Established => "established",
            Self::Related => "related",
            Self::Invalid => "invalid",
            Self::Untracked => "untracked",
        })
    }
}

/// nft knows no addresses where it knows no field.
fn as_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip4Source => "ip saddr",
            Self::Ip4Destination => "ip daddr",
            Self::Ip6Source => "ip6 saddr",
            Self::Ip6Destination => "ip6 daddr",
            Self::Family => "meta nfproto",
            Self::L4Protocol => "meta l4proto",
            Self::SourcePort => "th sport",
            Self::DestinationPort => "th dport",
            Self::InputLink => "iifname",
            Self::OutputLink => "oifname",
            Self::Icmp4Type => "icmp type",
            Self::Icmp4ErrorDestination => "@th,192,32",
            Self::Icmp6ErrorDestination => "@th,256,128",
            Self::Icmp6Type => "icmpv6 type",
            Self::RandomModulo(modulus) => return write!(f, "numgen random mod {modulus}"),
        })
    }
}

impl Display for KeyType {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4Address => "ipv4_addr",
            Self::Ipv6Address => "ipv6_addr",
            Self::L4Protocol => "inet_proto",
            Self::Port => "inet_service",
            Self::LinkName => "ifname",
            Self::Index => "mark",
        })
    }
}

impl Display for Datum {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Net(net) => net.fmt(f),
            Self::Protocol(protocol) => f.write_str(protocol.name()),
            Self::ProtocolNumber(number) => number.fmt(f),
            Self::Ipv6(true) => f.write_str("ipv6"),
            Self::Ipv6(false) => f.write_str("ipv4"),
            Self::Port(port) => port.fmt(f),
            Self::PortRange(first, last) => write!(f, "{first}-{last}"),
            Self::Name(name) => write!(f, "\"{name}\""),
            Self::NamePrefix(prefix) => write!(f, "\"{prefix}*\""),
            Self::Icmp4Type(kind) => match icmp4_name(*kind) {
                Some(name) => f.write_str(name),
                None => kind.fmt(f),
            },
            Self::Icmp6Type(kind) => match icmp6_name(*kind) {
                Some(name) => f.write_str(name),
                None => kind.fmt(f),
            },
            Self::Index(index) => index.fmt(f),
        }
    }
}

/// nft's names (RFC 792).
fn icmp4_name(kind: u8) -> Option<&'static str> {
    Some(match kind {
        0 => "echo-reply",
        3 => "destination-unreachable",
        8 => "echo-request",
        11 => "time-exceeded",
        _ => return None,
    })
}

/// nft's names (RFC 4443, RFC 4861).
fn icmp6_name(kind: u8) -> Option<&'static str> {
    Some(match kind {
        1 => "destination-unreachable",
        2 => "packet-too-big",
        3 => "time-exceeded",
        4 => "parameter-problem",
        128 => "echo-request",
        129 => "echo-reply",
        133 => "nd-router-solicit",
        134 => "nd-router-advert",
        135 => "nd-neighbor-solicit",
        136 => "nd-neighbor-advert",
        137 => "nd-redirect",
        _ => return None,
    })
}
