//! Whatever the short path (`fast`) answers, the long one answers too: same code, flags, question, records, order.

use std::collections::BTreeSet;

use hickory_proto::op::{Edns, Message, Query};
use hickory_proto::rr::rdata::opt::EdnsOption;
use proptest::prelude::*;

use super::tests::{exchange, resolver, resolver_of};
use super::*;
use crate::fast::{self, Asked, Outcome};
use crate::store::Reading;
use crate::zone::{Data, DnsPlan, Group, GroupKey, Groups, Srv, Zones};

const DOMAIN: &str = "cluster.local";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// Every kind of record, sets of every size, empty non-terminals, Namespaces with pod names, a reverse zone.
fn everything() -> Resolver {
    let mut records = vec![
        (name("web.default.svc.cluster.local"), Data::A([10, 43, 0, 80].into())),
        (name("web.default.svc.cluster.local"), Data::Aaaa("fd00:43::80".parse().unwrap())),
        (name("v4.default.svc.cluster.local"), Data::A([10, 43, 0, 4].into())),
        (name("alias.default.svc.cluster.local"), Data::Cname(name("web.default.svc.cluster.local"))),
        (name("out.default.svc.cluster.local"), Data::Cname(name("www.example.com"))),
        (name("80.0.43.10.in-addr.arpa"), Data::Ptr(name("web.default.svc.cluster.local"))),
        (name("4.3.2.1.in-addr.arpa"), Data::Ptr(name("far.default.svc.cluster.local"))),
        (name("cluster.local"), Data::Ns(name("ns.dns.cluster.local"))),
        (name("ns.dns.cluster.local"), Data::A([10, 43, 0, 10].into())),
        (name("dns-version.cluster.local"), Data::Txt("1.1.0".to_owned())),
    ];
    for (set, size) in [("two", 2), ("some", 25), ("many", 30), ("huge", 120)] {
        let owner = name(&format!("{set}.default.svc.cluster.local"));
        let srv = name(&format!("_x._tcp.{set}.default.svc.cluster.local"));
        for n in 0..size {
            let own = owner.child(&format!("endpoint-{n}")).unwrap();
            let addresses =
                [Data::A([10, 42, 0, n].into()), Data::Aaaa([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n)].into())];
            records.extend(
                addresses
                    .iter()
                    .flat_map(|data| [(owner.clone(), data.clone()), (own.clone(), data.clone())]),
            );
            let target = Srv { priority: 0, weight: 1, port: 80, target: own };
            records.push((srv.clone(), Data::Srv(target)));
        }
    }
    let namespace = GroupKey::Namespace("default".to_owned());
    let names = ["default.svc.cluster.local", "default.pod.cluster.local"];
    let empty = Group::new(&names.map(|text| (name(text), BTreeSet::new())).into());
    let zones = Zones { domain: name(DOMAIN), reverse: [name("43.10.in-addr.arpa")].into() };
    let groups = Groups::from([
        (Arc::new(GroupKey::Zone), Arc::new(records.into_iter().collect::<Group>())),
        (Arc::new(namespace), Arc::new(empty)),
    ]);
    let store = Store::default();
    store.write(
        &Groups::new(),
        &DnsPlan {
            zones: Some(zones),
            groups: groups.into(),
            ranges: Default::default(),
            listen: Default::default(),
            hosts: Default::default(),
            custom: Default::default(),
            nodes: Default::default(),
            pods: None,
        },
    );
    resolver_of(store)
}

fn question() -> impl Strategy<Value = (Vec<u8>, usize)> {
    let names = prop::sample::select(vec![
        "web.default.svc.cluster.local.",
        "v4.default.svc.cluster.local.",
        "alias.default.svc.cluster.local.",
        "two.default.svc.cluster.local.",
        "some.default.svc.cluster.local.",
        "many.default.svc.cluster.local.",
        "huge.default.svc.cluster.local.",
        "endpoint-1.two.default.svc.cluster.local.",
        "_x._tcp.two.default.svc.cluster.local.",
        "_x._tcp.some.default.svc.cluster.local.",
        "_x._tcp.huge.default.svc.cluster.local.",
        "_tcp.two.default.svc.cluster.local.",
        "absent.default.svc.cluster.local.",
        "web.absent.svc.cluster.local.",
        "default.svc.cluster.local.",
        "svc.cluster.local.",
        "cluster.local.",
        "local.",
        ".",
        "dns-version.cluster.local.",
        "10-42-0-7.default.pod.cluster.local.",
        "fd00--7.default.pod.cluster.local.",
        "10-42-0-7.absent.pod.cluster.local.",
        "80.0.43.10.in-addr.arpa.",
        "81.0.43.10.in-addr.arpa.",
        "43.10.in-addr.arpa.",
        "4.3.2.1.in-addr.arpa.",
        "notcluster.local.",
        "xcluster.local.",
    ]);
    let types = prop_oneof![
        4 => prop::sample::select(vec![1_u16, 28, 33, 12, 5, 2, 6, 16]),
        1 => any::<u16>(),
    ];
    let edns = prop::option::of((prop_oneof![Just(1232_u16), any::<u16>()], any::<bool>(), any::<bool>()));
    (names, types, edns, any::<[bool; 3]>(), any::<u64>(), 0_usize..1000).prop_map(
        |(name, record_type, edns, [rd, cd, ad], case, turn)| {
            let mixed = name
                .chars()
                .enumerate()
                .map(|(at, c)| if case >> (at % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c });
            let mut message = Message::query();
            message.metadata.recursion_desired = rd;
            message.metadata.checking_disabled = cd;
            message.metadata.authentic_data = ad;
            let mixed = WireName::from_ascii(mixed.collect::<String>()).unwrap();
            message.add_query(Query::query(mixed, RecordType::from(record_type)));
            if let Some((payload, dnssec_ok, cookie)) = edns {
                let mut edns = Edns::new();
                edns.set_max_payload(payload).set_dnssec_ok(dnssec_ok);
                if cookie {
                    edns.options_mut().insert(EdnsOption::Unknown(10, vec![7; 8]));
                }
                message.set_edns(edns);
            }
            (message.to_vec().unwrap(), turn)
        },
    )
}

/// What the short path says, if it takes part.
fn short_answer(resolver: &Resolver, bytes: &[u8], turn: usize) -> Option<Vec<u8>> {
    answer_of(&resolver.store.read(), bytes, turn)
}

fn answer_of(reading: &Reading<'_>, bytes: &[u8], turn: usize) -> Option<Vec<u8>> {
    let mut reply = Vec::new();
    let asked = Asked::read(bytes)?;
    match fast::answer(&asked, reading, turn, &mut reply) {
        Outcome::Answered(code) => {
            assert_eq!(code.low(), reply[3] & 0xf, "the code that is counted is the one that is sent");
            Some(reply)
        }
        Outcome::Other | Outcome::Elsewhere => {
            assert!(reply.is_empty(), "what is left to the long path writes nothing");
            None
        }
    }
}

fn limit(message: &Message) -> usize {
    message.edns.as_ref().map_or(512, |edns| usize::from(edns.max_payload()).clamp(512, 1232))
}

/// Both say the same. Where a set does not fit, each gives as many records from the same first one on as fit it;
/// and hickory may not find room for additional records that the other has room for, or the other way round. It looks for
/// room for a record's whole name before it writes two octets of it, so it may cut a set that just fits.
fn assert_same(asked: &[u8], short: &[u8], long: &[u8]) -> Result<(), TestCaseError> {
    let (query, a, b) = (
        Message::from_vec(asked).unwrap(),
        Message::from_vec(short).unwrap(),
        Message::from_vec(long).unwrap(),
    );
    prop_assert!(short.len() <= limit(&query), "{} octets", short.len());
    prop_assert_eq!(
        &short[12..12 + query.queries[0].name.len()],
        &asked[12..12 + query.queries[0].name.len()]
    );
    let whole_record = query.queries[0].name.len() + 26;
    let cut_early = b.metadata.truncation && long.len() + whole_record > limit(&query);
    let mut metadata = a.metadata;
    metadata.truncation |= cut_early;
    prop_assert_eq!(metadata, b.metadata);
    prop_assert_eq!(&a.queries, &b.queries);
    prop_assert_eq!(a.edns.as_ref(), b.edns.as_ref());
    let same_case = |x: &Record, y: &Record| x == y && x.name.to_ascii() == y.name.to_ascii();
    prop_assert!(a.answers.iter().zip(&b.answers).all(|(x, y)| same_case(x, y)), "{:?} {:?}", a, b);
    if metadata.truncation {
        prop_assert!(!a.answers.is_empty() && a.answers.len() >= b.answers.len());
    } else {
        prop_assert_eq!(a.answers.len(), b.answers.len());
        prop_assert_eq!(&a.authorities, &b.authorities);
        if !a.additionals.is_empty() && !b.additionals.is_empty() {
            prop_assert_eq!(&a.additionals, &b.additionals);
        } else if a.additionals.len() != b.additionals.len() {
            let larger = short.len().max(long.len());
            prop_assert!(larger > limit(&query) / 2, "additional records left out for no reason: {}", larger);
        }
    }
    Ok(())
}

#[test]
fn a_set_that_just_fits_is_whole() {
    let resolver = everything();
    let name = WireName::from_ascii("many.default.svc.cluster.local.").unwrap();
    for payload in 512..=600 {
        let mut message = Message::query();
        message.add_query(Query::query(name.clone(), RecordType::A));
        message.set_edns(Edns::new().set_max_payload(payload).clone());
        let bytes = message.to_vec().unwrap();
        let short = short_answer(&resolver, &bytes, 0).unwrap();
        resolver.turn.store(0, Ordering::Relaxed);
        let long = exchange(&resolver, bytes.clone(), Protocol::Udp).unwrap();
        assert_same(&bytes, &short, &long).unwrap();
        // Header, question with the root's octet, thirty records and OPT.
        let whole = HEADER_BYTES + (name.len() + 1 + 4) + 30 * 16 + OPT_BYTES;
        let answer = Message::from_vec(&short).unwrap();
        assert_eq!(answer.answers.len() == 30, usize::from(payload) >= whole, "{payload}");
        assert_eq!(answer.metadata.truncation, usize::from(payload) < whole, "{payload}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_asked_before_in_a_batch_changes_no_answer(batch in prop::collection::vec(question(), 2..20)) {
        thread_local!(static RESOLVER: Resolver = everything());
        RESOLVER.with(|resolver| {
            let reading = resolver.store.read();
            for (bytes, turn) in &batch {
                prop_assert_eq!(answer_of(&reading, bytes, *turn), short_answer(resolver, bytes, *turn));
            }
            Ok(())
        })?;
    }

    #[test]
    fn both_paths_say_the_same((bytes, turn) in question()) {
        thread_local!(static RESOLVER: Resolver = everything());
        RESOLVER.with(|resolver| {
            let Some(short) = short_answer(resolver, &bytes, turn) else { return Ok(()) };
            resolver.turn.store(turn, Ordering::Relaxed);
            let long = exchange(resolver, bytes.clone(), Protocol::Udp).unwrap();
            assert_same(&bytes, &short, &long)
        })?;
    }

    #[test]
    fn arbitrary_octets_never_panic_and_what_is_answered_was_readable(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        header: bool,
    ) {
        let resolver = resolver(3);
        if header && bytes.len() > 12 {
            bytes[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        }
        if let Some(short) = short_answer(&resolver, &bytes, 0) {
            let long = exchange(&resolver, bytes.clone(), Protocol::Udp).unwrap();
            assert_same(&bytes, &short, &long)?;
        }
    }
}

fn plain(text: &str, record_type: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.add_query(Query::query(WireName::from_ascii(text).unwrap(), record_type));
    message.to_vec().unwrap()
}

#[test]
fn what_is_asked_all_the_time_takes_the_short_path() {
    let resolver = everything();
    let all_the_time = [
        ("web.default.svc.cluster.local.", RecordType::A),
        ("WEB.default.svc.cluster.LOCAL.", RecordType::AAAA),
        ("v4.default.svc.cluster.local.", RecordType::AAAA),
        ("www.example.com.default.svc.cluster.local.", RecordType::A),
        ("80.0.43.10.in-addr.arpa.", RecordType::PTR),
        ("_x._tcp.two.default.svc.cluster.local.", RecordType::SRV),
        ("huge.default.svc.cluster.local.", RecordType::A),
        ("web.default.svc.cluster.local.", RecordType::HTTPS),
        ("10-42-0-7.default.pod.cluster.local.", RecordType::A),
    ];
    for (name, record_type) in all_the_time {
        assert!(short_answer(&resolver, &plain(name, record_type), 0).is_some(), "{name} {record_type}");
    }
}

#[test]
fn anything_unusual_is_left_to_the_long_path() {
    let resolver = everything();
    let web = || plain("web.default.svc.cluster.local.", RecordType::A);
    let changed = |at: usize, octet: u8| {
        let mut bytes = web();
        bytes[at] = octet;
        bytes
    };
    let end = web().len();
    let unusual = [
        ("a response", changed(2, 0x80)),
        ("another operation", changed(2, 0x28)),
        ("no question", changed(5, 0)),
        ("two questions", changed(5, 2)),
        ("an answer", changed(7, 1)),
        ("a promised record that is not there", changed(11, 1)),
        ("a pointer", changed(12, 0xc0)),
        ("class CH", changed(end - 1, 3)),
        ("trailing octets", [web(), vec![0]].concat()),
        ("a cut question", web()[..end - 1].to_vec()),
        ("an alias", plain("alias.default.svc.cluster.local.", RecordType::A)),
        ("ANY", plain("web.default.svc.cluster.local.", RecordType::ANY)),
        ("a zone transfer", plain("cluster.local.", RecordType::AXFR)),
        ("a name elsewhere", plain("www.example.com.", RecordType::A)),
    ];
    for (what, bytes) in unusual {
        assert_eq!(short_answer(&resolver, &bytes, 0), None, "{what}");
    }
    assert_eq!(
        short_answer(
            &resolver_of(Store::new(Some(Zones { domain: name(DOMAIN), reverse: Default::default() }))),
            &web(),
            0
        ),
        None,
        "nothing is known yet"
    );
}

/// The message with a TSIG record behind it (RFC 8945 section 4.2), of a key that nobody has.
fn signed(mut message: Vec<u8>) -> Vec<u8> {
    const TYPE_TSIG: [u8; 2] = [0, 250];
    const CLASS_ANY: [u8; 2] = [0, 255];
    let algorithm = b"\x0bhmac-sha256\x00";
    let time_and_fudge = [0, 0, 0x69, 0, 0, 0, 1, 44];
    let mac = [&[0, 32][..], &[7; 32]].concat();
    let original_id_error_other = [message[0], message[1], 0, 0, 0, 0];
    let data = [&algorithm[..], &time_and_fudge, &mac, &original_id_error_other].concat();
    message[11] += 1;
    message.extend_from_slice(b"\x03key\x00");
    message.extend([TYPE_TSIG, CLASS_ANY, [0, 0], [0, 0], [0, u8::try_from(data.len()).unwrap()]].concat());
    message.extend(data);
    message
}

/// RFC 1035 4.1.1 "format error", "not implemented", "refused"; RFC 9619: one question; RFC 5625 6.1: no answer to an answer.
#[test]
fn bad_messages_are_answered_with_their_code_or_dropped_and_counted() {
    let resolver = everything();
    let web = || plain("web.default.svc.cluster.local.", RecordType::A);
    let with = |changes: &[(usize, u8)]| {
        let mut bytes = web();
        changes.iter().for_each(|(at, octet)| bytes[*at] = *octet);
        bytes
    };
    let end = web().len();
    let hundred = {
        let mut bytes = web();
        bytes[5] = 100;
        let question = bytes[12..].to_vec();
        (1..100).for_each(|_| bytes.extend_from_slice(&question));
        bytes
    };
    let looping = [&web()[..12], &[0xc0, 12, 0, 1, 0, 1][..]].concat();
    let oversize = [&web()[..12], &[63; 64].repeat(4)[..], &[0, 0, 1, 0, 1]].concat();
    let end_of_name = web().len() - 4;
    let of_type = |record_type: u8| with(&[(end_of_name + 1, record_type)]);
    let mut bad = vec![
        ("a signature", signed(web()), 5),
        ("a full transfer", of_type(252), 5),
        ("an incremental transfer", of_type(251), 5),
        ("a question for OPT", of_type(41), 5),
        ("a cut question", web()[..end - 3].to_vec(), 1),
        ("65535 promised questions", with(&[(4, 255), (5, 255)]), 1),
        ("no question", web()[..5].iter().copied().chain([0; 7]).collect(), 1),
        ("a hundred questions", hundred, 1),
        ("a pointer to itself", looping, 1),
        ("a name of more than 255 octets", oversize, 1),
        ("class CH", with(&[(end - 1, 3)]), 5),
        ("class ANY", with(&[(end - 1, 255)]), 5),
        ("class 0", with(&[(end - 1, 0)]), 5),
    ];
    bad.extend((1..16).map(|opcode| ("another operation", with(&[(2, opcode << 3)]), 4)));
    for (what, bytes, code) in bad {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let answer =
                exchange(&resolver, bytes.clone(), protocol).unwrap_or_else(|| panic!("{what}: no answer"));
            assert_eq!(&answer[..2], &bytes[..2], "{what}: the id");
            assert_eq!(answer[2] & 0xf8, 0x80 | bytes[2] & 0x78, "{what}: a response of the same operation");
            assert_eq!(answer[3] & 0xf, code, "{what}");
            assert!(answer.len() <= bytes.len(), "{what}: no amplification");
        }
    }
    let by_kind: Vec<(&str, u64)> = resolver.stats.refused().into_iter().collect();
    assert_eq!(
        by_kind,
        [
            ("malformed", 2 * 3),
            ("questions", 2 * 3),
            ("operation", 2 * 15),
            ("version", 0),
            ("signed", 2),
            ("class", 2 * 3),
            ("transfer", 2 * 2),
            ("type", 2),
        ]
    );
    let before = resolver.stats.queries();
    for bytes in [with(&[(2, 0x81)]), with(&[(2, 0xa8)]), web()[..11].to_vec(), Vec::new()] {
        assert_eq!(exchange(&resolver, bytes, Protocol::Udp), None);
    }
    for client in ["224.0.0.251:5353", "255.255.255.255:53", "0.0.0.0:53", "192.0.2.1:0", "[ff02::1]:53"] {
        assert_eq!(undeserving(&web(), client.parse().unwrap()), Some(Dropped::Source), "{client}");
    }
    assert_eq!(resolver.stats.queries(), before);
    assert_eq!(resolver.stats.dropped()[..2], [("short", 2), ("response", 2)]);
}
