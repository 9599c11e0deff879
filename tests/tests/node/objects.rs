//! Objects that several tests put into the cluster.

use serde_json::{Value, json};
use weft_tests::node::Api;

pub(crate) const SERVICES: &str = "/api/v1/namespaces/default/services";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
pub(crate) const NODES: &str = "/api/v1/nodes";

/// A dual-stack Service on port 80 with these endpoints on port 8080, IPv4 first. Returns its ClusterIPs.
pub(crate) fn make_service(api: &Api, name: &str, endpoints: &[&str; 2]) -> Vec<String> {
    let ports = json!([{"port": 80, "targetPort": 8080}]);
    let spec = json!({"ipFamilyPolicy": "RequireDualStack", "ports": ports});
    let service = api.create(SERVICES, &json!({"metadata": {"name": name}, "spec": spec}));
    for (family, address) in ["IPv4", "IPv6"].into_iter().zip(endpoints) {
        api.create(SLICES, &slice(name, family, address));
    }
    let ips = service["spec"]["clusterIPs"].as_array().expect("clusterIPs were allocated");
    ips.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// One ready endpoint of a Service.
pub(crate) fn slice(service: &str, family: &str, address: &str) -> Value {
    json!({
        "metadata": {
            "name": format!("{service}-{}", family.to_lowercase()),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"port": 8080, "protocol": "TCP"}],
    })
}

/// Another node, as its own agent would announce it.
pub(crate) fn make_peer(api: &Api, name: &str) {
    let annotations = json!({
        "weft.network/public-key": "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
        "weft.network/wireguard-port": "51820",
    });
    api.create(NODES, &json!({"metadata": {"name": name, "annotations": annotations}}));
    let addresses = json!([
        {"type": "InternalIP", "address": "172.31.0.2"},
        {"type": "InternalIP", "address": "fd00:31::2"},
    ]);
    api.merge_status(NODES, name, &json!({"status": {"addresses": addresses}}));
}

pub(crate) fn make_unready(api: &Api, node: &str) {
    let conditions = json!([{"type": "Ready", "status": "Unknown"}]);
    api.merge_status(NODES, node, &json!({"status": {"conditions": conditions}}));
}
