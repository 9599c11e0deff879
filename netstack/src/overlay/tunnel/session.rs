//! One session: a pair of transport keys with their counters. Sealing and opening need no lock.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::message::{DATA_HEADER_LEN, TAG_LEN, write_data_header};
use super::noise::TransportKeys;
use super::replay::ReplayWindow;
use crate::kernel::aead::{Key, Packet};

/// WireGuard whitepaper, section 6.1.
pub(super) const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
pub(super) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
pub(super) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

pub(super) struct Session {
    /// What the other side writes into its data messages.
    pub(super) local_index: u32,
    pub(super) remote_index: u32,
    pub(super) created: Instant,
    /// We sent the first message: rekeying is our task.
    pub(super) initiator: bool,
    /// Only for the process after this one: the ciphers do not show theirs.
    keys: TransportKeys,
    send: Key,
    receive: Key,
    next_counter: AtomicU64,
    replay: Mutex<ReplayWindow>,
}

impl Session {
    pub(super) fn new(
        local_index: u32,
        remote_index: u32,
        keys: &TransportKeys,
        initiator: bool,
        now: Instant,
    ) -> Self {
        Self {
            local_index,
            remote_index,
            created: now,
            initiator,
            keys: keys.clone(),
            send: Key::new(&keys.send),
            receive: Key::new(&keys.receive),
            next_counter: AtomicU64::new(0),
            replay: Mutex::default(),
        }
    }

    /// Where a session of another process stood. Whoever calls this sees to it that nobody seals with that one any more.
    pub(super) fn resumed(self, next_counter: u64, replay: ReplayWindow) -> Self {
        Self { next_counter: AtomicU64::new(next_counter), replay: Mutex::new(replay), ..self }
    }

    /// The keys, the counter that comes next and what was received; true of a session that nobody uses any more.
    pub(super) fn standing(&self) -> (&TransportKeys, u64, ReplayWindow) {
        let replay = self.replay.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (&self.keys, self.next_counter.load(Ordering::Relaxed), replay.clone())
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.created)
    }

    pub(super) fn expired(&self, now: Instant) -> bool {
        self.age(now) >= REJECT_AFTER_TIME
    }

    /// The first of `count` consecutive counters that nobody else gets; `None` when the session has no more to give.
    pub(super) fn reserve(&self, count: u64) -> Option<u64> {
        self.next_counter
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                next.checked_add(count).filter(|end| *end <= REJECT_AFTER_MESSAGES)
            })
            .ok()
    }

    /// Seals datagrams in place, each header room, padded packet, tag room, from the counter `first` on.
    pub(super) fn seal<'a>(&self, first: u64, datagrams: impl Iterator<Item = &'a mut [u8]>) {
        self.send.seal((first..).zip(datagrams).map(|(counter, datagram)| {
            write_data_header(datagram, self.remote_index, counter);
            Packet { counter, bytes: &mut datagram[DATA_HEADER_LEN..] }
        }));
    }

    /// Opens datagrams in place, each a counter and where it stands in `bytes`, one behind another. Those that are not
    /// authentic are taken out; of the others the place of the packet is left.
    pub(super) fn open(&self, datagrams: &mut Vec<(u64, Range<usize>)>, bytes: &mut [u8]) {
        let (mut rest, mut taken) = (bytes, 0);
        let packets = datagrams.iter().map(|(counter, place)| {
            let (datagram, behind) =
                std::mem::take(&mut rest)[place.start - taken..].split_at_mut(place.len());
            (rest, taken) = (behind, place.end);
            Packet { counter: *counter, bytes: &mut datagram[DATA_HEADER_LEN..] }
        });
        let mut verdicts = Vec::with_capacity(datagrams.len());
        self.receive.open(packets, |authentic| verdicts.push(authentic));
        let mut verdicts = verdicts.into_iter();
        datagrams.retain(|_| verdicts.next() == Some(true));
        for (_, place) in datagrams {
            *place = place.start + DATA_HEADER_LEN..place.end - TAG_LEN;
        }
    }

    /// Marks authenticated counters as received; those seen before, too old or beyond the limit are refused.
    pub(super) fn accept(&self, counters: impl Iterator<Item = u64>, mut verdict: impl FnMut(bool)) {
        let mut replay = self.replay.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for counter in counters {
            verdict(counter < REJECT_AFTER_MESSAGES && replay.accept(counter));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Session, Session) {
        let now = Instant::now();
        let keys = TransportKeys { send: [1; 32], receive: [2; 32] };
        let back = TransportKeys { send: [2; 32], receive: [1; 32] };
        (Session::new(1, 2, &keys, true, now), Session::new(2, 1, &back, false, now))
    }

    #[test]
    fn what_one_side_seals_the_other_opens_once() {
        let (alice, bob) = pair();
        let mut datagram = vec![0; 16 + 32 + 16];
        datagram[16..48].fill(9);
        alice.seal(alice.reserve(1).unwrap(), std::iter::once(datagram.as_mut_slice()));
        let mut tampered = datagram.clone();
        tampered[20] ^= 1;
        let open = |datagram: &mut [u8]| {
            let mut datagrams = vec![(0, 0..64)];
            bob.open(&mut datagrams, datagram);
            datagrams
        };
        assert_eq!(open(&mut tampered), []);
        assert_eq!(open(&mut datagram), [(0, 16..48)]);
        assert_eq!(datagram[16..48], [9; 32]);
        let mut verdicts = Vec::new();
        bob.accept([0, 0].into_iter(), |fresh| verdicts.push(fresh));
        assert_eq!(verdicts, [true, false]);
    }

    #[test]
    fn counters_end_before_they_could_repeat() {
        let (alice, _) = pair();
        alice.next_counter.store(REJECT_AFTER_MESSAGES - 1, Ordering::Relaxed);
        assert_eq!(alice.reserve(2), None);
        assert_eq!(alice.reserve(1), Some(REJECT_AFTER_MESSAGES - 1));
        assert_eq!(alice.reserve(1), None);
    }
}
