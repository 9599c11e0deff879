//! The routes of a measurement: Ingresses as users write them and what Weft's planner makes of them, and the same for the peers.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use weft_ingress::plan::IngressPlanner;
use weft_ingress::plan::table::{Certificate, RouteTable};
use weft_model::ingress::{Bytes, IngressConfig};
use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, Generation, NamespacedName, NodeFacts};
use weft_netstack::kube::Cluster;
use weft_netstack::reconcile::Planner as _;

use super::backend::PORT;

/// Where the proxies listen and where the backend answers, IPv4 first (RFC 5737, RFC 3849).
pub(super) const PROXY: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub(super) const BACKEND: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
/// The host whose backend is asked over IPv6; the others' is over IPv4.
pub(super) const SIX: &str = "six.bench";

/// Hosts `h0.bench` and so on with paths `/p0` and so on, each with a route of its own.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) hosts: usize,
    pub(super) paths: usize,
}

impl Shape {
    pub(super) fn routes(self) -> usize {
        self.hosts * self.paths
    }

    /// Of each host its paths.
    pub(super) fn hosts(self) -> impl Iterator<Item = (String, Vec<String>)> {
        let paths: Vec<String> = (0..self.paths).map(|n| format!("/p{n}")).collect();
        let six = (SIX.to_owned(), vec!["/p0".to_owned()]);
        (0..self.hosts).map(move |n| (host(n), paths.clone())).chain([six])
    }

    pub(super) fn last(self) -> (String, String) {
        (host(self.hosts - 1), format!("/p{}", self.paths - 1))
    }
}

pub(super) fn host(number: usize) -> String {
    format!("h{number}.bench")
}

/// As the agent hands it over.
pub(super) fn routes(shape: Shape, certificate: &Path, key: &Path) -> anyhow::Result<RouteTable> {
    let mut documents = vec![service("web", "10.96.0.9"), service("six", "fd00:10:96::9")];
    documents.extend([slice("web", "IPv4", BACKEND[0]), slice("six", "IPv6", BACKEND[1])]);
    documents.extend(shape.hosts().map(|(host, paths)| {
        let mut ingress = ingress(&host, &paths, if host == SIX { "six" } else { "web" });
        ingress["kind"] = "Ingress".into();
        ingress["metadata"]["namespace"] = "default".into();
        ingress["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        ingress
    }));
    let config = ClusterConfig {
        ingress: IngressConfig {
            on: true,
            classes: BTreeSet::from(["weft".to_owned()]),
            ..IngressConfig::default()
        },
        ..ClusterConfig::default()
    };
    let facts = NodeFacts {
        name: "bench".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let snapshot =
        Cluster::from_documents(documents).snapshot(Generation(1), Arc::new(config), Arc::new(facts));
    let planned = IngressPlanner::default().plan(&snapshot);
    let mut table = planned.plan;
    let known: usize = table.hosts.values().map(|server| server.routes.len()).sum();
    anyhow::ensure!(known == shape.routes() + 1, "{known} routes, {:?}", planned.problems);
    table.addresses = PROXY.iter().map(|address| address.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
    let certificate = Certificate {
        secret: NamespacedName::new("default", "bench"),
        chain_pem: Bytes(std::fs::read(certificate)?),
        key_pem: Bytes(std::fs::read(key)?),
    };
    table.default_certificate = Some(certificate.into());
    Ok(table)
}

/// An Ingress named like its host, without what the API adds.
pub(super) fn ingress(host: &str, paths: &[String], service: &str) -> Value {
    let backend = json!({"service": {"name": service, "port": {"number": 80}}});
    let paths: Vec<Value> =
        paths.iter().map(|path| json!({"path": path, "pathType": "Prefix", "backend": backend})).collect();
    let spec = json!({"ingressClassName": "weft", "rules": [{"host": host, "http": {"paths": paths}}]});
    json!({"metadata": {"name": host}, "spec": spec})
}

fn service(name: &str, cluster_ip: &str) -> Value {
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": cluster_ip, "ports": [{"port": 80}]}})
}

pub(super) fn slice(service: &str, family: &str, address: &str) -> Value {
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": service, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"port": PORT}],
    })
}
