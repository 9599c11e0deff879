//! Lowering: one JSON object in, a validated value of `weft_model::objects` and Problems out. Pure.
//!
//! A field that does not hold what its type promises is left out and named; only an object whose JSON has the wrong
//! shape, or without its identity, is refused whole.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde_json::Value;
use weft_model::constants::{
    ANNOTATION_ANSWERS_FOR, ANNOTATION_ENDPOINT, ANNOTATION_KEEPALIVE, ANNOTATION_LINKS,
    ANNOTATION_NEXT_PUBLIC_KEY, ANNOTATION_PUBLIC_KEY, ANNOTATION_WIREGUARD_PORT,
};
use weft_model::objects::{
    Bandwidth, ConfigMap, Endpoint, EndpointPort, EndpointSlice, Hints, NamedPort, Namespace, Node, Pod,
    Protocol, Reach, Service, ServiceCidr, ServiceKind, ServicePort, TrafficPolicy,
};
use weft_model::{NamespacedName, NodeName, ObjectRef, Problem, Reason};

use super::wire;

mod balancer;
mod ingress;
mod policy;
mod quantity;

pub use balancer::{address_pool, l2_advertisement};
pub use ingress::{ingress, ingress_class, referred};
pub use policy::network_policy;

/// Label of an EndpointSlice that names its Service (discovery.k8s.io/v1).
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Annotation of an EndpointSlice: when what it follows changed. Only a metric depends on it, so that it may be unreadable.
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Annotation that the kubelet gives the mirror of a static pod: the static pod's uid.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds` (core/v1).
const AFFINITY_SECONDS: u32 = 10_800;

/// Taint of a node that the cluster autoscaler is about to remove (KEP-3836).
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// What became of one object: `None` when it is refused (then there is a problem) or is none of our business (an
/// EndpointSlice of host names).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lowered<T> {
    pub value: Option<T>,
    pub problems: Vec<Problem>,
}

pub fn node(document: &Value) -> Lowered<Node> {
    lower("Node", document, |wire: wire::Node, notes| {
        let meta = wire.metadata;
        let cidrs = wire.spec.pod_cidrs.or_else(|| wire.spec.pod_cidr.map(|cidr| vec![cidr]));
        let pod_cidrs = notes.cidrs("spec.podCIDRs", &cidrs.unwrap_or_default());
        let addresses = wire.status.addresses.unwrap_or_default();
        let mut of_kind = |kind| {
            let of_kind = addresses.iter().enumerate().filter(|(_, address)| address.kind == kind);
            of_kind
                .filter_map(|(i, address)| {
                    notes.ip(&format!("status.addresses[{i}].address"), &address.address)
                })
                .collect()
        };
        let (internal_ips, external_ips) = (of_kind("InternalIP"), of_kind("ExternalIP"));
        let annotations = meta.annotations.unwrap_or_default();
        let mut taints = wire.spec.taints.iter().flatten();
        let mut conditions = wire.status.conditions.iter().flatten();
        Some(Node {
            leaving: meta.deletion_timestamp.is_some()
                || taints.any(|taint| taint.key == TO_BE_DELETED_TAINT),
            cordoned: wire.spec.unschedulable.unwrap_or(false),
            links: notes.annotation(&annotations, ANNOTATION_LINKS),
            answers_for: notes.annotation(&annotations, ANNOTATION_ANSWERS_FOR).unwrap_or_default(),
            unready: conditions.any(|condition| condition.kind == "Ready" && condition.status != "True"),
            public_key: notes.annotation(&annotations, ANNOTATION_PUBLIC_KEY),
            next_public_key: notes.annotation(&annotations, ANNOTATION_NEXT_PUBLIC_KEY),
            wireguard_port: notes.annotation(&annotations, ANNOTATION_WIREGUARD_PORT),
            reach: Reach {
                external_ips,
                endpoint: notes.wish(&annotations, ANNOTATION_ENDPOINT, "edge1.example.org:51820"),
                keepalive_seconds: notes.wish(&annotations, ANNOTATION_KEEPALIVE, "25"),
            },
            name: NodeName(meta.name.into()),
            uid: meta.uid.unwrap_or_default(),
            created: notes.created(meta.creation_timestamp.as_deref()),
            labels: meta.labels.unwrap_or_default(),
            pod_cidrs,
            internal_ips,
        })
    })
}

pub fn config_map(document: &Value) -> Lowered<ConfigMap> {
    lower("ConfigMap", document, |wire: wire::ConfigMap, _| {
        Some(ConfigMap { key: key(&wire.metadata), data: wire.data.unwrap_or_default() })
    })
}

pub fn namespace(document: &Value) -> Lowered<Namespace> {
    lower("Namespace", document, |wire: wire::Namespace, _| {
        Some(Namespace { name: wire.metadata.name, labels: wire.metadata.labels.unwrap_or_default() })
    })
}

pub fn service_cidr(document: &Value) -> Lowered<ServiceCidr> {
    lower("ServiceCIDR", document, |wire: wire::ServiceCidr, notes| {
        let cidrs = notes.cidrs("spec.cidrs", &wire.spec.cidrs.unwrap_or_default());
        Some(ServiceCidr { name: wire.metadata.name, cidrs })
    })
}

pub fn pod(document: &Value) -> Lowered<Pod> {
    lower("Pod", document, |mut wire: wire::Pod, notes| {
        let status = wire.status;
        let listed: Vec<String> = status.pod_ips.unwrap_or_default().into_iter().map(|ip| ip.ip).collect();
        let texts = if listed.is_empty() { status.pod_ip.into_iter().collect() } else { listed };
        let non_empty = |text: Option<String>| text.filter(|text| !text.is_empty());
        let annotations = wire.metadata.annotations.take().unwrap_or_default();
        let mirrored = annotations.get(MIRROR_ANNOTATION).cloned();
        let containers = wire.spec.containers.unwrap_or_default();
        let init_containers = wire.spec.init_containers.unwrap_or_default();
        Some(Pod {
            key: key(&wire.metadata),
            ips: notes.ips("status.podIPs", &texts),
            uid: mirrored.or(wire.metadata.uid).unwrap_or_default(),
            named_ports: named_ports(containers, init_containers, notes),
            bandwidth: Bandwidth {
                ingress_bits: notes.bandwidth(&annotations, "kubernetes.io/ingress-bandwidth"),
                egress_bits: notes.bandwidth(&annotations, "kubernetes.io/egress-bandwidth"),
            },
            labels: wire.metadata.labels.unwrap_or_default(),
            node: node_name(wire.spec.node_name),
            host_network: wire.spec.host_network.unwrap_or(false),
            hostname: non_empty(wire.spec.hostname),
            subdomain: non_empty(wire.spec.subdomain),
            terminated: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        })
    })
}

/// Of the containers, and of those that start before them and stay (sidecars, KEP-753).
fn named_ports(
    containers: Vec<wire::Container>,
    init_containers: Vec<wire::Container>,
    notes: &mut Notes,
) -> Vec<NamedPort> {
    let sidecar = |container: &wire::Container| container.restart_policy.as_deref() == Some("Always");
    let all = containers.into_iter().chain(init_containers.into_iter().filter(sidecar));
    let ports = all.flat_map(|container| container.ports.unwrap_or_default());
    let mut named: Vec<NamedPort> = ports
        .filter_map(|port| {
            let name = port.name.filter(|name| !name.is_empty())?;
            let field = format!("the container port {name:?}");
            let protocol = notes.protocol(&field, port.protocol)?;
            Some(NamedPort { port: notes.port(&field, port.container_port)?, name, protocol })
        })
        .collect();
    named.sort();
    named.dedup();
    named
}

pub fn service(document: &Value) -> Lowered<Service> {
    lower("Service", document, |wire: wire::Service, notes| {
        let kind = service_kind(&wire.spec, notes)?;
        let balancer = balancer::balancer(&wire.metadata, &wire.spec, &wire.status, notes).map(Box::new);
        let node_ports = matches!(wire.spec.kind.as_deref(), Some("NodePort" | "LoadBalancer"));
        let spec = wire.spec;
        let load_balancer = spec.kind.as_deref() == Some("LoadBalancer");
        let ingress = wire.status.load_balancer.and_then(|status| status.ingress).unwrap_or_default();
        let vips: Vec<String> = ingress
            .into_iter()
            .filter(|ingress| load_balancer && ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
            .filter_map(|ingress| ingress.ip)
            .collect();
        let source_ranges =
            spec.load_balancer_source_ranges.filter(|ranges| load_balancer && !ranges.is_empty());
        let external_traffic_policy =
            notes.policy("spec.externalTrafficPolicy", spec.external_traffic_policy);
        let health_checked = load_balancer && external_traffic_policy == TrafficPolicy::Local;
        let health_check = spec.health_check_node_port.filter(|port| health_checked && *port != 0);
        Some(Service {
            key: key(&wire.metadata),
            uid: wire.metadata.uid.unwrap_or_default(),
            created: notes.created(wire.metadata.creation_timestamp.as_deref()),
            labels: wire.metadata.labels.unwrap_or_default(),
            kind,
            ports: exact(service_ports(spec.ports.unwrap_or_default(), node_ports, notes).into_iter()),
            publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or(false),
            internal_traffic_policy: notes.policy("spec.internalTrafficPolicy", spec.internal_traffic_policy),
            external_traffic_policy,
            session_affinity_seconds: affinity(spec.session_affinity, spec.session_affinity_config, notes),
            load_balancer_ips: notes.ips("status.loadBalancer.ingress", &vips),
            external_ips: notes.ips("spec.externalIPs", &spec.external_ips.unwrap_or_default()),
            load_balancer_source_ranges: source_ranges.map(|ranges| notes.source_ranges(&ranges)),
            health_check_node_port: health_check
                .and_then(|port| notes.port("spec.healthCheckNodePort", port)),
            balancer,
        })
    })
}

fn service_kind(spec: &wire::ServiceSpec, notes: &mut Notes) -> Option<ServiceKind> {
    match spec.kind.as_deref() {
        Some("ExternalName") => {
            let name = spec.external_name.as_deref().unwrap_or_default().trim_end_matches('.');
            if name.is_empty() {
                notes.invalid("spec.externalName is empty; give the name that clients are to be sent to");
                return None;
            }
            return Some(ServiceKind::ExternalName(name.to_owned()));
        }
        None | Some("ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some(other) => {
            notes.invalid(format!(
                "spec.type {other:?} is unknown; use ClusterIP, NodePort, LoadBalancer or ExternalName"
            ));
            return None;
        }
    }
    let single = spec.cluster_ip.iter().filter(|ip| !ip.is_empty()).cloned();
    let texts = match &spec.cluster_ips {
        Some(texts) if !texts.is_empty() => texts.clone(),
        _ => single.collect(),
    };
    if texts.first().is_some_and(|text| text == "None") {
        return Some(ServiceKind::Headless);
    }
    let ips = notes.ips("spec.clusterIPs", &texts);
    Some(ServiceKind::ClusterIps(exact(
        notes.one_a_family("spec.clusterIPs", ips, IpAddr::is_ipv6).into_iter(),
    )))
}

fn service_ports(ports: Vec<wire::ServicePort>, node_ports: bool, notes: &mut Notes) -> Vec<ServicePort> {
    let mut seen = BTreeSet::new();
    let mut lowered = Vec::new();
    for (i, port) in ports.into_iter().enumerate() {
        let field = format!("spec.ports[{i}]");
        let (Some(protocol), Some(number)) =
            (notes.protocol(&field, port.protocol), notes.port(&format!("{field}.port"), port.port))
        else {
            continue;
        };
        if !seen.insert((number, protocol)) {
            notes.invalid(format!("{field} repeats port {number} of {protocol:?}; remove one of the two"));
            continue;
        }
        let node_port = port.node_port.filter(|number| *number != 0 && node_ports);
        lowered.push(ServicePort {
            name: port.name.unwrap_or_default(),
            protocol,
            port: number,
            node_port: node_port.and_then(|number| notes.port(&format!("{field}.nodePort"), number)),
        });
    }
    lowered
}

fn affinity(
    affinity: Option<String>,
    config: Option<wire::SessionAffinityConfig>,
    notes: &mut Notes,
) -> Option<u32> {
    if affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let seconds = config.and_then(|config| config.client_ip).and_then(|config| config.timeout_seconds);
    let Some(seconds) = seconds else {
        return Some(AFFINITY_SECONDS);
    };
    // core/v1: more than 0, at most a day.
    let valid = u32::try_from(seconds).ok().filter(|seconds| (1..=86_400).contains(seconds));
    if valid.is_none() {
        notes.invalid(format!(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds {seconds} is outside 1 to 86400; \
             {AFFINITY_SECONDS} is used until it is corrected"
        ));
    }
    Some(valid.unwrap_or(AFFINITY_SECONDS))
}

pub fn endpoint_slice(document: &Value) -> Lowered<EndpointSlice> {
    lower("EndpointSlice", document, |wire: wire::EndpointSlice, notes| {
        let ipv6 = match wire.address_type.as_str() {
            "IPv4" => false,
            "IPv6" => true,
            "FQDN" => return None,
            other => {
                notes.invalid(format!("addressType {other:?} is unknown; use IPv4 or IPv6"));
                return None;
            }
        };
        let service = wire.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
        let key = key(&wire.metadata);
        let triggered = wire.metadata.annotations.as_ref().and_then(|all| all.get(TRIGGER_ANNOTATION));
        let triggered = triggered.and_then(|text| text.parse::<jiff::Timestamp>().ok());
        let ports = wire.ports.unwrap_or_default();
        let endpoints = wire.endpoints.unwrap_or_default();
        Some(EndpointSlice {
            service: NamespacedName::new(&key.namespace, service),
            ipv6,
            ports: exact(ports.into_iter().enumerate().filter_map(|(i, port)| endpoint_port(i, port, notes))),
            endpoints: exact(
                endpoints
                    .into_iter()
                    .enumerate()
                    .filter_map(|(i, endpoint)| self::endpoint(i, endpoint, ipv6, &key.namespace, notes)),
            ),
            triggered_millis: triggered.map(jiff::Timestamp::as_millisecond),
            key,
        })
    })
}

/// Without room for more: what is lowered stays as it is.
fn exact<T>(items: impl Iterator<Item = T>) -> Vec<T> {
    weft_model::exact(items.collect())
}

/// A port without a number (the Service's target has none) is no port to send to.
fn endpoint_port(i: usize, port: wire::EndpointPort, notes: &mut Notes) -> Option<EndpointPort> {
    let field = format!("ports[{i}]");
    let number = notes.port(&format!("{field}.port"), port.port?)?;
    let protocol = notes.protocol(&field, port.protocol)?;
    Some(EndpointPort { name: port.name.unwrap_or_default(), protocol, port: number })
}

fn endpoint(
    i: usize,
    endpoint: wire::Endpoint,
    ipv6: bool,
    namespace: &str,
    notes: &mut Notes,
) -> Option<Endpoint> {
    let field = format!("endpoints[{i}].addresses[0]");
    let Some(text) = endpoint.addresses.unwrap_or_default().into_iter().next() else {
        notes.invalid(format!("endpoints[{i}].addresses is empty; give the endpoint an address"));
        return None;
    };
    let address = notes.ip(&field, &text)?;
    if address.is_ipv6() != ipv6 {
        notes.invalid(format!(
            "{field} {address} is not of the slice's addressType; move it to a slice that is"
        ));
        return None;
    }
    let conditions = endpoint.conditions.unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let hints = endpoint.hints.unwrap_or_default();
    let target = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
    Some(Endpoint {
        address,
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        hostname: endpoint.hostname.filter(|name| !name.is_empty()).map(String::into_boxed_str),
        node: node_name(endpoint.node_name),
        hints: Hints {
            zones: names(hints.for_zones),
            nodes: names(hints.for_nodes).into_iter().map(|name| NodeName(name.into())).collect(),
        }
        .some(),
        target_pod: target.and_then(|target| {
            let namespace = target.namespace.unwrap_or_else(|| namespace.to_owned());
            Some(NamespacedName::new(namespace, target.name?))
        }),
    })
}

fn node_name(name: Option<String>) -> Option<NodeName> {
    name.filter(|name| !name.is_empty()).map(|name| NodeName(name.into()))
}

fn names(hints: Option<Vec<wire::Hint>>) -> BTreeSet<String> {
    hints.unwrap_or_default().into_iter().map(|hint| hint.name).filter(|name| !name.is_empty()).collect()
}

fn key(meta: &wire::Meta) -> NamespacedName {
    NamespacedName::new(meta.namespace.clone().unwrap_or_default(), &meta.name)
}

/// Reads the wire form, then lowers it with `build`.
fn lower<W, T>(kind: &str, document: &Value, build: impl FnOnce(W, &mut Notes) -> Option<T>) -> Lowered<T>
where
    W: DeserializeOwned,
{
    let text = |field: &str| document["metadata"][field].as_str().unwrap_or_default().to_owned();
    let mut notes =
        Notes { object: ObjectRef::new(kind, text("namespace"), text("name")), problems: Vec::new() };
    let value = match W::deserialize(document) {
        Ok(wire) => build(wire, &mut notes),
        Err(error) => {
            notes.invalid(format!("the object cannot be read ({error}); correct that field"));
            None
        }
    };
    Lowered { value, problems: notes.problems }
}

/// Collects the problems of one object.
struct Notes {
    object: ObjectRef,
    problems: Vec<Problem>,
}

impl Notes {
    fn invalid(&mut self, message: impl Into<String>) {
        self.problems.push(Problem::new(self.object.clone(), Reason::InvalidField, message));
    }

    fn ip(&mut self, field: &str, text: &str) -> Option<IpAddr> {
        let Ok(ip) = text.parse::<IpAddr>() else {
            self.invalid(format!("{field} {text:?} is not an IP address; correct it"));
            return None;
        };
        if !usable(ip) {
            self.invalid(format!("{field} {ip} is no unicast address of a network; give a routable one"));
            return None;
        }
        Some(ip)
    }

    fn ips(&mut self, field: &str, texts: &[String]) -> Vec<IpAddr> {
        texts.iter().enumerate().filter_map(|(i, text)| self.ip(&format!("{field}[{i}]"), text)).collect()
    }

    fn cidrs(&mut self, field: &str, texts: &[String]) -> Vec<IpNet> {
        let mut cidrs = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            match text.parse::<IpNet>() {
                Ok(cidr) => cidrs.push(cidr.trunc()),
                Err(_) => self.invalid(format!("{field}[{i}] {text:?} is not a CIDR; correct it")),
            }
        }
        self.one_a_family(field, cidrs, |cidr| cidr.addr().is_ipv6())
    }

    /// An entry that cannot be read admits nobody (the API allows blanks around one).
    fn source_ranges(&mut self, texts: &[String]) -> Vec<IpNet> {
        let mut ranges = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            match text.trim().parse::<IpNet>() {
                Ok(range) => ranges.push(range.trunc()),
                Err(_) => self.invalid(format!(
                    "spec.loadBalancerSourceRanges[{i}] {text:?} is not a CIDR, so it lets nobody in; correct it"
                )),
            }
        }
        ranges
    }

    /// Keeps the first of each family.
    fn one_a_family<T: std::fmt::Display>(
        &mut self,
        field: &str,
        values: Vec<T>,
        is_ipv6: impl Fn(&T) -> bool,
    ) -> Vec<T> {
        let mut seen = BTreeSet::new();
        let mut kept = Vec::new();
        for value in values {
            if seen.insert(is_ipv6(&value)) {
                kept.push(value);
            } else {
                self.invalid(format!("{field} holds a second {value} of one family; keep one a family"));
            }
        }
        kept
    }

    fn port(&mut self, field: &str, number: i64) -> Option<u16> {
        let port = u16::try_from(number).ok().filter(|port| *port != 0);
        if port.is_none() {
            self.invalid(format!("{field} {number} is no port; use 1 to 65535"));
        }
        port
    }

    fn protocol(&mut self, field: &str, text: Option<String>) -> Option<Protocol> {
        match text.as_deref() {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(other) => {
                self.invalid(format!("{field}.protocol {other:?} is unknown; use TCP, UDP or SCTP"));
                None
            }
        }
    }

    fn policy(&mut self, field: &str, text: Option<String>) -> TrafficPolicy {
        match text.as_deref() {
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some("Local") => TrafficPolicy::Local,
            Some(other) => {
                self.invalid(format!(
                    "{field} {other:?} is unknown; Cluster is used until it is Cluster or Local"
                ));
                TrafficPolicy::Cluster
            }
        }
    }

    fn annotation<T: std::str::FromStr>(&mut self, annotations: &wire::Strings, name: &str) -> Option<T> {
        let text = annotations.get(name)?;
        self.readable(name, text, text.parse().ok(), "; remove it, the node's agent writes it anew")
    }

    /// An annotation that people write.
    fn wish<T: std::str::FromStr>(
        &mut self,
        annotations: &wire::Strings,
        name: &str,
        example: &str,
    ) -> Option<T> {
        let text = annotations.get(name)?;
        let remedy = format!(", so it is ignored; write for example {example:?}");
        self.readable(name, text, text.trim().parse().ok(), &remedy)
    }

    fn readable<T>(&mut self, name: &str, text: &str, parsed: Option<T>, remedy: &str) -> Option<T> {
        if parsed.is_none() {
            self.invalid(format!("annotation {name} {text:?} cannot be read{remedy}"));
        }
        parsed
    }

    /// Bits a second, within what the kubelet accepts.
    fn bandwidth(&mut self, annotations: &wire::Strings, name: &str) -> Option<u64> {
        const SLOWEST: u64 = 1_000;
        const FASTEST: u64 = 1_000_000_000_000_000;
        let text = annotations.get(name)?;
        let bits = quantity::whole(text).filter(|bits| (SLOWEST..=FASTEST).contains(bits));
        if bits.is_none() {
            self.invalid(format!(
                "annotation {name} {text:?} is no rate from 1k to 1P bits a second, so nothing is limited; write for example 10M"
            ));
        }
        bits
    }

    /// Seconds since the epoch; an object without a readable time counts as the youngest of all.
    fn created(&mut self, text: Option<&str>) -> i64 {
        let Some(text) = text else {
            return i64::MAX;
        };
        match text.parse::<jiff::Timestamp>() {
            Ok(time) => time.as_second(),
            Err(_) => {
                self.invalid(format!(
                    "metadata.creationTimestamp {text:?} is no RFC 3339 time; recreate the object"
                ));
                i64::MAX
            }
        }
    }
}

/// What the Kubernetes API accepts as an endpoint: no unspecified, loopback, link-local, multicast or IPv4-mapped address.
fn usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            !(ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip.is_broadcast())
        }
        IpAddr::V6(ip) => {
            !(ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_unicast_link_local()
                || ip.is_multicast()
                || ip.to_ipv4_mapped().is_some())
        }
    }
}

#[cfg(test)]
mod tests;
