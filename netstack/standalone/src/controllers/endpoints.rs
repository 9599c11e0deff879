//! Endpoints of Services: from the pods a selector fits, or mirrored from an Endpoints object made by hand. Pure.
//! In: the view. Out: changes of EndpointSlices. Rules: KEP-752 (EndpointSlice), KEP-1672 (terminating endpoints).

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use super::selects;
use super::slices::{self, MANAGED_BY_LABEL, SERVICE_NAME_LABEL, Wanted};
use crate::admission::Ambient;
use crate::object;
use crate::status::ApiError;
use crate::store::{Change, Key, Stored, View};

const FROM_PODS: &str = "endpointslice-controller.k8s.io";
const MIRRORED: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_MIRROR_LABEL: &str = "endpointslice.kubernetes.io/skip-mirror";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The slices of one Service.
pub(super) fn plan(
    view: &View,
    namespace: &str,
    name: &str,
    ambient: &Ambient,
) -> Result<Vec<Change>, ApiError> {
    let service = view.get(&Key::new("services", namespace, name)).map(|it| it.value());
    let mut changes = Vec::new();
    for (manager, wanted) in [
        (FROM_PODS, service.as_ref().and_then(|it| from_pods(view, it))),
        (MIRRORED, service.as_ref().and_then(|it| mirrored(view, it))),
    ] {
        let existing = managed_slices(view, namespace, name, manager);
        match wanted {
            Some(wanted) => changes.extend(slices::plan(wanted, &existing, ambient)?),
            None => changes.extend(existing.iter().map(|it| Change::Delete(it.key.clone()))),
        }
    }
    Ok(changes)
}

/// A deleted Service takes its slices and its Endpoints with it (unless it is there again).
pub(super) fn plan_gone(
    view: &View,
    namespace: &str,
    name: &str,
    ambient: &Ambient,
) -> Result<Vec<Change>, ApiError> {
    let mut changes = plan(view, namespace, name, ambient)?;
    if view.get(&Key::new("services", namespace, name)).is_none() {
        changes.push(Change::Delete(Key::new("endpoints", namespace, name)));
    }
    Ok(changes)
}

fn managed_slices(view: &View, namespace: &str, name: &str, manager: &str) -> Vec<Arc<Stored>> {
    let is =
        |stored: &Stored, label: &str, value: &str| stored.labels.get(label).is_some_and(|it| it == value);
    view.list("endpointslices", Some(namespace))
        .filter(|it| is(it, SERVICE_NAME_LABEL, name) && is(it, MANAGED_BY_LABEL, manager))
        .cloned()
        .collect()
}

/// Metadata that every slice of a Service has.
fn template(service: &Value, owner: &Value, manager: &str) -> Value {
    let name = object::name(service);
    let mut labels = object::text_map(owner, &["metadata", "labels"]);
    labels.remove("endpoints.kubernetes.io/last-change-trigger-time");
    labels.insert(SERVICE_NAME_LABEL.to_owned(), name.to_owned());
    labels.insert(MANAGED_BY_LABEL.to_owned(), manager.to_owned());
    if object::text(service, &["spec", "clusterIP"]) == "None" {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    } else {
        labels.remove(HEADLESS_LABEL);
    }
    json!({"metadata": {"generateName": format!("{name}-"), "namespace": object::namespace(service), "labels": labels,
        "ownerReferences": [{"apiVersion": "v1", "kind": object::text(owner, &["kind"]), "name": object::name(owner),
            "uid": object::text(owner, &["metadata", "uid"]), "controller": true, "blockOwnerDeletion": true}]}})
}

fn family_name(text: &str) -> Option<&'static str> {
    match text {
        "IPv4" => Some("IPv4"),
        "IPv6" => Some("IPv6"),
        _ => None,
    }
}

fn family_of(address: &str) -> Option<&'static str> {
    let address: IpAddr = address.parse().ok()?;
    Some(if address.is_ipv4() { "IPv4" } else { "IPv6" })
}

/// `None` when the Service has no selector (or is an alias).
fn from_pods(view: &View, service: &Value) -> Option<Wanted> {
    let selector = object::text_map(service, &["spec", "selector"]);
    if selector.is_empty() || object::text(service, &["spec", "type"]) == "ExternalName" {
        return None;
    }
    let families: Vec<_> =
        object::texts(service, &["spec", "ipFamilies"]).iter().filter_map(|it| family_name(it)).collect();
    let mut wanted = Wanted {
        template: template(service, service, FROM_PODS),
        families: families.clone(),
        groups: Vec::new(),
    };
    let namespace = object::namespace(service);
    for stored in view.list("pods", Some(namespace)).filter(|it| selects(&selector, &it.labels)) {
        let pod = stored.value();
        if matches!(object::text(&pod, &["status", "phase"]), "Failed" | "Succeeded") {
            continue;
        }
        let ports = ports_of(service, &pod);
        let zone = zone(view, &pod);
        for family in &families {
            if let Some(address) = pod_address(&pod, family) {
                wanted.add(family, &ports, endpoint(service, &pod, &address, zone.as_deref()));
            }
        }
    }
    Some(wanted)
}

fn pod_address(pod: &Value, family: &str) -> Option<String> {
    let mut addresses: Vec<&str> =
        object::list(pod, &["status", "podIPs"]).iter().map(|it| object::text(it, &["ip"])).collect();
    addresses.push(object::text(pod, &["status", "podIP"]));
    addresses.into_iter().find(|it| family_of(it) == Some(family)).map(str::to_owned)
}

fn zone(view: &View, pod: &Value) -> Option<String> {
    let node = view.get(&Key::new("nodes", "", object::text(pod, &["spec", "nodeName"])))?;
    node.labels.get(ZONE_LABEL).cloned()
}

fn endpoint(service: &Value, pod: &Value, address: &str, zone: Option<&str>) -> Value {
    let serving = object::list(pod, &["status", "conditions"])
        .iter()
        .any(|it| object::text(it, &["type"]) == "Ready" && object::text(it, &["status"]) == "True");
    let terminating = object::is_deleting(pod);
    let always = object::at(service, &["spec", "publishNotReadyAddresses"]) == Some(&json!(true));
    let mut endpoint = json!({"addresses": [address],
        "conditions": {"ready": always || (serving && !terminating), "serving": serving, "terminating": terminating},
        "targetRef": {"kind": "Pod", "namespace": object::namespace(pod), "name": object::name(pod),
            "uid": object::text(pod, &["metadata", "uid"])}});
    let hostname = object::text(pod, &["spec", "hostname"]);
    if !hostname.is_empty() && object::text(pod, &["spec", "subdomain"]) == object::name(service) {
        endpoint["hostname"] = json!(hostname);
    }
    let node = object::text(pod, &["spec", "nodeName"]);
    if !node.is_empty() {
        endpoint["nodeName"] = json!(node);
    }
    if let Some(zone) = zone {
        endpoint["zone"] = json!(zone);
    }
    if endpoint["conditions"]["ready"] == json!(true) {
        object::put(&mut endpoint, &["hints"], hints(service, node, zone));
    }
    endpoint
}

/// For whom a ready endpoint is the nearest, as `trafficDistribution` asks (KEP-4444, KEP-3015).
fn hints(service: &Value, node: &str, zone: Option<&str>) -> Option<Value> {
    let distribution = object::text(service, &["spec", "trafficDistribution"]);
    if !matches!(distribution, "PreferClose" | "PreferSameZone" | "PreferSameNode") {
        return None;
    }
    let mut hints = json!({});
    if let Some(zone) = zone {
        hints["forZones"] = json!([{"name": zone}]);
    }
    if distribution == "PreferSameNode" && !node.is_empty() {
        hints["forNodes"] = json!([{"name": node}]);
    }
    (hints != json!({})).then_some(hints)
}

/// The ports of a Service as this pod has them: numbers as they are, names looked up in its containers.
fn ports_of(service: &Value, pod: &Value) -> Value {
    let ports = object::list(service, &["spec", "ports"]).iter().filter_map(|port| {
        let number = match port.get("targetPort") {
            Some(Value::String(name)) => container_port(pod, name, object::text(port, &["protocol"]))?,
            Some(number @ Value::Number(_)) if *number != json!(0) => number.clone(),
            _ => port.get("port")?.clone(),
        };
        Some(slice_port(port, &number))
    });
    ports.collect()
}

fn slice_port(port: &Value, number: &Value) -> Value {
    let protocol = object::at(port, &["protocol"]).cloned().unwrap_or(json!("TCP"));
    let mut result = json!({"name": object::text(port, &["name"]), "port": number, "protocol": protocol});
    if let Some(protocol) = object::at(port, &["appProtocol"]) {
        result["appProtocol"] = protocol.clone();
    }
    result
}

fn container_port(pod: &Value, name: &str, protocol: &str) -> Option<Value> {
    let containers = object::list(pod, &["spec", "containers"])
        .iter()
        .chain(object::list(pod, &["spec", "initContainers"]));
    containers
        .flat_map(|it| object::list(it, &["ports"]))
        .find(|it| object::text(it, &["name"]) == name && object::text(it, &["protocol"]) == protocol)
        .and_then(|it| it.get("containerPort").cloned())
}

/// `None` unless the Service has no selector and an Endpoints object that wants to be mirrored.
fn mirrored(view: &View, service: &Value) -> Option<Wanted> {
    if !object::text_map(service, &["spec", "selector"]).is_empty() {
        return None;
    }
    let key = Key::new("endpoints", object::namespace(service), object::name(service));
    let stored = view.get(&key)?;
    if stored.labels.get(SKIP_MIRROR_LABEL).is_some_and(|it| it == "true") {
        return None;
    }
    let endpoints = stored.value();
    let mut wanted = Wanted {
        template: template(service, &endpoints, MIRRORED),
        families: Vec::new(),
        groups: Vec::new(),
    };
    for subset in object::list(&endpoints, &["subsets"]) {
        let ports: Value =
            object::list(subset, &["ports"]).iter().map(|it| slice_port(it, &it["port"])).collect();
        for (list, ready) in [("addresses", true), ("notReadyAddresses", false)] {
            for entry in object::list(subset, &[list]) {
                let address = object::text(entry, &["ip"]);
                if let Some(family) = family_of(address) {
                    wanted.add(family, &ports, mirrored_endpoint(entry, address, ready));
                }
            }
        }
    }
    Some(wanted)
}

fn mirrored_endpoint(entry: &Value, address: &str, ready: bool) -> Value {
    let mut endpoint = json!({"addresses": [address], "conditions": {"ready": ready}});
    for field in ["hostname", "nodeName", "targetRef"] {
        if let Some(value) = object::at(entry, &[field]) {
            endpoint[field] = value.clone();
        }
    }
    endpoint
}
