//! `sessionAffinity: ClientIP` with real connections: who stays, for how long, and what makes a client move.

use super::*;

/// The Services of `cluster` with affinity for these seconds; `None` switches it off.
fn sticky(mut objects: Vec<Value>, seconds: Option<u32>) -> Vec<Value> {
    for service in &mut objects[..2] {
        let spec = &mut service["spec"];
        spec["sessionAffinity"] = json!(if seconds.is_some() { "ClientIP" } else { "None" });
        if let Some(seconds) = seconds {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        spec["type"] = json!("LoadBalancer");
    }
    objects[0]["status"] =
        json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}, {"ip": "2001:db8:b::1"}]}});
    objects
}

const BALANCERS: [&str; 2] = ["198.51.100.1", "2001:db8:b::1"];

/// What nft makes of the rules while they remember clients.
fn nft_can_list_it() {
    run(
        "nft list ruleset | grep -q 'update @affinity4'; nft -j list ruleset > /dev/null; nft list map inet weft-proxy affinity6 > /dev/null",
    );
}

/// The endpoint that answered, with its client's address.
fn endpoint(to: SocketAddr) -> String {
    let answers = answers(to);
    assert_eq!(answers.len(), 1, "{to}: {answers:?}");
    answers[0].split(' ').next().unwrap().to_owned()
}

#[test]
fn a_client_stays_with_one_endpoint_at_every_kind_of_address_over_tcp_and_udp() {
    in_node(|rig| {
        rig.serve_all();
        let outside = &rig.spaces[OUTSIDE];
        run(&format!(
            "ip -n {outside} route add 198.51.100.0/24 via 192.0.2.1
             ip -n {outside} route add 2001:db8:b::/64 via 2001:db8::1 dev eth0"
        ));
        rig.apply(sticky(everywhere("Cluster"), Some(10_800)));
        for (family, balancer) in FAMILIES.iter().zip(BALANCERS) {
            for to in [at(family.vip, 80), at(family.node, 30080), at(balancer, 80)] {
                rig.within(POD_B, move || endpoint(to));
                endpoint(to);
            }
            for to in [at(family.node, 30080), at(balancer, 80)] {
                rig.within(OUTSIDE, move || endpoint(to));
            }
            let to = at(family.vip, 80);
            let seen = rig.within(POD_A, move || {
                let any: IpAddr = if to.is_ipv6() { "::" } else { "0.0.0.0" }.parse().unwrap();
                let once = || {
                    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
                    socket.set_read_timeout(Some(WAIT)).unwrap();
                    socket.send_to(b"?", to).unwrap();
                    let mut buffer = [0; 64];
                    let length = socket.recv(&mut buffer).unwrap();
                    String::from_utf8_lossy(&buffer[..length]).into_owned()
                };
                (0..20).map(|_| once()).collect::<std::collections::BTreeSet<_>>()
            });
            assert_eq!(seen.len(), 1, "{seen:?}");
        }
        nft_can_list_it();
        assert_eq!(rig.apply(sticky(everywhere("Cluster"), Some(10_800))).changed, Vec::<String>::new());
    });
}

#[test]
fn a_client_stays_through_churn_and_a_restart_and_moves_only_when_its_endpoint_goes() {
    in_node(|rig| {
        rig.serve_all();
        let of = |names: &[&str]| {
            let of_family = |family: &'static Family| {
                let all = [
                    ("a", family.pod_a, "node-a"),
                    ("b", family.pod_b, "node-a"),
                    ("remote", family.remote, "node-b"),
                ];
                let kept = all.into_iter().filter(|(name, ..)| names.contains(name));
                kept.map(|(_, address, node)| (address, node)).collect::<Vec<_>>()
            };
            sticky(cluster(&of_family(&FAMILIES[0]), &of_family(&FAMILIES[1]), "Cluster"), Some(600))
        };
        for family in &FAMILIES {
            let to = at(family.vip, 80);
            rig.apply(of(&["b"]));
            let ask = |rig: &Rig| rig.within(POD_A, move || endpoint(to));
            assert_eq!(ask(rig), "b");
            for names in [&["a", "b", "remote"][..], &["a", "b"], &["b", "remote"], &["a", "b", "remote"]] {
                rig.apply(of(names));
                assert_eq!(ask(rig), "b", "{names:?}");
            }
            rig.applier = ProxyApplier::new();
            rig.planner = ProxyPlanner::default();
            assert_eq!(rig.apply(of(&["a", "b", "remote"])).changed, Vec::<String>::new());
            assert_eq!(ask(rig), "b", "the agent was restarted");
            let gone = rig.apply(of(&["a", "remote"]));
            assert!(gone.changed.iter().any(|line| line.contains("affinity forgotten")), "{gone:?}");
            let next = ask(rig);
            assert_ne!(next, "b");
            rig.apply(of(&["a", "b", "remote"]));
            assert_eq!(ask(rig), next, "an endpoint that comes back takes nobody away");
            nft_can_list_it();
            let off = rig.apply(sticky(everywhere("Cluster"), None));
            assert!(off.changed.iter().any(|line| line == "delete set affinity4"), "{off:?}");
            assert_eq!(rig.within(POD_A, move || answers(to)).len(), 3, "switched off");
        }
    });
}

#[test]
fn a_client_is_forgotten_after_its_time_without_a_connection() {
    in_node(|rig| {
        rig.serve_all();
        rig.apply(sticky(everywhere("Cluster"), Some(2)));
        for family in &FAMILIES {
            let to = at(family.vip, 80);
            rig.within(POD_A, move || {
                let first = endpoint(to);
                for _ in 0..4 {
                    std::thread::sleep(Duration::from_millis(800));
                    assert_eq!(endpoint(to), first, "each connection begins the time anew");
                }
                let moved = (0..12).any(|_| {
                    std::thread::sleep(Duration::from_millis(2100));
                    ask(to).unwrap().split(' ').next() != Some(first.as_str())
                });
                assert!(moved, "one of three endpoints for ever");
            });
        }
    });
}
