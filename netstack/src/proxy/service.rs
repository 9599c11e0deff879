//! One Service and its EndpointSlices: who answers at which address. Pure; knows nothing of nft.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use weft_model::objects::{
    Endpoint, EndpointSlice, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy,
};
use weft_model::{NodeName, ObjectRef, Problem, Reason};

use super::contradictions;

/// A Service with one of these labels is another proxy's (or nobody's) business, whatever their value.
const FOREIGN_LABELS: [&str; 2] =
    ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
/// Port of a cluster DNS address that this node answers itself (decision 9).
const DNS_PORT: u16 = 53;

/// What the plan of one Service depends on besides the Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub node: NodeName,
    pub pod_cidrs: Vec<IpNet>,
    pub cluster_dns: Vec<IpAddr>,
    /// Where ClusterIPs are to be; empty where the cluster as a whole is elsewhere, which is said once.
    pub service_cidrs: Vec<IpNet>,
}

/// Something only one Service can have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claim {
    /// A ClusterIP as a whole.
    Address(IpAddr),
    Vip(IpAddr, Protocol, u16),
    NodePort {
        ipv6: bool,
        protocol: Protocol,
        port: u16,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holding {
    /// Ports of this address that no Service has are rejected.
    Known,
    /// Left to others.
    Foreign,
    Frontend(Frontend),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frontend {
    pub target: Target,
    /// Where clients inside the cluster are sent when that differs: `externalTrafficPolicy: Local` is about clients
    /// outside, so pods and nodes reach every endpoint (KEP-2086; kube-proxy calls it the short circuit).
    pub internal: Option<Vec<SocketAddr>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Not empty, sorted.
    Endpoints(Vec<SocketAddr>),
    /// No endpoint anywhere.
    Reject,
    /// The policy is Local and every endpoint is elsewhere.
    Drop,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServicePlan {
    pub created: i64,
    pub holdings: BTreeMap<Claim, Holding>,
    /// Pods of this node that may meet themselves through the Service.
    pub hairpins: BTreeSet<IpAddr>,
    pub problems: Vec<Problem>,
}

pub(super) fn plan<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    view: &View,
) -> ServicePlan {
    let ServiceKind::ClusterIps(cluster_ips) = &service.kind else {
        return ServicePlan::default();
    };
    let mut plan = ServicePlan { created: service.created, ..ServicePlan::default() };
    if FOREIGN_LABELS.iter().any(|label| service.labels.contains_key(*label)) {
        let foreign = cluster_ips.iter().filter(|ip| !view.cluster_dns.contains(ip));
        plan.holdings = foreign.map(|ip| (Claim::Address(*ip), Holding::Foreign)).collect();
        return plan;
    }
    plan.problems.extend(contradictions::of_service(service, &view.service_cidrs));
    if service.session_affinity_seconds.is_some() {
        plan.problems.push(affinity_problem(service));
    }
    for cluster_ip in cluster_ips.iter().filter(|ip| !view.cluster_dns.contains(ip)) {
        plan.holdings.insert(Claim::Address(*cluster_ip), Holding::Known);
    }
    for port in &service.ports {
        for ipv6 in [false, true] {
            let endpoints = Endpoints::of(port, ipv6, slices.clone(), view);
            let cluster_ip = cluster_ips.iter().find(|ip| ip.is_ipv6() == ipv6);
            plan_port(service, port, ipv6, cluster_ip.copied(), &endpoints, view, &mut plan);
        }
    }
    plan
}

/// The claims of one port in one family; a Service without a ClusterIP of a family does not exist in it.
fn plan_port(
    service: &Service,
    port: &ServicePort,
    ipv6: bool,
    cluster_ip: Option<IpAddr>,
    endpoints: &Endpoints,
    view: &View,
    plan: &mut ServicePlan,
) {
    let Some(cluster_ip) = cluster_ip else {
        return;
    };
    if !(port.port == DNS_PORT && view.cluster_dns.contains(&cluster_ip)) {
        let target = endpoints.target(service.internal_traffic_policy);
        let claim = Claim::Vip(cluster_ip, port.protocol, port.port);
        plan.holdings.insert(claim, Holding::Frontend(Frontend { target, internal: None }));
    }
    if let Some(node_port) = port.node_port {
        let policy = service.external_traffic_policy;
        let cluster = usable(&endpoints.all);
        let internal = (policy == TrafficPolicy::Local && !cluster.is_empty()).then_some(cluster);
        let frontend = Frontend { target: endpoints.target(policy), internal };
        let claim = Claim::NodePort { ipv6, protocol: port.protocol, port: node_port };
        plan.holdings.insert(claim, Holding::Frontend(frontend));
    }
    let in_pod_range = |ip: &IpAddr| view.pod_cidrs.iter().any(|cidr| cidr.contains(ip));
    plan.hairpins.extend(endpoints.local.keys().map(SocketAddr::ip).filter(in_pod_range));
}

/// Endpoints of one port in one family with the best condition that any slice gives them.
struct Endpoints {
    all: BTreeMap<SocketAddr, Condition>,
    local: BTreeMap<SocketAddr, Condition>,
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

impl Endpoints {
    fn of<'a>(
        port: &ServicePort,
        ipv6: bool,
        slices: impl Iterator<Item = &'a EndpointSlice>,
        view: &View,
    ) -> Self {
        let mut endpoints = Self { all: BTreeMap::new(), local: BTreeMap::new() };
        for slice in slices.filter(|slice| slice.ipv6 == ipv6) {
            let ports = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
            for target_port in ports {
                for endpoint in &slice.endpoints {
                    endpoints.add(endpoint, target_port.port, view);
                }
            }
        }
        endpoints
    }

    fn add(&mut self, endpoint: &Endpoint, port: u16, view: &View) {
        let Some(condition) = Condition::of(endpoint) else {
            return;
        };
        let address = SocketAddr::new(endpoint.address, port);
        let keep_best = |known: &mut Condition| *known = condition.max(*known);
        self.all.entry(address).and_modify(keep_best).or_insert(condition);
        if endpoint.node.as_ref() == Some(&view.node) {
            self.local.entry(address).and_modify(keep_best).or_insert(condition);
        }
    }

    fn target(&self, policy: TrafficPolicy) -> Target {
        let chosen = match policy {
            TrafficPolicy::Cluster => usable(&self.all),
            TrafficPolicy::Local => usable(&self.local),
        };
        match (chosen.is_empty(), self.all.is_empty()) {
            (false, _) => Target::Endpoints(chosen),
            (true, true) => Target::Reject,
            (true, false) => Target::Drop,
        }
    }
}

/// The ready ones, else those that drain.
fn usable(endpoints: &BTreeMap<SocketAddr, Condition>) -> Vec<SocketAddr> {
    let best = endpoints.values().max();
    endpoints.iter().filter(|(_, condition)| Some(*condition) == best).map(|(address, _)| *address).collect()
}

fn affinity_problem(service: &Service) -> Problem {
    Problem::new(
        service_ref(service),
        Reason::NotSupported,
        "spec.sessionAffinity ClientIP is not supported yet: connections are spread at random; set it to None",
    )
}

pub(super) fn service_ref(service: &Service) -> ObjectRef {
    ObjectRef::new("Service", &service.key.namespace, &service.key.name)
}
