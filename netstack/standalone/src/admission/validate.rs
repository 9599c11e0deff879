//! Rules that the schema cannot say: names, required fields, ranges. Pure. In: one object with its defaults.
//! Out: every wrong field with its path (Kubernetes API reference; names: RFC 1123 and RFC 1035).

use std::collections::BTreeSet;

use serde_json::Value;

use super::validate_network;
use crate::object;
use crate::resources::Resource;
use crate::status::Cause;

/// Collects causes under field paths.
#[derive(Default)]
pub(super) struct Causes(pub(super) Vec<Cause>);

impl Causes {
    pub(super) fn required(&mut self, field: impl Into<String>, message: &str) {
        let message = if message.is_empty() {
            "Required value".to_owned()
        } else {
            format!("Required value: {message}")
        };
        self.0.push(Cause { reason: "FieldValueRequired", message, field: field.into() });
    }

    pub(super) fn invalid(&mut self, field: impl Into<String>, value: impl std::fmt::Display, message: &str) {
        let message = format!("Invalid value: \"{value}\": {message}");
        self.0.push(Cause { reason: "FieldValueInvalid", message, field: field.into() });
    }

    pub(super) fn duplicate(&mut self, field: impl Into<String>, value: impl std::fmt::Display) {
        let message = format!("Duplicate value: \"{value}\"");
        self.0.push(Cause { reason: "FieldValueDuplicate", message, field: field.into() });
    }

    pub(super) fn forbidden(&mut self, field: impl Into<String>, message: &str) {
        let message = format!("Forbidden: {message}");
        self.0.push(Cause { reason: "FieldValueForbidden", message, field: field.into() });
    }

    /// One of a closed set.
    pub(super) fn one_of(&mut self, field: String, value: &str, allowed: &[&str]) {
        if !allowed.contains(&value) {
            let list: Vec<String> = allowed.iter().map(|it| format!("\"{it}\"")).collect();
            let message = format!("Unsupported value: \"{value}\": supported values: {}", list.join(", "));
            self.0.push(Cause { reason: "FieldValueNotSupported", message, field });
        }
    }
}

/// Every wrong field of an object.
pub(super) fn causes(resource: &Resource, object: &Value) -> Vec<Cause> {
    let mut causes = Causes::default();
    metadata(resource, object, &mut causes);
    match resource.collection() {
        "services" => validate_network::service(object, &mut causes),
        "pods" => pod(object, &mut causes),
        "endpointslices" => validate_network::endpoint_slice(object, &mut causes),
        "endpoints" => validate_network::endpoints(object, &mut causes),
        "networkpolicies" => validate_network::network_policy(object, &mut causes),
        "ingresses" => validate_network::ingress(object, &mut causes),
        "nodes" => validate_network::node(object, &mut causes),
        "configmaps" => data_keys(object, &["data", "binaryData"], &mut causes),
        "ingressclasses" => validate_network::ingress_class(object, &mut causes),
        "secrets" => {
            data_keys(object, &["data"], &mut causes);
            validate_network::secret(object, &mut causes);
        }
        "events" => event(object, &mut causes),
        _ => {}
    }
    causes.0
}

const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character";
const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character";

/// RFC 1123 label: up to 63 of `[a-z0-9-]`, no hyphen at the ends.
pub(super) fn is_label(text: &str) -> bool {
    let legal = |it: u8| it.is_ascii_lowercase() || it.is_ascii_digit() || it == b'-';
    !text.is_empty()
        && text.len() <= 63
        && text.bytes().all(legal)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// RFC 1123 subdomain: up to 253, labels joined by dots.
pub(super) fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

/// `[prefix/]name` as keys of labels and annotations are.
fn is_qualified_name(text: &str) -> bool {
    let (prefix, name) = text.split_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(is_subdomain) && !name.is_empty() && is_label_value(name)
}

fn is_label_value(text: &str) -> bool {
    let legal = |it: u8| it.is_ascii_alphanumeric() || b"-_.".contains(&it);
    let ends = |it: Option<u8>| it.is_none_or(|it| it.is_ascii_alphanumeric());
    text.len() <= 63 && text.bytes().all(legal) && ends(text.bytes().next()) && ends(text.bytes().last())
}

fn metadata(resource: &Resource, object: &Value, causes: &mut Causes) {
    let name = object::name(object);
    let (fits, rule) = match resource.collection() {
        "namespaces" | "services" => (is_label(name), LABEL_RULE),
        _ => (is_subdomain(name), SUBDOMAIN_RULE),
    };
    if name.is_empty() {
        causes.required("metadata.name", "name or generateName is required");
    } else if !fits {
        causes.invalid("metadata.name", name, rule);
    } else if resource.collection() == "services" && !name.starts_with(|it: char| it.is_ascii_lowercase()) {
        causes.invalid("metadata.name", name, "a DNS-1035 label must start with an alphabetic character");
    }
    for (key, value) in object::text_map(object, &["metadata", "labels"]) {
        if !is_qualified_name(&key) {
            causes.invalid(
                "metadata.labels",
                key,
                "name part must consist of alphanumeric characters, '-', '_' or '.'",
            );
        } else if !is_label_value(&value) {
            causes.invalid("metadata.labels", value, "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.'");
        }
    }
    let annotations = object::text_map(object, &["metadata", "annotations"]);
    for key in annotations.keys().filter(|it| !is_qualified_name(&it.to_lowercase())) {
        causes.invalid(
            "metadata.annotations",
            key,
            "name part must consist of alphanumeric characters, '-', '_' or '.'",
        );
    }
    if annotations.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > 256 * 1024 {
        causes.invalid("metadata.annotations", "...", "may not be more than 262144 bytes");
    }
}

fn pod(pod: &Value, causes: &mut Causes) {
    let containers = object::list(pod, &["spec", "containers"]);
    if containers.is_empty() {
        causes.required("spec.containers", "");
    }
    let mut names = BTreeSet::new();
    for (list, containers) in
        [("containers", containers), ("initContainers", object::list(pod, &["spec", "initContainers"]))]
    {
        for (index, container) in containers.iter().enumerate() {
            let field = format!("spec.{list}[{index}]");
            let name = object::text(container, &["name"]);
            if name.is_empty() {
                causes.required(format!("{field}.name"), "");
            } else if !is_label(name) {
                causes.invalid(format!("{field}.name"), name, LABEL_RULE);
            } else if !names.insert(name) {
                causes.duplicate(format!("{field}.name"), name);
            }
            if object::text(container, &["image"]).is_empty() {
                causes.required(format!("{field}.image"), "");
            }
            container_ports(&field, container, causes);
        }
    }
    for field in ["hostname", "subdomain"] {
        let text = object::text(pod, &["spec", field]);
        if !text.is_empty() && !is_label(text) {
            causes.invalid(format!("spec.{field}"), text, LABEL_RULE);
        }
    }
    let restart = object::text(pod, &["spec", "restartPolicy"]).to_owned();
    causes.one_of("spec.restartPolicy".to_owned(), &restart, &["Always", "OnFailure", "Never"]);
    for (index, entry) in object::list(pod, &["status", "podIPs"]).iter().enumerate() {
        validate_network::address(
            &format!("status.podIPs[{index}].ip"),
            object::text(entry, &["ip"]),
            causes,
        );
    }
}

fn container_ports(field: &str, container: &Value, causes: &mut Causes) {
    for (index, port) in object::list(container, &["ports"]).iter().enumerate() {
        let field = format!("{field}.ports[{index}]");
        validate_network::port_number(&format!("{field}.containerPort"), port.get("containerPort"), causes);
        let protocol = object::text(port, &["protocol"]).to_owned();
        causes.one_of(format!("{field}.protocol"), &protocol, &["TCP", "UDP", "SCTP"]);
        let name = object::text(port, &["name"]);
        if !name.is_empty() && !validate_network::is_port_name(name) {
            causes.invalid(format!("{field}.name"), name, validate_network::PORT_NAME_RULE);
        }
    }
}

fn data_keys(object: &Value, maps: &[&str], causes: &mut Causes) {
    let legal = |it: u8| it.is_ascii_alphanumeric() || b"-_.".contains(&it);
    for map in maps {
        for key in object::at(object, &[map]).and_then(Value::as_object).into_iter().flat_map(|it| it.keys())
        {
            if key.is_empty() || key.len() > 253 || !key.bytes().all(legal) {
                causes.invalid(
                    format!("{map}[{key}]"),
                    key,
                    "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
                );
            }
        }
    }
}

fn event(event: &Value, causes: &mut Causes) {
    let involved = object::text(event, &["involvedObject", "namespace"]);
    let namespace = object::namespace(event);
    // Events about cluster-scoped objects live in `default`.
    if involved != namespace && !(involved.is_empty() && matches!(namespace, "default" | "kube-system")) {
        causes.invalid("involvedObject.namespace", involved, "does not match event.namespace");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::find;
    use serde_json::json;

    fn fields(group: &str, plural: &str, object: &Value) -> Vec<String> {
        let resource = find(group, "v1", plural).unwrap();
        causes(resource, object).into_iter().map(|it| it.field).collect()
    }

    #[test]
    fn names_follow_rfc_1123_and_services_rfc_1035() {
        assert_eq!(fields("", "configmaps", &json!({"metadata": {"name": "Bad_Name"}})), ["metadata.name"]);
        assert_eq!(fields("", "configmaps", &json!({"metadata": {"name": "a.b-c"}})), [""; 0]);
        assert_eq!(fields("", "namespaces", &json!({"metadata": {"name": "a.b"}})), ["metadata.name"]);
        assert_eq!(fields("", "configmaps", &json!({"metadata": {}})), ["metadata.name"]);
    }

    #[test]
    fn a_pod_needs_named_containers_with_images() {
        let pod = json!({"metadata": {"name": "a"}, "spec": {"restartPolicy": "Always", "containers": [
            {"name": "x", "image": "i", "ports": [{"containerPort": 70000, "protocol": "TCP"}]}, {"name": "x"}]}});
        assert_eq!(
            fields("", "pods", &pod),
            [
                "spec.containers[0].ports[0].containerPort",
                "spec.containers[1].name",
                "spec.containers[1].image"
            ]
        );
    }

    #[test]
    fn a_service_needs_ports_with_unique_names() {
        let service = |spec: Value| json!({"metadata": {"name": "a"}, "spec": spec});
        let base = |ports: Value| json!({"type": "ClusterIP", "sessionAffinity": "None", "ports": ports});
        assert_eq!(fields("", "services", &service(base(json!([])))), ["spec.ports"]);
        let unnamed = json!([{"port": 1, "protocol": "TCP", "targetPort": 1}, {"port": 2, "protocol": "TCP", "targetPort": 2}]);
        assert_eq!(
            fields("", "services", &service(base(unnamed))),
            ["spec.ports[0].name", "spec.ports[1].name"]
        );
        let wrong = json!([{"port": 0, "protocol": "tcp", "targetPort": "UPPER"}]);
        assert_eq!(
            fields("", "services", &service(base(wrong))),
            ["spec.ports[0].port", "spec.ports[0].protocol", "spec.ports[0].targetPort"]
        );
    }

    #[test]
    fn a_service_for_the_outside_names_what_a_load_balancer_cannot_have() {
        let with = |kind: &str, more: Value, ingress: Value| {
            let mut spec = json!({"type": kind, "sessionAffinity": "None", "ports": [{"port": 1, "protocol": "TCP", "targetPort": 1}]});
            spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let object = json!({"metadata": {"name": "a"}, "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}});
            fields("", "services", &object)
        };
        let ranges = json!({"loadBalancerSourceRanges": [" 10.0.0.0/8 "]});
        assert_eq!(with("LoadBalancer", ranges.clone(), json!([])), [""; 0]);
        assert_eq!(with("NodePort", ranges, json!([])), ["spec.loadBalancerSourceRanges"]);
        let wrong = json!({"loadBalancerSourceRanges": ["10.0.0.0/99"], "trafficDistribution": "PreferFar"});
        let named = with("LoadBalancer", wrong, json!([]));
        assert_eq!(named, ["spec.trafficDistribution", "spec.loadBalancerSourceRanges[0]"]);
        let timeout = |seconds: i64| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
        assert_eq!(with("ClusterIP", timeout(86_400), json!([])), [""; 0]);
        assert_eq!(
            with("ClusterIP", timeout(0), json!([])),
            ["spec.sessionAffinityConfig.clientIP.timeoutSeconds"]
        );
        let stray = json!({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}});
        assert_eq!(with("ClusterIP", stray, json!([])), ["spec.sessionAffinityConfig"]);
        let ingress = json!([{"ip": "198.51.100.1", "ipMode": "VIP"}, {"ip": "x", "ipMode": "Other"}, {"hostname": "h", "ipMode": "VIP"}]);
        assert_eq!(
            with("LoadBalancer", json!({}), ingress),
            [
                "status.loadBalancer.ingress[1].ip",
                "status.loadBalancer.ingress[1].ipMode",
                "status.loadBalancer.ingress[2].ipMode"
            ]
        );
    }

    #[test]
    fn an_ingress_says_its_path_type_and_one_backend() {
        let of = |spec: Value| {
            fields("networking.k8s.io", "ingresses", &json!({"metadata": {"name": "a"}, "spec": spec}))
        };
        let service = json!({"service": {"name": "web", "port": {"number": 80}}});
        let path = |path: &str, kind: &str, backend: Value| json!({"rules": [{"host": "*.example.com", "http": {"paths": [{"path": path, "pathType": kind, "backend": backend}]}}]});
        assert_eq!(of(path("/", "Prefix", service.clone())), [""; 0]);
        assert_eq!(of(path("", "ImplementationSpecific", service.clone())), [""; 0]);
        assert_eq!(of(json!({"defaultBackend": service.clone()})), [""; 0]);
        assert_eq!(of(json!({})), ["spec"]);
        let at = "spec.rules[0].http.paths[0]";
        assert_eq!(of(path("/", "", service.clone())), [format!("{at}.pathType")]);
        assert_eq!(of(path("/", "Regex", service.clone())), [format!("{at}.pathType")]);
        assert_eq!(of(path("/a//b", "Prefix", service.clone())), [format!("{at}.path")]);
        assert_eq!(of(path("a", "Exact", service.clone())), [format!("{at}.path")]);
        assert_eq!(of(path("/", "Exact", json!({}))), [format!("{at}.backend")]);
        let both = json!({"service": {"name": "web", "port": {"number": 80}}, "resource": {"kind": "B", "name": "b"}});
        assert_eq!(of(path("/", "Exact", both)), [format!("{at}.backend")]);
        let two_ports = json!({"service": {"name": "web", "port": {"number": 80, "name": "http"}}});
        assert_eq!(of(path("/", "Exact", two_ports)), [format!("{at}.backend.service.port")]);
        let no_port = json!({"service": {"name": "web"}});
        assert_eq!(of(path("/", "Exact", no_port)), [format!("{at}.backend.service.port")]);
        let host = |host: &str| of(json!({"rules": [{"host": host}]}));
        assert_eq!(host("192.0.2.1"), ["spec.rules[0].host"]);
        assert_eq!(host("*.*.example.com"), ["spec.rules[0].host"]);
        assert_eq!(host("Shop.example.com"), ["spec.rules[0].host"]);
    }

    #[test]
    fn classes_and_secrets_hold_what_their_types_promise() {
        let class = |controller: &str| {
            let object = json!({"metadata": {"name": "a"}, "spec": {"controller": controller}});
            fields("networking.k8s.io", "ingressclasses", &object)
        };
        assert_eq!(class("weft.network/ingress"), [""; 0]);
        assert_eq!(class("weft"), ["spec.controller"]);
        assert_eq!(class(""), ["spec.controller"]);
        let secret =
            json!({"metadata": {"name": "a"}, "type": "kubernetes.io/tls", "data": {"tls.crt": "YQ=="}});
        assert_eq!(fields("", "secrets", &secret), ["data[tls.key]"]);
    }

    #[test]
    fn slices_and_policies_name_the_wrong_address() {
        let slice = json!({"metadata": {"name": "a"}, "addressType": "IPv4", "endpoints": [{"addresses": ["fd00::1"]}]});
        assert_eq!(fields("discovery.k8s.io", "endpointslices", &slice), ["endpoints[0].addresses[0]"]);
        let policy = json!({"metadata": {"name": "a"}, "spec": {"ingress": [{"from": [
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]}});
        assert_eq!(
            fields("networking.k8s.io", "networkpolicies", &policy),
            ["spec.ingress[0].from[0].ipBlock.except[0]"]
        );
    }
}
