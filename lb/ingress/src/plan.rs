//! From the Snapshot to the whole table of routes. Pure.
//!
//! ```text
//!  Ingress --claimed?--> settings (memoised) --+--> claims by host and path --older wins--> hosts of the table
//!  Services, EndpointSlices ------------------ +--> backends (memoised): endpoints, or why there are none
//!  Secrets, ConfigMaps ------------------------+--> certificates, users, authorities, headers
//! ```
//!
//! Nothing that is wrong takes a route away from others: a backend that is missing answers 503, a certificate that is missing
//! gives way to the default one, and each has its Problem. What protects a backend and cannot be honoured refuses every request.

mod backends;
mod claims;
mod materials;
pub mod table;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use weft_model::ingress::{Ingress, is_ours};
use weft_model::objects::ingress_address;
use weft_model::{NamespacedName, ObjectRef, Planned, Problem, Reason, Snapshot};
use weft_netstack::reconcile::Planner;

use crate::annotations::{self, Parsed};
use backends::Backends;
use claims::Claims;
use materials::Materials;
use table::RouteTable;

/// Plans the routes of every Ingress that is ours.
pub struct IngressPlanner {
    /// Certificates expire while nothing else changes.
    now: fn() -> Timestamp,
    parsed: BTreeMap<NamespacedName, (Arc<Ingress>, Arc<Parsed>)>,
    backends: Backends,
}

impl Default for IngressPlanner {
    fn default() -> Self {
        Self::at(Timestamp::now)
    }
}

/// One Ingress of ours with what its annotations say.
pub(crate) struct Claimed {
    pub(crate) ingress: Arc<Ingress>,
    pub(crate) parsed: Arc<Parsed>,
}

impl Claimed {
    fn object(&self) -> ObjectRef {
        object(&self.ingress)
    }
}

fn object(ingress: &Ingress) -> ObjectRef {
    ObjectRef::new("Ingress", &ingress.key.namespace, &ingress.key.name)
}

impl Planner for IngressPlanner {
    type Plan = RouteTable;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<RouteTable> {
        let claimed = self.claimed(snapshot);
        let mut problems = Vec::new();
        for one in &claimed {
            let told = one.parsed.findings.iter().filter_map(|finding| {
                Some(Problem::new(one.object(), finding.severity.reason()?, finding.sentence()))
            });
            problems.extend(told);
        }
        let mut materials = Materials::new(snapshot, (self.now)());
        let claims = Claims::of(&claimed, &mut materials, &mut problems);
        let wanted = claims.backends();
        let backends = self.backends.plan(snapshot, wanted, &mut problems);
        let addresses = own_addresses(snapshot, &mut problems);
        let table = RouteTable {
            addresses,
            hosts: claims.hosts,
            backends,
            certificates: materials.certificates(&claimed, &snapshot.config.ingress, &mut problems),
            default_certificate: materials.default_certificate(&snapshot.config.ingress, &mut problems),
            front: snapshot.config.ingress.front.clone(),
            observe: snapshot.config.ingress.observe,
            waiting: materials.waiting(),
        };
        Planned::new(table, problems)
    }
}

impl IngressPlanner {
    /// By this clock.
    pub fn at(now: fn() -> Timestamp) -> Self {
        Self { now, parsed: BTreeMap::new(), backends: Backends::default() }
    }

    /// Ours, the oldest first.
    fn claimed(&mut self, snapshot: &Snapshot) -> Vec<Claimed> {
        self.parsed.retain(|key, _| snapshot.ingresses.contains_key(key));
        let (classes, config) = (&snapshot.ingress_classes, &snapshot.config.ingress);
        let ours = snapshot.ingresses.values().filter(|ingress| is_ours(ingress, classes, config));
        let mut claimed: Vec<Claimed> = Vec::new();
        for ingress in ours {
            let known = self.parsed.get(&ingress.key).filter(|(known, _)| Arc::ptr_eq(known, ingress));
            let parsed = match known {
                Some((_, parsed)) => parsed.clone(),
                None => Arc::new(annotations::parse(&ingress.annotations)),
            };
            self.parsed.insert(ingress.key.clone(), (ingress.clone(), parsed.clone()));
            claimed.push(Claimed { ingress: ingress.clone(), parsed });
        }
        claimed.sort_by(|a, b| (a.ingress.created, &a.ingress.key).cmp(&(b.ingress.created, &b.ingress.key)));
        claimed
    }
}

/// The addresses that the ingress of this node listens on: one of each podCIDR, unless a pod of an earlier version has it.
fn own_addresses(snapshot: &Snapshot, problems: &mut Vec<Problem>) -> Vec<std::net::IpAddr> {
    let Some(node) = snapshot.own_node() else { return Vec::new() };
    let mut addresses = Vec::new();
    for address in node.pod_cidrs.iter().filter_map(ingress_address) {
        match snapshot.attachments.get(&address) {
            None => addresses.push(address),
            Some(attached) => {
                let pod = attached.pod.as_ref().map(ToString::to_string).unwrap_or_default();
                problems.push(Problem::new(
                    ObjectRef::new("Node", "", &node.name.0),
                    Reason::Conflict,
                    format!(
                        "the pod {pod} has {address}, which is kept for the ingress; the ingress of this node does not \
                         listen there until that pod is recreated"
                    ),
                ));
            }
        }
    }
    addresses
}
