//! Which Nodes may claim what: of two Nodes that claim the same, the older keeps it and the newer is left out.
//!
//! A Node's own credentials can change its addresses and annotations, so claims are checked here before they become
//! anyone's allowed IPs (decision 15). Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::objects::Node;
use weft_model::{ClusterConfig, ObjectRef, Problem, Reason, WgPublicKey};

/// A Node with the claims that were honoured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Accepted<'a> {
    pub(super) node: &'a Node,
    /// Inside the cluster's ranges.
    pub(super) pod_cidrs: Vec<IpNet>,
    /// At most one a family, IPv4 first, outside the cluster's ranges.
    pub(super) addresses: Vec<IpAddr>,
}

/// Nodes in the order of their age, and what was refused.
pub(super) fn accept<'a>(
    nodes: impl Iterator<Item = &'a Arc<Node>>,
    config: &ClusterConfig,
) -> (Vec<Accepted<'a>>, Vec<Problem>) {
    let mut by_age: Vec<&Node> = nodes.map(AsRef::as_ref).collect();
    by_age.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    let ranges = config.ranges();
    let mut problems = Vec::new();
    let mut claims = Claims::default();
    let mut accepted = Vec::new();
    for node in by_age {
        let candidate = Accepted {
            node,
            pod_cidrs: pod_cidrs(node, config, &mut problems),
            addresses: outside(&ranges, node, "InternalIP", node.primary_ips(), &mut problems),
        };
        match claims.conflict(&candidate) {
            Some((what, owner)) => problems.push(problem(
                node,
                Reason::Conflict,
                format!(
                    "{what} belongs to the older Node {owner}; this Node is left out of the overlay until one of the two is \
                     deleted or claims another"
                ),
            )),
            None => {
                claims.add(&candidate);
                accepted.push(candidate);
            }
        }
    }
    (accepted, problems)
}

pub(super) fn problem(node: &Node, reason: Reason, message: String) -> Problem {
    Problem::new(ObjectRef::new("Node", "", node.name.0.clone()), reason, message)
}

fn pod_cidrs(node: &Node, config: &ClusterConfig, problems: &mut Vec<Problem>) -> Vec<IpNet> {
    let inside = |cidr: &IpNet| config.cluster_cidrs.iter().any(|cluster| cluster.contains(cidr));
    let (good, bad): (Vec<IpNet>, Vec<IpNet>) = node.pod_cidrs.iter().map(IpNet::trunc).partition(inside);
    for cidr in bad {
        let message = format!("spec.podCIDRs: {cidr} is not inside the cluster's range; it is ignored");
        problems.push(problem(node, Reason::InvalidField, message));
    }
    good
}

/// Those outside `ranges`, which are those of pods and Services: traffic to these must never follow a Node's word about where it
/// is. `what` says that word.
pub(super) fn outside(
    ranges: &[IpNet],
    node: &Node,
    what: &str,
    addresses: impl IntoIterator<Item = IpAddr>,
    problems: &mut Vec<Problem>,
) -> Vec<IpAddr> {
    let inside = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
    let (bad, good): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(inside);
    for address in bad {
        let message = format!("{what} {address} lies inside a pod or Service range; it is ignored");
        problems.push(problem(node, Reason::InvalidField, message));
    }
    good
}

/// The present key and the one to come.
pub(super) fn keys(node: &Node) -> impl Iterator<Item = WgPublicKey> {
    node.public_key.into_iter().chain(node.next_public_key)
}

#[derive(Default)]
struct Claims {
    pod_cidrs: Vec<(IpNet, String)>,
    addresses: BTreeMap<IpAddr, String>,
    keys: BTreeMap<WgPublicKey, String>,
}

impl Claims {
    /// What an older Node already has, and that Node.
    fn conflict(&self, candidate: &Accepted<'_>) -> Option<(String, &str)> {
        let cidr = candidate.pod_cidrs.iter().find_map(|cidr| {
            let overlaps = |other: &IpNet| other.contains(cidr) || cidr.contains(other);
            let (_, owner) = self.pod_cidrs.iter().find(|(other, _)| overlaps(other))?;
            Some((format!("podCIDR {cidr}"), owner.as_str()))
        });
        let address = || {
            candidate.addresses.iter().find_map(|address| {
                Some((format!("InternalIP {address}"), self.addresses.get(address)?.as_str()))
            })
        };
        let key = || {
            keys(candidate.node)
                .find_map(|key| Some((format!("public key {key}"), self.keys.get(&key)?.as_str())))
        };
        cidr.or_else(address).or_else(key)
    }

    fn add(&mut self, candidate: &Accepted<'_>) {
        let owner = candidate.node.name.to_string();
        self.pod_cidrs.extend(candidate.pod_cidrs.iter().map(|cidr| (*cidr, owner.clone())));
        self.addresses.extend(candidate.addresses.iter().map(|address| (*address, owner.clone())));
        self.keys.extend(keys(candidate.node).map(|key| (key, owner.clone())));
    }
}
