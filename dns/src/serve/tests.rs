//! The server path on whole messages, without sockets: arbitrary bytes, sizes, codes.

use hickory_proto::op::{Edns, Message, Query};
use proptest::prelude::*;

use super::*;
use crate::zone::{Data, DnsPlan, Group, GroupKey, Groups, Srv, Zones};

/// A cluster with one headless Service of `endpoints` endpoints: `big.default.svc.cluster.local`.
pub(super) fn resolver(endpoints: u8) -> Resolver {
    let store = Store::default();
    let domain = Name::parse("cluster.local").unwrap();
    let big = Name::parse("big.default.svc.cluster.local").unwrap();
    let srv = Name::parse("_x._tcp.big.default.svc.cluster.local").unwrap();
    let records = (0..endpoints).flat_map(|n| {
        let own = big.child(&format!("endpoint-{n}")).unwrap();
        let address = Data::A([10, 42, 0, n].into());
        let target = Srv { priority: 0, weight: 1, port: 80, target: own.clone() };
        [(big.clone(), address.clone()), (own, address), (srv.clone(), Data::Srv(target))]
    });
    let group: Group = records.collect();
    let plan = DnsPlan {
        zones: Some(Zones { domain, reverse: Default::default() }),
        groups: Groups::from([(Arc::new(GroupKey::Zone), Arc::new(group))]).into(),
        ranges: Default::default(),
        listen: Default::default(),
        hosts: Default::default(),
        custom: Default::default(),
        nodes: Default::default(),
        pods: None,
    };
    store.write(&Groups::new(), &plan);
    resolver_of(store)
}

pub(super) fn resolver_of(store: Store) -> Resolver {
    let stats = Arc::new(Stats::default());
    let forwarder = Arc::new(Forwarder::new("/nonexistent/resolv.conf".into(), None, stats.clone()));
    Resolver::new(Arc::new(store), forwarder, stats, Arc::new(|_| None), Rate::new(None))
}

pub(super) fn exchange(resolver: &Resolver, bytes: Vec<u8>, protocol: Protocol) -> Option<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(resolver.exchange(bytes, "192.0.2.1:4000".parse().unwrap(), protocol))
}

fn question(name: &str, record_type: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(WireName::from_ascii(name).unwrap(), record_type));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload).set_dnssec_ok(true);
        message.set_edns(edns);
    }
    message
}

fn ask(resolver: &Resolver, message: &Message, protocol: Protocol) -> (Message, usize) {
    let bytes = exchange(resolver, message.to_vec().unwrap(), protocol).unwrap();
    (Message::from_vec(&bytes).unwrap(), bytes.len())
}

const BIG: &str = "big.default.svc.cluster.local.";

#[test]
fn without_edns_an_answer_has_at_most_512_octets_and_tells_that_it_was_cut() {
    let (answer, length) = ask(&resolver(200), &question(BIG, RecordType::A, None), Protocol::Udp);
    assert!(answer.metadata.truncation && length <= 512, "{length}");
    assert!(answer.answers.len() >= 25, "as many as fit: {}", answer.answers.len());
    assert_eq!(answer.edns, None);
}

#[test]
fn a_cut_answer_keeps_its_opt_record_and_stays_below_the_clients_size() {
    for payload in [512, 900, 1232, 4096] {
        let (answer, length) =
            ask(&resolver(200), &question(BIG, RecordType::A, Some(payload)), Protocol::Udp);
        assert!(answer.metadata.truncation);
        assert!(length <= usize::from(payload.min(1232)), "{length} octets for {payload}");
        let edns = answer.edns.expect("OPT answers OPT");
        assert!(edns.flags().dnssec_ok);
    }
}

#[test]
fn a_tiny_advertised_size_counts_as_512() {
    let (answer, length) = ask(&resolver(200), &question(BIG, RecordType::A, Some(100)), Protocol::Udp);
    assert!(answer.metadata.truncation && length > 450 && length <= 512, "{length}");
}

#[test]
fn by_tcp_the_whole_set_is_answered() {
    let (answer, _) = ask(&resolver(200), &question(BIG, RecordType::A, None), Protocol::Tcp);
    assert_eq!((answer.answers.len(), answer.metadata.truncation), (200, false));
}

#[test]
fn addresses_of_srv_targets_are_left_out_before_anything_is_cut() {
    let name = "_x._tcp.big.default.svc.cluster.local.";
    let (whole, _) = ask(&resolver(3), &question(name, RecordType::SRV, Some(1232)), Protocol::Udp);
    assert_eq!((whole.answers.len(), whole.additionals.len()), (3, 3));
    let (lean, _) = ask(&resolver(6), &question(name, RecordType::SRV, None), Protocol::Udp);
    assert_eq!((lean.answers.len(), lean.additionals.len(), lean.metadata.truncation), (6, 0, false));
    let (cut, _) = ask(&resolver(60), &question(name, RecordType::SRV, None), Protocol::Udp);
    assert!(cut.metadata.truncation && !cut.answers.is_empty(), "part of the set is given");
}

#[test]
fn the_case_of_the_question_is_kept() {
    let (answer, _) =
        ask(&resolver(1), &question("bIg.DEFAULT.svc.Cluster.LOCAL.", RecordType::A, None), Protocol::Udp);
    assert_eq!(answer.queries[0].name.to_ascii(), "bIg.DEFAULT.svc.Cluster.LOCAL.");
    assert_eq!(answer.answers[0].name.to_ascii(), "bIg.DEFAULT.svc.Cluster.LOCAL.");
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
}

#[test]
fn what_is_no_proper_question_is_refused_with_its_code() {
    let resolver = resolver(1);
    let code = |message: &Message| ask(&resolver, message, Protocol::Udp).0.metadata.response_code;
    let plain = || question(BIG, RecordType::A, None);
    let mut update = plain();
    update.metadata.op_code = OpCode::Notify;
    let mut chaos = plain();
    chaos.queries[0].query_class = DNSClass::CH;
    let mut two = plain();
    two.add_query(Query::query(WireName::root(), RecordType::A));
    let mut none = plain();
    none.queries.clear();
    let mut future = question(BIG, RecordType::A, Some(1232));
    future.edns.as_mut().unwrap().set_version(1);
    let codes = [
        (code(&plain()), ResponseCode::NoError),
        (code(&update), ResponseCode::NotImp),
        (code(&chaos), ResponseCode::Refused),
        (code(&two), ResponseCode::FormErr),
        (code(&none), ResponseCode::FormErr),
        (code(&future), ResponseCode::BADVERS),
        (code(&question(BIG, RecordType::AXFR, None)), ResponseCode::Refused),
        (code(&question("example.com.", RecordType::A, None)), ResponseCode::ServFail),
    ];
    for (got, wanted) in codes {
        // 16 is BADSIG and BADVERS: the numbers are compared.
        assert_eq!(u16::from(got), u16::from(wanted));
    }
    let counted: u64 = resolver.stats.responses().iter().map(|(_, count)| count).sum();
    assert_eq!((counted, resolver.stats.queries()), (8, 8));
}

/// A query that is well-formed but for `changes`: positions and octets to overwrite, and a cut.
fn mangled() -> impl Strategy<Value = Vec<u8>> {
    let names = prop_oneof![Just(BIG), Just("."), Just("1-2-3-4.default.pod.cluster.local."), Just("a.b.")];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (
        names,
        any::<u16>(),
        prop::option::of(any::<u16>()),
        changes,
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(name, record_type, payload, changes, cut, whole)| {
            let mut bytes = question(name, RecordType::from(record_type), payload).to_vec().unwrap();
            for (at, octet) in changes {
                let at = at.index(bytes.len());
                bytes[at] = octet;
            }
            if !whole {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        })
}

/// Questions whose names are labels and then the root or a pointer to anywhere, themselves included; their number may be
/// another than the one that the header tells.
fn tangled() -> impl Strategy<Value = Vec<u8>> {
    let name = (prop::collection::vec(0_u8..64, 0..6), prop::option::of(0_u16..400));
    let told = prop_oneof![3 => Just(None), 1 => any::<u16>().prop_map(Some)];
    let questions =
        prop_oneof![2 => prop::collection::vec(name.clone(), 1), 1 => prop::collection::vec(name, 0..120)];
    (questions, told).prop_map(|(questions, told)| {
        let count = told.unwrap_or(u16::try_from(questions.len()).unwrap());
        let mut bytes = vec![0xab, 0xcd, 1, 0];
        bytes.extend(count.to_be_bytes());
        bytes.extend([0; 6]);
        for (labels, pointer) in questions {
            for length in labels {
                if length > 0 {
                    bytes.push(length);
                    bytes.extend(std::iter::repeat_n(b'x', usize::from(length)));
                }
            }
            match pointer {
                Some(to) => bytes.extend((0xc000 | to).to_be_bytes()),
                None => bytes.push(0),
            }
            bytes.extend([0, 1, 0, 1]);
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_octets_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), tcp: bool) {
        let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
        exchange(&resolver(3), bytes, protocol);
    }

    /// Loops of pointers end, and what is refused costs its sender more octets than it brings.
    #[test]
    fn tangled_questions_are_answered_once_and_other_than_one_with_a_bare_header(
        bytes in tangled(),
        tcp: bool,
    ) {
        let resolver = resolver(3);
        let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
        let answer = exchange(&resolver, bytes.clone(), protocol).unwrap();
        prop_assert_eq!(&answer[..2], &bytes[..2]);
        prop_assert!(Message::from_vec(&answer).is_ok());
        let refused: u64 = resolver.stats.refused().iter().map(|(_, count)| count).sum();
        if bytes[4..6] != [0, 1] {
            prop_assert_eq!(&answer[2..], &[0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            prop_assert_eq!(resolver.stats.refused()[1], ("questions", 1));
        }
        prop_assert_eq!(refused, u64::from(answer[3] & 0xf == ResponseCode::FormErr.low()));
    }

    /// Whatever comes is answered once with a message of its size, or dropped, and counted as one of the two.
    #[test]
    fn mangled_queries_never_panic_and_answers_are_messages_within_their_size(bytes in mangled()) {
        let resolver = resolver(60);
        let answer = exchange(&resolver, bytes.clone(), Protocol::Udp);
        let dropped: u64 = resolver.stats.dropped().iter().map(|(_, count)| count).sum();
        prop_assert_eq!((resolver.stats.queries(), dropped), if answer.is_some() { (1, 0) } else { (0, 1) });
        if let Some(answer) = answer {
            prop_assert!(answer.len() <= usize::from(UDP_PAYLOAD_BYTES));
            prop_assert_eq!((&answer[..2], answer[2] & QR), (&bytes[..2], QR));
            prop_assert!(Message::from_vec(&answer).is_ok());
        }
    }

    /// RFC 1035 section 4.1.1 (QR, opcode), RFC 9619 (one question), RFC 2136 (update), RFC 5936 (transfers): what may be asked is
    /// looked up, everything else has its one code, in both transports.
    #[test]
    fn every_operation_class_type_and_number_of_questions_has_its_code(
        operation in 0_u8..16, class in prop_oneof![Just(1_u16), any::<u16>()], record_type: u16, questions in 0_u16..101,
        response: bool, tcp: bool,
    ) {
        let resolver = resolver(3);
        let mut bytes = question(BIG, RecordType::A, None).to_vec().unwrap();
        let end = bytes.len();
        bytes[end - 4..end - 2].copy_from_slice(&record_type.to_be_bytes());
        bytes[end - 2..].copy_from_slice(&class.to_be_bytes());
        let one = bytes.split_off(HEADER_BYTES);
        bytes[2] = u8::from(response) << 7 | operation << 3;
        bytes[4..6].copy_from_slice(&questions.to_be_bytes());
        (0..questions).for_each(|_| bytes.extend_from_slice(&one));
        let answer = exchange(&resolver, bytes, if tcp { Protocol::Tcp } else { Protocol::Udp });
        let code = answer.map(|answer| answer[3] & 0xf);
        let expected = match (response, operation, questions, class, record_type) {
            (true, ..) => None,
            (_, 1.., ..) => Some(4),
            (_, _, 0 | 2.., ..) => Some(1),
            (_, _, _, 1, 251 | 252 | 41) => Some(5),
            (_, _, _, 1, _) => Some(0),
            _ => Some(5),
        };
        prop_assert_eq!(code, expected);
    }
}
