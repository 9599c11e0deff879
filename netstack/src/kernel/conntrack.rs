//! Tracked flows of the calling thread's network namespace: read, and deleted where they lead to what is gone.
//!
//! A UDP flow keeps the translation of its first packet for as long as the client goes on sending: after an endpoint
//! went, or the first one came, the old entry has to be deleted. A call has the kernel walk its whole table, ten milliseconds where
//! it has room for 262,144 flows, so callers collect what they are looking for first.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use weft_model::objects::Protocol;

use super::nflog::receive;
use super::nft::NetfilterSocket;
use super::nft::uapi::{NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_UNSPEC};
use super::nft::wire::{Attribute, Message, Writer};

// linux/netfilter/nfnetlink_conntrack.h
const SUBSYS_CTNETLINK: u16 = 1;
const CT_NEW: u16 = SUBSYS_CTNETLINK << 8;
/// NF_NETLINK_CONNTRACK_NEW of linux/netfilter/nfnetlink_compat.h.
const GROUP_NEW: u32 = 1;
const CT_GET: u16 = (SUBSYS_CTNETLINK << 8) | 1;
const CT_DELETE: u16 = (SUBSYS_CTNETLINK << 8) | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Compare the protocol number (bit of `enum ctattr_filter_flags` in the kernel's nf_internals.h).
const FILTER_PROTOCOL: u32 = 1 << 3;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error("open a netfilter socket")]
    Open(#[source] io::Error),
    #[error("read the tracked flows")]
    Read(#[source] Errno),
    /// The others were deleted nevertheless.
    #[error("delete the flow {flow} ({deleted} others deleted, {failed} not)")]
    Delete {
        flow: Box<Flow>,
        deleted: usize,
        failed: usize,
        #[source]
        source: Errno,
    },
}

/// One tracked flow. For a connection to a service: `original.destination` is what the client meant, `reply.source`
/// the endpoint that the kernel chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// IANA protocol number.
    pub protocol: u8,
    /// As the first packet came.
    pub original: Tuple,
    /// As answers come back, translations undone.
    pub reply: Tuple,
}

/// Ports are 0 for protocols without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl std::fmt::Display for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { protocol, original, reply } = self;
        write!(
            f,
            "{} -> {} ({} answers), protocol {protocol}",
            original.source, original.destination, reply.source
        )
    }
}

/// Deletes the tracked UDP flows, of both families, for which `matches` holds; returns how many. A flow that ends
/// meanwhile is no error.
pub fn delete_udp_flows(matches: impl Fn(&Flow) -> bool) -> Result<usize, ConntrackError> {
    delete_matching(Some(Protocol::Udp.number()), matches)
}

/// The same for flows of every protocol.
pub fn delete_flows(matches: impl Fn(&Flow) -> bool) -> Result<usize, ConntrackError> {
    delete_matching(None, matches)
}

fn delete_matching(protocol: Option<u8>, matches: impl Fn(&Flow) -> bool) -> Result<usize, ConntrackError> {
    let mut socket = NetfilterSocket::open().map_err(ConntrackError::Open)?;
    let mut found = Vec::new();
    // A filter is of one family; without, one walk finds both.
    let families = if protocol.is_some() { &[NFPROTO_IPV4, NFPROTO_IPV6][..] } else { &[NFPROTO_UNSPEC] };
    for &family in families {
        let entries = dump(&mut socket, family, protocol, &matches);
        found.append(&mut entries.map_err(ConntrackError::Read)?);
    }
    let (mut deleted, mut failures) = (0, Vec::new());
    for entry in found {
        match delete(&mut socket, &entry) {
            Ok(()) => deleted += 1,
            Err(Errno::ENOENT) => {}
            Err(errno) => failures.push((entry.flow, errno)),
        }
    }
    match failures.first() {
        None => Ok(deleted),
        Some((flow, source)) => Err(ConntrackError::Delete {
            flow: Box::new(*flow),
            deleted,
            failed: failures.len(),
            source: *source,
        }),
    }
}

/// Tracked UDP flows of both families, sorted.
pub fn udp_flows() -> Result<Vec<Flow>, ConntrackError> {
    let mut socket = NetfilterSocket::open().map_err(ConntrackError::Open)?;
    let mut flows = Vec::new();
    for family in [NFPROTO_IPV4, NFPROTO_IPV6] {
        let entries = dump(&mut socket, family, Some(Protocol::Udp.number()), &|_: &Flow| true);
        flows.extend(entries.map_err(ConntrackError::Read)?.iter().map(|entry| entry.flow));
    }
    flows.sort_unstable();
    Ok(flows)
}

/// Flows as they begin, in the calling thread's network namespace from now on. The kernel makes events of them unless
/// `net.netfilter.nf_conntrack_events` is 0.
pub struct NewFlows {
    socket: AsyncFd<NetfilterSocket>,
}

impl NewFlows {
    /// Needs a tokio runtime.
    pub fn open() -> Result<Self, ConntrackError> {
        let socket = NetfilterSocket::open().map_err(ConntrackError::Open)?;
        socket.join(GROUP_NEW).map_err(ConntrackError::Open)?;
        let socket = socket.listen().map_err(ConntrackError::Open)?;
        Ok(Self { socket })
    }

    /// Waits for some; `None` when the kernel lost some because we were slow.
    pub async fn next(&mut self) -> Result<Option<Vec<Flow>>, ConntrackError> {
        let decode = |message: Message<'_>| (message.kind == CT_NEW).then(|| read_flow(&message)).flatten();
        receive(&mut self.socket, decode).await.map_err(ConntrackError::Read)
    }
}

/// A flow with what names it to the kernel: the original tuple, the zone and the id, as they were read.
struct Entry {
    flow: Flow,
    names: Vec<(u16, Vec<u8>)>,
}

fn dump(
    socket: &mut NetfilterSocket,
    family: u8,
    protocol: Option<u8>,
    matches: &impl Fn(&Flow) -> bool,
) -> Result<Vec<Entry>, Errno> {
    socket.dump(
        CT_GET,
        family,
        |writer| protocol.into_iter().for_each(|protocol| write_filter(writer, protocol)),
        |entries: &mut Vec<Entry>, message| {
            let wanted =
                |flow: &Flow| protocol.is_none_or(|protocol| flow.protocol == protocol) && matches(flow);
            let flow = read_flow(&message).filter(wanted);
            if let Some(flow) = flow {
                let names = message
                    .attributes()
                    .filter(|attribute| matches!(attribute.kind, CTA_TUPLE_ORIG | CTA_ZONE | CTA_ID))
                    .map(|attribute| (attribute.kind, attribute.value.to_vec()))
                    .collect();
                entries.push(Entry { flow, names });
            }
        },
    )
}

/// Only flows of this protocol (since Linux 5.8): the kernel passes over the others much faster than we could read them.
fn write_filter(writer: &mut Writer, protocol: u8) {
    writer.nest(CTA_FILTER, |writer| {
        writer.attribute(CTA_FILTER_ORIG_FLAGS, &FILTER_PROTOCOL.to_ne_bytes());
        writer.attribute(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
    });
    writer.nest(CTA_TUPLE_ORIG, |writer| {
        writer.nest(CTA_TUPLE_PROTO, |writer| writer.u8(CTA_PROTO_NUM, protocol));
    });
}

fn delete(socket: &mut NetfilterSocket, entry: &Entry) -> Result<(), Errno> {
    let family = if entry.flow.original.source.is_ipv6() { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
    socket.request(
        CT_DELETE,
        family,
        |writer| {
            for (kind, value) in &entry.names {
                writer.attribute(*kind, value);
            }
        },
        |_| (),
    )
}

fn read_flow(message: &Message<'_>) -> Option<Flow> {
    let original = message.attributes().find(CTA_TUPLE_ORIG)?;
    let reply = message.attributes().find(CTA_TUPLE_REPLY)?;
    let protocol = original.nested().find(CTA_TUPLE_PROTO)?.nested().find(CTA_PROTO_NUM)?.u8()?;
    Some(Flow { protocol, original: read_tuple(&original)?, reply: read_tuple(&reply)? })
}

fn read_tuple(tuple: &Attribute<'_>) -> Option<Tuple> {
    let addresses = tuple.nested().find(CTA_TUPLE_IP)?;
    let protocol = tuple.nested().find(CTA_TUPLE_PROTO)?;
    let end = |v4, v6, port| {
        let address = match addresses.nested().find(v4) {
            Some(address) => IpAddr::V4(Ipv4Addr::from(*address.value.first_chunk()?)),
            None => IpAddr::V6(Ipv6Addr::from(*addresses.nested().find(v6)?.value.first_chunk()?)),
        };
        let port = protocol.nested().find(port).and_then(|port| port.be16()).unwrap_or(0);
        Some(SocketAddr::new(address, port))
    };
    Some(Tuple {
        source: end(CTA_IP_V4_SRC, CTA_IP_V6_SRC, CTA_PROTO_SRC_PORT)?,
        destination: end(CTA_IP_V4_DST, CTA_IP_V6_DST, CTA_PROTO_DST_PORT)?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::UdpSocket;

    use weft_model::ruleset::{Base, Chain, ChainKind, Field, Hook, Rule, Statement, Table};

    use super::super::nft::NftTable;
    use super::super::nft::tests::{await_addresses, in_namespace, run};
    use super::*;
    use crate::reconcile::Trust;

    /// Translates UDP to port 53 of both families to the endpoints.
    fn translate(endpoints: [&str; 2]) -> Table {
        let rules = endpoints.map(|endpoint| {
            let endpoint: SocketAddr = endpoint.parse().unwrap();
            Rule::new(vec![
                Statement::Match {
                    field: Field::DestinationPort,
                    negated: false,
                    value: weft_model::ruleset::Datum::Port(53),
                },
                Statement::Dnat { address: endpoint.ip(), port: Some(endpoint.port()) },
            ])
        });
        let base = Base { kind: ChainKind::Nat, hook: Hook::Output, priority: -105 };
        let mut table = Table { name: "weft-test".into(), ..Table::default() };
        table.chains.insert("output".into(), Chain { base: Some(base), rules: rules.to_vec() });
        table
    }

    fn receives(socket: &UdpSocket) -> bool {
        received_within(socket, 5000)
    }

    /// Asked after another socket has received: what was to come here has come too.
    fn received(socket: &UdpSocket) -> bool {
        received_within(socket, 100)
    }

    fn received_within(socket: &UdpSocket, millis: u64) -> bool {
        socket.set_read_timeout(Some(std::time::Duration::from_millis(millis))).unwrap();
        socket.recv(&mut [0; 8]).is_ok()
    }

    #[test]
    fn deleting_a_flow_lets_the_next_packet_find_the_new_endpoint() {
        in_namespace(|| {
            run(
                "ip link set lo up; ip addr add fd01::1/128 dev lo nodad; ip addr add fd01::2/128 dev lo nodad",
            );
            await_addresses();
            let mut owner = NftTable::new("weft-test");
            owner.apply(&translate(["127.0.0.2:5353", "[fd01::1]:5353"]), Trust::Nothing).unwrap();
            let [old4, old6, new4, new6] =
                ["127.0.0.2:5353", "[fd01::1]:5353", "127.0.0.3:5353", "[fd01::2]:5353"]
                    .map(|address| UdpSocket::bind(address).unwrap());
            let clients =
                [("0.0.0.0:0", "127.0.0.1:53"), ("[::]:0", "[fd01::1]:53"), ("0.0.0.0:0", "127.0.0.1:54")]
                    .map(|(local, vip)| (UdpSocket::bind(local).unwrap(), vip));
            let send = || {
                for (client, vip) in &clients {
                    client.send_to(b"x", vip).unwrap();
                }
            };
            send();
            assert!(receives(&old4) && receives(&old6));

            owner.apply(&translate(["127.0.0.3:5353", "[fd01::2]:5353"]), Trust::Shadow).unwrap();
            send();
            assert!(receives(&old4) && receives(&old6), "a tracked flow keeps its endpoint");
            assert!(!received(&new4));

            let gone: BTreeSet<SocketAddr> =
                ["127.0.0.2:5353", "[fd01::1]:5353"].map(|address| address.parse().unwrap()).into();
            let before = udp_flows().unwrap();
            assert_eq!(before.len(), 3, "{before:#?}");
            assert_eq!(delete_udp_flows(|flow| gone.contains(&flow.reply.source)).unwrap(), 2);
            let left = udp_flows().unwrap();
            assert_eq!(left.len(), 1, "{left:#?}");
            assert_eq!(left[0].original.destination, "127.0.0.1:54".parse().unwrap());
            send();
            assert!(receives(&new4) && receives(&new6));
            assert!(!received(&old4) && !received(&old6));
            assert_eq!(delete_udp_flows(|_| false).unwrap(), 0);
        });
    }
}
