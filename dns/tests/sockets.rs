//! The DNS room on real sockets, in namespaces of the tests' own, asked by dig, glibc and busybox.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeSet;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{RData, Record, RecordType};
use nix::sys::socket::{setsockopt, sockopt};
use place::*;
use weft_model::objects::{Protocol, ServiceKind};
use weft_model::snapshot::Objects;
use weft_model::{Health, Snapshot};
use weft_netstack::reconcile::{Loop, Pace};

fn example() -> Vec<Record> {
    let record = |name: &str, ttl, data| Record::from_rdata(name.parse().unwrap(), ttl, data);
    vec![
        record("www.example.com.", 60, RData::A(A::new(192, 0, 2, 80))),
        record("7.2.0.192.in-addr.arpa.", 60, RData::PTR(PTR("seven.example.com.".parse().unwrap()))),
        record("zero.example.com.", 0, RData::A(A::new(192, 0, 2, 90))),
    ]
}

fn entries<K: Clone, V>(objects: &Objects<K, V>) -> impl Iterator<Item = (K, Arc<V>)> {
    objects.iter().map(|(key, value)| (key.clone(), value.clone()))
}

/// The zoo and a headless Service with sixty endpoints.
fn with_big() -> Snapshot {
    let mut cluster = zoo();
    let endpoints = (1..=60).map(|n| endpoint(&format!("10.42.9.{n}"), None, true)).collect();
    let big = snapshot(
        &[],
        [service("default", "big", ServiceKind::Headless)],
        [slice("default", "big", "big-4", &[("x", Protocol::Tcp, 80)], endpoints)],
    );
    Arc::make_mut(&mut cluster.services).extend(entries(&big.services));
    Arc::make_mut(&mut cluster.endpoint_slices).extend(entries(&big.endpoint_slices));
    cluster
}

#[test]
fn dig_gets_answers_over_udp_and_tcp_in_both_families() {
    in_namespace(|place| {
        place.serve(&zoo());
        for server in ["10.43.0.10", "fd00:43::a"] {
            for transport in ["+notcp", "+tcp"] {
                let ask = |what: &str| run(&format!("dig @{server} {transport} +tries=1 +short {what}"));
                assert_eq!(ask("web.default.svc.cluster.local A"), "10.43.0.80\n");
                assert_eq!(ask("web.default.svc.cluster.local AAAA"), "fd00:43::80\n");
                assert_eq!(ask("-x 10.43.0.80"), "web.default.svc.cluster.local.\n");
                assert_eq!(ask("-x fd00:43::80"), "web.default.svc.cluster.local.\n");
                assert_eq!(ask("dns-version.cluster.local TXT"), "\"1.1.0\"\n");
                assert_eq!(
                    ask("_http._tcp.web.default.svc.cluster.local SRV"),
                    "0 100 80 web.default.svc.cluster.local.\n"
                );
            }
        }
    });
}

#[test]
fn codes_flags_and_the_negative_ttl_are_as_dig_reads_them() {
    in_namespace(|place| {
        place.serve(&zoo());
        let no_name = dig("nothing.default.svc.cluster.local");
        assert!(no_name.contains("status: NXDOMAIN") && no_name.contains("flags: qr aa rd ra;"), "{no_name}");
        assert!(
            no_name.contains(
                "cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5"
            ),
            "{no_name}"
        );
        let no_data = dig("v4only.default.svc.cluster.local AAAA");
        assert!(
            no_data.contains("status: NOERROR") && no_data.contains("ANSWER: 0, AUTHORITY: 1"),
            "{no_data}"
        );
        assert!(
            dig("web.default.svc.cluster.local").contains("web.default.svc.cluster.local. 5 IN A 10.43.0.80")
        );
        assert!(dig("+edns=1 +noednsnegotiation web.default.svc.cluster.local").contains("status: BADVERS"));
        assert!(dig("web.default.svc.cluster.local CH A").contains("status: REFUSED"));
        assert!(dig("+cookie web.default.svc.cluster.local").contains("status: NOERROR"));
        let responses = place.stats.responses();
        assert_eq!(responses[3], ("NXDOMAIN", 1));
        assert_eq!(place.stats.requests(), [("udp", 6), ("tcp", 0)]);
        dig("+tcp web.default.svc.cluster.local");
        assert_eq!(place.stats.requests(), [("udp", 6), ("tcp", 1)]);
        assert_eq!(responses[5], ("REFUSED", 1));
    });
}

#[test]
fn sockets_open_before_the_address_is_local_and_answer_once_it_is() {
    in_namespace(|place| {
        place.start();
        let applied = place.apply(&zoo());
        assert_eq!(applied.failed, Vec::<String>::new());
        assert_eq!(applied.changed.iter().filter(|line| line.starts_with("listening on")).count(), 4);
        place.route_cluster_dns();
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn before_the_first_plan_cluster_names_wait_for_it_and_others_are_forwarded() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.route_cluster_dns();
        place.start();
        assert!(
            dig("+time=5 web.default.svc.cluster.local").contains("status: SERVFAIL"),
            "there is no plan"
        );
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| dig_short("+time=5 +tries=1 web.default.svc.cluster.local"));
            let reverse = scope.spawn(|| dig_short("+time=5 +tries=1 -x 10.43.0.80"));
            std::thread::sleep(Duration::from_millis(500));
            place.apply(&zoo());
            assert_eq!(asked.join().unwrap(), ["10.43.0.80"]);
            assert_eq!(reverse.join().unwrap(), ["web.default.svc.cluster.local."]);
        });
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn a_large_set_is_cut_by_udp_and_whole_by_tcp() {
    in_namespace(|place| {
        place.serve(&with_big());
        for size in ["+noedns", "+bufsize=512", "+bufsize=800"] {
            let cut = dig(&format!("+ignore {size} big.default.svc.cluster.local"));
            assert!(cut.contains("flags: qr aa tc rd ra;"), "{size}: {cut}");
            assert!(cut.matches("10.42.9.").count() >= 25, "{size}: {cut}");
            assert_eq!(cut.contains("EDNS: version: 0"), size != "+noedns", "{size}: {cut}");
        }
        // Without +ignore dig asks again by TCP.
        assert_eq!(dig_short("+noedns big.default.svc.cluster.local").len(), 60);
        assert_eq!(dig_short("+bufsize=1232 big.default.svc.cluster.local").len(), 60);
        assert_eq!(dig_short("_x._tcp.big.default.svc.cluster.local SRV").len(), 60);
    });
}

#[test]
fn the_case_of_the_question_comes_back() {
    in_namespace(|place| {
        place.serve(&zoo());
        let text = dig("wEb.DeFaUlT.sVc.ClUsTeR.lOcAl");
        assert!(text.contains("wEb.DeFaUlT.sVc.ClUsTeR.lOcAl. 5 IN A 10.43.0.80"), "{text}");
    });
}

#[test]
fn addresses_rotate_from_query_to_query() {
    in_namespace(|place| {
        place.serve(&zoo());
        let firsts: Vec<String> =
            (0..2).map(|_| dig_short("db.default.svc.cluster.local A").remove(0)).collect();
        assert_ne!(firsts[0], firsts[1]);
    });
}

#[test]
fn an_external_name_is_chased_outside_and_inside() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("outside.default.svc.cluster.local"), ["www.example.com.", "192.0.2.80"]);
        let alias = dig_short("alias2.default.svc.cluster.local");
        assert_eq!(
            alias,
            ["alias.default.svc.cluster.local.", "web.default.svc.cluster.local.", "10.43.0.80"]
        );
        assert!(dig("circle.default.svc.cluster.local").contains("status: SERVFAIL"));
    });
}

#[test]
fn the_rest_is_forwarded_once_and_then_kept() {
    in_namespace(|place| {
        let upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        let text = dig("WWW.example.com");
        assert!(
            text.contains("flags: qr rd ra;") && text.contains("WWW.example.com. 60 IN A 192.0.2.80"),
            "{text}"
        );
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
        assert_eq!((upstream.asked(), place.stats.forwarded(), place.stats.cache_hits()), (1, 1, 1));
        assert_eq!(dig_short("-x 192.0.2.7"), ["seven.example.com."]);
        assert!(dig("nothing.example.com").contains("status: NXDOMAIN"));
        let before = upstream.asked();
        dig("zero.example.com");
        dig("zero.example.com");
        assert_eq!(upstream.asked(), before + 2, "a TTL of zero is not kept");
        // Unknown reverse names in our ranges never leave the node.
        assert!(dig("-x 10.43.9.9").contains("status: NXDOMAIN"));
        assert_eq!(upstream.asked(), before + 2);
    });
}

#[test]
fn do_reaches_the_upstream_and_is_kept_apart() {
    in_namespace(|place| {
        let upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        dig("+nodnssec www.example.com");
        assert!(!upstream.last.lock().unwrap().as_ref().unwrap().edns.as_ref().unwrap().flags().dnssec_ok);
        dig("+dnssec www.example.com");
        assert!(upstream.last.lock().unwrap().as_ref().unwrap().edns.as_ref().unwrap().flags().dnssec_ok);
        assert_eq!(upstream.asked(), 2);
    });
}

#[test]
fn forged_replies_of_an_upstream_are_ignored() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::ForgeriesFirst, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
    });
}

#[test]
fn a_truncated_upstream_answer_is_fetched_by_tcp() {
    in_namespace(|place| {
        let upstream = Upstream::start("127.0.0.2", Manner::Truncate, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("+ignore www.example.com"), ["192.0.2.80"]);
        assert_eq!(upstream.asked(), 2);
    });
}

#[test]
fn a_part_of_an_answer_counts_only_where_no_upstream_gives_the_whole() {
    in_namespace(|place| {
        let _part = Upstream::start("127.0.0.2", Manner::TruncateForGood, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        let by_udp = dig("+ignore www.example.com");
        assert!(by_udp.contains("flags: qr tc rd ra") && by_udp.contains("192.0.2.80"), "{by_udp}");
        assert!(dig("+tcp www.example.com").contains("status: SERVFAIL"));
        let _whole = Upstream::start("127.0.0.3", Manner::Plain, example());
        place.nameservers(&["127.0.0.2", "127.0.0.3"]);
        eventually("the second is asked", || {
            let by_udp = dig("+ignore www.example.com");
            by_udp.contains("flags: qr rd ra") && by_udp.contains("192.0.2.80")
        });
        assert_eq!(dig_short("+tcp www.example.com"), ["192.0.2.80"]);
    });
}

#[test]
fn an_upstream_without_edns_is_asked_plainly() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::NoEdns, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
    });
}

#[test]
fn names_are_spelled_at_random_and_the_client_gets_its_own_spelling() {
    in_namespace(|place| {
        let upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        let spelled =
            |upstream: &Upstream| upstream.last.lock().unwrap().as_ref().unwrap().queries[0].name.to_ascii();
        let mut spellings = BTreeSet::new();
        for number in 0..8 {
            dig(&format!("n{number}.some-long-name-of-many-letters.example.com"));
            spellings.insert(spelled(&upstream)[2..].to_owned());
        }
        assert!(spellings.len() > 1, "always spelled alike: {spellings:?}");
        for _ in 0..2 {
            let text = dig("wWw.Example.COM");
            assert!(text.contains("wWw.Example.COM. 60 IN A 192.0.2.80"), "{text}");
        }
        assert_eq!(place.stats.cache_hits(), 1);
    });
}

#[test]
fn an_upstream_that_changes_the_spelling_is_asked_by_tcp_and_then_plainly() {
    in_namespace(|place| {
        let upstream = Upstream::start("127.0.0.2", Manner::LowerCase, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        // Thirteen letters: once in eight thousand times the random spelling is the lower one.
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
        assert_eq!(upstream.asked(), 2, "by UDP, then by TCP");
        assert_eq!(dig_short("-x 192.0.2.7"), ["seven.example.com."]);
        assert_eq!(upstream.asked(), 3);
    });
}

#[test]
fn records_that_nobody_asked_for_are_not_given_on() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Stuffed, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        for _ in 0..2 {
            let text = dig("www.example.com");
            assert!(text.contains("192.0.2.80") && !text.contains("bank.example"), "{text}");
        }
    });
}

#[test]
fn many_who_ask_the_same_at_one_time_cost_one_question() {
    in_namespace(|place| {
        let upstream = Upstream::start("127.0.0.2", Manner::Slow, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        let asking: Vec<_> = (0..8).map(|_| std::thread::spawn(|| dig_short("www.example.com"))).collect();
        for asked in asking {
            assert_eq!(asked.join().unwrap(), ["192.0.2.80"]);
        }
        assert_eq!(upstream.asked(), 1);
        dig_short("zero.example.com");
        assert_eq!(upstream.asked(), 2);
    });
}

#[test]
fn an_answer_whose_time_is_over_is_given_while_no_upstream_answers() {
    in_namespace(|place| {
        let short =
            Record::from_rdata("brief.example.com.".parse().unwrap(), 1, RData::A(A::new(192, 0, 2, 81)));
        let upstream = Upstream::start("127.0.0.2", Manner::Plain, vec![short.clone()]);
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("brief.example.com"), ["192.0.2.81"]);
        drop(upstream);
        std::thread::sleep(Duration::from_millis(1100));
        let text = dig("brief.example.com");
        assert!(text.contains("brief.example.com. 30 IN A 192.0.2.81"), "{text}");
        assert_eq!(place.stats.served_stale(), 1);
        let since = Instant::now();
        assert_eq!(dig_short("+tcp brief.example.com"), ["192.0.2.81"]);
        assert!(since.elapsed() < Duration::from_millis(900), "a failure is not tried again at once");
        assert!(dig("never-asked.example.com").contains("status: SERVFAIL"));
        let changed = Record::from_rdata(short.name.clone(), 60, RData::A(A::new(192, 0, 2, 82)));
        let _back = Upstream::start("127.0.0.2", Manner::Plain, vec![changed]);
        // A failure is remembered for five seconds.
        let until = Instant::now() + Duration::from_secs(8);
        while dig_short("brief.example.com") != ["192.0.2.82"] {
            assert!(Instant::now() < until, "the upstream is not asked again");
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}

#[test]
fn a_failure_is_remembered_for_five_seconds() {
    in_namespace(|place| {
        let failing = Upstream::start("127.0.0.2", Manner::Fail, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        for _ in 0..3 {
            assert!(dig("www.example.com").contains("status: SERVFAIL"));
        }
        assert_eq!(failing.asked(), 1);
    });
}

#[test]
fn a_question_that_comes_back_to_us_is_asked_once() {
    in_namespace(|place| {
        // A forwarder on the host whose own upstream is the cluster DNS.
        let relay = UdpSocket::bind("127.0.0.2:53").unwrap();
        relay.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        let relaying = std::thread::spawn(move || {
            let (mut buffer, mut relayed, until) = ([0; 512], 0, Instant::now() + Duration::from_secs(5));
            while Instant::now() < until {
                if let Ok((length, from)) = relay.recv_from(&mut buffer)
                    && from.port() != 53
                {
                    relay.send_to(&buffer[..length], "10.43.0.10:53").unwrap();
                    relayed += 1;
                }
            }
            relayed
        });
        assert!(dig("www.example.com").contains("status: SERVFAIL"));
        let relayed = relaying.join().unwrap();
        assert!(relayed <= 2, "{relayed} questions went round");
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn the_next_upstream_helps_when_one_fails_or_is_dead() {
    in_namespace(|place| {
        let failing = Upstream::start("127.0.0.2", Manner::Fail, example());
        let _good = Upstream::start("::1", Manner::Plain, example());
        // 127.0.0.3 refuses: nobody listens there.
        place.nameservers(&["127.0.0.3", "127.0.0.2", "::1"]);
        place.serve(&zoo());
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
        assert_eq!(failing.asked(), 1);
        assert!(place.stats.upstream_failures() >= 1);
    });
}

#[test]
fn a_silent_upstream_costs_one_try_and_is_then_asked_last() {
    in_namespace(|place| {
        // Takes datagrams and never answers.
        let _silent = UdpSocket::bind("127.0.0.3:53").unwrap();
        let _good = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.3", "127.0.0.2"]);
        place.serve(&zoo());
        assert_eq!(dig_short("www.example.com"), ["192.0.2.80"]);
        let since = Instant::now();
        assert_eq!(dig_short("-x 192.0.2.7"), ["seven.example.com."]);
        assert!(since.elapsed() < Duration::from_secs(1), "the silent one was asked first again");
    });
}

#[test]
fn with_every_upstream_dead_others_fail_and_cluster_names_go_on() {
    in_namespace(|place| {
        place.nameservers(&["127.0.0.3"]);
        place.serve(&zoo());
        assert!(dig("www.example.com").contains("status: SERVFAIL"));
        assert!(dig("outside.default.svc.cluster.local").contains("status: SERVFAIL"));
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn our_own_address_among_the_hosts_resolvers_makes_no_loop() {
    in_namespace(|place| {
        place.nameservers(&["10.43.0.10", "fd00:43::a"]);
        place.serve(&zoo());
        assert!(dig("www.example.com").contains("status: SERVFAIL"));
        assert_eq!((place.stats.queries(), place.stats.forwarded()), (1, 0));
    });
}

#[test]
fn a_changed_resolv_conf_is_followed() {
    in_namespace(|place| {
        place.serve(&zoo());
        assert!(dig("www.example.com").contains("status: SERVFAIL"));
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        eventually("the new resolver is asked", || dig_short("www.example.com") == ["192.0.2.80"]);
    });
}

#[test]
fn a_taken_port_is_named_with_the_remedy_and_the_rest_goes_on() {
    in_namespace(|place| {
        place.route_cluster_dns();
        let taken = UdpSocket::bind("10.43.0.10:53").unwrap();
        place.start();
        let applied = place.apply(&zoo());
        assert_eq!(applied.failed.len(), 1, "{:?}", applied.failed);
        assert!(applied.failed[0].contains("10.43.0.10:53/udp is taken"), "{}", applied.failed[0]);
        assert!(applied.failed[0].contains("stop it"), "{}", applied.failed[0]);
        assert_eq!(run("dig @fd00:43::a +short web.default.svc.cluster.local"), "10.43.0.80\n");
        assert_eq!(dig_short("+tcp web.default.svc.cluster.local"), ["10.43.0.80"]);
        drop(taken);
        let again = place.apply(&zoo());
        assert_eq!(
            (again.changed, again.failed),
            (vec!["listening on 10.43.0.10/udp".to_owned()], Vec::new())
        );
        assert_eq!(dig_short("+notcp web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn a_second_pass_changes_nothing_and_the_end_closes_the_sockets() {
    in_namespace(|place| {
        place.serve(&zoo());
        let again = place.apply(&zoo());
        assert_eq!(again.changed, Vec::<String>::new());
        assert!(again.details.contains(&("listening".to_owned(), "10.43.0.10 fd00:43::a".to_owned())));
        place.stop();
        eventually("the port is free", || UdpSocket::bind("10.43.0.10:53").is_ok());
        place.start();
        place.apply(&zoo());
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

#[test]
fn what_is_asked_between_two_agents_waits_in_the_kept_sockets() {
    in_namespace(|place| {
        place.route_cluster_dns();
        run("ip address add fd00:43::a/128 dev lo nodad");
        // What the service manager holds: copies of the sockets of an agent that is gone.
        let sockets = ["10.43.0.10:53", "[fd00:43::a]:53"];
        place.handover.udp = sockets.map(|address| UdpSocket::bind(address).unwrap()).into();
        place.handover.tcp = sockets.map(|address| TcpListener::bind(address).unwrap()).into();
        // And one of an address that is none of ours any more.
        place.handover.udp.push(UdpSocket::bind("127.0.0.9:53").unwrap());
        let asked: Vec<_> =
            ["+notcp @10.43.0.10", "+notcp @fd00:43::a", "+tcp @10.43.0.10", "+tcp @fd00:43::a"]
                .map(|how| format!("dig {how} +tries=1 +time=5 +short web.default.svc.cluster.local"))
                .map(|command| std::thread::spawn(move || run(&command)))
                .into();
        std::thread::sleep(Duration::from_millis(300));
        place.start();
        let applied = place.apply(&zoo());
        assert_eq!(applied.failed, Vec::<String>::new());
        for answer in asked {
            assert_eq!(answer.join().unwrap(), "10.43.0.80\n");
        }
        assert!(UdpSocket::bind("127.0.0.9:53").is_ok(), "the address that is not wanted is free again");
        assert!(UdpSocket::bind("10.43.0.10:53").is_err());
    });
}

#[test]
fn a_thousand_questions_of_one_client_wait_for_the_names_of_the_next_agent() {
    in_namespace(|place| {
        place.route_cluster_dns();
        let kept = UdpSocket::bind("10.43.0.10:53").unwrap();
        place.handover.udp = vec![kept.try_clone().unwrap()];
        place.start();
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        setsockopt(&client, sockopt::RcvBufForce, &(4 << 20)).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for id in 0..1000_u16 {
            client.send_to(&query(id, "web"), "10.43.0.10:53").unwrap();
        }
        place.apply(&zoo());
        let mut ids = BTreeSet::new();
        let mut buffer = [0; 512];
        while ids.len() < 1000 {
            let length = client.recv(&mut buffer).unwrap();
            let answer = Message::from_vec(&buffer[..length]).unwrap();
            assert_eq!(answer.answers[0].data, RData::A(A::new(10, 43, 0, 80)));
            ids.insert(answer.metadata.id);
        }
    });
}

#[test]
fn the_service_manager_is_given_every_socket_under_a_name() {
    in_namespace(|place| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        place.handover.store =
            Some(weft_netstack::kernel::descriptor_store::DescriptorStore::open(path.as_os_str()).unwrap());
        place.route_cluster_dns();
        place.start();
        let names = ["dns-udp-10.43.0.10", "dns-tcp-10.43.0.10", "dns-udp-fd00_43__a", "dns-tcp-fd00_43__a"];
        for name in names {
            let mut buffer = [0; 256];
            let length = manager.recv(&mut buffer).unwrap();
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            assert_eq!(said, format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"));
        }
    });
}

const POD: &str = "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n";

#[test]
fn the_c_library_resolves_as_in_a_pod() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&with_big());
        place.pod_resolv_conf(POD);
        assert!(run("getent ahostsv4 web").contains("10.43.0.80"));
        assert!(run("getent ahostsv6 web.default").contains("fd00:43::80"));
        let both = run("getent ahosts web.default.svc");
        assert!(both.contains("10.43.0.80") && both.contains("fd00:43::80"), "{both}");
        assert!(run("getent ahosts v4only").contains("10.43.0.4"));
        assert!(run("getent hosts 10.43.0.80").contains("web.default.svc.cluster.local"));
        assert!(run("getent ahostsv4 www.example.com").contains("192.0.2.80"));
        assert!(run("getent ahostsv4 outside").contains("192.0.2.80"));
        assert_eq!(run("getent ahostsv4 big").matches("STREAM").count(), 60);
    });
}

#[test]
fn a_static_busybox_resolves_as_in_a_pod() {
    in_namespace(|place| {
        place.serve(&zoo());
        place.pod_resolv_conf(POD);
        let text = run("busybox nslookup web.default.svc.cluster.local");
        assert!(text.contains("10.43.0.80") && text.contains("fd00:43::80"), "{text}");
        let text = run("busybox nslookup v4only.default.svc.cluster.local");
        assert!(text.contains("10.43.0.4"), "{text}");
        let text = run("busybox nslookup 10.43.0.80");
        assert!(text.contains("web.default.svc.cluster.local"), "{text}");
    });
}

#[test]
fn garbage_on_the_sockets_does_not_end_them() {
    in_namespace(|place| {
        use std::io::Write as _;
        place.serve(&zoo());
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for length in 0..64u8 {
            let bytes: Vec<u8> = (0..length).map(|n| n.wrapping_mul(37) ^ length).collect();
            socket.send_to(&bytes, "10.43.0.10:53").unwrap();
        }
        // A header that promises 65535 questions, and one message cut in the middle of its length.
        socket.send_to(&[0, 1, 1, 0, 255, 255, 0, 0, 0, 0, 0, 0], "10.43.0.10:53").unwrap();
        for bytes in [&[0u8][..], &[255, 255, 0], &[0, 0], &[0, 3, 1, 2, 3]] {
            TcpStream::connect("10.43.0.10:53").unwrap().write_all(bytes).unwrap();
        }
        assert_eq!(dig_short("+notcp web.default.svc.cluster.local"), ["10.43.0.80"]);
        assert_eq!(dig_short("+tcp web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}

/// For the A record of a Service in the Namespace `default`.
fn query(id: u16, service: &str) -> Vec<u8> {
    let mut query = Message::query();
    query.metadata.id = id;
    let name = format!("{service}.default.svc.cluster.local.").parse().unwrap();
    query.add_query(Query::query(name, RecordType::A));
    query.to_vec().unwrap()
}

#[test]
fn a_burst_is_answered_whole_from_the_address_that_was_asked() {
    in_namespace(|place| {
        place.serve(&zoo());
        for server in ["10.43.0.10:53", "[fd00:43::a]:53"] {
            let any = if server.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            for id in 0..200_u16 {
                // Every fourth takes the long way: an alias that is followed.
                let name = if id % 4 == 0 { "alias" } else { "web" };
                socket.send_to(&query(id, name), server).unwrap();
            }
            let mut ids = BTreeSet::new();
            let mut buffer = [0; 512];
            while ids.len() < 200 {
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(from, server.parse().unwrap());
                let answer = Message::from_vec(&buffer[..length]).unwrap();
                let last = answer.answers.last().unwrap();
                assert_eq!(last.data, RData::A(A::new(10, 43, 0, 80)));
                ids.insert(answer.metadata.id);
            }
        }
    });
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat()
}

/// The next message of a connection.
fn next_message(stream: &mut TcpStream) -> Message {
    use std::io::Read as _;
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).unwrap();
    Message::from_vec(&message).unwrap()
}

#[test]
fn questions_that_come_together_on_a_connection_are_answered_each_and_in_order() {
    in_namespace(|place| {
        use std::io::Write as _;
        place.serve(&with_big());
        for server in ["10.43.0.10:53", "[fd00:43::a]:53"] {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            // At hand, the long way, one that does not exist, and one too large for what is read or sent at once.
            let name = |id: u16| ["web", "alias", "absent", "big"][usize::from(id) % 4];
            let questions = (0..400).map(|id| framed(&query(id, name(id)))).collect::<Vec<_>>().concat();
            let (most, last) = questions.split_at(questions.len() - 9);
            stream.write_all(most).unwrap();
            for id in 0..399 {
                let answer = next_message(&mut stream);
                let (code, addresses) = match name(id) {
                    "absent" => (ResponseCode::NXDomain, 0),
                    "big" => (ResponseCode::NoError, 60),
                    "alias" => (ResponseCode::NoError, 2),
                    _ => (ResponseCode::NoError, 1),
                };
                assert_eq!((answer.metadata.id, answer.metadata.response_code), (id, code), "{server}");
                assert_eq!(answer.answers.len(), addresses, "{server} {id}");
            }
            stream.write_all(last).unwrap();
            assert_eq!(next_message(&mut stream).metadata.id, 399, "{server}");
        }
        assert_eq!(place.stats.requests()[1], ("tcp", 800));
    });
}

#[test]
fn an_answer_does_not_wait_for_the_upstream_of_the_question_behind_it() {
    in_namespace(|place| {
        use std::io::Write as _;
        // Takes datagrams and never answers.
        let _silent = UdpSocket::bind("127.0.0.3:53").unwrap();
        place.nameservers(&["127.0.0.3"]);
        place.serve(&zoo());
        for server in ["10.43.0.10:53", "[fd00:43::a]:53"] {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let mut outside = Message::query();
            outside.add_query(Query::query(
                format!("x{}.example.com.", server.len()).parse().unwrap(),
                RecordType::A,
            ));
            let both = [framed(&query(7, "web")), framed(&outside.to_vec().unwrap())].concat();
            stream.write_all(&both).unwrap();
            assert_eq!(next_message(&mut stream).metadata.id, 7, "{server}");
        }
    });
}

#[test]
fn what_gets_no_answer_is_counted_by_its_reason() {
    in_namespace(|place| {
        place.serve(&zoo());
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let response = [0, 1, 0x81, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];
        for bytes in [&response[..], &response, &response[..11]] {
            socket.send_to(bytes, "10.43.0.10:53").unwrap();
        }
        eventually("three are counted", || place.stats.dropped()[..2] == [("short", 1), ("response", 2)]);
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(socket.recv(&mut [0; 512]).is_err(), "no answer to an answer");
    });
}

#[test]
fn what_a_watched_client_asks_is_shown_and_what_others_ask_is_not() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        let explainer = place.explainer.clone().unwrap();
        let pod = [ip("127.0.0.7")];
        dig("-b 127.0.0.7 web.default.svc.cluster.local");
        let first = explainer.log(&pod, None);
        assert_eq!(first.entries, [], "what was asked before somebody looked");
        dig("-b 127.0.0.7 Web.default.svc.cluster.local");
        dig("-b 127.0.0.8 v4only.default.svc.cluster.local");
        dig("-b 127.0.0.7 +tcp www.example.com");
        dig("-b 127.0.0.7 nothing.default.svc.cluster.local AAAA");
        let told = |after| {
            let page = explainer.log(&pod, Some(after));
            let line = |entry: &weft_dns::Logged| {
                let weft_dns::Logged { transport, name, record_type, code, answer, .. } = entry;
                format!("{transport} {record_type} {name} {code}: {answer}")
            };
            (page.entries.iter().map(line).collect::<Vec<_>>(), page.last)
        };
        let (lines, last) = told(first.last);
        assert_eq!(
            lines,
            [
                "udp A Web.default.svc.cluster.local. No Error: 10.43.0.80 (5 s)",
                "tcp A www.example.com. No Error: 192.0.2.80 (60 s)",
                "udp AAAA nothing.default.svc.cluster.local. Non-Existent Domain: no such name",
            ]
        );
        assert_eq!(told(last).0, Vec::<String>::new());
    });
}

#[test]
fn questions_answers_and_upstreams_are_counted_under_the_names_of_coredns() {
    in_namespace(|place| {
        let _upstream = Upstream::start("127.0.0.2", Manner::Plain, example());
        place.nameservers(&["127.0.0.2"]);
        place.serve(&zoo());
        dig("web.default.svc.cluster.local");
        dig("+noedns v4only.default.svc.cluster.local AAAA");
        dig("+tcp +dnssec www.example.com");
        dig("www.example.com");
        dig("nothing.example.com");
        let server = "server=\"dns://:53\",zone=\".\",view=\"\"";
        let of = |name: &str, labels: &str| place.metric(&format!("{name}{{{server}{labels}"));
        let requests = "coredns_dns_requests_total";
        assert_eq!(of(requests, ",proto=\"udp\",family=\"1\",type=\"A\"}"), 3.0);
        assert_eq!(of(requests, ",proto=\"udp\",family=\"1\",type=\"AAAA\"}"), 1.0);
        assert_eq!(of(requests, ",proto=\"tcp\",family=\"1\",type=\"A\"}"), 1.0);
        assert_eq!(of("coredns_dns_do_requests_total", "}"), 1.0);
        assert_eq!(of("coredns_dns_responses_total", ",rcode=\"NXDOMAIN\"}"), 1.0);
        assert_eq!(of("coredns_dns_request_duration_seconds_count", "}"), 5.0);
        assert_eq!(of("coredns_dns_response_size_bytes_count", ",proto=\"udp\"}"), 4.0);
        assert_eq!(of("coredns_dns_request_size_bytes_sum", ",proto=\"udp\"}"), 3.0 * 1232.0 + 512.0);
        // With DO and without are two questions.
        assert_eq!((of("coredns_cache_misses_total", "}"), of("coredns_cache_hits_total", "")), (3.0, 0.0));
        dig("www.example.com");
        assert_eq!(of("coredns_cache_hits_total", ",type=\"success\"}"), 1.0);
        // The denial came without SOA, so it is not kept.
        assert_eq!(of("coredns_cache_entries", ",type=\"success\"}"), 2.0);
        let upstream = "{proxy_name=\"forward\",to=\"127.0.0.2:53\"";
        assert_eq!(
            place.metric(&format!(
                "coredns_proxy_request_duration_seconds_count{upstream},rcode=\"NOERROR\"}}"
            )),
            2.0
        );
        assert_eq!(place.metric("coredns_forward_requests_total{to=\"127.0.0.2:53\"}"), 3.0);
        assert_eq!(place.metric("coredns_panics_total"), 0.0);
    });
}

/// KEP-2164 and the SLI "DNS programming latency": "from when service spec or list of its Ready pods change to when it is
/// reflected in that specific instance".
#[test]
fn a_change_of_a_headless_service_is_timed_from_its_trigger_and_what_was_there_is_not() {
    in_namespace(|place| {
        let name = "coredns_kubernetes_dns_programming_duration_seconds";
        let changed = |seconds_ago: u64| {
            let mut cluster = zoo();
            let slices = Arc::make_mut(&mut cluster.endpoint_slices);
            let slice = slices.values_mut().find(|slice| &*slice.key.name == "db-4").unwrap();
            let at = std::time::SystemTime::now() - Duration::from_secs(seconds_ago);
            let millis = at.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
            let slice = Arc::make_mut(slice);
            slice.triggered_millis = Some(i64::try_from(millis).unwrap());
            slice.endpoints.truncate(usize::from(seconds_ago > 60) + 1);
            cluster
        };
        place.serve(&changed(3600));
        assert_eq!(place.metric(&format!("{name}_count")), 0.0, "it was there when we came");
        place.apply(&changed(2));
        assert_eq!(dig_short("db.default.svc.cluster.local"), ["10.42.1.5"]);
        assert_eq!(place.metric(&format!("{name}_count")), 1.0);
        let sum = place.metric(&format!("{name}_sum"));
        assert!((2.0..4.0).contains(&sum), "{sum}");
    });
}

#[test]
fn a_client_that_asks_without_end_is_held_to_its_rate_and_takes_nothing_from_others() {
    in_namespace(|place| {
        place.queries_per_second = Some(50);
        place.serve(&zoo());
        let mut query = Message::query();
        query.add_query(Query::query("web.default.svc.cluster.local.".parse().unwrap(), RecordType::A));
        let query = query.to_vec().unwrap();
        let flood = UdpSocket::bind("127.0.0.7:0").unwrap();
        flood.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let started = Instant::now();
        let ask = || flood.send_to(&query, "10.43.0.10:53").unwrap();
        (0..200).for_each(|_| assert_eq!(ask(), query.len()));
        let mut buffer = [0; 512];
        let answers = std::iter::from_fn(|| flood.recv(&mut buffer).ok()).count();
        let most = 50 + usize::try_from(started.elapsed().as_millis()).unwrap() / 20 + 1;
        assert!((50..=most).contains(&answers), "{answers} of at most {most}");
        let dropped = place.stats.dropped();
        assert_eq!(dropped[3], ("rate", u64::try_from(200 - answers).unwrap()));
        assert_eq!(dig_short("-b 127.0.0.8 web.default.svc.cluster.local"), ["10.43.0.80"]);
        let (calm, web) = (std::sync::atomic::AtomicBool::new(false), "+short web.default.svc.cluster.local");
        let by_tcp = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !calm.load(std::sync::atomic::Ordering::SeqCst) {
                    (0..50).for_each(|_| assert_eq!(ask(), query.len()));
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let heard = attempt(&format!("dig @10.43.0.10 -b 127.0.0.7 +tcp +tries=1 {web}"));
            calm.store(true, std::sync::atomic::Ordering::SeqCst);
            heard
        });
        assert!(!by_tcp.contains("10.43.0.80"), "by TCP the bucket is the same: {by_tcp}");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(dig_short("-b 127.0.0.7 web.default.svc.cluster.local"), ["10.43.0.80"], "it fills again");
    });
}

#[test]
fn a_client_that_holds_many_connections_takes_none_from_others() {
    in_namespace(|place| {
        use std::io::Read as _;
        place.serve(&zoo());
        let greedy: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect("10.43.0.10:53").unwrap()).collect();
        greedy.iter().for_each(|stream| stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap());
        let closed = |mut stream: &TcpStream| matches!(stream.read(&mut [0]), Ok(0));
        assert!(greedy.iter().skip(16).all(closed), "all but the first sixteen are closed at once");
        run("ip address add 10.42.0.99/32 dev lo");
        assert_eq!(dig_short("-b 10.42.0.99 +tcp web.default.svc.cluster.local"), ["10.43.0.80"]);
        assert_eq!(dig_short("+notcp web.default.svc.cluster.local"), ["10.43.0.80"]);
        drop(greedy);
        let again = "dig @10.43.0.10 +tcp +tries=1 +time=1 +short web.default.svc.cluster.local";
        eventually("the client's own places are free again", || attempt(again) == "10.43.0.80\n");
    });
}

#[test]
fn the_loop_serves_a_change_of_the_snapshot() {
    in_namespace(|place| {
        place.route_cluster_dns();
        place.start();
        let (planner, applier) = (std::mem::take(&mut place.planner), place.applier.take().unwrap());
        let (snapshot_tx, snapshot_rx) = tokio::sync::watch::channel(None);
        let (dns, handle) = Loop::new("dns", planner, applier, Pace::default(), snapshot_rx);
        let running = place.runtime.spawn(dns.run());
        snapshot_tx.send_replace(Some(Arc::new(zoo())));
        eventually("the first Snapshot is served", || {
            dig_short("web.default.svc.cluster.local") == ["10.43.0.80"]
        });
        let mut changed = zoo();
        changed.generation = changed.generation.next();
        let mut web = service("default", "web", cluster_ips(&["10.43.0.81"]));
        web.ports = vec![port("http", Protocol::Tcp, 80)];
        Arc::make_mut(&mut changed.services).insert(web.key.clone(), Arc::new(web));
        snapshot_tx.send_replace(Some(Arc::new(changed)));
        eventually("the change is served", || dig_short("web.default.svc.cluster.local") == ["10.43.0.81"]);
        assert!(dig("-x 10.43.0.80").contains("status: NXDOMAIN"));
        eventually("the report is out", || handle.report().health() == Health::Ok);
        assert_eq!(handle.report().last_change.as_deref(), Some("Service default/web: 2 names, 3 gone"));
        drop(snapshot_tx);
        place.runtime.block_on(running).unwrap().unwrap();
    });
}

#[test]
fn one_client_cannot_keep_the_forwarder_from_others() {
    in_namespace(|place| {
        // Takes datagrams and never answers.
        let _silent = UdpSocket::bind("127.0.0.3:53").unwrap();
        place.nameservers(&["127.0.0.3"]);
        place.serve(&zoo());
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        for number in 0..100 {
            let mut query = Message::query();
            query.add_query(Query::query(format!("n{number}.example.com.").parse().unwrap(), RecordType::A));
            socket.send_to(&query.to_vec().unwrap(), "10.43.0.10:53").unwrap();
        }
        let mut buffer = [0; 512];
        let mut refused_at_once = 0;
        while let Ok(length) = socket.recv(&mut buffer) {
            let answer = Message::from_vec(&buffer[..length]).unwrap();
            assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
            refused_at_once += 1;
        }
        assert_eq!((refused_at_once, place.stats.forwarded()), (36, 64));
        assert_eq!(dig_short("web.default.svc.cluster.local"), ["10.43.0.80"]);
    });
}
