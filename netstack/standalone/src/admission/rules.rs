//! What an update keeps and what it may not change. Pure. In: the stored object and the one sent. Out: fields carried
//! over in place, causes for forbidden changes.

use serde_json::{Value, json};

use crate::object;
use crate::resources::Resource;
use crate::status::Cause;

/// Values the server once allocated and the client left out are taken from the stored object.
pub(super) fn carry_over(resource: &Resource, stored: &Value, sent: &mut Value) {
    if resource.collection() == "services" {
        carry_over_addresses(stored, sent);
        carry_over_node_ports(stored, sent);
    }
}

fn is_external(service: &Value) -> bool {
    object::text(service, &["spec", "type"]) == "ExternalName"
}

fn carry_over_addresses(stored: &Value, sent: &mut Value) {
    if is_external(stored) || is_external(sent) {
        return;
    }
    let old = object::texts(stored, &["spec", "clusterIPs"]);
    let one = object::text(sent, &["spec", "clusterIP"]).to_owned();
    let all = object::texts(sent, &["spec", "clusterIPs"]);
    let same_primary = one.is_empty() || old.first() == Some(&one);
    if all.is_empty() && same_primary && !old.is_empty() {
        object::set(sent, &["spec", "clusterIP"], json!(old[0]));
        object::set(sent, &["spec", "clusterIPs"], json!(old));
    } else if one.is_empty() && !all.is_empty() {
        object::set(sent, &["spec", "clusterIP"], json!(all[0]));
    }
    for field in ["ipFamilies", "ipFamilyPolicy"] {
        if let Some(value) = object::at(stored, &["spec", field]) {
            object::default(sent, &["spec", field], value.clone());
        }
    }
}

fn carry_over_node_ports(stored: &Value, sent: &mut Value) {
    let has_ports = |it: &Value| matches!(object::text(it, &["spec", "type"]), "NodePort" | "LoadBalancer");
    if !has_ports(stored) || !has_ports(sent) {
        return;
    }
    if let Some(port) = object::at(stored, &["spec", "healthCheckNodePort"]) {
        object::default(sent, &["spec", "healthCheckNodePort"], port.clone());
    }
    let allocates = object::at(sent, &["spec", "allocateLoadBalancerNodePorts"]) != Some(&json!(false));
    let old = object::list(stored, &["spec", "ports"]);
    let ports = sent.pointer_mut("/spec/ports").and_then(Value::as_array_mut);
    for port in ports.into_iter().flatten().filter(|_| allocates) {
        let twin = old.iter().find(|it| it["port"] == port["port"] && it["protocol"] == port["protocol"]);
        if let Some(number) = twin.and_then(|it| object::at(it, &["nodePort"])) {
            object::default(port, &["nodePort"], number.clone());
        }
    }
}

/// Changes of what may not change; empty for a lawful update.
pub(super) fn immutable(resource: &Resource, stored: &Value, sent: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    match resource.collection() {
        "services" => service(stored, sent, &mut causes),
        "secrets" => {
            fixed(stored, sent, &["type"], &mut causes);
            frozen(stored, sent, &mut causes);
        }
        "configmaps" => frozen(stored, sent, &mut causes),
        "endpointslices" => fixed(stored, sent, &["addressType"], &mut causes),
        "nodes" => {
            once(stored, sent, &["spec", "podCIDR"], &mut causes);
            once(stored, sent, &["spec", "podCIDRs"], &mut causes);
        }
        "pods" => pod(stored, sent, &mut causes),
        _ => {}
    }
    causes
}

fn change_refused(path: &[&str], message: &str) -> Cause {
    Cause { reason: "FieldValueInvalid", message: message.to_owned(), field: path.join(".") }
}

fn fixed(stored: &Value, sent: &Value, path: &[&str], causes: &mut Vec<Cause>) {
    if object::at(stored, path) != object::at(sent, path) {
        causes.push(change_refused(path, "field is immutable"));
    }
}

fn once(stored: &Value, sent: &Value, path: &[&str], causes: &mut Vec<Cause>) {
    if object::at(stored, path).is_some() {
        fixed(stored, sent, path, causes);
    }
}

fn frozen(stored: &Value, sent: &Value, causes: &mut Vec<Cause>) {
    if object::at(stored, &["immutable"]) == Some(&json!(true)) {
        for path in [["data"], ["binaryData"], ["immutable"]] {
            if object::at(stored, &path) != object::at(sent, &path) {
                causes.push(change_refused(&path, "field is immutable when `immutable` is set"));
            }
        }
    }
}

fn service(stored: &Value, sent: &Value, causes: &mut Vec<Cause>) {
    if is_external(stored) || is_external(sent) {
        return;
    }
    let (old, new) =
        (object::texts(stored, &["spec", "clusterIPs"]), object::texts(sent, &["spec", "clusterIPs"]));
    let new_primary =
        new.first().cloned().unwrap_or_else(|| object::text(sent, &["spec", "clusterIP"]).to_owned());
    if old.first().is_some_and(|it| *it != new_primary) {
        causes.push(change_refused(&["spec", "clusterIPs[0]"], "may not change once set"));
    }
    once(stored, sent, &["spec", "healthCheckNodePort"], causes);
    // Leaving the type that has the port is lawful: allocation drops it.
    let keeps = object::text(sent, &["spec", "externalTrafficPolicy"]) == "Local"
        && object::text(sent, &["spec", "type"]) == "LoadBalancer";
    if !keeps {
        causes.retain(|it| it.field != "spec.healthCheckNodePort");
    }
}

/// A pod's spec is fixed but for images, the deadline, tolerations and (there is no scheduler here) its first node.
fn pod(stored: &Value, sent: &Value, causes: &mut Vec<Cause>) {
    let comparable = |pod: &Value| {
        let mut spec = pod.get("spec").cloned().unwrap_or_default();
        for field in ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds"] {
            object::remove(&mut spec, &[field]);
        }
        if object::text(stored, &["spec", "nodeName"]).is_empty() {
            object::remove(&mut spec, &["nodeName"]);
        }
        for list in ["containers", "initContainers"] {
            let containers = spec.get_mut(list).and_then(Value::as_array_mut);
            containers.into_iter().flatten().for_each(|it| {
                object::remove(it, &["image"]);
            });
        }
        spec
    };
    if comparable(stored) != comparable(sent) {
        let message = "pod updates may not change fields other than `spec.containers[*].image`, \
            `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations`, \
            `spec.terminationGracePeriodSeconds` and `spec.nodeName` while it is empty";
        causes.push(Cause {
            reason: "FieldValueForbidden",
            message: message.to_owned(),
            field: "spec".to_owned(),
        });
    }
}
