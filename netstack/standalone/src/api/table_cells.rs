//! Columns and cells of every kind's Table. Pure. In: one object. Out: the texts that `kubectl get` shows.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::table::{Column, age};
use crate::object;

const NAME: Column = ("Name", "string", 0);
const AGE: Column = ("Age", "string", 0);

pub(super) fn columns(collection: &str) -> &'static [Column] {
    match collection {
        "pods" => &[
            NAME,
            ("Ready", "string", 0),
            ("Status", "string", 0),
            ("Restarts", "string", 0),
            AGE,
            ("IP", "string", 1),
            ("Node", "string", 1),
            ("Nominated Node", "string", 1),
            ("Readiness Gates", "string", 1),
        ],
        "services" => &[
            NAME,
            ("Type", "string", 0),
            ("Cluster-IP", "string", 0),
            ("External-IP", "string", 0),
            ("Port(s)", "string", 0),
            AGE,
            ("Selector", "string", 1),
        ],
        "nodes" => &[
            NAME,
            ("Status", "string", 0),
            ("Roles", "string", 0),
            AGE,
            ("Version", "string", 0),
            ("Internal-IP", "string", 1),
            ("External-IP", "string", 1),
            ("OS-Image", "string", 1),
            ("Kernel-Version", "string", 1),
            ("Container-Runtime", "string", 1),
        ],
        "namespaces" => &[NAME, ("Status", "string", 0), AGE],
        "endpoints" => &[NAME, ("Endpoints", "string", 0), AGE],
        "endpointslices" => {
            &[NAME, ("AddressType", "string", 0), ("Ports", "string", 0), ("Endpoints", "string", 0), AGE]
        }
        "configmaps" => &[NAME, ("Data", "string", 0), AGE],
        "secrets" => &[NAME, ("Type", "string", 0), ("Data", "string", 0), AGE],
        "events" => &[
            ("Last Seen", "string", 0),
            ("Type", "string", 0),
            ("Reason", "string", 0),
            ("Object", "string", 0),
            ("Message", "string", 0),
            ("Count", "string", 1),
            ("Name", "string", 1),
        ],
        "leases" => &[NAME, ("Holder", "string", 0), AGE],
        "networkpolicies" => &[NAME, ("Pod-Selector", "string", 0), AGE],
        "ingresses" => &[
            NAME,
            ("Class", "string", 0),
            ("Hosts", "string", 0),
            ("Address", "string", 0),
            ("Ports", "string", 0),
            AGE,
        ],
        "ingressclasses" => &[NAME, ("Controller", "string", 0), AGE],
        _ => &[NAME, AGE],
    }
}

/// One cell for each of [`columns`].
pub(super) fn cells(collection: &str, object: &Value, now: Timestamp) -> Vec<Value> {
    let name = object::name(object).to_owned();
    let since = age(object, &["metadata", "creationTimestamp"], now);
    let texts = match collection {
        "pods" => pod(object, name, since),
        "services" => service(object, name, since),
        "nodes" => node(object, name, since),
        "namespaces" => vec![name, object::text(object, &["status", "phase"]).to_owned(), since],
        "endpoints" => vec![name, endpoints(object), since],
        "endpointslices" => slice(object, name, since),
        "configmaps" => vec![name, count(object, &["data", "binaryData"]), since],
        "secrets" => vec![name, object::text(object, &["type"]).to_owned(), count(object, &["data"]), since],
        "events" => event(object, name, now),
        "leases" => vec![name, object::text(object, &["spec", "holderIdentity"]).to_owned(), since],
        "networkpolicies" => vec![name, selector(object, &["spec", "podSelector", "matchLabels"]), since],
        "ingresses" => ingress(object, name, since),
        "ingressclasses" => vec![name, object::text(object, &["spec", "controller"]).to_owned(), since],
        _ => vec![name, since],
    };
    texts.into_iter().map(|it| json!(it)).collect()
}

fn none_if_empty(text: &str) -> String {
    if text.is_empty() { "<none>".to_owned() } else { text.to_owned() }
}

/// Joins at most `most` texts and says how many more there are.
fn some_of(texts: &[String], most: usize) -> String {
    let mut text = texts.iter().take(most).cloned().collect::<Vec<_>>().join(",");
    if texts.len() > most {
        text = format!("{text} + {} more...", texts.len() - most);
    }
    none_if_empty(&text)
}

fn count(object: &Value, maps: &[&str]) -> String {
    let sizes = maps.iter().filter_map(|it| object::at(object, &[it])?.as_object());
    sizes.map(serde_json::Map::len).sum::<usize>().to_string()
}

fn selector(object: &Value, path: &[&str]) -> String {
    let labels = object::text_map(object, path);
    let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    none_if_empty(&pairs.join(","))
}

fn pod(pod: &Value, name: String, since: String) -> Vec<String> {
    let statuses = object::list(pod, &["status", "containerStatuses"]);
    let all = object::list(pod, &["spec", "containers"]).len();
    let condition = object::list(pod, &["status", "conditions"])
        .iter()
        .any(|it| object::text(it, &["type"]) == "Ready" && object::text(it, &["status"]) == "True");
    let counted = statuses.iter().filter(|it| it["ready"] == json!(true)).count();
    // Without container statuses (nobody runs them here) the Ready condition speaks for all.
    let ready = if statuses.is_empty() && condition { all } else { counted };
    let restarts: u64 = statuses.iter().filter_map(|it| it["restartCount"].as_u64()).sum();
    let status = if object::is_deleting(pod) {
        "Terminating"
    } else {
        match object::text(pod, &["status", "reason"]) {
            "" => object::text(pod, &["status", "phase"]),
            reason => reason,
        }
    };
    let ip = match object::list(pod, &["status", "podIPs"]).first() {
        Some(first) => object::text(first, &["ip"]),
        None => object::text(pod, &["status", "podIP"]),
    };
    vec![
        name,
        format!("{ready}/{all}"),
        status.to_owned(),
        restarts.to_string(),
        since,
        none_if_empty(ip),
        none_if_empty(object::text(pod, &["spec", "nodeName"])),
        "<none>".to_owned(),
        "<none>".to_owned(),
    ]
}

fn service(service: &Value, name: String, since: String) -> Vec<String> {
    let kind = object::text(service, &["spec", "type"]);
    let ports: Vec<String> = object::list(service, &["spec", "ports"])
        .iter()
        .map(|port| {
            let node_port = object::at(port, &["nodePort"]).map_or_else(String::new, |it| format!(":{it}"));
            format!("{}{node_port}/{}", port["port"], object::text(port, &["protocol"]))
        })
        .collect();
    vec![
        name,
        kind.to_owned(),
        none_if_empty(object::text(service, &["spec", "clusterIP"])),
        external(service, kind),
        none_if_empty(&ports.join(",")),
        since,
        selector(service, &["spec", "selector"]),
    ]
}

fn external(service: &Value, kind: &str) -> String {
    let mut addresses = object::texts(service, &["spec", "externalIPs"]);
    match kind {
        "ExternalName" => return object::text(service, &["spec", "externalName"]).to_owned(),
        "LoadBalancer" => {
            let given = load_balancer(service);
            if given.is_empty() && addresses.is_empty() {
                return "<pending>".to_owned();
            }
            addresses.splice(0..0, given);
        }
        _ => {}
    }
    none_if_empty(&addresses.join(","))
}

fn load_balancer(object: &Value) -> Vec<String> {
    object::list(object, &["status", "loadBalancer", "ingress"])
        .iter()
        .map(|it| match object::text(it, &["ip"]) {
            "" => object::text(it, &["hostname"]).to_owned(),
            ip => ip.to_owned(),
        })
        .collect()
}

fn node(node: &Value, name: String, since: String) -> Vec<String> {
    let ready = object::list(node, &["status", "conditions"])
        .iter()
        .find(|it| object::text(it, &["type"]) == "Ready");
    let mut status = match ready.map(|it| object::text(it, &["status"])) {
        Some("True") => "Ready",
        Some("False") => "NotReady",
        _ => "Unknown",
    }
    .to_owned();
    if object::at(node, &["spec", "unschedulable"]) == Some(&json!(true)) {
        status.push_str(",SchedulingDisabled");
    }
    let labels = object::text_map(node, &["metadata", "labels"]);
    let roles: Vec<&str> = labels
        .keys()
        .filter_map(|it| it.strip_prefix("node-role.kubernetes.io/"))
        .filter(|it| !it.is_empty())
        .collect();
    let address = |kind: &str| {
        let found = object::list(node, &["status", "addresses"])
            .iter()
            .find(|it| object::text(it, &["type"]) == kind);
        none_if_empty(found.map_or("", |it| object::text(it, &["address"])))
    };
    let info = |field: &str| match object::text(node, &["status", "nodeInfo", field]) {
        "" => "<unknown>".to_owned(),
        text => text.to_owned(),
    };
    vec![
        name,
        status,
        none_if_empty(&roles.join(",")),
        since,
        object::text(node, &["status", "nodeInfo", "kubeletVersion"]).to_owned(),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn endpoints(endpoints: &Value) -> String {
    let mut texts = Vec::new();
    for subset in object::list(endpoints, &["subsets"]) {
        for entry in object::list(subset, &["addresses"]) {
            let ip = object::text(entry, &["ip"]);
            let ports = object::list(subset, &["ports"]);
            if ports.is_empty() {
                texts.push(ip.to_owned());
            }
            let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
            texts.extend(ports.iter().map(|port| format!("{host}:{}", port["port"])));
        }
    }
    some_of(&texts, 3)
}

fn slice(slice: &Value, name: String, since: String) -> Vec<String> {
    let port = |it: &Value| object::at(it, &["port"]).map_or_else(|| "*".to_owned(), Value::to_string);
    let ports: Vec<String> = object::list(slice, &["ports"]).iter().map(port).collect();
    let addresses: Vec<String> =
        object::list(slice, &["endpoints"]).iter().flat_map(|it| object::texts(it, &["addresses"])).collect();
    let ports = if ports.is_empty() { "<unset>".to_owned() } else { some_of(&ports, 3) };
    let addresses = if addresses.is_empty() { "<unset>".to_owned() } else { some_of(&addresses, 3) };
    vec![name, object::text(slice, &["addressType"]).to_owned(), ports, addresses, since]
}

fn event(event: &Value, name: String, now: Timestamp) -> Vec<String> {
    let times = [
        &["series", "lastObservedTime"][..],
        &["lastTimestamp"],
        &["eventTime"],
        &["metadata", "creationTimestamp"],
    ];
    let last = times.into_iter().find(|it| object::at(event, it).is_some()).unwrap_or(&["lastTimestamp"]);
    let involved = format!(
        "{}/{}",
        object::text(event, &["involvedObject", "kind"]).to_lowercase(),
        object::text(event, &["involvedObject", "name"])
    );
    vec![
        age(event, last, now),
        object::text(event, &["type"]).to_owned(),
        object::text(event, &["reason"]).to_owned(),
        involved,
        object::text(event, &["message"]).trim().to_owned(),
        object::at(event, &["count"]).map_or_else(|| "1".to_owned(), Value::to_string),
        name,
    ]
}

fn ingress(ingress: &Value, name: String, since: String) -> Vec<String> {
    let hosts: Vec<String> = object::list(ingress, &["spec", "rules"])
        .iter()
        .map(|it| object::text(it, &["host"]).to_owned())
        .filter(|it| !it.is_empty())
        .collect();
    let hosts = if hosts.is_empty() { "*".to_owned() } else { some_of(&hosts, 3) };
    let ports = if object::list(ingress, &["spec", "tls"]).is_empty() { "80" } else { "80, 443" };
    vec![
        name,
        none_if_empty(object::text(ingress, &["spec", "ingressClassName"])),
        hosts,
        load_balancer(ingress).join(","),
        ports.to_owned(),
        since,
    ]
}
