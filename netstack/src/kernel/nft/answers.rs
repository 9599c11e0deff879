//! Rules about the addresses that this node answers for on the LAN, in tables `weft-lb` of the families `arp`, `ip` and `ip6`.
//!
//! ```text
//!  Answers --whole tables, one transaction--> arp: answer only on links that hold the subnet, and not once another machine claimed
//!                                             ip6: not once another machine claimed
//!                                             ip, ip6: connections that began at the node before go on there
//! ```
//!
//! Set `yielded` is the kernel's own: it adds an address when it sees another machine claim it, so that of two nodes only one
//! answers even when nobody of ours runs on the other. Who goes on claiming writes the tables anew, which empties it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::PoisonError;

use weft_model::ruleset::{Datum, KeyBuffer, KeyType, Verdict};

use super::element::{Packed, key_bytes, type_number, value, write_element};
use super::expression::{
    CT_STATE, Encoder, IPPROTO_ICMPV6, META_IIFNAME, META_L4PROTO, NETWORK_HEADER, TCP_ACK, TCP_FIN,
    TCP_FLAGS_OFFSET, TCP_RST, TCP_SYN, TRANSPORT_HEADER,
};
use super::foreign::{self, About};
use super::socket::NetfilterSocket;
use super::uapi::*;
use super::wire::Writer;
use super::{ATTEMPTS, NftError, exchange, generation, read_generation};

const TABLE: &str = "weft-lb";
const HELD: &str = "held";
const HERE: &str = "here";
const OWN: &str = "own";
const YIELDED: &str = "yielded";
const BEFORE: &str = "before";
/// As many addresses as the kernel may see claimed by others; each is one of `held`.
const YIELDED_AT_MOST: u32 = 65_536;

const ABOUT: About = About { owner: TABLE, doing: "say for which addresses the kernel answers" };

const NFPROTO_ARP: u8 = 3;
const FAMILIES: [u8; 3] = [NFPROTO_ARP, NFPROTO_IPV4, NFPROTO_IPV6];
/// NF_ARP_IN, and NF_INET_PRE_ROUTING.
const HOOK_ARP_INPUT: u32 = 0;
const HOOK_PREROUTING: u32 = 0;
/// Before connection tracking, and between it and the translation of destinations.
const PRIORITY_RAW: i32 = -300;
const PRIORITY_BEFORE_DNAT: i32 = -150;
/// nft's number of the type `ether_addr`.
const TYPE_ETHERNET: u32 = 9;

const LINK_HEADER: u32 = 0;
/// RFC 826, for IPv4 over Ethernet.
const ARP_SENDER_MAC: u32 = 8;
const ARP_SENDER: u32 = 14;
const ARP_TARGET: u32 = 24;
/// RFC 4861 4.3 and 4.4.
const DISCOVERY_TARGET: u32 = 8;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const IPPROTO_TCP: u8 = 6;
/// NF_CT_STATE_BIT of invalid and new: no connection that this node knows.
const CT_UNKNOWN: u32 = 1 | 8;
/// The first register after a key of any family.
const REG_DATA: u32 = REG32_FIRST + 4;

/// What the kernel is to do about addresses of the LAN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Addresses that it answers for, with the links on which it may.
    pub held: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Link-layer addresses of this node: what they claim is no claim of another.
    pub own: BTreeSet<[u8; 6]>,
    /// Of addresses that came from another node in order: where their connections are known, an address of that node on the LAN.
    pub before: BTreeMap<IpAddr, IpAddr>,
}

/// Owner of the tables; its socket belongs to the network namespace of the thread that makes the first call.
#[derive(Default)]
pub struct AnswerRules {
    socket: Option<NetfilterSocket>,
}

impl AnswerRules {
    /// Writes the tables anew, all or none; with nothing to answer for there are none.
    ///
    /// # Errors
    /// When the kernel refuses them, or others change the rule set all the time.
    pub fn apply(&mut self, answers: &Answers) -> Result<(), NftError> {
        let messages = if answers.held.is_empty() { removal() } else { tables(answers) };
        let socket = self.socket()?;
        let turn = generation::turn(socket.netns_cookie());
        for _ in 0..ATTEMPTS {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let now = read_generation(socket, TABLE)?;
            let written =
                foreign::commit(socket, ABOUT, now, &messages, |writer, sequence, flags, message| {
                    let open = writer.open_message(
                        nft(message.kind),
                        flags | message.flags,
                        sequence,
                        message.family,
                        0,
                    );
                    (message.write)(writer);
                    writer.close_message(open);
                })?;
            if written {
                return Ok(());
            }
        }
        Err(NftError::Contended { table: TABLE.to_owned() })
    }

    /// Addresses that the kernel saw another machine claim, and so answers for no longer.
    ///
    /// # Errors
    /// When the kernel cannot be asked; without tables there are no such addresses.
    pub fn yielded(&mut self) -> Result<BTreeSet<IpAddr>, NftError> {
        let socket = self.socket()?;
        let mut yielded = BTreeSet::new();
        for family in [NFPROTO_ARP, NFPROTO_IPV6] {
            let listed = socket.dump(
                nft(GETSETELEM),
                family,
                |writer| {
                    writer.string(NFTA_SET_ELEM_LIST_TABLE, TABLE);
                    writer.string(NFTA_SET_ELEM_LIST_SET, YIELDED);
                },
                |keys: &mut Vec<Vec<u8>>, message| {
                    let list = message.attributes().find(NFTA_SET_ELEM_LIST_ELEMENTS);
                    for element in list.iter().flat_map(|list| list.nested()) {
                        let key = element.nested().find(NFTA_SET_ELEM_KEY);
                        let key = key.and_then(|key| key.nested().find(NFTA_DATA_VALUE));
                        keys.extend(key.map(|key| key.value.to_vec()));
                    }
                },
            );
            match listed {
                Ok(keys) => yielded.extend(keys.iter().filter_map(|key| address(key))),
                Err(nix::errno::Errno::ENOENT) => {}
                Err(errno) => return Err(exchange(TABLE, "read which addresses others claimed", errno)),
            }
        }
        Ok(yielded)
    }

    fn socket(&mut self) -> Result<&mut NetfilterSocket, NftError> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(NetfilterSocket::open().map_err(NftError::Open)?)),
        }
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}

struct Message {
    family: u8,
    kind: u16,
    flags: u16,
    write: Box<dyn Fn(&mut Writer)>,
}

fn message(family: u8, kind: u16, flags: u16, write: impl Fn(&mut Writer) + 'static) -> Message {
    Message { family, kind, flags, write: Box::new(write) }
}

/// A table that is added is there to be deleted.
fn removal() -> Vec<Message> {
    let gone = |family| {
        [
            message(family, NEWTABLE, NLM_F_CREATE, |w| w.string(NFTA_TABLE_NAME, TABLE)),
            message(family, DELTABLE, 0, |w| w.string(NFTA_TABLE_NAME, TABLE)),
        ]
    };
    FAMILIES.into_iter().flat_map(gone).collect()
}

fn tables(answers: &Answers) -> Vec<Message> {
    let mut all = removal();
    for family in FAMILIES {
        all.push(message(family, NEWTABLE, NLM_F_CREATE, |w| w.string(NFTA_TABLE_NAME, TABLE)));
        let ipv6 = family == NFPROTO_IPV6;
        let of_family = |ip: &&IpAddr| ip.is_ipv6() == ipv6;
        let addresses = vec![if ipv6 { KeyType::Ipv6Address } else { KeyType::Ipv4Address }];
        if family != NFPROTO_IPV4 {
            let held = answers.held.keys().filter(of_family).map(|ip| Datum::Ip(*ip));
            all.extend(set(family, HELD, &addresses, held.map(|ip| vec![ip]).collect()));
            all.push(remembering(family, &addresses));
            all.extend(own(family, &answers.own));
        }
        if family == NFPROTO_ARP {
            let held = answers.held.iter().filter(|(ip, _)| ip.is_ipv4());
            let pairs = held.flat_map(|(ip, links)| {
                links.iter().map(|link| vec![Datum::Ip(*ip), Datum::Name(link.as_str().into())])
            });
            all.extend(set(family, HERE, &[KeyType::Ipv4Address, KeyType::LinkName], pairs.collect()));
            all.extend(arp_chain());
        } else {
            let before =
                answers.before.iter().filter(|(ip, node)| ip.is_ipv6() == ipv6 && node.is_ipv6() == ipv6);
            all.extend(map(family, &addresses, before.map(|(ip, node)| (*ip, *node)).collect()));
            all.extend(handover_chain(family));
        }
        if ipv6 {
            all.extend(discovery_chain());
        }
    }
    all
}

/// One element a message: lists would have to be split.
fn set(family: u8, name: &'static str, key: &[KeyType], elements: Vec<Vec<Datum>>) -> Vec<Message> {
    let declaration = declared(family, name, (type_number(key), key_bytes(key)), |_| ());
    let add = |element: Vec<Datum>| {
        message(family, NEWSETELEM, NLM_F_CREATE, move |w| {
            let mut key = KeyBuffer::default();
            in_list(w, name, |w| write_element(w, false, key.set(element.iter().cloned()), None));
        })
    };
    std::iter::once(declaration).chain(elements.into_iter().map(add)).collect()
}

fn own(family: u8, macs: &BTreeSet<[u8; 6]>) -> Vec<Message> {
    let declaration = declared(family, OWN, (TYPE_ETHERNET, 6), |_| ());
    let add = |mac: &[u8; 6]| {
        let mac = *mac;
        message(family, NEWSETELEM, NLM_F_CREATE, move |w| {
            in_list(w, OWN, |w| w.nest(NFTA_LIST_ELEM, |w| value(w, NFTA_SET_ELEM_KEY, &mac)));
        })
    };
    std::iter::once(declaration).chain(macs.iter().map(add)).collect()
}

/// The set that rules add to.
fn remembering(family: u8, key: &[KeyType]) -> Message {
    declared(family, YIELDED, (type_number(key), key_bytes(key)), |w| {
        w.nest(NFTA_SET_DESC, |w| w.be32(NFTA_SET_DESC_SIZE, YIELDED_AT_MOST));
    })
}

/// From addresses to addresses.
fn map(family: u8, key: &[KeyType], elements: Vec<(IpAddr, IpAddr)>) -> Vec<Message> {
    let (kind, bytes) = (type_number(key), key_bytes(key));
    let declaration = declared(family, BEFORE, (kind, bytes), move |w| {
        w.be32(NFTA_SET_DATA_TYPE, kind);
        w.be32(NFTA_SET_DATA_LEN, u32::try_from(bytes).unwrap_or(0));
    });
    let add = |(ip, node): (IpAddr, IpAddr)| {
        message(family, NEWSETELEM, NLM_F_CREATE, move |w| {
            in_list(w, BEFORE, |w| {
                w.nest(NFTA_LIST_ELEM, |w| {
                    value(w, NFTA_SET_ELEM_KEY, Packed::address(ip).as_slice());
                    value(w, NFTA_SET_ELEM_DATA, Packed::address(node).as_slice());
                });
            });
        })
    };
    std::iter::once(declaration).chain(elements.into_iter().map(add)).collect()
}

fn declared(
    family: u8,
    name: &'static str,
    (kind, bytes): (u32, usize),
    more: impl Fn(&mut Writer) + 'static,
) -> Message {
    message(family, NEWSET, NLM_F_CREATE | NLM_F_EXCL, move |w| {
        w.string(NFTA_SET_TABLE, TABLE);
        w.string(NFTA_SET_NAME, name);
        let flags = match name {
            BEFORE => NFT_SET_MAP,
            YIELDED => NFT_SET_EVAL,
            _ => 0,
        };
        w.be32(NFTA_SET_FLAGS, flags);
        w.be32(NFTA_SET_KEY_TYPE, kind);
        w.be32(NFTA_SET_KEY_LEN, u32::try_from(bytes).unwrap_or(0));
        more(w);
        let id = [HELD, HERE, OWN, YIELDED, BEFORE].iter().position(|known| *known == name).unwrap_or(0);
        let id = u32::try_from(id + 1).unwrap_or(1) + u32::from(family) * 16;
        w.be32(NFTA_SET_ID, id);
    })
}

fn in_list(writer: &mut Writer, set: &str, write: impl FnOnce(&mut Writer)) {
    writer.string(NFTA_SET_ELEM_LIST_TABLE, TABLE);
    writer.string(NFTA_SET_ELEM_LIST_SET, set);
    writer.nest(NFTA_SET_ELEM_LIST_ELEMENTS, write);
}

fn chain(family: u8, name: &'static str, hook: u32, priority: i32) -> Message {
    message(family, NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, move |w| {
        w.string(NFTA_CHAIN_TABLE, TABLE);
        w.string(NFTA_CHAIN_NAME, name);
        w.nest(NFTA_CHAIN_HOOK, |w| {
            w.be32(NFTA_HOOK_HOOKNUM, hook);
            w.be32(NFTA_HOOK_PRIORITY, priority.cast_unsigned());
        });
        w.be32(NFTA_CHAIN_POLICY, NF_ACCEPT.cast_unsigned());
        w.string(NFTA_CHAIN_TYPE, "filter");
    })
}

fn rule(family: u8, chain: &'static str, write: impl Fn(&mut Encoder<'_>) + 'static) -> Message {
    message(family, NEWRULE, NLM_F_CREATE | NLM_F_APPEND, move |w| {
        w.string(NFTA_RULE_TABLE, TABLE);
        w.string(NFTA_RULE_CHAIN, chain);
        w.nest(NFTA_RULE_EXPRESSIONS, |w| write(&mut Encoder::new(w, Some(family == NFPROTO_IPV6))));
    })
}

fn arp_chain() -> Vec<Message> {
    const INPUT: &str = "input";
    vec![
        chain(NFPROTO_ARP, INPUT, HOOK_ARP_INPUT, 0),
        rule(NFPROTO_ARP, INPUT, |e| {
            e.payload(NETWORK_HEADER, ARP_SENDER_MAC, 6, REG32_FIRST);
            e.lookup(OWN, None, true);
            e.payload(NETWORK_HEADER, ARP_SENDER, 4, REG32_FIRST);
            e.lookup(HELD, None, false);
            e.add_to(YIELDED);
        }),
        rule(NFPROTO_ARP, INPUT, |e| {
            e.payload(NETWORK_HEADER, ARP_TARGET, 4, REG32_FIRST);
            e.lookup(YIELDED, None, false);
            e.verdict(&Verdict::Drop);
        }),
        rule(NFPROTO_ARP, INPUT, |e| {
            e.payload(NETWORK_HEADER, ARP_TARGET, 4, REG32_FIRST);
            e.lookup(HELD, None, false);
            e.payload(NETWORK_HEADER, ARP_TARGET, 4, REG32_FIRST);
            e.meta(META_IIFNAME, REG32_FIRST + 1);
            e.lookup(HERE, None, true);
            e.verdict(&Verdict::Drop);
        }),
    ]
}

fn discovery_chain() -> Vec<Message> {
    const CHAIN: &str = "discovery";
    fn match_kind(e: &mut Encoder<'_>, kind: u8) {
        e.meta(META_L4PROTO, REG32_FIRST);
        e.compare(false, &[IPPROTO_ICMPV6]);
        e.payload(TRANSPORT_HEADER, 0, 1, REG32_FIRST);
        e.compare(false, &[kind]);
    }
    vec![
        chain(NFPROTO_IPV6, CHAIN, HOOK_PREROUTING, PRIORITY_RAW),
        rule(NFPROTO_IPV6, CHAIN, |e| {
            match_kind(e, ADVERTISEMENT);
            e.payload(LINK_HEADER, 6, 6, REG32_FIRST);
            e.lookup(OWN, None, true);
            e.payload(TRANSPORT_HEADER, DISCOVERY_TARGET, 16, REG32_FIRST);
            e.lookup(HELD, None, false);
            e.add_to(YIELDED);
        }),
        rule(NFPROTO_IPV6, CHAIN, |e| {
            match_kind(e, SOLICITATION);
            e.payload(TRANSPORT_HEADER, DISCOVERY_TARGET, 16, REG32_FIRST);
            e.lookup(YIELDED, None, false);
            e.verdict(&Verdict::Drop);
        }),
    ]
}

/// A packet in the middle of a connection that this node does not know goes to the node that had the address before, as it is.
fn handover_chain(family: u8) -> Vec<Message> {
    const CHAIN: &str = "handover";
    let (offset, length) = if family == NFPROTO_IPV6 { (24, 16) } else { (16, 4) };
    vec![
        chain(family, CHAIN, HOOK_PREROUTING, PRIORITY_BEFORE_DNAT),
        rule(family, CHAIN, move |e| {
            e.payload(NETWORK_HEADER, offset, length, REG32_FIRST);
            e.lookup(BEFORE, Some(REG_DATA), false);
            e.meta(META_L4PROTO, REG32_FIRST);
            e.compare(false, &[IPPROTO_TCP]);
            e.ct(CT_STATE);
            e.any_bit(CT_UNKNOWN, false);
            e.payload(TRANSPORT_HEADER, TCP_FLAGS_OFFSET, 1, REG32_FIRST);
            e.bitwise(&[TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK], &[0]);
            e.compare(true, &[TCP_SYN]);
            e.expression("dup", |w| w.be32(1, REG_DATA));
            e.verdict(&Verdict::Drop);
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    #[test]
    fn the_tables_are_what_nft_lists_and_go_with_the_last_address() {
        if !needs_root() {
            return;
        }
        let netns = NamedNetns::new("answers");
        let ips: [IpAddr; 2] = ["192.0.2.100".parse().unwrap(), "2001:db8::100".parse().unwrap()];
        let links = BTreeSet::from(["eth0".to_owned()]);
        let answers = Answers {
            held: ips.into_iter().map(|ip| (ip, links.clone())).collect(),
            own: BTreeSet::from([[2, 0, 0, 0, 0, 7]]),
            before: BTreeMap::from([
                (ips[0], "192.0.2.1".parse().unwrap()),
                (ips[1], "2001:db8::1".parse().unwrap()),
            ]),
        };
        netns.block_on(async {
            let mut rules = AnswerRules::default();
            rules.apply(&answers).unwrap();
            rules.apply(&answers).unwrap();
            assert_eq!(rules.yielded().unwrap(), BTreeSet::new());
        });
        let listed = netns.must(&["nft", "list", "ruleset"]);
        for text in [
            "table arp weft-lb",
            "table ip6 weft-lb",
            "192.0.2.100 . \"eth0\"",
            "02:00:00:00:00:07",
            "add @yielded { arp saddr ip }",
            "2001:db8::100 : 2001:db8::1",
            "dup to ip daddr map @before",
            "arp daddr ip . iifname != @here drop",
        ] {
            assert!(listed.contains(text), "{text} in {listed}");
        }
        netns.block_on(async { AnswerRules::default().apply(&Answers::default()).unwrap() });
        assert_eq!(netns.must(&["nft", "list", "ruleset"]).trim(), "");
    }
}
