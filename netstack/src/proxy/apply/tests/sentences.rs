//! Sentences about Services that the other files do not try: what is not Weft's to answer, and what connections share.

use std::net::UdpSocket;

use nix::sys::socket::{setsockopt, sockopt};

use super::*;

/// An address of a load balancer in the subnet of the outside, which this node does not bear.
const ON_LINK: [&str; 2] = ["192.0.2.77", "2001:db8::77"];

fn any(family: &Family) -> IpAddr {
    if family.ipv6 { "::" } else { "0.0.0.0" }.parse().unwrap()
}

/// Without a port given, or from one that others may have too.
fn udp(family: &Family, port: u16) -> UdpSocket {
    let domain = if family.ipv6 {
        nix::sys::socket::AddressFamily::Inet6
    } else {
        nix::sys::socket::AddressFamily::Inet
    };
    let fd = nix::sys::socket::socket(
        domain,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::empty(),
        None,
    )
    .unwrap();
    setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    let address = nix::sys::socket::SockaddrStorage::from(SocketAddr::new(any(family), port));
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).unwrap();
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket
}

fn said(socket: &UdpSocket, question: &[u8]) -> std::io::Result<String> {
    socket.send(question)?;
    let mut buffer = vec![0; 65_536];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn ping_answers(to: &'static str) -> bool {
    Command::new("ping").args(["-c", "1", "-W", "1", "-q", to]).output().unwrap().status.success()
}

/// A ClusterIP is a rule and no machine.
#[test]
fn nobody_answers_a_ping_to_a_cluster_ip() {
    in_node(|rig| {
        rig.apply(everywhere("Cluster"));
        for family in &FAMILIES {
            let Family { vip, unallocated, node, .. } = family;
            assert!(rig.within(POD_A, || ping_answers(node)), "a ping to the node comes back");
            for to in [vip, unallocated] {
                assert!(!rig.within(POD_A, || ping_answers(to)), "{to}");
                assert!(!ping_answers(to), "{to}");
            }
        }
    });
}

/// Who answers for the address of a load balancer is the load balancer's business.
#[test]
fn the_proxy_answers_no_arp_and_no_neighbour_solicitation_for_a_load_balancers_address() {
    in_node(|rig| {
        rig.serve_all();
        let mut objects = everywhere("Cluster");
        objects[0]["spec"]["type"] = json!("LoadBalancer");
        objects[0]["status"] = json!({"loadBalancer": {"ingress": ON_LINK.map(|ip| json!({"ip": ip}))}});
        rig.apply(objects);
        for (family, address) in FAMILIES.iter().zip(ON_LINK) {
            let seen = rig.within(OUTSIDE, move || ask(at(address, 80)).unwrap_err().kind());
            assert!(matches!(seen, ErrorKind::HostUnreachable | ErrorKind::TimedOut), "{address}: {seen}");
            let neighbours = Command::new("ip")
                .args(["-n", &rig.spaces[OUTSIDE], "neigh", "show", address])
                .output()
                .unwrap();
            let neighbours = String::from_utf8(neighbours.stdout).unwrap();
            assert!(!neighbours.contains("lladdr"), "{neighbours}");
            let from_pod = rig.within(POD_A, move || answers(at(address, 80)));
            assert_eq!(from_pod.len(), 3, "{}: pods are short-circuited all the same", family.vip);
        }
    });
}

#[test]
fn a_node_port_opens_no_listener_so_that_a_program_may_have_the_number_elsewhere() {
    in_node(|rig| {
        rig.serve_all();
        rig.apply(everywhere("Cluster"));
        let _mine =
            [TcpListener::bind("127.0.0.1:30080").unwrap(), TcpListener::bind("[::1]:30080").unwrap()];
        let _all = [TcpListener::bind("0.0.0.0:30081").unwrap()];
        for family in &FAMILIES {
            let node = family.node;
            assert_eq!(rig.within(OUTSIDE, move || answers(at(node, 30080))).len(), 3);
        }
        for loopback in ["127.0.0.1:30080", "[::1]:30080"] {
            let mine = TcpStream::connect_timeout(&loopback.parse().unwrap(), WAIT);
            assert!(mine.is_ok(), "{loopback} is the program's: {mine:?}");
        }
    });
}

/// Conformance: "should serve endpoints on same port and different protocols".
#[test]
fn of_one_port_number_with_two_protocols_each_can_go_alone() {
    in_node(|rig| {
        rig.serve_all();
        // Not the asker itself: the kernel counts redirects of a hairpin against the errors that it may send to a host in a second.
        let of = |family: &'static Family| [(family.pod_b, "node-a"), (family.remote, "node-b")];
        let both = || cluster(&of(&FAMILIES[0]), &of(&FAMILIES[1]), "Cluster");
        for gone in [0, 1] {
            rig.apply(both());
            let mut objects = both();
            objects[0]["spec"]["ports"].as_array_mut().unwrap().remove(gone);
            rig.apply(objects);
            for family in &FAMILIES {
                for to in [at(family.vip, 80), at(family.node, 30080)] {
                    let over_tcp = rig.within(POD_A, move || ask(to).map_err(|error| error.kind()));
                    let over_udp = rig.within(POD_A, move || {
                        let socket = udp(family, 0);
                        socket.connect(to).unwrap();
                        said(&socket, b"?").map_err(|error| error.kind())
                    });
                    let (kept, removed) = if gone == 0 { (over_udp, over_tcp) } else { (over_tcp, over_udp) };
                    assert!(kept.is_ok(), "{to}: {kept:?}");
                    let refused = removed.unwrap_err();
                    assert!(
                        matches!(refused, ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied),
                        "{to}: {refused}"
                    );
                }
            }
        }
    });
}

/// e2e "should be able to handle large requests: udp": its fragments go where the first goes, and so back.
#[test]
fn a_datagram_larger_than_the_mtu_goes_through_a_service_and_back() {
    in_node(|rig| {
        for family in &FAMILIES {
            for (space, address) in [(POD_B, family.pod_b), (REMOTE, family.remote)] {
                let socket = rig.within(space, move || UdpSocket::bind(at(address, 8080)).unwrap());
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 65_536];
                    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                        let _ = socket.send_to(&buffer[..length], client);
                    }
                });
            }
        }
        let of = |family: &'static Family| [(family.pod_b, "node-a"), (family.remote, "node-b")];
        rig.apply(cluster(&of(&FAMILIES[0]), &of(&FAMILIES[1]), "Cluster"));
        for family in &FAMILIES {
            for (space, to) in [
                (POD_A, at(family.vip, 80)),
                (POD_A, at(family.node, 30080)),
                (OUTSIDE, at(family.node, 30080)),
            ] {
                for attempt in 0..6 {
                    let back = rig.within(space, move || {
                        let socket = udp(family, 0);
                        socket.connect(to).unwrap();
                        said(&socket, &[b'x'; 9000]).map(|answer| answer.len())
                    });
                    assert_eq!(back.map_err(|error| error.kind()), Ok(9000), "{to}, flow {attempt}");
                }
            }
        }
    });
}

/// Else the second flow's answers would come from the first address (a collision in the table of connections).
#[test]
fn two_services_before_one_endpoint_may_be_asked_from_one_port() {
    in_node(|rig| {
        rig.serve_all();
        let mut objects =
            cluster(&[(FAMILIES[0].pod_b, "node-a")], &[(FAMILIES[1].pod_b, "node-a")], "Cluster");
        for family in ["IPv4", "IPv6"] {
            let mut slice = objects.iter().find(|object| object["addressType"] == family).unwrap().clone();
            slice["metadata"]["name"] = json!(format!("empty-{family}"));
            slice["metadata"]["labels"] = json!({"kubernetes.io/service-name": "empty"});
            objects.push(slice);
        }
        rig.apply(objects);
        for family in &FAMILIES {
            let (first, second) = (at(family.vip, 80), at(family.empty_vip, 80));
            let (answers, sources) = rig.within(POD_A, move || {
                let sockets = [first, second].map(|to| {
                    let socket = udp(family, 40_000);
                    socket.connect(to).unwrap();
                    socket
                });
                let answers =
                    sockets.each_ref().map(|socket| said(socket, b"?").map_err(|error| error.kind()));
                let stream = |to: SocketAddr| ask(to).map_err(|error| error.kind());
                (answers, [stream(first), stream(second)])
            });
            let expected = Ok(format!("b {}", family.pod_a));
            assert_eq!(answers, [expected.clone(), expected.clone()], "UDP");
            assert_eq!(sources, [expected.clone(), expected], "TCP");
        }
    });
}

/// Conformance: "should be able to switch session affinity for service with type clusterIP".
#[test]
fn affinity_that_is_switched_off_holds_nobody_any_more() {
    in_node(|rig| {
        rig.serve_all();
        // While another Service has affinity the kernel's memory stays, else it goes as a whole.
        for (another, told) in [(true, "2 clients' affinity forgotten"), (false, "delete set affinity4")] {
            let with_affinity = |on: bool| {
                let mut objects = everywhere("Cluster");
                if on {
                    objects[0]["spec"]["sessionAffinity"] = json!("ClientIP");
                }
                if another {
                    objects[1]["spec"]["sessionAffinity"] = json!("ClientIP");
                    for mut slice in [objects[2].clone(), objects[3].clone()] {
                        slice["metadata"]["name"] = json!(format!("empty-{}", slice["addressType"]));
                        slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!("empty");
                        objects.push(slice);
                    }
                }
                objects
            };
            rig.apply(with_affinity(true));
            for family in &FAMILIES {
                let vip = at(family.vip, 80);
                assert_eq!(rig.within(POD_A, move || answers(vip)).len(), 1, "{vip}");
            }
            let off = rig.apply(with_affinity(false));
            assert!(off.changed.iter().any(|line| line == told), "{off:?}");
            for family in &FAMILIES {
                let vip = at(family.vip, 80);
                assert_eq!(rig.within(POD_A, move || answers(vip)).len(), 3, "{vip}");
            }
        }
    });
}

/// The health check port, the policies and hints aside, node ports are optional (`allocateLoadBalancerNodePorts: false`).
#[test]
fn a_load_balancer_without_node_ports_has_its_address_and_no_port_of_the_node() {
    in_node(|rig| {
        rig.serve_all();
        let mut objects = everywhere("Cluster");
        objects[0]["spec"]["type"] = json!("LoadBalancer");
        objects[0]["spec"]["allocateLoadBalancerNodePorts"] = json!(false);
        for port in objects[0]["spec"]["ports"].as_array_mut().unwrap() {
            port.as_object_mut().unwrap().remove("nodePort");
        }
        objects[0]["status"] = json!({"loadBalancer": {"ingress": ON_LINK.map(|ip| json!({"ip": ip}))}});
        rig.apply(objects);
        for (family, address) in FAMILIES.iter().zip(ON_LINK) {
            assert_eq!(rig.within(POD_A, move || answers(at(address, 80))).len(), 3);
            let node = at(family.node, 30080);
            let refused = rig.within(OUTSIDE, move || ask(node).unwrap_err().kind());
            assert_eq!(refused, ErrorKind::ConnectionRefused, "nothing of ours and nothing of the node's");
        }
    });
}
