//! What the pod links of this node depend on in the Snapshot: a change of it makes them be looked at again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::objects::{Bandwidth, Pod};
use weft_model::{ObjectRef, Planned, PodKey, Problem, Reason, Snapshot};

use crate::reconcile::Planner;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodLinks {
    /// At most one a family, the primary one first; pods get an address of each.
    pub pod_cidrs: Vec<IpNet>,
    /// The Node's own addresses that this host has, at most one a family: sources of the routes to its pods.
    pub sources: Vec<IpAddr>,
    /// Limits of the node's pods that have any.
    pub bandwidths: BTreeMap<PodKey, Bandwidth>,
}

pub fn plan(snapshot: &Snapshot) -> Planned<PodLinks> {
    let name = &snapshot.facts.name;
    let problem =
        |message: &str| vec![Problem::new(ObjectRef::new("Node", "", &name.0), Reason::Missing, message)];
    let Some(node) = snapshot.own_node() else {
        return Planned::new(
            PodLinks::default(),
            problem("this Node is not in the cluster yet; pods cannot be attached"),
        );
    };
    let problems = match node.pod_cidrs.is_empty() {
        true => {
            problem("spec.podCIDRs is empty; pods cannot be attached until the controller manager fills it")
        }
        false => stranded(snapshot, &node.pod_cidrs),
    };
    let links = PodLinks {
        pod_cidrs: node.pod_cidrs.clone(),
        sources: snapshot.own_addresses(),
        bandwidths: limited(snapshot).map(|pod| (pod.key.clone(), pod.bandwidth)).collect(),
    };
    Planned::new(links, problems)
}

fn limited(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Pod>> {
    let is_limited = |pod: &&Arc<Pod>| pod.bandwidth != Bandwidth::default();
    own_pods(snapshot).filter(is_limited)
}

/// Pods of this node with an address of their own.
fn own_pods(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Pod>> {
    let here = |pod: &&Arc<Pod>| pod.node.as_ref() == Some(&snapshot.facts.name);
    snapshot.pods.values().filter(here).filter(|pod| !pod.host_network && !pod.terminated)
}

/// Pods from before the Node was made anew with another podCIDR: they run, and nobody else has a route to them.
fn stranded(snapshot: &Snapshot, pod_cidrs: &[IpNet]) -> Vec<Problem> {
    let ranges: Vec<String> = pod_cidrs.iter().map(ToString::to_string).collect();
    let outside = |ip: &&IpAddr| !pod_cidrs.iter().any(|cidr| cidr.contains(*ip));
    own_pods(snapshot)
        .filter_map(|pod| Some((pod, pod.ips.iter().find(outside)?)))
        .map(|(pod, ip)| {
            let message = format!(
                "address {ip} is in no podCIDR of this Node ({}), which changed: other nodes do not reach it; delete the pod so \
                 that it gets another",
                ranges.join(", ")
            );
            Problem::new(ObjectRef::new("Pod", &pod.key.namespace, &pod.key.name), Reason::Conflict, message)
        })
        .collect()
}

/// [`plan`] for a [`crate::reconcile::Loop`].
#[derive(Debug, Default)]
pub struct PodLinksPlanner;

impl Planner for PodLinksPlanner {
    type Plan = PodLinks;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<PodLinks> {
        plan(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use weft_model::node_facts::{NodeFacts, Uplink};

    use super::*;
    use crate::cni::tests::rig::{snapshot, uplink};

    fn pod(name: &str, ip: &str) -> Pod {
        Pod {
            key: PodKey::new("default", name),
            uid: String::new(),
            labels: BTreeMap::new(),
            node: Some("n1".into()),
            host_network: false,
            ips: vec![ip.parse().unwrap()],
            hostname: None,
            subdomain: None,
            terminated: false,
            named_ports: vec![],
            bandwidth: Bandwidth::default(),
        }
    }

    #[test]
    fn an_address_of_the_node_that_the_host_lost_is_no_source_of_a_route() {
        let mut snapshot = snapshot(&["10.42.1.0/24", "fd42:0:0:1::/64"]);
        let named: Vec<IpAddr> = snapshot.own_node().unwrap().primary_ips().collect();
        assert_eq!((plan(&snapshot).plan.sources, named.len()), (named.clone(), 2));
        let on_uplinks = |uplinks: Vec<Uplink>| {
            let facts = NodeFacts { uplinks, ..(*snapshot.facts).clone() };
            plan(&Snapshot { facts: Arc::new(facts), ..snapshot.clone() }).plan.sources
        };
        assert_eq!(on_uplinks(vec![uplink(&["192.0.2.99", "2001:db8::1"])]), named[1..]);
        assert!(on_uplinks(vec![]).is_empty());
        let facts = Arc::make_mut(&mut snapshot.facts);
        facts.uplinks.clear();
        facts.loopback = named.iter().copied().collect();
        assert_eq!(plan(&snapshot).plan.sources, named);
    }

    #[test]
    fn a_pod_whose_address_is_of_a_former_range_is_named() {
        let pods = [
            pod("of-now", "10.42.1.5"),
            pod("stranded", "10.42.7.5"),
            Pod { host_network: true, ..pod("host", "192.0.2.1") },
            Pod { terminated: true, ..pod("over", "10.42.7.6") },
            Pod { node: Some("n2".into()), ..pod("elsewhere", "10.42.7.7") },
        ];
        let pods = pods.map(|pod| (pod.key.clone(), Arc::new(pod))).into();
        let snapshot = Snapshot { pods: Arc::new(pods), ..snapshot(&["10.42.1.0/24"]) };
        let said: Vec<String> = plan(&snapshot).problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "Pod default/stranded: Conflict: address 10.42.7.5 is in no podCIDR of this Node (10.42.1.0/24), which changed: \
              other nodes do not reach it; delete the pod so that it gets another"
            ]
        );
    }
}
