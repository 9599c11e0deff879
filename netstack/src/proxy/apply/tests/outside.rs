//! Addresses outside the cluster: a load balancer's, one of `spec.externalIPs`, and the node's own in the hand of a load balancer.

use std::time::Instant;

use super::*;

/// By family: the load balancer's address, the external one.
const ADDRESSES: [[&str; 2]; 2] = [["198.51.100.1", "198.51.100.70"], ["2001:db8:b::1", "2001:db8:e::7"]];

fn families() -> impl Iterator<Item = (&'static Family, [&'static str; 2])> {
    FAMILIES.iter().zip(ADDRESSES)
}

fn addresses_of(index: usize) -> Vec<&'static str> {
    ADDRESSES.iter().map(|of| of[index]).collect()
}

/// The outside knows this node as the way to those addresses.
fn announce(rig: &Rig) {
    let outside = &rig.spaces[OUTSIDE];
    run(&format!(
        "ip -n {outside} route add 198.51.100.0/24 via 192.0.2.1
         ip -n {outside} route add 2001:db8:b::/64 via 2001:db8::1 dev eth0
         ip -n {outside} route add 2001:db8:e::/64 via 2001:db8::1 dev eth0"
    ));
}

/// The Services of `cluster`, of type LoadBalancer with these addresses of a load balancer and the external ones.
fn balanced(mut objects: Vec<Value>, web: &[&str], empty: &[&str], source_ranges: &[&str]) -> Vec<Value> {
    for (index, (given, external)) in [(web, addresses_of(1)), (empty, vec![])].into_iter().enumerate() {
        let spec = &mut objects[index]["spec"];
        spec["type"] = json!("LoadBalancer");
        spec["externalIPs"] = json!(external);
        if index == 0 && !source_ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = json!(source_ranges);
        }
        let ingress: Vec<Value> = given.iter().map(|ip| json!({"ip": ip})).collect();
        objects[index]["status"] = json!({"loadBalancer": {"ingress": ingress}});
    }
    objects
}

#[test]
fn every_client_reaches_every_endpoint_at_both_kinds_of_address_and_itself_too() {
    in_node(|rig| {
        rig.serve_all();
        announce(rig);
        rig.apply(balanced(everywhere("Cluster"), &addresses_of(0), &[], &[]));
        for (family, addresses) in families() {
            let Family { node, host, pod_a, outside, .. } = family;
            for address in addresses {
                let to = at(address, 80);
                let from_outside =
                    sorted([format!("a {outside}"), format!("b {outside}"), format!("remote {host}")]);
                assert_eq!(rig.within(OUTSIDE, move || answers(to)), from_outside, "{address}");
                let from_host = sorted([format!("a {node}"), format!("b {node}"), format!("remote {host}")]);
                assert_eq!(answers(to), from_host, "{address}");
                let from_pod = rig.within(POD_A, move || answers(to));
                assert_eq!(from_pod.len(), 3, "{from_pod:?}");
                assert!(
                    !from_pod.contains(&format!("a {pod_a}")),
                    "a hairpin must be masqueraded: {from_pod:?}"
                );
                assert!(
                    from_pod.contains(&format!("b {pod_a}")) && from_pod.contains(&format!("remote {pod_a}"))
                );
            }
        }
    });
}

#[test]
fn the_local_policy_keeps_the_client_drops_without_a_local_endpoint_and_is_not_about_pods_and_nodes() {
    in_node(|rig| {
        rig.serve_all();
        announce(rig);
        rig.apply(balanced(everywhere("Local"), &addresses_of(0), &[], &[]));
        for (family, addresses) in families() {
            let Family { node, host, outside, .. } = family;
            for to in addresses.map(|address| at(address, 80)) {
                let local = sorted([format!("a {outside}"), format!("b {outside}")]);
                assert_eq!(rig.within(OUTSIDE, move || answers(to)), local);
                let all = sorted([format!("a {node}"), format!("b {node}"), format!("remote {host}")]);
                assert_eq!(answers(to), all);
            }
        }
        let remote = |family: &'static Family| [(family.remote, "node-b")];
        let elsewhere = cluster(&remote(&FAMILIES[0]), &remote(&FAMILIES[1]), "Local");
        rig.apply(balanced(elsewhere, &addresses_of(0), &[], &[]));
        for (family, addresses) in families() {
            for to in addresses.map(|address| at(address, 80)) {
                let dropped = rig.within(OUTSIDE, move || ask(to).unwrap_err().kind());
                assert_eq!(dropped, ErrorKind::TimedOut);
                assert_eq!(rig.within(POD_A, move || answers(to)), [format!("remote {}", family.pod_a)]);
                assert_eq!(answers(to), [format!("remote {}", family.host)]);
            }
        }
    });
}

#[test]
fn source_ranges_are_about_the_client_s_own_address_at_the_load_balancer_s_address_only() {
    in_node(|rig| {
        rig.serve_all();
        announce(rig);
        let reach = |rig: &mut Rig, ranges: &[&str]| {
            rig.apply(balanced(everywhere("Cluster"), &addresses_of(0), &[], ranges));
            let reached = |(_, [balanced, external]): (&Family, [&'static str; 2])| {
                let (to, other) = (at(balanced, 80), at(external, 80));
                assert!(rig.within(POD_A, move || ask(other)).is_ok(), "an external address has no ranges");
                let all = [rig.within(OUTSIDE, move || ask(to)), rig.within(POD_A, move || ask(to)), ask(to)];
                all.map(|answer| match answer {
                    Ok(_) => true,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::TimedOut, "dropped, not refused");
                        false
                    }
                })
            };
            families().map(reached).collect::<Vec<_>>()
        };
        let everybody = reach(rig, &["0.0.0.0/0", "::/0"]);
        assert_eq!(everybody, [[true; 3]; 2]);
        let outside = reach(rig, &[" 192.0.2.9/32 ", "2001:db8::9/128"]);
        assert_eq!(outside, [[true, false, false]; 2]);
        let pods = reach(rig, &["10.244.0.0/16", "10.244.1.0/24", "fd00:244::/56"]);
        assert_eq!(pods, [[false, true, false]; 2]);
        let node = reach(rig, &["192.0.2.1/32", "2001:db8::1/128"]);
        assert_eq!(node, [[false, false, true]; 2]);
        run("ip addr add 198.18.0.1/32 dev eth0; ip addr add 2001:db8:1::1/128 dev eth0 nodad");
        for (other, [balanced, _]) in ["198.18.0.1", "2001:db8:1::1"].into_iter().zip(ADDRESSES) {
            let socket = UdpSocket::bind(at(other, 0)).unwrap();
            socket.set_read_timeout(Some(WAIT)).unwrap();
            // The kernel makes the route of an IPv6 address a moment after the address, and only then takes it for its own.
            let deadline = Instant::now() + Duration::from_secs(5);
            while let Err(error) = socket.send_to(b"?", at(balanced, 80)) {
                assert!(Instant::now() < deadline, "{other}: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(socket.recv(&mut [0; 64]).is_ok(), "the node's first address lets its others in");
        }
        let nobody = reach(rig, &["203.0.113.0/24", "2001:db8:ffff::/48"]);
        assert_eq!(nobody, [[false; 3]; 2]);
        let everybody = reach(rig, &[]);
        assert_eq!(everybody, [[true; 3]; 2]);
    });
}

#[test]
fn without_endpoints_these_addresses_refuse_too() {
    in_node(|rig| {
        announce(rig);
        rig.apply(balanced(cluster(&[], &[], "Local"), &addresses_of(0), &[], &[]));
        for (_, addresses) in families() {
            for to in addresses.map(|address| at(address, 80)) {
                let refused = move || ask(to).unwrap_err().kind();
                for kind in [refused(), rig.within(POD_A, refused), rig.within(OUTSIDE, refused)] {
                    assert_eq!(kind, ErrorKind::ConnectionRefused, "{to}");
                }
            }
        }
    });
}

/// As k3s' ServiceLB does it.
#[test]
fn a_load_balancer_may_give_the_node_s_own_address_and_the_node_keeps_its_other_ports() {
    in_node(|rig| {
        rig.serve_all();
        for family in &FAMILIES {
            for port in [80, 2222] {
                let listener = TcpListener::bind(at(family.node, port)).unwrap();
                std::thread::spawn(move || {
                    while let Ok((mut stream, client)) = listener.accept() {
                        let _ = write!(stream, "node {}", client.ip());
                    }
                });
            }
        }
        let own: Vec<&str> = FAMILIES.iter().map(|family| family.node).collect();
        let pods = |family: &'static Family| [(family.pod_b, "node-a")];
        rig.apply(balanced(cluster(&pods(&FAMILIES[0]), &pods(&FAMILIES[1]), "Cluster"), &own, &[], &[]));
        for family in &FAMILIES {
            let Family { node, outside, pod_a, .. } = family;
            for (space, client) in [(OUTSIDE, outside), (POD_A, pod_a)] {
                let seen = rig.within(space, || [80, 2222].map(|port| ask(at(node, port)).unwrap()));
                assert_eq!(seen, [format!("b {client}"), format!("node {client}")]);
            }
        }
        rig.apply(balanced(cluster(&[], &[], "Cluster"), &[], &own, &[]));
        for family in &FAMILIES {
            let refused = rig.within(OUTSIDE, || ask(at(family.node, 80)).unwrap_err().kind());
            assert_eq!(refused, ErrorKind::ConnectionRefused, "the load balancer's Service has no endpoint");
            assert!(rig.within(OUTSIDE, || ask(at(family.node, 2222))).is_ok());
        }
    });
}

#[test]
fn a_udp_client_of_a_load_balancer_moves_with_the_endpoints() {
    in_node(|rig| {
        rig.serve_all();
        announce(rig);
        for (family, [balancer, _]) in families() {
            let only = |address: &'static str, node: &'static str| {
                let endpoints = [(address, node)];
                let (v4, v6) =
                    if family.ipv6 { (&[][..], &endpoints[..]) } else { (&endpoints[..], &[][..]) };
                balanced(cluster(v4, v6, "Cluster"), &addresses_of(0), &[], &[])
            };
            let client = rig.within(OUTSIDE, || {
                let any: IpAddr = if family.ipv6 { "::" } else { "0.0.0.0" }.parse().unwrap();
                let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
                socket.set_read_timeout(Some(WAIT)).unwrap();
                socket
            });
            let ask = || {
                client.send_to(b"?", at(balancer, 80)).unwrap();
                let mut buffer = [0; 64];
                client.recv(&mut buffer).map(|n| String::from_utf8_lossy(&buffer[..n]).into_owned())
            };
            rig.apply(only(family.pod_a, "node-a"));
            assert_eq!(ask().unwrap(), format!("a {}", family.outside));
            rig.apply(only(family.remote, "node-b"));
            assert_eq!(ask().unwrap(), format!("remote {}", family.host));
            rig.applier = ProxyApplier::new();
            rig.apply(only(family.pod_b, "node-a"));
            assert_eq!(ask().unwrap(), format!("b {}", family.outside), "after a restart of the agent");
            rig.applier = ProxyApplier::new();
            rig.planner = ProxyPlanner::default();
            rig.apply(cluster(&[], &[], "Cluster"));
            assert!(ask().is_err(), "the address went while the agent was away");
        }
    });
}

/// What the health check port says to the outside, status and body.
fn health(rig: &Rig, to: SocketAddr) -> std::io::Result<(u16, Value)> {
    let path = format!("/run/netns/{}", rig.spaces[OUTSIDE]);
    let question = move || -> std::io::Result<String> {
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: lb\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let asking = async { tokio::task::spawn_blocking(|| std::thread::spawn(question).join().unwrap()).await };
    let answer = rig.runtime.block_on(asking).unwrap()?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap()))
}

#[test]
fn a_load_balancer_is_told_how_many_ready_endpoints_this_node_has() {
    in_node(|rig| {
        let checked = |mut objects: Vec<Value>, terminating: bool| {
            objects[0]["spec"]["type"] = json!("LoadBalancer");
            objects[0]["spec"]["healthCheckNodePort"] = json!(31_000);
            for slice in objects.iter_mut().filter(|_| terminating).skip(2) {
                for endpoint in slice["endpoints"].as_array_mut().unwrap() {
                    endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
                }
            }
            objects
        };
        let told = |rig: &Rig, family: &Family| {
            let (status, body) = health(rig, at(family.node, 31_000)).unwrap();
            assert_eq!(body["service"], json!({"namespace": "default", "name": "web"}));
            assert_eq!(body["serviceProxyHealthy"], json!(true));
            (status, body["localEndpoints"].as_u64().unwrap())
        };
        rig.apply(checked(everywhere("Local"), false));
        for family in &FAMILIES {
            assert_eq!(told(rig, family), (200, 2));
        }
        rig.apply(checked(everywhere("Local"), true));
        for family in &FAMILIES {
            assert_eq!(told(rig, family), (503, 0), "those that drain take no new connections");
        }
        rig.apply(checked(everywhere("Cluster"), false));
        for family in &FAMILIES {
            let closed = health(rig, at(family.node, 31_000)).unwrap_err().kind();
            assert_eq!(closed, ErrorKind::ConnectionRefused);
        }
    });
}
