//! Kubernetes DNS-Based Service Discovery specification 1.1.0, sentence by sentence, on the pure answer function.

#![allow(clippy::unwrap_used, reason = "tests may fail by panic")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use hickory_proto::rr::RecordType::{A, AAAA, ANY, CNAME, NS, PTR, SOA, SRV, TXT};
use weft_dns::{Answer, DnsPlanner, Groups, Name, Question, SoaPlace, Store, Zones};
use weft_model::objects::{Protocol, ServiceKind};
use weft_netstack::reconcile::Planner as _;

#[test]
fn there_must_be_a_txt_record_named_dns_version() {
    assert_eq!(
        records(&store(&zoo()), "dns-version.cluster.local", TXT),
        ["dns-version.cluster.local. TXT \"1.1.0\""]
    );
}

#[test]
fn a_service_with_a_cluster_ip_has_an_a_record_and_an_aaaa_record() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "web.default.svc.cluster.local", A),
        ["web.default.svc.cluster.local. A 10.43.0.80"]
    );
    assert_eq!(
        records(&store, "web.default.svc.cluster.local", AAAA),
        ["web.default.svc.cluster.local. AAAA fd00:43::80"]
    );
}

#[test]
fn each_named_port_of_a_cluster_ip_service_has_an_srv_record() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "_http._tcp.web.default.svc.cluster.local", SRV),
        ["_http._tcp.web.default.svc.cluster.local. SRV 0 100 80 web.default.svc.cluster.local."]
    );
    assert_eq!(
        records(&store, "_dns-udp._udp.web.default.svc.cluster.local", SRV),
        ["_dns-udp._udp.web.default.svc.cluster.local. SRV 0 100 53 web.default.svc.cluster.local."]
    );
    assert_no_name(&store, "_http._udp.web.default.svc.cluster.local");
}

#[test]
fn srv_answers_bring_the_addresses_of_their_targets() {
    let answer = local(&store(&zoo()), "_http._tcp.web.default.svc.cluster.local", SRV);
    let additionals: Vec<String> = answer.additionals.iter().map(|(_, data)| data.to_string()).collect();
    assert_eq!(additionals, ["A 10.43.0.80", "AAAA fd00:43::80"]);
}

#[test]
fn unnamed_ports_do_not_have_an_srv_record() {
    let store = store(&zoo());
    let all: Vec<String> =
        plan(&zoo()).plan.to_string().lines().filter(|l| l.contains(" SRV ")).map(str::to_owned).collect();
    assert!(
        all.iter().all(|line| line.starts_with("_http._tcp.") || line.starts_with("_dns-udp._udp.")),
        "{all:?}"
    );
    assert_no_data(&store, "v4only.default.svc.cluster.local", SRV);
}

#[test]
fn a_cluster_ip_has_a_ptr_record_in_both_families() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "80.0.43.10.in-addr.arpa", PTR),
        ["80.0.43.10.in-addr.arpa. PTR web.default.svc.cluster.local."]
    );
    let reverse = Name::reverse(ip("fd00:43::80")).to_string();
    assert_eq!(records(&store, &reverse, PTR), [format!("{reverse} PTR web.default.svc.cluster.local.")]);
}

#[test]
fn a_headless_service_has_a_record_for_each_ready_endpoint() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "db.default.svc.cluster.local", A),
        ["db.default.svc.cluster.local. A 10.42.1.5", "db.default.svc.cluster.local. A 10.42.2.6"]
    );
    assert_eq!(
        records(&store, "db.default.svc.cluster.local", AAAA),
        ["db.default.svc.cluster.local. AAAA fd00:42::5", "db.default.svc.cluster.local. AAAA fd00:42::6"]
    );
}

#[test]
fn an_endpoint_with_a_hostname_has_a_record_under_that_hostname() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "db-0.db.default.svc.cluster.local", A),
        ["db-0.db.default.svc.cluster.local. A 10.42.1.5"]
    );
    assert_eq!(
        records(&store, "db-0.db.default.svc.cluster.local", AAAA),
        ["db-0.db.default.svc.cluster.local. AAAA fd00:42::5"]
    );
    assert_no_name(&store, "10-42-1-5.db.default.svc.cluster.local");
    assert_no_name(&store, "db-9.db.default.svc.cluster.local");
}

#[test]
fn an_endpoint_without_a_hostname_is_named_by_its_dashed_address() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "10-42-2-6.db.default.svc.cluster.local", A),
        ["10-42-2-6.db.default.svc.cluster.local. A 10.42.2.6"]
    );
    assert_eq!(
        records(&store, "fd00-42--6.db.default.svc.cluster.local", AAAA),
        ["fd00-42--6.db.default.svc.cluster.local. AAAA fd00:42::6"]
    );
}

#[test]
fn a_headless_service_without_ready_endpoints_is_nxdomain() {
    assert_no_name(&store(&zoo()), "idle.default.svc.cluster.local");
}

#[test]
fn not_ready_addresses_are_published_when_the_service_says_so() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "peers.default.svc.cluster.local", A),
        ["peers.default.svc.cluster.local. A 10.42.3.1"]
    );
    assert_eq!(
        records(&store, "peers-0.peers.default.svc.cluster.local", A),
        ["peers-0.peers.default.svc.cluster.local. A 10.42.3.1"]
    );
}

#[test]
fn each_endpoint_and_named_port_of_a_headless_service_has_an_srv_record() {
    let owner = "_http._tcp.db.default.svc.cluster.local.";
    assert_eq!(
        records(&store(&zoo()), owner, SRV),
        [
            format!("{owner} SRV 0 33 8080 10-42-2-6.db.default.svc.cluster.local."),
            format!("{owner} SRV 0 33 8080 db-0.db.default.svc.cluster.local."),
            format!("{owner} SRV 0 33 8080 fd00-42--6.db.default.svc.cluster.local."),
        ]
    );
}

#[test]
fn an_endpoint_of_a_headless_service_has_a_ptr_record_with_its_own_name() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "5.1.42.10.in-addr.arpa", PTR),
        ["5.1.42.10.in-addr.arpa. PTR db-0.db.default.svc.cluster.local."]
    );
    assert_eq!(
        records(&store, "6.2.42.10.in-addr.arpa", PTR),
        ["6.2.42.10.in-addr.arpa. PTR 10-42-2-6.db.default.svc.cluster.local."]
    );
    let reverse = Name::reverse(ip("fd00:42::5")).to_string();
    assert_eq!(records(&store, &reverse, PTR), [format!("{reverse} PTR db-0.db.default.svc.cluster.local.")]);
}

#[test]
fn a_pod_behind_two_headless_services_has_two_ptr_records() {
    let endpoints = || vec![endpoint("10.42.1.5", Some("a"), true)];
    let two = snapshot(
        &["default"],
        [service("default", "one", ServiceKind::Headless), service("default", "two", ServiceKind::Headless)],
        [slice("default", "one", "one", &[], endpoints()), slice("default", "two", "two", &[], endpoints())],
    );
    assert_eq!(records(&store(&two), "5.1.42.10.in-addr.arpa", PTR).len(), 2);
}

#[test]
fn an_external_name_service_is_a_cname_and_nothing_else() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "outside.default.svc.cluster.local", CNAME),
        ["outside.default.svc.cluster.local. CNAME www.example.com."]
    );
    let onward = local(&store, "outside.default.svc.cluster.local", A);
    assert_eq!(onward.onward, Some(Name::parse("www.example.com").unwrap()));
    assert_no_name(&store, "_http._tcp.outside.default.svc.cluster.local");
    assert_no_name(&store, "x.outside.default.svc.cluster.local");
}

#[test]
fn an_alias_inside_the_zone_is_followed_with_the_aliases_first() {
    let answer = local(&store(&zoo()), "alias2.default.svc.cluster.local", A);
    let texts: Vec<String> = answer.records.iter().map(|(name, data)| format!("{name} {data}")).collect();
    assert_eq!(
        texts,
        [
            "alias2.default.svc.cluster.local. CNAME alias.default.svc.cluster.local.",
            "alias.default.svc.cluster.local. CNAME web.default.svc.cluster.local.",
            "web.default.svc.cluster.local. A 10.43.0.80",
        ]
    );
}

#[test]
fn an_alias_to_a_missing_name_is_nxdomain_with_the_alias_in_the_answer() {
    let answer = local(&store(&zoo()), "dangling.default.svc.cluster.local", A);
    assert!(answer.name_error && answer.records.len() == 1 && answer.soa.is_some(), "{answer:?}");
}

#[test]
fn an_alias_that_goes_in_a_circle_is_a_failure() {
    assert_eq!(ask(&store(&zoo()), "circle.default.svc.cluster.local", A), Answer::AliasLoop);
    assert_eq!(records(&store(&zoo()), "circle.default.svc.cluster.local", CNAME).len(), 1);
}

#[test]
fn an_external_name_that_is_an_address_is_a_problem_and_has_no_name() {
    let bad = snapshot(
        &["default"],
        [service("default", "bad", ServiceKind::ExternalName("192.0.2.1".into()))],
        [],
    );
    let planned = plan(&bad);
    assert_eq!(planned.problems.len(), 1);
    assert!(planned.problems[0].message.contains("spec.externalName"), "{}", planned.problems[0]);
    assert_no_name(&store(&bad), "bad.default.svc.cluster.local");
}

#[test]
fn a_port_name_that_is_no_label_spoils_only_its_own_record() {
    let mut web = service("default", "web", cluster_ips(&["10.43.0.1"]));
    web.ports = vec![port(&"x".repeat(63), Protocol::Tcp, 1), port("good", Protocol::Tcp, 2)];
    let cluster = snapshot(&["default"], [web], []);
    assert_eq!(plan(&cluster).problems.len(), 1);
    assert_eq!(records(&store(&cluster), "_good._tcp.web.default.svc.cluster.local", SRV).len(), 1);
}

#[test]
fn aaaa_of_a_service_with_only_ipv4_is_no_data() {
    assert_no_data(&store(&zoo()), "v4only.default.svc.cluster.local", AAAA);
}

#[test]
fn empty_non_terminals_are_no_data() {
    let store = store(&zoo());
    for name in [
        "cluster.local",
        "svc.cluster.local",
        "pod.cluster.local",
        "default.svc.cluster.local",
        "empty.svc.cluster.local",
        "empty.pod.cluster.local",
        "_tcp.web.default.svc.cluster.local",
        "_tcp.db.default.svc.cluster.local",
        "dns.cluster.local",
        "0.43.10.in-addr.arpa",
        "43.10.in-addr.arpa",
    ] {
        assert_no_data(&store, name, A);
        assert_no_data(&store, name, AAAA);
    }
}

#[test]
fn unknown_names_are_nxdomain() {
    let store = store(&zoo());
    for name in [
        "nothing.default.svc.cluster.local",
        "web.nowhere.svc.cluster.local",
        "nowhere.svc.cluster.local",
        "web.default.cluster.local",
        "example.com.cluster.local",
        "www.example.com.default.svc.cluster.local",
        "x.web.default.svc.cluster.local",
        "10-42-1-8.web.default.svc.cluster.local",
        "81.0.43.10.in-addr.arpa",
        "9.9.42.10.in-addr.arpa",
    ] {
        assert_no_name(&store, name);
    }
}

#[test]
fn pod_names_resolve_in_existing_namespaces_only() {
    let store = store(&zoo());
    assert_eq!(
        records(&store, "10-42-1-5.default.pod.cluster.local", A),
        ["10-42-1-5.default.pod.cluster.local. A 10.42.1.5"]
    );
    assert_no_data(&store, "10-42-1-5.default.pod.cluster.local", AAAA);
    assert_eq!(
        records(&store, "fd00-42--5.default.pod.cluster.local", AAAA),
        ["fd00-42--5.default.pod.cluster.local. AAAA fd00:42::5"]
    );
    assert_no_data(&store, "fd00-42--5.default.pod.cluster.local", A);
    for name in [
        "10-42-1-5.nowhere.pod.cluster.local",
        "10-42-1-500.default.pod.cluster.local",
        "web.default.pod.cluster.local",
        "x.10-42-1-5.default.pod.cluster.local",
        "10-42-1-5.pod.cluster.local",
    ] {
        assert_no_name(&store, name);
    }
}

#[test]
fn the_zone_has_a_soa_record_and_a_name_server_with_addresses() {
    let store = store(&zoo());
    let soa = local(&store, "cluster.local", SOA).soa.unwrap();
    assert_eq!((soa.0, soa.1.server.to_string()), (SoaPlace::Answer, "ns.dns.cluster.local.".to_owned()));
    assert_eq!(records(&store, "cluster.local", NS), ["cluster.local. NS ns.dns.cluster.local."]);
    assert_eq!(records(&store, "ns.dns.cluster.local", A), ["ns.dns.cluster.local. A 10.43.0.10"]);
    assert_eq!(records(&store, "ns.dns.cluster.local", AAAA), ["ns.dns.cluster.local. AAAA fd00:43::a"]);
}

#[test]
fn negative_answers_carry_the_soa_of_the_zone_they_are_in() {
    let store = store(&zoo());
    let apex = |name| local(&store, name, A).soa.unwrap().1.apex.to_string();
    assert_eq!(apex("nothing.default.svc.cluster.local"), "cluster.local.");
    assert_eq!(apex("9.9.43.10.in-addr.arpa"), "43.10.in-addr.arpa.");
}

#[test]
fn reverse_names_outside_the_cluster_ranges_are_for_the_forwarder() {
    let store = store(&zoo());
    for name in ["1.2.0.192.in-addr.arpa", "10.in-addr.arpa", "in-addr.arpa", "example.com", "local", ""] {
        assert_eq!(ask(&store, name, PTR), Answer::Elsewhere, "{name}");
    }
}

#[test]
fn an_endpoint_outside_the_cluster_ranges_has_its_ptr_record_all_the_same() {
    let cluster = snapshot(
        &["default"],
        [service("default", "nas", ServiceKind::Headless)],
        [slice("default", "nas", "nas", &[], vec![endpoint("192.0.2.7", Some("disk"), true)])],
    );
    let store = store(&cluster);
    assert_eq!(records(&store, "7.2.0.192.in-addr.arpa", PTR).len(), 1);
    assert_eq!(ask(&store, "7.2.0.192.in-addr.arpa", A), Answer::Elsewhere);
    assert_eq!(ask(&store, "2.0.192.in-addr.arpa", PTR), Answer::Elsewhere);
}

#[test]
fn any_asks_for_every_record_of_the_name() {
    assert_eq!(records(&store(&zoo()), "web.default.svc.cluster.local", ANY).len(), 2);
}

#[test]
fn before_the_first_plan_cluster_names_are_not_ready_and_others_are_forwarded() {
    let store = Store::new(Zones::new(&config()).ok());
    for name in ["web.default.svc.cluster.local", "cluster.local", "10.0.43.10.in-addr.arpa"] {
        assert_eq!(ask(&store, name, A), Answer::NotReady, "{name}");
    }
    assert_eq!(ask(&store, "example.com", A), Answer::Elsewhere);
}

#[test]
fn a_service_range_that_comes_later_is_a_zone_of_ours_and_no_name_is_unanswered_meanwhile() {
    let many = (0..2_000).map(|n| service("default", &format!("s{n}"), cluster_ips(&["10.43.1.1"])));
    let mut cluster = snapshot(&["default"], many, []);
    let store = Arc::new(Store::new(Zones::new(&cluster.config).ok()));
    let mut planner = DnsPlanner::default();
    let before = planner.plan(&cluster).plan;
    store.write(&Groups::new(), &before);
    assert_eq!(ask(&store, "9.0.200.10.in-addr.arpa", PTR), Answer::Elsewhere);
    Arc::make_mut(&mut cluster.config).service_cidrs.push("10.200.0.0/24".parse().unwrap());
    let after = planner.plan(&cluster).plan;
    let done = AtomicBool::new(false);
    let asked = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(records(&store, "s7.default.svc.cluster.local", A).len(), 1);
                asked += 1;
            }
            asked
        });
        store.write(&before.groups, &after);
        done.store(true, Ordering::Relaxed);
        asking.join().unwrap()
    });
    assert!(asked > 0);
    assert_no_name(&store, "9.0.200.10.in-addr.arpa");
}

#[test]
fn records_rotate_with_every_turn_and_aliases_stay_first() {
    let store = store(&zoo());
    let question = Question { name: Name::parse("db.default.svc.cluster.local").unwrap(), record_type: A };
    let first = |turn| match store.answer(&question, turn) {
        Answer::Local(local) => local.records[0].1.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!([first(0), first(1), first(2)], ["A 10.42.1.5", "A 10.42.2.6", "A 10.42.1.5"]);
    let alias = Question { name: Name::parse("alias.default.svc.cluster.local").unwrap(), record_type: A };
    for turn in 0..3 {
        let Answer::Local(local) = store.answer(&alias, turn) else { panic!("local") };
        assert_eq!(local.records[0].1.record_type(), CNAME);
    }
}

#[test]
fn a_removed_service_takes_its_empty_non_terminals_with_it() {
    let mut planner = DnsPlanner::default();
    let store = Store::default();
    let full = planner.plan(&zoo()).plan;
    store.write(&Groups::new(), &full);
    let mut less = zoo();
    Arc::make_mut(&mut less.services).retain(|key, _| &*key.name != "web");
    let without_web = planner.plan(&less).plan;
    let written: Vec<String> =
        store.write(&full.groups, &without_web).iter().map(ToString::to_string).collect();
    assert_eq!(written, ["Service default/web: 5 names gone"]);
    for name in ["web", "_tcp.web", "_http._tcp.web", "_udp.web"] {
        assert_no_name(&store, &format!("{name}.default.svc.cluster.local"));
    }
    assert_no_name(&store, "80.0.43.10.in-addr.arpa");
    assert_no_data(&store, "default.svc.cluster.local", A);
    less.services = Arc::default();
    less.namespaces = Arc::default();
    let bare = planner.plan(&less).plan;
    store.write(&without_web.groups, &bare);
    assert_no_name(&store, "default.svc.cluster.local");
    assert_no_name(&store, "svc.cluster.local");
}

#[test]
fn a_service_that_turns_headless_or_alias_changes_in_one_write() {
    let mut planner = DnsPlanner::default();
    let store = Store::default();
    let mut groups = std::sync::Arc::<Groups>::default();
    let kinds = [
        (cluster_ips(&["10.43.0.1"]), "A 10.43.0.1"),
        (ServiceKind::Headless, "A 10.42.0.9"),
        (ServiceKind::ExternalName("example.com".into()), "CNAME example.com."),
        (cluster_ips(&["10.43.0.2"]), "A 10.43.0.2"),
    ];
    for (kind, expected) in kinds {
        let endpoints = vec![endpoint("10.42.0.9", None, true)];
        let cluster = snapshot(
            &["default"],
            [service("default", "x", kind)],
            [slice("default", "x", "x-1", &[], endpoints)],
        );
        let plan = planner.plan(&cluster).plan;
        store.write(&groups, &plan);
        groups = plan.groups;
        assert_eq!(
            records(&store, "x.default.svc.cluster.local", A),
            [format!("x.default.svc.cluster.local. {expected}")]
        );
    }
    assert_no_name(&store, "1.0.43.10.in-addr.arpa");
    assert_no_name(&store, "9.0.42.10.in-addr.arpa");
}

#[test]
fn an_unchanged_service_keeps_the_identity_of_its_plan() {
    let mut planner = DnsPlanner::default();
    let cluster = zoo();
    let first = planner.plan(&cluster).plan;
    let second = planner.plan(&cluster).plan;
    assert!(
        first.groups.values().zip(second.groups.values()).filter(|(a, b)| Arc::ptr_eq(a, b)).count() > 10
    );
    assert_eq!(Store::default().write(&Groups::new(), &first).len(), first.groups.len());
    // Fresh objects with equal content: planned anew, equal plan, same identity.
    let third = planner.plan(&zoo()).plan;
    let key = |plan: &weft_dns::DnsPlan| plan.groups.values().nth(5).unwrap().clone();
    assert!(Arc::ptr_eq(&key(&first), &key(&third)));
}

#[test]
fn readers_never_miss_a_name_while_its_records_change() {
    let clusters = ["10.43.0.1", "10.43.0.2"].map(|address| {
        let mut web = service("default", "web", cluster_ips(&[address]));
        web.ports = vec![port("http", Protocol::Tcp, 80)];
        snapshot(&["default"], [web], [])
    });
    let mut planner = DnsPlanner::default();
    let plans = clusters.map(|cluster| planner.plan(&cluster).plan);
    let store = Store::default();
    store.write(&Groups::new(), &plans[0]);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 0..500 {
                store.write(&plans[round % 2].groups, &plans[(round + 1) % 2]);
            }
        });
        let mut asked = 0;
        while !writer.is_finished() || asked == 0 {
            let answer = records(&store, "web.default.svc.cluster.local", A);
            assert_eq!(answer.len(), 1, "{answer:?}");
            assert_no_data(&store, "_tcp.web.default.svc.cluster.local", A);
            asked += 1;
        }
    });
}
