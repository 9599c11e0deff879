//! What the pod links of this node depend on in the Snapshot: a change of it makes them be looked at again.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_model::{ObjectRef, Planned, Problem, Reason, Snapshot};

use crate::reconcile::Planner;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodLinks {
    /// At most one a family, the primary one first; pods get an address of each.
    pub pod_cidrs: Vec<IpNet>,
    /// The Node's own addresses, at most one a family: sources of the routes to its pods.
    pub sources: Vec<IpAddr>,
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
        false => Vec::new(),
    };
    Planned::new(
        PodLinks { pod_cidrs: node.pod_cidrs.clone(), sources: node.primary_ips().collect() },
        problems,
    )
}

/// [`plan`] for a [`crate::reconcile::Loop`].
#[derive(Debug, Default)]
pub struct PodLinksPlanner;

impl Planner for PodLinksPlanner {
    type Plan = PodLinks;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<PodLinks> {
        plan(snapshot)
    }
}
