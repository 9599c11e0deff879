//! The endpoints of one port in one family, and which of them a node sends connections to: conditions (KEP-1669), traffic
//! policies, hints (KEP-2433, KEP-3015, KEP-4444). Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use weft_model::NodeName;
use weft_model::objects::{Endpoint, EndpointSlice, Hints, ServicePort, TrafficPolicy};

/// Whoever may answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Not empty, sorted.
    Endpoints(Vec<SocketAddr>),
    /// No endpoint anywhere.
    Reject,
    /// The policy is Local and every endpoint is elsewhere.
    Drop,
}

/// Where this node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Here {
    pub node: NodeName,
    /// Label `topology.kubernetes.io/zone` of the Node.
    pub zone: Option<String>,
}

/// Endpoints of one port in one family, with the best condition that any slice gives them.
#[derive(Default)]
pub(super) struct Endpoints {
    all: BTreeMap<SocketAddr, Candidate>,
    /// The node and zone hints speak for the whole cluster; here only conditions matter.
    local: BTreeMap<SocketAddr, Candidate>,
}

#[derive(Clone, Debug)]
struct Candidate {
    condition: Condition,
    /// Hints of all slices that give it the condition.
    zones: BTreeSet<String>,
    nodes: BTreeSet<NodeName>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    /// Serving until it ends: used only when none is ready (KEP-1669).
    Draining,
    Ready,
}

impl Condition {
    fn of(endpoint: &Endpoint) -> Option<Self> {
        if endpoint.ready {
            Some(Self::Ready)
        } else if endpoint.serving && endpoint.terminating {
            Some(Self::Draining)
        } else {
            None
        }
    }
}

impl Candidate {
    fn merge(&mut self, other: Self) {
        if other.condition > self.condition {
            *self = other;
        } else if other.condition == self.condition {
            self.zones.extend(other.zones);
            self.nodes.extend(other.nodes);
        }
    }
}

impl Endpoints {
    pub(super) fn of<'a>(
        port: &ServicePort,
        ipv6: bool,
        slices: impl Iterator<Item = &'a EndpointSlice>,
        here: &Here,
    ) -> Self {
        let mut endpoints = Self::default();
        for slice in slices.filter(|slice| slice.ipv6 == ipv6) {
            let ports = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
            for target_port in ports {
                for endpoint in &slice.endpoints {
                    endpoints.add(endpoint, target_port.port, here);
                }
            }
        }
        endpoints
    }

    fn add(&mut self, endpoint: &Endpoint, port: u16, here: &Here) {
        let Some(condition) = Condition::of(endpoint) else {
            return;
        };
        let Hints { zones, nodes } = endpoint.hints.as_deref().cloned().unwrap_or_default();
        let candidate = Candidate { condition, zones, nodes };
        let address = SocketAddr::new(endpoint.address, port);
        if endpoint.node.as_ref() == Some(&here.node) {
            put(&mut self.local, address, candidate.clone());
        }
        put(&mut self.all, address, candidate);
    }

    pub(super) fn local(&self) -> impl Iterator<Item = SocketAddr> {
        self.local.keys().copied()
    }

    /// What the health check of a load balancer counts: those that drain are none (KEP-1669).
    pub(super) fn local_ready(&self) -> impl Iterator<Item = SocketAddr> {
        let ready = self.local.iter().filter(|(_, candidate)| candidate.condition == Condition::Ready);
        ready.map(|(address, _)| *address)
    }

    pub(super) fn target(&self, policy: TrafficPolicy, here: &Here) -> Target {
        let chosen = match policy {
            TrafficPolicy::Cluster => self.anywhere(here),
            TrafficPolicy::Local => best(&self.local).map(|(address, _)| address).collect(),
        };
        match (chosen.is_empty(), self.all.is_empty()) {
            (false, _) => Target::Endpoints(chosen),
            (true, true) => Target::Reject,
            (true, false) => Target::Drop,
        }
    }

    /// Those of the whole cluster that this node is to use: hints count only when every ready endpoint carries one and one
    /// of them is for this node (then its zone); those of endpoints that drain are not looked at.
    pub(super) fn anywhere(&self, here: &Here) -> Vec<SocketAddr> {
        let usable: Vec<(SocketAddr, &Candidate)> = best(&self.all).collect();
        let ready = usable.first().is_some_and(|(_, candidate)| candidate.condition == Condition::Ready);
        let hinted = |given: &dyn Fn(&Candidate) -> bool, here: &dyn Fn(&Candidate) -> bool| {
            let all = ready && usable.iter().all(|(_, candidate)| given(candidate));
            let chosen = usable.iter().filter(|(_, candidate)| all && here(candidate));
            chosen.map(|(address, _)| *address).collect::<Vec<_>>()
        };
        let for_node = hinted(&|it| !it.nodes.is_empty(), &|it| it.nodes.contains(&here.node));
        if !for_node.is_empty() {
            return for_node;
        }
        let of_zone = |it: &Candidate| here.zone.as_ref().is_some_and(|zone| it.zones.contains(zone));
        let for_zone = hinted(&|it| !it.zones.is_empty(), &of_zone);
        if !for_zone.is_empty() {
            return for_zone;
        }
        usable.into_iter().map(|(address, _)| address).collect()
    }
}

fn put(candidates: &mut BTreeMap<SocketAddr, Candidate>, address: SocketAddr, candidate: Candidate) {
    match candidates.get_mut(&address) {
        Some(known) => known.merge(candidate),
        None => drop(candidates.insert(address, candidate)),
    }
}

/// The ready ones, else those that drain.
fn best(candidates: &BTreeMap<SocketAddr, Candidate>) -> impl Iterator<Item = (SocketAddr, &Candidate)> {
    let best = candidates.values().map(|candidate| candidate.condition).max();
    let chosen = candidates.iter().filter(move |(_, candidate)| Some(candidate.condition) == best);
    chosen.map(|(address, candidate)| (*address, candidate))
}
