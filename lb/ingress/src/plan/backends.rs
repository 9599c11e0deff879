//! From Services and their EndpointSlices to the endpoints that requests go to. Memoised by the identity of both.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use weft_model::ingress::BackendPort;
use weft_model::objects::{EndpointSlice, Service, ServiceKind, ServicePort};
use weft_model::{NamespacedName, Problem, Reason, Snapshot};

use super::claims::Wanted;
use super::table::{Backend, BackendKey, Target};

#[derive(Default)]
pub(super) struct Backends {
    memo: BTreeMap<BackendKey, Memo>,
}

struct Memo {
    service: Option<Arc<Service>>,
    slices: Vec<Arc<EndpointSlice>>,
    backend: Arc<Backend>,
}

impl Memo {
    fn is_for(&self, service: Option<&Arc<Service>>, slices: &[Arc<EndpointSlice>]) -> bool {
        let same_service = match (&self.service, service) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        same_service
            && self.slices.len() == slices.len()
            && self.slices.iter().zip(slices).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

impl Backends {
    pub(super) fn plan(
        &mut self,
        snapshot: &Snapshot,
        wanted: &BTreeMap<&BackendKey, Vec<&Wanted>>,
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<BackendKey, Arc<Backend>> {
        let services: BTreeSet<&NamespacedName> = wanted.keys().map(|key| &key.service).collect();
        let mut slices: BTreeMap<&NamespacedName, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
        for slice in snapshot.endpoint_slices.values().filter(|slice| services.contains(&slice.service)) {
            slices.entry(&slice.service).or_default().push(slice.clone());
        }
        self.memo.retain(|key, _| wanted.contains_key(key));
        let mut planned = BTreeMap::new();
        for (key, wanted) in wanted {
            let service = snapshot.services.get(&key.service);
            let slices = slices.get(&key.service).map(Vec::as_slice).unwrap_or_default();
            let known = self.memo.get(key).filter(|memo| memo.is_for(service, slices));
            let backend = match known {
                Some(memo) => memo.backend.clone(),
                None => {
                    let backend = Arc::new(backend(key, service.map(Arc::as_ref), slices));
                    let memo =
                        Memo { service: service.cloned(), slices: slices.to_vec(), backend: backend.clone() };
                    self.memo.insert((*key).clone(), memo);
                    backend
                }
            };
            if let Backend::Missing(why) = &*backend {
                for (object, field) in wanted.iter().copied().flatten() {
                    let message = format!("{field}: {why}; requests get 503 meanwhile");
                    problems.push(Problem::new(object.clone(), Reason::Missing, message));
                }
            }
            planned.insert((*key).clone(), backend);
        }
        planned
    }
}

fn backend(key: &BackendKey, service: Option<&Service>, slices: &[Arc<EndpointSlice>]) -> Backend {
    let Some(service) = service else {
        return Backend::Missing(format!("there is no Service {}", key.service));
    };
    if let ServiceKind::ExternalName(name) = &service.kind {
        return match &key.port {
            BackendPort::Number(number) => Backend::Name(name.clone(), *number),
            BackendPort::Name(port) => match service.ports.iter().find(|known| known.name == *port) {
                Some(known) => Backend::Name(name.clone(), known.port),
                None => Backend::Missing(format!("Service {} has no port {port:?}", key.service)),
            },
        };
    }
    let Some(port) = service_port(service, &key.port) else {
        let ports: Vec<String> = service.ports.iter().map(described).collect();
        return Backend::Missing(format!(
            "Service {} has no port {} (it has {})",
            key.service,
            key.port,
            if ports.is_empty() { "none".to_owned() } else { ports.join(", ") }
        ));
    };
    if key.by_service {
        return by_service(key, service, port);
    }
    Backend::Endpoints(endpoints(service, port, slices))
}

fn described(port: &ServicePort) -> String {
    match port.name.as_str() {
        "" => port.port.to_string(),
        name => format!("{} {name}", port.port),
    }
}

fn service_port<'a>(service: &'a Service, wanted: &BackendPort) -> Option<&'a ServicePort> {
    let tcp = service.ports.iter().filter(|port| port.protocol == weft_model::objects::Protocol::Tcp);
    let mut tcp = tcp.into_iter();
    match wanted {
        BackendPort::Number(number) => tcp.find(|port| port.port == *number),
        BackendPort::Name(name) => tcp.find(|port| port.name == *name),
    }
}

fn by_service(key: &BackendKey, service: &Service, port: &ServicePort) -> Backend {
    match &service.kind {
        ServiceKind::ClusterIps(ips) if !ips.is_empty() => {
            let target = |ip: &std::net::IpAddr| Target {
                address: SocketAddr::new(*ip, port.port),
                terminating: false,
                pod: None,
                node: None,
            };
            Backend::Endpoints(ips.iter().take(1).map(target).collect())
        }
        _ => Backend::Missing(format!(
            "Service {} has no ClusterIP, which the annotation service-upstream needs; remove the annotation",
            key.service
        )),
    }
}

/// The ready ones; where there is none, those that end and serve still (KEP-1669). Of a pod with two addresses the one of the
/// Service's first family.
fn endpoints(service: &Service, port: &ServicePort, slices: &[Arc<EndpointSlice>]) -> Vec<Target> {
    let mut found: Vec<Target> = Vec::new();
    for slice in slices {
        let numbers =
            slice.ports.iter().filter(|known| known.protocol == port.protocol && known.name == port.name);
        for number in numbers {
            let usable = slice.endpoints.iter().filter(|endpoint| endpoint.ready || endpoint.serving);
            found.extend(usable.map(|endpoint| Target {
                address: SocketAddr::new(endpoint.address, number.port),
                terminating: endpoint.terminating || !endpoint.ready,
                pod: endpoint.target_pod.clone(),
                node: endpoint.node.as_ref().map(|node| node.to_string()),
            }));
        }
    }
    let ipv6_first = match &service.kind {
        ServiceKind::ClusterIps(ips) => ips.first().is_some_and(std::net::IpAddr::is_ipv6),
        _ => false,
    };
    if found.iter().any(|target| target.address.is_ipv6() == ipv6_first) {
        found.retain(|target| target.address.is_ipv6() == ipv6_first);
    }
    if found.iter().any(|target| !target.terminating) {
        found.retain(|target| !target.terminating);
    }
    found.sort();
    found.dedup();
    found
}
