//! Every node's ingress address is an endpoint, and Ingresses of ours say where the Service is.

use std::sync::Arc;

use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, Generation, IngressConfig, NodeFacts};

use super::*;
use crate::kube::Cluster;

fn snapshot(documents: &[Value]) -> Snapshot {
    let config = ClusterConfig {
        ingress: IngressConfig { on: true, classes: ["weft".to_owned()].into(), ..IngressConfig::default() },
        ..ClusterConfig::default()
    };
    let facts = NodeFacts {
        name: "node-a".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let cluster = Cluster::from_documents(documents.to_vec());
    cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts))
}

fn node(name: &str, number: u8, key: bool) -> Value {
    let annotations = match key {
        true => json!({"weft.network/public-key": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="}),
        false => json!({}),
    };
    json!({"kind": "Node", "metadata": {"name": name, "annotations": annotations},
        "spec": {"podCIDRs": [format!("10.244.{number}.0/24"), format!("fd00:244:0:{number}::/64")]}})
}

fn service(addresses: &[&str]) -> Value {
    let ingress: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"kind": "Service", "metadata": {"name": INGRESS_SERVICE.1, "namespace": INGRESS_SERVICE.0},
        "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.9", "externalTrafficPolicy": "Local",
            "ports": [{"name": "http", "port": 80}, {"name": "https", "port": 443}]},
        "status": {"loadBalancer": {"ingress": ingress}}})
}

fn ingress(name: &str, class: &str, shown: &[&str]) -> Value {
    let shown: Vec<Value> = shown.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"kind": "Ingress", "metadata": {"name": name, "namespace": "default"},
        "spec": {"ingressClassName": class, "defaultBackend": {"service": {"name": "web", "port": {"number": 80}}}},
        "status": {"loadBalancer": {"ingress": shown}}})
}

fn slices(documents: &[Value]) -> Slices {
    SlicesPlanner.plan(&snapshot(documents)).plan
}

#[test]
fn every_node_s_ingress_address_is_an_endpoint_of_the_service_in_its_family() {
    let documents = [node("node-a", 1, true), node("node-b", 2, false), service(&[])];
    let planned = slices(&documents);
    let names: Vec<String> = planned.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["weft-system/weft-ingress-ipv4-0", "weft-system/weft-ingress-ipv6-0"]);
    let v4 = planned.values().next().unwrap().as_ref().unwrap();
    assert_eq!(v4["ports"][0], json!({"name": "http", "port": 8080, "protocol": "TCP"}));
    assert_eq!(v4["endpoints"][0]["addresses"], json!(["10.244.1.2"]));
    assert_eq!(v4["endpoints"][0]["nodeName"], "node-a");
    assert_eq!(v4["endpoints"][0]["conditions"]["ready"], true);
    assert_eq!(v4["endpoints"][1]["conditions"]["ready"], false, "node-b is not part of the overlay yet");
    let written: Vec<Value> = planned.into_values().flatten().collect();
    assert!(slices(&[&documents[..], &written].concat()).is_empty(), "what is written is not written again");
}

#[test]
fn without_the_service_there_is_nothing_to_write_and_a_superfluous_slice_goes() {
    assert!(slices(&[node("node-a", 1, true)]).is_empty());
    let written: Vec<Value> =
        slices(&[node("node-a", 1, true), service(&[])]).into_values().flatten().collect();
    let left = slices(&[&[service(&[])], &written[..]].concat());
    assert!(left.len() == 2 && left.values().all(Option::is_none), "no node, no slice");
    let left = slices(&[&[node("node-a", 1, true)], &written[..]].concat());
    assert!(left.len() == 2 && left.values().all(Option::is_none), "no Service, no slice");
}

#[test]
fn ingresses_of_ours_say_the_addresses_of_the_service() {
    let plan = |on, documents: &[Value]| IngressStatusPlanner { on }.plan(&snapshot(documents)).plan;
    let documents = [
        service(&["192.0.2.1", "2001:db8::1"]),
        ingress("ours", "weft", &["198.51.100.1"]),
        ingress("theirs", "other", &[]),
        ingress("said", "weft", &["192.0.2.1", "2001:db8::1"]),
    ];
    let statuses = plan(true, &documents);
    let written: Vec<(String, Value)> =
        statuses.into_iter().map(|(target, status)| (target.to_string(), status)).collect();
    assert_eq!(
        written,
        [(
            "status of Ingress default/ours".to_owned(),
            json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}]}})
        )]
    );
    assert!(plan(false, &documents).is_empty(), "--ingress-status off");
    assert!(
        plan(true, &[service(&[]), ingress("ours", "weft", &["198.51.100.1"])]).is_empty(),
        "no address yet"
    );
}
