//! From what the TUN gives (a superpacket of up to 64 KiB) to the packets that fit the tunnel, with checksums.
//!
//! Segments are written straight to where they will be sealed. Sources: virtio 1.2, section 5.1.6.2; RFC 9293; the
//! IPv4 identification grows by one per segment, as Linux does it.

use crate::kernel::tun::VirtioNetHeader;

use super::checksum;

const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_FIN_PSH: u8 = 0x09;

/// A packet as the TUN gave it, checked: every offset lies inside.
#[derive(Debug)]
pub(super) struct Superpacket<'a> {
    packet: &'a [u8],
    shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Whole,
    Train { protocol: u8, transport_at: usize, payload_at: usize, payload_len: usize },
}

impl<'a> Superpacket<'a> {
    /// Checks the header against the packet and completes a whole packet's checksum. `None` when they do not agree.
    pub(super) fn new(header: VirtioNetHeader, packet: &'a mut [u8]) -> Option<Self> {
        let transport_at = usize::from(header.checksum_start);
        if header.gso_type == VirtioNetHeader::GSO_NONE {
            if header.flags & VirtioNetHeader::NEEDS_CHECKSUM != 0 {
                complete_checksum(packet, transport_at, usize::from(header.checksum_offset))?;
            }
            return Some(Self { packet, shape: Shape::Whole });
        }
        let (protocol, header_len) = match header.gso_type {
            VirtioNetHeader::GSO_TCP4 | VirtioNetHeader::GSO_TCP6 => {
                (TCP, usize::from(packet.get(transport_at + 12)? >> 4) * 4)
            }
            VirtioNetHeader::GSO_UDP_L4 => (UDP, 8),
            _ => return None,
        };
        let payload_at = transport_at + header_len;
        let payload_len = usize::from(header.gso_size);
        let least_ip = if packet.first()? >> 4 == 4 { 20 } else { 40 };
        let least_transport = if protocol == TCP { 20 } else { 8 };
        let fits = transport_at >= least_ip && header_len >= least_transport && payload_at <= packet.len();
        (fits && payload_len > 0).then_some(Self {
            packet,
            shape: Shape::Train { protocol, transport_at, payload_at, payload_len },
        })
    }

    /// How many packets it makes; at least one.
    pub(super) fn count(&self) -> usize {
        match self.shape {
            Shape::Whole => 1,
            Shape::Train { payload_at, payload_len, .. } => {
                (self.packet.len() - payload_at).div_ceil(payload_len).max(1)
            }
        }
    }

    /// Length of packet `index`; all but the last are equally long.
    pub(super) fn len(&self, index: usize) -> usize {
        match self.shape {
            Shape::Whole => self.packet.len(),
            Shape::Train { payload_at, payload_len, .. } => {
                let payload = self.packet.len() - payload_at;
                payload_at + payload.saturating_sub(index * payload_len).min(payload_len)
            }
        }
    }

    /// Writes packet `index` into `out`, which is [`Superpacket::len`] long.
    pub(super) fn write(&self, index: usize, out: &mut [u8]) {
        let Shape::Train { protocol, transport_at, payload_at, payload_len } = self.shape else {
            out.copy_from_slice(self.packet);
            return;
        };
        let from = payload_at + index * payload_len;
        let (headers, payload) = out.split_at_mut(payload_at);
        headers.copy_from_slice(&self.packet[..payload_at]);
        payload.copy_from_slice(&self.packet[from..from + payload.len()]);
        let transport_len = out.len() - transport_at;
        let pseudo = write_ip_header(out, index, transport_at, protocol);
        let checksum_at = if protocol == TCP {
            let offset = u32::try_from(index * payload_len).unwrap_or(u32::MAX);
            write_tcp_header(&mut out[transport_at..], offset, index + 1 == self.count());
            transport_at + 16
        } else {
            let len = u16::try_from(transport_len).unwrap_or(u16::MAX);
            out[transport_at + 4..transport_at + 6].copy_from_slice(&len.to_be_bytes());
            transport_at + 6
        };
        out[checksum_at..checksum_at + 2].fill(0);
        let mut sum = checksum::finish(pseudo + checksum::sum(&out[transport_at..]));
        if protocol == UDP && sum == [0, 0] {
            sum = [0xff, 0xff];
        }
        out[checksum_at..checksum_at + 2].copy_from_slice(&sum);
    }
}

/// Sets length, identification and header checksum; returns the sum of the transport's pseudo header.
fn write_ip_header(packet: &mut [u8], index: usize, transport_at: usize, protocol: u8) -> u64 {
    let len = packet.len();
    if packet[0] >> 4 == 4 {
        packet[2..4].copy_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
        let step = u16::try_from(index).unwrap_or(u16::MAX);
        let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(step);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&packet[..transport_at]));
        packet[10..12].copy_from_slice(&sum);
        checksum::pseudo_header(&packet[12..20], protocol, len - transport_at)
    } else {
        packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap_or(u16::MAX).to_be_bytes());
        checksum::pseudo_header(&packet[8..40], protocol, len - transport_at)
    }
}

fn write_tcp_header(tcp: &mut [u8], offset: u32, last: bool) {
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(offset);
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    if !last {
        tcp[13] &= !TCP_FIN_PSH;
    }
}

/// The checksum field already holds the sum of the pseudo header.
fn complete_checksum(packet: &mut [u8], start: usize, offset: usize) -> Option<()> {
    packet.get(start + offset..start + offset + 2)?;
    let mut sum = checksum::finish(checksum::sum(packet.get(start..)?));
    if sum == [0, 0] {
        // Zero would mean "no checksum" to UDP and is the same number to TCP.
        sum = [0xff, 0xff];
    }
    packet[start + offset..start + offset + 2].copy_from_slice(&sum);
    Some(())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A TCP or UDP packet with the given payload and right checksums.
    pub(in crate::overlay::tunnel) fn packet(
        ipv6: bool,
        protocol: u8,
        sequence: u32,
        payload: &[u8],
    ) -> Vec<u8> {
        let transport_len = if protocol == TCP { 32 } else { 8 };
        let ip_len = if ipv6 { 40 } else { 20 };
        let mut packet = vec![0; ip_len + transport_len];
        packet.extend_from_slice(payload);
        let len = u16::try_from(packet.len()).unwrap();
        if ipv6 {
            packet[0] = 0x60;
            packet[6] = protocol;
            packet[7] = 64;
            packet[8..24].copy_from_slice(&[1; 16]);
            packet[24..40].copy_from_slice(&[2; 16]);
        } else {
            packet[0] = 0x45;
            packet[6] = 0x40;
            packet[8] = 64;
            packet[9] = protocol;
            packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let transport = &mut packet[ip_len..];
        transport[0..4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
        if protocol == TCP {
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            transport[12] = 0x80;
            transport[13] = 0x10;
            transport[20..32].copy_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            transport[4..6].copy_from_slice(&(len - u16::try_from(ip_len).unwrap()).to_be_bytes());
        }
        let pseudo = write_ip_header(&mut packet, 0, ip_len, protocol);
        let at = ip_len + if protocol == TCP { 16 } else { 6 };
        packet[at..at + 2].fill(0);
        let sum = checksum::finish(pseudo + checksum::sum(&packet[ip_len..]));
        packet[at..at + 2].copy_from_slice(&sum);
        packet
    }

    fn train_header(ipv6: bool, protocol: u8, size: u16) -> VirtioNetHeader {
        let gso_type = match (protocol, ipv6) {
            (UDP, _) => VirtioNetHeader::GSO_UDP_L4,
            (_, true) => VirtioNetHeader::GSO_TCP6,
            _ => VirtioNetHeader::GSO_TCP4,
        };
        let checksum_start = if ipv6 { 40 } else { 20 };
        VirtioNetHeader { flags: 1, gso_type, gso_size: size, checksum_start, ..VirtioNetHeader::default() }
    }

    #[test]
    fn a_superpacket_becomes_the_packets_it_stands_for() {
        let payload: Vec<u8> = (0..3000u32).map(|i| i.to_be_bytes()[3]).collect();
        for (ipv6, protocol) in [(false, TCP), (true, TCP), (false, UDP), (true, UDP)] {
            let mut big = packet(ipv6, protocol, 1000, &payload);
            let superpacket = Superpacket::new(train_header(ipv6, protocol, 1200), &mut big).unwrap();
            assert_eq!(superpacket.count(), 3);
            for (index, chunk) in payload.chunks(1200).enumerate() {
                let mut out = vec![0; superpacket.len(index)];
                superpacket.write(index, &mut out);
                let mut expected = packet(ipv6, protocol, 1000 + 1200 * u32::try_from(index).unwrap(), chunk);
                if !ipv6 {
                    // The identification counts up, and the header checksum with it.
                    expected[4..6].copy_from_slice(&u16::try_from(index).unwrap().to_be_bytes());
                    expected[10..12].fill(0);
                    let sum = checksum::finish(checksum::sum(&expected[..20]));
                    expected[10..12].copy_from_slice(&sum);
                }
                assert_eq!(out, expected, "ipv6 {ipv6}, protocol {protocol}, segment {index}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_header_and_packet_make_it_panic(
            flags in 0u8..4, gso_type in 0u8..7, gso_size in any::<u16>(),
            checksum_start in 0u16..300, checksum_offset in 0u16..300,
            mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let header =
                VirtioNetHeader { flags, gso_type, header_len: 0, gso_size, checksum_start, checksum_offset };
            if let Some(superpacket) = Superpacket::new(header, &mut bytes) {
                for index in 0..superpacket.count() {
                    let mut out = vec![0; superpacket.len(index)];
                    superpacket.write(index, &mut out);
                }
            }
        }
    }
}
