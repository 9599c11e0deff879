//! Services of every kind in front of pods, nodes and an address outside, one endpoint each: whatever address is called, policies
//! judge what is behind it. A pod that calls a Service of its own (hairpin) is among the calls.

use weft_model::ruleset::Table;

use super::*;

/// `spec.externalIPs` have to be of these.
pub(super) const EXTERNAL_RANGES: [&str; 2] = ["198.51.100.64/26", "2001:db8:e::/64"];
/// What stands behind the Services: pods of this node, one that the API has not shown among them, a pod of the other node, both
/// nodes (as the API server's endpoints do), an address outside.
const BEHIND: [(Pair, Option<&str>); 7] = [
    (PLACES[0].1, Some(OWN)),
    (PLACES[1].1, Some(OWN)),
    (PLACES[2].1, Some(OWN)),
    (PLACES[4].1, Some(OTHER)),
    (OWN_NODE, Some(OWN)),
    (OTHER_NODE, Some(OTHER)),
    (OUTSIDE[0], None),
];
/// Port of the Service, of the endpoint.
const TRANSLATED: [(Protocol, u16, u16); 2] = [(Protocol::Tcp, 7080, 8080), (Protocol::Udp, 7053, 53)];

/// Which of its addresses is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Front {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

/// A Service that has all kinds of addresses.
#[derive(Clone, Debug)]
pub(super) struct TestService {
    /// In [`BEHIND`].
    number: usize,
    called: Front,
    internal: &'static str,
    external: &'static str,
}

/// A packet to an address of a Service, and what it has to become.
pub(super) struct Call {
    pub(super) origin: Origin<'static>,
    pub(super) packet: Packet,
    pub(super) behind: SocketAddr,
}

/// One Service for each that stands behind one.
pub(super) fn services() -> impl Strategy<Value = Vec<TestService>> {
    let front = select(vec![Front::ClusterIp, Front::NodePort, Front::LoadBalancer, Front::ExternalIp]);
    let traffic = || select(vec!["Cluster", "Local"]);
    let of_each = prop::collection::vec((front, traffic(), traffic()), BEHIND.len());
    of_each.prop_map(|all| {
        all.into_iter()
            .enumerate()
            .map(|(number, (called, internal, external))| {
                // `Local` without an endpoint here drops before policies are asked.
                let here = BEHIND[number].1 == Some(OWN);
                let policy = |chosen| if here { chosen } else { "Cluster" };
                TestService { number, called, internal: policy(internal), external: policy(external) }
            })
            .collect()
    })
}

impl TestService {
    fn cluster_ips(&self) -> [String; 2] {
        let last = 0x20 + self.number;
        [format!("10.96.0.{last}"), format!("fd00:96::{last:x}")]
    }

    fn node_port(&self, port: usize) -> usize {
        30_000 + 100 * port + self.number
    }

    fn load_balancer_ips(&self) -> [String; 2] {
        let last = 1 + self.number;
        [format!("198.51.100.{last}"), format!("2001:db8:b::{last}")]
    }

    fn external_ips(&self) -> [String; 2] {
        let last = 70 + self.number;
        [format!("198.51.100.{last}"), format!("2001:db8:e::{last}")]
    }

    pub(super) fn documents(&self) -> Vec<Value> {
        let name = format!("s{}", self.number);
        let port = |(i, (protocol, port, _)): (usize, &(Protocol, u16, u16))| json!({"name": format!("p{i}"), "protocol": protocol, "port": port, "nodePort": self.node_port(i)});
        let ports: Vec<Value> = TRANSLATED.iter().enumerate().map(port).collect();
        let balancers = self.load_balancer_ips().map(|ip| json!({"ip": ip}));
        let service = json!({
            "kind": "Service", "metadata": {"namespace": "a", "name": name},
            "spec": {
                "type": "LoadBalancer", "clusterIPs": self.cluster_ips(), "externalIPs": self.external_ips(),
                "internalTrafficPolicy": self.internal, "externalTrafficPolicy": self.external, "ports": ports,
            },
            "status": {"loadBalancer": {"ingress": balancers}},
        });
        let (addresses, node) = BEHIND[self.number];
        let ports: Vec<Value> = TRANSLATED
            .iter()
            .enumerate()
            .map(|(i, (protocol, _, port))| json!({"name": format!("p{i}"), "protocol": protocol, "port": port}))
            .collect();
        let slice = |family: usize| {
            let mut endpoint = json!({"addresses": [addresses[family]]});
            if let Some(node) = node {
                endpoint["nodeName"] = node.into();
            }
            json!({
                "kind": "EndpointSlice", "addressType": (if family == 0 { "IPv4" } else { "IPv6" }), "ports": ports, "endpoints": [endpoint],
                "metadata": {
                    "namespace": "a", "name": format!("{name}-{family}"),
                    "labels": {"kubernetes.io/service-name": name},
                },
            })
        };
        vec![service, slice(0), slice(1)]
    }

    fn front(&self, family: usize, port: usize) -> SocketAddr {
        let own_port = TRANSLATED[port].1;
        match self.called {
            Front::ClusterIp => SocketAddr::new(ip(&self.cluster_ips()[family]), own_port),
            Front::LoadBalancer => SocketAddr::new(ip(&self.load_balancer_ips()[family]), own_port),
            Front::ExternalIp => SocketAddr::new(ip(&self.external_ips()[family]), own_port),
            Front::NodePort => {
                SocketAddr::new(ip(OWN_NODE[family]), u16::try_from(self.node_port(port)).unwrap())
            }
        }
    }
}

/// From everybody who can call this node's Services: its pods and itself, a pod of the other node, that node, clients outside.
pub(super) fn calls(world: &World) -> Vec<Call> {
    let mut calls = Vec::new();
    for family in 0..2 {
        let at = |pair: &Pair| ip(pair[family]);
        let mut callers: Vec<(Origin<'static>, IpAddr)> = vec![
            (Origin::Link("weftp0000000000"), at(&PLACES[0].1)),
            (Origin::Link("weftp0000000001"), at(&PLACES[1].1)),
            (Origin::Link("weftp0000000002"), at(&PLACES[2].1)),
            (Origin::Host, at(&OWN_NODE)),
            (Origin::Link("weft0"), at(&PLACES[4].1)),
            (Origin::Link("eth0"), at(&OTHER_NODE)),
        ];
        callers.extend(OUTSIDE.iter().map(|pair| (Origin::Link("eth0"), at(pair))));
        for service in &world.services {
            for (port, (protocol, _, target)) in TRANSLATED.iter().enumerate() {
                let behind = SocketAddr::new(at(&BEHIND[service.number].0), *target);
                calls.extend(callers.iter().map(|(origin, source)| {
                    let source = SocketAddr::new(*source, 40_000);
                    let packet =
                        Packet { source, destination: service.front(family, port), protocol: *protocol };
                    Call { origin: *origin, packet, behind }
                }));
            }
        }
    }
    calls
}

/// The rules of two owners as the kernel sees them, which asks all base chains of a hook by priority.
pub(super) fn both(policies: &Table, proxy: &Table) -> Table {
    let mut table = proxy.clone();
    for (name, chain) in &policies.chains {
        // Nothing jumps to a base chain, so its name is free.
        let name = if chain.base.is_some() { format!("policies-{name}") } else { name.clone() };
        assert!(table.chains.insert(name.clone(), chain.clone()).is_none(), "two chains {name}");
    }
    for (name, set) in &policies.sets {
        assert!(table.sets.insert(name.clone(), set.clone()).is_none(), "two sets {name}");
    }
    table
}
