//! One Service and its EndpointSlices: who answers at which address. Pure; knows nothing of nft.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use weft_model::objects::{EndpointSlice, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy};
use weft_model::{ObjectRef, Problem};

use super::claims::Manner;
use super::contradictions;
pub(super) use super::endpoints::Target;
use super::endpoints::{Endpoints, Here};
use super::external::{External, Guard};

/// A Service with one of these labels is another proxy's (or nobody's) business, whatever their value.
const FOREIGN_LABELS: [&str; 2] =
    ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
/// Port of a cluster DNS address that this node answers itself (decision 9).
const DNS_PORT: u16 = 53;

/// What the plan of one Service depends on besides the Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub here: Here,
    pub pod_cidrs: Vec<IpNet>,
    pub cluster_dns: Vec<IpAddr>,
    /// Where ClusterIPs are to be; empty where the cluster as a whole is elsewhere, which is said once.
    pub service_cidrs: Vec<IpNet>,
    /// Every address of this node's Node.
    pub node_ips: Vec<IpAddr>,
    pub guard: Guard,
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
    /// The port where load balancers ask for the health of a Service.
    HealthCheck(u16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holding {
    /// Ports of this address that no Service has are rejected.
    Known,
    /// Left to others.
    Foreign,
    /// Some ports of an address outside the cluster: the others are not ours, and a ClusterIP goes before it.
    External,
    Frontend(Frontend),
    Health(LocalEndpoints),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frontend {
    pub target: Target,
    /// Where clients inside the cluster are sent when that differs: `externalTrafficPolicy: Local` is about clients
    /// outside, so pods and nodes reach every endpoint (KEP-2086; kube-proxy calls it the short circuit).
    pub internal: Option<Vec<SocketAddr>>,
    /// How long after its last connection a client's next one goes to the same endpoint.
    pub affinity_seconds: Option<u32>,
    pub reach: Reach,
}

/// What kind of address a frontend is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// ClusterIP or node port.
    Cluster,
    /// Outside the cluster; `firewalled`: only for the Service's source ranges.
    External { firewalled: bool },
}

/// Ready endpoints on this node, by family: the count that a load balancer is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalEndpoints {
    pub ipv4: usize,
    pub ipv6: usize,
}

/// Who may reach a Service at the addresses of its load balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Firewall {
    /// Without overlaps.
    pub ranges: Vec<IpNet>,
    /// Families in which the ranges hold an address of this node, so that every address of its own is let in.
    pub own: BTreeSet<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServicePlan {
    pub created: i64,
    /// In the order of the claims.
    pub holdings: Vec<(Claim, Holding)>,
    /// Pods of this node that may meet themselves through the Service.
    pub hairpins: BTreeSet<IpAddr>,
    pub firewall: Option<Firewall>,
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
        for foreign in cluster_ips.iter().filter(|ip| !view.cluster_dns.contains(ip)) {
            plan.hold(Claim::Address(*foreign), Holding::Foreign);
        }
        return plan;
    }
    plan.problems.extend(contradictions::of_service(service, &view.service_cidrs));
    let families: Vec<bool> = cluster_ips.iter().map(IpAddr::is_ipv6).collect();
    let externals = view.guard.admit(service, &families, &mut plan.problems);
    plan.firewall = service.load_balancer_source_ranges.as_ref().map(|ranges| Firewall::of(ranges, view));
    for external in &externals {
        plan.hold(Claim::Address(external.ip), Holding::External);
    }
    for cluster_ip in cluster_ips.iter().filter(|ip| !view.cluster_dns.contains(ip)) {
        plan.hold(Claim::Address(*cluster_ip), Holding::Known);
    }
    let mut ready = BTreeSet::new();
    for port in &service.ports {
        for cluster_ip in cluster_ips {
            let endpoints = Endpoints::of(port, cluster_ip.is_ipv6(), slices.clone(), &view.here);
            let in_pod_range = |ip: &IpAddr| view.pod_cidrs.iter().any(|cidr| cidr.contains(ip));
            plan.hairpins.extend(endpoints.local().map(|endpoint| endpoint.ip()).filter(in_pod_range));
            ready.extend(endpoints.local_ready().map(|endpoint| endpoint.ip()));
            plan_port(
                PortOf { service, port, cluster_ip: *cluster_ip },
                &externals,
                &endpoints,
                view,
                &mut plan,
            );
        }
    }
    if let Some(port) = service.health_check_node_port {
        let ipv6 = ready.iter().filter(|ip| ip.is_ipv6()).count();
        let counts = LocalEndpoints { ipv4: ready.len() - ipv6, ipv6 };
        plan.hold(Claim::HealthCheck(port), Holding::Health(counts));
    }
    plan
}

/// One port of a Service in the family of one of its ClusterIPs; a Service without a ClusterIP of a family does not exist
/// in it.
#[derive(Clone, Copy)]
struct PortOf<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    cluster_ip: IpAddr,
}

/// The claims of one port.
fn plan_port(
    PortOf { service, port, cluster_ip }: PortOf<'_>,
    externals: &[External],
    endpoints: &Endpoints,
    view: &View,
    plan: &mut ServicePlan,
) {
    let affinity_seconds = service.session_affinity_seconds;
    if !(port.port == DNS_PORT && view.cluster_dns.contains(&cluster_ip)) {
        let target = endpoints.target(service.internal_traffic_policy, &view.here);
        let frontend = Frontend { target, internal: None, affinity_seconds, reach: Reach::Cluster };
        let claim = Claim::Vip(cluster_ip, port.protocol, port.port);
        plan.hold(claim, Holding::Frontend(frontend));
    }
    let policy = service.external_traffic_policy;
    let anywhere = endpoints.anywhere(&view.here);
    let internal = (policy == TrafficPolicy::Local && !anywhere.is_empty()).then_some(anywhere);
    let outside = |reach| {
        let target = endpoints.target(policy, &view.here);
        Holding::Frontend(Frontend { target, internal: internal.clone(), affinity_seconds, reach })
    };
    if let Some(node_port) = port.node_port {
        let claim = Claim::NodePort { ipv6: cluster_ip.is_ipv6(), protocol: port.protocol, port: node_port };
        plan.hold(claim, outside(Reach::Cluster));
    }
    for external in externals.iter().filter(|external| external.ip.is_ipv6() == cluster_ip.is_ipv6()) {
        if let Some(problem) = view.guard.objection_to_port(service, *external, port) {
            plan.problems.push(problem);
            continue;
        }
        let firewalled = external.of_load_balancer && plan.firewall.is_some();
        let claim = Claim::Vip(external.ip, port.protocol, port.port);
        plan.hold(claim, outside(Reach::External { firewalled }));
    }
}

impl Firewall {
    fn of(ranges: &[IpNet], view: &View) -> Self {
        let own = view.node_ips.iter().filter(|ip| ranges.iter().any(|range| range.contains(*ip)));
        Self { ranges: IpNet::aggregate(&ranges.to_vec()), own: own.map(IpAddr::is_ipv6).collect() }
    }
}

impl ServicePlan {
    /// In place of what was held under the same claim.
    fn hold(&mut self, claim: Claim, holding: Holding) {
        match self.holdings.binary_search_by(|(known, _)| known.cmp(&claim)) {
            Ok(place) => self.holdings[place].1 = holding,
            Err(place) => self.holdings.insert(place, (claim, holding)),
        }
    }
}

impl Holding {
    pub(super) fn manner(&self) -> Manner {
        match self {
            Self::External => Manner::SharedOutside,
            Self::Frontend(Frontend { reach: Reach::External { .. }, .. }) => Manner::Outside,
            Self::Known | Self::Foreign | Self::Health(_) | Self::Frontend(_) => Manner::Inside,
        }
    }
}

pub(super) fn service_ref(service: &Service) -> ObjectRef {
    ObjectRef::new("Service", &service.key.namespace, &service.key.name)
}
