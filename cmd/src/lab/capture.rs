//! A capture on the wire between the machines, and the question whether a frame may be there. The oracle of the
//! overlay: no packet of the LAN has a source or a destination in a pod or service range, no frame holds the words
//! that pods exchange, and what nodes send each other is WireGuard (or finds neighbours).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, anyhow};
use ipnet::IpNet;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::namespace;
use super::topology::{Role, Topology};

/// `sll_pkttype` of a frame that this host sends (packet(7)).
const PACKET_OUTGOING: u8 = 4;
/// Longest frame of the lab: segmentation offload hands over up to 64 KiB at once.
const MAX_FRAME_BYTES: usize = 65_536 + 64;
const RECEIVE_BUFFER_BYTES: usize = 32 << 20;

/// What the judge must know.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    inner_ranges: Vec<IpNet>,
    node_addresses: Vec<IpAddr>,
    wireguard_port: u16,
    /// Words that pods exchange during the capture.
    plaintext: Vec<u8>,
}

impl Rules {
    pub(super) fn new(topology: &Topology, plaintext: &str) -> anyhow::Result<Self> {
        let ranges = topology.cluster_cidrs().into_iter().chain(topology.service_cidrs());
        let node_addresses = (1..=topology.nodes).flat_map(|index| topology.lan_addresses(Role::Node(index)));
        Ok(Self {
            inner_ranges: ranges.map(str::parse).collect::<Result<_, _>>().context("ranges of the lab")?,
            node_addresses: node_addresses.map(|(address, _)| address).collect(),
            wireguard_port: weft_model::constants::WIREGUARD_PORT,
            plaintext: plaintext.as_bytes().to_vec(),
        })
    }
}

/// The judgement on one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    WireGuard,
    /// Allowed, and not between nodes or not IP traffic of anybody.
    Other(&'static str),
    Violation(String),
}

/// What a capture saw. Frames are counted where they enter the switch, and judged there and where they leave.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) wireguard: u64,
    pub(super) other: BTreeMap<&'static str, u64>,
    /// The first few, as text.
    pub(super) violations: Vec<String>,
    pub(super) violation_count: u64,
    /// Frames with the plaintext, wherever they were captured.
    pub(super) plaintext: u64,
}

/// A running capture.
pub(super) struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Capture {
    /// Captures on every interface of the network namespace at `path` from the moment this returns.
    pub(super) fn start(path: &Path, rules: Rules) -> anyhow::Result<Self> {
        Self::with_socket(namespace::inside_network(path, open_socket)?, rules)
    }

    /// As `start`, in the namespaces of a pod's process of a machine.
    pub(super) fn start_in_pod(first: i32, inner: i32, rules: Rules) -> anyhow::Result<Self> {
        let socket = namespace::inside(first, move || {
            namespace::Namespaces::of(inner)?.enter()?;
            open_socket()
        })?;
        Self::with_socket(socket, rules)
    }

    fn with_socket(socket: OwnedFd, rules: Rules) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || capture(&socket, &rules, &until))
            .context("start the capture")?;
        Ok(Self { stop, thread })
    }

    pub(super) fn finish(self) -> anyhow::Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture's thread panicked"))
    }
}

fn open_socket() -> anyhow::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
        .context("open a packet socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).context("size the receive buffer")?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50)).context("set the timeout")?;
    Ok(socket)
}

fn capture(socket: &OwnedFd, rules: &Rules, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    loop {
        let Ok((length, from)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else {
            // Nothing for a while: what was sent before the end has arrived.
            if stop.load(Ordering::Relaxed) {
                return seen;
            }
            continue;
        };
        let leaves = from.is_some_and(|address| address.pkttype() == PACKET_OUTGOING);
        seen.count(&buffer[..length], leaves, rules);
    }
}

impl Seen {
    fn count(&mut self, frame: &[u8], leaves: bool, rules: &Rules) {
        self.plaintext += u64::from(holds(frame, &rules.plaintext));
        match judge(frame, rules) {
            Verdict::Violation(text) => {
                self.violation_count += 1;
                if self.violations.len() < 5 {
                    self.violations.push(text);
                }
            }
            _ if leaves => {}
            Verdict::WireGuard => self.wireguard += 1,
            Verdict::Other(kind) => *self.other.entry(kind).or_default() += 1,
        }
    }
}

fn holds(frame: &[u8], words: &[u8]) -> bool {
    !words.is_empty() && frame.windows(words.len()).any(|window| window == words)
}

/// What the addresses and ports of an IP packet say.
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    payload: &'a [u8],
}

fn judge(frame: &[u8], rules: &Rules) -> Verdict {
    let packet = match frame.get(12..14) {
        Some([0x08, 0x06]) => return Verdict::Other("ARP"),
        Some([0x08, 0x00]) => parse_v4(&frame[14..]),
        Some([0x86, 0xdd]) => parse_v6(&frame[14..]),
        _ => return Verdict::Other("not IP"),
    };
    let Some(packet) = packet else { return Verdict::Violation("a broken IP packet".to_owned()) };
    let text = format!("{} > {} protocol {}", packet.source, packet.destination, packet.protocol);
    let ends = [packet.source, packet.destination];
    if ends.iter().any(|end| rules.inner_ranges.iter().any(|range| range.contains(end))) {
        return Verdict::Violation(format!("{text}: an address of a pod or a Service"));
    }
    if holds(packet.payload, &rules.plaintext) {
        return Verdict::Violation(format!("{text}: readable words of a pod"));
    }
    if is_wireguard(&packet, rules.wireguard_port) {
        return Verdict::WireGuard;
    }
    // ICMPv6 130 to 137 and 143: listeners, routers and neighbours (RFC 4861, RFC 3810).
    if packet.protocol == 58 && matches!(packet.payload.first(), Some(130..=137 | 143)) {
        return Verdict::Other("neighbour discovery");
    }
    if ends.iter().all(|end| rules.node_addresses.contains(end)) {
        return Verdict::Violation(format!("{text}: between nodes and not WireGuard"));
    }
    Verdict::Other("API server and client host")
}

/// UDP on WireGuard's port whose payload begins with a message type of its protocol and three zeroes.
fn is_wireguard(packet: &Packet<'_>, port: u16) -> bool {
    let ports = [packet.payload.get(0..2), packet.payload.get(2..4)];
    let on_port = ports.iter().flatten().any(|bytes| **bytes == port.to_be_bytes());
    packet.protocol == 17 && on_port && matches!(packet.payload.get(8..12), Some([1..=4, 0, 0, 0]))
}

fn parse_v4(bytes: &[u8]) -> Option<Packet<'_>> {
    let header = usize::from(bytes.first()? & 0x0f) * 4;
    Some(Packet {
        source: Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(12..16)?).ok()?).into(),
        destination: Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(16..20)?).ok()?).into(),
        protocol: *bytes.get(9)?,
        payload: bytes.get(header..)?,
    })
}

/// Skips a hop-by-hop header, which multicast listener reports carry.
fn parse_v6(bytes: &[u8]) -> Option<Packet<'_>> {
    let mut protocol = *bytes.get(6)?;
    let mut payload = bytes.get(40..)?;
    if protocol == 0 {
        protocol = *payload.first()?;
        payload = payload.get((usize::from(*payload.get(1)?) + 1) * 8..)?;
    }
    Some(Packet {
        source: Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?).into(),
        destination: Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(24..40)?).ok()?).into(),
        protocol,
        payload,
    })
}

#[cfg(test)]
mod tests {
    use super::super::topology::Family;
    use super::*;

    fn rules() -> Rules {
        Rules::new(&Topology { family: Family::Dual, nodes: 3, loopback_port: 1 }, "secret words").unwrap()
    }

    fn udp(source: &str, destination: &str, port: u16, body: &[u8]) -> Vec<u8> {
        let mut payload = [40_000_u16.to_be_bytes(), port.to_be_bytes(), [0; 2], [0; 2]].concat();
        payload.extend(body);
        let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut frame = [&[0; 12][..], &[8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
                frame.extend([source.octets(), destination.octets()].concat());
                frame.extend(payload);
                frame
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut frame = [&[0; 12][..], &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 17, 64]].concat();
                frame.extend([source.octets(), destination.octets()].concat());
                frame.extend(payload);
                frame
            }
            _ => panic!("one family"),
        }
    }

    #[test]
    fn wireguard_between_nodes_is_what_it_should_be_in_both_families() {
        for (a, b) in [("172.30.99.11", "172.30.99.12"), ("fd00:30:99::11", "fd00:30:99::12")] {
            assert_eq!(judge(&udp(a, b, 51820, &[4, 0, 0, 0, 9, 9]), &rules()), Verdict::WireGuard);
            let other = judge(&udp(a, b, 51820, &[9, 9, 9, 9]), &rules());
            assert!(matches!(other, Verdict::Violation(_)), "{other:?}");
        }
    }

    #[test]
    fn an_address_of_a_pod_or_service_on_the_wire_is_a_violation() {
        for (a, b) in [
            ("10.244.1.2", "172.30.99.12"),
            ("172.30.99.11", "10.96.0.10"),
            ("fd00:10:244:1::2", "fd00:30:99::1"),
            ("fd00:30:99::11", "fd00:10:96::a"),
        ] {
            assert!(matches!(judge(&udp(a, b, 53, &[]), &rules()), Verdict::Violation(_)), "{a} {b}");
        }
    }

    #[test]
    fn readable_words_are_a_violation_even_inside_what_looks_like_wireguard() {
        let frame = udp("172.30.99.11", "172.30.99.12", 51820, b"\x04\0\0\0 secret words");
        assert!(matches!(judge(&frame, &rules()), Verdict::Violation(_)));
    }

    #[test]
    fn talk_with_the_client_host_is_not_between_nodes() {
        let frame = udp("172.30.99.11", "172.30.99.250", 53, &[]);
        assert_eq!(judge(&frame, &rules()), Verdict::Other("API server and client host"));
    }

    #[test]
    fn truncated_frames_are_named_and_not_fatal() {
        let whole = udp("fd00:30:99::11", "fd00:30:99::12", 51820, &[4, 0, 0, 0]);
        for length in 0..whole.len() {
            judge(&whole[..length], &rules());
        }
    }
}
