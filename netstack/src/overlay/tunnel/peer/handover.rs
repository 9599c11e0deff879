//! A peer as one process leaves it to the next: sessions, timers and what waits. A handshake that is under way is begun anew.

use serde::{Deserialize, Serialize};

use super::super::handover::{Clock, Offset, Unusable, in_base64};
use super::super::replay::{BLOCKS, ReplayWindow};
use super::*;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct PeerState {
    key: WgPublicKey,
    /// The key of ours that it is greeted with.
    identity: WgPublicKey,
    confirmed: Option<WgPublicKey>,
    pub(in super::super) slot: u32,
    next_index: u8,
    endpoint: Option<SocketAddr>,
    /// We had greeted it and it had not answered.
    pub(in super::super) is_being_greeted: bool,
    previous: Vec<SessionState>,
    current: Option<SessionState>,
    next: Option<SessionState>,
    #[serde(with = "in_base64")]
    greatest_timestamp: Timestamp,
    last_initiation_read: Option<Offset>,
    queue: Vec<Packet>,
    timers: TimersState,
    last_handshake: Option<Offset>,
    received_bytes: u64,
    sent_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Packet(#[serde(with = "in_base64")] Vec<u8>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TimersState {
    unanswered_since: Option<Offset>,
    keepalive_at: Option<Offset>,
    another_keepalive: bool,
    persistent_at: Option<Offset>,
    erase_at: Option<Offset>,
    last_minute_rekey: bool,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SessionState {
    local_index: u32,
    remote_index: u32,
    created: Offset,
    initiator: bool,
    #[serde(with = "in_base64")]
    send: [u8; 32],
    #[serde(with = "in_base64")]
    receive: [u8; 32],
    next_counter: u64,
    /// One more than the greatest counter received.
    received: u64,
    /// Which of those before it were, as little-endian words.
    #[serde(with = "in_base64")]
    window: Vec<u8>,
}

/// Without the keys.
impl std::fmt::Debug for SessionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "session {:#x} at {}, received {}", self.local_index, self.next_counter, self.received)
    }
}

impl SessionState {
    fn of(session: &Session, clock: &Clock) -> Self {
        let (keys, next_counter, ReplayWindow { next, bits }) = session.standing();
        Self {
            local_index: session.local_index,
            remote_index: session.remote_index,
            created: clock.offset(session.created),
            initiator: session.initiator,
            send: keys.send,
            receive: keys.receive,
            next_counter,
            received: next,
            window: bits.iter().flat_map(|word| word.to_le_bytes()).collect(),
        }
    }

    fn resume(&self, slot: u32, clock: &Clock) -> Result<Arc<Session>, Unusable> {
        let (words, rest) = self.window.as_chunks();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let bits: [u64; BLOCKS] = words.try_into().map_err(|_| Unusable::Session)?;
        if slot_of(self.local_index) != slot || !rest.is_empty() {
            return Err(Unusable::Session);
        }
        let keys = TransportKeys { send: self.send, receive: self.receive };
        let created = clock.instant(self.created)?;
        let session = Session::new(self.local_index, self.remote_index, &keys, self.initiator, created);
        Ok(Arc::new(session.resumed(self.next_counter, ReplayWindow { next: self.received, bits })))
    }
}

impl Peer {
    /// What the next process needs to know; this peer must not be used after.
    pub(in super::super) fn state(&self, clock: &Clock) -> PeerState {
        let session = |session: &Arc<Session>| SessionState::of(session, clock);
        let lives = |session: &&Arc<Session>| !session.expired(clock.now());
        let offset = |at: Option<Instant>| at.map(|at| clock.offset(at));
        let timers = &self.timers;
        PeerState {
            key: self.key,
            identity: self.identity.public,
            confirmed: self.confirmed,
            slot: self.slot,
            next_index: self.next_index,
            endpoint: self.endpoint,
            is_being_greeted: self.attempt.is_some(),
            previous: self.previous.iter().filter(lives).map(session).collect(),
            current: self.current.as_ref().filter(lives).map(session),
            next: self.next.as_ref().filter(lives).map(session),
            greatest_timestamp: self.greatest_timestamp,
            last_initiation_read: offset(self.last_initiation_read),
            queue: self.queue.iter().cloned().map(Packet).collect(),
            timers: TimersState {
                unanswered_since: offset(timers.unanswered_since),
                keepalive_at: offset(timers.keepalive_at),
                another_keepalive: timers.another_keepalive,
                persistent_at: offset(timers.persistent_at),
                erase_at: offset(timers.erase_at),
                last_minute_rekey: timers.last_minute_rekey,
            },
            last_handshake: offset(self.last_handshake),
            received_bytes: self.received_bytes,
            sent_bytes: self.sent_bytes,
        }
    }

    /// Goes on where the peer of another process stood; what is configured stays. `identity` is ours of that name.
    ///
    /// Errors: what no process leaves.
    pub(in super::super) fn resume(
        &mut self,
        state: PeerState,
        identity: impl Fn(&WgPublicKey) -> Option<Arc<Identity>>,
        clock: &Clock,
    ) -> Result<(), Unusable> {
        let session = |session: &SessionState| session.resume(self.slot, clock);
        let instant = |at: Option<Offset>| at.map(|at| clock.instant(at)).transpose();
        let previous = state.previous.iter().map(session).collect::<Result<_, _>>()?;
        let [current, next] =
            [&state.current, &state.next].map(|state| state.as_ref().map(session).transpose());
        let timers = state.timers;
        self.timers = Timers {
            unanswered_since: instant(timers.unanswered_since)?,
            keepalive_at: instant(timers.keepalive_at)?,
            another_keepalive: timers.another_keepalive,
            persistent_at: instant(timers.persistent_at)?,
            trial_at: self.timers.trial_at,
            erase_at: instant(timers.erase_at)?,
            last_minute_rekey: timers.last_minute_rekey,
        };
        (self.previous, self.current, self.next) = (previous, current?, next?);
        self.last_initiation_read = instant(state.last_initiation_read)?;
        self.last_handshake = instant(state.last_handshake)?;
        self.set_key(state.key);
        self.identity = identity(&state.identity).ok_or(Unusable::Key)?;
        self.confirmed = state.confirmed;
        self.next_index = state.next_index;
        self.endpoint = state.endpoint;
        self.greatest_timestamp = state.greatest_timestamp;
        self.queue = state.queue.into_iter().map(|Packet(bytes)| bytes).take(MAX_QUEUED).collect();
        (self.received_bytes, self.sent_bytes) = (state.received_bytes, state.sent_bytes);
        Ok(())
    }
}
