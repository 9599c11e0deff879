//! What policies mean, once: whom a peer means, which ports, and what all policies of one pod allow in one direction. Pure;
//! plan, judge and explanation ask here.
//!
//! A [`Side`] is a list of what is allowed; whatever is in no list is denied. Tiers with an order and a deny of their own
//! would be several Sides asked one after the other.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weft_model::objects::{Pod, Protocol};
use weft_model::policy::{NetworkPolicy, Peer, PolicyPort, PolicyRule, Ports, Selector};
use weft_model::{NamespacedName, PolicyKey, SharedMap};

use super::directory::{Directory, Subject};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub(super) const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    pub(super) fn rules(self, policy: &NetworkPolicy) -> Option<&Vec<PolicyRule>> {
        match self {
            Self::Ingress => policy.ingress.as_ref(),
            Self::Egress => policy.egress.as_ref(),
        }
    }
}

/// A peer that stands for itself: it no longer depends on whose policy it is in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PeerKey {
    Pods { namespaces: Namespaces, pods: Selector },
    Block { cidr: IpNet, except: Vec<IpNet> },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Namespaces {
    One(String),
    Selected(Selector),
}

impl PeerKey {
    fn of(peer: &Peer, own_namespace: &str) -> Self {
        match peer {
            Peer::Block { cidr, except } => Self::Block { cidr: *cidr, except: except.clone() },
            Peer::Pods { namespaces, pods } => Self::Pods {
                namespaces: match namespaces {
                    None => Namespaces::One(own_namespace.to_owned()),
                    Some(selector) => Namespaces::Selected(selector.clone()),
                },
                pods: pods.clone(),
            },
        }
    }

    /// Whether this peer means the address, whose bearers these are.
    pub(super) fn means(&self, address: IpAddr, bearers: &[&Arc<Pod>], directory: &Directory) -> bool {
        match self {
            Self::Pods { namespaces, pods } => {
                let meant = |pod: &&Arc<Pod>| {
                    namespaces.select(&pod.key.namespace, directory) && pods.matches(&pod.labels)
                };
                match directory.has_several_names(address) {
                    true => bearers.iter().any(meant),
                    false => !bearers.is_empty() && bearers.iter().all(meant),
                }
            }
            Self::Block { cidr, except } => {
                let covers = |ip: &IpAddr| cidr.contains(ip) && !except.iter().any(|net| net.contains(ip));
                let host = directory.place.hosts.get(&address);
                covers(&address) || host.is_some_and(|node| node.iter().any(covers))
            }
        }
    }
}

impl Namespaces {
    pub(super) fn select(&self, namespace: &str, directory: &Directory) -> bool {
        match self {
            Self::One(name) => name == namespace,
            Self::Selected(selector) => {
                directory.namespace_labels(namespace).is_some_and(|labels| selector.matches(labels))
            }
        }
    }
}

/// Ports of one rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PortSet {
    pub exact: BTreeSet<(Protocol, u16)>,
    pub ranges: BTreeSet<(Protocol, u16, u16)>,
    pub protocols: BTreeSet<Protocol>,
    /// Names that the destination resolves: of egress rules only, those of ingress rules are exact by now.
    pub named: BTreeSet<(Protocol, String)>,
}

/// So many ports of a range are listed one by one, which costs a look-up in place of a comparison a range.
const LISTED_PORTS: u16 = 16;

impl PortSet {
    /// `resolver` is the pod that is connected to, where that is known: it knows the numbers of names.
    fn of(ports: &[PolicyPort], resolver: Option<&Pod>) -> Self {
        let mut set = Self::default();
        for PolicyPort { protocol, ports } in ports {
            match (ports, resolver) {
                (Ports::All, _) => drop(set.protocols.insert(*protocol)),
                (Ports::Range(first, last), _) if last - first < LISTED_PORTS => {
                    set.exact.extend((*first..=*last).map(|port| (*protocol, port)));
                }
                (Ports::Range(first, last), _) => drop(set.ranges.insert((*protocol, *first, *last))),
                (Ports::Named(name), Some(pod)) => set.exact.extend(numbers(pod, *protocol, name)),
                (Ports::Named(name), None) => drop(set.named.insert((*protocol, name.clone()))),
            }
        }
        set
    }

    /// Whether the port is one of these, not counting names.
    fn has(&self, protocol: Protocol, port: u16) -> bool {
        self.exact.contains(&(protocol, port))
            || self.protocols.contains(&protocol)
            || self.ranges.iter().any(|(p, first, last)| *p == protocol && (*first..=*last).contains(&port))
    }
}

/// What the pod calls so.
fn numbers(pod: &Pod, protocol: Protocol, name: &str) -> impl Iterator<Item = (Protocol, u16)> {
    let named = pod.named_ports.iter().filter(move |port| port.protocol == protocol && port.name == name);
    named.map(|port| (port.protocol, port.port))
}

/// What all bearers of an address call by one of these names.
pub(super) fn named_numbers(
    names: &BTreeSet<(Protocol, String)>,
    bearers: &[&Arc<Pod>],
) -> BTreeSet<(Protocol, u16)> {
    let of = |pod: &Pod| -> BTreeSet<(Protocol, u16)> {
        names.iter().flat_map(|(protocol, name)| numbers(pod, *protocol, name)).collect()
    };
    let mut all = bearers.iter().map(|pod| of(pod));
    let first = all.next().unwrap_or_default();
    all.fold(first, |common, of_one| common.intersection(&of_one).copied().collect())
}

/// One rule of one policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Allow {
    pub policy: PolicyKey,
    /// Its place in `spec.ingress` or `spec.egress`.
    pub index: usize,
    /// `None`: everybody.
    pub peers: Option<Vec<PeerKey>>,
    /// `None`: everything.
    pub ports: Option<PortSet>,
}

/// The other end of a packet, as the subject sees it, and the port that is connected to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Other<'a> {
    pub address: IpAddr,
    pub bearers: &'a [&'a Arc<Pod>],
    /// IANA number.
    pub protocol: u8,
    pub port: u16,
}

impl Allow {
    pub(super) fn means(&self, other: &Other<'_>, directory: &Directory) -> bool {
        self.peers
            .as_ref()
            .is_none_or(|peers| peers.iter().any(|peer| peer.means(other.address, other.bearers, directory)))
    }

    pub(super) fn has_port(&self, other: &Other<'_>) -> bool {
        let Some(ports) = &self.ports else { return true };
        let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let Some(protocol) = known.into_iter().find(|known| known.number() == other.protocol) else {
            return false;
        };
        ports.has(protocol, other.port)
            || named_numbers(&ports.named, other.bearers).contains(&(protocol, other.port))
    }
}

/// All that policies say about one direction of one pod; there is none where no policy is about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Side {
    /// Those that isolate, in order.
    pub policies: Vec<PolicyKey>,
    pub allows: Vec<Allow>,
    /// Every one of them lets established connections end by themselves.
    pub keep_established: bool,
}

impl Side {
    pub(super) fn of(direction: Direction, subject: &Subject<'_>, policies: &Policies<'_>) -> Option<Self> {
        let mut side = Self { keep_established: true, ..Self::default() };
        match subject {
            Subject::Nobody => {}
            Subject::Known(pod) => {
                let of_pod = policies.of(Some(&pod.key.namespace));
                for policy in of_pod.filter(|policy| policy.subject.matches(&pod.labels)) {
                    side.add(direction, policy, Some(pod));
                }
            }
            Subject::Unknown(namespace) => {
                policies.of(*namespace).for_each(|policy| side.add(direction, policy, None));
            }
        }
        (!side.policies.is_empty()).then_some(side)
    }

    /// Without the pod, whom the policy may not even select, it only isolates.
    fn add(&mut self, direction: Direction, policy: &NetworkPolicy, pod: Option<&Arc<Pod>>) {
        let Some(rules) = direction.rules(policy) else { return };
        self.policies.push(policy.key.clone());
        self.keep_established &= policy.keep_established;
        let Some(pod) = pod else { return };
        let resolver = (direction == Direction::Ingress).then_some(pod.as_ref());
        self.allows.extend(rules.iter().enumerate().map(|(index, rule)| {
            let peer = |peer: &Peer| PeerKey::of(peer, &policy.key.namespace);
            Allow {
                policy: policy.key.clone(),
                index,
                peers: rule.peers.as_ref().map(|peers| peers.iter().map(peer).collect()),
                ports: rule.ports.as_ref().map(|ports| PortSet::of(ports, resolver)),
            }
        }));
    }

    pub(super) fn allows(&self, other: &Other<'_>, directory: &Directory) -> bool {
        self.allowing(other, directory).is_some()
    }

    /// The first rule that allows it.
    pub(super) fn allowing(&self, other: &Other<'_>, directory: &Directory) -> Option<&Allow> {
        self.allows.iter().find(|allow| allow.has_port(other) && allow.means(other, directory))
    }
}

/// All policies, by namespace.
pub(super) struct Policies<'a>(pub &'a SharedMap<PolicyKey, Arc<NetworkPolicy>>);

impl<'a> Policies<'a> {
    /// Those of one namespace, or of all.
    fn of(&self, namespace: Option<&str>) -> impl Iterator<Item = &'a NetworkPolicy> {
        let from = NamespacedName::new(namespace.unwrap_or_default(), "");
        let namespace = namespace.map(str::to_owned);
        let here = move |key: &PolicyKey| namespace.as_ref().is_none_or(|name| *key.namespace == **name);
        self.0.range(from..).take_while(move |(key, _)| here(key)).map(|(_, policy)| policy.as_ref())
    }
}
