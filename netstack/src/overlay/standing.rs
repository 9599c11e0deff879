//! Whether this node may carry pods: it is in the cluster, has podCIDRs of the cluster's ranges, and no older Node claims the
//! same. In: a Snapshot and what the overlay's planner said of it. Out: sentences. Pure.

use ipnet::IpNet;
use weft_model::node_facts::ForeignRoute;
use weft_model::objects::{Node, host_address};
use weft_model::{ClusterConfig, Problem, Reason, Snapshot};

/// What forbids pods on this node, a line each with the remedy; none when they may come. `problems` are those that
/// [`super::OverlayPlanner`] returned last.
pub fn objections(snapshot: &Snapshot, problems: &[Problem]) -> Vec<String> {
    let name = &snapshot.facts.name;
    let Some(node) = snapshot.own_node() else {
        return vec![format!(
            "there is no Node {name} in the cluster; register this machine's kubelet, or give --node-name the name of its Node"
        )];
    };
    let mut objections = pod_cidrs(node, &snapshot.config);
    let lost = |problem: &&Problem| {
        let object = &problem.object;
        problem.reason == Reason::Conflict && object.kind == "Node" && *object.name == *name.0
    };
    objections.extend(
        problems.iter().filter(lost).map(|problem| format!("{}: {}", problem.object, problem.message)),
    );
    objections
}

/// Routes of the host's own that would take packets away from pods and Services, a line each with the remedy. A node that
/// carries pods goes on with them; one that does not is not to begin.
pub fn overlaps(snapshot: &Snapshot) -> Vec<String> {
    let sentence = |(route, what): (&ForeignRoute, String)| format!("route {route} of this host {what}");
    intruders(snapshot).map(sentence).collect()
}

/// Each such route, and what it does.
pub(super) fn intruders(snapshot: &Snapshot) -> impl Iterator<Item = (&ForeignRoute, String)> {
    snapshot
        .facts
        .foreign_routes
        .iter()
        .filter_map(|route| Some((route, intrusion(route, &snapshot.config)?)))
}

fn intrusion(route: &ForeignRoute, config: &ClusterConfig) -> Option<String> {
    let within = |ranges: &[IpNet]| ranges.iter().copied().find(|range| range.contains(&route.destination));
    let (flag, range) = match within(&config.cluster_cidrs) {
        Some(range) => ("--cluster-cidr", range),
        None => ("--service-cidr", within(&config.service_cidrs)?),
    };
    Some(format!(
        "lies within {flag} {range} and takes packets away from it; remove it (ip route del {route}) with the network that it \
         belongs to, or give the cluster another range"
    ))
}

fn pod_cidrs(node: &Node, config: &ClusterConfig) -> Vec<String> {
    let name = &node.name;
    let ranges = joined(&config.cluster_cidrs);
    if node.pod_cidrs.is_empty() {
        return vec![format!(
            "Node {name} has no podCIDR; start kube-controller-manager with --allocate-node-cidrs=true \
             --cluster-cidr={ranges}, or set spec.podCIDRs of the Node"
        )];
    }
    let objection = |cidr: &IpNet| {
        match config.cluster_cidrs.iter().any(|range| range.contains(cidr)) {
        false => Some(format!(
            "Node {name}: podCIDR {cidr} is outside --cluster-cidr {ranges}; give every agent the --cluster-cidr of \
             kube-controller-manager"
        )),
        true => host_address(cidr).is_none().then(|| {
            format!("Node {name}: podCIDR {cidr} is too small, at least four addresses are needed; give the Node a larger one")
        }),
    }
    };
    node.pod_cidrs.iter().filter_map(objection).collect()
}

fn joined(ranges: &[IpNet]) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
