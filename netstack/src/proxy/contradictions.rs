//! Where the flags of the agent contradict the cluster's Services. In: Services and the configuration. Out: Problems with the
//! flag to correct. Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_model::objects::{Service, ServiceKind};
use weft_model::{ObjectRef, Problem, Reason, ServiceKey, Snapshot};

/// The API server's own Service, in every cluster (kube-apiserver makes it), with the first address of its range.
const API_SERVER: (&str, &str) = ("default", "kubernetes");
/// The Service of the cluster's DNS, by the name that installers agree on.
const DNS: (&str, &str) = ("kube-system", "kube-dns");

/// The API server's own Service has an address in none of the ranges: all Services will.
pub(super) fn range_is_wrong(snapshot: &Snapshot) -> bool {
    let ranges = &snapshot.config.service_cidrs;
    cluster_ips(snapshot, API_SERVER).iter().any(|ip| !contained(ranges, *ip))
}

/// Of the cluster as a whole: said once, not for every Service.
pub(super) fn of_cluster(snapshot: &Snapshot) -> Vec<Problem> {
    let config = &snapshot.config;
    let mut problems = Vec::new();
    if range_is_wrong(snapshot) {
        let ips = joined(cluster_ips(snapshot, API_SERVER));
        problems.push(problem(API_SERVER, outside(&ips, &config.service_cidrs)));
    }
    let dns = cluster_ips(snapshot, DNS);
    if !dns.is_empty() && !dns.iter().any(|ip| config.cluster_dns.contains(ip)) {
        let message = format!(
            "spec.clusterIPs {} is not --cluster-dns {}: pods may ask an address that Weft does not answer on; give every agent \
             the clusterDNS of the kubelets as --cluster-dns",
            joined(dns),
            joined(&config.cluster_dns)
        );
        problems.push(problem(DNS, message));
    }
    problems
}

/// Of one Service; a family without a range is not looked at.
pub(super) fn of_service(service: &Service, ranges: &[IpNet]) -> Option<Problem> {
    let ServiceKind::ClusterIps(ips) = &service.kind else { return None };
    let ip = ips.iter().find(|ip| {
        ranges.iter().any(|range| range.addr().is_ipv6() == ip.is_ipv6()) && !contained(ranges, **ip)
    })?;
    let ServiceKey { namespace, name } = &service.key;
    Some(problem((namespace, name), outside(&ip.to_string(), ranges)))
}

fn outside(ips: &str, ranges: &[IpNet]) -> String {
    format!(
        "spec.clusterIPs {ips} is outside the service ranges {}; give every agent the --service-cluster-ip-range of \
         kube-apiserver as --service-cidr",
        joined(ranges)
    )
}

fn problem((namespace, name): (&str, &str), message: String) -> Problem {
    Problem::new(ObjectRef::new("Service", namespace, name), Reason::InvalidField, message)
}

fn cluster_ips<'a>(snapshot: &'a Snapshot, (namespace, name): (&str, &str)) -> &'a [IpAddr] {
    match snapshot.services.get(&ServiceKey::new(namespace, name)).map(|service| &service.kind) {
        Some(ServiceKind::ClusterIps(ips)) => ips,
        _ => &[],
    }
}

fn contained(ranges: &[IpNet], ip: IpAddr) -> bool {
    ranges.iter().any(|range| range.contains(&ip))
}

fn joined<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
