//! Sockets on which the LAN is asked and told who has an address, and on which nodes are asked whether they live: ARP as packets,
//! neighbour discovery and echo as raw ICMP. Nothing here blocks, and nothing here decides.
//!
//! Sources: RFC 826 and RFC 5227 (ARP), RFC 4861 (neighbour discovery), RFC 792 and RFC 4443 (echo).
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, recvfrom, sendto};

pub type Mac = [u8; 6];
const BROADCAST: Mac = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
/// Ethernet header, and ARP for IPv4 over Ethernet behind it.
const ARP_BYTES: usize = 14 + 28;

fn owned(descriptor: libc::c_int) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn socket(family: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    owned(unsafe {
        libc::socket(family, libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol)
    })
}

/// Nothing waits.
fn quiet<T>(error: nix::Error) -> io::Result<Option<T>> {
    match error {
        nix::Error::EAGAIN | nix::Error::EINTR => Ok(None),
        error => Err(error.into()),
    }
}

/// ARP on one link.
pub struct Arp {
    socket: OwnedFd,
    pub mac: Mac,
}

/// What somebody said of himself in an ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    pub mac: Mac,
    pub ip: Ipv4Addr,
}

impl Arp {
    pub fn open(index: u32, mac: Mac) -> io::Result<Self> {
        let socket = socket(libc::AF_PACKET, i32::from(ETHERTYPE_ARP.to_be()))?;
        let index = libc::c_int::try_from(index).map_err(io::Error::other)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ETHERTYPE_ARP.to_be(),
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a whole `sockaddr_ll` of the length that is given, and lives through the call.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket, mac })
    }

    /// RFC 5227 2.1.1: who has it? Nobody learns anything from the question.
    pub fn ask(&self, ip: Ipv4Addr) -> io::Result<()> {
        self.send(&arp(1, self.mac, Ipv4Addr::UNSPECIFIED, ip))
    }

    /// RFC 5227 2.3: it is here. As a request and as a reply, because devices heed one or the other.
    pub fn tell(&self, ip: Ipv4Addr) -> io::Result<()> {
        self.send(&arp(1, self.mac, ip, ip))?;
        self.send(&arp(2, self.mac, ip, ip))
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::sys::socket::send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }

    /// The next packet that waits and is ARP of an IPv4 address; malformed ones are counted in `malformed`.
    pub fn next(&self, malformed: &mut u64) -> io::Result<Option<Said>> {
        let mut buffer = [0; 128];
        loop {
            match nix::sys::socket::recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => match said(&buffer[..length.min(buffer.len())]) {
                    Some(said) => return Ok(Some(said)),
                    None => *malformed += 1,
                },
                Err(error) => return quiet(error),
            }
        }
    }
}

fn arp(operation: u8, mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> [u8; ARP_BYTES] {
    let mut frame = [0; ARP_BYTES];
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ETHERTYPE_ARP.to_be_bytes());
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&sender.octets());
    if operation == 2 {
        frame[32..38].copy_from_slice(&BROADCAST);
    }
    frame[38..42].copy_from_slice(&target.octets());
    frame
}

/// The sender of a request or reply, if it is well-formed.
pub fn said(frame: &[u8]) -> Option<Said> {
    let frame: &[u8; ARP_BYTES] = frame.get(..ARP_BYTES)?.try_into().ok()?;
    let header = &frame[12..20];
    let known = header == [8, 6, 0, 1, 8, 0, 6, 4] && frame[20] == 0 && matches!(frame[21], 1 | 2);
    let mac: Mac = frame[22..28].try_into().ok()?;
    let ip: [u8; 4] = frame[28..32].try_into().ok()?;
    (known && mac[0] & 1 == 0).then_some(Said { mac, ip: ip.into() })
}

/// Raw ICMPv6: neighbour discovery on any link, and echo.
pub struct Icmp6(OwnedFd);

/// What came on [`Icmp6`] or [`Icmp4`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A reply with our identifier, from that address.
    Echo {
        from: IpAddr,
        identifier: u16,
    },
    /// An echo request from that address; the kernel answers it.
    Request {
        from: IpAddr,
    },
    /// A neighbour advertisement for `ip` with the sender's link-layer address.
    Advertisement {
        ip: Ipv6Addr,
        mac: Mac,
    },
    /// A neighbour advertisement that RFC 4861 7.1.2 or 4.4 does not allow, or one without a link-layer address.
    Malformed,
    Other,
}

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// RFC 4861 7.1: a packet with another hop limit came through a router.
const HOP_LIMIT: libc::c_int = 255;

impl Icmp6 {
    pub fn open() -> io::Result<Self> {
        let socket = socket(libc::AF_INET6, libc::IPPROTO_ICMPV6)?;
        for option in [libc::IPV6_MULTICAST_HOPS, libc::IPV6_UNICAST_HOPS] {
            set_option(&socket, libc::IPPROTO_IPV6, option, &HOP_LIMIT)?;
        }
        set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, &0)?;
        // Of the 256 types only these three pass (RFC 3542 3.2: a set bit blocks).
        let mut filter = [u32::MAX; 8];
        for kind in [ECHO_REQUEST_V6, ECHO_REPLY_V6, ADVERTISEMENT] {
            filter[usize::from(kind >> 5)] &= !(1 << (kind & 31));
        }
        set_option(&socket, libc::IPPROTO_ICMPV6, 1, &filter)?;
        Ok(Self(socket))
    }

    /// Who has it? Asked of its solicited-node group on one link, from the link-local address.
    pub fn ask(&self, index: u32, ip: Ipv6Addr, mac: Mac) -> io::Result<()> {
        let [.., a, b, c] = ip.octets();
        let group =
            Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c));
        self.send(&discovery(SOLICITATION, 0, ip, 1, mac), group, index)
    }

    /// RFC 4861 7.2.6: it is here, and overrides what caches hold.
    pub fn tell(&self, index: u32, ip: Ipv6Addr, mac: Mac) -> io::Result<()> {
        const ROUTER_OVERRIDE: u8 = 0xa0;
        self.send(&discovery(ADVERTISEMENT, ROUTER_OVERRIDE, ip, 2, mac), ALL_NODES, index)
    }

    pub fn echo(&self, to: Ipv6Addr, identifier: u16) -> io::Result<()> {
        self.send(&echo(ECHO_REQUEST_V6, identifier), to, 0)
    }

    /// The kernel puts the checksum in.
    fn send(&self, message: &[u8], to: Ipv6Addr, index: u32) -> io::Result<()> {
        let to = SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, index));
        sendto(self.0.as_raw_fd(), message, &to, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }

    pub fn next(&self) -> io::Result<Option<Heard>> {
        let mut buffer = [0; 256];
        match recvfrom::<SockaddrIn6>(self.0.as_raw_fd(), &mut buffer) {
            Ok((length, from)) => {
                let from = from.map_or(Ipv6Addr::UNSPECIFIED, |from| from.ip());
                Ok(Some(heard_v6(&buffer[..length.min(buffer.len())], from)))
            }
            Err(error) => quiet(error),
        }
    }
}

fn discovery(kind: u8, flags: u8, ip: Ipv6Addr, option: u8, mac: Mac) -> [u8; 32] {
    let mut message = [0; 32];
    message[0] = kind;
    message[4] = flags;
    message[8..24].copy_from_slice(&ip.octets());
    message[24] = option;
    message[25] = 1;
    message[26..32].copy_from_slice(&mac);
    message
}

/// What an ICMPv6 message says.
pub fn heard_v6(message: &[u8], from: Ipv6Addr) -> Heard {
    let target = || <[u8; 16]>::try_from(message.get(8..24)?).ok().map(Ipv6Addr::from);
    match message.first() {
        Some(&ECHO_REPLY_V6) => identifier(message)
            .map_or(Heard::Other, |identifier| Heard::Echo { from: from.into(), identifier }),
        Some(&ECHO_REQUEST_V6) => Heard::Request { from: from.into() },
        Some(&ADVERTISEMENT) => match (target(), target_mac(message.get(24..).unwrap_or_default())) {
            (Some(ip), Some(mac)) if !ip.is_multicast() && mac[0] & 1 == 0 => {
                Heard::Advertisement { ip, mac }
            }
            _ => Heard::Malformed,
        },
        _ => Heard::Other,
    }
}

/// Option 2 (target link-layer address) of RFC 4861 4.6.1; an option of no length ends the walk.
fn target_mac(mut options: &[u8]) -> Option<Mac> {
    while let [kind, units, ..] = options {
        let length = usize::from(*units) * 8;
        let option = options.get(..length).filter(|option| !option.is_empty())?;
        if *kind == 2 {
            return option.get(2..8)?.try_into().ok();
        }
        options = &options[length..];
    }
    None
}

/// Raw ICMP, for echo.
pub struct Icmp4(OwnedFd);

impl Icmp4 {
    pub fn open() -> io::Result<Self> {
        let socket = socket(libc::AF_INET, libc::IPPROTO_ICMP)?;
        // ICMP_FILTER of linux/icmp.h: a set bit blocks the type.
        const ICMP_FILTER: libc::c_int = 1;
        let passing = 1u32 << ECHO_REPLY_V4 | 1 << ECHO_REQUEST_V4;
        set_option(&socket, libc::SOL_RAW, ICMP_FILTER, &!passing)?;
        Ok(Self(socket))
    }

    pub fn echo(&self, to: Ipv4Addr, identifier: u16) -> io::Result<()> {
        let mut message = echo(ECHO_REQUEST_V4, identifier);
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
        sendto(self.0.as_raw_fd(), &message, &to, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }

    pub fn next(&self) -> io::Result<Option<Heard>> {
        let mut buffer = [0; 256];
        match recvfrom::<SockaddrIn>(self.0.as_raw_fd(), &mut buffer) {
            Ok((length, from)) => {
                let from = from.map_or(Ipv4Addr::UNSPECIFIED, |from| from.ip());
                Ok(Some(heard_v4(&buffer[..length.min(buffer.len())], from)))
            }
            Err(error) => quiet(error),
        }
    }
}

/// The IPv4 header comes with the message.
pub fn heard_v4(packet: &[u8], from: Ipv4Addr) -> Heard {
    let header = packet.first().map_or(0, |first| usize::from(first & 15) * 4);
    let message = packet.get(header..).unwrap_or_default();
    match message.first() {
        Some(&ECHO_REQUEST_V4) => Heard::Request { from: from.into() },
        Some(&ECHO_REPLY_V4) => identifier(message)
            .map_or(Heard::Other, |identifier| Heard::Echo { from: from.into(), identifier }),
        _ => Heard::Other,
    }
}

fn echo(kind: u8, identifier: u16) -> [u8; 8] {
    let [high, low] = identifier.to_be_bytes();
    [kind, 0, 0, 0, high, low, 0, 0]
}

fn identifier(message: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(4..6)?.try_into().ok()?))
}

/// RFC 1071, of up to 64 KiB; an even number of octets.
pub(crate) fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

fn set_option<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is of the length that is given, and lives through the call; the kernel only reads it.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn what_is_told_is_understood() {
        let ip = Ipv4Addr::new(192, 0, 2, 7);
        for operation in [1, 2] {
            assert_eq!(said(&arp(operation, MAC, ip, ip)), Some(Said { mac: MAC, ip }));
        }
        let ip: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let message = discovery(ADVERTISEMENT, 0, ip, 2, MAC);
        assert_eq!(heard_v6(&message, ip), Heard::Advertisement { ip, mac: MAC });
    }

    #[test]
    fn a_checksum_is_that_of_rfc_1071() {
        assert_eq!(checksum(&echo(8, 0x1234)), !(0x0800 + 0x1234));
    }

    #[test]
    fn malformed_arp_on_a_link_is_counted_and_the_next_claim_is_heard() {
        if !needs_root() {
            return;
        }
        let node = NamedNetns::new("node");
        node.must(&["ip", "link", "add", "up0", "type", "veth", "peer", "name", "far"]);
        let index = |link| {
            let shown = node.must(&["ip", "-o", "link", "show", link]);
            shown.split(':').next().unwrap().trim().parse::<u32>().unwrap()
        };
        for link in ["up0", "far"] {
            node.must(&["ip", "link", "set", link, "up"]);
        }
        let (near, far) = (index("up0"), index("far"));
        node.block_on(async {
            let (listening, sending) =
                (Arp::open(near, [2, 0, 0, 0, 0, 1]).unwrap(), Arp::open(far, MAC).unwrap());
            let ip = Ipv4Addr::new(192, 0, 2, 7);
            let whole = arp(1, MAC, ip, ip);
            let mut of_another_hardware = whole;
            of_another_hardware[15] = 6;
            let mut of_a_group = whole;
            of_a_group[22] = 1;
            for frame in [&whole[..20], &of_another_hardware, &of_a_group, &whole] {
                sending.send(frame).unwrap();
            }
            let mut malformed = 0;
            let heard = std::iter::repeat_with(|| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                listening.next(&mut malformed).unwrap()
            });
            assert_eq!(heard.take(100).flatten().next(), Some(Said { mac: MAC, ip }));
            assert_eq!(malformed, 3);
        });
    }

    proptest! {
        #[test]
        fn nothing_that_arrives_does_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = said(&bytes);
            let _ = heard_v4(&bytes, Ipv4Addr::LOCALHOST);
            let _ = heard_v6(&bytes, Ipv6Addr::LOCALHOST);
            let _ = target_mac(&bytes);
        }

        /// Well-formed packets with some octets changed: whatever is understood obeys the rules.
        #[test]
        fn a_changed_packet_is_understood_by_the_rules_or_not_at_all(
            octets in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            options in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut frame = arp(2, MAC, Ipv4Addr::new(192, 0, 2, 7), Ipv4Addr::new(192, 0, 2, 7)).to_vec();
            let mut message = discovery(ADVERTISEMENT, 0, Ipv6Addr::LOCALHOST, 2, MAC).to_vec();
            message.extend(options);
            for (at, octet) in octets {
                let (in_frame, in_message) = (at.index(frame.len()), at.index(message.len()));
                (frame[in_frame], message[in_message]) = (octet, octet);
            }
            if let Some(said) = said(&frame) {
                prop_assert_eq!((&frame[12..21], said.mac[0] & 1), (&[8, 6, 0, 1, 8, 0, 6, 4, 0][..], 0));
            }
            match heard_v6(&message, Ipv6Addr::LOCALHOST) {
                Heard::Advertisement { ip, mac } => {
                    prop_assert!(message[0] == ADVERTISEMENT && !ip.is_multicast() && mac[0] & 1 == 0);
                }
                Heard::Malformed => prop_assert_eq!(message[0], ADVERTISEMENT),
                Heard::Other | Heard::Echo { .. } | Heard::Request { .. } => {
                    prop_assert_ne!(message[0], ADVERTISEMENT);
                }
            }
        }

        #[test]
        fn an_advertisement_that_is_cut_or_names_a_group_is_malformed(cut in 1..32usize, mac in any::<Mac>()) {
            let ip: Ipv6Addr = "2001:db8::7".parse().unwrap();
            let message = discovery(ADVERTISEMENT, 0, ip, 2, mac);
            prop_assert_eq!(heard_v6(&message[..cut], ip), Heard::Malformed);
            let expected = if mac[0] & 1 == 0 { Heard::Advertisement { ip, mac } } else { Heard::Malformed };
            prop_assert_eq!(heard_v6(&message, ip), expected);
            let group = discovery(ADVERTISEMENT, 0, ALL_NODES, 2, MAC);
            prop_assert_eq!(heard_v6(&group, ip), Heard::Malformed);
        }

        #[test]
        fn a_cut_or_changed_arp_packet_is_no_claim_of_a_group(cut in 0..ARP_BYTES, mac in any::<Mac>()) {
            let ip = Ipv4Addr::new(192, 0, 2, 7);
            let frame = arp(1, mac, ip, ip);
            prop_assert_eq!(said(&frame[..cut]), None);
            prop_assert_eq!(said(&frame).is_some(), mac[0] & 1 == 0);
        }
    }
}
