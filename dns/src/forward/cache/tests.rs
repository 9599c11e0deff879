use hickory_proto::op::{MessageType, OpCode, Query};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name as WireName, RecordType};

use super::*;
use crate::name::Name;

fn key(text: &str) -> KeyBytes {
    KeyBytes::new(Name::parse(text).unwrap().wire(), 1, false, false).unwrap()
}

fn name(text: &str) -> WireName {
    WireName::from_ascii(text).unwrap()
}

fn answer(ttl: u32) -> Message {
    let mut message = Message::new(1, MessageType::Response, OpCode::Query);
    message.add_query(Query::query(name("example.org."), RecordType::A));
    message.answers.push(Record::from_rdata(name("example.org."), ttl, RData::A(A::new(192, 0, 2, 1))));
    message
}

fn no_such_name(ttl: u32, minimum: u32) -> Message {
    let mut message = answer(0);
    message.metadata.response_code = ResponseCode::NXDomain;
    message.answers.clear();
    let data = SOA::new(name("org."), name("org."), 1, 1, 1, 1, minimum);
    message.authorities.push(Record::from_rdata(name("org."), ttl, RData::SOA(data)));
    message
}

fn packet(ttl: u32) -> Arc<Packet> {
    Arc::new(Packet::new(answer(ttl), &name("example.org.")).unwrap())
}

fn after(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn an_answer_is_kept_for_its_ttl_and_grows_old() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.keep(key("example.org").to_key(), packet(60), 60, now);
    assert!(matches!(
        cache.look_up(&key("example.org"), now + after(20)),
        Lookup::Fresh { age: Age::Fresh(20), .. }
    ));
    assert_eq!(cache.at_hand(&key("example.org"), now + after(20)).unwrap().1, Age::Fresh(20));
    assert!(cache.at_hand(&key("example.org"), now + after(60)).is_none());
    assert!(matches!(cache.look_up(&key("example.net"), now), Lookup::Missing));
    let other = KeyBytes::new(Name::parse("example.org").unwrap().wire(), 1, true, false).unwrap();
    assert!(matches!(cache.look_up(&other, now), Lookup::Missing), "DO belongs to the question");
}

#[test]
fn an_answer_whose_time_is_over_is_stale_for_a_day() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.keep(key("example.org").to_key(), packet(60), 60, now);
    assert!(matches!(cache.look_up(&key("example.org"), now + after(61)), Lookup::Stale { retry: true, .. }));
    cache.note_failure(key("example.org").to_key(), || None, now + after(61), now + after(61));
    assert!(matches!(
        cache.look_up(&key("example.org"), now + after(63)),
        Lookup::Stale { retry: false, .. }
    ));
    assert!(matches!(cache.look_up(&key("example.org"), now + after(67)), Lookup::Stale { retry: true, .. }));
    assert!(matches!(cache.look_up(&key("example.org"), now + after(90_000)), Lookup::Missing));
}

#[test]
fn a_failure_is_remembered_for_five_seconds_and_never_stale() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    let failure = || Packet::new(answer(0), &name("example.org."));
    cache.note_failure(key("example.org").to_key(), failure, now, now);
    assert!(matches!(
        cache.look_up(&key("example.org"), now + after(4)),
        Lookup::Fresh { refresh: false, .. }
    ));
    assert!(matches!(cache.look_up(&key("example.org"), now + after(5)), Lookup::Missing));
}

/// From its question on; but RFC 9520 section 3.2: "Resolvers MUST cache resolution failures for at least 1 second."
#[test]
fn a_failure_that_took_its_time_is_remembered_the_shorter_but_a_second() {
    let remembered = |took, until| {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let failure = || Packet::new(answer(0), &name("example.org."));
        cache.note_failure(key("example.org").to_key(), failure, now, now + took);
        matches!(cache.look_up(&key("example.org"), now + until), Lookup::Fresh { .. })
    };
    assert!(remembered(after(2), after(4)) && !remembered(after(2), after(5)));
    let took = Duration::from_millis(4500);
    assert!(remembered(took, took + Duration::from_millis(990)) && !remembered(took, took + after(1)));
}

#[test]
fn what_is_asked_often_is_fetched_anew_by_one_asker_before_it_ends() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.keep(key("example.org").to_key(), packet(100), 100, now);
    let refreshes = |cache: &Cache, at| match cache.look_up(&key("example.org"), now + after(at)) {
        Lookup::Fresh { refresh, .. } => refresh,
        other => panic!("{other:?}"),
    };
    assert!(!refreshes(&cache, 95), "the first asker does not make it popular");
    assert!(!refreshes(&cache, 50) && !refreshes(&cache, 89));
    assert!(cache.at_hand(&key("example.org"), now + after(91)).is_none(), "left to who can fetch it");
    assert!(refreshes(&cache, 91));
    assert!(!refreshes(&cache, 92), "one is enough");
    assert!(cache.at_hand(&key("example.org"), now + after(92)).is_some());
}

#[test]
fn negative_answers_live_as_long_as_the_soa_says() {
    let limits = Limits::default();
    assert_eq!(lifetime_seconds(&no_such_name(20, 900), limits), 20);
    assert_eq!(lifetime_seconds(&no_such_name(900, 10), limits), 10);
    assert_eq!(lifetime_seconds(&no_such_name(900, 900), limits), 30);
    let mut without_soa = no_such_name(900, 900);
    without_soa.authorities.clear();
    assert_eq!(lifetime_seconds(&without_soa, limits), 0);
}

#[test]
fn failures_zero_ttls_and_truncated_answers_are_not_kept() {
    let mut failure = answer(60);
    failure.metadata.response_code = ResponseCode::ServFail;
    let mut truncated = answer(60);
    truncated.metadata.truncation = true;
    for message in [failure, truncated, answer(0)] {
        assert_eq!(lifetime_seconds(&message, Limits::default()), 0);
    }
    assert_eq!(lifetime_seconds(&answer(86_400), Limits::default()), 300);
}

#[test]
fn memory_is_bounded_and_what_is_asked_for_is_spared() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    let packet = packet(60);
    for number in 0..60_000 {
        cache.keep(key(&format!("n{number}.example.org")).to_key(), packet.clone(), 60, now);
        if number % 1000 == 0 {
            cache.look_up(&key("n0.example.org"), now);
        }
    }
    assert!(
        cache.used_bytes <= CAPACITY_BYTES && cache.len() > 10_000,
        "{} {}",
        cache.used_bytes,
        cache.len()
    );
    assert_eq!(cache.order.len(), cache.len());
    let sum: usize = cache.answers.iter().map(|(key, kept)| cost_bytes(key, &kept.packet)).sum();
    assert_eq!(sum, cache.used_bytes);
    assert!(cache.at_hand(&key("n0.example.org"), now).is_some(), "asked for all the time");
    assert!(cache.at_hand(&key("n1.example.org"), now).is_none(), "came first, never asked for");
    cache.keep(key("n0.example.org").to_key(), packet, 60, now);
    assert_eq!(cache.order.len(), cache.len(), "a newer answer replaces the older");
}
