//! From the Snapshot to the whole table of routes. Pure.
//!
//! ```text
//!  Ingress --claimed?--> settings (memoised) --+--> claims (memoised by host) --older wins--> hosts of the table
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
pub(crate) mod changes;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use weft_model::ingress::{Ingress, IngressPath, is_ours};
use weft_model::objects::ingress_address;
use weft_model::{NamespacedName, ObjectRef, Planned, Problem, Reason, Snapshot};
use weft_netstack::reconcile::Planner;

use crate::annotations::{self, Parsed};
use backends::Backends;
use claims::{Base, Claims};
use materials::{Certificates, Materials};
use table::{Host, RouteTable};

/// Plans the routes of every Ingress that is ours.
pub struct IngressPlanner {
    /// Certificates expire while nothing else changes.
    now: fn() -> Timestamp,
    claimed: BTreeMap<NamespacedName, Arc<Claimed>>,
    claims: Claims,
    backends: Backends,
    certificates: Certificates,
}

impl Default for IngressPlanner {
    fn default() -> Self {
        Self::at(Timestamp::now)
    }
}

/// One Ingress of ours: what its annotations say, and what its routes need of other objects. Never altered, so that another one
/// in its place is a change.
struct Claimed {
    ingress: Arc<Ingress>,
    parsed: Arc<Parsed>,
    /// That its rules name, each with the places of these; without rules every host, for its default backend.
    hosts: BTreeMap<Host, Vec<usize>>,
    base: Base,
    problems: Vec<Problem>,
}

impl Claimed {
    fn new(ingress: &Arc<Ingress>, parsed: Arc<Parsed>, materials: &mut Materials<'_>) -> Self {
        let told = parsed.findings.iter().filter_map(|finding| {
            Some(Problem::new(object(ingress), finding.severity.reason()?, finding.sentence()))
        });
        let mut problems = told.collect();
        let base = match parsed.settings.canary {
            Some(_) => Base::default(),
            None => Base::of(ingress, &parsed.settings, materials, &mut problems),
        };
        let mut hosts: BTreeMap<Host, Vec<usize>> = BTreeMap::new();
        for (i, rule) in ingress.rules.iter().enumerate() {
            hosts.entry(Host::of(rule.host.as_deref())).or_default().push(i);
        }
        if ingress.rules.is_empty() && ingress.default_backend.is_some() {
            hosts.insert(Host::Any, Vec::new());
        }
        Self { ingress: ingress.clone(), parsed, hosts, base, problems }
    }

    fn object(&self) -> ObjectRef {
        object(&self.ingress)
    }

    fn is_canary(&self) -> bool {
        self.parsed.settings.canary.is_some()
    }

    /// Paths of the hosts of its rules are expressions, whoever wrote them.
    fn has_expressions(&self) -> bool {
        let settings = &self.parsed.settings;
        !self.ingress.rules.is_empty() && (settings.use_regex || settings.rewrite_target.is_some())
    }

    /// The paths of its rules for one host, each with its field.
    fn paths_of(&self, host: &Host) -> impl Iterator<Item = (String, &IngressPath)> {
        let rules = self.hosts.get(host).into_iter().flatten();
        rules.filter_map(|i| Some((i, self.ingress.rules.get(*i)?))).flat_map(|(i, rule)| {
            let field = move |j| format!("spec.rules[{i}].http.paths[{j}]");
            rule.paths.iter().enumerate().map(move |(j, path)| (field(j), path))
        })
    }
}

fn object(ingress: &Ingress) -> ObjectRef {
    ObjectRef::new("Ingress", &ingress.key.namespace, &ingress.key.name)
}

impl Planner for IngressPlanner {
    type Plan = RouteTable;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<RouteTable> {
        let mut materials = Materials::new(snapshot, (self.now)(), &mut self.certificates);
        let claimed = claimed(&mut self.claimed, snapshot, &mut materials);
        let mut problems: Vec<Problem> =
            claimed.iter().flat_map(|one| one.problems.iter().cloned()).collect();
        let hosts = self.claims.plan(&claimed, &mut problems);
        let backends = self.backends.plan(snapshot, &self.claims.wanted(), &mut problems);
        let config = &snapshot.config.ingress;
        let table = RouteTable {
            addresses: own_addresses(snapshot, &mut problems),
            hosts,
            backends,
            certificates: materials.certificates(&claimed, config, &mut problems),
            default_certificate: materials.default_certificate(config, &mut problems),
            front: config.front.clone(),
            observe: config.observe,
            waiting: materials.waiting(),
        };
        Planned::new(table, problems)
    }
}

impl IngressPlanner {
    /// By this clock.
    pub fn at(now: fn() -> Timestamp) -> Self {
        Self {
            now,
            claimed: BTreeMap::new(),
            claims: Claims::default(),
            backends: Backends::default(),
            certificates: Certificates::default(),
        }
    }
}

/// Ours, the oldest first. What is `known` and still so stays.
fn claimed(
    known: &mut BTreeMap<NamespacedName, Arc<Claimed>>,
    snapshot: &Snapshot,
    materials: &mut Materials<'_>,
) -> Vec<Arc<Claimed>> {
    let (classes, config) = (&snapshot.ingress_classes, &snapshot.config.ingress);
    let ours = snapshot.ingresses.values().filter(|ingress| is_ours(ingress, classes, config));
    let mut claimed: Vec<Arc<Claimed>> = Vec::new();
    for ingress in ours {
        let before = known.get(&ingress.key).filter(|before| Arc::ptr_eq(&before.ingress, ingress));
        // What it refers to may be another without the Ingress being so.
        claimed.push(match before {
            Some(before) if before.parsed.settings.refers_to_nothing() => before.clone(),
            Some(before) => {
                let now = Claimed::new(ingress, before.parsed.clone(), materials);
                let same = now.base == before.base && now.problems == before.problems;
                if same { before.clone() } else { Arc::new(now) }
            }
            None => {
                Arc::new(Claimed::new(ingress, Arc::new(annotations::parse(&ingress.annotations)), materials))
            }
        });
    }
    *known = claimed.iter().map(|one| (one.ingress.key.clone(), one.clone())).collect();
    claimed.sort_by(|a, b| (a.ingress.created, &a.ingress.key).cmp(&(b.ingress.created, &b.ingress.key)));
    claimed
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
