//! From Nodes to EndpointSlices, and from the Service's addresses to the statuses of Ingresses. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use weft_model::constants::{INGRESS_HTTP_PORT, INGRESS_HTTPS_PORT, INGRESS_SERVICE};
use weft_model::ingress::is_ours;
use weft_model::objects::{Endpoint, EndpointPort, EndpointSlice, Protocol, ingress_address};
use weft_model::{NamespacedName, NodeName, Planned, Snapshot};

use crate::kube::{Kind, Slices, Statuses, Target};
use crate::reconcile::Planner;

/// `metadata.labels["endpointslice.kubernetes.io/managed-by"]`: no controller of Kubernetes takes these slices for its own.
const MANAGED_BY: &str = "weft.network";
/// Endpoints in one slice at most (discovery/v1 validation).
const SLICE_ENDPOINTS: usize = 1000;

pub fn service_key() -> NamespacedName {
    NamespacedName::new(INGRESS_SERVICE.0, INGRESS_SERVICE.1)
}

/// Plans the endpoints of the Service.
#[derive(Debug, Default)]
pub struct SlicesPlanner;

impl Planner for SlicesPlanner {
    type Plan = Slices;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    /// None where the Service is not there; no change before the API server has been seen.
    fn plan(&mut self, snapshot: &Snapshot) -> Planned<Slices> {
        let service = service_key();
        if snapshot.from_store || !snapshot.config.ingress.on {
            return Planned::new(Slices::new(), Vec::new());
        }
        let there = snapshot.services.contains_key(&service);
        let wanted = if there { wanted(snapshot) } else { BTreeMap::new() };
        let mut due = Slices::new();
        for (key, slice) in &wanted {
            let known = snapshot.endpoint_slices.get(key);
            if known.is_none_or(|known| !same(known, slice)) {
                due.insert(key.clone(), Some(document(slice)));
            }
        }
        let ours = |key: &NamespacedName| {
            key.namespace == service.namespace && key.name.starts_with(INGRESS_SERVICE.1)
        };
        let of_service = snapshot.slices_of(&service);
        for slice in of_service.filter(|slice| ours(&slice.key) && !wanted.contains_key(&slice.key)) {
            due.insert(slice.key.clone(), None);
        }
        Planned::new(due, Vec::new())
    }
}

fn wanted(snapshot: &Snapshot) -> BTreeMap<NamespacedName, EndpointSlice> {
    let mut families: BTreeMap<bool, Vec<Endpoint>> = BTreeMap::new();
    for node in snapshot.nodes.values() {
        for address in node.pod_cidrs.iter().filter_map(ingress_address) {
            // A node that has never been part of the overlay serves nothing yet.
            let ready = !node.leaving && node.public_key.is_some();
            families.entry(address.is_ipv6()).or_default().push(endpoint(address, &node.name, ready));
        }
    }
    let mut slices = BTreeMap::new();
    for (ipv6, endpoints) in families {
        let family = if ipv6 { "ipv6" } else { "ipv4" };
        for (i, part) in endpoints.chunks(SLICE_ENDPOINTS).enumerate() {
            let key = NamespacedName::new(INGRESS_SERVICE.0, format!("{}-{family}-{i}", INGRESS_SERVICE.1));
            let slice = EndpointSlice {
                key: key.clone(),
                service: service_key(),
                ipv6,
                ports: [("http", INGRESS_HTTP_PORT), ("https", INGRESS_HTTPS_PORT)]
                    .map(|(name, port)| EndpointPort { name: name.to_owned(), protocol: Protocol::Tcp, port })
                    .to_vec(),
                endpoints: part.to_vec(),
                triggered_millis: None,
            };
            slices.insert(key, slice);
        }
    }
    slices
}

fn endpoint(address: IpAddr, node: &NodeName, ready: bool) -> Endpoint {
    Endpoint {
        address,
        ready,
        serving: ready,
        terminating: false,
        hostname: None,
        node: Some(node.clone()),
        hints: None,
        target_pod: None,
    }
}

/// What was written, and nothing else, decides: the server may add fields.
fn same(known: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    let essence = |slice: &EndpointSlice| {
        let mut ports = slice.ports.clone();
        ports.sort_by(|a, b| a.name.cmp(&b.name));
        let endpoints: Vec<_> =
            slice.endpoints.iter().map(|it| (it.address, it.ready, it.node.clone())).collect();
        (slice.service.clone(), slice.ipv6, ports, endpoints)
    };
    essence(known) == essence(wanted)
}

fn document(slice: &EndpointSlice) -> Value {
    let ports: Vec<Value> = slice
        .ports
        .iter()
        .map(|port| json!({"name": port.name, "port": port.port, "protocol": "TCP"}))
        .collect();
    let endpoints: Vec<Value> = slice
        .endpoints
        .iter()
        .map(|endpoint| {
            json!({
                "addresses": [endpoint.address.to_string()],
                "conditions": {"ready": endpoint.ready, "serving": endpoint.ready, "terminating": false},
                "nodeName": endpoint.node.as_ref().map(|node| node.0.clone()),
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": slice.key.name,
            "namespace": slice.key.namespace,
            "labels": {
                "kubernetes.io/service-name": INGRESS_SERVICE.1,
                "endpointslice.kubernetes.io/managed-by": MANAGED_BY,
            },
        },
        "addressType": if slice.ipv6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    })
}

/// Plans what Ingresses of ours say about their addresses.
#[derive(Debug)]
pub struct IngressStatusPlanner {
    /// `--ingress-status`: off while another controller writes them still.
    pub on: bool,
}

impl Planner for IngressStatusPlanner {
    type Plan = Statuses;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    /// Nothing while the Service has no address: what an Ingress says then may be another controller's.
    fn plan(&mut self, snapshot: &Snapshot) -> Planned<Statuses> {
        let mut statuses = Statuses::new();
        let service = snapshot.services.get(&service_key());
        let addresses: Vec<String> =
            service.iter().flat_map(|service| &service.load_balancer_ips).map(ToString::to_string).collect();
        if !self.on || snapshot.from_store || addresses.is_empty() {
            return Planned::new(statuses, Vec::new());
        }
        let (classes, config) = (&snapshot.ingress_classes, &snapshot.config.ingress);
        for ingress in snapshot.ingresses.values() {
            if is_ours(ingress, classes, config) && ingress.status != addresses {
                let list: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
                let target = Target { kind: Kind::Ingress, key: ingress.key.clone() };
                statuses.insert(target, json!({"loadBalancer": {"ingress": list}}));
            }
        }
        Planned::new(statuses, Vec::new())
    }
}

#[cfg(test)]
mod tests;
