//! The way in: a batch of datagrams, open in place, replay window, source check, join, few writes to the TUN. One thread
//! per address family runs it to completion.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use weft_model::WgPublicKey;

use super::allowed_ips::addresses;
use super::coalesce::{Coalescer, Located};
use super::device::{Device, PeerEntry, RECEIVE_TIMEOUT, Table};
use super::macs::Admission;
use super::message::{DATA_HEADER_LEN, Message, RESPONSE_LEN, TAG_LEN, parse, u32_at};
use super::noise::read_initiation;
use super::peer::{Now, slot_of};
use super::session::Session;
use crate::kernel::udp::{ReceiveBatch, ReceivedTrain};

/// After an error of the socket (it does not last: out of memory, a lost ICMP error).
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

/// Ends when it is asked to, with nothing taken that was not passed on.
pub(super) fn run(device: &Device, ipv6: bool) -> io::Result<()> {
    let mut batch = ReceiveBatch::default();
    let mut coalescer = Coalescer::new(device.tun.udp_segmentation);
    let mut opened = Vec::new();
    while !device.stop.is_asked() {
        let sockets = device.sockets();
        let Some(socket) =
            sockets.as_ref().and_then(|sockets| if ipv6 { sockets.v6.as_ref() } else { sockets.v4.as_ref() })
        else {
            device.stop.sleep(RECEIVE_TIMEOUT / 4);
            continue;
        };
        match socket.receive(&mut batch) {
            Ok(0) => continue,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, ipv6, "receive failed");
                std::thread::sleep(PAUSE_AFTER_ERROR);
                continue;
            }
        }
        let (now, table) = (Now::read(), device.table());
        for train in batch.trains() {
            Opening { device, table: &table, now, from: train.from, opened: &mut opened }.train(train);
        }
        for located in opened.drain(..) {
            coalescer.push(located, |train| batch.bytes(train));
        }
        coalescer.write(&device.tun, |train| batch.bytes(train));
    }
    Ok(())
}

/// Datagrams of one session, one after another.
struct Run {
    peer: Arc<PeerEntry>,
    session: Arc<Session>,
    /// Counter and place; first of the datagram, once it is opened of the packet with its padding.
    packets: Vec<(u64, Range<usize>)>,
}

/// One train on its way through the sessions.
struct Opening<'a> {
    device: &'a Device,
    table: &'a Table,
    now: Now,
    from: SocketAddr,
    opened: &'a mut Vec<Located>,
}

impl Opening<'_> {
    fn train(&mut self, train: ReceivedTrain<'_>) {
        let ReceivedTrain { index, bytes, segment, .. } = train;
        let mut run: Option<Run> = None;
        let mut start = 0;
        while start < bytes.len() {
            let end = (start + segment).min(bytes.len());
            if let Some(Message::Data { receiver, counter }) = parse(&bytes[start..end]) {
                if run.as_ref().is_none_or(|run| run.session.local_index != receiver) {
                    self.finish(run.take(), index, bytes);
                    run = self.begin(receiver);
                }
                if let Some(run) = &mut run {
                    run.packets.push((counter, start..end));
                }
            } else {
                handshake(self.device, self.table, &bytes[start..end], self.from, self.now);
            }
            start = end;
        }
        self.finish(run, index, bytes);
    }

    fn begin(&self, receiver: u32) -> Option<Run> {
        let peer = self.table.peer(slot_of(receiver))?.clone();
        let session = peer.lock().session(receiver, self.now.monotonic)?;
        Some(Run { peer, session, packets: Vec::new() })
    }

    /// Opens, marks what was authentic, tells the peer, and passes on the packets whose source the peer may use.
    fn finish(&mut self, run: Option<Run>, index: usize, bytes: &mut [u8]) {
        let Some(Run { peer, session, mut packets }) = run else { return };
        session.open(&mut packets, bytes);
        let received =
            packets.iter().map(|(_, place)| (DATA_HEADER_LEN + place.len() + TAG_LEN) as u64).sum();
        let mut fresh = Vec::with_capacity(packets.len());
        session.accept(packets.iter().map(|(counter, _)| *counter), |is_fresh| fresh.push(is_fresh));
        let mut verdicts = fresh.into_iter();
        packets.retain(|_| verdicts.next() == Some(true));
        if packets.is_empty() {
            return;
        }
        let data = packets.iter().any(|(_, range)| !range.is_empty());
        self.device.with_peer(&peer, |state, out| {
            state.note_received(&session, received, data, self.from, self.now, out);
        });
        for (_, range) in packets {
            let Some((source, _, len)) = addresses(&bytes[range.clone()]) else { continue };
            if self.table.allowed.lookup(source) == Some(peer.slot) {
                self.opened.push(Located { train: index, range: range.start..range.start + len });
            }
        }
    }
}

/// Initiations, responses and cookie replies; anything else is ignored.
fn handshake(device: &Device, table: &Table, datagram: &[u8], from: SocketAddr, now: Now) {
    match parse(datagram) {
        Some(Message::Initiation(message)) => {
            let Some(called) = admitted(device, datagram, from, now) else { return };
            let identities = device.identities();
            let Some(identity) = identities.owner(&called, now.monotonic) else { return };
            let Ok(initiation) = read_initiation(identity, message) else { return };
            if let Some(entry) = table.peer_by_key(&initiation.remote) {
                device.with_peer(entry, |peer, out| peer.consume_initiation(initiation, from, now, out));
            }
        }
        Some(Message::Response(message)) if admitted(device, datagram, from, now).is_some() => {
            respond(device, table, message, from, now);
        }
        Some(Message::CookieReply(message)) => {
            if let Some(entry) = u32_at(message, 4).and_then(|index| table.peer(slot_of(index))) {
                entry.lock().consume_cookie(message, now.monotonic);
            }
        }
        _ => {}
    }
}

fn respond(device: &Device, table: &Table, message: &[u8; RESPONSE_LEN], from: SocketAddr, now: Now) {
    if let Some(entry) = u32_at(message, 8).and_then(|index| table.peer(slot_of(index))) {
        device.with_peer(entry, |peer, out| peer.consume_response(message, from, now, out));
    }
}

/// The key of ours that the message is meant for.
fn admitted(device: &Device, message: &[u8], from: SocketAddr, now: Now) -> Option<WgPublicKey> {
    let mut admissions = device.admissions.lock().unwrap_or_else(PoisonError::into_inner);
    let admission = admissions.judge(message, from, now.monotonic);
    drop(admissions);
    match admission {
        Admission::Process(key) => Some(key),
        Admission::Reply(reply) => {
            device.send(from, &reply, reply.len());
            None
        }
        Admission::Drop => None,
    }
}
