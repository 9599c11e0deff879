//! Kubernetes objects lowered to what Weft needs, validated: a value here is well-formed.
//! `netstack::kube` makes them; an object that cannot be lowered becomes a `Problem` instead.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use crate::balancer::{AnswersFor, Balancer};
use crate::ids::{NamespacedName, NodeName, PodKey, ServiceKey, SliceKey, WgPublicKey};
use crate::node_facts::LinkSubnets;

/// Without room for more: a big cluster has very many of these.
fn exact<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Ok(crate::exact(Vec::deserialize(deserializer)?))
}

pub type Labels = BTreeMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: NodeName,
    pub uid: String,
    /// `metadata.creationTimestamp`, seconds since the epoch; the older of two conflicting Nodes wins.
    pub created: i64,
    pub labels: Labels,
    /// `spec.podCIDRs`, at most one a family, in the Node's order.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.addresses` of type InternalIP, in order; at most one a family is used.
    pub internal_ips: Vec<IpAddr>,
    /// About to be removed: deleted, or tainted by the cluster autoscaler (KEP-3836).
    #[serde(default)]
    pub leaving: bool,
    /// `spec.unschedulable`: the node is about to be drained.
    #[serde(default)]
    pub cordoned: bool,
    /// Annotation `weft.network/links`; `None` for a node whose agent has not said.
    #[serde(default)]
    pub links: Option<LinkSubnets>,
    /// Annotation `weft.network/answers-for`.
    #[serde(default)]
    pub answers_for: AnswersFor,
    /// Condition Ready is False or Unknown: what its annotations say may be of yesterday.
    #[serde(default)]
    pub unready: bool,
    /// Annotation `weft.network/public-key`.
    pub public_key: Option<WgPublicKey>,
    /// Annotation `weft.network/next-public-key`: replaces `public_key` soon; peers accept both.
    #[serde(default)]
    pub next_public_key: Option<WgPublicKey>,
    /// Annotation `weft.network/wireguard-port`.
    pub wireguard_port: Option<u16>,
    #[serde(default)]
    pub reach: Reach,
}

/// What people and cloud providers say about the way to a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// `status.addresses` of type ExternalIP, in order.
    pub external_ips: Vec<IpAddr>,
    /// Annotation `weft.network/endpoint`.
    pub endpoint: Option<HostPort>,
    /// Annotation `weft.network/persistent-keepalive`: seconds after which this node sends something to each peer, so that
    /// a NAT before it stays open; 0 is never.
    pub keepalive_seconds: Option<u16>,
}

/// An address or a DNS name, with a port or without; as text `HOST`, `HOST:PORT`, `IPV6` or `[IPV6]:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPort {
    pub host: Host,
    pub port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Host {
    Address(IpAddr),
    Name(String),
}

impl FromStr for HostPort {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if let Ok(address) = text.parse() {
            return Ok(Self { host: Host::Address(address), port: None });
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            let port = Some(address.port()).filter(|port| *port != 0).ok_or(())?;
            return Ok(Self { host: Host::Address(address.ip()), port: Some(port) });
        }
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok().filter(|port| *port != 0).ok_or(())?)),
            None => (text, None),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        let is_label = |label: &str| {
            let inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            (1..=63).contains(&label.len()) && label.chars().all(inner)
        };
        // A last label of digits would be an address that cannot be read (RFC 1123, section 2.1).
        let numeric = name.rsplit('.').next().is_none_or(|last| last.chars().all(|c| c.is_ascii_digit()));
        let is_name = name.len() <= 253 && name.split('.').all(is_label) && !numeric;
        is_name.then(|| Self { host: Host::Name(name.to_ascii_lowercase()), port }).ok_or(())
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.port) {
            (Host::Address(address), Some(port)) => write!(f, "{}", SocketAddr::new(*address, port)),
            (Host::Address(address), None) => write!(f, "{address}"),
            (Host::Name(name), Some(port)) => write!(f, "{name}:{port}"),
            (Host::Name(name), None) => f.write_str(name),
        }
    }
}

impl Node {
    /// The first InternalIP of each family, IPv4 first.
    pub fn primary_ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let v4 = self.internal_ips.iter().copied().find(IpAddr::is_ipv4);
        let v6 = self.internal_ips.iter().copied().find(IpAddr::is_ipv6);
        v4.into_iter().chain(v6)
    }

    /// The `host` address of this family, where `other` speaks with this node in it: over IPv6 only where one of the two has no
    /// range of IPv4.
    pub fn host_for(&self, other: &Node, ipv6: bool) -> Option<IpAddr> {
        let host = |node: &Node, ipv6: bool| node.hosts().find(|host| host.is_ipv6() == ipv6);
        let over_v4 = host(other, false).is_some() && host(self, false).is_some();
        host(self, ipv6).filter(|_| !ipv6 || !over_v4)
    }

    /// The `host` address of each podCIDR, in their order.
    pub fn hosts(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.pod_cidrs.iter().filter_map(host_address)
    }
}

/// The `host` address of a podCIDR: its first usable one. `None` when the range is too small to hold pods beside it.
pub fn host_address(pod_cidr: &IpNet) -> Option<IpAddr> {
    match pod_cidr {
        IpNet::V4(net) if net.prefix_len() <= 30 => Some(IpAddr::V4((net.network().to_bits() + 1).into())),
        IpNet::V6(net) if net.prefix_len() <= 126 => Some(IpAddr::V6((net.network().to_bits() + 1).into())),
        _ => None,
    }
}

/// The `ingress` address of a podCIDR, on which the node's ingress listens: its second usable one. `None` where fewer than
/// eight addresses leave no room for it.
pub fn ingress_address(pod_cidr: &IpNet) -> Option<IpAddr> {
    match pod_cidr {
        IpNet::V4(net) if net.prefix_len() <= 29 => Some(IpAddr::V4((net.network().to_bits() + 2).into())),
        IpNet::V6(net) if net.prefix_len() <= 125 => Some(IpAddr::V6((net.network().to_bits() + 2).into())),
        _ => None,
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    pub name: String,
    pub labels: Labels,
}

/// A range that the API server allocates clusterIPs from (networking.k8s.io/v1 ServiceCIDR).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCidr {
    pub name: String,
    /// At most one a family.
    pub cidrs: Vec<IpNet>,
}

/// Text under names; only ConfigMaps that a domain reads are watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigMap {
    pub key: NamespacedName,
    pub data: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    pub key: PodKey,
    /// As the kubelet tells it to the container runtime: a mirror pod has its static pod's.
    pub uid: String,
    pub labels: Labels,
    pub node: Option<NodeName>,
    pub host_network: bool,
    pub ips: Vec<IpAddr>,
    pub hostname: Option<String>,
    pub subdomain: Option<String>,
    /// `status.phase` is Succeeded or Failed: its address may already belong to another pod.
    pub terminated: bool,
    /// Ports of its containers that have a name, for policies that speak of names.
    pub named_ports: Vec<NamedPort>,
    /// What its annotations limit.
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

/// Limits of a pod's rate in bits a second, counted from the pod: ingress is what it receives. `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    pub ingress_bits: Option<u64>,
    pub egress_bits: Option<u64>,
}

/// A named `containerPort`. One name may stand for several, in several containers or protocols.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamedPort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Lower-case name as nft and DNS SRV (`_tcp`) write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub key: ServiceKey,
    pub uid: String,
    pub created: i64,
    pub labels: Labels,
    pub kind: ServiceKind,
    #[serde(deserialize_with = "exact")]
    pub ports: Vec<ServicePort>,
    pub publish_not_ready_addresses: bool,
    pub internal_traffic_policy: TrafficPolicy,
    pub external_traffic_policy: TrafficPolicy,
    /// `sessionAffinity: ClientIP` with its timeout in seconds.
    pub session_affinity_seconds: Option<u32>,
    /// `status.loadBalancer.ingress[].ip` whose ipMode is VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; `None` lets every client in, and an entry that cannot be read lets nobody in.
    #[serde(default)]
    pub load_balancer_source_ranges: Option<Vec<IpNet>>,
    /// `spec.healthCheckNodePort` of a LoadBalancer whose externalTrafficPolicy is Local.
    #[serde(default)]
    pub health_check_node_port: Option<u16>,
    /// Of type LoadBalancer.
    #[serde(default)]
    pub balancer: Option<Box<Balancer>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceKind {
    /// ClusterIP, NodePort or LoadBalancer with these `clusterIPs`, at most one a family.
    ClusterIps(#[serde(deserialize_with = "exact")] Vec<IpAddr>),
    /// `clusterIP: None`.
    Headless,
    /// `type: ExternalName`; the name without a trailing dot.
    ExternalName(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty when the only port of the Service has no name.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    pub key: SliceKey,
    /// Label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: ServiceKey,
    /// `addressType` IPv4 or IPv6; FQDN slices are not lowered.
    pub ipv6: bool,
    #[serde(deserialize_with = "exact")]
    pub ports: Vec<EndpointPort>,
    #[serde(deserialize_with = "exact")]
    pub endpoints: Vec<Endpoint>,
    /// When the Service or pod changed that this slice follows, in milliseconds since the epoch: the annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub triggered_millis: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// `addresses[0]`: consumers use the first only (EndpointSlice API).
    pub address: IpAddr,
    /// `conditions.ready`; nil means ready.
    pub ready: bool,
    /// `conditions.serving`; nil means the same as ready (KEP-1672).
    pub serving: bool,
    pub terminating: bool,
    pub hostname: Option<Box<str>>,
    pub node: Option<NodeName>,
    /// `hints`; few endpoints have any.
    #[serde(default)]
    pub hints: Option<Box<Hints>>,
    pub target_pod: Option<PodKey>,
}

/// For whom an endpoint is meant; at least one of the two is not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// `forZones`.
    pub zones: BTreeSet<String>,
    /// `forNodes`.
    pub nodes: BTreeSet<NodeName>,
}

impl Hints {
    /// As an endpoint holds them: `None` where there are none.
    pub fn some(self) -> Option<Box<Self>> {
        (!self.zones.is_empty() || !self.nodes.is_empty()).then(|| Box::new(self))
    }
}
