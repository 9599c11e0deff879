//! Policies against the real kernel: from Kubernetes objects to packets, in a node with two pods of its own, a pod behind
//! `weft0` and a client outside, in both families.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};
use weft_model::node_facts::WireguardBackend;
use weft_model::snapshot::AttachedPod;
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName, PodKey, Snapshot};

use super::explain::{Question, explain};
use super::*;
use crate::kube::Cluster;
use crate::proxy::{ProxyApplier, ProxyPlanner};
use crate::reconcile::{Applied, Applier, Planner, Trust};

mod flows;

/// A packet that is let through needs microseconds.
const WAIT: Duration = Duration::from_millis(400);

/// Addresses of one family.
struct Family {
    vip: &'static str,
    node_vip: &'static str,
    dns: &'static str,
    node: &'static str,
    a: &'static str,
    b: &'static str,
    remote: &'static str,
    outside: &'static str,
    outside_net: &'static str,
    node_net: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        vip: "10.96.0.1",
        node_vip: "10.96.0.2",
        dns: "10.96.0.10",
        node: "192.0.2.1",
        a: "10.244.1.5",
        b: "10.244.1.6",
        remote: "10.244.2.5",
        outside: "192.0.2.9",
        outside_net: "192.0.2.8/29",
        node_net: "192.0.2.1/32",
    },
    Family {
        vip: "fd00:96::1",
        node_vip: "fd00:96::2",
        dns: "fd00:96::a",
        node: "2001:db8::1",
        a: "fd00:244:0:1::5",
        b: "fd00:244:0:1::6",
        remote: "fd00:244:0:2::5",
        outside: "2001:db8::9",
        outside_net: "2001:db8::8/125",
        node_net: "2001:db8::1/128",
    },
];

fn run(command: &str) {
    let output = Command::new("sh").arg("-ec").arg(command).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {}\n{said}", output.status);
}

const A: usize = 0;
const B: usize = 1;
const REMOTE: usize = 2;
const OUTSIDE: usize = 3;
/// The node itself: the calling thread's namespace.
const NODE: usize = 4;

/// The other namespaces are named, and deleted on drop.
struct Rig {
    spaces: [String; 4],
    applier: PolicyApplier,
    planner: PolicyPlanner,
    runtime: tokio::runtime::Runtime,
}

impl Drop for Rig {
    fn drop(&mut self) {
        for space in &self.spaces {
            let _ = Command::new("ip").args(["netns", "delete", space]).status();
        }
    }
}

/// Runs `test` in a node made for it; prints and returns when not root.
fn in_node(test: impl FnOnce(&mut Rig) + Send + 'static) {
    if !crate::kernel::testing::needs_root() {
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
        let spaces = ["a", "b", "remote", "outside"].map(|name| format!("weft-policy-{pid}-{number}-{name}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let rig = Self { spaces, applier: PolicyApplier::new(), planner: PolicyPlanner::default(), runtime };
        run("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
             net.ipv6.conf.default.accept_dad=0");
        for space in &rig.spaces {
            run(&format!(
                "ip netns add {space}; ip netns exec {space} sysctl -qw net.ipv6.conf.default.accept_dad=0"
            ));
        }
        let [v4, v6] = &FAMILIES;
        for (space, link, v4, v6) in [(A, "weftp0000000001", v4.a, v6.a), (B, "weftp0000000002", v4.b, v6.b)]
        {
            rig.join(space, link, v4, v6, 32, 128);
            let space = &rig.spaces[space];
            run(&format!(
                "ip addr add 169.254.1.1/32 dev {link} scope link; ip addr add fe80::1/64 dev {link}
                 ip -n {space} route add 169.254.1.1 dev eth0; ip -n {space} route add default via 169.254.1.1
                 ip -n {space} route add default via fe80::1 dev eth0"
            ));
        }
        rig.join(REMOTE, "weft0", v4.remote, v6.remote, 24, 64);
        rig.join(OUTSIDE, "eth0", v4.outside, v6.outside, 24, 64);
        let (remote, outside) = (&rig.spaces[REMOTE], &rig.spaces[OUTSIDE]);
        run(&format!(
            "ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0
             ip route add 10.244.2.0/24 dev weft0; ip route add fd00:244:0:2::/64 dev weft0
             ip addr add 10.244.1.1/32 dev weft0; ip addr add fd00:244:0:1::1/128 dev weft0
             ip route add 10.244.1.5 dev weftp0000000001 src 192.0.2.1; ip route add fd00:244:0:1::5 dev weftp0000000001
             ip route add 10.244.1.6 dev weftp0000000002 src 192.0.2.1; ip route add fd00:244:0:1::6 dev weftp0000000002
             ip addr add {}/32 dev lo; ip addr add {}/128 dev lo
             ip route add default via 192.0.2.9; ip route add default via 2001:db8::9 dev eth0
             ip -n {remote} route add default via 10.244.1.1 dev eth0 onlink
             ip -n {remote} route add default via fd00:244:0:1::1 dev eth0 onlink
             ip -n {outside} route add default via 192.0.2.1; ip -n {outside} route add default via 2001:db8::1 dev eth0
             nft 'add table inet test-raw; add chain inet test-raw pre {{ type filter hook prerouting priority -300; }};
                  add chain inet test-raw out {{ type filter hook output priority -300; }};
                  add rule inet test-raw pre udp dport 53 notrack; add rule inet test-raw out udp sport 53 notrack'",
            v4.dns, v6.dns
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

    /// Runs in one of the places, on a thread of its own.
    fn within<T: Send + 'static>(&self, space: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
        if space == NODE {
            return std::thread::spawn(work).join().unwrap();
        }
        let path = format!("/run/netns/{}", self.spaces[space]);
        std::thread::spawn(move || {
            setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    /// TCP and UDP servers that send back what they get.
    fn serve(&self, space: usize, address: &str, port: u16) {
        let address = SocketAddr::new(address.parse().unwrap(), port);
        let (listener, socket) = self
            .within(space, move || (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()));
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut buffer = [0; 64];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let _ = stream.write_all(&buffer[..length]);
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, client)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], client);
            }
        });
    }

    fn connect(&self, from: usize, to: &str, port: u16) -> Option<TcpStream> {
        let to = SocketAddr::new(to.parse().unwrap(), port);
        let stream = self.within(from, move || TcpStream::connect_timeout(&to, WAIT).ok())?;
        stream.set_read_timeout(Some(WAIT)).unwrap();
        Some(stream)
    }

    /// Whether a connection can be made and carries data both ways.
    fn tcp(&self, from: usize, to: &str, port: u16) -> bool {
        self.connect(from, to, port).is_some_and(|mut stream| echoes(&mut stream))
    }

    fn udp(&self, from: usize, to: &str, port: u16) -> bool {
        let to = SocketAddr::new(to.parse().unwrap(), port);
        self.within(from, move || {
            let any: IpAddr = if to.is_ipv6() { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
            socket.set_read_timeout(Some(WAIT)).unwrap();
            socket.connect(to).is_ok() && socket.send(b"x").is_ok() && socket.recv(&mut [0; 8]).is_ok()
        })
    }

    fn pings(&self, from: usize, to: &str) -> bool {
        let ping = ["ip", "netns", "exec", &self.spaces[from], "ping", "-q", "-c", "1", "-W", "1", to];
        Command::new(ping[0]).args(&ping[1..]).output().unwrap().status.success()
    }

    fn apply(&mut self, objects: Vec<Value>) -> Applied {
        self.apply_snapshot(&snapshot(objects))
    }

    fn apply_snapshot(&mut self, snapshot: &Snapshot) -> Applied {
        let planned = self.planner.plan(snapshot);
        let applied = self.runtime.block_on(self.applier.apply(&planned.plan, Trust::Shadow));
        assert_eq!(applied.failed, Vec::<String>::new());
        applied
    }

    /// Services through the proxy of this node.
    fn apply_services(&self, objects: Vec<Value>) {
        let planned = ProxyPlanner::default().plan(&snapshot(objects));
        let applied = self.runtime.block_on(ProxyApplier::new().apply(&planned.plan, Trust::Nothing));
        assert_eq!(applied.failed, Vec::<String>::new());
    }
}

fn echoes(stream: &mut TcpStream) -> bool {
    stream.write_all(b"x").is_ok() && stream.read_exact(&mut [0; 1]).is_ok()
}

/// The node, namespaces `shop` and `kube-system`, and these objects; `a` and `b` are attached.
fn snapshot(objects: Vec<Value>) -> Snapshot {
    let node = |name: &str, cidrs: [&str; 2], ips: [&str; 2]| {
        let addresses = ips.map(|ip| json!({"type": "InternalIP", "address": ip}));
        json!({
            "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": cidrs}, "status": {"addresses": addresses},
        })
    };
    let namespace = |name: &str| json!({"kind": "Namespace", "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}});
    let always = [
        node("node-a", ["10.244.1.0/24", "fd00:244:0:1::/64"], ["192.0.2.1", "2001:db8::1"]),
        node("node-b", ["10.244.2.0/24", "fd00:244:0:2::/64"], ["192.0.2.2", "2001:db8::2"]),
        namespace("shop"),
        namespace("kube-system"),
    ];
    let config = ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        cluster_dns: FAMILIES.iter().map(|family| family.dns.parse().unwrap()).collect(),
        ..ClusterConfig::default()
    };
    let name = NodeName::from("node-a");
    let facts = NodeFacts {
        name,
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let cluster = Cluster::from_documents(always.into_iter().chain(objects));
    let snapshot = cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts));
    let attached = FAMILIES.iter().flat_map(|family| {
        [("a", family.a), ("b", family.b)].map(|(name, address)| {
            let attached = AttachedPod { pod: Some(PodKey::new("shop", name)), uid: String::new() };
            (address.parse().unwrap(), Arc::new(attached))
        })
    });
    Snapshot { attachments: Arc::new(attached.collect()), ..snapshot }
}

fn pod(name: &str, ips: [&str; 2]) -> Value {
    let node = if ips[0].starts_with("10.244.1.") { "node-a" } else { "node-b" };
    let ips = ips.map(|ip| json!({"ip": ip}));
    json!({
        "kind": "Pod", "metadata": {"namespace": "shop", "name": name, "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]}, "status": {"podIPs": ips},
    })
}

fn pods() -> Vec<Value> {
    let [v4, v6] = &FAMILIES;
    vec![pod("a", [v4.a, v6.a]), pod("b", [v4.b, v6.b]), pod("remote", [v4.remote, v6.remote])]
}

fn policy(name: &str, subject: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec["podSelector"] =
        if subject.is_empty() { json!({}) } else { json!({"matchLabels": {"app": subject}}) };
    json!({"kind": "NetworkPolicy", "metadata": {"namespace": "shop", "name": name}, "spec": spec})
}

fn deny_all() -> Value {
    policy("deny-all", "", json!({"policyTypes": ["Ingress", "Egress"]}))
}

fn with(policies: Vec<Value>) -> Vec<Value> {
    pods().into_iter().chain(policies).collect()
}

fn from(app: &str) -> Value {
    json!([{"podSelector": {"matchLabels": {"app": app}}}])
}

#[test]
fn deny_all_leaves_a_pod_its_node_and_itself_and_nothing_else() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(B, family.b, 8080);
            rig.serve(REMOTE, family.remote, 8080);
            rig.serve(NODE, family.node, 8080);
        }
        rig.apply(pods());
        for family in &FAMILIES {
            assert!(
                [A, REMOTE, OUTSIDE, NODE].iter().all(|from| rig.tcp(*from, family.b, 8080)),
                "without policies"
            );
            assert!(rig.pings(A, family.b) && rig.tcp(A, family.node, 8080));
        }
        rig.apply(with(vec![deny_all()]));
        for family in &FAMILIES {
            assert_eq!([A, REMOTE, OUTSIDE].map(|from| rig.tcp(from, family.b, 8080)), [false; 3]);
            assert!(rig.tcp(NODE, family.b, 8080) && rig.udp(NODE, family.b, 8080), "the kubelet probes");
            assert!(rig.tcp(B, family.b, 8080), "a pod reaches itself");
            assert!(!rig.pings(A, family.b) && !rig.pings(REMOTE, family.b));
            assert_eq!([family.remote, family.node].map(|to| rig.tcp(A, to, 8080)), [false; 2], "egress");
        }
        rig.apply(pods());
        for family in &FAMILIES {
            assert!(
                [A, REMOTE, OUTSIDE].iter().all(|from| rig.tcp(*from, family.b, 8080)),
                "and without again"
            );
        }
        assert!(remove().unwrap());
        assert!(!remove().unwrap());
    });
}

#[test]
fn both_sides_must_allow_and_names_and_ranges_of_ports_count() {
    in_node(|rig| {
        for family in &FAMILIES {
            for port in [8080, 8081, 9100] {
                rig.serve(B, family.b, port);
            }
        }
        let to_b = policy("a-to-b", "a", json!({"policyTypes": ["Egress"], "egress": [{"to": from("b")}]}));
        let into_b =
            |ports: Value| policy("into-b", "b", json!({"ingress": [{"from": from("a"), "ports": ports}]}));
        let ports = |rig: &Rig, from: usize, family: &Family| {
            [8080, 8081, 9100].map(|port| rig.tcp(from, family.b, port))
        };
        rig.apply(with(vec![deny_all(), to_b.clone()]));
        for family in &FAMILIES {
            assert_eq!(ports(rig, A, family), [false; 3], "b does not let it in");
        }
        rig.apply(with(vec![deny_all(), into_b(json!([{"port": 8080}]))]));
        for family in &FAMILIES {
            assert_eq!(ports(rig, A, family), [false; 3], "a does not let it out");
        }
        for (allowed, expected) in [
            (json!([{"port": 8080}]), [true, false, false]),
            (json!([{"port": "web"}]), [true, false, false]),
            (json!([{"port": 8081, "endPort": 9200}]), [false, true, true]),
            (json!([{"port": 8080}, {"port": 9100}]), [true, false, true]),
            (json!([{"protocol": "UDP"}]), [false, false, false]),
            (json!([{"port": "nonsense"}]), [false, false, false]),
        ] {
            rig.apply(with(vec![deny_all(), to_b.clone(), into_b(allowed.clone())]));
            for family in &FAMILIES {
                assert_eq!(ports(rig, A, family), expected, "{allowed}");
                assert_eq!(
                    rig.udp(A, family.b, 8080),
                    allowed == json!([{"protocol": "UDP"}]),
                    "UDP, {allowed}"
                );
                assert_eq!(ports(rig, REMOTE, family), [false; 3], "another pod");
            }
        }
    });
}

#[test]
fn a_block_means_the_clients_address_and_its_exceptions_do_not() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(B, family.b, 8080);
        }
        let block = |cidr: &str, except: &[&str]| json!({"ipBlock": {"cidr": cidr, "except": except}});
        let [v4, v6] = &FAMILIES;
        let peers = json!([block(v4.outside_net, &[]), block(v6.outside_net, &[])]);
        rig.apply(with(vec![policy("outside", "b", json!({"ingress": [{"from": peers}]}))]));
        for family in &FAMILIES {
            assert_eq!([OUTSIDE, A, REMOTE].map(|from| rig.tcp(from, family.b, 8080)), [true, false, false]);
        }
        let peers = json!([
            block("0.0.0.0/0", &[v4.outside_net, "10.244.2.0/24"]),
            block("::/0", &[v6.outside_net, "fd00:244:0:2::/64"]),
        ]);
        rig.apply(with(vec![policy("outside", "b", json!({"ingress": [{"from": peers}]}))]));
        for family in &FAMILIES {
            assert_eq!([OUTSIDE, A, REMOTE].map(|from| rig.tcp(from, family.b, 8080)), [false, true, false]);
        }
    });
}

/// Names resolve with the usual policy, and without it they do not: the resolver of the node counts as kube-dns.
#[test]
fn the_resolver_of_the_node_is_judged_as_kube_dns() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(NODE, family.dns, 53);
        }
        rig.apply(with(vec![deny_all()]));
        for family in &FAMILIES {
            assert!(!rig.udp(A, family.dns, 53) && !rig.tcp(A, family.dns, 53));
        }
        let ports = json!([{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]);
        let kube_dns = json!({
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        });
        let blocks = json!([{"ipBlock": {"cidr": "10.96.0.10/32"}}, {"ipBlock": {"cidr": "fd00:96::a/128"}}]);
        for (peers, works) in [
            (json!([{"namespaceSelector": {}}]), true),
            (json!([kube_dns]), true),
            (blocks, true),
            (json!([{"podSelector": {}}]), false),
        ] {
            let egress = json!([{"to": peers, "ports": ports}]);
            rig.apply(with(vec![
                deny_all(),
                policy("dns", "", json!({"policyTypes": ["Egress"], "egress": egress})),
            ]));
            for family in &FAMILIES {
                assert_eq!([rig.udp(A, family.dns, 53), rig.tcp(A, family.dns, 53)], [works; 2], "{peers}");
            }
        }
    });
}

/// A ClusterIP is judged as the pod, or the node, that stands behind it.
#[test]
fn services_are_judged_as_what_is_behind_them() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(B, family.b, 8080);
            rig.serve(NODE, family.node, 8080);
        }
        let service = |name: &str, ips: [&str; 2]| json!({"kind": "Service", "metadata": {"namespace": "shop", "name": name}, "spec": {"clusterIPs": ips, "ports": [{"port": 80}]}});
        let slice = |service: &str, family: &str, address: &str| {
            json!({
                "kind": "EndpointSlice", "addressType": family, "ports": [{"name": "", "port": 8080}],
                "endpoints": [{"addresses": [address], "nodeName": "node-a"}],
                "metadata": {"namespace": "shop", "name": format!("{service}-{family}"), "labels": {"kubernetes.io/service-name": service}},
            })
        };
        let [v4, v6] = &FAMILIES;
        rig.apply_services(vec![
            service("b", [v4.vip, v6.vip]),
            slice("b", "IPv4", v4.b),
            slice("b", "IPv6", v6.b),
            service("api", [v4.node_vip, v6.node_vip]),
            slice("api", "IPv4", v4.node),
            slice("api", "IPv6", v6.node),
        ]);
        let egress =
            |to: Value| policy("out", "a", json!({"policyTypes": ["Egress"], "egress": [{"to": to}]}));
        let into_b = policy("into-b", "b", json!({"ingress": [{"from": from("a")}]}));
        let node = json!([{"ipBlock": {"cidr": v4.node_net}}, {"ipBlock": {"cidr": v6.node_net}}]);
        let vips = json!([{"ipBlock": {"cidr": "10.96.0.0/16"}}, {"ipBlock": {"cidr": "fd00:96::/112"}}]);
        for (to, b, api) in [(from("b"), true, false), (node, false, true), (vips, false, false)] {
            rig.apply(with(vec![egress(to.clone()), into_b.clone()]));
            for family in &FAMILIES {
                assert_eq!([rig.tcp(A, family.vip, 80), rig.tcp(A, family.node_vip, 80)], [b, api], "{to}");
            }
        }
        rig.apply(with(vec![deny_all()]));
        for family in &FAMILIES {
            assert!(rig.tcp(B, family.vip, 80), "a pod reaches itself through its Service");
            assert!(!rig.tcp(A, family.vip, 80) && !rig.tcp(OUTSIDE, family.vip, 80));
            assert!(rig.tcp(NODE, family.vip, 80), "the node reaches its pod through a Service");
        }
    });
}

#[test]
fn a_connection_that_a_new_policy_denies_ends_unless_the_policy_lets_it_be() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(B, family.b, 8080);
        }
        rig.apply(pods());
        let connect = |rig: &Rig| -> Vec<TcpStream> {
            FAMILIES
                .iter()
                .flat_map(|f| [A, REMOTE].map(|from| rig.connect(from, f.b, 8080).unwrap()))
                .collect()
        };
        let mut streams = connect(rig);
        assert!(streams.iter_mut().all(echoes));
        let mut keeping = policy("b", "b", json!({"ingress": [{"from": from("a")}]}));
        keeping["metadata"]["annotations"] = json!({"weft.network/established": "keep"});
        rig.apply(with(vec![keeping]));
        assert!(streams.iter_mut().all(echoes), "kept as the annotation says");
        assert!(!rig.tcp(REMOTE, FAMILIES[0].b, 8080), "and nobody new");
        let applied = rig.apply(with(vec![policy("b", "b", json!({"ingress": [{"from": from("a")}]}))]));
        assert!(
            applied.changed.contains(&"2 established connections that are denied now".to_owned()),
            "{applied:?}"
        );
        let alive: Vec<bool> = streams.iter_mut().map(echoes).collect();
        assert_eq!(alive, [true, false, true, false], "those of a go on, those of remote are cut");
        let alive: Vec<bool> = streams.iter_mut().map(echoes).collect();
        assert_eq!(alive, [true, false, true, false], "nothing that the server sends again brings them back");
    });
}

/// Until the API shows the very pod that was attached, a policy of its namespace that may mean it denies.
#[test]
fn a_pod_whose_labels_are_not_known_yet_is_denied_where_there_are_policies() {
    in_node(|rig| {
        for family in &FAMILIES {
            rig.serve(B, family.b, 8080);
        }
        let without_b = || pods().into_iter().filter(|pod| pod["metadata"]["name"] != "b");
        let everybody = policy("open", "b", json!({"ingress": [{}]}));
        rig.apply(without_b().collect());
        assert!(FAMILIES.iter().all(|family| rig.tcp(REMOTE, family.b, 8080)), "no policy in its namespace");
        rig.apply(without_b().chain([everybody.clone()]).collect());
        assert!(FAMILIES.iter().all(|family| !rig.tcp(REMOTE, family.b, 8080)), "not known, so not allowed");
        assert!(FAMILIES.iter().all(|family| rig.tcp(NODE, family.b, 8080)));
        rig.apply(with(vec![everybody.clone()]));
        assert!(FAMILIES.iter().all(|family| rig.tcp(REMOTE, family.b, 8080)), "known, and allowed");
        let another = pods().into_iter().map(|mut pod| {
            pod["metadata"]["uid"] = json!("made anew");
            pod
        });
        let mut snapshot = snapshot(another.chain([everybody]).collect());
        for attached in Arc::make_mut(&mut snapshot.attachments).values_mut() {
            Arc::make_mut(attached).uid = "former".to_owned();
        }
        rig.apply_snapshot(&snapshot);
        assert!(
            FAMILIES.iter().all(|family| !rig.tcp(REMOTE, family.b, 8080)),
            "another pod of the same name"
        );
    });
}

/// The Store may know less than the rules that an agent before this one left.
#[test]
fn an_agent_that_starts_anew_denies_no_less_until_the_api_server_has_spoken() {
    in_node(|rig| {
        let b = FAMILIES[0].b;
        rig.serve(B, b, 8080);
        rig.apply(with(vec![deny_all()]));
        rig.applier = PolicyApplier::new();
        let stored = Snapshot { from_store: true, ..snapshot(pods()) };
        let pass = |rig: &mut Rig| {
            let planned = rig.planner.plan(&stored);
            rig.runtime.block_on(rig.applier.apply(&planned.plan, Trust::Nothing)).failed.len()
        };
        assert_eq!(pass(rig), 1);
        assert!(!rig.tcp(REMOTE, b, 8080), "the Store has no policy, the kernel has");
        rig.apply(with(vec![deny_all()]));
        assert!(!rig.tcp(REMOTE, b, 8080));
        rig.applier = PolicyApplier::new();
        assert!(
            (0..20).any(|_| pass(rig) == 0),
            "without the API server the node goes on with what it knows"
        );
        assert!(rig.tcp(REMOTE, b, 8080));
        assert_eq!(pass(rig), 0);
    });
}

#[test]
fn a_change_commits_only_its_difference() {
    in_node(|rig| {
        let into_b =
            policy("into-b", "b", json!({"ingress": [{"from": from("friend"), "ports": [{"port": 8080}]}]}));
        rig.apply(with(vec![into_b.clone()]));
        let friend = |ip: &str| {
            let mut pod = pod("c", [ip, "fd00:244:0:2::77"]);
            pod["metadata"]["labels"] = json!({"app": "friend"});
            pod
        };
        let changed = rig.apply(with(vec![into_b.clone(), friend("10.244.2.77")])).changed;
        assert!(
            changed.len() == 2 && changed.iter().all(|line| line.starts_with("add element pods")),
            "{changed:?}"
        );
        let changed = rig.apply(with(vec![into_b.clone(), friend("10.244.2.78")])).changed;
        assert_eq!(changed.len(), 2, "{changed:?}");
        assert!(
            changed[0].ends_with("{ 10.244.2.77 }") && changed[1].ends_with("{ 10.244.2.78 }"),
            "{changed:?}"
        );
        assert_eq!(rig.apply(with(vec![into_b, friend("10.244.2.78")])).changed, Vec::<String>::new());
    });
}

#[test]
fn an_explanation_names_the_rule_that_allows_and_those_that_do_not() {
    let to_b = policy("a-to-b", "a", json!({"policyTypes": ["Egress"], "egress": [{"to": from("b")}]}));
    let into_b =
        policy("into-b", "b", json!({"ingress": [{"from": from("remote")}, {"ports": [{"port": 8080}]}]}));
    let snapshot = snapshot(with(vec![deny_all(), to_b, into_b]));
    let ask = |source: &str, destination: &str, port: &str| {
        let [source, destination, port] = [source, destination, port].map(str::to_owned);
        explain(&snapshot, &Question { source, destination, port })
    };
    assert_eq!(
        ask("10.244.1.5", "shop/b", "8080").unwrap(),
        "shop/a (10.244.1.5) to shop/b (10.244.1.6), tcp port 8080\n  \
         egress of shop/a: isolated by shop/a-to-b, shop/deny-all\n    \
         shop/a-to-b egress[0]: allows it\n  \
         ingress of shop/b: isolated by shop/deny-all, shop/into-b\n    \
         shop/into-b ingress[0]: the port matches, the peer does not\n    \
         shop/into-b ingress[1]: allows it\n  allowed\n"
    );
    let denied = ask("shop/a", "192.0.2.9", "53/udp").unwrap();
    assert!(
        denied.ends_with(
            "no rule allows it\n  ingress of an address outside: no pod, so no policy selects it\n  denied\n"
        ),
        "{denied}"
    );
    assert!(ask("192.0.2.1", "shop/a", "80").is_ok_and(|text| text.lines().count() == 4));
    assert!(ask("shop/nobody", "shop/a", "80").unwrap_err().contains("there is no Pod shop/nobody"));
    assert!(ask("shop/a", "10.96.0.1", "80").unwrap_err().contains("is a Service's"));
    assert!(ask("shop/a", "shop/b", "80/quic").unwrap_err().contains("is no protocol"));
}

#[test]
fn a_policy_of_a_namespace_that_is_gone_is_named_and_harms_nobody() {
    let mut orphan = policy("left", "", json!({}));
    orphan["metadata"]["namespace"] = json!("gone");
    let planned = PolicyPlanner::default().plan(&snapshot(with(vec![orphan])));
    let said: Vec<String> = planned.problems.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].starts_with("NetworkPolicy gone/left: Missing: metadata.namespace gone does not exist"),
        "{said:?}"
    );
    assert!(planned.plan.judge.allows("10.244.2.5".parse().unwrap(), "10.244.1.6".parse().unwrap(), 6, 80));
}

/// 1,000 policies in 50 namespaces, 5,000 pods, 110 of them here: a change costs its own elements. Prints what it took; the
/// limits are those of an unoptimised build on a busy machine.
#[test]
fn a_change_in_a_big_cluster_costs_milliseconds() {
    in_node(|rig| {
        let mut cluster = Cluster::from_documents(big_cluster());
        let attachments = || {
            let attached = (0..110).map(|i| {
                let pod = AttachedPod { pod: Some(big_key(i)), uid: String::new() };
                (big_address(i).parse().unwrap(), Arc::new(pod))
            });
            Arc::new(attached.collect())
        };
        let of = |cluster: &Cluster| {
            let empty = snapshot(vec![]);
            let taken = cluster.snapshot(Generation(1), empty.config, empty.facts);
            Snapshot { attachments: attachments(), ..taken }
        };
        let step = |what: &str, cluster: &Cluster, rig: &mut Rig| {
            let snapshot = of(cluster);
            let started_at = std::time::Instant::now();
            let planned = rig.planner.plan(&snapshot);
            let planned_in = started_at.elapsed();
            let applied = rig.runtime.block_on(rig.applier.apply(&planned.plan, Trust::Shadow));
            let all_in = started_at.elapsed();
            assert_eq!(applied.failed, Vec::<String>::new());
            println!(
                "{what}: planned in {planned_in:?}, with the kernel {all_in:?}, {} changes",
                applied.changed.len()
            );
            (all_in, applied.changed.len())
        };
        step("everything", &cluster, rig);
        let apply = |cluster: &mut Cluster, kind, document| {
            cluster.apply(kind, kube::runtime::watcher::Event::Apply(crate::kube::Document::new(document)))
        };
        let limit = Duration::from_millis(500);
        apply(&mut cluster, crate::kube::Kind::Pod, big_pod(5000, "a1"));
        let (took, changes) = step("one pod added", &cluster, rig);
        assert!(took < limit && (1..60).contains(&changes), "{took:?}, {changes} changes");
        apply(&mut cluster, crate::kube::Kind::Pod, big_pod(4999, "a2"));
        let (took, changes) = step("one label changed", &cluster, rig);
        assert!(took < limit && (1..60).contains(&changes), "{took:?}, {changes} changes");
        apply(&mut cluster, crate::kube::Kind::NetworkPolicy, big_policy(1000));
        let (took, changes) = step("one policy added", &cluster, rig);
        assert!(took < limit && changes > 0, "{took:?}, {changes} changes");
        assert_eq!(step("nothing", &cluster, rig).1, 0);
    });
}

fn big_key(i: usize) -> PodKey {
    PodKey::new(format!("ns{}", i % 50), format!("pod{i}"))
}

fn big_address(i: usize) -> String {
    // The first 110 are of this node's range.
    if i < 110 { format!("10.244.1.{}", i + 2) } else { format!("10.244.{}.{}", 2 + i / 200, 2 + i % 200) }
}

fn big_pod(i: usize, app: &str) -> Value {
    let key = big_key(i);
    json!({
        "kind": "Pod", "metadata": {"namespace": key.namespace, "name": key.name, "labels": {"app": app, "pod-template-hash": "5d9f8c7b6"}},
        "spec": {"containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]}, "status": {"podIPs": [{"ip": big_address(i)}]},
    })
}

fn big_policy(i: usize) -> Value {
    let labels = |app: usize| json!({"matchLabels": {"app": format!("a{app}")}});
    let other = json!({"matchLabels": {"kubernetes.io/metadata.name": format!("ns{}", (i + 1) % 50)}});
    json!({
        "kind": "NetworkPolicy", "metadata": {"namespace": format!("ns{}", i % 50), "name": format!("p{i}")},
        "spec": {
            "podSelector": labels(i / 50 % 10),
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": labels((i + 1) % 10)}, {"namespaceSelector": other}], "ports": [{"port": "web"}]}],
            "egress": [{"to": [{"podSelector": labels((i + 2) % 10), "namespaceSelector": {}}], "ports": [{"port": 8080}]}],
        },
    })
}

fn big_cluster() -> Vec<Value> {
    let namespaces = (0..50).map(|i| {
        let name = format!("ns{i}");
        json!({"kind": "Namespace", "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}})
    });
    let node = json!({
        "kind": "Node", "metadata": {"name": "node-a"}, "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    });
    let pods = (0..5000).map(|i| big_pod(i, &format!("a{}", i / 50 % 10)));
    let policies = (0..1000).map(big_policy);
    std::iter::once(node).chain(namespaces).chain(pods).chain(policies).collect()
}
