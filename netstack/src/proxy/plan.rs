//! The planner: a Snapshot in, the table `weft-proxy` and the UDP targets out. Pure; memoised per Service (decision 16).
//!
//! A Service is planned anew only when it, one of its slices, or a fact that concerns all Services is another value than last
//! time. What it owns is kept as one group an nft set, and the group stays the same `Arc` while its elements are equal, so
//! the applier looks at nothing else. Of two Services that claim one address or port the older keeps it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use weft_model::objects::Protocol;
use weft_model::ruleset::{Datum, ElementData, Elements, Set, Table};
use weft_model::services::FollowedServices;
use weft_model::snapshot::{Loose, fill};
use weft_model::{ObjectRef, Planned, Problem, Reason, ServiceKey, Snapshot};

use super::affinity::{AffinityTargets, Sticky};
use super::claims::{Claims, Manner, Rival, conflict};
use super::contradictions;
use super::emission::{Emission, Shared};
use super::endpoints::Here;
use super::external::Guard;
use super::health::HealthChecks;
use super::layout::{self, SetName, Site};
use super::service::{self, Claim, Frontend, Holding, LocalEndpoints, Reach, ServicePlan, Target, View};
use super::stale::{UdpDestination, UdpTargets};
use crate::reconcile::{Planner, Users};

/// The whole desired state of the proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyPlan {
    pub table: Arc<Table>,
    pub udp: Arc<UdpTargets>,
    pub affinity: Arc<AffinityTargets>,
    pub health: Arc<HealthChecks>,
    /// Services with a policy Local that has no endpoint here, though there are some elsewhere.
    pub without_local: Arc<BTreeMap<ServiceKey, WithoutLocal>>,
}

/// How many ports drop because their policy is Local: IPv4, IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WithoutLocal {
    pub internal: [u64; 2],
    pub external: [u64; 2],
}

/// Label of a Node that names its zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Plans Services and remembers what it planned.
#[derive(Default)]
pub struct ProxyPlanner {
    /// What concerns every Service; `None` before the first Snapshot.
    common: Option<Common>,
    services: FollowedServices,
    known: BTreeMap<ServiceKey, Known>,
    claims: Claims,
    shared: Users<Shared>,
    hairpins: Users<IpAddr>,
    counts: Counts,
    /// The table's sets and chains do not fit what is in it.
    misfit: bool,
    loose: Loose,
    problems: BTreeMap<ServiceKey, Vec<Problem>>,
    plan: ProxyPlan,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Common {
    site: Site,
    view: View,
    own_node: bool,
}

/// How many elements each set has.
type Counts = BTreeMap<(SetName, bool), usize>;

/// The table, and how much is in its sets.
struct Filling<'a> {
    table: &'a mut Table,
    counts: &'a mut Counts,
    /// A set has got its first elements, or lost its last.
    misfit: &'a mut bool,
}

/// What one Service last claimed, and what it put into the plan, to be taken out again.
struct Known {
    created: i64,
    claims: Box<[(Claim, Manner)]>,
    /// Name of its groups.
    group: Arc<str>,
    /// In order.
    sets: Box<[(SetName, bool)]>,
    shared: Box<[Shared]>,
    /// Few Services have any of it.
    rare: Option<Box<Rare>>,
    /// Something of [`Beside`] is in the plan.
    beside: bool,
}

#[derive(Default, PartialEq, Eq)]
struct Rare {
    own_chains: BTreeSet<String>,
    own_sets: BTreeSet<String>,
    hairpins: BTreeSet<IpAddr>,
}

/// What a Service puts beside the table.
#[derive(Default, PartialEq, Eq)]
struct Beside {
    problems: Vec<Problem>,
    udp: BTreeMap<UdpDestination, BTreeSet<SocketAddr>>,
    sticky: BTreeMap<Claim, Sticky>,
    checked: Option<(u16, LocalEndpoints)>,
    without_local: WithoutLocal,
}

impl Known {
    fn new(key: &ServiceKey) -> Self {
        Self {
            created: 0,
            claims: Box::default(),
            group: key.to_string().into(),
            sets: Box::default(),
            shared: Box::default(),
            rare: None,
            beside: false,
        }
    }

    /// Puts into the table what the Service emits now, in place of what it had there.
    fn replace_elements(
        &mut self,
        filling: &mut Filling<'_>,
        (shared, pods): (&mut Users<Shared>, &mut Users<IpAddr>),
        emission: Emission,
        hairpins: BTreeSet<IpAddr>,
    ) {
        let sets: Box<[_]> = emission.sets.keys().copied().collect();
        let rare = Rare {
            own_chains: emission.own_chains.keys().cloned().collect(),
            own_sets: emission.own_sets.keys().cloned().collect(),
            hairpins,
        };
        let old = self.rare.take().unwrap_or_default();
        let table = &mut *filling.table;
        table.chains.extend(emission.own_chains);
        table.sets.extend(emission.own_sets);
        for chain in old.own_chains.difference(&rare.own_chains) {
            table.chains.remove(chain);
        }
        for set in old.own_sets.difference(&rare.own_sets) {
            table.sets.remove(set);
        }
        for (set, ipv6) in self.sets.iter().filter(|set| sets.binary_search(set).is_err()) {
            filling.set_group(*set, *ipv6, &self.group, None);
        }
        for ((set, ipv6), elements) in emission.sets {
            filling.set_group(set, ipv6, &self.group, Some(elements));
        }
        // What is new is counted before what is gone, so that nothing shared is removed and made again.
        for chain in &emission.shared {
            if shared.begin(*chain) {
                filling.table.chains.insert(chain.chain_name(), chain.chain());
            }
        }
        for chain in &self.shared {
            if shared.end(chain) {
                filling.table.chains.remove(&chain.chain_name());
            }
        }
        for pod in &rare.hairpins {
            if pods.begin(*pod) {
                let pair = Elements::from([(vec![Datum::Ip(*pod), Datum::Ip(*pod)], ElementData::None)]);
                filling.set_group(SetName::Hairpin, pod.is_ipv6(), &pod.to_string().into(), Some(pair));
            }
        }
        for pod in &old.hairpins {
            if pods.end(pod) {
                filling.set_group(SetName::Hairpin, pod.is_ipv6(), &pod.to_string().into(), None);
            }
        }
        (self.sets, self.shared) = (sets, emission.shared.into());
        self.rare = (rare != Rare::default()).then(|| Box::new(rare));
    }
}

impl Planner for ProxyPlanner {
    type Plan = ProxyPlan;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<ProxyPlan> {
        let common = Common::of(snapshot);
        if self.common.as_ref() != Some(&common) {
            *self = Self::empty(common);
        }
        let own_ips = own_ips(snapshot);
        if self.plan.affinity.own_ips != own_ips {
            Arc::make_mut(&mut self.plan.affinity).own_ips = own_ips;
        }
        let leaving = snapshot.own_node().is_none_or(|node| node.leaving);
        if self.plan.health.leaving != leaving {
            Arc::make_mut(&mut self.plan.health).leaving = leaving;
        }
        let dirty = self.services.follow(snapshot);
        let mut others = BTreeSet::new();
        let mut fresh = Vec::with_capacity(dirty.len());
        for key in dirty {
            let plan = self.plan_of(&key);
            self.claim(&key, plan.as_ref(), &mut others);
            fresh.push((key, plan));
        }
        others.retain(|key| fresh.binary_search_by(|(known, _)| known.cmp(key)).is_err());
        let count = fresh.len();
        for (key, plan) in fresh {
            self.emit(&key, plan);
        }
        for key in others {
            let plan = self.plan_of(&key);
            self.emit(&key, plan);
        }
        if let (true, Some(common)) = (std::mem::take(&mut self.misfit), &self.common) {
            layout::fit(Arc::make_mut(&mut self.plan.table), &common.site);
        }
        if self.loose.is_much(count, self.known.len()) {
            fill(&mut self.known);
        }
        Planned::new(self.plan.clone(), self.all_problems(snapshot))
    }
}

impl Common {
    fn of(snapshot: &Snapshot) -> Self {
        let own = snapshot.own_node();
        let pod_cidrs = own.map(|node| node.pod_cidrs.clone()).unwrap_or_default();
        let config = &snapshot.config;
        Self {
            site: Site {
                node_ips: node_port_ips(snapshot),
                pod_cidrs: pod_cidrs.clone(),
                cluster_cidrs: config.cluster_cidrs.clone(),
                service_cidrs: config.service_cidrs.clone(),
                cluster_dns: config.cluster_dns.clone(),
            },
            view: View {
                here: Here {
                    node: snapshot.facts.name.clone(),
                    zone: own
                        .and_then(|node| node.labels.get(ZONE_LABEL).cloned())
                        .filter(|zone| !zone.is_empty()),
                },
                node_ips: own.map(|node| node.internal_ips.clone()).unwrap_or_default(),
                guard: Guard::of(snapshot),
                pod_cidrs,
                cluster_dns: config.cluster_dns.clone(),
                service_cidrs: match contradictions::range_is_wrong(snapshot) {
                    true => Vec::new(),
                    false => config.service_cidrs.clone(),
                },
            },
            own_node: own.is_some(),
        }
    }
}

/// Every address of this node that is known.
fn own_ips(snapshot: &Snapshot) -> BTreeSet<IpAddr> {
    let of_links = snapshot.facts.uplinks.iter().flat_map(|uplink| &uplink.addresses);
    let of_node = snapshot.own_node().into_iter().flat_map(|own| &own.internal_ips);
    of_node.chain(of_links).copied().collect()
}

/// Where NodePorts answer: the Node's first address of each family, or what it has in the ranges of the flag.
fn node_port_ips(snapshot: &Snapshot) -> Vec<IpAddr> {
    let ranges = &snapshot.config.proxy.node_port_ranges;
    if ranges.is_empty() {
        return snapshot.own_node().map(|own| own.primary_ips().collect()).unwrap_or_default();
    }
    own_ips(snapshot).into_iter().filter(|ip| ranges.iter().any(|range| range.contains(ip))).collect()
}

impl ProxyPlanner {
    fn empty(common: Common) -> Self {
        let table = Arc::new(layout::skeleton(&common.site));
        let counts = layout::filled(&table).collect();
        let udp = UdpTargets {
            node_ips: common.site.node_ips.clone(),
            service_cidrs: common.site.service_cidrs.clone(),
            ..UdpTargets::default()
        };
        let affinity = AffinityTargets {
            node_ips: common.site.node_ips.clone(),
            cluster_cidrs: common.site.cluster_cidrs.clone(),
            ..AffinityTargets::default()
        };
        let health = HealthChecks { node_ips: common.site.node_ips.clone(), ..HealthChecks::default() };
        let plan = ProxyPlan {
            table,
            udp: Arc::new(udp),
            affinity: Arc::new(affinity),
            health: Arc::new(health),
            without_local: Arc::default(),
        };
        Self { common: Some(common), counts, plan, ..Self::default() }
    }

    fn plan_of(&self, key: &ServiceKey) -> Option<ServicePlan> {
        Some(service::plan(self.services.get(key)?, self.services.slices(key), &self.common.as_ref()?.view))
    }

    /// Takes over what one Service claims; tells which others share a claim with it.
    fn claim(&mut self, key: &ServiceKey, plan: Option<&ServicePlan>, others: &mut BTreeSet<ServiceKey>) {
        if let Some(known) = self.known.get_mut(key) {
            for (claim, manner) in std::mem::take(&mut known.claims) {
                self.claims.drop(&claim, manner, (known.created, key), others);
            }
        }
        let Some(plan) = plan else { return };
        let claims: Box<[_]> =
            plan.holdings.iter().map(|(claim, holding)| (claim.clone(), holding.manner())).collect();
        for (claim, manner) in &claims {
            self.claims.raise(claim, *manner, (plan.created, key), others);
        }
        let known = self.known.entry(key.clone()).or_insert_with(|| Known::new(key));
        (known.created, known.claims) = (plan.created, claims);
    }

    /// Puts what one Service holds into the plan, in place of what it had there.
    fn emit(&mut self, key: &ServiceKey, plan: Option<ServicePlan>) {
        let mut emission = Emission::default();
        let mut beside = Beside::default();
        let mut hairpins = BTreeSet::new();
        let exists = plan.is_some();
        if let Some(plan) = plan {
            beside.problems = plan.problems;
            hairpins = plan.hairpins;
            let mut held = Vec::with_capacity(plan.holdings.len());
            for (claim, holding) in &plan.holdings {
                match self.claims.rival(key, claim, holding.manner()) {
                    None => held.push((claim, holding)),
                    Some(Rival { winner, of_address: false }) => {
                        beside.problems.push(conflict(key, claim, winner));
                    }
                    // Said once, of the address.
                    Some(Rival { of_address: true, .. }) => {}
                }
            }
            for (claim, holding) in &held {
                emission.add(claim, holding);
                beside.udp.extend(udp_targets(claim, holding));
                beside.sticky.extend(sticky_targets(claim, holding));
                beside.checked = beside.checked.or(health_check(claim, holding));
            }
            beside.without_local = WithoutLocal::of(&held);
            if let Some(firewall) = &plan.firewall {
                emission.add_firewall(&key.to_string(), firewall, held.into_iter());
            }
        }
        let Some(known) = self.known.get_mut(key) else { return };
        let has_beside = beside != Beside::default();
        let had_beside = std::mem::replace(&mut known.beside, has_beside);
        let table = Arc::make_mut(&mut self.plan.table);
        let mut filling = Filling { table, counts: &mut self.counts, misfit: &mut self.misfit };
        known.replace_elements(&mut filling, (&mut self.shared, &mut self.hairpins), emission, hairpins);
        if has_beside || had_beside {
            self.replace_beside(key, beside);
        }
        if !exists {
            self.known.remove(key);
        }
    }

    fn replace_beside(&mut self, key: &ServiceKey, beside: Beside) {
        if beside.problems.is_empty() {
            self.problems.remove(key);
        } else {
            self.problems.insert(key.clone(), beside.problems);
        }
        self.replace_udp(key, beside.udp);
        self.replace_affinity(key, beside.sticky);
        self.replace_health(key, beside.checked);
        self.replace_without_local(key, beside.without_local);
    }

    fn replace_health(&mut self, key: &ServiceKey, checked: Option<(u16, LocalEndpoints)>) {
        if self.plan.health.services.get(key) == checked.as_ref() {
            return;
        }
        let services = &mut Arc::make_mut(&mut self.plan.health).services;
        match checked {
            Some(checked) => drop(services.insert(key.clone(), checked)),
            None => drop(services.remove(key)),
        }
    }

    fn replace_without_local(&mut self, key: &ServiceKey, counts: WithoutLocal) {
        let counts = Some(counts).filter(|counts| *counts != WithoutLocal::default());
        if self.plan.without_local.get(key) == counts.as_ref() {
            return;
        }
        let services = Arc::make_mut(&mut self.plan.without_local);
        match counts {
            Some(counts) => drop(services.insert(key.clone(), counts)),
            None => drop(services.remove(key)),
        }
    }

    fn replace_affinity(&mut self, key: &ServiceKey, targets: BTreeMap<Claim, Sticky>) {
        let name = key.to_string();
        let known = self.plan.affinity.groups.get(&name);
        if known.map(Arc::as_ref) == Some(&targets) || (known.is_none() && targets.is_empty()) {
            return;
        }
        let affinity = Arc::make_mut(&mut self.plan.affinity);
        if targets.is_empty() {
            affinity.groups.remove(&name);
        } else {
            affinity.groups.insert(name, Arc::new(targets));
        }
    }

    fn replace_udp(&mut self, key: &ServiceKey, targets: BTreeMap<UdpDestination, BTreeSet<SocketAddr>>) {
        let name = key.to_string();
        let known = self.plan.udp.groups.get(&name);
        if known.map(Arc::as_ref) == Some(&targets) || (known.is_none() && targets.is_empty()) {
            return;
        }
        let udp = Arc::make_mut(&mut self.plan.udp);
        if targets.is_empty() {
            udp.groups.remove(&name);
        } else {
            udp.groups.insert(name, Arc::new(targets));
        }
    }

    fn all_problems(&self, snapshot: &Snapshot) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.problems.values().flatten().cloned().collect();
        problems.extend(contradictions::of_cluster(snapshot));
        if !self.common.as_ref().is_some_and(|common| common.own_node) {
            problems.push(Problem::new(
                ObjectRef::new("Node", "", &snapshot.facts.name.0),
                Reason::Missing,
                "the Node does not exist, so no NodePort answers here; let the kubelet register it or correct --node-name",
            ));
        }
        problems
    }
}

impl WithoutLocal {
    /// A port counts once, at however many external addresses it is.
    fn of(held: &[(&Claim, &Holding)]) -> Self {
        let mut inside = [BTreeSet::new(), BTreeSet::new()];
        let mut outside = [BTreeSet::new(), BTreeSet::new()];
        let mut node_ports = [0, 0];
        for (claim, holding) in held {
            let Holding::Frontend(Frontend { target: Target::Drop, reach, .. }) = holding else { continue };
            match (claim, reach) {
                (Claim::NodePort { ipv6, .. }, _) => node_ports[usize::from(*ipv6)] += 1,
                (Claim::Vip(ip, protocol, port), Reach::Cluster) => {
                    inside[usize::from(ip.is_ipv6())].insert((*protocol, *port));
                }
                (Claim::Vip(ip, protocol, port), Reach::External { .. }) => {
                    outside[usize::from(ip.is_ipv6())].insert((*protocol, *port));
                }
                _ => {}
            }
        }
        let count = |ports: &BTreeSet<_>| ports.len() as u64;
        let [v4, v6] = outside.each_ref().map(count);
        let external = [v4.max(node_ports[0]), v6.max(node_ports[1])];
        Self { internal: inside.each_ref().map(count), external }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        let sum = |[v4, v6]: [u64; 2], [more4, more6]: [u64; 2]| [v4 + more4, v6 + more6];
        Self { internal: sum(self.internal, other.internal), external: sum(self.external, other.external) }
    }
}

impl Filling<'_> {
    /// Replaces one group; equal elements keep their `Arc`. The set's room follows.
    fn set_group(&mut self, name: SetName, ipv6: bool, group: &Arc<str>, elements: Option<Elements>) {
        let set = name.in_table(self.table, ipv6);
        let had_none = set.groups.is_empty();
        let new = elements.as_ref().map_or(0, Elements::len);
        let old = match elements {
            None => set.groups.remove(group),
            Some(elements) if set.groups.get(group).is_some_and(|known| **known == elements) => return,
            Some(elements) => set.groups.insert(group.clone(), Arc::new(elements.shrunk())),
        };
        let count = self.counts.entry((name, ipv6)).or_default();
        *count = (*count + new).saturating_sub(old.map_or(0, |old| old.len()));
        set.room = set.room.map(|_| Set::room_for(*count));
        *self.misfit |= had_none != set.groups.is_empty();
    }
}

/// Who may answer at a UDP destination; `None` for what is not UDP or not ours.
fn udp_targets(claim: &Claim, holding: &Holding) -> Option<(UdpDestination, BTreeSet<SocketAddr>)> {
    let destination = match claim {
        Claim::Vip(ip, Protocol::Udp, port) => UdpDestination::Vip(SocketAddr::new(*ip, *port)),
        Claim::NodePort { ipv6, protocol: Protocol::Udp, port } => {
            UdpDestination::NodePort { ipv6: *ipv6, port: *port }
        }
        _ => return None,
    };
    let Holding::Frontend(frontend) = holding else {
        return None;
    };
    let external = match &frontend.target {
        Target::Endpoints(endpoints) => endpoints.as_slice(),
        Target::Reject | Target::Drop => &[],
    };
    let internal = frontend.internal.iter().flatten();
    Some((destination, external.iter().chain(internal).copied().collect()))
}

/// What a load balancer is told at a health check port.
fn health_check(claim: &Claim, holding: &Holding) -> Option<(u16, LocalEndpoints)> {
    match (claim, holding) {
        (Claim::HealthCheck(port), Holding::Health(counts)) => Some((*port, *counts)),
        _ => None,
    }
}

/// Who may stay with whom; `None` for what has no affinity.
fn sticky_targets(claim: &Claim, holding: &Holding) -> Option<(Claim, Sticky)> {
    let Holding::Frontend(frontend) = holding else {
        return None;
    };
    Some((claim.clone(), Sticky::of(frontend)?))
}

#[cfg(test)]
mod tests;
