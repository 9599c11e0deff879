//! Answers of upstream resolvers, kept as long as their TTLs allow and, for when no upstream answers, for a day more.
//!
//! Bounded by the memory that the answers take. What goes first came first and was not asked for since (second chance).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record};

use super::packet::{Age, Packet};

/// Memory of all answers together, about.
const CAPACITY_BYTES: usize = 8 << 20;
/// What an entry takes beside its packet and its key, about.
const ENTRY_BYTES: usize = 160;
/// A failure is remembered this long from when upstreams were asked, so that one that took its time does not outlast
/// what it is about.
pub(crate) const FAILURE_TTL: Duration = Duration::from_secs(5);
/// But at least this long from when it was known (RFC 9520 section 3.2: at least one second, at most five minutes).
const MIN_FAILURE_TTL: Duration = Duration::from_secs(1);
/// "A suggested maximum stale timer is between 1 and 3 days" (RFC 8767 section 5).
const STALE: Duration = Duration::from_secs(86_400);
/// An answer asked for this often is fetched anew before it ends.
const PREFETCH_HITS: u32 = 2;
/// When a tenth of its lifetime is left.
const PREFETCH_PART: u32 = 10;

/// Longest times that answers are kept, in seconds, whatever their TTLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) positive_seconds: u32,
    pub(crate) negative_seconds: u32,
}

impl Default for Limits {
    /// Five minutes, because a resolver upstream that caches too costs little; half a minute for what is not there yet.
    fn default() -> Self {
        Self { positive_seconds: 300, negative_seconds: 30 }
    }
}

/// What makes two forwarded questions the same: lower-case wire name, type, and the flags DO and CD, which change the
/// answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CacheKey(Arc<[u8]>);

/// The same, without memory of its own.
pub(crate) struct KeyBytes {
    bytes: [u8; 258],
    len: usize,
}

impl KeyBytes {
    /// `name` in lower-case wire format.
    pub(crate) fn new(
        name: &[u8],
        record_type: u16,
        dnssec_ok: bool,
        checking_disabled: bool,
    ) -> Option<Self> {
        let mut bytes = [0; 258];
        bytes.get_mut(..name.len())?.copy_from_slice(name);
        let [a, b] = record_type.to_be_bytes();
        let flags = u8::from(dnssec_ok) | u8::from(checking_disabled) << 1;
        bytes.get_mut(name.len()..name.len() + 3)?.copy_from_slice(&[a, b, flags]);
        Some(Self { bytes, len: name.len() + 3 })
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub(crate) fn to_key(&self) -> CacheKey {
        CacheKey(self.as_slice().into())
    }
}

impl std::borrow::Borrow<[u8]> for CacheKey {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

struct Kept {
    packet: Arc<Packet>,
    since: Instant,
    lifetime_seconds: u32,
    /// A failure is no answer to give when it is over.
    may_be_stale: bool,
    /// Asked for, since it came or since it was spared last.
    hits: AtomicU32,
    /// Somebody is fetching it anew.
    refreshing: AtomicBool,
    /// When it was asked for anew in vain last.
    failed_at: Option<Instant>,
}

/// What the cache has for a question.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// `refresh`: it is asked for often and ends soon; told to one asker only.
    Fresh {
        packet: Arc<Packet>,
        age: Age,
        refresh: bool,
    },
    /// Its time is over; good when no upstream answers. `retry`: they may be asked again.
    Stale {
        packet: Arc<Packet>,
        retry: bool,
    },
    Missing,
}

#[derive(Default)]
pub(crate) struct Cache {
    limits: Limits,
    answers: HashMap<CacheKey, Kept>,
    /// Keys in the order they came; a key stands here exactly once while it is in `answers`.
    order: VecDeque<CacheKey>,
    used_bytes: usize,
    /// Answers that say that there is nothing.
    denials: usize,
    /// Answers that gave others their place.
    evicted: u64,
}

impl Cache {
    /// Counts as asked for.
    pub(crate) fn look_up(&self, key: &KeyBytes, now: Instant) -> Lookup {
        let Some(kept) = self.answers.get(key.as_slice()) else { return Lookup::Missing };
        let age = now.saturating_duration_since(kept.since);
        let age_seconds = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let packet = kept.packet.clone();
        if age_seconds < kept.lifetime_seconds {
            let hits = kept.hits.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            let left = kept.lifetime_seconds - age_seconds;
            let wanted = hits > PREFETCH_HITS && left <= kept.lifetime_seconds / PREFETCH_PART;
            let refresh = wanted && kept.may_be_stale && !kept.refreshing.swap(true, Ordering::Relaxed);
            return Lookup::Fresh { packet, age: Age::Fresh(age_seconds), refresh };
        }
        if !kept.may_be_stale || age > STALE {
            return Lookup::Missing;
        }
        let failed_lately = |at: Instant| now.saturating_duration_since(at) < FAILURE_TTL;
        Lookup::Stale { packet, retry: !kept.failed_at.is_some_and(failed_lately) }
    }

    /// The answer if it can be given as it is, with nothing to do beside: for the path that does nothing beside.
    pub(crate) fn at_hand(&self, key: &KeyBytes, now: Instant) -> Option<(Arc<Packet>, Age)> {
        let kept = self.answers.get(key.as_slice())?;
        let age = u32::try_from(now.saturating_duration_since(kept.since).as_secs()).unwrap_or(u32::MAX);
        let left = kept.lifetime_seconds.checked_sub(age).filter(|&left| left > 0)?;
        let ends_soon = left <= kept.lifetime_seconds / PREFETCH_PART;
        if ends_soon && kept.may_be_stale && !kept.refreshing.load(Ordering::Relaxed) {
            return None;
        }
        kept.hits.fetch_add(1, Ordering::Relaxed);
        Some((kept.packet.clone(), Age::Fresh(age)))
    }

    /// Keeps the answer for `lifetime_seconds`, zero being not at all.
    pub(crate) fn keep(&mut self, key: CacheKey, packet: Arc<Packet>, lifetime_seconds: u32, now: Instant) {
        self.insert(key, packet, lifetime_seconds, true, now);
    }

    /// No upstream answered what was asked at `asked`. An answer from before stays as it is and may be given meanwhile;
    /// without one the failure itself is kept for a while.
    pub(crate) fn note_failure(
        &mut self,
        key: CacheKey,
        failure: impl FnOnce() -> Option<Packet>,
        asked: Instant,
        now: Instant,
    ) {
        let since = now.checked_sub(FAILURE_TTL - MIN_FAILURE_TTL).map_or(asked, |least| asked.max(least));
        if let Some(kept) = self.answers.get_mut(&key).filter(|kept| kept.may_be_stale) {
            kept.failed_at = Some(since);
            kept.refreshing.store(false, Ordering::Relaxed);
        } else if let Some(packet) = failure() {
            let seconds = u32::try_from(FAILURE_TTL.as_secs()).unwrap_or(u32::MAX);
            self.insert(key, Arc::new(packet), seconds, false, since);
        }
    }

    fn insert(
        &mut self,
        key: CacheKey,
        packet: Arc<Packet>,
        lifetime_seconds: u32,
        may_be_stale: bool,
        now: Instant,
    ) {
        let cost = cost_bytes(&key, &packet);
        let kept = Kept {
            packet,
            since: now,
            lifetime_seconds,
            may_be_stale,
            hits: AtomicU32::new(0),
            refreshing: AtomicBool::new(false),
            failed_at: None,
        };
        if lifetime_seconds == 0 || cost > CAPACITY_BYTES {
            return;
        }
        self.used_bytes += cost;
        self.denials += usize::from(kept.packet.is_denial());
        match self.answers.insert(key.clone(), kept) {
            None => self.order.push_back(key),
            Some(old) => self.forget(&key, &old),
        }
        self.make_room();
    }

    fn make_room(&mut self) {
        // Every key is spared at most once.
        let mut spared = self.order.len();
        while self.used_bytes > CAPACITY_BYTES {
            let Some(key) = self.order.pop_front() else { return };
            let asked_for =
                self.answers.get_mut(&key).is_some_and(|kept| std::mem::take(kept.hits.get_mut()) > 0);
            if asked_for && spared > 0 {
                spared -= 1;
                self.order.push_back(key);
            } else if let Some(kept) = self.answers.remove(&key) {
                self.forget(&key, &kept);
                self.evicted += 1;
            }
        }
    }

    fn forget(&mut self, key: &CacheKey, kept: &Kept) {
        self.used_bytes -= cost_bytes(key, &kept.packet);
        self.denials -= usize::from(kept.packet.is_denial());
    }

    /// Answers that say what there is, and those that say that there is nothing.
    pub(crate) fn kept(&self) -> (usize, usize) {
        (self.len() - self.denials, self.denials)
    }

    /// Answers that gave others their place.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Of answers that come from now on.
    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub(crate) fn clear(&mut self) {
        *self = Self { limits: self.limits, evicted: self.evicted, ..Self::default() };
    }

    pub(crate) fn len(&self) -> usize {
        self.answers.len()
    }
}

fn cost_bytes(key: &CacheKey, packet: &Packet) -> usize {
    ENTRY_BYTES + key.0.len() + packet.cost_bytes()
}

/// Seconds the message may be kept; zero when it may not: a failure, a truncated answer, a TTL of zero, or a
/// negative answer without SOA (RFC 2308 section 5).
pub(crate) fn lifetime_seconds(message: &Message, limits: Limits) -> u32 {
    if message.metadata.truncation {
        return 0;
    }
    let negative = message.answers.is_empty() || message.metadata.response_code == ResponseCode::NXDomain;
    let ttl = match (message.metadata.response_code, negative) {
        (ResponseCode::NoError, false) => {
            least_ttl(&message.answers).map(|ttl| ttl.min(limits.positive_seconds))
        }
        (ResponseCode::NoError | ResponseCode::NXDomain, true) => {
            let soa = message.authorities.iter().find_map(negative_ttl);
            let answers = least_ttl(&message.answers).unwrap_or(u32::MAX);
            soa.map(|ttl| ttl.min(answers).min(limits.negative_seconds))
        }
        _ => None,
    };
    ttl.unwrap_or(0)
}

fn least_ttl(records: &[Record]) -> Option<u32> {
    records.iter().map(|record| record.ttl).min()
}

fn negative_ttl(record: &Record) -> Option<u32> {
    match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
