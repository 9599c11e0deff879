//! Answers of the host's resolvers, kept for as long as their TTLs allow. Small, first in first out.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};

use crate::name::Name;

/// What makes two forwarded questions the same. The client's "DNSSEC OK" and "checking disabled" change the answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CacheKey {
    pub(crate) name: Name,
    pub(crate) record_type: RecordType,
    pub(crate) dnssec_ok: bool,
    pub(crate) checking_disabled: bool,
}

/// Most answers kept: about 2 MiB of them.
const CAPACITY: usize = 2048;
/// Longest time an answer is kept, whatever its TTL: the node's caching resolver upstream may keep it longer.
const MAX_TTL_SECONDS: u32 = 300;
/// Longest time a negative answer is kept.
const MAX_NEGATIVE_TTL_SECONDS: u32 = 30;

struct Kept {
    message: Message,
    since: Instant,
    until: Instant,
}

#[derive(Default)]
pub(crate) struct Cache {
    answers: HashMap<CacheKey, Kept>,
    /// Keys in the order they came; a key stands here exactly once while it is in `answers`.
    order: VecDeque<CacheKey>,
}

impl Cache {
    /// The answer with its TTLs lowered by its age.
    pub(crate) fn find(&self, key: &CacheKey, now: Instant) -> Option<Message> {
        let kept = self.answers.get(key).filter(|kept| now < kept.until)?;
        let age = u32::try_from(now.duration_since(kept.since).as_secs()).unwrap_or(u32::MAX);
        let mut message = kept.message.clone();
        for section in [&mut message.answers, &mut message.authorities, &mut message.additionals] {
            for record in section {
                record.decrement_ttl(age);
            }
        }
        Some(message)
    }

    pub(crate) fn keep(&mut self, key: CacheKey, message: &Message, now: Instant) {
        let Some(ttl) = lifetime_seconds(message) else { return };
        let until = now + Duration::from_secs(u64::from(ttl));
        let kept = Kept { message: message.clone(), since: now, until };
        if self.answers.insert(key.clone(), kept).is_none() {
            self.order.push_back(key);
        }
        while self.answers.len() > CAPACITY {
            let Some(oldest) = self.order.pop_front() else { return };
            self.answers.remove(&oldest);
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Seconds the message may be kept; `None` when it may not: a failure, a truncated answer, a TTL of zero, or a
/// negative answer without SOA (RFC 2308 section 5).
fn lifetime_seconds(message: &Message) -> Option<u32> {
    if message.metadata.truncation {
        return None;
    }
    let negative = message.answers.is_empty() || message.metadata.response_code == ResponseCode::NXDomain;
    let ttl = match (message.metadata.response_code, negative) {
        (ResponseCode::NoError, false) => least_ttl(&message.answers).map(|ttl| ttl.min(MAX_TTL_SECONDS)),
        (ResponseCode::NoError | ResponseCode::NXDomain, true) => {
            let soa = message.authorities.iter().find_map(negative_ttl);
            let answers = least_ttl(&message.answers).unwrap_or(u32::MAX);
            soa.map(|ttl| ttl.min(answers).min(MAX_NEGATIVE_TTL_SECONDS))
        }
        _ => None,
    };
    ttl.filter(|&ttl| ttl > 0)
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
mod tests {
    use hickory_proto::op::{MessageType, OpCode};
    use hickory_proto::rr::rdata::{A, SOA};

    use super::*;

    fn key(text: &str) -> CacheKey {
        CacheKey {
            name: Name::parse(text).unwrap(),
            record_type: RecordType::A,
            dnssec_ok: false,
            checking_disabled: false,
        }
    }

    fn answer(ttl: u32) -> Message {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        let name = Name::parse("example.org").unwrap().to_hickory();
        message.add_answer(Record::from_rdata(name, ttl, RData::A(A::new(192, 0, 2, 1))));
        message
    }

    fn no_such_name(ttl: u32, minimum: u32) -> Message {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.metadata.response_code = ResponseCode::NXDomain;
        let name = Name::parse("example.org").unwrap().to_hickory();
        let soa = SOA::new(name.clone(), name.clone(), 1, 1, 1, 1, minimum);
        message.add_authority(Record::from_rdata(name, ttl, RData::SOA(soa)));
        message
    }

    #[test]
    fn a_kept_answer_grows_old_and_goes() {
        let now = Instant::now();
        let mut cache = Cache::default();
        cache.keep(key("example.org"), &answer(60), now);
        let later = cache.find(&key("Example.ORG"), now + Duration::from_secs(20)).unwrap();
        assert_eq!(later.answers[0].ttl, 40);
        assert_eq!(cache.find(&key("example.org"), now + Duration::from_secs(60)), None);
    }

    #[test]
    fn negative_answers_live_as_long_as_the_soa_says() {
        assert_eq!(lifetime_seconds(&no_such_name(20, 900)), Some(20));
        assert_eq!(lifetime_seconds(&no_such_name(900, 10)), Some(10));
        assert_eq!(lifetime_seconds(&no_such_name(900, 900)), Some(MAX_NEGATIVE_TTL_SECONDS));
        assert_eq!(lifetime_seconds(&Message::new(1, MessageType::Response, OpCode::Query)), None);
    }

    #[test]
    fn failures_zero_ttls_and_truncated_answers_are_not_kept() {
        let mut failure = answer(60);
        failure.metadata.response_code = ResponseCode::ServFail;
        let mut truncated = answer(60);
        truncated.metadata.truncation = true;
        for message in [failure, truncated, answer(0)] {
            assert_eq!(lifetime_seconds(&message), None);
        }
    }

    #[test]
    fn the_cache_is_bounded_and_the_oldest_goes_first() {
        let now = Instant::now();
        let mut cache = Cache::default();
        for number in 0..=CAPACITY {
            cache.keep(key(&format!("n{number}.org")), &answer(60), now);
        }
        assert_eq!(cache.answers.len(), CAPACITY);
        assert_eq!(cache.order.len(), CAPACITY);
        assert_eq!(cache.find(&key("n0.org"), now), None);
        assert!(cache.find(&key("n1.org"), now).is_some());
    }
}
