//! Clusters in code for the DNS tests, and the way from a Snapshot to an answer.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::rr::RecordType;
use weft_dns::{Answer, DnsPlan, DnsPlanner, Groups, Local, Name, Question, Store};
use weft_model::node_facts::WireguardBackend;
use weft_model::objects::{
    ConfigMap, Endpoint, EndpointPort, EndpointSlice, Namespace, Protocol, Service, ServiceKind, ServicePort,
    TrafficPolicy,
};
use weft_model::{ClusterConfig, Generation, NamespacedName, NodeFacts, Planned, Snapshot};
use weft_netstack::reconcile::Planner as _;

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn config() -> ClusterConfig {
    ClusterConfig {
        cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap(), "fd00:42::/48".parse().unwrap()],
        service_cidrs: vec!["10.43.0.0/16".parse().unwrap(), "fd00:43::/112".parse().unwrap()],
        cluster_dns: vec![ip("10.43.0.10"), ip("fd00:43::a")],
        ..ClusterConfig::default()
    }
}

pub(crate) fn service(namespace: &str, name: &str, kind: ServiceKind) -> Service {
    Service {
        key: NamespacedName::new(namespace, name),
        uid: format!("uid-{namespace}-{name}"),
        created: 0,
        labels: BTreeMap::new(),
        kind,
        ports: Vec::new(),
        publish_not_ready_addresses: false,
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        session_affinity_seconds: None,
        load_balancer_ips: Vec::new(),
        external_ips: Vec::new(),
        load_balancer_source_ranges: None,
        health_check_node_port: None,
        balancer: None,
    }
}

pub(crate) fn cluster_ips(addresses: &[&str]) -> ServiceKind {
    ServiceKind::ClusterIps(addresses.iter().map(|address| ip(address)).collect())
}

pub(crate) fn port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort { name: name.to_owned(), protocol, port, node_port: None }
}

pub(crate) fn endpoint(address: &str, hostname: Option<&str>, ready: bool) -> Endpoint {
    Endpoint {
        address: ip(address),
        ready,
        serving: ready,
        terminating: false,
        hostname: hostname.map(Into::into),
        node: None,
        hints: None,
        target_pod: None,
    }
}

pub(crate) fn slice(
    namespace: &str,
    service: &str,
    name: &str,
    ports: &[(&str, Protocol, u16)],
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    EndpointSlice {
        key: NamespacedName::new(namespace, name),
        service: NamespacedName::new(namespace, service),
        ipv6: endpoints.first().is_some_and(|endpoint| endpoint.address.is_ipv6()),
        ports: ports
            .iter()
            .map(|(name, protocol, port)| EndpointPort {
                name: (*name).to_owned(),
                protocol: *protocol,
                port: *port,
            })
            .collect(),
        endpoints,
        triggered_millis: None,
    }
}

pub(crate) fn snapshot(
    namespaces: &[&str],
    services: impl IntoIterator<Item = Service>,
    slices: impl IntoIterator<Item = EndpointSlice>,
) -> Snapshot {
    let namespace = |name: &&str| {
        ((*name).to_owned(), Arc::new(Namespace { name: (*name).to_owned(), labels: BTreeMap::new() }))
    };
    Snapshot {
        generation: Generation(1),
        config: Arc::new(config()),
        facts: Arc::new(NodeFacts {
            name: "n1".into(),
            uplinks: Vec::new(),
            wireguard_backend: WireguardBackend::Userspace,
            foreign_routes: vec![],
            loopback: Default::default(),
            observed: Default::default(),
        }),
        nodes: Arc::default(),
        config_maps: Default::default(),
        namespaces: Arc::new(namespaces.iter().map(namespace).collect()),
        services: Arc::new(services.into_iter().map(|s| (s.key.clone(), Arc::new(s))).collect()),
        endpoint_slices: Arc::new(slices.into_iter().map(|s| (s.key.clone(), Arc::new(s))).collect()),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }
}

/// The cluster with that ConfigMap `coredns-custom`.
pub(crate) fn with_custom(cluster: &Snapshot, data: &[(&str, &str)]) -> Snapshot {
    let key = NamespacedName::new("kube-system", "coredns-custom");
    let data = data.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect();
    let config_map = ConfigMap { key: key.clone(), data };
    Snapshot { config_maps: Arc::new([(key, Arc::new(config_map))].into()), ..cluster.clone() }
}

/// A small cluster with every kind of Service.
pub(crate) fn zoo() -> Snapshot {
    let http = [("http", Protocol::Tcp, 8080), ("", Protocol::Udp, 9)];
    let mut web = service("default", "web", cluster_ips(&["10.43.0.80", "fd00:43::80"]));
    web.ports =
        vec![port("http", Protocol::Tcp, 80), port("dns-udp", Protocol::Udp, 53), port("", Protocol::Tcp, 1)];
    let v4_only = service("default", "v4only", cluster_ips(&["10.43.0.4"]));
    let db = service("default", "db", ServiceKind::Headless);
    let mut peers = service("default", "peers", ServiceKind::Headless);
    peers.publish_not_ready_addresses = true;
    let idle = service("default", "idle", ServiceKind::Headless);
    let external =
        |name: &str, target: &str| service("default", name, ServiceKind::ExternalName(target.to_owned()));
    let slices = [
        slice(
            "default",
            "db",
            "db-4",
            &http,
            vec![
                endpoint("10.42.1.5", Some("db-0"), true),
                endpoint("10.42.2.6", None, true),
                endpoint("10.42.2.7", Some("db-9"), false),
            ],
        ),
        slice(
            "default",
            "db",
            "db-6",
            &http,
            vec![endpoint("fd00:42::5", Some("db-0"), true), endpoint("fd00:42::6", None, true)],
        ),
        slice("default", "peers", "peers-4", &http, vec![endpoint("10.42.3.1", Some("peers-0"), false)]),
        slice("default", "idle", "idle-4", &http, vec![endpoint("10.42.3.9", Some("idle-0"), false)]),
        // Endpoints of a ClusterIP Service have no names.
        slice("default", "web", "web-4", &http, vec![endpoint("10.42.1.8", None, true)]),
    ];
    snapshot(
        &["default", "kube-system", "empty"],
        [
            web,
            v4_only,
            db,
            peers,
            idle,
            external("outside", "www.example.com"),
            external("alias", "web.default.svc.cluster.local"),
            external("alias2", "alias.default.svc.cluster.local."),
            external("dangling", "nothing.default.svc.cluster.local"),
            external("circle", "circle.default.svc.cluster.local"),
        ],
        slices,
    )
}

pub(crate) fn plan(snapshot: &Snapshot) -> Planned<DnsPlan> {
    DnsPlanner::default().plan(snapshot)
}

/// A store that was given nothing but this Snapshot's plan.
pub(crate) fn store(snapshot: &Snapshot) -> Store {
    let store = Store::default();
    store.write(&Groups::new(), &plan(snapshot).plan);
    store
}

pub(crate) fn ask(store: &Store, name: &str, record_type: RecordType) -> Answer {
    store.answer(&Question { name: Name::parse(name).unwrap(), record_type }, 0)
}

pub(crate) fn local(store: &Store, name: &str, record_type: RecordType) -> Local {
    match ask(store, name, record_type) {
        Answer::Local(local) => local,
        other => panic!("{name} {record_type}: {other:?}"),
    }
}

/// The answer section as text, one record a string, sorted.
pub(crate) fn records(store: &Store, name: &str, record_type: RecordType) -> Vec<String> {
    let mut records: Vec<String> =
        local(store, name, record_type).records.iter().map(|(name, data)| format!("{name} {data}")).collect();
    records.sort();
    records
}

#[track_caller]
pub(crate) fn assert_no_data(store: &Store, name: &str, record_type: RecordType) {
    let answer = local(store, name, record_type);
    assert!(!answer.name_error && answer.records.is_empty(), "{name} {record_type}: {answer:?}");
    assert!(answer.soa.is_some(), "{name} {record_type}: a negative answer carries the SOA");
}

#[track_caller]
pub(crate) fn assert_no_name(store: &Store, name: &str) {
    for record_type in [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::PTR] {
        let answer = local(store, name, record_type);
        assert!(answer.name_error && answer.records.is_empty(), "{name} {record_type}: {answer:?}");
        assert!(answer.soa.is_some(), "{name} {record_type}: a negative answer carries the SOA");
    }
}
