//! Packets that a rule copied to a group of nflog, in the calling thread's network namespace; decoded, not judged.
//!
//! The kernel collects some packets or waits a moment before it wakes us, so that many cost little.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

use super::nft::NetfilterSocket;
use super::nft::wire::{Message, Writer};

// linux/netfilter/nfnetlink_log.h
const SUBSYS_ULOG: u16 = 4;
const PACKET: u16 = SUBSYS_ULOG << 8;
const CONFIG: u16 = (SUBSYS_ULOG << 8) | 1;
const CFG_CMD: u16 = 1;
const CFG_MODE: u16 = 2;
const CFG_TIMEOUT: u16 = 4;
const CFG_QTHRESH: u16 = 5;
const CMD_BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const PAYLOAD: u16 = 9;
const PREFIX: u16 = 10;
/// Hundredths of a second until packets that were collected are sent.
const FLUSH_AFTER: u32 = 10;
const COLLECTED: u32 = 32;
/// As much as any rule of ours copies.
const COPIED_BYTES: u32 = 256;

#[derive(Debug, thiserror::Error)]
pub enum NflogError {
    #[error("open a netfilter socket")]
    Open(#[source] io::Error),
    #[error("listen to group {group} of nflog; does another program?")]
    Bind {
        group: u16,
        #[source]
        source: Errno,
    },
    #[error("read copied packets")]
    Read(#[source] Errno),
}

/// The beginning of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// What the rule calls it.
    pub prefix: String,
    /// IANA number.
    pub protocol: u8,
    /// Ports are 0 for protocols without.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// A TCP packet that does not begin a connection.
    pub mid_stream: bool,
}

/// One group's socket.
pub struct Nflog {
    socket: AsyncFd<NetfilterSocket>,
}

impl Nflog {
    /// Needs a tokio runtime.
    pub fn open(group: u16) -> Result<Self, NflogError> {
        let mut socket = NetfilterSocket::open().map_err(NflogError::Open)?;
        let mode: Vec<u8> = [&COPIED_BYTES.to_be_bytes()[..], &[COPY_PACKET, 0]].concat();
        let write = |w: &mut Writer| {
            w.u8(CFG_CMD, CMD_BIND);
            w.attribute(CFG_MODE, &mode);
            w.be32(CFG_TIMEOUT, FLUSH_AFTER);
            w.be32(CFG_QTHRESH, COLLECTED);
        };
        socket
            .request_of(CONFIG, 0, group, write, |_| ())
            .map_err(|source| NflogError::Bind { group, source })?;
        let socket = socket.listen().map_err(NflogError::Open)?;
        Ok(Self { socket })
    }

    /// Waits for packets; `None` when the kernel lost some because we were slow.
    pub async fn next(&mut self) -> Result<Option<Vec<Copied>>, NflogError> {
        let read =
            receive(&mut self.socket, |message| (message.kind == PACKET).then(|| decode(&message)).flatten());
        read.await.map_err(NflogError::Read)
    }
}

/// What `decode` makes of the messages of the next datagram; `None` when some were lost.
pub(super) async fn receive<T>(
    socket: &mut AsyncFd<NetfilterSocket>,
    decode: impl Fn(Message<'_>) -> Option<T>,
) -> Result<Option<Vec<T>>, Errno> {
    loop {
        let mut ready = socket.readable_mut().await.map_err(|_| Errno::EIO)?;
        let mut decoded = Vec::new();
        match ready.get_inner_mut().receive(|message| decoded.extend(decode(message))) {
            Ok(()) => return Ok(Some(decoded)),
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(Errno::ENOBUFS) => return Ok(None),
            Err(errno) => return Err(errno),
        }
    }
}

fn decode(message: &Message<'_>) -> Option<Copied> {
    let prefix = message.attributes().find(PREFIX).map(|prefix| prefix.string()).unwrap_or_default();
    parse(message.attributes().find(PAYLOAD)?.value, prefix)
}

/// RFC 791, RFC 8200; `None` for what is neither or cut off before its addresses.
fn parse(packet: &[u8], prefix: String) -> Option<Copied> {
    let (source, destination, protocol, transport) = match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<20>()?;
            let length = usize::from(header[0] & 0xf) * 4;
            let address =
                |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*header.get(at..)?.first_chunk::<4>()?)));
            (address(12)?, address(16)?, header[9], packet.get(length..).unwrap_or(&[]))
        }
        6 => {
            let header = packet.first_chunk::<40>()?;
            let address =
                |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*header.get(at..)?.first_chunk::<16>()?)));
            let (protocol, transport) = behind_extensions(header[6], packet.get(40..).unwrap_or(&[]));
            (address(8)?, address(24)?, protocol, transport)
        }
        _ => return None,
    };
    let has_ports = matches!(protocol, TCP | UDP | SCTP);
    let port = |at: usize| {
        let bytes = transport.get(at..).filter(|_| has_ports)?.first_chunk::<2>()?;
        Some(u16::from_be_bytes(*bytes))
    };
    let flags = transport.get(13).filter(|_| protocol == TCP);
    Some(Copied {
        prefix,
        protocol,
        source: SocketAddr::new(source, port(0).unwrap_or(0)),
        destination: SocketAddr::new(destination, port(2).unwrap_or(0)),
        mid_stream: flags.is_some_and(|flags| flags & BEGINNING != SYN),
    })
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
/// FIN, SYN, RST and ACK: only the first packet of a connection has SYN alone (RFC 9293).
const BEGINNING: u8 = 0b1_0111;
const SYN: u8 = 0b10;

/// Past the extension headers of RFC 8200 that may stand before a transport header.
fn behind_extensions(mut next: u8, mut rest: &[u8]) -> (u8, &[u8]) {
    const FRAGMENT: u8 = 44;
    while matches!(next, 0 | 43 | FRAGMENT | 60) {
        let Some([after, length]) = rest.first_chunk::<2>().copied() else { break };
        let bytes = if next == FRAGMENT { 8 } else { (usize::from(length) + 1) * 8 };
        next = after;
        rest = rest.get(bytes..).unwrap_or(&[]);
    }
    (next, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IPV4_TCP: [u8; 40] = [
        0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 244, 0, 2, 10, 244, 1, 3, 0x9c, 0x40, 0, 80, 0, 0, 0,
        1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0,
    ];

    #[test]
    fn the_first_packet_of_a_connection_and_one_of_its_middle_are_told_apart() {
        let first = parse(&IPV4_TCP, String::new()).unwrap();
        assert_eq!(first.source, "10.244.0.2:40000".parse().unwrap());
        assert_eq!(first.destination, "10.244.1.3:80".parse().unwrap());
        assert_eq!((first.protocol, first.mid_stream), (TCP, false));
        let mut later = IPV4_TCP;
        later[33] = 0b1_0000;
        assert!(parse(&later, String::new()).unwrap().mid_stream);
    }

    #[test]
    fn ports_are_found_behind_extension_headers() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 16, 60, 64];
        packet.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("fd00::3".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend([UDP, 0, 1, 4, 0, 0, 0, 0]);
        packet.extend([0x9c, 0x40, 0, 53, 0, 8, 0, 0]);
        let parsed = parse(&packet, String::new()).unwrap();
        assert_eq!(parsed.destination, "[fd00::3]:53".parse().unwrap());
        assert_eq!((parsed.protocol, parsed.mid_stream), (UDP, false));
    }

    #[test]
    fn icmp_has_no_ports() {
        let mut packet = IPV4_TCP;
        packet[9] = 1;
        assert_eq!(parse(&packet, String::new()).unwrap().destination.port(), 0);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..120)) {
            let _ = parse(&bytes, String::new());
        }
    }
}
