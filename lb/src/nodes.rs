//! Addresses of nodes for Services that no pool is for, as k3s's ServiceLB gives them: every node that may serve, and a port of a
//! node for one Service only. In: a Service, the Snapshot and the ports that are taken. Out: its addresses. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::balancer::{Balancer, DualStack};
use weft_model::objects::{Node, Protocol, Service, TrafficPolicy};
use weft_model::{NodeName, ServiceKey, Snapshot};

use crate::allocate::Grant;

/// Well-known label of nodes that load balancers leave out.
pub(crate) const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// ServiceLB: where one node bears it, only those that do serve.
const ENABLED: &str = "svccontroller.k3s.cattle.io/enablelb";
const NODE_POOL: &str = "svccontroller.k3s.cattle.io/lbpool";

/// Which Service has which port of a node's address.
#[derive(Debug, Default)]
pub(crate) struct NodePorts(BTreeMap<(IpAddr, Protocol, u16), ServiceKey>);

/// Its status holds addresses of nodes.
pub(crate) fn has_some(balancer: &Balancer, snapshot: &Snapshot) -> bool {
    let of_node = |ip: IpAddr| snapshot.nodes.values().any(|node| node.internal_ips.contains(&ip));
    balancer.ingress.iter().filter_map(|ingress| ingress.ip).any(of_node)
}

pub(crate) fn grant(
    service: &Service,
    balancer: &Balancer,
    snapshot: &Snapshot,
    ports: &mut NodePorts,
) -> Grant {
    let mut grant = Grant::default();
    let mut rivals: BTreeSet<ServiceKey> = BTreeSet::new();
    let serving = serving(service, balancer, snapshot);
    for node in &serving {
        for ip in node.primary_ips().filter(|ip| balancer.families.contains(&ip.is_ipv6())) {
            match ports.take(service, ip) {
                Ok(()) => grant.addresses.push(ip),
                Err(rival) => {
                    rivals.insert(rival);
                }
            }
        }
    }
    let has = |ipv6: bool| grant.addresses.iter().any(|ip| ip.is_ipv6() == ipv6);
    let lacks = balancer.families.iter().any(|ipv6| !has(*ipv6));
    if grant.addresses.is_empty() {
        grant.refusal = Some(match rivals.first() {
            Some(rival) => format!(
                "Service {rival} has the same port on every node; give one of the two another port, or make an IPAddressPool"
            ),
            None if serving.is_empty() => {
                "no node has a ready endpoint of it (externalTrafficPolicy Local)".to_owned()
            }
            None => "no node has an address of its families (status.addresses, InternalIP)".to_owned(),
        });
    } else if lacks && balancer.dual_stack == DualStack::Require {
        grant.refusal = Some(
            "no node has an address of its second family, which it requires (status.addresses, InternalIP)"
                .to_owned(),
        );
    }
    grant
}

impl NodePorts {
    /// All ports of a Service at an address, or none.
    fn take(&mut self, service: &Service, ip: IpAddr) -> Result<(), ServiceKey> {
        let slots = || service.ports.iter().map(move |port| (ip, port.protocol, port.port));
        if let Some(rival) = slots().find_map(|slot| self.0.get(&slot)) {
            return Err(rival.clone());
        }
        self.0.extend(slots().map(|slot| (slot, service.key.clone())));
        Ok(())
    }
}

/// Nodes whose addresses it gets, by name.
fn serving<'a>(service: &Service, balancer: &Balancer, snapshot: &'a Snapshot) -> Vec<&'a Arc<Node>> {
    let enabled = snapshot.nodes.values().any(|node| node.labels.contains_key(ENABLED));
    let mut nodes: Vec<&Arc<Node>> = snapshot.nodes.values().collect();
    if enabled {
        nodes.retain(|node| node.labels.contains_key(ENABLED));
        let pool = balancer.node_pool.as_ref();
        nodes.retain(|node| pool.is_none() || node.labels.get(NODE_POOL) == pool);
    }
    let nodes = willing(nodes);
    match with_endpoints(service, snapshot) {
        Some(names) => nodes.into_iter().filter(|node| names.contains(&node.name)).collect(),
        None => nodes,
    }
}

/// Whether it is to serve only when nobody else can: it leaves, is about to be drained, or is labelled to be left out.
pub(crate) fn reluctant(node: &Node) -> bool {
    node.cordoned || left_out(node)
}

fn left_out(node: &Node) -> bool {
    node.leaving || node.labels.contains_key(EXCLUDED)
}

/// Without those that leave and those that are labelled to be left out, unless nobody else could serve.
fn willing(nodes: Vec<&Arc<Node>>) -> Vec<&Arc<Node>> {
    let willing: Vec<&Arc<Node>> = nodes.iter().copied().filter(|node| !left_out(node)).collect();
    if willing.is_empty() { nodes } else { willing }
}

/// `None` when every node may serve it; with externalTrafficPolicy Local the nodes that have a ready endpoint. An endpoint without
/// a node's name is of the node whose address, or whose podCIDR's, it has.
pub(crate) fn with_endpoints(service: &Service, snapshot: &Snapshot) -> Option<BTreeSet<NodeName>> {
    if service.external_traffic_policy == TrafficPolicy::Cluster {
        return None;
    }
    let slices = snapshot.slices_of(&service.key);
    let ready = slices.flat_map(|slice| &slice.endpoints).filter(|endpoint| endpoint.ready);
    let node_of = |ip: IpAddr| {
        let bears = |node: &&Arc<Node>| {
            node.internal_ips.contains(&ip) || node.pod_cidrs.iter().any(|cidr| cidr.contains(&ip))
        };
        snapshot.nodes.values().find(bears).map(|node| node.name.clone())
    };
    Some(ready.filter_map(|endpoint| endpoint.node.clone().or_else(|| node_of(endpoint.address))).collect())
}
