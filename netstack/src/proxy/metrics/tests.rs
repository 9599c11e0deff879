//! Names and meanings, from kubernetes 1.37, pkg/proxy/metrics.

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, NodeFacts, ServiceKey};

use super::*;
use crate::kube::Cluster;
use crate::proxy::ProxyPlanner;
use crate::reconcile::Planner;

/// 2026-01-01T00:00:00Z.
const START: i64 = 1_767_225_600_000;

fn page(metrics: Arc<ProxyMetrics>, tally: Tally) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(KubeProxyNames { metrics, tally: Arc::new(tally) }));
    let mut text = String::new();
    text::encode(&mut text, &registry).unwrap();
    text
}

fn service(name: &str, ip: &str) -> Value {
    json!({
        "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIPs": [ip], "ports": [{"port": 80, "nodePort": 30080}, {"name": "b", "port": 81}],
                 "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "type": "NodePort"},
    })
}

fn slice(name: &str, node: &str, triggered: &str) -> Value {
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": name},
                     "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": triggered}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.244.2.5"], "nodeName": node}],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}, {"name": "b", "port": 8081, "protocol": "TCP"}],
    })
}

fn snapshot(generation: u64, objects: Vec<Value>) -> Arc<Snapshot> {
    let facts = NodeFacts {
        name: "node-a".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let config = ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        ..ClusterConfig::default()
    };
    let cluster = Cluster::from_documents(objects);
    Arc::new(cluster.snapshot(Generation(generation), Arc::new(config), Arc::new(facts)))
}

fn counts(metrics: &ProxyMetrics) -> [u64; 4] {
    let Changes { services, services_pending, endpoints, endpoints_pending } =
        *metrics.changes.lock().unwrap();
    [services, services_pending, endpoints, endpoints_pending]
}

#[test]
fn every_name_of_kube_proxy_that_has_a_meaning_here_is_told() {
    let (metrics, tally) = (Arc::new(ProxyMetrics::default()), Tally::default());
    metrics.healthz().count(true);
    metrics.livez().count(false);
    metrics.reconciled(Duration::from_millis(3), [2, 5]);
    metrics.committed(Duration::from_micros(9));
    tally.passes.observe(0.003);
    tally.failed.inc();
    let text = page(metrics, tally);
    for line in [
        "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\",ip_family=\"IPv4\"} 1",
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 0",
        "kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 0",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 0.0",
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv6\"} 0.0",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv4\"} 1",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 0",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
        "kubeproxy_sync_proxy_rules_service_changes_total 0",
        "kubeproxy_sync_proxy_rules_service_changes_pending 0",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
        "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\",ip_family=\"IPv4\"} 0",
        "kubeproxy_network_programming_duration_seconds_bucket{le=\"300.0\",ip_family=\"IPv6\"} 0",
        "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} 1",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 2",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 5",
        "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
        "kubeproxy_proxy_healthz_total{code=\"503\"} 0",
        "kubeproxy_proxy_livez_total{code=\"503\"} 1",
        "weft_proxy_commit_cpu_seconds_count 1",
    ] {
        assert!(text.lines().any(|said| said == line), "{line} is missing in\n{text}");
    }
}

#[test]
fn changes_are_pending_until_a_pass_has_programmed_their_snapshot() {
    let metrics = ProxyMetrics::default();
    let mut follower = Follower::new(&metrics, START);
    let old = "2025-12-31T23:59:59Z";
    follower.saw(snapshot(1, vec![service("a", "10.96.0.1"), slice("a", "node-b", old)]));
    assert_eq!(counts(&metrics), [1, 1, 1, 1]);
    follower.applied(Generation(0), START);
    assert_eq!(counts(&metrics), [1, 1, 1, 1], "a pass before it");
    follower.applied(Generation(1), START);
    assert_eq!(counts(&metrics), [1, 0, 1, 0]);
    let both = vec![service("a", "10.96.0.1"), slice("a", "node-a", old), service("b", "10.96.0.2")];
    follower.saw(snapshot(2, both.clone()));
    follower.saw(snapshot(2, both));
    assert_eq!(counts(&metrics), [2, 1, 2, 1], "one Service came, one slice changed");
}

/// The time is counted once, from the annotation to the pass, and never for what changed before this process began.
#[test]
fn programming_latency_runs_from_the_change_of_the_pod_to_its_rules() {
    let metrics = Arc::new(ProxyMetrics::default());
    let mut follower = Follower::new(&metrics, START);
    let before_start = slice("a", "node-b", "2025-12-31T23:59:59Z");
    follower.saw(snapshot(1, vec![before_start, slice("b", "node-b", "2026-01-01T00:00:01Z")]));
    follower.applied(Generation(1), START + 1400);
    follower.applied(Generation(1), START + 9000);
    let text = page(metrics.clone(), Tally::default());
    let name = "kubeproxy_network_programming_duration_seconds";
    assert!(text.contains(&format!("{name}_sum{{ip_family=\"IPv4\"}} 0.4\n")), "{text}");
    assert!(text.contains(&format!("{name}_count{{ip_family=\"IPv4\"}} 1\n")), "{text}");
    assert!(text.contains(&format!("{name}_bucket{{le=\"0.25\",ip_family=\"IPv4\"}} 0\n")), "{text}");
}

#[test]
fn ports_with_a_local_policy_and_endpoints_only_elsewhere_are_counted() {
    let plan = |node: &str| {
        let objects = vec![
            service("a", "10.96.0.1"),
            slice("a", node, ""),
            json!({"kind": "Node", "metadata": {"name": "node-a"},
                   "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}),
        ];
        ProxyPlanner::default().plan(&snapshot(1, objects)).plan
    };
    let elsewhere = WithoutLocal { internal: [2, 0], external: [1, 0] };
    assert_eq!(plan("node-b").without_local.get(&ServiceKey::new("default", "a")), Some(&elsewhere));
    assert!(plan("node-a").without_local.is_empty());
    let metrics = Arc::new(ProxyMetrics::default());
    metrics.programmed(&plan("node-b"));
    let text = page(metrics, Tally::default());
    let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
    assert!(
        text.contains(&format!("{name}{{ip_family=\"IPv4\",traffic_policy=\"internal\"}} 2\n")),
        "{text}"
    );
    assert!(
        text.contains(&format!("{name}{{ip_family=\"IPv4\",traffic_policy=\"external\"}} 1\n")),
        "{text}"
    );
}
