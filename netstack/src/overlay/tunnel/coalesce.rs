//! From opened packets to few large writes: consecutive TCP segments and equally long UDP datagrams of one flow become
//! one packet with a virtio header, whose payloads stay where they were opened.
//!
//! Checksums of coalesced packets are not verified again: the seal proved that they are what the sender's stack or the
//! sender's own segmentation wrote. What cannot be joined is passed on untouched, in order within its flow.

use std::io::{self, IoSlice};
use std::ops::Range;

use crate::kernel::tun::{Tun, VIRTIO_NET_HEADER_LEN, VirtioNetHeader};

use super::checksum;

const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;
/// IPv6 header and the longest TCP header.
const MAX_HEADERS: usize = 100;
/// Groups that a packet is compared with, latest first.
const MAX_LOOK_BACK: usize = 16;
/// Largest IP packet.
const MAX_PACKET: usize = 65_535;
/// Most payloads in one write: UDP_MAX_SEGMENTS of Linux before 6.9.
const MAX_PIECES: usize = 64;

/// A packet inside the buffer `train` of a receive batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
    pub(super) train: usize,
    pub(super) range: Range<usize>,
}

/// Where things are in a packet that may be joined with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Headers {
    protocol: u8,
    transport_at: usize,
    payload_at: usize,
}

impl Headers {
    /// `None` for packets that must pass alone: fragments, options, extension headers, flags beyond ACK and PSH,
    /// no payload, UDP without a checksum.
    fn of(packet: &[u8]) -> Option<Self> {
        let (protocol, transport_at) = match packet.first()? {
            0x45 => {
                let whole = packet.get(2..4)? == u16::try_from(packet.len()).ok()?.to_be_bytes();
                let fragment = *packet.get(6)? & 0x3f != 0 || *packet.get(7)? != 0;
                (whole && !fragment).then_some((*packet.get(9)?, 20))?
            }
            first if first >> 4 == 6 => {
                let len = u16::try_from(packet.len().checked_sub(40)?).ok()?;
                (packet.get(4..6)? == len.to_be_bytes()).then_some((*packet.get(6)?, 40))?
            }
            _ => return None,
        };
        let transport = packet.get(transport_at..)?;
        let header_len = match protocol {
            TCP => {
                let header_len = usize::from(transport.get(12)? >> 4) * 4;
                let flags = transport.get(13)? & !TCP_PSH;
                (header_len >= 20 && flags == TCP_ACK).then_some(header_len)?
            }
            UDP => {
                let len = u16::try_from(transport.len()).ok()?;
                let checked = transport.get(6..8)? != [0, 0];
                (checked && transport.get(4..6)? == len.to_be_bytes()).then_some(8)?
            }
            _ => return None,
        };
        let payload_at = transport_at + header_len;
        (payload_at < packet.len()).then_some(Self { protocol, transport_at, payload_at })
    }

    fn is_ipv6(self) -> bool {
        self.transport_at == 40
    }

    /// Addresses and ports are equal.
    fn same_flow(self, a: &[u8], b: &[u8]) -> bool {
        let (ip, ports) = self.flow_ranges();
        a[ip.clone()] == b[ip] && a[ports.clone()] == b[ports]
    }

    fn flow_ranges(self) -> (Range<usize>, Range<usize>) {
        let ip = if self.is_ipv6() { 8..40 } else { 12..20 };
        (ip, self.transport_at..self.transport_at + 4)
    }

    /// Everything but length, identification, sequence, PSH and checksums is equal.
    fn same_headers(self, a: &[u8], b: &[u8]) -> bool {
        let at = self.transport_at;
        let ip_equal = if self.is_ipv6() {
            a[0..4] == b[0..4] && a[7] == b[7]
        } else {
            a[0..2] == b[0..2] && a[6..9] == b[6..9]
        };
        let transport_equal = self.protocol == UDP
            || (a[at + 8..at + 13] == b[at + 8..at + 13]
                && (a[at + 13] | TCP_PSH) == (b[at + 13] | TCP_PSH)
                && a[at + 14..at + 16] == b[at + 14..at + 16]
                && a[at + 18..self.payload_at] == b[at + 18..self.payload_at]);
        ip_equal && transport_equal
    }

    fn sequence(self, packet: &[u8]) -> u32 {
        let at = self.transport_at + 4;
        packet.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
    }

    fn pushes(self, packet: &[u8]) -> bool {
        self.protocol == TCP && packet[self.transport_at + 13] & TCP_PSH != 0
    }
}

struct Group {
    /// `None`: this packet passes alone.
    headers: Option<Headers>,
    packets: Vec<Located>,
    /// Payload of each packet but the last.
    segment: usize,
    payload: usize,
    next_sequence: u32,
    /// Ended by a shorter segment or a PSH.
    closed: bool,
    pushes: bool,
}

/// Packets of one receive batch on their way to the TUN.
pub(super) struct Coalescer {
    groups: Vec<Group>,
    udp: bool,
}

impl Coalescer {
    /// `udp`: the kernel takes UDP trains.
    pub(super) fn new(udp: bool) -> Self {
        Self { groups: Vec::new(), udp }
    }

    /// Adds an opened packet; `buffer` gives the bytes of a train.
    pub(super) fn push<'a>(&mut self, located: Located, buffer: impl Fn(usize) -> &'a [u8]) {
        let Some(packet) = buffer(located.train).get(located.range.clone()) else { return };
        let headers = Headers::of(packet).filter(|headers| self.udp || headers.protocol == TCP);
        if let Some(headers) = headers {
            let flow = self.groups.iter_mut().rev().take(MAX_LOOK_BACK).find(|group| {
                group.headers == Some(headers) && headers.same_flow(group.first(&buffer), packet)
            });
            if let Some(group) = flow
                && group.joins(headers, group.first(&buffer), packet)
            {
                group.append(headers, located, packet);
                return;
            }
        }
        self.groups.push(Group::new(headers, located, packet));
    }

    /// Writes everything and empties itself; a packet that the kernel refuses is dropped and counted.
    pub(super) fn write<'a>(&mut self, tun: &Tun, buffer: impl Fn(usize) -> &'a [u8]) -> u64 {
        let mut refused = 0;
        for group in self.groups.drain(..) {
            match group.write(tun, &buffer) {
                Ok(()) => {}
                // The kernel takes no such train: single packets then, and from now on.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && group.packets.len() > 1 => {
                    self.udp &= group.headers.is_none_or(|headers| headers.protocol != UDP);
                    for located in &group.packets {
                        let packet = buffer(located.train).get(located.range.clone());
                        refused += u64::from(packet.is_none_or(|packet| write_one(tun, packet).is_err()));
                    }
                }
                Err(_) => refused += group.packets.len() as u64,
            }
        }
        refused
    }
}

impl Group {
    fn new(headers: Option<Headers>, located: Located, packet: &[u8]) -> Self {
        let payload = headers.map_or(0, |headers| packet.len() - headers.payload_at);
        let pushes = headers.is_some_and(|headers| headers.pushes(packet));
        Self {
            headers,
            packets: vec![located],
            segment: payload,
            payload,
            next_sequence: headers.map_or(0, |h| h.sequence(packet)).wrapping_add(to_u32(payload)),
            closed: pushes,
            pushes,
        }
    }

    fn first<'a>(&self, buffer: &impl Fn(usize) -> &'a [u8]) -> &'a [u8] {
        let Located { train, range } = &self.packets[0];
        &buffer(*train)[range.clone()]
    }

    fn joins(&self, headers: Headers, first: &[u8], packet: &[u8]) -> bool {
        let len = packet.len() - headers.payload_at;
        !self.closed
            && len <= self.segment
            && self.packets.len() < MAX_PIECES
            && headers.payload_at + self.payload + len <= MAX_PACKET
            && (headers.protocol == UDP || headers.sequence(packet) == self.next_sequence)
            && headers.same_headers(first, packet)
    }

    fn append(&mut self, headers: Headers, located: Located, packet: &[u8]) {
        let len = packet.len() - headers.payload_at;
        self.pushes |= headers.pushes(packet);
        self.closed = len < self.segment || self.pushes;
        self.payload += len;
        self.next_sequence = self.next_sequence.wrapping_add(to_u32(len));
        self.packets.push(located);
    }

    fn write<'a>(&self, tun: &Tun, buffer: &impl Fn(usize) -> &'a [u8]) -> io::Result<()> {
        let first = self.first(buffer);
        let Some(headers) = self.headers.filter(|_| self.packets.len() > 1) else {
            return write_one(tun, first);
        };
        let mut room = [0; VIRTIO_NET_HEADER_LEN + MAX_HEADERS];
        let used = self.write_headers(headers, first, &mut room);
        let mut pieces = [IoSlice::new(&[]); MAX_PIECES + 1];
        pieces[0] = IoSlice::new(&room[..used]);
        for (piece, located) in pieces[1..].iter_mut().zip(&self.packets) {
            *piece = IoSlice::new(&buffer(located.train)[located.range.clone()][headers.payload_at..]);
        }
        tun.write(&pieces[..=self.packets.len()])
    }

    /// The virtio header and the headers of the joined packet; returns their length.
    fn write_headers(&self, headers: Headers, first: &[u8], room: &mut [u8]) -> usize {
        let Headers { protocol, transport_at, payload_at } = headers;
        let (gso_type, checksum_offset) = match (protocol, headers.is_ipv6()) {
            (UDP, _) => (VirtioNetHeader::GSO_UDP_L4, 6),
            (_, true) => (VirtioNetHeader::GSO_TCP6, 16),
            (_, false) => (VirtioNetHeader::GSO_TCP4, 16),
        };
        let virtio = VirtioNetHeader {
            flags: VirtioNetHeader::NEEDS_CHECKSUM,
            gso_type,
            header_len: to_u16(payload_at),
            gso_size: to_u16(self.segment),
            checksum_start: to_u16(transport_at),
            checksum_offset,
        };
        let (virtio_room, out) = room.split_at_mut(VIRTIO_NET_HEADER_LEN);
        virtio_room.copy_from_slice(&virtio.to_bytes());
        out[..payload_at].copy_from_slice(&first[..payload_at]);
        let transport_len = payload_at - transport_at + self.payload;
        if headers.is_ipv6() {
            out[4..6].copy_from_slice(&to_u16(transport_len).to_be_bytes());
        } else {
            out[2..4].copy_from_slice(&to_u16(transport_at + transport_len).to_be_bytes());
            out[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(&out[..20]));
            out[10..12].copy_from_slice(&sum);
        }
        if protocol == UDP {
            out[transport_at + 4..transport_at + 6].copy_from_slice(&to_u16(transport_len).to_be_bytes());
        } else if self.pushes {
            out[transport_at + 13] |= TCP_PSH;
        }
        let (addresses, _) = headers.flow_ranges();
        let pseudo = checksum::pseudo_header(&out[addresses], protocol, transport_len);
        let at = transport_at + usize::from(checksum_offset);
        out[at..at + 2].copy_from_slice(&checksum::fold(pseudo));
        VIRTIO_NET_HEADER_LEN + payload_at
    }
}

fn write_one(tun: &Tun, packet: &[u8]) -> io::Result<()> {
    let header = VirtioNetHeader { flags: VirtioNetHeader::DATA_VALID, ..VirtioNetHeader::default() };
    tun.write(&[IoSlice::new(&header.to_bytes()), IoSlice::new(packet)])
}

/// Lengths inside one packet fit 16 bits.
fn to_u16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

fn to_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::segment::Superpacket;
    use super::super::segment::tests::packet;
    use super::*;

    fn groups_of(packets: &[Vec<u8>]) -> Vec<usize> {
        let mut coalescer = Coalescer::new(true);
        for (train, packet) in packets.iter().enumerate() {
            coalescer.push(Located { train, range: 0..packet.len() }, |train| packets[train].as_slice());
        }
        coalescer.groups.iter().map(|group| group.packets.len()).collect()
    }

    #[test]
    fn joining_undoes_segmentation() {
        let payload: Vec<u8> = (0..4500u32).map(|i| i.to_be_bytes()[3]).collect();
        for (ipv6, protocol) in [(false, TCP), (true, TCP), (false, UDP), (true, UDP)] {
            let parts: Vec<Vec<u8>> = payload
                .chunks(1000)
                .enumerate()
                .map(|(i, chunk)| packet(ipv6, protocol, 7 + 1000 * to_u32(i), chunk))
                .collect();
            let mut coalescer = Coalescer::new(true);
            for (train, part) in parts.iter().enumerate() {
                coalescer.push(Located { train, range: 0..part.len() }, |train| parts[train].as_slice());
            }
            assert_eq!(coalescer.groups.len(), 1);
            let group = &coalescer.groups[0];
            let mut room = [0; VIRTIO_NET_HEADER_LEN + MAX_HEADERS];
            let headers = group.headers.unwrap();
            let used = group.write_headers(headers, &parts[0], &mut room);
            let header = VirtioNetHeader::read(room[..VIRTIO_NET_HEADER_LEN].try_into().unwrap());
            let mut joined = room[VIRTIO_NET_HEADER_LEN..used].to_vec();
            joined.extend_from_slice(&payload);
            let superpacket = Superpacket::new(header, &mut joined).unwrap();
            assert_eq!(superpacket.count(), parts.len());
            for (index, part) in parts.iter().enumerate() {
                let mut out = vec![0; superpacket.len(index)];
                superpacket.write(index, &mut out);
                // IPv4 identification and header checksum are the sender's business.
                assert_eq!(out[headers.transport_at..], part[headers.transport_at..]);
                assert_eq!(out[8..10], part[8..10]);
            }
        }
    }

    #[test]
    fn gaps_other_acknowledgements_and_pushes_end_a_group() {
        let part = |sequence, len| packet(false, TCP, sequence, &vec![1; len]);
        assert_eq!(groups_of(&[part(0, 100), part(100, 100), part(300, 100)]), [2, 1]);
        assert_eq!(groups_of(&[part(0, 100), part(100, 50), part(150, 100)]), [2, 1]);
        assert_eq!(groups_of(&[part(0, 100), part(100, 101)]), [1, 1]);
        let mut push = part(0, 100);
        push[33] |= TCP_PSH;
        assert_eq!(groups_of(&[push, part(100, 100)]), [1, 1]);
        let mut acknowledges = part(100, 100);
        acknowledges[31] ^= 1;
        assert_eq!(groups_of(&[part(0, 100), acknowledges]), [1, 1]);
    }

    #[test]
    fn interleaved_flows_stay_in_order_each() {
        let tcp = |sequence| packet(false, TCP, sequence, &[1; 100]);
        let udp = |len| packet(true, UDP, 0, &vec![2; len]);
        assert_eq!(groups_of(&[tcp(0), udp(50), tcp(100), udp(50), udp(60), tcp(200)]), [3, 2, 1]);
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(
            packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..150), 0..6),
            version in prop_oneof![Just(0x45u8), Just(0x60u8)],
        ) {
            let mut packets = packets;
            for packet in &mut packets {
                let len = to_u16(packet.len());
                if let Some(first) = packet.first_mut() { *first = version; }
                if version == 0x45 && packet.len() >= 4 {
                    packet[2..4].copy_from_slice(&len.to_be_bytes());
                } else if packet.len() >= 40 {
                    packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                    packet[6] = if packet[6] < 128 { TCP } else { UDP };
                }
            }
            let total: usize = groups_of(&packets).iter().sum();
            prop_assert_eq!(total, packets.len());
        }
    }
}
