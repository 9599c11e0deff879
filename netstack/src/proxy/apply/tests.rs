//! The whole proxy against the real kernel: from Kubernetes objects to connections, in a node with two pods of its own, a
//! pod behind `weft0` and a client outside.

mod affinity;
mod large;
mod outside;
mod sentences;
mod window;

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};
use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName, ProxyConfig};

use super::*;
use crate::kube::Cluster;
use crate::proxy::ProxyPlanner;
use crate::reconcile::Planner;

const WAIT: Duration = Duration::from_millis(1500);

/// Addresses of one family.
struct Family {
    ipv6: bool,
    vip: &'static str,
    empty_vip: &'static str,
    unallocated: &'static str,
    node: &'static str,
    host: &'static str,
    pod_a: &'static str,
    pod_b: &'static str,
    remote: &'static str,
    outside: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        ipv6: false,
        vip: "10.96.0.1",
        empty_vip: "10.96.0.2",
        unallocated: "10.96.0.99",
        node: "192.0.2.1",
        host: "10.244.1.1",
        pod_a: "10.244.1.5",
        pod_b: "10.244.1.6",
        remote: "10.244.2.5",
        outside: "192.0.2.9",
    },
    Family {
        ipv6: true,
        vip: "fd00:96::1",
        empty_vip: "fd00:96::2",
        unallocated: "fd00:96::99",
        node: "2001:db8::1",
        host: "fd00:244:0:1::1",
        pod_a: "fd00:244:0:1::5",
        pod_b: "fd00:244:0:1::6",
        remote: "fd00:244:0:2::5",
        outside: "2001:db8::9",
    },
];

/// Runs in the calling thread's namespace.
fn run(command: &str) {
    let output = Command::new("sh").arg("-ec").arg(command).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {}\n{said}", output.status);
}

/// The node is the calling thread's namespace; the others are named, and deleted on drop.
struct Rig {
    spaces: [String; 4],
    applier: ProxyApplier,
    planner: ProxyPlanner,
    runtime: tokio::runtime::Runtime,
}

const POD_A: usize = 0;
const POD_B: usize = 1;
const REMOTE: usize = 2;
const OUTSIDE: usize = 3;

/// Debian's nft must list whatever these tests made: some versions abort on what the kernel accepts.
fn assert_nft_lists() {
    run("nft list ruleset > /dev/null; nft -j list ruleset > /dev/null");
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_nft_lists();
        }
        for space in &self.spaces {
            let _ = Command::new("ip").args(["netns", "delete", space]).status();
        }
    }
}

/// Runs `test` in a node made for it; prints and returns when not root.
fn in_node(test: impl FnOnce(&mut Rig) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        test(&mut Rig::new());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Rig {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let spaces = ["a", "b", "remote", "outside"].map(|name| format!("weft-proxy-{pid}-{number}-{name}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let rig = Self { spaces, applier: ProxyApplier::new(), planner: ProxyPlanner::default(), runtime };
        run("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
             net.ipv6.conf.default.accept_dad=0");
        for space in &rig.spaces {
            run(&format!(
                "ip netns add {space}; ip netns exec {space} sysctl -qw net.ipv6.conf.default.accept_dad=0"
            ));
        }
        for (space, link, v4, v6) in [
            (POD_A, "weftp0000000001", FAMILIES[0].pod_a, FAMILIES[1].pod_a),
            (POD_B, "weftp0000000002", FAMILIES[0].pod_b, FAMILIES[1].pod_b),
        ] {
            rig.join(space, link, v4, v6, 32, 128);
            let space = &rig.spaces[space];
            run(&format!(
                "ip addr add 169.254.1.1/32 dev {link} scope link; ip addr add fe80::1/64 dev {link}
                 ip route add {v4} dev {link}; ip route add {v6} dev {link}
                 ip -n {space} route add 169.254.1.1 dev eth0; ip -n {space} route add default via 169.254.1.1
                 ip -n {space} route add default via fe80::1 dev eth0"
            ));
        }
        rig.join(REMOTE, "weft0", FAMILIES[0].remote, FAMILIES[1].remote, 24, 64);
        rig.join(OUTSIDE, "eth0", FAMILIES[0].outside, FAMILIES[1].outside, 24, 64);
        // Behind the tunnel only this node's pods are known, as WireGuard's allowed IPs would have it.
        let remote = &rig.spaces[REMOTE];
        run(&format!(
            "ip addr add 10.244.1.1/32 dev weft0; ip addr add fd00:244:0:1::1/128 dev weft0
             ip route add 10.244.2.0/24 dev weft0; ip route add fd00:244:0:2::/64 dev weft0
             ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0
             ip route add default via 192.0.2.9; ip route add default via 2001:db8::9 dev eth0
             ip -n {remote} route add 10.244.1.0/24 via 10.244.1.1 dev eth0 onlink
             ip -n {remote} route add fd00:244:0:1::/64 via fd00:244:0:1::1 dev eth0 onlink"
        ));
        rig
    }

    /// A veth from the node (`link`) to `eth0` of a namespace with these addresses.
    fn join(&self, space: usize, link: &str, v4: &str, v6: &str, v4_bits: u8, v6_bits: u8) {
        let space = &self.spaces[space];
        run(&format!(
            "ip link add {link} type veth peer name eth0 netns {space}; ip link set {link} up
             ip -n {space} link set lo up; ip -n {space} link set eth0 up
             ip -n {space} addr add {v4}/{v4_bits} dev eth0; ip -n {space} addr add {v6}/{v6_bits} dev eth0"
        ));
    }

    /// Runs in one of the namespaces, on a thread of its own.
    fn within<T: Send + 'static>(&self, space: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/run/netns/{}", self.spaces[space]);
        std::thread::spawn(move || {
            setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    /// TCP and UDP servers at an address that answer `NAME CLIENT`.
    fn serve(&self, space: usize, name: &'static str, address: &'static str) {
        let address = SocketAddr::new(address.parse().unwrap(), 8080);
        let (listener, socket) = self
            .within(space, move || (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()));
        std::thread::spawn(move || {
            while let Ok((mut stream, client)) = listener.accept() {
                let _ = write!(stream, "{name} {}", client.ip());
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, client)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(format!("{name} {}", client.ip()).as_bytes(), client);
            }
        });
    }

    fn serve_all(&self) {
        for family in &FAMILIES {
            self.serve(POD_A, "a", family.pod_a);
            self.serve(POD_B, "b", family.pod_b);
            self.serve(REMOTE, "remote", family.remote);
        }
    }

    /// Plans and applies the cluster with these objects beside the Node.
    fn apply(&mut self, objects: Vec<Value>) -> Applied {
        let node = json!({
            "kind": "Node", "metadata": {"name": "node-a"},
            "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:244:0:1::/64"]},
            "status": {"addresses": [
                {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"},
            ]},
        });
        let config = ClusterConfig {
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
            proxy: ProxyConfig {
                external_ip_ranges: vec![
                    "198.51.100.64/26".parse().unwrap(),
                    "2001:db8:e::/64".parse().unwrap(),
                ],
                node_port_ranges: vec![],
            },
            ..ClusterConfig::default()
        };
        let name = NodeName::from("node-a");
        let cluster = Cluster::from_documents([node].into_iter().chain(objects));
        let facts = NodeFacts {
            name,
            uplinks: vec![],
            wireguard_backend: WireguardBackend::Userspace,
            foreign_routes: vec![],
            loopback: Default::default(),
            observed: Default::default(),
        };
        let snapshot = cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts));
        assert_eq!(*snapshot.problems, vec![]);
        let planned = self.planner.plan(&snapshot);
        assert_eq!(planned.problems, vec![]);
        let applied = self.runtime.block_on(self.applier.apply(&planned.plan, Trust::Shadow));
        assert_eq!(applied.failed, Vec::<String>::new());
        applied
    }
}

/// A NodePort Service `web` (TCP and UDP 80, node port 30080) and one without endpoints (30081), in both families.
fn cluster(v4: &[(&str, &str)], v6: &[(&str, &str)], policy: &str) -> Vec<Value> {
    let service = |name: &str, ips: [&str; 2], node_port: u16| {
        let ports = ["TCP", "UDP"].map(|protocol| {
            json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": 80, "nodePort": node_port})
        });
        json!({
            "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"type": "NodePort", "clusterIPs": ips, "ports": ports, "externalTrafficPolicy": policy},
        })
    };
    let slice = |family: &str, endpoints: &[(&str, &str)]| {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(address, node)| json!({"addresses": [address], "nodeName": node}))
            .collect();
        let ports = ["TCP", "UDP"]
            .map(|protocol| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": 8080}));
        json!({
            "kind": "EndpointSlice", "addressType": family, "ports": ports, "endpoints": endpoints,
            "metadata": {
                "name": format!("web-{family}"), "namespace": "default",
                "labels": {"kubernetes.io/service-name": "web"},
            },
        })
    };
    vec![
        service("web", [FAMILIES[0].vip, FAMILIES[1].vip], 30080),
        service("empty", [FAMILIES[0].empty_vip, FAMILIES[1].empty_vip], 30081),
        slice("IPv4", v4),
        slice("IPv6", v6),
    ]
}

fn everywhere(policy: &str) -> Vec<Value> {
    let of = |family: &'static Family| {
        [(family.pod_a, "node-a"), (family.pod_b, "node-a"), (family.remote, "node-b")]
    };
    cluster(&of(&FAMILIES[0]), &of(&FAMILIES[1]), policy)
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

fn ask(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Answers to many connections, without repetitions.
fn answers(to: SocketAddr) -> Vec<String> {
    let mut all: Vec<String> = (0..40).map(|_| ask(to).unwrap_or_else(|e| panic!("{to}: {e}"))).collect();
    all.sort();
    all.dedup();
    all
}

fn sorted<const N: usize>(mut expected: [String; N]) -> Vec<String> {
    expected.sort();
    expected.to_vec()
}

#[test]
fn a_pod_reaches_every_endpoint_with_its_own_address_and_itself_too() {
    in_node(|rig| {
        rig.serve_all();
        rig.apply(everywhere("Cluster"));
        for family in &FAMILIES {
            let seen = rig.within(POD_A, || answers(at(family.vip, 80)));
            let pod = family.pod_a;
            let itself: Vec<&String> = seen.iter().filter(|answer| answer.starts_with("a ")).collect();
            assert_eq!(itself.len(), 1, "{seen:?}");
            assert_ne!(*itself[0], format!("a {pod}"), "a hairpin must be masqueraded");
            let others: Vec<&String> = seen.iter().filter(|answer| !answer.starts_with("a ")).collect();
            assert_eq!(others, [&format!("b {pod}"), &format!("remote {pod}")], "{seen:?}");
        }
    });
}

#[test]
fn a_node_port_keeps_the_client_where_the_answer_comes_back_anyway() {
    in_node(|rig| {
        rig.serve_all();
        rig.apply(everywhere("Cluster"));
        for family in &FAMILIES {
            let seen = rig.within(OUTSIDE, || answers(at(family.node, 30080)));
            let Family { outside, host, .. } = family;
            assert_eq!(
                seen,
                sorted([format!("a {outside}"), format!("b {outside}"), format!("remote {host}")])
            );
        }
    });
}

#[test]
fn the_host_reaches_cluster_ips_and_its_own_node_ports() {
    in_node(|rig| {
        rig.serve_all();
        rig.apply(everywhere("Local"));
        for family in &FAMILIES {
            let Family { node, host, .. } = family;
            let expected = sorted([format!("a {node}"), format!("b {node}"), format!("remote {host}")]);
            assert_eq!(answers(at(family.vip, 80)), expected, "the source of a plain route");
            assert_eq!(answers(at(family.node, 30080)), expected, "Local is about clients outside");
        }
    });
}

#[test]
fn the_local_policy_sends_outsiders_only_to_this_nodes_pods() {
    in_node(|rig| {
        rig.serve_all();
        rig.apply(everywhere("Local"));
        for family in &FAMILIES {
            let seen = rig.within(OUTSIDE, || answers(at(family.node, 30080)));
            let outside = family.outside;
            assert_eq!(seen, sorted([format!("a {outside}"), format!("b {outside}")]));
        }
        let remote = |family: &'static Family| [(family.remote, "node-b")];
        rig.apply(cluster(&remote(&FAMILIES[0]), &remote(&FAMILIES[1]), "Local"));
        for family in &FAMILIES {
            let dropped = rig.within(OUTSIDE, || ask(at(family.node, 30080)).unwrap_err().kind());
            assert_eq!(dropped, ErrorKind::TimedOut);
            let inside = rig.within(POD_A, || answers(at(family.node, 30080)));
            assert_eq!(inside, [format!("remote {}", family.pod_a)]);
        }
    });
}

#[test]
fn without_endpoints_every_client_is_refused_at_once_and_unallocated_addresses_are_silent() {
    in_node(|rig| {
        rig.apply(everywhere("Cluster"));
        for family in &FAMILIES {
            let refused = |to: SocketAddr| ask(to).unwrap_err().kind() == ErrorKind::ConnectionRefused;
            let udp_refused = |to: SocketAddr| {
                let any: IpAddr = if family.ipv6 { "::" } else { "0.0.0.0" }.parse().unwrap();
                let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
                socket.set_read_timeout(Some(WAIT)).unwrap();
                socket.connect(to).unwrap();
                let error = socket.send(b"x").and_then(|_| socket.recv(&mut [0; 8])).unwrap_err().kind();
                matches!(error, ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied)
            };
            let (vip, node, undefined) =
                (at(family.empty_vip, 80), at(family.node, 30081), at(family.vip, 81));
            for to in [vip, node, undefined] {
                assert!(refused(to) && udp_refused(to), "host to {to}");
                assert!(rig.within(POD_A, move || refused(to) && udp_refused(to)), "pod to {to}");
            }
            assert!(rig.within(OUTSIDE, move || refused(node) && udp_refused(node)), "outside to {node}");
            let unallocated = at(family.unallocated, 80);
            let silent = rig.within(POD_A, move || ask(unallocated).unwrap_err().kind());
            assert_eq!(silent, ErrorKind::TimedOut);
        }
    });
}

#[test]
fn a_udp_client_that_never_stops_sending_moves_with_the_endpoints() {
    in_node(|rig| {
        rig.serve_all();
        for family in &FAMILIES {
            let only = |address: &'static str, node: &'static str| {
                let endpoints = [(address, node)];
                if family.ipv6 {
                    cluster(&[], &endpoints, "Cluster")
                } else {
                    cluster(&endpoints, &[], "Cluster")
                }
            };
            let client = rig.within(POD_A, || {
                let any: IpAddr = if family.ipv6 { "::" } else { "0.0.0.0" }.parse().unwrap();
                let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
                socket.set_read_timeout(Some(WAIT)).unwrap();
                socket
            });
            let ask = || {
                client.send_to(b"?", at(family.vip, 80)).unwrap();
                let mut buffer = [0; 64];
                client.recv(&mut buffer).map(|n| String::from_utf8_lossy(&buffer[..n]).into_owned())
            };
            // Before any rule the packets go out unanswered and leave a flow behind.
            NftTable::delete(TABLE_PROXY).unwrap();
            rig.applier = ProxyApplier::new();
            assert!(ask().is_err());
            rig.apply(only(family.pod_b, "node-a"));
            assert_eq!(ask().unwrap(), format!("b {}", family.pod_a), "from nothing to one");
            let moved = rig.apply(only(family.remote, "node-b"));
            assert!(moved.changed.iter().any(|line| line.contains("stale UDP")), "{moved:?}");
            assert_eq!(ask().unwrap(), format!("remote {}", family.pod_a), "to the other endpoint");
            rig.applier = ProxyApplier::new();
            rig.apply(only(family.pod_b, "node-a"));
            assert_eq!(
                ask().unwrap(),
                format!("b {}", family.pod_a),
                "what happened while the agent was away"
            );
        }
    });
}

#[test]
fn a_udp_flow_of_a_node_port_deleted_while_the_agent_was_away_goes() {
    in_node(|rig| {
        rig.serve_all();
        for family in &FAMILIES {
            rig.apply(everywhere("Local"));
            let client = rig.within(OUTSIDE, || {
                let any: IpAddr = if family.ipv6 { "::" } else { "0.0.0.0" }.parse().unwrap();
                let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
                socket.set_read_timeout(Some(WAIT)).unwrap();
                socket
            });
            let ask = || client.send_to(b"?", at(family.node, 30080)).and_then(|_| client.recv(&mut [0; 64]));
            ask().unwrap();
            rig.applier = ProxyApplier::new();
            rig.planner = ProxyPlanner::default();
            let applied = rig.apply(vec![]);
            assert!(applied.changed.iter().any(|line| line.contains("stale UDP")), "{applied:?}");
            assert!(ask().is_err());
        }
    });
}

#[test]
fn applying_twice_changes_nothing_a_new_agent_adopts_and_nft_can_list_it() {
    in_node(|rig| {
        assert!(!rig.apply(everywhere("Cluster")).changed.is_empty());
        assert_eq!(rig.apply(everywhere("Cluster")).changed, Vec::<String>::new());
        rig.applier = ProxyApplier::new();
        assert_eq!(rig.apply(everywhere("Cluster")).changed, Vec::<String>::new());
        run("nft list ruleset > /dev/null; nft -j list ruleset > /dev/null");
    });
}
