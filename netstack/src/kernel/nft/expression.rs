//! Rules as the kernel runs them: expressions that load registers, compare them and act. One rule of a plan is one
//! rule of the kernel, except that `Reject` makes two where the protocol is not known: a reset for TCP, then port
//! unreachable for the rest.
//!
//! A field of one IP family gets the `meta nfproto` match before it that nft itself puts there; address translation looks
//! at the family itself. Ports are read at the
//! transport header whatever the protocol, as `th dport` of nft does: a rule or key that means ports names the
//! protocol too.

use std::net::IpAddr;

use weft_model::objects::Protocol;
use weft_model::ruleset::{CtState, Datum, Field, Rule, Statement, Verdict};

use super::element::{Packed, value, write_verdict};
use super::uapi::{
    NFPROTO_IPV4, NFPROTO_IPV6, NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_LIST_ELEM, REG_VERDICT, REG32_FIRST,
};
use super::wire::Writer;

const META_MARK: u32 = 3;
pub(super) const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
pub(super) const META_L4PROTO: u32 = 16;
pub(super) const CT_STATE: u32 = 0;
const CT_STATUS: u32 = 2;
/// IPS_DST_NAT.
const CT_STATUS_DNAT: u32 = 0x20;
const CT_DESTINATION_IPV4: u32 = 20;
const CT_DESTINATION_IPV6: u32 = 22;
/// IP_CT_DIR_ORIGINAL.
const CT_ORIGINAL: u8 = 0;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_SADDR: u32 = 1;
const FIB_DADDR: u32 = 2;
const RTN_LOCAL: u32 = 2;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const NAT_SNAT: u32 = 0;
const NAT_DNAT: u32 = 1;
/// NF_NAT_RANGE_PROTO_RANDOM_FULLY.
const RANDOM_FULLY: u32 = 0x10;
const NFT_DYNSET_OP_ADD: u32 = 0;
const NFT_DYNSET_OP_UPDATE: u32 = 1;
/// NFT_LIMIT_PKTS.
const LIMIT_PACKETS: u32 = 0;
const SECOND: u64 = 1;
const REJECT_TCP_RESET: u32 = 1;
const REJECT_ICMPX: u32 = 2;
const ICMPX_PORT_UNREACHABLE: u8 = 1;
const IPPROTO_ICMP: u8 = 1;
pub(super) const IPPROTO_ICMPV6: u8 = 58;
/// RFC 9293 section 3.1.
pub(super) const TCP_FLAGS_OFFSET: u32 = 13;
pub(super) const TCP_FIN: u8 = 1;
pub(super) const TCP_SYN: u8 = 2;
pub(super) const TCP_RST: u8 = 4;
pub(super) const TCP_ACK: u8 = 16;
pub(super) const NETWORK_HEADER: u32 = 1;
pub(super) const TRANSPORT_HEADER: u32 = 2;

/// How `Reject` answers in one rule of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Reset,
    Unreachable,
}

/// The kernel's rules for one rule of a plan, in order.
pub(crate) fn answers(rule: &Rule) -> &'static [Answer] {
    if !rule.statements.contains(&Statement::Reject) {
        return &[Answer::Unreachable];
    }
    let protocol = rule.statements.iter().find_map(|statement| match statement {
        Statement::Match { field: Field::L4Protocol, negated: false, value } => Some(value),
        _ => None,
    });
    match protocol {
        None => &[Answer::Reset, Answer::Unreachable],
        Some(Datum::Protocol(Protocol::Tcp)) => &[Answer::Reset],
        Some(_) => &[Answer::Unreachable],
    }
}

/// The list of expressions of one rule of the kernel. `ipv6`: the family of its table, `None` for `inet`.
pub(crate) fn write_rule(writer: &mut Writer, rule: &Rule, answer: Answer, ipv6: Option<bool>) {
    let mut encoder = Encoder::new(writer, ipv6);
    for statement in &rule.statements {
        encoder.statement(statement, answer);
    }
}

/// What the statements so far have established is not matched again.
pub(super) struct Encoder<'a> {
    writer: &'a mut Writer,
    ipv6: Option<bool>,
    protocol: Option<u8>,
}

impl<'a> Encoder<'a> {
    /// `ipv6`: as [`write_rule`].
    pub(super) fn new(writer: &'a mut Writer, ipv6: Option<bool>) -> Self {
        Self { writer, ipv6, protocol: None }
    }

    fn statement(&mut self, statement: &Statement, answer: Answer) {
        match statement {
            Statement::Match { field, negated, value } => self.match_field(*field, *negated, value),
            Statement::MarkIs { mask, value } => {
                self.meta(META_MARK, REG32_FIRST);
                self.bitwise(&mask.to_ne_bytes(), &[0; 4]);
                self.compare(false, &value.to_ne_bytes());
            }
            Statement::Lookup { key, negated, set } => {
                self.load_key(key);
                self.lookup(set, None, *negated);
            }
            Statement::VerdictMap { key, map } => {
                self.load_key(key);
                self.lookup(map, Some(REG_VERDICT), false);
            }
            Statement::CtState { states, negated } => {
                self.ct(CT_STATE);
                self.any_bit(states.iter().map(|state| state_bit(*state)).sum(), *negated);
            }
            Statement::TcpBegins { negated } => {
                self.require_protocol(Protocol::Tcp.number());
                self.payload(TRANSPORT_HEADER, TCP_FLAGS_OFFSET, 1, REG32_FIRST);
                self.bitwise(&[TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK], &[0]);
                self.compare(*negated, &[TCP_SYN]);
            }
            Statement::CtStatusDnat => {
                self.ct(CT_STATUS);
                self.any_bit(CT_STATUS_DNAT, false);
            }
            Statement::DestinationIsLocal { negated } => self.fib_is_local(FIB_DADDR, *negated),
            Statement::SourceIsLocal { negated } => self.fib_is_local(FIB_SADDR, *negated),
            Statement::DnatMap { ipv6, key, map } => {
                self.require_family(*ipv6);
                self.load_key(key);
                self.lookup(map, Some(REG32_FIRST), false);
                self.nat(NAT_DNAT, *ipv6, true);
            }
            Statement::Update { map, key, timeout_millis, address, port } => {
                self.update(map, key, *timeout_millis, (*address, *port));
            }
            Statement::CtOriginalDestination(address) => self.ct_original_destination(*address),
            Statement::Remember { set, key, timeout_millis, renewed } => {
                self.load_key(key);
                let operation = if *renewed { NFT_DYNSET_OP_UPDATE } else { NFT_DYNSET_OP_ADD };
                self.dynset(set, operation, Some(*timeout_millis));
            }
            Statement::Limit { per_second, burst } => self.expression("limit", |w| {
                w.be64(1, u64::from(*per_second));
                w.be64(2, SECOND);
                w.be32(3, *burst);
                w.be32(4, LIMIT_PACKETS);
            }),
            Statement::Log { prefix, group, bytes } => self.expression("log", |w| {
                w.attribute(1, &group.to_be_bytes());
                w.string(2, prefix);
                w.be32(3, *bytes);
            }),
            Statement::Dnat { address, port } => self.nat_to(NAT_DNAT, *address, *port),
            Statement::Snat { address } => self.nat_to(NAT_SNAT, *address, None),
            Statement::Masquerade => self.expression("masq", |w| w.be32(1, RANDOM_FULLY)),
            Statement::SetMarkBits(bits) => {
                self.meta(META_MARK, REG32_FIRST);
                self.bitwise(&(!bits).to_ne_bytes(), &bits.to_ne_bytes());
                self.expression("meta", |w| {
                    w.be32(2, META_MARK);
                    w.be32(3, REG32_FIRST);
                });
            }
            Statement::Notrack => self.expression("notrack", |_| ()),
            Statement::Counter => self.expression("counter", |_| ()),
            Statement::Verdict(verdict) => self.verdict(verdict),
            Statement::Reject => self.reject(answer),
        }
    }

    /// One list entry: the name and the attributes of an expression.
    pub(super) fn expression(&mut self, name: &str, attributes: impl FnOnce(&mut Writer)) {
        self.writer.nest(NFTA_LIST_ELEM, |writer| {
            writer.string(NFTA_EXPR_NAME, name);
            writer.nest(NFTA_EXPR_DATA, attributes);
        });
    }

    fn match_field(&mut self, field: Field, negated: bool, value: &Datum) {
        self.load(field, REG32_FIRST);
        match (field, value) {
            (Field::Family, Datum::Ipv6(ipv6)) if !negated => self.ipv6 = Some(*ipv6),
            (Field::L4Protocol, Datum::Protocol(protocol)) if !negated => {
                self.protocol = Some(protocol.number());
            }
            (Field::L4Protocol, Datum::ProtocolNumber(number)) if !negated => self.protocol = Some(*number),
            (_, Datum::Net(net)) => {
                self.bitwise(Packed::address(net.netmask()).as_slice(), &[0; 16][..net_bytes(net.addr())]);
            }
            (_, Datum::PortRange(first, last)) => return self.range(negated, *first, *last),
            (_, Datum::NamePrefix(prefix)) if prefix.is_empty() && !negated => return,
            _ => {}
        }
        self.compare(negated, Packed::datum(value).as_slice());
    }

    fn require_family(&mut self, ipv6: bool) {
        if self.ipv6 != Some(ipv6) {
            self.ipv6 = Some(ipv6);
            self.meta(META_NFPROTO, REG32_FIRST);
            self.compare(false, &[if ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 }]);
        }
    }

    fn require_protocol(&mut self, number: u8) {
        if self.protocol != Some(number) {
            self.protocol = Some(number);
            self.meta(META_L4PROTO, REG32_FIRST);
            self.compare(false, &[number]);
        }
    }

    /// What reading the field takes for granted.
    fn require(&mut self, field: Field) {
        match field {
            Field::Ip4Source | Field::Ip4Destination => self.require_family(false),
            Field::Ip6Source | Field::Ip6Destination => self.require_family(true),
            Field::Icmp4Type => self.require_protocol(IPPROTO_ICMP),
            Field::Icmp6Type => self.require_protocol(IPPROTO_ICMPV6),
            _ => {}
        }
    }

    /// Loads the fields into registers one after the other.
    fn load_key(&mut self, key: &[Field]) {
        for field in key {
            self.require(*field);
        }
        let mut register = REG32_FIRST;
        for field in key {
            self.load(*field, register);
            register += field_registers(*field);
        }
    }

    fn load(&mut self, field: Field, register: u32) {
        self.require(field);
        match field {
            Field::Ip4Source => self.payload(NETWORK_HEADER, 12, 4, register),
            Field::Ip4Destination => self.payload(NETWORK_HEADER, 16, 4, register),
            Field::Ip6Source => self.payload(NETWORK_HEADER, 8, 16, register),
            Field::Ip6Destination => self.payload(NETWORK_HEADER, 24, 16, register),
            Field::Family => self.meta(META_NFPROTO, register),
            Field::L4Protocol => self.meta(META_L4PROTO, register),
            Field::SourcePort => self.payload(TRANSPORT_HEADER, 0, 2, register),
            Field::DestinationPort => self.payload(TRANSPORT_HEADER, 2, 2, register),
            Field::InputLink => self.meta(META_IIFNAME, register),
            Field::OutputLink => self.meta(META_OIFNAME, register),
            // Eight bytes of ICMP, then the packet's own header (RFC 792, RFC 4443).
            Field::Icmp4ErrorDestination => self.payload(TRANSPORT_HEADER, 8 + 16, 4, register),
            Field::Icmp6ErrorDestination => self.payload(TRANSPORT_HEADER, 8 + 24, 16, register),
            Field::Icmp4Type | Field::Icmp6Type => self.payload(TRANSPORT_HEADER, 0, 1, register),
            Field::RandomModulo(modulus) => self.expression("numgen", |w| {
                w.be32(1, register);
                w.be32(2, modulus);
                w.be32(3, 1); // NFT_NG_RANDOM
                w.be32(4, 0);
            }),
        }
    }

    pub(super) fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        self.expression("payload", |w| {
            w.be32(1, register);
            w.be32(2, base);
            w.be32(3, offset);
            w.be32(4, length);
        });
    }

    pub(super) fn meta(&mut self, key: u32, register: u32) {
        self.expression("meta", |w| {
            w.be32(2, key);
            w.be32(1, register);
        });
    }

    pub(super) fn ct(&mut self, key: u32) {
        self.expression("ct", |w| {
            w.be32(2, key);
            w.be32(1, REG32_FIRST);
        });
    }

    fn ct_original_destination(&mut self, address: IpAddr) {
        self.expression("ct", |w| {
            w.be32(2, if address.is_ipv6() { CT_DESTINATION_IPV6 } else { CT_DESTINATION_IPV4 });
            w.be32(1, REG32_FIRST);
            w.u8(3, CT_ORIGINAL);
        });
        self.compare(false, Packed::address(address).as_slice());
    }

    fn fib_is_local(&mut self, flags: u32, negated: bool) {
        self.expression("fib", |w| {
            w.be32(1, REG32_FIRST);
            w.be32(2, FIB_RESULT_ADDRTYPE);
            w.be32(3, flags);
        });
        self.compare(negated, &RTN_LOCAL.to_ne_bytes());
    }

    pub(super) fn compare(&mut self, negated: bool, bytes: &[u8]) {
        self.expression("cmp", |w| {
            w.be32(1, REG32_FIRST);
            w.be32(2, if negated { CMP_NEQ } else { CMP_EQ });
            value(w, 3, bytes);
        });
    }

    fn range(&mut self, negated: bool, first: u16, last: u16) {
        self.expression("range", |w| {
            w.be32(1, REG32_FIRST);
            w.be32(2, if negated { CMP_NEQ } else { CMP_EQ });
            value(w, 3, &first.to_be_bytes());
            value(w, 4, &last.to_be_bytes());
        });
    }

    /// `register = (register & mask) ^ xor`.
    pub(super) fn bitwise(&mut self, mask: &[u8], xor: &[u8]) {
        self.expression("bitwise", |w| {
            w.be32(1, REG32_FIRST);
            w.be32(2, REG32_FIRST);
            w.be32(3, u32::try_from(mask.len()).unwrap_or(0));
            value(w, 4, mask);
            value(w, 5, xor);
        });
    }

    pub(super) fn any_bit(&mut self, bits: u32, negated: bool) {
        self.bitwise(&bits.to_ne_bytes(), &[0; 4]);
        self.compare(!negated, &[0; 4]);
    }

    pub(super) fn lookup(&mut self, set: &str, destination: Option<u32>, negated: bool) {
        self.expression("lookup", |w| {
            w.string(1, set);
            w.be32(2, REG32_FIRST);
            if let Some(register) = destination {
                w.be32(3, register);
            }
            if negated {
                w.be32(5, 1);
            }
        });
    }

    /// The key in the first registers, the data in those after it.
    fn update(&mut self, map: &str, key: &[Field], timeout_millis: u64, (address, port): (IpAddr, u16)) {
        self.load_key(key);
        let data = REG32_FIRST + key.iter().map(|field| field_registers(*field)).sum::<u32>();
        self.immediate(data, Packed::address(address).as_slice());
        self.immediate(data + if address.is_ipv6() { 4 } else { 1 }, &port.to_be_bytes());
        self.expression("dynset", |w| {
            w.string(1, map);
            w.be32(3, NFT_DYNSET_OP_UPDATE);
            w.be32(4, REG32_FIRST);
            w.be32(5, data);
            w.be64(6, timeout_millis);
        });
    }

    /// What the first registers hold.
    pub(super) fn add_to(&mut self, set: &str) {
        self.dynset(set, NFT_DYNSET_OP_ADD, None);
    }

    fn dynset(&mut self, set: &str, operation: u32, timeout_millis: Option<u64>) {
        self.expression("dynset", |w| {
            w.string(1, set);
            w.be32(3, operation);
            w.be32(4, REG32_FIRST);
            if let Some(timeout_millis) = timeout_millis {
                w.be64(6, timeout_millis);
            }
        });
    }

    fn nat_to(&mut self, kind: u32, address: IpAddr, port: Option<u16>) {
        let ipv6 = address.is_ipv6();
        self.immediate(REG32_FIRST, Packed::address(address).as_slice());
        if let Some(port) = port {
            self.immediate(port_register(ipv6), &port.to_be_bytes());
        }
        self.nat(kind, ipv6, port.is_some());
    }

    fn immediate(&mut self, register: u32, bytes: &[u8]) {
        self.expression("immediate", |w| {
            w.be32(1, register);
            value(w, 2, bytes);
        });
    }

    /// The address is in the first register, the port in the one after it.
    fn nat(&mut self, kind: u32, ipv6: bool, port: bool) {
        self.expression("nat", |w| {
            w.be32(1, kind);
            w.be32(2, u32::from(if ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 }));
            w.be32(3, REG32_FIRST);
            if port {
                w.be32(5, port_register(ipv6));
            }
        });
    }

    pub(super) fn verdict(&mut self, verdict: &Verdict) {
        self.expression("immediate", |w| {
            w.be32(1, REG_VERDICT);
            w.nest(2, |w| write_verdict(w, verdict));
        });
    }

    fn reject(&mut self, answer: Answer) {
        let (kind, code) = match answer {
            Answer::Reset => (REJECT_TCP_RESET, 0),
            Answer::Unreachable => (REJECT_ICMPX, ICMPX_PORT_UNREACHABLE),
        };
        if answer == Answer::Reset {
            self.require_protocol(Protocol::Tcp.number());
        }
        self.expression("reject", |w| {
            w.be32(1, kind);
            w.u8(2, code);
        });
    }
}

fn state_bit(state: CtState) -> u32 {
    match state {
        CtState::Invalid => 1,
        CtState::Established => 2,
        CtState::Related => 4,
        CtState::New => 8,
        CtState::Untracked => 64,
    }
}

fn net_bytes(address: IpAddr) -> usize {
    if address.is_ipv6() { 16 } else { 4 }
}

/// After an address of this family in the first registers.
fn port_register(ipv6: bool) -> u32 {
    REG32_FIRST + if ipv6 { 4 } else { 1 }
}

fn field_registers(field: Field) -> u32 {
    match field {
        Field::Ip6Source
        | Field::Ip6Destination
        | Field::Icmp6ErrorDestination
        | Field::InputLink
        | Field::OutputLink => 4,
        _ => 1,
    }
}
