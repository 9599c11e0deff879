//! What people and older versions do to a table, and what owners do at run time.

use std::time::Duration;

use super::*;

fn two_services() -> Table {
    proxy(&[
        ("10.96.0.1", 80, &[("10.1.0.1", 8080), ("10.1.0.2", 8080)]),
        ("fd96::1", 80, &[("fd01::1", 8080), ("fd01::2", 8080)]),
    ])
}

/// A plan keeps a key to one group. Where one did not, what the first pass could do no later one may fail at.
#[test]
fn a_key_in_two_groups_settles() {
    in_namespace(|| {
        let mut desired = two_services();
        let set = desired.sets.get_mut("service-ips").unwrap();
        let key = set.elements().next().unwrap().0.to_vec();
        for (name, verdict) in [("0", Verdict::Drop), ("zz", Verdict::Accept)] {
            set.groups.insert(name.into(), group([(key.clone(), ElementData::Verdict(verdict))]));
        }
        NftTable::new("weft-proxy").apply(&desired, Trust::Nothing).unwrap();
        settles(&mut NftTable::new("weft-proxy"), &desired);
    });
}

#[test]
fn whatever_is_done_by_hand_heals() {
    in_namespace(|| {
        let desired = two_services();
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let healthy = sorted_listing();
        let element = "10.96.0.1 . tcp . 80";
        for damage in [
            "flush chain inet weft-proxy services".to_owned(),
            "add rule inet weft-proxy services drop".into(),
            "insert rule inet weft-proxy services tcp dport { 1, 2 } drop".into(),
            "add rule inet weft-proxy services jump { accept; }".into(),
            format!("delete element inet weft-proxy service-ips {{ {element} }}"),
            "add element inet weft-proxy service-ips { 10.9.9.9 . udp . 1 : drop }".into(),
            "flush map inet weft-proxy endpoints".into(),
            "add chain inet weft-proxy foreign { type filter hook input priority 0; policy drop; }".into(),
            "add chain inet weft-proxy output { policy drop; }".into(),
            "add chain inet weft-proxy foreign; add rule inet weft-proxy services jump foreign".into(),
            "add set inet weft-proxy foreign { type ether_addr; flags dynamic; }".into(),
            "add table inet weft-proxy { flags dormant; }".into(),
            "delete table inet weft-proxy".into(),
            "flush ruleset".into(),
        ] {
            for trust in [Trust::Nothing, Trust::Shadow] {
                run(&format!("nft '{damage}'"));
                assert_ne!(sorted_listing(), healthy, "{damage} does no damage");
                let changed = owner.apply(&desired, trust).unwrap();
                assert!(!changed.is_empty(), "{damage}");
                assert_eq!(sorted_listing(), healthy, "after {damage}: {changed:#?}");
            }
        }
        settles(&mut owner, &desired);
    });
}

#[test]
fn damage_to_one_element_costs_one_element() {
    in_namespace(|| {
        let desired = two_services();
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        run("nft delete element inet weft-proxy service-ips '{ 10.96.0.1 . tcp . 80 }'");
        assert_eq!(
            owner.apply(&desired, Trust::Shadow).unwrap(),
            ["add element service-ips { 10.96.0.1 . tcp . 80 : goto lb-2 }"],
        );
    });
}

#[test]
fn sets_and_chains_of_another_shape_are_rebuilt() {
    in_namespace(|| {
        let desired = two_services();
        run("nft add table inet weft-proxy");
        run("nft add chain inet weft-proxy services '{ type filter hook input priority 7; }'");
        run("nft add chain inet weft-proxy prerouting");
        run("nft add chain inet weft-proxy caller");
        run("nft add rule inet weft-proxy caller jump prerouting");
        run(
            "nft add set inet weft-proxy service-ips '{ type ipv4_addr; flags interval; elements = { 1.2.3.0-1.2.3.77 } }'",
        );
        run("nft add rule inet weft-proxy caller ip saddr @service-ips drop");
        run(
            "nft add map inet weft-proxy endpoints '{ type ipv4_addr : verdict; elements = { 1.2.3.4 : jump caller } }'",
        );
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let healed = sorted_listing();
        settles(&mut owner, &desired);
        run("nft delete table inet weft-proxy");
        owner.apply(&desired, Trust::Shadow).unwrap();
        assert_eq!(healed, sorted_listing());
    });
}

#[test]
fn ranges_by_hand_in_a_set_of_prefixes_heal() {
    in_namespace(|| {
        let mut desired = table("weft-host");
        let mut nets = Set::new(vec![KeyType::Ipv6Address], SetData::None);
        nets.interval = true;
        let prefixes = ["fd00::/64", "fd00:0:0:1::/64", "fd01::/16"];
        nets.groups.insert(
            "nodes".into(),
            group(prefixes.map(|net| (vec![Datum::Net(net.parse().unwrap())], ElementData::None))),
        );
        desired.sets.insert("nets".into(), nets.clone());
        let mut owner = NftTable::new("weft-host");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let healthy = listing();
        settles(&mut owner, &desired);
        for element in ["fe80::1-fe80::7", "fe00::/16"] {
            run(&format!("nft add element inet weft-host nets '{{ {element} }}'"));
            owner.apply(&desired, Trust::Shadow).unwrap();
            assert_eq!(listing(), healthy, "{element}");
        }
        nets.groups.insert(
            "nodes".into(),
            group([(vec![Datum::Net("fd00:0:0:1::/64".parse().unwrap())], ElementData::None)]),
        );
        desired.sets.insert("nets".into(), nets);
        assert_eq!(owner.apply(&desired, Trust::Shadow).unwrap(), ["delete 2 elements of nets"]);
        settles(&mut owner, &desired);
    });
}

#[test]
fn an_element_is_replaced_and_only_it() {
    in_namespace(|| {
        let mut owner = NftTable::new("weft-proxy");
        owner
            .apply(&proxy(&[("10.96.0.1", 80, &[("10.1.0.1", 8080), ("10.1.0.2", 8080)])]), Trust::Nothing)
            .unwrap();
        let desired = proxy(&[("10.96.0.1", 80, &[("10.1.0.1", 8080), ("10.1.0.3", 8080)])]);
        assert_eq!(
            owner.apply(&desired, Trust::Shadow).unwrap(),
            [
                "delete element endpoints { 10.96.0.1 . tcp . 80 . 1 : 10.1.0.2 . 8080 }",
                "add element endpoints { 10.96.0.1 . tcp . 80 . 1 : 10.1.0.3 . 8080 }",
            ]
        );
        shows("10.96.0.1 . tcp . 80 . 0x00000001 : 10.1.0.3 . 8080");
        settles(&mut owner, &desired);
    });
}

#[test]
fn a_refusal_names_the_element_and_changes_nothing() {
    in_namespace(|| {
        let mut owner = NftTable::new("weft-proxy");
        let good = two_services();
        owner.apply(&good, Trust::Nothing).unwrap();
        let before = listing();
        let mut bad = good.clone();
        let key = vec![ip("10.96.0.7"), Datum::Protocol(Protocol::Udp), Datum::Port(53)];
        let more = [
            (
                vec![ip("10.96.0.2"), Datum::Protocol(Protocol::Udp), Datum::Port(53)],
                ElementData::Verdict(Verdict::Drop),
            ),
            (key, ElementData::Verdict(goto("nowhere"))),
        ];
        bad.sets.get_mut("service-ips").unwrap().groups.insert("bad".into(), group(more));
        let error = owner.apply(&bad, Trust::Shadow).unwrap_err();
        let text = crate::reconcile::chain(&error);
        assert_eq!(
            text,
            "table weft-proxy: add 2 elements of service-ips, at 10.96.0.7 . udp . 53: ENOENT: No such file or directory",
        );
        assert_eq!(listing(), before);
        assert_eq!(owner.apply(&good, Trust::Shadow).unwrap(), Vec::<String>::new());
    });
}

#[test]
fn more_refusals_than_the_socket_holds_are_one_error_and_the_owner_goes_on() {
    in_namespace(|| {
        let mut owner = NftTable::new("weft-proxy");
        let good = two_services();
        owner.apply(&good, Trust::Nothing).unwrap();
        let mut bad = good.clone();
        let rule = Rule::new(vec![Statement::Verdict(goto("nowhere"))]);
        bad.chains.insert("bad".into(), Chain { base: None, rules: vec![rule; 20_000] });
        let text = crate::reconcile::chain(&owner.apply(&bad, Trust::Shadow).unwrap_err());
        let expected = "table weft-proxy: add rule bad goto nowhere: ENOENT: No such file or directory (and ";
        assert!(text.starts_with(expected), "{text}");
        settles(&mut owner, &good);
    });
}

#[test]
fn elements_added_at_run_time_are_seen_by_the_next_apply() {
    in_namespace(|| {
        let mut desired = table("weft-cni");
        desired
            .sets
            .insert("pods".into(), Set::new(vec![KeyType::LinkName, KeyType::Ipv6Address], SetData::None));
        let mut owner = NftTable::new("weft-cni");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let pod = |n: u8| {
            (vec![Datum::Name(format!("weftp{n}").into()), ip(&format!("fd00::{n}"))], ElementData::None)
        };
        owner.insert("pods", &[pod(1), pod(2)]).unwrap();
        owner.insert("pods", &[pod(2), pod(3)]).unwrap();
        owner.remove("pods", &[pod(3).0, pod(9).0]).unwrap();
        assert_eq!(owner.elements("pods").unwrap(), [pod(1), pod(2)]);
        // A plan made of the leases holds the same pods.
        let set = desired.sets.get_mut("pods").unwrap();
        set.groups.insert("default/a".into(), group([pod(1)]));
        set.groups.insert("default/b".into(), group([pod(2)]));
        settles(&mut owner, &desired);
        desired.sets.get_mut("pods").unwrap().groups.remove("default/a");
        owner.insert("pods", &[pod(4)]).unwrap();
        let changed = owner.apply(&desired, Trust::Shadow).unwrap();
        assert_eq!(changed, ["delete 2 elements of pods"], "the plan is the truth");
        assert_eq!(owner.elements("pods").unwrap(), [pod(2)]);
        // Another owner object (a new process) knows the set from the kernel.
        let mut other = NftTable::new("weft-cni");
        other.insert("pods", &[pod(5)]).unwrap();
        assert_eq!(other.elements("pods").unwrap(), [pod(2), pod(5)]);
        assert!(matches!(other.insert("absent", &[pod(5)]), Err(NftError::NoSet { .. })));
        other.remove("absent", &[pod(5).0]).unwrap();
    });
}

#[test]
fn inserting_into_a_map_replaces_the_data() {
    in_namespace(|| {
        let mut owner = NftTable::new("weft-proxy");
        let desired = two_services();
        owner.apply(&desired, Trust::Nothing).unwrap();
        let mut elements = owner.elements("endpoints").unwrap();
        elements[1].1 = ElementData::AddressAndPort("10.1.0.9".parse().unwrap(), 9);
        owner.insert("endpoints", &elements).unwrap();
        assert_eq!(owner.elements("endpoints").unwrap(), elements);
        assert_eq!(owner.apply(&desired, Trust::Shadow).unwrap().len(), 2, "the plan is the truth");
    });
}

#[test]
fn a_timeout_begins_anew_with_every_insert_and_apply_leaves_it_alone() {
    in_namespace(|| {
        let mut desired = table("weft-host");
        let mut alive = Set::new(vec![KeyType::Ipv4Address], SetData::None);
        alive.timeout_millis = Some(600);
        desired.sets.insert("alive".into(), alive);
        let mut owner = NftTable::new("weft-host");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let vip = (vec![ip("10.96.0.10")], ElementData::None);
        for _ in 0..5 {
            owner.insert("alive", std::slice::from_ref(&vip)).unwrap();
            std::thread::sleep(Duration::from_millis(250));
            assert_eq!(owner.elements("alive").unwrap(), std::slice::from_ref(&vip));
            settles(&mut owner, &desired);
        }
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(owner.elements("alive").unwrap(), [], "nobody refreshed it");
        owner.remove("alive", &[vip.0]).unwrap();
    });
}

#[test]
fn other_owners_of_this_process_do_not_make_an_owner_read_its_table_again() {
    in_namespace(|| {
        let desired = two_services();
        let mut owner = NftTable::new("weft-proxy");
        owner.apply(&desired, Trust::Nothing).unwrap();
        let mut pods = table("weft-cni");
        pods.sets.insert("pods".into(), Set::new(vec![KeyType::Ipv4Address], SetData::None));
        let mut other = NftTable::new("weft-cni");
        other.apply(&pods, Trust::Nothing).unwrap();
        other.insert("pods", &[(vec![ip("10.0.0.1")], ElementData::None)]).unwrap();
        let generation = owner.generation().unwrap();
        assert!(owner.shadow_holds(generation));
        run("nft add table inet foreign");
        let generation = owner.generation().unwrap();
        assert!(!owner.shadow_holds(generation));
    });
}

#[test]
fn a_table_is_deleted_once() {
    in_namespace(|| {
        NftTable::new("weft-proxy").apply(&two_services(), Trust::Nothing).unwrap();
        assert!(NftTable::delete("weft-proxy").unwrap());
        assert!(!NftTable::delete("weft-proxy").unwrap());
        assert_eq!(run("nft list ruleset"), "");
    });
}

#[test]
fn owners_in_several_threads_and_foreign_commits_do_not_lose_changes() {
    in_namespace(|| {
        let netns = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        let threads: Vec<_> = ["weft-a", "weft-b", "weft-c"]
            .into_iter()
            .map(|name| {
                let netns = netns.try_clone().unwrap();
                std::thread::spawn(move || {
                    nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                    let mut desired = table(name);
                    desired.sets.insert("set".into(), Set::new(vec![KeyType::Port], SetData::None));
                    let mut owner = NftTable::new(name);
                    for port in 0..200 {
                        let set = desired.sets.get_mut("set").unwrap();
                        set.groups.insert(
                            port.to_string().into(),
                            group([(vec![Datum::Port(port)], ElementData::None)]),
                        );
                        owner.apply(&desired, Trust::Shadow).unwrap();
                    }
                    assert_eq!(owner.elements("set").unwrap().len(), 200);
                })
            })
            .collect();
        for _ in 0..20 {
            run("nft add table inet foreign; nft delete table inet foreign");
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
