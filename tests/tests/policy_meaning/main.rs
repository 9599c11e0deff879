//! Meaning of policies: what the planned rules do to a packet is what the Kubernetes text says, for random clusters, every kind of
//! address and both families.
//!
//! `expected` is written from the NetworkPolicy documentation and API reference, over the very JSON of the objects and without a
//! look at the planner: it walks all policies for every packet. The planned rules are followed by the tracer, and by the real
//! kernel for a sample (`kernel`).
//! `WEFT_MEANING_CASES=100000` runs more clusters than the usual few.

// Helpers of a test are test code; clippy sees that only of functions marked #[test].
#![allow(clippy::unwrap_used)]

mod kernel;
mod services;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use weft_model::node_facts::WireguardBackend;
use weft_model::objects::Protocol;
use weft_model::snapshot::AttachedPod;
use weft_model::{ClusterConfig, Generation, NodeFacts, PodKey, Snapshot};
use weft_netstack::kube::Cluster;
use weft_netstack::policy::{PolicyPlan, PolicyPlanner};
use weft_netstack::proxy::{ProxyPlan, ProxyPlanner};
use weft_netstack::reconcile::Planner;
use weft_tests::trace::{Origin, Outcome, Packet, Routes, trace};

use services::{Call, calls};

const OWN: &str = "node-a";
const OTHER: &str = "node-b";

/// IPv4 and IPv6 of one place.
type Pair = [&'static str; 2];
const OWN_NODE: Pair = ["192.0.2.1", "2001:db8::1"];
const OTHER_NODE: Pair = ["192.0.2.2", "2001:db8::2"];
const OTHER_HOST: Pair = ["10.244.2.1", "fd00:244:0:2::1"];
const OUTSIDE: [Pair; 2] = [["203.0.113.9", "2001:db8:ffff::9"], ["203.0.113.77", "2001:db8:ffff::77"]];
/// Of the ingresses of both nodes.
const OWN_INGRESS: Pair = ["10.244.1.2", "fd00:244:0:1::2"];
const OTHER_INGRESS: Pair = ["10.244.2.2", "fd00:244:0:2::2"];
const DNS: Pair = ["10.96.0.10", "fd00:96::a"];
const BLOCKS: [(Pair, Pair); 5] = [
    (["0.0.0.0/0", "::/0"], ["10.0.0.0/8", "fd00::/8"]),
    (["10.244.0.0/16", "fd00:244::/56"], ["10.244.2.5/32", "fd00:244:0:2::5/128"]),
    (["192.0.2.0/24", "2001:db8::/64"], ["192.0.2.2/32", "2001:db8::2/128"]),
    (["203.0.113.0/24", "2001:db8:ffff::/64"], ["203.0.113.64/26", "2001:db8:ffff::40/122"]),
    (["10.96.0.10/32", "fd00:96::a/128"], ["10.96.0.10/32", "fd00:96::a/128"]),
];
const PORTS: [(Protocol, u16); 8] = [
    (Protocol::Tcp, 80),
    (Protocol::Tcp, 8080),
    (Protocol::Tcp, 8060),
    (Protocol::Tcp, 53),
    (Protocol::Udp, 53),
    (Protocol::Udp, 80),
    (Protocol::Sctp, 80),
    (Protocol::Sctp, 5000),
];
const NAMESPACES: [&str; 3] = ["a", "b", "kube-system"];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A pod, as the world has it and as the API shows it.
#[derive(Clone, Debug)]
struct TestPod {
    namespace: &'static str,
    name: &'static str,
    ips: Pair,
    /// CNI attached it here.
    attached: bool,
    /// The API shows it.
    shown: bool,
    host_network: bool,
    ended: bool,
    labels: BTreeMap<&'static str, &'static str>,
    ports: Vec<(&'static str, Protocol, u16)>,
}

/// `late` is attached before the API shows it, `ghost` is shown with an address that it no longer has, `old` and `new` claim
/// one address of the other node.
const PLACES: [(&str, Pair, bool, bool, bool, bool); 10] = [
    ("own1", ["10.244.1.5", "fd00:244:0:1::5"], true, true, false, false),
    ("own2", ["10.244.1.6", "fd00:244:0:1::6"], true, true, false, false),
    ("late", ["10.244.1.7", "fd00:244:0:1::7"], true, false, false, false),
    ("ghost", ["10.244.1.8", "fd00:244:0:1::8"], false, true, false, false),
    ("far1", ["10.244.2.5", "fd00:244:0:2::5"], false, true, false, false),
    ("far2", ["10.244.2.6", "fd00:244:0:2::6"], false, true, false, false),
    ("old", ["10.244.2.7", "fd00:244:0:2::7"], false, true, false, false),
    ("new", ["10.244.2.7", "fd00:244:0:2::7"], false, true, false, false),
    ("ended", ["10.244.2.5", "fd00:244:0:2::5"], false, true, false, true),
    ("host", OTHER_NODE, false, true, true, false),
];

#[derive(Clone, Debug)]
struct World {
    namespaces: BTreeMap<&'static str, BTreeMap<&'static str, &'static str>>,
    pods: Vec<TestPod>,
    policies: Vec<Value>,
    services: Vec<services::TestService>,
}

// Random worlds.

fn labels() -> impl Strategy<Value = BTreeMap<&'static str, &'static str>> {
    (
        prop::option::weighted(0.7, select(vec!["web", "db"])),
        prop::option::weighted(0.5, select(vec!["x", "y"])),
    )
        .prop_map(|(app, tier)| {
            app.map(|app| ("app", app)).into_iter().chain(tier.map(|tier| ("tier", tier))).collect()
        })
}

fn pods() -> impl Strategy<Value = Vec<TestPod>> {
    let ports = subsequence(
        vec![
            ("http", Protocol::Tcp, 80),
            ("http", Protocol::Tcp, 8080),
            ("dns", Protocol::Udp, 53),
            ("dns", Protocol::Tcp, 53),
        ],
        0..4,
    );
    let random = (select(vec!["a", "b"]), labels(), ports);
    prop::collection::vec(random, PLACES.len()).prop_map(|randoms| {
        let places = PLACES.into_iter().zip(randoms);
        places
            .map(|((name, ips, attached, shown, host_network, ended), (namespace, labels, ports))| TestPod {
                namespace,
                name,
                ips,
                attached,
                shown,
                host_network,
                ended,
                labels,
                ports,
            })
            .collect()
    })
}

fn selector() -> impl Strategy<Value = Value> {
    let equal = labels();
    let expression = (
        select(vec!["app", "tier"]),
        select(vec!["In", "NotIn", "Exists", "DoesNotExist"]),
        subsequence(vec!["web", "db", "x", "y"], 1..3),
    );
    (equal, prop::collection::vec(expression, 0..2), 0..5u8).prop_map(|(equal, expressions, kind)| {
        let expressions: Vec<Value> = expressions
            .into_iter()
            .map(|(key, operator, values)| match operator {
                "In" | "NotIn" => json!({"key": key, "operator": operator, "values": values}),
                _ => json!({"key": key, "operator": operator}),
            })
            .collect();
        match kind {
            0 | 1 => json!({}),
            2 => json!({"matchLabels": equal}),
            3 => json!({"matchExpressions": expressions}),
            _ => json!({"matchLabels": equal, "matchExpressions": expressions}),
        }
    })
}

fn namespace_selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        selector(),
        select([&NAMESPACES[..], &["ingress-nginx"]].concat())
            .prop_map(|name| json!({"matchLabels": {"kubernetes.io/metadata.name": name}})),
    ]
}

fn pod_selector() -> impl Strategy<Value = Value> {
    let ingress = select(vec!["ingress-nginx", "traefik"]);
    prop_oneof![
        6 => selector(),
        1 => Just(json!({"matchLabels": {"k8s-app": "kube-dns"}})),
        1 => ingress.prop_map(|name| json!({"matchLabels": {"app.kubernetes.io/name": name}})),
    ]
}

fn peer() -> impl Strategy<Value = Value> {
    let block =
        (select(BLOCKS.to_vec()), 0..2usize, any::<bool>()).prop_map(|((cidr, except), family, excepts)| {
            let except = if excepts { vec![except[family]] } else { vec![] };
            json!({"ipBlock": {"cidr": cidr[family], "except": except}})
        });
    prop_oneof![
        pod_selector().prop_map(|pods| json!({"podSelector": pods})),
        namespace_selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (namespace_selector(), pod_selector())
            .prop_map(|(namespaces, pods)| json!({"namespaceSelector": namespaces, "podSelector": pods})),
        block,
    ]
}

fn port() -> impl Strategy<Value = Value> {
    let number =
        select(PORTS.to_vec()).prop_map(|(protocol, port)| json!({"protocol": protocol, "port": port}));
    prop_oneof![
        3 => number,
        1 => Just(json!({"port": 80})),
        1 => Just(json!({"port": 8000, "endPort": 8070})),
        1 => Just(json!({"port": 78, "endPort": 82, "protocol": "SCTP"})),
        1 => select(vec!["TCP", "UDP", "SCTP"]).prop_map(|protocol| json!({"protocol": protocol})),
        2 => select(vec![("http", "TCP"), ("dns", "UDP"), ("dns-tcp", "TCP"), ("none", "TCP")])
            .prop_map(|(name, protocol)| json!({"protocol": protocol, "port": name})),
    ]
}

fn rules(peers: &'static str) -> impl Strategy<Value = Vec<Value>> {
    let rule = (
        prop::option::weighted(0.8, prop::collection::vec(peer(), 0..3)),
        prop::option::weighted(0.6, prop::collection::vec(port(), 0..3)),
    )
        .prop_map(move |(list, ports)| {
            let mut rule = json!({});
            if let Some(list) = list {
                rule[peers] = list.into();
            }
            if let Some(ports) = ports {
                rule["ports"] = ports.into();
            }
            rule
        });
    prop::collection::vec(rule, 0..3)
}

fn policy(i: usize) -> impl Strategy<Value = Value> {
    let types =
        select(vec![None, Some(vec!["Ingress"]), Some(vec!["Egress"]), Some(vec!["Ingress", "Egress"])]);
    let namespace = select(vec!["a", "b"]);
    (namespace, selector(), types, prop::option::of(rules("from")), prop::option::of(rules("to"))).prop_map(
        move |(namespace, selector, types, ingress, egress)| {
            let mut spec = json!({"podSelector": selector});
            for (field, value) in [("ingress", ingress.map(Value::from)), ("egress", egress.map(Value::from))] {
                if let Some(value) = value {
                    spec[field] = value;
                }
            }
            if let Some(types) = types {
                spec["policyTypes"] = types.into();
            }
            json!({"kind": "NetworkPolicy", "metadata": {"namespace": namespace, "name": format!("p{i}")}, "spec": spec})
        },
    )
}

fn world() -> impl Strategy<Value = World> {
    let policies = (0..6usize).prop_flat_map(|n| (0..n).map(policy).collect::<Vec<_>>());
    (prop::collection::vec(labels(), NAMESPACES.len()), pods(), policies, services::services()).prop_map(
        |(labels, pods, policies, services)| {
            let named = NAMESPACES.into_iter().zip(labels).map(|(name, mut labels)| {
                labels.insert("kubernetes.io/metadata.name", name);
                (name, labels)
            });
            World { namespaces: named.collect(), pods, policies, services }
        },
    )
}

// The world as a Snapshot.

fn documents(world: &World) -> Vec<Value> {
    let node = |name: &str, cidrs: Pair, ips: Pair| {
        let addresses: Vec<Value> =
            ips.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
        json!({"kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": cidrs}, "status": {"addresses": addresses}})
    };
    let mut all = vec![
        node(OWN, ["10.244.1.0/24", "fd00:244:0:1::/64"], OWN_NODE),
        node(OTHER, ["10.244.2.0/24", "fd00:244:0:2::/64"], OTHER_NODE),
    ];
    for (name, labels) in &world.namespaces {
        all.push(json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
    }
    for pod in world.pods.iter().filter(|pod| pod.shown) {
        let ports: Vec<Value> = pod
            .ports
            .iter()
            .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "containerPort": port}))
            .collect();
        let ips: Vec<Value> = pod.ips.iter().map(|ip| json!({"ip": ip})).collect();
        all.push(json!({
            "kind": "Pod",
            "metadata": {"namespace": pod.namespace, "name": pod.name, "uid": pod.name, "labels": pod.labels},
            "spec": {"hostNetwork": pod.host_network, "containers": [{"ports": ports}]},
            "status": {"podIPs": ips, "phase": if pod.ended { "Succeeded" } else { "Running" }},
        }));
    }
    all.extend(world.policies.iter().cloned());
    all.extend(world.services.iter().flat_map(services::TestService::documents));
    all
}

fn snapshot(world: &World) -> Snapshot {
    let config = ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        cluster_dns: DNS.iter().map(|text| ip(text)).collect(),
        proxy: weft_model::ProxyConfig {
            external_ip_ranges: services::EXTERNAL_RANGES.map(|range| range.parse().unwrap()).to_vec(),
            ..Default::default()
        },
        ingress: weft_model::IngressConfig { on: true, ..Default::default() },
        ..ClusterConfig::default()
    };
    let facts = NodeFacts {
        name: OWN.into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let cluster = Cluster::from_documents(documents(world));
    let snapshot = cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts));
    assert_eq!(*snapshot.problems, [], "the world is valid");
    let attached = world.pods.iter().filter(|pod| pod.attached).flat_map(|pod| {
        let attached =
            AttachedPod { pod: Some(PodKey::new(pod.namespace, pod.name)), uid: pod.name.to_owned() };
        pod.ips.map(|text| (ip(text), Arc::new(attached.clone())))
    });
    Snapshot { attachments: Arc::new(attached.collect()), ..snapshot }
}

// The naive evaluator.

/// "A selector": matchLabels and matchExpressions are ANDed; an empty one selects everything.
fn selects(selector: &Value, labels: &BTreeMap<&str, &str>) -> bool {
    let equal = selector["matchLabels"].as_object().into_iter().flatten();
    let expressions = selector["matchExpressions"].as_array().into_iter().flatten();
    equal.into_iter().all(|(key, value)| labels.get(key.as_str()) == value.as_str().as_ref())
        && expressions.into_iter().all(|expression| {
            let value = labels.get(expression["key"].as_str().unwrap());
            let listed = value.is_some_and(|value| {
                expression["values"].as_array().is_some_and(|values| values.iter().any(|one| one == value))
            });
            match expression["operator"].as_str().unwrap() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                other => panic!("{other}"),
            }
        })
}

/// Namespace, labels and ports of each pod that an address may stand for.
type Somebody<'a> = (&'a str, BTreeMap<&'a str, &'a str>, Vec<(&'a str, Protocol, u16)>);

fn who<'a>(address: IpAddr, world: &'a World) -> Vec<Somebody<'a>> {
    if DNS.iter().any(|dns| ip(dns) == address) {
        let ports = vec![("dns", Protocol::Udp, 53), ("dns-tcp", Protocol::Tcp, 53)];
        return vec![("kube-system", BTreeMap::from([("k8s-app", "kube-dns")]), ports)];
    }
    if is_ingress(address) {
        let named = |namespace, name| (namespace, BTreeMap::from([("app.kubernetes.io/name", name)]), vec![]);
        return vec![named("ingress-nginx", "ingress-nginx"), named("kube-system", "traefik")];
    }
    let of_own_node = ["10.244.1.0/24", "fd00:244:0:1::/64"]
        .iter()
        .any(|cidr| cidr.parse::<IpNet>().unwrap().contains(&address));
    let bears = |pod: &&TestPod| {
        pod.ips.iter().any(|text| ip(text) == address)
            && pod.shown
            && !pod.host_network
            && !pod.ended
            && (pod.attached || !of_own_node)
    };
    let bearers = world.pods.iter().filter(bears);
    bearers.map(|pod| (pod.namespace, pod.labels.clone(), pod.ports.clone())).collect()
}

fn in_block(block: &Value, address: IpAddr) -> bool {
    let contains =
        |text: &Value, address: IpAddr| text.as_str().unwrap().parse::<IpNet>().unwrap().contains(&address);
    let covers = |address| {
        contains(&block["cidr"], address)
            && !block["except"].as_array().into_iter().flatten().any(|net| contains(net, address))
    };
    // What the other node sends into the tunnel bears the address of its pod range, and is the node's.
    let node = (0..2).find(|family| ip(OTHER_HOST[*family]) == address).map(|family| ip(OTHER_NODE[family]));
    covers(address) || node.is_some_and(covers)
}

fn is_peer(peer: &Value, policy_namespace: &str, address: IpAddr, world: &World) -> bool {
    if let Some(block) = peer.get("ipBlock") {
        return in_block(block, address);
    }
    let all = who(address, world);
    let meant = |(namespace, labels, _): &Somebody<'_>| {
        // There need not be a Namespace for the ingress to count as of it.
        let virtual_labels = BTreeMap::from([("kubernetes.io/metadata.name", *namespace)]);
        let in_namespace = match peer.get("namespaceSelector") {
            Some(selector) => selects(selector, world.namespaces.get(namespace).unwrap_or(&virtual_labels)),
            None => *namespace == policy_namespace,
        };
        in_namespace && peer.get("podSelector").is_none_or(|selector| selects(selector, labels))
    };
    match is_ingress(address) {
        true => all.iter().any(meant),
        false => !all.is_empty() && all.iter().all(meant),
    }
}

/// "The node's ingress counts as ingress-nginx's controller and as Traefik, under whichever name a policy means it."
fn is_ingress(address: IpAddr) -> bool {
    OWN_INGRESS.iter().chain(&OTHER_INGRESS).any(|text| ip(text) == address)
}

fn is_port(entry: &Value, protocol: Protocol, number: u16, destination: &[Somebody<'_>]) -> bool {
    if entry.get("protocol").map_or(json!("TCP"), Clone::clone) != json!(protocol) {
        return false;
    }
    match (&entry["port"], entry["endPort"].as_u64()) {
        (Value::Null, _) => true,
        (Value::String(name), _) => {
            !destination.is_empty()
                && destination.iter().all(|(_, _, ports)| ports.contains(&(name.as_str(), protocol, number)))
        }
        (port, end) => (port.as_u64().unwrap()..=end.or(port.as_u64()).unwrap()).contains(&u64::from(number)),
    }
}

/// Whether a list has nobody in it, which means everybody.
fn listed<'a>(rule: &'a Value, field: &str) -> Option<&'a Vec<Value>> {
    rule[field].as_array().filter(|list| !list.is_empty())
}

/// "A pod is isolated in a direction if any policy selects it and has that direction in its policyTypes; then only what some
/// policy allows is allowed."
fn direction_allows(direction: &str, subject: IpAddr, other: IpAddr, packet: &Packet, world: &World) -> bool {
    let Some(pod) =
        world.pods.iter().find(|pod| pod.attached && pod.ips.iter().any(|text| ip(text) == subject))
    else {
        return true;
    };
    let destination = who(packet.destination.ip(), world);
    let (peers, rules) = if direction == "Ingress" { ("from", "ingress") } else { ("to", "egress") };
    let (mut isolated, mut allowed) = (false, false);
    for policy in world.policies.iter().filter(|policy| policy["metadata"]["namespace"] == pod.namespace) {
        let spec = &policy["spec"];
        let has_direction = match spec["policyTypes"].as_array() {
            Some(types) => types.iter().any(|name| name == direction),
            None => direction == "Ingress" || listed(spec, "egress").is_some(),
        };
        // Whether it selects a pod that the API has not shown is not known, so it does, and allows nothing.
        let selected = !pod.shown || selects(&spec["podSelector"], &pod.labels);
        if !has_direction || !selected {
            continue;
        }
        isolated = true;
        for rule in spec[rules].as_array().into_iter().flatten().filter(|_| pod.shown) {
            let peer = listed(rule, peers)
                .is_none_or(|list| list.iter().any(|peer| is_peer(peer, pod.namespace, other, world)));
            let (protocol, number) = (packet.protocol, packet.destination.port());
            let port = listed(rule, "ports")
                .is_none_or(|list| list.iter().any(|entry| is_port(entry, protocol, number, &destination)));
            allowed |= peer && port;
        }
    }
    !isolated || allowed
}

fn expected(packet: &Packet, world: &World) -> bool {
    let (source, destination) = (packet.source.ip(), packet.destination.ip());
    let from_own_node = OWN_NODE.iter().any(|node| ip(node) == source);
    source == destination
        || (direction_allows("Egress", source, destination, packet, world)
            && (from_own_node || direction_allows("Ingress", destination, source, packet, world)))
}

// The node around the rules.

struct Node;

impl Routes for Node {
    fn link(&self, destination: IpAddr) -> Option<String> {
        if self.is_local(destination) {
            return None;
        }
        let own = PLACES
            .iter()
            .position(|(_, ips, attached, ..)| *attached && ips.iter().any(|text| ip(text) == destination));
        if let Some(i) = own {
            return Some(format!("weftp{i:010x}"));
        }
        let tunnel = ["10.244.0.0/16", "fd00:244::/56"]
            .iter()
            .any(|cidr| cidr.parse::<IpNet>().unwrap().contains(&destination));
        Some(if tunnel { "weft0" } else { "eth0" }.to_owned())
    }

    fn is_local(&self, address: IpAddr) -> bool {
        OWN_NODE.iter().chain(&DNS).chain(&OWN_INGRESS).any(|own| ip(own) == address)
    }
}

/// Every way a packet that this node judges can go: from its pods to anybody, and from anybody to its pods.
fn ways(family: usize) -> Vec<(Origin<'static>, IpAddr, IpAddr)> {
    const LINKS: [&str; 3] = ["weftp0000000000", "weftp0000000001", "weftp0000000002"];
    let at = |pair: &Pair| ip(pair[family]);
    let own: Vec<(Origin<'static>, IpAddr)> =
        LINKS.iter().zip(&PLACES).map(|(link, place)| (Origin::Link(link), at(&place.1))).collect();
    let far: BTreeSet<IpAddr> = PLACES[4..9].iter().map(|place| at(&place.1)).collect();
    let outside: Vec<IpAddr> = OUTSIDE.iter().map(at).collect();
    let mut ways = Vec::new();
    let mut destinations: Vec<IpAddr> = own.iter().map(|(_, ip)| *ip).chain(far.iter().copied()).collect();
    destinations.extend(outside.iter().copied());
    destinations.extend([OWN_NODE, OTHER_NODE, OTHER_HOST, DNS, OWN_INGRESS, OTHER_INGRESS].iter().map(at));
    for (link, source) in &own {
        ways.extend(destinations.iter().map(|destination| (*link, *source, *destination)));
    }
    let mut sources: Vec<(Origin<'static>, IpAddr)> =
        far.into_iter().map(|ip| (Origin::Link("weft0"), ip)).collect();
    sources.extend(outside.into_iter().map(|ip| (Origin::Link("eth0"), ip)));
    sources.push((Origin::Host, at(&OWN_NODE)));
    sources.push((Origin::Link("eth0"), at(&OTHER_NODE)));
    sources.push((Origin::Link("weft0"), at(&OTHER_HOST)));
    sources.push((Origin::Host, at(&OWN_INGRESS)));
    sources.push((Origin::Link("weft0"), at(&OTHER_INGRESS)));
    for (origin, source) in sources {
        ways.extend(own.iter().map(|(_, destination)| (origin, source, *destination)));
    }
    ways
}

/// Counts of allowed and denied packets.
fn check(world: &World, plan: &PolicyPlan) -> [usize; 2] {
    let mut seen = [0, 0];
    for family in 0..2 {
        for (origin, source, destination) in ways(family) {
            for (protocol, port) in PORTS {
                let packet = Packet {
                    source: SocketAddr::new(source, 40_000),
                    destination: SocketAddr::new(destination, port),
                    protocol,
                };
                let allowed = expected(&packet, world);
                let outcome = trace(&plan.table, &Node, origin, &packet, 0, &mut BTreeMap::new());
                let passed = matches!(outcome, Outcome::Passed { .. });
                assert_eq!(passed, allowed, "{packet:?} from {origin:?}: {outcome:?}\n{}", plan.table);
                let judged = plan.judge.allows(source, destination, protocol.number(), port);
                assert_eq!(judged, allowed, "the judge of established connections, {packet:?}");
                seen[usize::from(!allowed)] += 1;
            }
        }
    }
    seen
}

/// The same for what is called through Services: the rules of proxy and policies in one node, the verdict that on the pod or node
/// behind. Counts as [`check`] does.
fn check_services(world: &World, plan: &PolicyPlan, proxy: &ProxyPlan) -> [usize; 2] {
    let table = services::both(&plan.table, &proxy.table);
    let mut seen = [0, 0];
    for Call { origin, packet, behind } in calls(world) {
        let translated = Packet { destination: behind, ..packet.clone() };
        let allowed = expected(&translated, world);
        let outcome = trace(&table, &Node, origin, &packet, 0, &mut BTreeMap::new());
        let passed = match outcome {
            Outcome::Passed { destination, .. } => {
                assert_eq!(destination, behind, "{packet:?} from {origin:?}");
                true
            }
            _ => false,
        };
        assert_eq!(passed, allowed, "{packet:?} to {behind} from {origin:?}: {outcome:?}\n{table}");
        seen[usize::from(!allowed)] += 1;
    }
    seen
}

fn cases(usual: u32) -> u32 {
    std::env::var("WEFT_MEANING_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(48), failure_persistence: None, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_packet_meets_the_verdict_of_the_kubernetes_text(world in world()) {
        let snapshot = snapshot(&world);
        let plan = PolicyPlanner::default().plan(&snapshot).plan;
        check(&world, &plan);
        check_services(&world, &plan, &ProxyPlanner::default().plan(&snapshot).plan);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_planner_that_remembers_plans_what_a_new_one_plans(worlds in prop::collection::vec(world(), 2..6)) {
        let mut remembering = PolicyPlanner::default();
        for world in &worlds {
            let snapshot = snapshot(world);
            let planned = remembering.plan(&snapshot);
            prop_assert_eq!(&planned, &PolicyPlanner::default().plan(&snapshot));
            let again = remembering.plan(&snapshot);
            prop_assert!(Arc::ptr_eq(&again.plan.table, &planned.plan.table), "nothing changed, nothing was touched");
        }
    }
}

/// The evaluator would be worth little if random worlds never denied or never allowed anything.
#[test]
fn random_worlds_show_both_verdicts() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut seen, mut through_services) = ([0, 0], [0, 0]);
    let add = |sum: &mut [usize; 2], counts: [usize; 2]| *sum = [sum[0] + counts[0], sum[1] + counts[1]];
    for _ in 0..20 {
        let world = world().new_tree(&mut runner).unwrap().current();
        let snapshot = snapshot(&world);
        let plan = PolicyPlanner::default().plan(&snapshot).plan;
        add(&mut seen, check(&world, &plan));
        let proxy = ProxyPlanner::default().plan(&snapshot).plan;
        add(&mut through_services, check_services(&world, &plan, &proxy));
    }
    assert!(seen.iter().all(|count| *count > 2000), "too few allowed or denied: {seen:?}");
    assert!(through_services.iter().all(|count| *count > 500), "through Services: {through_services:?}");
}
