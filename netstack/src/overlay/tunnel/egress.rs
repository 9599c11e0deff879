//! The way out: TUN, allowed IPs, split, seal, one send per train. One thread runs it to completion.

use std::io;
use std::sync::Arc;

use super::allowed_ips::addresses;
use super::device::{Device, PeerEntry};
use super::message::{DATA_HEADER_LEN, TAG_LEN};
use super::peer::Now;
use super::segment::Superpacket;
use crate::kernel::tun::{VIRTIO_NET_HEADER_LEN, VirtioNetHeader};
use crate::kernel::udp::{MAX_SEGMENTS, MAX_TRAIN_BYTES};

const READ_BUFFER_LEN: usize = VIRTIO_NET_HEADER_LEN + 65_536;

/// Ends when it is asked to, with nothing taken that was not sent, and when the device fails, for example because it was
/// deleted.
pub(super) fn run(device: &Device) -> io::Result<()> {
    let mut buffer = vec![0; READ_BUFFER_LEN];
    let mut train = Train::default();
    while !device.stop.is_asked() {
        match device.tun.read(&mut buffer)? {
            Some(len) => forward(device, &mut buffer[..len], &mut train),
            None => {
                train.leave(device);
                device.tun.wait_readable(&device.stop)?;
            }
        }
    }
    train.leave(device);
    Ok(())
}

/// Packets without a peer end here: who sends them got an unreachable route before, if the routes are ours.
fn forward(device: &Device, bytes: &mut [u8], train: &mut Train) {
    let Some((header, packet)) = bytes.split_first_chunk_mut::<VIRTIO_NET_HEADER_LEN>() else { return };
    let header = VirtioNetHeader::read(header);
    let table = device.table();
    let Some((_, destination, _)) = addresses(packet) else { return };
    let Some(peer) = table.allowed.lookup(destination).and_then(|slot| table.peer(slot)) else { return };
    let Some(superpacket) = Superpacket::new(header, packet) else { return };
    for index in 0..superpacket.count() {
        let len = superpacket.len(index);
        let datagram_len = DATA_HEADER_LEN + padded(len, table.mtu_bytes) + TAG_LEN;
        if !train.takes(peer, datagram_len) {
            train.leave(device);
        }
        superpacket.write(index, train.board(peer, datagram_len, len));
    }
}

/// To a multiple of 16, but not beyond the MTU (whitepaper, section 5.4.6).
fn padded(len: usize, mtu_bytes: usize) -> usize {
    len.next_multiple_of(16).min(mtu_bytes.max(len))
}

/// Datagrams for one peer, one after another, each with room for header and tag; all equally long but the last.
#[derive(Default)]
struct Train {
    peer: Option<Arc<PeerEntry>>,
    bytes: Vec<u8>,
    segment: usize,
    /// Lengths of the packets without padding.
    lens: Vec<usize>,
    closed: bool,
}

impl Train {
    fn takes(&self, peer: &Arc<PeerEntry>, datagram_len: usize) -> bool {
        let Some(current) = &self.peer else { return true };
        Arc::ptr_eq(current, peer)
            && !self.closed
            && datagram_len <= self.segment
            && self.lens.len() < MAX_SEGMENTS
            && self.bytes.len() + datagram_len <= MAX_TRAIN_BYTES
    }

    /// Room for a packet of `len` bytes in a new datagram.
    fn board(&mut self, peer: &Arc<PeerEntry>, datagram_len: usize, len: usize) -> &mut [u8] {
        if self.peer.is_none() {
            self.peer = Some(peer.clone());
            self.segment = datagram_len;
        }
        self.closed = datagram_len < self.segment;
        self.lens.push(len);
        let start = self.bytes.len();
        self.bytes.resize(start + datagram_len, 0);
        &mut self.bytes[start + DATA_HEADER_LEN..start + DATA_HEADER_LEN + len]
    }

    /// Seals and sends what has boarded, or leaves it with the peer until there is a session.
    fn leave(&mut self, device: &Device) {
        let Some(peer) = self.peer.take() else { return };
        let now = Now::read();
        let reservation = device.with_peer(&peer, |state, out| {
            let reservation = state.reserve(self.lens.len() as u64, true, now, out);
            if reservation.is_some() {
                state.sent_bytes += self.bytes.len() as u64;
            } else {
                for (datagram, len) in self.bytes.chunks(self.segment).zip(&self.lens) {
                    state.enqueue(datagram[DATA_HEADER_LEN..DATA_HEADER_LEN + len].to_vec(), now, out);
                }
            }
            reservation
        });
        if let Some(reservation) = reservation {
            reservation.session.seal(reservation.first, self.bytes.chunks_mut(self.segment));
            device.send(reservation.endpoint, &self.bytes, self.segment);
        }
        self.bytes.clear();
        self.lens.clear();
        self.closed = false;
    }
}
