//! Where a peer may be called, best first, and whether a NAT before this node is to be kept open for it. Pure.
//!
//! Which of the endpoints carries the traffic is found out by calling: whoever answers with the peer's key is the peer.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use weft_model::constants::ANNOTATION_ENDPOINT;
use weft_model::objects::{Host, Node};
use weft_model::wireguard::{PeerCandidate, PeerStatus, PeerView};
use weft_model::{Problem, Reason, Snapshot};

use super::quarantine::{self, Accepted, problem};

/// Behind every NAT that people have, this is often enough (RFC 4787, REQ-5: two minutes, in practice 30 seconds).
const KEEPALIVE_SECONDS: u16 = 25;

/// In the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An address in a subnet of one of this node's own links.
    SameSubnet,
    Annotation,
    InternalIp,
    ExternalIp,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameSubnet => "same subnet",
            Self::Annotation => "annotation",
            Self::InternalIp => "InternalIP",
            Self::ExternalIp => "ExternalIP",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    pub kind: Kind,
    pub address: SocketAddr,
}

/// Endpoints of `other` that this node has the family for, none twice.
pub(super) fn endpoints(here: &Here<'_>, other: &Accepted<'_>, problems: &mut Vec<Problem>) -> Vec<Endpoint> {
    let node = other.node;
    let port = node.wireguard_port.unwrap_or(here.snapshot.config.wireguard_port);
    let said = annotated(here, node, problems);
    let said_port = node.reach.endpoint.as_ref().and_then(|endpoint| endpoint.port).unwrap_or(port);
    let external = node.reach.external_ips.iter().copied();
    let external = quarantine::outside(&here.ranges, node, "ExternalIP", external, problems);
    let all = said.into_iter().map(|address| (Kind::Annotation, address, said_port));
    let all = all.chain(other.addresses.iter().map(|address| (Kind::InternalIp, *address, port)));
    let all = all.chain(external.into_iter().map(|address| (Kind::ExternalIp, address, port)));
    let mut endpoints: Vec<Endpoint> = Vec::new();
    for (kind, address, port) in all.filter(|(_, address, _)| here.may_call(*address)) {
        let kind = if here.holds(address) { Kind::SameSubnet } else { kind };
        let endpoint = Endpoint { kind, address: SocketAddr::new(address, port) };
        if endpoints.iter().all(|known| known.address != endpoint.address) {
            endpoints.push(endpoint);
        }
    }
    // Stable: of one kind IPv4 first, as they came.
    endpoints.sort_by_key(|endpoint| endpoint.kind);
    endpoints
}

/// What the annotation of `node` says, as addresses.
fn annotated(here: &Here<'_>, node: &Node, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let Some(said) = &node.reach.endpoint else { return Vec::new() };
    let addresses = match &said.host {
        Host::Address(address) => vec![*address],
        Host::Name(name) => here.snapshot.facts.observed.names.get(name).cloned().unwrap_or_else(|| {
            let message = format!(
                "annotation {ANNOTATION_ENDPOINT}: {name} cannot be resolved on this node so far; the Node's own addresses are called"
            );
            problems.push(problem(node, Reason::Missing, message));
            Vec::new()
        }),
    };
    let what = format!("annotation {ANNOTATION_ENDPOINT}:");
    quarantine::outside(&here.ranges, node, &what, addresses, problems)
}

/// Where this node is.
pub(super) struct Here<'a> {
    snapshot: &'a Snapshot,
    /// Of pods and Services.
    ranges: Vec<IpNet>,
    /// Of the uplinks; where they are not known those of the own Node.
    addresses: Vec<IpAddr>,
}

impl<'a> Here<'a> {
    pub(super) fn of(snapshot: &'a Snapshot) -> Self {
        let mut addresses: Vec<IpAddr> =
            snapshot.facts.uplinks.iter().flat_map(|uplink| uplink.addresses.clone()).collect();
        if addresses.is_empty() {
            addresses = snapshot.own_node().map(|node| node.internal_ips.clone()).unwrap_or_default();
        }
        Self { snapshot, ranges: snapshot.config.ranges(), addresses }
    }

    /// In a family of this node, and not its own address or that of the NAT which it shares with the peer.
    fn may_call(&self, address: IpAddr) -> bool {
        let external = self.snapshot.own_node().map(|node| node.reach.external_ips.as_slice());
        let own = self.addresses.contains(&address) || external.unwrap_or_default().contains(&address);
        let family = self.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4());
        !own && (family || self.addresses.is_empty())
    }

    fn holds(&self, address: IpAddr) -> bool {
        let mut subnets = self.snapshot.facts.uplinks.iter().flat_map(|uplink| &uplink.subnets);
        subnets.any(|subnet| subnet.contains(&address))
    }
}

/// Seconds between what this node sends to a peer to keep a NAT open: where its own addresses of the endpoint's family are
/// all private and the endpoint is not, there is one between. What the own Node's annotation says comes first.
pub(super) fn keepalive_seconds(here: &Here<'_>, endpoints: &[Endpoint]) -> Option<u16> {
    if let Some(said) = here.snapshot.own_node().and_then(|node| node.reach.keepalive_seconds) {
        return Some(said).filter(|seconds| *seconds > 0);
    }
    let near = endpoints.first().is_none_or(|first| first.kind == Kind::SameSubnet);
    let translated = |endpoint: &Endpoint| {
        let address = endpoint.address.ip();
        let mut own = here.addresses.iter().filter(|own| own.is_ipv4() == address.is_ipv4()).peekable();
        !is_private(address) && own.peek().is_some() && own.all(|own| is_private(*own))
    };
    (!near && endpoints.iter().any(translated)).then_some(KEEPALIVE_SECONDS)
}

/// Not routed in the internet: RFC 1918, RFC 6598 (carriers' NAT), RFC 3927, RFC 4193.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            v4.is_private() || v4.is_link_local() || (a == 100 && (64..128).contains(&b))
        }
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

/// For people: the peers, each with the name of its Node and where it may be called from here.
pub fn explain(snapshot: Option<&Snapshot>, peers: Vec<PeerStatus>) -> Vec<PeerView> {
    let unknown = |status| PeerView { status, node: None, candidates: Vec::new(), narrow_path_bytes: None };
    let Some(snapshot) = snapshot else { return peers.into_iter().map(unknown).collect() };
    let (accepted, _) = quarantine::accept(snapshot.nodes.values(), &snapshot.config);
    let by_key: BTreeMap<_, _> =
        accepted.iter().filter_map(|other| Some((other.node.public_key?, other))).collect();
    let here = Here::of(snapshot);
    let view = |status: PeerStatus| {
        let Some(other) = by_key.get(&status.public_key) else { return unknown(status) };
        let endpoints = endpoints(&here, other, &mut Vec::new()).into_iter();
        let candidate = |of: Endpoint| PeerCandidate { endpoint: of.address, kind: of.kind.to_string() };
        PeerView {
            status,
            node: Some(other.node.name.to_string()),
            candidates: endpoints.map(candidate).collect(),
            narrow_path_bytes: snapshot.facts.observed.narrow_paths.get(&other.node.name).copied(),
        }
    };
    peers.into_iter().map(view).collect()
}

#[cfg(test)]
mod tests;
