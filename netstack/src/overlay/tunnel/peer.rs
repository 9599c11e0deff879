//! The state machine of one peer: handshakes, sessions and timers, without IO.
//!
//! ```text
//!  reserve, enqueue (a packet wants out) --+             +--> datagrams to send to `endpoint`
//!  consume_* (a datagram came in) ---------+--> Peer ----+--> sessions that seal and open
//!  tick (time passed) ---------------------+             +--> next_wake
//! ```
//!
//! Source: WireGuard whitepaper, sections 5 and 6; where the paper is silent (counting attempts anew with traffic,
//! keepalives that pile up) the behaviour follows Linux.

mod handover;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snow::HandshakeState;
use weft_model::WgPublicKey;

use super::macs::{self, COOKIE_LIFETIME, Cookie};
use super::message::{COOKIE_REPLY_LEN, DATA_HEADER_LEN, RESPONSE_LEN, TAG_LEN, u32_at};
use super::noise::{self, Identity, Initiation, Timestamp, TransportKeys};
use super::session::{REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, Session};

pub(super) use self::handover::PeerState;

pub(super) const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
pub(super) const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
pub(super) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Without an answer for this long an initiation goes to every endpoint of the peer.
const SPREAD_AFTER: Duration = Duration::from_secs(1);
/// Added to REKEY_TIMEOUT, so that two peers do not keep colliding.
const MAX_JITTER_MILLIS: u64 = 333;
/// One peer may start a handshake this often at most.
const MIN_INITIATION_GAP: Duration = Duration::from_millis(20);
/// Packets that wait for a handshake; the oldest go first.
const MAX_QUEUED: usize = 128;
/// Sessions kept to open what is still on its way.
const MAX_PREVIOUS: usize = 3;
/// Session indices of one peer: its slot in the upper 24 bits, a rolling number below.
const SLOT_SHIFT: u32 = 8;
pub(super) const MAX_SLOT: u32 = (1 << (32 - SLOT_SHIFT)) - 1;

/// Which peer a session index belongs to.
pub(super) fn slot_of(index: u32) -> u32 {
    index >> SLOT_SHIFT
}

/// The time as an argument: `wall` is the time since the epoch, only for the timestamp of initiations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) monotonic: Instant,
    pub(super) wall: Duration,
}

impl Now {
    pub(super) fn read() -> Self {
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { monotonic: Instant::now(), wall }
    }
}

/// Datagrams and where each goes, in order.
pub(super) type Outbox = Vec<(SocketAddr, Vec<u8>)>;

/// Leave to send: `count` counters from `first` of `session`.
pub(super) struct Reservation {
    pub(super) session: Arc<Session>,
    pub(super) first: u64,
    pub(super) endpoint: SocketAddr,
}

struct Attempt {
    identity: Arc<Identity>,
    state: HandshakeState,
    local_index: u32,
    mac1: [u8; 16],
    sent_at: Instant,
    /// Start of the whole attempt: traffic moves it.
    since: Instant,
    retry_at: Instant,
    /// What was sent to one endpoint, until it is sent to all.
    unspread: Option<Vec<u8>>,
}

impl Attempt {
    fn spread_at(&self) -> Option<Instant> {
        self.unspread.as_ref().map(|_| self.sent_at + SPREAD_AFTER)
    }
}

#[derive(Default)]
struct Timers {
    /// First data sent that nothing authentic has followed.
    unanswered_since: Option<Instant>,
    keepalive_at: Option<Instant>,
    another_keepalive: bool,
    persistent_at: Option<Instant>,
    /// When the identity to come is tried again.
    trial_at: Option<Instant>,
    /// When every key of the peer is forgotten.
    erase_at: Option<Instant>,
    /// The current session was already renewed because it is about to be rejected.
    last_minute_rekey: bool,
}

pub(super) struct Peer {
    /// Of ours, as the peer is known to accept it.
    identity: Arc<Identity>,
    /// Replaces `identity` as soon as the peer has answered to it.
    next_identity: Option<Arc<Identity>>,
    /// The key of ours that a completed handshake was made with.
    confirmed: Option<WgPublicKey>,
    pub(super) key: WgPublicKey,
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    slot: u32,
    next_index: u8,
    /// Where the peer is: whence it was heard last, or where it may be.
    endpoint: Option<SocketAddr>,
    /// Where it may be called, best first.
    candidates: Vec<SocketAddr>,
    keepalive: Option<Duration>,
    attempt: Option<Attempt>,
    /// What the peer may still send with, newest first. More than one, since two handshakes that cross leave the sides sending
    /// with different sessions.
    previous: VecDeque<Arc<Session>>,
    current: Option<Arc<Session>>,
    /// We answered; the initiator has not used it yet.
    next: Option<Arc<Session>>,
    greatest_timestamp: Timestamp,
    last_initiation_read: Option<Instant>,
    cookie: Option<(Cookie, Instant)>,
    queue: VecDeque<Vec<u8>>,
    timers: Timers,
    last_handshake: Option<Instant>,
    pub(super) received_bytes: u64,
    pub(super) sent_bytes: u64,
}

impl Peer {
    /// `slot` is at most [`MAX_SLOT`] and belongs to no other peer.
    pub(super) fn new(identity: Arc<Identity>, key: WgPublicKey, slot: u32) -> Self {
        Self {
            identity,
            next_identity: None,
            confirmed: None,
            key,
            mac1_key: macs::mac1_key(&key.0),
            cookie_key: macs::cookie_key(&key.0),
            slot,
            next_index: rand::random(),
            endpoint: None,
            candidates: Vec::new(),
            keepalive: None,
            attempt: None,
            previous: VecDeque::new(),
            current: None,
            next: None,
            greatest_timestamp: [0; 12],
            last_initiation_read: None,
            cookie: None,
            queue: VecDeque::new(),
            timers: Timers::default(),
            last_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
        }
    }

    /// The peer goes by another key from now on; its sessions stay.
    pub(super) fn set_key(&mut self, key: WgPublicKey) {
        if self.key != key {
            self.key = key;
            self.mac1_key = macs::mac1_key(&key.0);
            self.cookie_key = macs::cookie_key(&key.0);
            self.cookie = None;
        }
    }

    /// What we go by. With `next`, handshakes are tried with it, beside the sessions there are, until the peer answers to
    /// one: from then on it is used with this peer. A peer that has answered is not taken back to `current`.
    pub(super) fn set_identities(
        &mut self,
        current: &Arc<Identity>,
        next: Option<&Arc<Identity>>,
        now: Instant,
    ) {
        let adopted = next.is_some_and(|next| next.public == self.identity.public);
        let renewed = !adopted && self.identity.public != current.public;
        if renewed {
            self.identity = current.clone();
            self.attempt = None;
        }
        self.next_identity = next.filter(|_| !adopted).cloned();
        self.timers.trial_at = (self.next_identity.is_some() || renewed).then_some(now);
    }

    /// The key of ours that the peer accepted last.
    pub(super) fn confirmed(&self) -> Option<WgPublicKey> {
        self.confirmed
    }

    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint
    }

    pub(super) fn set_endpoint(&mut self, endpoint: Option<SocketAddr>) {
        if self.endpoint != endpoint {
            self.cookie = None;
        }
        self.endpoint = endpoint;
    }

    /// Where the peer may be called, best first. While it is heard, it stays where it is; what is better is called when the
    /// session is renewed, which is at once when the best is another than before.
    pub(super) fn set_candidates(&mut self, candidates: Vec<SocketAddr>, now: Now, out: &mut Outbox) {
        let before = std::mem::replace(&mut self.candidates, candidates).first().copied();
        let Some(best) = self.candidates.first().copied().filter(|best| before != Some(*best)) else {
            return;
        };
        if self.endpoint.is_none() || !self.is_connected(now.monotonic) {
            self.set_endpoint(Some(best));
        } else if before.is_some() {
            self.renew(now, out);
        }
    }

    /// Calls the peer although there is a session or a call on its way: this node, or the peer, may be elsewhere.
    pub(super) fn renew(&mut self, now: Now, out: &mut Outbox) {
        self.attempt.take_if(|attempt| attempt.sent_at < now.monotonic);
        self.start_handshake(now, out);
    }

    fn is_connected(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|session| !session.expired(now))
    }

    pub(super) fn set_keepalive(&mut self, interval: Option<Duration>, now: Instant) {
        self.keepalive = interval;
        self.timers.persistent_at = interval.map(|interval| now + interval);
    }

    pub(super) fn seconds_since_handshake(&self, now: Instant) -> Option<u64> {
        self.last_handshake.map(|at| now.saturating_duration_since(at).as_secs())
    }

    /// A session that may still open packets.
    pub(super) fn session(&self, index: u32, now: Instant) -> Option<Arc<Session>> {
        [&self.current, &self.next]
            .into_iter()
            .flatten()
            .chain(&self.previous)
            .find(|session| session.local_index == index && !session.expired(now))
            .cloned()
    }

    /// Leave to send `count` packets (`data`: at least one is not a keepalive). Without a usable session a handshake
    /// starts, and the packets belong into [`Peer::enqueue`].
    pub(super) fn reserve(
        &mut self,
        count: u64,
        data: bool,
        now: Now,
        out: &mut Outbox,
    ) -> Option<Reservation> {
        let endpoint = self.endpoint?;
        let usable = self.current.clone().filter(|session| !session.expired(now.monotonic));
        let Some((session, first)) =
            usable.and_then(|session| Some((session.clone(), session.reserve(count)?)))
        else {
            self.start_handshake(now, out);
            return None;
        };
        let aged = session.initiator && session.age(now.monotonic) >= REKEY_AFTER_TIME;
        if aged || first >= REKEY_AFTER_MESSAGES {
            self.start_handshake(now, out);
        }
        self.note_sent(data, now.monotonic);
        Some(Reservation { session, first, endpoint })
    }

    /// Keeps a packet until a session exists, and asks for one.
    pub(super) fn enqueue(&mut self, packet: Vec<u8>, now: Now, out: &mut Outbox) {
        if self.queue.len() >= MAX_QUEUED {
            self.queue.pop_front();
        }
        self.queue.push_back(packet);
        if let Some(attempt) = &mut self.attempt {
            attempt.since = now.monotonic;
        }
        self.start_handshake(now, out);
    }

    /// Sends an initiation, unless one is on its way.
    pub(super) fn start_handshake(&mut self, now: Now, out: &mut Outbox) {
        self.start_handshake_as(self.identity.clone(), now, out);
    }

    fn start_handshake_as(&mut self, identity: Arc<Identity>, now: Now, out: &mut Outbox) {
        let since = match &self.attempt {
            Some(attempt) if now.monotonic < attempt.sent_at + REKEY_TIMEOUT => return,
            Some(attempt) => attempt.since,
            None => now.monotonic,
        };
        // While a session carries what is sent, the best endpoint has the first word, so that a detour ends.
        let connected = self.is_connected(now.monotonic);
        let best = self.candidates.first().copied().filter(|_| connected);
        let Some(to) = best.or(self.endpoint) else { return };
        let local_index = self.take_index();
        let timestamp = noise::timestamp(now.wall);
        let Ok((state, mut message)) = noise::initiate(&identity, &self.key, &timestamp, local_index) else {
            return;
        };
        let mac1 = macs::stamp(&mut message, &self.mac1_key, self.fresh_cookie(now.monotonic).as_ref());
        let jitter = Duration::from_millis(rand::random_range(0..=MAX_JITTER_MILLIS));
        let retry_at = now.monotonic + REKEY_TIMEOUT + jitter;
        let sent_at = now.monotonic;
        let unspread = Some(message.to_vec());
        self.attempt =
            Some(Attempt { identity, state, local_index, mac1, sent_at, since, retry_at, unspread });
        self.note_traversal(now.monotonic);
        self.push_to(to, message.to_vec(), out);
    }

    /// The same initiation everywhere, best first: the peer answers the first copy that arrives, and there it is.
    fn spread(&mut self, out: &mut Outbox) {
        let Some(message) = self.attempt.as_mut().and_then(|attempt| attempt.unspread.take()) else { return };
        let elsewhere = self.endpoint.filter(|endpoint| !self.candidates.contains(endpoint));
        let everywhere: Vec<SocketAddr> = self.candidates.iter().copied().chain(elsewhere).collect();
        if everywhere.len() > 1 {
            for to in everywhere {
                self.push_to(to, message.clone(), out);
            }
        }
    }

    /// Answers an initiation of this peer that came from `from`; false when it is a replay or comes too often.
    pub(super) fn consume_initiation(
        &mut self,
        initiation: Initiation,
        from: SocketAddr,
        now: Now,
        out: &mut Outbox,
    ) -> bool {
        let too_soon = self
            .last_initiation_read
            .is_some_and(|at| now.monotonic.saturating_duration_since(at) < MIN_INITIATION_GAP);
        if too_soon || initiation.timestamp <= self.greatest_timestamp {
            return false;
        }
        let (timestamp, remote_index, local_index) =
            (initiation.timestamp, initiation.sender, self.take_index());
        let remote = initiation.remote;
        let Ok((mut message, keys)) = noise::respond(initiation, local_index) else {
            return false;
        };
        self.greatest_timestamp = timestamp;
        if remote != self.key {
            self.set_key(remote);
        }
        self.last_initiation_read = Some(now.monotonic);
        self.set_endpoint(Some(from));
        macs::stamp(&mut message, &self.mac1_key, self.fresh_cookie(now.monotonic).as_ref());
        self.next = Some(Arc::new(Session::new(local_index, remote_index, &keys, false, now.monotonic)));
        self.timers.erase_at = Some(now.monotonic + REJECT_AFTER_TIME * 3);
        self.note_traversal(now.monotonic);
        self.push(message.to_vec(), out);
        true
    }

    /// Completes our handshake; what waited goes out, or a keepalive that confirms the keys.
    pub(super) fn consume_response(
        &mut self,
        message: &[u8; RESPONSE_LEN],
        from: SocketAddr,
        now: Now,
        out: &mut Outbox,
    ) -> bool {
        let (Some(remote_index), Some(receiver)) = (u32_at(message, 4), u32_at(message, 8)) else {
            return false;
        };
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.local_index == receiver) else {
            return false;
        };
        let Ok(keys) = noise::read_response(&mut attempt.state, message) else {
            return false;
        };
        let identity = attempt.identity.clone();
        self.begin_as_initiator(receiver, remote_index, &keys, now.monotonic);
        self.confirm(identity);
        self.set_endpoint(Some(from));
        self.complete_handshake(now.monotonic);
        self.flush(now, out);
        true
    }

    /// Keeps the cookie for the next handshake message.
    pub(super) fn consume_cookie(&mut self, reply: &[u8; COOKIE_REPLY_LEN], now: Instant) -> bool {
        let Some(attempt) = &self.attempt else { return false };
        if u32_at(reply, 4) != Some(attempt.local_index) {
            return false;
        }
        let cookie = macs::open_cookie(reply, &self.cookie_key, &attempt.mac1);
        self.cookie = cookie.map(|cookie| (cookie, now));
        cookie.is_some()
    }

    /// Notes authenticated packets of `session`, `data` when one of them was not a keepalive.
    pub(super) fn note_received(
        &mut self,
        session: &Session,
        bytes: u64,
        data: bool,
        from: SocketAddr,
        now: Now,
        out: &mut Outbox,
    ) {
        self.received_bytes += bytes;
        if self.endpoint != Some(from) {
            self.set_endpoint(Some(from));
        }
        if self.next.as_ref().is_some_and(|next| next.local_index == session.local_index) {
            let replaced = std::mem::replace(&mut self.current, self.next.take());
            self.retire(replaced);
            self.complete_handshake(now.monotonic);
            if !self.queue.is_empty() {
                self.flush(now, out);
            }
        }
        self.timers.unanswered_since = None;
        self.note_traversal(now.monotonic);
        if data {
            self.arm_keepalive(now.monotonic);
        }
        self.rekey_before_rejection(session, now, out);
    }

    /// What has fallen due.
    pub(super) fn tick(&mut self, now: Now, out: &mut Outbox) {
        let due = |at: Option<Instant>| at.is_some_and(|at| now.monotonic >= at);
        if due(self.timers.erase_at) {
            self.erase();
        }
        self.retry_or_give_up(now, out);
        if due(self.attempt.as_ref().and_then(Attempt::spread_at)) {
            self.spread(out);
        }
        let silent_at = self.timers.unanswered_since.map(|since| since + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT);
        if due(silent_at) {
            self.timers.unanswered_since = None;
            self.start_handshake(now, out);
        }
        if due(self.timers.keepalive_at) {
            self.timers.keepalive_at = None;
            self.send_keepalive(now, out);
            if std::mem::take(&mut self.timers.another_keepalive) {
                self.timers.keepalive_at = Some(now.monotonic + KEEPALIVE_TIMEOUT);
            }
        }
        if due(self.timers.trial_at) {
            self.timers.trial_at = self.next_identity.is_some().then(|| now.monotonic + REKEY_TIMEOUT);
            let identity = self.next_identity.as_ref().unwrap_or(&self.identity).clone();
            self.start_handshake_as(identity, now, out);
        }
        if due(self.timers.persistent_at) {
            self.timers.persistent_at = self.keepalive.map(|interval| now.monotonic + interval);
            self.send_keepalive(now, out);
        }
    }

    /// When [`Peer::tick`] has something to do, unless anything else happens before.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let silent_at = self.timers.unanswered_since.map(|since| since + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT);
        let attempt = self.attempt.as_ref();
        let of_attempt =
            attempt.into_iter().flat_map(|attempt| [Some(attempt.retry_at), attempt.spread_at()]);
        let timers = &self.timers;
        [timers.erase_at, timers.keepalive_at, timers.persistent_at, timers.trial_at, silent_at]
            .into_iter()
            .chain(of_attempt)
            .flatten()
            .min()
    }

    /// An empty packet: answers silence, confirms keys, keeps a NAT open.
    fn send_keepalive(&mut self, now: Now, out: &mut Outbox) {
        if let Some(reservation) = self.reserve(1, false, now, out) {
            let mut datagram = vec![0; DATA_HEADER_LEN + TAG_LEN];
            reservation.session.seal(reservation.first, std::iter::once(datagram.as_mut_slice()));
            self.push(datagram, out);
        }
    }

    fn flush(&mut self, now: Now, out: &mut Outbox) {
        if self.queue.is_empty() {
            self.send_keepalive(now, out);
            return;
        }
        for packet in std::mem::take(&mut self.queue) {
            let Some(reservation) = self.reserve(1, true, now, out) else { return };
            let padded = packet.len().next_multiple_of(16);
            let mut datagram = vec![0; DATA_HEADER_LEN + padded + TAG_LEN];
            datagram[DATA_HEADER_LEN..DATA_HEADER_LEN + packet.len()].copy_from_slice(&packet);
            reservation.session.seal(reservation.first, std::iter::once(datagram.as_mut_slice()));
            self.push(datagram, out);
        }
    }

    fn begin_as_initiator(&mut self, local: u32, remote: u32, keys: &TransportKeys, now: Instant) {
        let session = Arc::new(Session::new(local, remote, keys, true, now));
        let replaced = self.current.replace(session);
        self.retire(replaced);
        let unused = self.next.take();
        self.retire(unused);
        self.attempt = None;
    }

    /// The peer has answered to `identity`.
    fn confirm(&mut self, identity: Arc<Identity>) {
        self.confirmed = Some(identity.public);
        if self.next_identity.as_ref().is_some_and(|next| next.public == identity.public) {
            self.next_identity = None;
        }
        self.identity = identity;
        if self.next_identity.is_none() {
            self.timers.trial_at = None;
        }
    }

    /// Nothing is sent with it any more; the peer may be a moment behind.
    fn retire(&mut self, session: Option<Arc<Session>>) {
        if let Some(session) = session {
            self.previous.push_front(session);
            self.previous.truncate(MAX_PREVIOUS);
        }
    }

    fn complete_handshake(&mut self, now: Instant) {
        self.last_handshake = Some(now);
        self.timers.last_minute_rekey = false;
        self.timers.unanswered_since = None;
        self.timers.erase_at = Some(now + REJECT_AFTER_TIME * 3);
        self.note_traversal(now);
    }

    /// The initiator renews a session that is only used to receive before the other side must reject it.
    fn rekey_before_rejection(&mut self, session: &Session, now: Now, out: &mut Outbox) {
        let limit = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;
        let is_current = self.current.as_ref().is_some_and(|c| c.local_index == session.local_index);
        if is_current
            && session.initiator
            && session.age(now.monotonic) >= limit
            && !self.timers.last_minute_rekey
        {
            self.timers.last_minute_rekey = true;
            self.start_handshake(now, out);
        }
    }

    fn retry_or_give_up(&mut self, now: Now, out: &mut Outbox) {
        let Some(attempt) = self.attempt.as_ref().filter(|attempt| now.monotonic >= attempt.retry_at) else {
            return;
        };
        if now.monotonic.saturating_duration_since(attempt.since) >= REKEY_ATTEMPT_TIME {
            self.attempt = None;
            self.queue.clear();
            self.timers.erase_at.get_or_insert(now.monotonic + REJECT_AFTER_TIME * 3);
        } else {
            self.start_handshake(now, out);
        }
    }

    /// Forgets every key; the peer starts anew with the next packet.
    fn erase(&mut self) {
        self.attempt = None;
        self.previous.clear();
        self.current = None;
        self.next = None;
        self.timers.erase_at = None;
        self.timers.keepalive_at = None;
        self.timers.unanswered_since = None;
    }

    fn note_sent(&mut self, data: bool, now: Instant) {
        self.timers.keepalive_at = None;
        self.timers.another_keepalive = false;
        if data {
            self.timers.unanswered_since.get_or_insert(now);
        }
        self.note_traversal(now);
    }

    /// Any authenticated packet in either direction postpones the persistent keepalive.
    fn note_traversal(&mut self, now: Instant) {
        if let Some(interval) = self.keepalive {
            self.timers.persistent_at = Some(now + interval);
        }
    }

    fn arm_keepalive(&mut self, now: Instant) {
        if self.timers.keepalive_at.is_some() {
            self.timers.another_keepalive = true;
        } else {
            self.timers.keepalive_at = Some(now + KEEPALIVE_TIMEOUT);
        }
    }

    fn fresh_cookie(&self, now: Instant) -> Option<Cookie> {
        let (cookie, at) = self.cookie?;
        (now.saturating_duration_since(at) < COOKIE_LIFETIME).then_some(cookie)
    }

    fn take_index(&mut self) -> u32 {
        self.next_index = self.next_index.wrapping_add(1);
        self.slot << SLOT_SHIFT | u32::from(self.next_index)
    }

    fn push(&mut self, datagram: Vec<u8>, out: &mut Outbox) {
        if let Some(endpoint) = self.endpoint {
            self.push_to(endpoint, datagram, out);
        }
    }

    fn push_to(&mut self, to: SocketAddr, datagram: Vec<u8>, out: &mut Outbox) {
        self.sent_bytes += datagram.len() as u64;
        out.push((to, datagram));
    }
}

#[cfg(test)]
mod tests;
