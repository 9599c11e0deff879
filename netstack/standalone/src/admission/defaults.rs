//! Defaults that a network needs, as the Kubernetes API reference states them per field. In and out: the object.

use serde_json::{Value, json};

use crate::object;
use crate::resources::Resource;

/// Fills in what was not said.
pub(crate) fn apply(resource: &Resource, object: &mut Value) {
    match resource.collection() {
        "services" => service(object),
        "pods" => pod(object),
        "endpointslices" => each(object, &["ports"], endpoint_port),
        "endpoints" => each(object, &["subsets"], |subset| each(subset, &["ports"], protocol)),
        "namespaces" => namespace(object),
        "nodes" => node(object),
        "networkpolicies" => network_policy(object),
        "secrets" => secret(object),
        _ => {}
    }
}

/// The status a new object starts with, whatever the client sent; Nodes register with theirs.
pub(crate) fn initial_status(resource: &Resource, object: &mut Value) {
    match resource.collection() {
        "services" | "ingresses" => object::set(object, &["status"], json!({"loadBalancer": {}})),
        "pods" => object::set(object, &["status"], json!({"phase": "Pending", "qosClass": "BestEffort"})),
        "namespaces" => object::set(object, &["status"], json!({"phase": "Active"})),
        _ => {}
    }
}

fn each(object: &mut Value, path: &[&str], change: impl Fn(&mut Value)) {
    let list = path.iter().try_fold(object, |value, key| value.get_mut(key)).and_then(Value::as_array_mut);
    list.into_iter().flatten().for_each(change);
}

fn protocol(port: &mut Value) {
    object::default(port, &["protocol"], json!("TCP"));
}

fn endpoint_port(port: &mut Value) {
    protocol(port);
    object::default(port, &["name"], json!(""));
}

fn service(object: &mut Value) {
    object::default(object, &["spec", "type"], json!("ClusterIP"));
    object::default(object, &["spec", "sessionAffinity"], json!("None"));
    let kind = object::text(object, &["spec", "type"]).to_owned();
    if object::text(object, &["spec", "sessionAffinity"]) == "ClientIP" {
        let timeout = ["spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds"];
        object::default(object, &timeout, json!(10_800));
    }
    each(object, &["spec", "ports"], |port| {
        protocol(port);
        if let Some(number) = port.get("port").cloned() {
            object::default(port, &["targetPort"], number);
        }
    });
    each(object, &["status", "loadBalancer", "ingress"], |ingress| {
        if !object::text(ingress, &["ip"]).is_empty() {
            object::default(ingress, &["ipMode"], json!("VIP"));
        }
    });
    if kind != "ExternalName" {
        object::default(object, &["spec", "internalTrafficPolicy"], json!("Cluster"));
    }
    if kind == "NodePort" || kind == "LoadBalancer" {
        object::default(object, &["spec", "externalTrafficPolicy"], json!("Cluster"));
    }
    if kind == "LoadBalancer" {
        object::default(object, &["spec", "allocateLoadBalancerNodePorts"], json!(true));
    }
}

fn pod(object: &mut Value) {
    let spec = [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("schedulerName", json!("default-scheduler")),
        ("serviceAccountName", json!("default")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("enableServiceLinks", json!(true)),
        ("securityContext", json!({})),
    ];
    for (field, value) in spec {
        object::default(object, &["spec", field], value);
    }
    for list in ["containers", "initContainers"] {
        each(object, &["spec", list], |container| {
            object::default(container, &["terminationMessagePath"], json!("/dev/termination-log"));
            object::default(container, &["terminationMessagePolicy"], json!("File"));
            object::default(container, &["imagePullPolicy"], json!("IfNotPresent"));
            object::default(container, &["resources"], json!({}));
            each(container, &["ports"], protocol);
        });
    }
}

/// The name label that namespace selectors rely on (well-known labels: `kubernetes.io/metadata.name`).
fn namespace(object: &mut Value) {
    let name = object::name(object).to_owned();
    object::set(object, &["metadata", "labels", "kubernetes.io/metadata.name"], json!(name));
    if object::at(object, &["metadata", "deletionTimestamp"]).is_none() {
        object::default(object, &["spec", "finalizers"], json!(["kubernetes"]));
    }
}

/// `podCIDR` and the first of `podCIDRs` say the same.
fn node(object: &mut Value) {
    if let Some(first) = object::list(object, &["spec", "podCIDRs"]).first().cloned() {
        object::default(object, &["spec", "podCIDR"], first);
    } else if let Some(one) = object::at(object, &["spec", "podCIDR"]).cloned() {
        object::set(object, &["spec", "podCIDRs"], json!([one]));
    }
}

fn network_policy(object: &mut Value) {
    let types = if object::list(object, &["spec", "egress"]).is_empty() {
        json!(["Ingress"])
    } else {
        json!(["Ingress", "Egress"])
    };
    object::default(object, &["spec", "policyTypes"], types);
    object::default(object, &["spec", "podSelector"], json!({}));
    for direction in ["ingress", "egress"] {
        each(object, &["spec", direction], |rule| each(rule, &["ports"], protocol));
    }
}

fn secret(object: &mut Value) {
    object::default(object, &["type"], json!("Opaque"));
    let plain = object::text_map(object, &["stringData"]);
    for (key, text) in plain {
        let encoded = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, text);
        object::set(object, &["data", &key], json!(encoded));
    }
    object::remove(object, &["stringData"]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::find;

    #[test]
    fn a_service_gets_the_defaults_of_its_type() {
        let services = find("", "v1", "services").unwrap();
        let mut service = json!({"spec": {"type": "NodePort", "ports": [{"port": 80}]}});
        apply(services, &mut service);
        assert_eq!(service["spec"]["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
        assert_eq!(service["spec"]["externalTrafficPolicy"], "Cluster");
        assert_eq!(service["spec"]["internalTrafficPolicy"], "Cluster");
        let mut external = json!({"spec": {"type": "ExternalName", "externalName": "example.org"}});
        apply(services, &mut external);
        assert!(external["spec"].get("internalTrafficPolicy").is_none());
    }

    #[test]
    fn secrets_store_plain_text_encoded() {
        let secrets = find("", "v1", "secrets").unwrap();
        let mut secret = json!({"stringData": {"a": "b"}});
        apply(secrets, &mut secret);
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "Yg=="}}));
    }
}
