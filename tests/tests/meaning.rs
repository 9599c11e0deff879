//! Meaning: what the planned rules do to a packet is what the Kubernetes text says, for random clusters and every
//! kind of client, in both families.
//!
//! `expected` is written from the Service and EndpointSlice documentation (virtual IPs, traffic policies, KEP-1669), without a
//! look at the planner: it walks all Services for every packet. The planner's rules are followed by the tracer.

// Helpers of a test are test code; clippy sees that only of functions marked #[test].
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use weft_model::node_facts::{Uplink, WireguardBackend};
use weft_model::objects::{
    Endpoint, EndpointPort, EndpointSlice, Hints, Node, Protocol, Service, ServiceKind, ServicePort,
    TrafficPolicy,
};
use weft_model::ruleset::{Datum, ElementData};
use weft_model::{ClusterConfig, Generation, NamespacedName, NodeFacts, NodeName, ProxyConfig, Snapshot};
use weft_netstack::proxy::{ProxyPlan, ProxyPlanner};
use weft_netstack::reconcile::Planner;
use weft_tests::trace::{Memory, Origin, Outcome, Packet, Routes, trace};

const OWN: &str = "node-a";
const OTHER: &str = "node-b";
const ZONE: &str = "topology.kubernetes.io/zone";
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
const PORTS: [u16; 3] = [53, 80, 443];
const NODE_PORTS: [u16; 2] = [30_080, 30_443];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The places of one family.
struct Family {
    /// The last is the cluster DNS address.
    vips: [&'static str; 4],
    unallocated: &'static str,
    own_node: &'static str,
    own_second_address: &'static str,
    other_node: &'static str,
    own_pods: [&'static str; 2],
    own_host_address: &'static str,
    other_pods: [&'static str; 2],
    outside: &'static str,
    /// Of load balancers.
    load_balancers: [&'static str; 2],
    /// The first is in a range that the operator allows.
    external: [&'static str; 2],
}

const V4: Family = Family {
    vips: ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.10"],
    unallocated: "10.96.0.99",
    own_node: "192.0.2.1",
    own_second_address: "198.18.0.1",
    other_node: "192.0.2.2",
    own_pods: ["10.244.1.5", "10.244.1.6"],
    own_host_address: "10.244.1.1",
    other_pods: ["10.244.2.5", "10.244.2.6"],
    outside: "203.0.113.9",
    load_balancers: ["198.51.100.1", "198.51.100.2"],
    external: ["198.51.100.70", "198.51.100.9"],
};

const V6: Family = Family {
    vips: ["fd00:96::1", "fd00:96::2", "fd00:96::3", "fd00:96::a"],
    unallocated: "fd00:96::99",
    own_node: "2001:db8::1",
    own_second_address: "2001:db8:1::1",
    other_node: "2001:db8::2",
    own_pods: ["fd00:244:0:1::5", "fd00:244:0:1::6"],
    own_host_address: "fd00:244:0:1::1",
    other_pods: ["fd00:244:0:2::5", "fd00:244:0:2::6"],
    outside: "2001:db8:ffff::9",
    load_balancers: ["2001:db8:b::1", "2001:db8:b::2"],
    external: ["2001:db8:e::7", "2001:db8:b::9"],
};

fn family(ipv6: bool) -> &'static Family {
    if ipv6 { &V6 } else { &V4 }
}

fn config() -> ClusterConfig {
    ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        cluster_dns: vec![ip(V4.vips[3]), ip(V6.vips[3])],
        // Ranges that hold a node's address too, which is not for the taking.
        proxy: ProxyConfig {
            external_ip_ranges: ["198.51.100.64/26", "192.0.2.0/24", "2001:db8:e::/64", "2001:db8::/64"]
                .map(|range| range.parse().unwrap())
                .to_vec(),
            node_port_ranges: vec![],
        },
        ..ClusterConfig::default()
    }
}

fn node(name: &str, cidrs: [&str; 2], ips: [&str; 2]) -> (NodeName, Arc<Node>) {
    let node = Node {
        name: name.into(),
        uid: String::new(),
        created: 0,
        labels: BTreeMap::from([(ZONE.to_owned(), format!("zone-of-{name}"))]),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        internal_ips: ips.iter().map(|text| ip(text)).collect(),
        leaving: false,
        cordoned: false,
        links: None,
        public_key: None,
        next_public_key: None,
        answers_for: Default::default(),
        unready: false,
        reach: Default::default(),
        wireguard_port: None,
    };
    (name.into(), Arc::new(node))
}

fn snapshot(services: &[Service], slices: &[EndpointSlice]) -> Snapshot {
    let addresses = [&V4, &V6].iter().flat_map(|of| [ip(of.own_node), ip(of.own_second_address)]).collect();
    let uplink = Uplink { name: "eth0".to_owned(), index: 2, mtu_bytes: 1500, addresses, subnets: vec![] };
    let facts = NodeFacts {
        name: OWN.into(),
        uplinks: vec![uplink],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let nodes = [
        node(OWN, ["10.244.1.0/24", "fd00:244:0:1::/64"], [V4.own_node, V6.own_node]),
        node(OTHER, ["10.244.2.0/24", "fd00:244:0:2::/64"], [V4.other_node, V6.other_node]),
    ];
    Snapshot {
        generation: Generation(1),
        config: Arc::new(config()),
        facts: Arc::new(facts),
        nodes: Arc::new(nodes.into_iter().collect()),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::new(services.iter().map(|s| (s.key.clone(), Arc::new(s.clone()))).collect()),
        endpoint_slices: Arc::new(slices.iter().map(|s| (s.key.clone(), Arc::new(s.clone()))).collect()),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }
}

// Random clusters.

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn ports() -> impl Strategy<Value = Vec<ServicePort>> {
    let all: Vec<(u16, Protocol)> =
        PORTS.iter().flat_map(|port| PROTOCOLS.map(|protocol| (*port, protocol))).collect();
    let chosen = subsequence(all, 1..4);
    let node_ports = prop::collection::vec(prop::option::of(select(NODE_PORTS.to_vec())), 4);
    (chosen, node_ports).prop_map(|(chosen, node_ports)| {
        let mut taken = BTreeSet::new();
        let named =
            |(i, ((port, protocol), node_port)): (usize, ((u16, Protocol), Option<u16>))| ServicePort {
                name: format!("p{i}"),
                protocol,
                port,
                node_port: node_port.filter(|node_port| taken.insert((protocol, *node_port))),
            };
        chosen.into_iter().zip(node_ports).enumerate().map(named).collect()
    })
}

fn kind() -> impl Strategy<Value = ServiceKind> {
    let vips = (0..4usize, select(vec![[true, true], [true, false], [false, true]]));
    prop_oneof![
        12 => vips.prop_map(|(i, [v4, v6])| {
            let v4 = v4.then(|| ip(V4.vips[i]));
            let v6 = v6.then(|| ip(V6.vips[i]));
            ServiceKind::ClusterIps(v4.into_iter().chain(v6).collect())
        }),
        1 => Just(ServiceKind::Headless),
        1 => Just(ServiceKind::ExternalName("db.example.com".to_owned())),
    ]
}

/// Addresses of load balancers and of `spec.externalIPs`, those that must be refused among them.
fn externals() -> impl Strategy<Value = (Vec<IpAddr>, Vec<IpAddr>)> {
    let both = |pick: fn(&Family) -> Vec<&'static str>| -> Vec<IpAddr> {
        pick(&V4).into_iter().chain(pick(&V6)).map(ip).collect()
    };
    let of_balancers = both(|of| vec![of.load_balancers[0], of.load_balancers[1], of.own_node, of.vips[0]]);
    let of_spec = both(|of| vec![of.external[0], of.external[1], of.own_node, of.vips[1], of.own_pods[0]]);
    (subsequence(of_balancers, 0..4), subsequence(of_spec, 0..4))
}

/// An empty list is one whose every entry is unreadable.
fn source_ranges() -> impl Strategy<Value = Option<Vec<IpNet>>> {
    let all: Vec<IpNet> = [&V4, &V6]
        .iter()
        .flat_map(|of| [of.outside, of.own_pods[0], of.other_pods[0], of.own_node, of.other_node])
        .map(|text| IpNet::from(ip(text)))
        .chain([
            "0.0.0.0/0".parse().unwrap(),
            "10.244.0.0/16".parse().unwrap(),
            "fd00:244::/56".parse().unwrap(),
        ])
        .collect();
    prop_oneof![2 => Just(None), 1 => subsequence(all, 0..5).prop_map(Some)]
}

fn service(i: usize) -> impl Strategy<Value = Service> {
    let affinity = prop_oneof![2 => Just(None), 1 => select(vec![Some(10), Some(10_800)])];
    let outside = (externals(), source_ranges(), affinity);
    (kind(), ports(), policy(), policy(), 0..3i64, 0..8u8, outside).prop_map(
        move |(
            kind,
            ports,
            internal,
            external,
            created,
            label,
            ((balancers, external_ips), ranges, affinity),
        )| {
            let label = match label {
                0 => Some("service.kubernetes.io/service-proxy-name"),
                1 => Some("service.kubernetes.io/headless"),
                _ => None,
            };
            Service {
                key: NamespacedName::new("default", format!("s{i}")),
                uid: String::new(),
                created,
                labels: label.into_iter().map(|label| (label.to_owned(), String::new())).collect(),
                kind,
                ports,
                publish_not_ready_addresses: false,
                internal_traffic_policy: internal,
                external_traffic_policy: external,
                session_affinity_seconds: affinity,
                load_balancer_ips: balancers,
                external_ips,
                load_balancer_source_ranges: ranges,
                health_check_node_port: None,
                balancer: None,
            }
        },
    )
}

/// Hints of one endpoint in a cluster where all have such, or nearly all.
fn hints(hinted: bool) -> impl Strategy<Value = BTreeSet<&'static str>> {
    let given = subsequence(vec![OWN, OTHER], 1..=2).prop_map(BTreeSet::from_iter);
    if hinted {
        prop_oneof![1 => Just(BTreeSet::new()), 6 => given].boxed()
    } else {
        Just(BTreeSet::new()).boxed()
    }
}

fn endpoint(ipv6: bool, [zones, nodes]: [bool; 2]) -> impl Strategy<Value = Endpoint> {
    let of = family(ipv6);
    let places = vec![
        (of.own_pods[0], Some(OWN)),
        (of.own_pods[1], Some(OWN)),
        (of.other_pods[0], Some(OTHER)),
        (of.other_pods[1], Some(OTHER)),
        (of.own_node, Some(OWN)),
        (of.other_node, Some(OTHER)),
        (of.outside, None),
    ];
    let conditions = select(vec![
        (true, true, false),
        (true, true, false),
        (true, true, true),
        (false, true, true),
        (false, false, true),
        (false, false, false),
        (false, true, false),
    ]);
    let hints = (hints(zones), hints(nodes));
    (select(places), conditions, hints).prop_map(|((address, node), (ready, serving, terminating), hints)| {
        Endpoint {
            address: ip(address),
            ready,
            serving,
            terminating,
            hostname: None,
            node: node.map(NodeName::from),
            hints: Hints {
                zones: hints.0.into_iter().map(|node| format!("zone-of-{node}")).collect(),
                nodes: hints.1.into_iter().map(NodeName::from).collect(),
            }
            .some(),
            target_pod: None,
        }
    })
}

/// Most port names and protocols, so that slices and Services meet often enough.
fn slice(i: usize, hinted: [bool; 2]) -> impl Strategy<Value = EndpointSlice> {
    let all: Vec<(usize, Protocol)> =
        (0..3usize).flat_map(|name| PROTOCOLS.map(|protocol| (name, protocol))).collect();
    let ports = (subsequence(all, 4..9), select(vec![8080, 9090]));
    let endpoints = any::<bool>()
        .prop_flat_map(move |ipv6| (Just(ipv6), prop::collection::vec(endpoint(ipv6, hinted), 0..5)));
    (0..4usize, ports, endpoints).prop_map(move |(service, (ports, number), (ipv6, endpoints))| {
        EndpointSlice {
            key: NamespacedName::new("default", format!("slice{i}")),
            service: NamespacedName::new("default", format!("s{service}")),
            ipv6,
            ports: ports
                .iter()
                .map(|(name, protocol)| EndpointPort {
                    name: format!("p{name}"),
                    protocol: *protocol,
                    port: number,
                })
                .collect(),
            endpoints,
            triggered_millis: None,
        }
    })
}

type ClusterState = (Vec<Service>, Vec<EndpointSlice>);

fn cluster() -> impl Strategy<Value = ClusterState> {
    let services = (2..5usize).prop_flat_map(|n| (0..n).map(service).collect::<Vec<_>>());
    let slices = (4..16usize, any::<[bool; 2]>())
        .prop_flat_map(|(n, hinted)| (0..n).map(|i| slice(i, hinted)).collect::<Vec<_>>());
    (services, slices)
}

// The naive evaluator.

#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    Rejected,
    Dropped,
    /// Not a Service's: goes where it was sent.
    Untouched,
    /// To any of these and no other; `sticky`: a client always to the same.
    OneOf {
        endpoints: BTreeSet<SocketAddr>,
        sticky: bool,
    },
}

/// Who may answer `port` in a family, from all slices of the Service; `local`: on this node only.
fn candidates(
    service: &Service,
    port: &ServicePort,
    ipv6: bool,
    slices: &[EndpointSlice],
    local: bool,
) -> BTreeSet<SocketAddr> {
    let mut ready: BTreeMap<SocketAddr, [BTreeSet<String>; 2]> = BTreeMap::new();
    let mut draining = BTreeSet::new();
    for slice in slices {
        for target in &slice.ports {
            for endpoint in &slice.endpoints {
                let of_service = slice.service == service.key && slice.ipv6 == ipv6;
                let of_port = target.name == port.name && target.protocol == port.protocol;
                let here = endpoint.node == Some(NodeName::from(OWN));
                if !of_service || !of_port || (local && !here) {
                    continue;
                }
                let address = SocketAddr::new(endpoint.address, target.port);
                if endpoint.ready {
                    let [nodes, zones] = ready.entry(address).or_default();
                    let hints = endpoint.hints.as_deref().cloned().unwrap_or_default();
                    nodes.extend(hints.nodes.into_iter().map(|name| name.to_string()));
                    zones.extend(hints.zones);
                }
                if endpoint.serving && endpoint.terminating {
                    draining.insert(address);
                }
            }
        }
    }
    // KEP-1669: those that are about to end only when there is no other.
    if ready.is_empty() {
        return draining;
    }
    // KEP-3015: hints for nodes before hints for zones, each only when every endpoint has one and one is for this node; they
    // are about traffic to the whole cluster.
    for (kind, here) in [OWN.to_owned(), format!("zone-of-{OWN}")].into_iter().enumerate() {
        let all_hinted = ready.values().all(|hints| !hints[kind].is_empty());
        let here: BTreeSet<SocketAddr> = ready
            .iter()
            .filter(|(_, hints)| hints[kind].contains(&here))
            .map(|(address, _)| *address)
            .collect();
        if !local && all_hinted && !here.is_empty() {
            return here;
        }
    }
    ready.into_keys().collect()
}

fn is_proxied(service: &Service) -> bool {
    let labels = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
    !labels.iter().any(|label| service.labels.contains_key(*label))
}

fn cluster_ips(service: &Service) -> &[IpAddr] {
    match &service.kind {
        ServiceKind::ClusterIps(ips) => ips,
        ServiceKind::Headless | ServiceKind::ExternalName(_) => &[],
    }
}

/// "internalTrafficPolicy / externalTrafficPolicy: Local": only endpoints of this node, else dropped; without any endpoint
/// anywhere, refused.
fn by_policy(
    service: &Service,
    port: &ServicePort,
    ipv6: bool,
    slices: &[EndpointSlice],
    policy: TrafficPolicy,
) -> Expected {
    let anywhere = candidates(service, port, ipv6, slices, false);
    let allowed = match policy {
        TrafficPolicy::Cluster => anywhere.clone(),
        TrafficPolicy::Local => candidates(service, port, ipv6, slices, true),
    };
    match (anywhere.is_empty(), allowed.is_empty()) {
        (true, _) => Expected::Rejected,
        (false, true) => Expected::Dropped,
        (false, false) => {
            Expected::OneOf { endpoints: allowed, sticky: service.session_affinity_seconds.is_some() }
        }
    }
}

/// "externalTrafficPolicy" is about clients outside; those inside reach all endpoints at the same addresses.
fn from_outside(
    service: &Service,
    port: &ServicePort,
    ipv6: bool,
    slices: &[EndpointSlice],
    inside: bool,
) -> Expected {
    let anywhere = candidates(service, port, ipv6, slices, false);
    if inside && !anywhere.is_empty() {
        return Expected::OneOf { endpoints: anywhere, sticky: service.session_affinity_seconds.is_some() };
    }
    by_policy(service, port, ipv6, slices, service.external_traffic_policy)
}

/// Load balancers give addresses outside the cluster, nodes' own too; `externalIPs` must be in an allowed range and nobody
/// else's. A Service has addresses only in families in which it has a ClusterIP.
fn may_have(service: &Service, address: IpAddr) -> bool {
    let of = family(address.is_ipv6());
    let exists = cluster_ips(service).iter().any(|ip| ip.is_ipv6() == address.is_ipv6());
    let given = service.load_balancer_ips.contains(&address)
        && [of.load_balancers[0], of.load_balancers[1], of.own_node].iter().any(|text| ip(text) == address);
    let allowed = service.external_ips.contains(&address) && address == ip(of.external[0]);
    exists && (given || allowed)
}

/// "loadBalancerSourceRanges": by the client's own address; a node's own address in the list stands for all addresses of that
/// node.
fn is_let_in(service: &Service, client: IpAddr) -> bool {
    let Some(ranges) = &service.load_balancer_source_ranges else { return true };
    let listed = |address: IpAddr| ranges.iter().any(|range| range.contains(&address));
    listed(client) || (Node4And6.is_local(client) && listed(ip(family(client.is_ipv6()).own_node)))
}

fn expected(packet: &Packet, inside: bool, services: &[Service], slices: &[EndpointSlice]) -> Expected {
    let (to, port_number) = (packet.destination.ip(), packet.destination.port());
    let ipv6 = to.is_ipv6();
    let mut by_age: Vec<&Service> = services.iter().collect();
    by_age.sort_by_key(|service| (service.created, service.key.clone()));
    let dns = config().cluster_dns.contains(&to);
    let port_of = |service: &&Service, is: &dyn Fn(&ServicePort) -> bool| {
        service.ports.iter().find(|port| port.protocol == packet.protocol && is(port)).cloned()
    };
    // A ClusterIP and its port.
    for service in by_age.iter().filter(|s| is_proxied(s) && cluster_ips(s).contains(&to)) {
        if let Some(port) = port_of(service, &|port| port.port == port_number)
            && !(dns && port_number == 53)
        {
            return by_policy(service, &port, ipv6, slices, service.internal_traffic_policy);
        }
    }
    // An address outside the cluster.
    for service in by_age.iter().filter(|s| is_proxied(s) && may_have(s, to)) {
        if let Some(port) = port_of(service, &|port| port.port == port_number) {
            if service.load_balancer_ips.contains(&to) && !is_let_in(service, packet.source.ip()) {
                return Expected::Dropped;
            }
            return from_outside(service, &port, ipv6, slices, inside);
        }
    }
    // A node port: on the node's own InternalIP only, for Services that exist in this family.
    if to == ip(family(ipv6).own_node) {
        for service in by_age.iter().filter(|s| is_proxied(s)) {
            let in_family = cluster_ips(service).iter().any(|ip| ip.is_ipv6() == ipv6);
            if let Some(port) = port_of(service, &|port| port.node_port == Some(port_number))
                && in_family
            {
                return from_outside(service, &port, ipv6, slices, inside);
            }
        }
    }
    // Other addresses of the service range.
    if dns || !config().service_cidrs.iter().any(|cidr| cidr.contains(&to)) {
        return Expected::Untouched;
    }
    match by_age.iter().find(|service| cluster_ips(service).contains(&to)) {
        Some(owner) if is_proxied(owner) => Expected::Rejected,
        Some(_) => Expected::Untouched,
        None => Expected::Dropped,
    }
}

/// A translated packet needs this node's address when the answer would otherwise not come back through it.
fn needs_masquerade(source: IpAddr, endpoint: IpAddr) -> bool {
    let of = family(source.is_ipv6());
    let own_range = |address: IpAddr| {
        address == ip(of.own_host_address) || of.own_pods.iter().any(|pod| ip(pod) == address)
    };
    let own_address = source == ip(of.own_node) || source == ip(of.own_second_address);
    let to_own_pod = of.own_pods.iter().any(|pod| ip(pod) == endpoint);
    let to_other_pod = of.other_pods.iter().any(|pod| ip(pod) == endpoint);
    if source == endpoint && to_own_pod {
        return true; // it would answer itself directly
    }
    if to_own_pod || endpoint == ip(of.own_node) {
        return false; // this node is on the way back
    }
    if to_other_pod {
        return !own_range(source); // the tunnel's other end accepts only this node's pods
    }
    !own_range(source) && !own_address // the answer would go straight to the client
}

// The node around the rules.

struct Node4And6;

impl Routes for Node4And6 {
    fn link(&self, destination: IpAddr) -> Option<String> {
        let of = family(destination.is_ipv6());
        if self.is_local(destination) {
            return None;
        }
        if let Some(i) = of.own_pods.iter().position(|pod| ip(pod) == destination) {
            return Some(format!("weftp{i:010x}"));
        }
        let tunnel = of.other_pods.iter().any(|pod| ip(pod) == destination);
        Some(if tunnel { "weft0" } else { "eth0" }.to_owned())
    }

    /// The cluster DNS address is a local route.
    fn is_local(&self, address: IpAddr) -> bool {
        let of = family(address.is_ipv6());
        [of.own_node, of.own_second_address, of.own_host_address, of.vips[3]]
            .iter()
            .any(|own| ip(own) == address)
            || address.is_loopback()
    }
}

/// Every client: where it enters, its address, whether it is inside the cluster.
fn clients(ipv6: bool) -> Vec<(Origin<'static>, IpAddr, bool)> {
    let of = family(ipv6);
    vec![
        (Origin::Link("weftp0000000000"), ip(of.own_pods[0]), true),
        (Origin::Link("weftp0000000001"), ip(of.own_pods[1]), true),
        (Origin::Host, ip(of.own_node), true),
        (Origin::Host, ip(of.own_second_address), true),
        (Origin::Host, ip(of.own_host_address), true),
        (Origin::Link("weft0"), ip(of.other_pods[0]), true),
        (Origin::Link("eth0"), ip(of.other_node), false),
        (Origin::Link("eth0"), ip(of.outside), false),
    ]
}

fn destinations(ipv6: bool) -> Vec<SocketAddr> {
    let of = family(ipv6);
    let mut all = Vec::new();
    let outside = of.load_balancers.iter().chain(&of.external).chain([&of.own_node]);
    for vip in of.vips.iter().chain([&of.unallocated, &of.outside, &of.own_pods[0]]).chain(outside) {
        all.extend(PORTS.iter().chain(&[9153]).map(|port| SocketAddr::new(ip(vip), *port)));
    }
    let loopback = if ipv6 { "::1" } else { "127.0.0.1" };
    for node in [of.own_node, of.own_second_address, of.own_host_address, of.other_node, loopback] {
        all.extend(NODE_PORTS.iter().chain(&[22]).map(|port| SocketAddr::new(ip(node), *port)));
    }
    all
}

fn check(plan: &ProxyPlan, packet: &Packet, origin: Origin<'_>, expected: &Expected) {
    let mut reached = BTreeSet::new();
    let randoms = if matches!(expected, Expected::OneOf { .. }) { 12 } else { 1 };
    for random in 0..randoms {
        let mut memory = Memory::new();
        match (trace(&plan.table, &Node4And6, origin, packet, random, &mut memory), expected) {
            (Outcome::Rejected, Expected::Rejected) | (Outcome::Dropped, Expected::Dropped) => {}
            (Outcome::Passed { destination, masqueraded: false }, Expected::Untouched)
                if destination == packet.destination => {}
            (Outcome::Passed { destination, masqueraded }, Expected::OneOf { endpoints, sticky })
                if endpoints.contains(&destination) =>
            {
                assert_eq!(
                    masqueraded,
                    needs_masquerade(packet.source.ip(), destination.ip()),
                    "masquerade of {packet:?} from {origin:?} sent to {destination}"
                );
                reached.insert(destination);
                check_again(plan, packet, origin, &mut memory, random + 1, sticky.then_some(destination));
            }
            (outcome, expected) => panic!("{packet:?} from {origin:?}: {outcome:?}, expected {expected:?}"),
        }
    }
    if let Expected::OneOf { endpoints, .. } = expected
        && endpoints.len() <= 12
    {
        assert_eq!(&reached, endpoints, "every endpoint gets connections");
    }
}

/// The client's next connection: to the same endpoint where the Service is `sticky`, else nothing was remembered.
fn check_again(
    plan: &ProxyPlan,
    packet: &Packet,
    origin: Origin<'_>,
    memory: &mut Memory,
    random: u32,
    sticky: Option<SocketAddr>,
) {
    let Some(endpoint) = sticky else {
        assert!(memory.is_empty(), "{packet:?} from {origin:?} left {memory:?}");
        return;
    };
    let packet = Packet { source: SocketAddr::new(packet.source.ip(), 40_001), ..packet.clone() };
    let outcome = trace(&plan.table, &Node4And6, origin, &packet, random, memory);
    assert!(
        matches!(outcome, Outcome::Passed { destination, .. } if destination == endpoint),
        "{packet:?}: {outcome:?}"
    );
    let index = plan.affinity.index();
    let stale = |((_, key), data): (&(String, Vec<Datum>), &ElementData)| index.is_stale(key, data);
    assert!(!memory.iter().any(stale), "{packet:?} from {origin:?}: {memory:?} would be forgotten");
}

fn check_cluster((services, slices): &ClusterState) -> BTreeMap<&'static str, usize> {
    let plan = ProxyPlanner::default().plan(&snapshot(services, slices)).plan;
    let mut seen = BTreeMap::new();
    for ipv6 in [false, true] {
        for destination in destinations(ipv6) {
            for (origin, source, inside) in clients(ipv6) {
                for protocol in PROTOCOLS {
                    let packet = Packet { source: SocketAddr::new(source, 40_000), destination, protocol };
                    let expected = expected(&packet, inside, services, slices);
                    check(&plan, &packet, origin, &expected);
                    let name = match expected {
                        Expected::Rejected => "rejected",
                        Expected::Dropped => "dropped",
                        Expected::Untouched => "untouched",
                        Expected::OneOf { sticky: false, .. } => "sent on",
                        Expected::OneOf { sticky: true, .. } => "sent on to the same",
                    };
                    *seen.entry(name).or_default() += 1;
                }
            }
        }
    }
    seen
}

/// How many random clusters: few in an ordinary run, as many as `WEFT_MEANING_CASES` says in a long one.
fn cases() -> u32 {
    match std::env::var("WEFT_MEANING_CASES") {
        Ok(count) => count.parse().expect("WEFT_MEANING_CASES is a count"),
        Err(_) => 32,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_packet_goes_where_the_kubernetes_text_sends_it(cluster in cluster()) {
        check_cluster(&cluster);
    }

    #[test]
    fn a_planner_that_remembers_plans_what_a_new_one_plans(clusters in prop::collection::vec(cluster(), 1..6)) {
        let mut remembering = ProxyPlanner::default();
        let mut last: Option<Snapshot> = None;
        for (services, slices) in clusters {
            let mut snapshot = snapshot(&services, &slices);
            if let Some(last) = &last {
                keep_identities(&mut snapshot, last);
            }
            let planned = remembering.plan(&snapshot);
            prop_assert_eq!(&planned, &ProxyPlanner::default().plan(&snapshot));
            let again = remembering.plan(&snapshot);
            prop_assert_eq!(&again, &planned);
            prop_assert!(Arc::ptr_eq(&again.plan.table, &planned.plan.table), "nothing changed, nothing was touched");
            last = Some(snapshot);
        }
    }
}

/// As `kube` does: a value that did not change keeps its `Arc`.
fn keep_identities(snapshot: &mut Snapshot, last: &Snapshot) {
    for service in Arc::make_mut(&mut snapshot.services).values_mut() {
        if let Some(known) = last.services.get(&service.key).filter(|known| *known == service) {
            *service = known.clone();
        }
    }
    for slice in Arc::make_mut(&mut snapshot.endpoint_slices).values_mut() {
        if let Some(known) = last.endpoint_slices.get(&slice.key).filter(|known| *known == slice) {
            *slice = known.clone();
        }
    }
}

/// The evaluator above would be worth little if random clusters never dropped or refused anything.
#[test]
fn random_clusters_show_every_outcome() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for _ in 0..20 {
        let state = cluster().new_tree(&mut runner).unwrap().current();
        for (name, count) in check_cluster(&state) {
            *seen.entry(name).or_default() += count;
        }
    }
    for name in ["rejected", "dropped", "untouched", "sent on", "sent on to the same"] {
        assert!(seen.get(name).is_some_and(|count| *count > 200), "too few packets {name}: {seen:?}");
    }
}
