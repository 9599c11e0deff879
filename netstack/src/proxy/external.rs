//! Which addresses outside the cluster a Service may have. In: what it asks for and what nobody may claim. Out: addresses, and
//! a Problem for each that is refused. Pure.
//!
//! `spec.externalIPs` may be written by whoever may write a Service, so an address is honoured only inside a range that the
//! operator allowed, and never when it belongs to the cluster itself (CVE-2020-8554, KEP-5707). The status is written
//! by load balancers alone; their addresses may be those of nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use weft_model::objects::{EndpointSlice, Protocol, Service, ServicePort};
use weft_model::{NodeName, Problem, Reason, ServiceKey, Snapshot};

use super::service::service_ref;

/// What a Service may claim and what it may not: the same for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Guard {
    /// `--external-ip-range`.
    allowed: Vec<IpNet>,
    service_cidrs: Vec<IpNet>,
    cluster_cidrs: Vec<IpNet>,
    /// Addresses of nodes within `allowed`.
    nodes: BTreeMap<IpAddr, NodeName>,
    /// Where the API server itself listens.
    api_server: BTreeSet<SocketAddr>,
}

/// An address outside the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct External {
    pub ip: IpAddr,
    /// Of a load balancer: `spec.loadBalancerSourceRanges` is about it.
    pub of_load_balancer: bool,
}

impl Guard {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let config = &snapshot.config;
        let allowed = config.proxy.external_ip_ranges.clone();
        let nodes = snapshot
            .nodes
            .values()
            .filter(|_| !allowed.is_empty())
            .flat_map(|node| node.internal_ips.iter().map(move |ip| (*ip, node)));
        let nodes = nodes.filter(|(ip, _)| contained(&allowed, *ip).is_some());
        let nodes = nodes.map(|(ip, node)| (ip, node.name.clone())).collect();
        let kubernetes = ServiceKey::new("default", "kubernetes");
        // The API server names its slices after its Service: nobody has to look at all the others.
        let named = snapshot.endpoint_slices.range(kubernetes.clone()..);
        let named =
            named.take_while(|(key, _)| &*key.namespace == "default" && key.name.starts_with("kubernetes"));
        let slices = named.map(|(_, slice)| slice).filter(|slice| slice.service == kubernetes);
        Self {
            nodes,
            allowed,
            service_cidrs: config.service_cidrs.clone(),
            cluster_cidrs: config.cluster_cidrs.clone(),
            api_server: slices.flat_map(|slice| api_servers(slice)).collect(),
        }
    }

    /// The addresses that `service` gets; `families` are those it exists in.
    pub(super) fn admit(
        &self,
        service: &Service,
        families: &[bool],
        problems: &mut Vec<Problem>,
    ) -> Vec<External> {
        let of_load_balancer =
            service.load_balancer_ips.iter().map(|ip| External { ip: *ip, of_load_balancer: true });
        let of_spec = service.external_ips.iter().map(|ip| External { ip: *ip, of_load_balancer: false });
        let mut admitted: Vec<External> = Vec::new();
        for external in of_load_balancer.chain(of_spec) {
            if admitted.iter().any(|known| known.ip == external.ip) {
                continue;
            }
            let objection = self.objection(external).or_else(|| {
                let missing = !families.contains(&external.ip.is_ipv6());
                missing
                    .then(|| "is of a family in which the Service has no clusterIP; give it one".to_owned())
            });
            match objection {
                None => admitted.push(external),
                Some(objection) => problems.push(problem(service, external, &objection)),
            }
        }
        admitted
    }

    fn objection(&self, External { ip, of_load_balancer }: External) -> Option<String> {
        if let Some(range) = contained(&self.service_cidrs, ip) {
            return Some(format!("is of the service range {range}; take an address outside the cluster"));
        }
        if let Some(range) = contained(&self.cluster_cidrs, ip) {
            return Some(format!("is of the pod range {range}; take an address outside the cluster"));
        }
        if of_load_balancer {
            return None;
        }
        if self.api_server.iter().any(|server| server.ip() == ip) {
            return Some("is the API server's; take another".to_owned());
        }
        if contained(&self.allowed, ip).is_none() {
            return Some(
                "is in no --external-ip-range; take one of a range, or give every agent the range".to_owned(),
            );
        }
        let node = self.nodes.get(&ip)?;
        Some(format!("is Node {}'s own; take one that no node has, or use a nodePort", node.0))
    }

    /// The very address and port that the API server listens on stay its own.
    pub(super) fn objection_to_port(
        &self,
        service: &Service,
        external: External,
        port: &ServicePort,
    ) -> Option<Problem> {
        let taken = port.protocol == Protocol::Tcp
            && self.api_server.contains(&SocketAddr::new(external.ip, port.port));
        taken.then(|| {
            let objection = format!("port {} is the API server's; give the Service another port", port.port);
            problem(service, external, &objection)
        })
    }
}

fn api_servers(slice: &EndpointSlice) -> impl Iterator<Item = SocketAddr> + '_ {
    let ports = slice.ports.iter().map(|port| port.port);
    ports.flat_map(|port| slice.endpoints.iter().map(move |endpoint| SocketAddr::new(endpoint.address, port)))
}

fn contained(ranges: &[IpNet], ip: IpAddr) -> Option<&IpNet> {
    ranges.iter().find(|range| range.contains(&ip))
}

fn problem(service: &Service, External { ip, of_load_balancer }: External, objection: &str) -> Problem {
    let field = if of_load_balancer { "status.loadBalancer.ingress" } else { "spec.externalIPs" };
    Problem::new(service_ref(service), Reason::InvalidField, format!("{field} {ip} {objection}"))
}
