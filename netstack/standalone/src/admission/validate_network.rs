//! Validation of the kinds that describe the network. Pure; see [`super::validate`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::validate::{Causes, is_label, is_subdomain};
use crate::object;

pub(super) const PORT_NAME_RULE: &str =
    "must be 1 to 15 lower case alphanumeric characters or '-', with at least one letter";
const PROTOCOLS: &[&str] = &["TCP", "UDP", "SCTP"];

/// IANA service name (RFC 6335), as container ports and target ports are named.
pub(super) fn is_port_name(text: &str) -> bool {
    is_label(text)
        && text.len() <= 15
        && text.bytes().any(|it| it.is_ascii_lowercase())
        && !text.contains("--")
}

pub(super) fn port_number(field: &str, value: Option<&Value>, causes: &mut Causes) {
    let number = value.and_then(Value::as_i64).unwrap_or(0);
    if !(1..=65_535).contains(&number) {
        causes.invalid(field, number, "must be between 1 and 65535, inclusive");
    }
}

pub(super) fn address(field: &str, text: &str, causes: &mut Causes) {
    if text.parse::<IpAddr>().is_err() {
        causes.invalid(field, text, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    }
}

pub(super) fn service(service: &Value, causes: &mut Causes) {
    let kind = object::text(service, &["spec", "type"]).to_owned();
    causes.one_of("spec.type".to_owned(), &kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    let affinity = object::text(service, &["spec", "sessionAffinity"]).to_owned();
    causes.one_of("spec.sessionAffinity".to_owned(), &affinity, &["ClientIP", "None"]);
    for field in ["internalTrafficPolicy", "externalTrafficPolicy"] {
        let policy = object::text(service, &["spec", field]);
        if !policy.is_empty() {
            causes.one_of(format!("spec.{field}"), policy, &["Cluster", "Local"]);
        }
    }
    let policy = object::text(service, &["spec", "ipFamilyPolicy"]);
    if !policy.is_empty() {
        let all = &["SingleStack", "PreferDualStack", "RequireDualStack"];
        causes.one_of("spec.ipFamilyPolicy".to_owned(), policy, all);
    }
    for (index, family) in object::texts(service, &["spec", "ipFamilies"]).iter().enumerate() {
        causes.one_of(format!("spec.ipFamilies[{index}]"), family, &["IPv4", "IPv6"]);
    }
    let headless = object::text(service, &["spec", "clusterIP"]) == "None"
        || object::texts(service, &["spec", "clusterIPs"]).first().is_some_and(|it| it == "None");
    let ports = object::list(service, &["spec", "ports"]);
    if kind == "ExternalName" {
        let name = object::text(service, &["spec", "externalName"]);
        if name.is_empty() {
            causes.required("spec.externalName", "");
        } else if !is_subdomain(name.trim_end_matches('.')) {
            causes.invalid("spec.externalName", name, "must be a lower case RFC 1123 subdomain");
        }
    } else if ports.is_empty() && !headless {
        causes.required("spec.ports", "");
    }
    if headless && matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        causes.invalid(
            "spec.clusterIPs[0]",
            "None",
            &format!("may not be set to 'None' for {kind} services"),
        );
    }
    service_ports(ports, causes);
    for (index, text) in object::texts(service, &["spec", "externalIPs"]).iter().enumerate() {
        address(&format!("spec.externalIPs[{index}]"), text, causes);
    }
    affinity_timeout(service, causes);
    let distribution = object::text(service, &["spec", "trafficDistribution"]);
    if !distribution.is_empty() {
        let all = &["PreferClose", "PreferSameNode", "PreferSameZone"];
        causes.one_of("spec.trafficDistribution".to_owned(), distribution, all);
    }
    let source_ranges = object::texts(service, &["spec", "loadBalancerSourceRanges"]);
    if kind != "LoadBalancer" && !source_ranges.is_empty() {
        causes.forbidden("spec.loadBalancerSourceRanges", "may only be used when `type` is 'LoadBalancer'");
    }
    for (index, text) in source_ranges.iter().enumerate() {
        range(&format!("spec.loadBalancerSourceRanges[{index}]"), text.trim(), causes);
    }
    for (index, entry) in object::list(service, &["status", "loadBalancer", "ingress"]).iter().enumerate() {
        let field = format!("status.loadBalancer.ingress[{index}]");
        let (ip, mode) = (object::text(entry, &["ip"]), object::text(entry, &["ipMode"]));
        if !ip.is_empty() {
            address(&format!("{field}.ip"), ip, causes);
            causes.one_of(format!("{field}.ipMode"), mode, &["Proxy", "VIP"]);
        } else if !mode.is_empty() {
            causes.forbidden(format!("{field}.ipMode"), "may not be specified when `ip` is not set");
        }
    }
}

fn affinity_timeout(service: &Value, causes: &mut Causes) {
    let timeout = object::at(service, &["spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds"]);
    let sticky = object::text(service, &["spec", "sessionAffinity"]) == "ClientIP";
    match timeout.map(|it| it.as_i64().unwrap_or(0)) {
        Some(_) if !sticky => {
            causes.forbidden("spec.sessionAffinityConfig", "must not be set when session affinity is None");
        }
        Some(seconds) if !(1..=86_400).contains(&seconds) => causes.invalid(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            seconds,
            "must be greater than 0 and less than or equal to 86400",
        ),
        _ => {}
    }
}

fn service_ports(ports: &[Value], causes: &mut Causes) {
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        let name = object::text(port, &["name"]);
        if name.is_empty() && ports.len() > 1 {
            causes.required(format!("{field}.name"), "");
        } else if !name.is_empty() && !is_label(name) {
            causes.invalid(format!("{field}.name"), name, "must be a lowercase RFC 1123 label");
        } else if !name.is_empty() && !names.insert(name) {
            causes.duplicate(format!("{field}.name"), name);
        }
        port_number(&format!("{field}.port"), port.get("port"), causes);
        let protocol = object::text(port, &["protocol"]);
        causes.one_of(format!("{field}.protocol"), protocol, PROTOCOLS);
        if !numbers.insert((protocol, port.get("port").and_then(Value::as_i64))) {
            causes.duplicate(field.clone(), format!("{}/{protocol}", port["port"]));
        }
        match port.get("targetPort") {
            Some(Value::String(name)) if !is_port_name(name) => {
                causes.invalid(format!("{field}.targetPort"), name, PORT_NAME_RULE);
            }
            Some(Value::String(_)) => {}
            number => port_number(&format!("{field}.targetPort"), number, causes),
        }
    }
}

fn range(field: &str, text: &str, causes: &mut Causes) -> Option<IpNet> {
    let range = text.parse().ok();
    if range.is_none() {
        causes.invalid(field, text, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
    }
    range
}

pub(super) fn endpoint_slice(slice: &Value, causes: &mut Causes) {
    let family = object::text(slice, &["addressType"]).to_owned();
    if family.is_empty() {
        causes.required("addressType", "");
        return;
    }
    causes.one_of("addressType".to_owned(), &family, &["FQDN", "IPv4", "IPv6"]);
    let endpoints = object::list(slice, &["endpoints"]);
    if endpoints.len() > 1000 {
        causes.invalid("endpoints", endpoints.len(), "must have at most 1000 items");
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let field = format!("endpoints[{index}].addresses");
        let addresses = object::texts(endpoint, &["addresses"]);
        if addresses.is_empty() {
            causes.required(&field, "must contain at least 1 address");
        }
        for (number, text) in addresses.iter().enumerate() {
            let parsed: Option<IpAddr> = text.parse().ok();
            let fits = match family.as_str() {
                "IPv4" => parsed.is_some_and(|it| it.is_ipv4()),
                "IPv6" => parsed.is_some_and(|it| it.is_ipv6()),
                _ => is_subdomain(text),
            };
            if !fits {
                causes.invalid(
                    format!("{field}[{number}]"),
                    text,
                    &format!("must be a valid {family} address"),
                );
            }
        }
    }
    for (index, port) in object::list(slice, &["ports"]).iter().enumerate() {
        causes.one_of(format!("ports[{index}].protocol"), object::text(port, &["protocol"]), PROTOCOLS);
        if port.get("port").is_some() {
            port_number(&format!("ports[{index}].port"), port.get("port"), causes);
        }
    }
}

pub(super) fn endpoints(endpoints: &Value, causes: &mut Causes) {
    for (index, subset) in object::list(endpoints, &["subsets"]).iter().enumerate() {
        for list in ["addresses", "notReadyAddresses"] {
            for (number, entry) in object::list(subset, &[list]).iter().enumerate() {
                let field = format!("subsets[{index}].{list}[{number}].ip");
                address(&field, object::text(entry, &["ip"]), causes);
            }
        }
        for (number, port) in object::list(subset, &["ports"]).iter().enumerate() {
            port_number(&format!("subsets[{index}].ports[{number}].port"), port.get("port"), causes);
        }
    }
}

pub(super) fn network_policy(policy: &Value, causes: &mut Causes) {
    for (index, kind) in object::texts(policy, &["spec", "policyTypes"]).iter().enumerate() {
        causes.one_of(format!("spec.policyTypes[{index}]"), kind, &["Ingress", "Egress"]);
    }
    for (direction, side) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in object::list(policy, &["spec", direction]).iter().enumerate() {
            for (number, peer) in object::list(rule, &[side]).iter().enumerate() {
                policy_peer(&format!("spec.{direction}[{index}].{side}[{number}]"), peer, causes);
            }
            for (number, port) in object::list(rule, &["ports"]).iter().enumerate() {
                policy_port(&format!("spec.{direction}[{index}].ports[{number}]"), port, causes);
            }
        }
    }
}

fn policy_peer(field: &str, peer: &Value, causes: &mut Causes) {
    let selects = ["podSelector", "namespaceSelector"].iter().any(|it| object::at(peer, &[it]).is_some());
    let Some(block) = object::at(peer, &["ipBlock"]) else {
        if !selects {
            causes.required(field, "must specify a peer");
        }
        return;
    };
    if selects {
        causes.invalid(field, "", "may not specify both ipBlock and another peer");
    }
    let Some(cidr) = range(&format!("{field}.ipBlock.cidr"), object::text(block, &["cidr"]), causes) else {
        return;
    };
    for (index, text) in object::texts(block, &["except"]).iter().enumerate() {
        let field = format!("{field}.ipBlock.except[{index}]");
        let except = range(&field, text, causes);
        if except.is_some_and(|it| !cidr.contains(&it) || it == cidr) {
            causes.invalid(field, text, "must be a strict subset of `cidr`");
        }
    }
}

fn policy_port(field: &str, port: &Value, causes: &mut Causes) {
    causes.one_of(format!("{field}.protocol"), object::text(port, &["protocol"]), PROTOCOLS);
    match port.get("port") {
        Some(Value::String(name)) if !is_port_name(name) => {
            causes.invalid(format!("{field}.port"), name, PORT_NAME_RULE);
        }
        Some(number @ Value::Number(_)) => {
            port_number(&format!("{field}.port"), Some(number), causes);
            let end = port.get("endPort").and_then(Value::as_i64);
            if end.is_some_and(|it| it < number.as_i64().unwrap_or(0) || it > 65_535) {
                causes.invalid(
                    format!("{field}.endPort"),
                    &port["endPort"],
                    "must be greater than or equal to `port`",
                );
            }
        }
        _ if port.get("endPort").is_some() => {
            causes.invalid(
                format!("{field}.endPort"),
                &port["endPort"],
                "may not be specified without a numeric port",
            );
        }
        _ => {}
    }
}

pub(super) fn ingress(ingress: &Value, causes: &mut Causes) {
    let rules = object::list(ingress, &["spec", "rules"]);
    let default = object::at(ingress, &["spec", "defaultBackend"]);
    if rules.is_empty() && default.is_none() {
        causes.invalid("spec", "", "either `defaultBackend` or `rules` must be specified");
    }
    if let Some(default) = default {
        ingress_backend("spec.defaultBackend", Some(default), causes);
    }
    let class = object::text(ingress, &["spec", "ingressClassName"]);
    if !class.is_empty() && !is_subdomain(class) {
        causes.invalid("spec.ingressClassName", class, "must be a lower case RFC 1123 subdomain");
    }
    for (index, tls) in object::list(ingress, &["spec", "tls"]).iter().enumerate() {
        for (number, host) in object::texts(tls, &["hosts"]).iter().enumerate() {
            ingress_host(format!("spec.tls[{index}].hosts[{number}]"), host, causes);
        }
    }
    for (index, rule) in rules.iter().enumerate() {
        let host = object::text(rule, &["host"]);
        if !host.is_empty() {
            ingress_host(format!("spec.rules[{index}].host"), host, causes);
        }
        let paths = object::list(rule, &["http", "paths"]);
        if object::at(rule, &["http"]).is_some() && paths.is_empty() {
            causes.required(format!("spec.rules[{index}].http.paths"), "");
        }
        for (number, path) in paths.iter().enumerate() {
            ingress_path(&format!("spec.rules[{index}].http.paths[{number}]"), path, causes);
        }
    }
}

fn ingress_host(field: String, host: &str, causes: &mut Causes) {
    if host.parse::<IpAddr>().is_ok() {
        causes.invalid(field, host, "must be a DNS name, not an IP address");
    } else if !is_subdomain(host.strip_prefix("*.").unwrap_or(host)) {
        causes.invalid(field, host, "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character");
    }
}

fn ingress_path(field: &str, path: &Value, causes: &mut Causes) {
    match object::text(path, &["pathType"]) {
        "" => causes.required(format!("{field}.pathType"), "pathType must be specified"),
        kind => {
            causes.one_of(format!("{field}.pathType"), kind, &["Exact", "ImplementationSpecific", "Prefix"])
        }
    }
    let specific = object::text(path, &["pathType"]) == "ImplementationSpecific";
    let text = object::text(path, &["path"]);
    if !text.starts_with('/') && (!specific || !text.is_empty()) {
        causes.invalid(format!("{field}.path"), text, "must be an absolute path");
    }
    let forbidden = ["//", "/./", "/../", "%2f", "%2F"];
    for part in forbidden.iter().filter(|part| !specific && text.contains(**part)) {
        causes.invalid(format!("{field}.path"), text, &format!("must not contain '{part}'"));
    }
    for end in ["/..", "/."].iter().filter(|end| !specific && text.ends_with(**end)) {
        causes.invalid(format!("{field}.path"), text, &format!("cannot end with '{end}'"));
    }
    ingress_backend(&format!("{field}.backend"), object::at(path, &["backend"]), causes);
}

/// Of a Service a name and one of number and name of a port; of another object neither.
fn ingress_backend(field: &str, backend: Option<&Value>, causes: &mut Causes) {
    let part = |name: &str| backend.and_then(|it| it.get(name)).filter(|it| !it.is_null());
    match (part("service"), part("resource")) {
        (Some(_), Some(_)) => {
            causes.invalid(field, "", "cannot set both resource and service backends");
        }
        (None, None) => causes.required(field, "must specify a service or resource backend"),
        (None, Some(_)) => {}
        (Some(service), None) => {
            let name = object::text(service, &["name"]);
            if name.is_empty() {
                causes.required(format!("{field}.service.name"), "");
            } else if !is_label(name) {
                causes.invalid(format!("{field}.service.name"), name, "must be a lower case RFC 1035 label");
            }
            let port = object::text(service, &["port", "name"]);
            match (port.is_empty(), object::at(service, &["port", "number"])) {
                (false, Some(_)) => causes.invalid(
                    format!("{field}.service.port"),
                    "",
                    "cannot set both port name & port number",
                ),
                (false, None) if !is_port_name(port) => {
                    causes.invalid(format!("{field}.service.port.name"), port, PORT_NAME_RULE);
                }
                (false, None) => {}
                (true, None) => {
                    causes.required(format!("{field}.service.port"), "port name or number is required")
                }
                (true, number) => port_number(&format!("{field}.service.port.number"), number, causes),
            }
        }
    }
}

/// A controller is a domain and a path, at most 250 bytes.
pub(super) fn ingress_class(class: &Value, causes: &mut Causes) {
    let controller = object::text(class, &["spec", "controller"]);
    let (domain, path) = controller.split_once('/').unwrap_or((controller, ""));
    if controller.is_empty() {
        causes.required("spec.controller", "");
    } else if controller.len() > 250 {
        causes.invalid("spec.controller", controller, "must be no more than 250 characters");
    } else if !is_subdomain(domain) || path.is_empty() {
        causes.invalid(
            "spec.controller",
            controller,
            "must be a domain-prefixed path (such as \"acme.io/foo\")",
        );
    }
}

/// What the types of core/v1 promise to hold.
pub(super) fn secret(secret: &Value, causes: &mut Causes) {
    let required: &[&str] = match object::text(secret, &["type"]) {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in required.iter().filter(|key| secret["data"].get(**key).is_none()) {
        causes.required(format!("data[{key}]"), "");
    }
}

pub(super) fn node(node: &Value, causes: &mut Causes) {
    for (index, text) in object::texts(node, &["spec", "podCIDRs"]).iter().enumerate() {
        range(&format!("spec.podCIDRs[{index}]"), text, causes);
    }
    let first = object::texts(node, &["spec", "podCIDRs"]).into_iter().next().unwrap_or_default();
    let one = object::text(node, &["spec", "podCIDR"]);
    if !one.is_empty() && one != first {
        causes.invalid("spec.podCIDR", one, "must be the first element of podCIDRs");
    }
}
