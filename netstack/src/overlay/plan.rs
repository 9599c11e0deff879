//! From Nodes to peers, routes, rules and the host's table. Pure.
//!
//! Traffic classes (decision 5):
//!
//! ```text
//!  pod or host -> remote pod      main: podCIDR dev weft0 src HOST
//!  pod -> remote node address     rule from own podCIDR -> TUNNEL_TABLE: address dev weft0
//!  host -> remote node address    main, never the tunnel
//!  anything else in a pod range   unreachable
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use weft_model::constants::{
    TUNNEL_LINK, TUNNEL_RULE_PRIORITY, TUNNEL_TABLE, UNREACHABLE_METRIC, WIREGUARD_OVERHEAD_BYTES,
};
use weft_model::node_facts::WireguardBackend;
use weft_model::objects::Node;
use weft_model::problem::Planned;
use weft_model::route::{Route, RouteTarget, SourceRule};
use weft_model::ruleset::{Passage, Table};
use weft_model::wireguard::{WireguardPeer, WireguardPlan};
use weft_model::{NodeName, ObjectRef, Problem, Reason, Snapshot};

use super::cluster_dns::Resolvers;
use super::endpoints::{self, Here};
use super::quarantine::{self, Accepted, problem};
use super::rules;
use super::standing::intruders;
use crate::reconcile::Planner;

/// Least MTU of a link that carries IPv6 (RFC 8200, section 5).
const MIN_MTU_BYTES: u32 = 1280;

/// The whole desired state of the overlay on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayPlan {
    pub backend: WireguardBackend,
    pub wireguard: WireguardPlan,
    /// Of the tunnel device.
    pub mtu_bytes: u32,
    /// On the tunnel device, /32 and /128.
    pub host_addresses: Vec<IpNet>,
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<SourceRule>,
    pub table: Table,
    /// Nodes whose resolvers answer for this node's when it gives no sign of life.
    pub stand_ins: BTreeSet<NodeName>,
    /// What other programs' firewalls must let through.
    pub passages: Vec<Passage>,
    /// In order; those of the tunnel device follow its creation.
    pub sysctls: Vec<Sysctl>,
    pub link_sysctls: Vec<Sysctl>,
}

/// A file under /proc/sys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// With `/`: `net/ipv4/ip_forward`.
    pub name: String,
    pub value: String,
    /// Change it only when it holds this.
    pub only_if: Option<String>,
}

impl Sysctl {
    fn new(name: impl Into<String>, value: &str) -> Self {
        Self { name: name.into(), value: value.to_owned(), only_if: None }
    }
}

#[derive(Debug)]
pub struct OverlayPlanner {
    /// Whether pods pass the firewalls of other programs (decision 3).
    pub open_firewalls: bool,
}

impl Planner for OverlayPlanner {
    type Plan = OverlayPlan;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<OverlayPlan> {
        let (accepted, mut problems) = quarantine::accept(snapshot.nodes.values(), &snapshot.config);
        problems.extend(intruders(snapshot).map(|(route, what)| {
            Problem::new(ObjectRef::new("Route", "", route.to_string()), Reason::Conflict, what)
        }));
        let view = View::new(snapshot, &accepted, &mut problems);
        let wireguard = view.wireguard(&mut problems);
        let hosts: Vec<IpAddr> = view.hosts.iter().map(|(_, host)| *host).collect();
        let peers = view.others().filter(|other| other.node.public_key.is_some());
        let resolvers = Resolvers::new(&snapshot.config, &hosts, &snapshot.facts.name, peers);
        let plan = OverlayPlan {
            backend: snapshot.facts.wireguard_backend,
            mtu_bytes: mtu_bytes(snapshot),
            host_addresses: view.link_addresses(),
            routes: view.routes(&wireguard),
            rules: view.rules(),
            table: rules::table(&snapshot.config, &accepted, &view.own_pod_cidrs(), &resolvers),
            stand_ins: resolvers.stand_ins(),
            passages: if self.open_firewalls {
                rules::passages(&snapshot.config, &hosts)
            } else {
                Vec::new()
            },
            sysctls: view.sysctls(),
            link_sysctls: view.link_sysctls(),
            wireguard,
        };
        Planned::new(plan, problems)
    }
}

/// The Snapshot from this node's point of view.
struct View<'a> {
    snapshot: &'a Snapshot,
    accepted: &'a [Accepted<'a>],
    own: Option<&'a Accepted<'a>>,
    /// Own podCIDRs with their host address.
    hosts: Vec<(IpNet, IpAddr)>,
    families: Families,
}

/// Families in which this node has pods; before that is known, those of the cluster.
#[derive(Clone, Copy)]
struct Families {
    ipv4: bool,
    ipv6: bool,
}

impl Families {
    fn of(cidrs: &[IpNet]) -> Self {
        let ipv4 = cidrs.iter().any(|cidr| cidr.addr().is_ipv4());
        Self { ipv4, ipv6: cidrs.iter().any(|cidr| cidr.addr().is_ipv6()) }
    }

    fn holds(self, address: IpAddr) -> bool {
        if address.is_ipv4() { self.ipv4 } else { self.ipv6 }
    }
}

impl<'a> View<'a> {
    fn new(snapshot: &'a Snapshot, accepted: &'a [Accepted<'a>], problems: &mut Vec<Problem>) -> Self {
        let own = accepted.iter().find(|accepted| accepted.node.name == snapshot.facts.name);
        let mut hosts = Vec::new();
        for (node, cidr) in own.iter().flat_map(|own| own.pod_cidrs.iter().map(|cidr| (own.node, cidr))) {
            match weft_model::objects::host_address(cidr) {
                Some(host) => hosts.push((*cidr, host)),
                None => problems.push(problem(
                    node,
                    Reason::InvalidField,
                    format!("spec.podCIDRs: {cidr} is too small: at least four addresses are needed"),
                )),
            }
        }
        let known: Vec<IpNet> = hosts.iter().map(|(cidr, _)| *cidr).collect();
        let families = Families::of(if known.is_empty() { &snapshot.config.cluster_cidrs } else { &known });
        Self { snapshot, accepted, own, hosts, families }
    }

    fn own_pod_cidrs(&self) -> Vec<IpNet> {
        self.hosts.iter().map(|(cidr, _)| *cidr).collect()
    }

    /// The host addresses, and those of the ingress, unless a pod of an earlier version has one of these.
    fn link_addresses(&self) -> Vec<IpNet> {
        let hosts = self.hosts.iter().map(|(_, host)| IpNet::from(*host));
        let ours = self.hosts.iter().filter(|_| self.snapshot.config.ingress.on);
        let ingress = ours.filter_map(|(cidr, _)| weft_model::objects::ingress_address(cidr));
        let free = ingress.filter(|address| !self.snapshot.attachments.contains_key(address));
        hosts.chain(free.map(IpNet::from)).collect()
    }

    fn others(&self) -> impl Iterator<Item = &'a Accepted<'a>> {
        let own = &self.snapshot.facts.name;
        self.accepted.iter().filter(move |accepted| accepted.node.name != *own)
    }

    fn port(&self, node: &Node) -> u16 {
        node.wireguard_port.unwrap_or(self.snapshot.config.wireguard_port)
    }

    fn wireguard(&self, problems: &mut Vec<Problem>) -> WireguardPlan {
        let listen_port = self.own.map_or(self.snapshot.config.wireguard_port, |own| self.port(own.node));
        let own_keys = self.own.map(|own| quarantine::keys(own.node).collect()).unwrap_or_default();
        let uplinks = &self.snapshot.facts.uplinks;
        let own_addresses = uplinks.iter().flat_map(|uplink| uplink.addresses.clone()).collect();
        let mut plan = WireguardPlan { listen_port, own_keys, own_addresses, peers: BTreeMap::new() };
        let here = Here::of(self.snapshot);
        for other in self.others() {
            let Some(key) = other.node.public_key else { continue };
            let endpoints = endpoints::endpoints(&here, other, problems);
            if endpoints.is_empty() {
                let message = "shares no address family with this node: it can only be reached once it calls";
                problems.push(problem(other.node, Reason::Missing, message.to_owned()));
            }
            problems.extend(self.narrow_path(other.node).map(|bytes| {
                let message = format!(
                    "packets of more than {bytes} bytes get lost on the way from {} to it, so pods here send smaller ones there; let \
                     fragments and ICMP through between the two, or lower the MTU of this node's link",
                    self.snapshot.facts.name
                );
                problem(other.node, Reason::Degraded, message)
            }));
            let addresses = other.addresses.iter().map(|address| IpNet::from(*address));
            let mut allowed_ips: Vec<IpNet> = other.pod_cidrs.iter().copied().chain(addresses).collect();
            allowed_ips.sort();
            let node = other.node.name.to_string();
            let next_key = other.node.next_public_key.filter(|next| *next != key);
            let keepalive_seconds = endpoints::keepalive_seconds(&here, &endpoints);
            let mut addresses = endpoints.iter().map(|endpoint| endpoint.address);
            let peer = WireguardPeer {
                node,
                next_key,
                endpoint: addresses.next(),
                other_endpoints: addresses.collect(),
                allowed_ips,
                keepalive_seconds,
            };
            plan.peers.insert(key, peer);
        }
        plan
    }

    fn routes(&self, wireguard: &WireguardPlan) -> BTreeSet<Route> {
        let mut routes = BTreeSet::new();
        let config = &self.snapshot.config;
        let ranges = config.cluster_cidrs.iter().map(IpNet::trunc).chain(self.own_pod_cidrs());
        routes.extend(ranges.map(|range| unreachable(range, None)));
        routes.extend(config.resolver_addresses().map(|address| Route {
            destination: IpNet::from(address),
            table: None,
            target: RouteTarget::Local,
            source: None,
            metric: None,
            mtu_bytes: None,
        }));
        for other in self.others() {
            let peer = other.node.public_key.is_some_and(|key| wireguard.peers.contains_key(&key));
            let narrow = self.narrow_path(other.node);
            for address in &other.addresses {
                let destination = IpNet::from(*address);
                routes.insert(unreachable(destination, Some(TUNNEL_TABLE)));
                if peer {
                    routes.insert(through_tunnel(destination, Some(TUNNEL_TABLE), None, narrow));
                }
            }
            for cidr in other.pod_cidrs.iter().filter(|_| peer) {
                let host = self.hosts.iter().map(|(_, host)| *host);
                let source = host.into_iter().find(|host| host.is_ipv4() == cidr.addr().is_ipv4());
                routes.insert(through_tunnel(*cidr, None, source, narrow));
            }
        }
        routes.retain(|route| self.families.holds(route.destination.addr()));
        routes
    }

    /// Of a path that carries less than the device.
    fn narrow_path(&self, node: &Node) -> Option<u32> {
        self.snapshot.facts.observed.narrow_paths.get(&node.name).copied()
    }

    fn rules(&self) -> BTreeSet<SourceRule> {
        let rule = |source| SourceRule { source, table: TUNNEL_TABLE, priority: TUNNEL_RULE_PRIORITY };
        self.own_pod_cidrs().into_iter().map(rule).collect()
    }

    /// Router advertisements first: the moment forwarding is on, the kernel forgets routes it learned from them
    /// unless `accept_ra` is 2 (ip-sysctl.rst).
    fn sysctls(&self) -> Vec<Sysctl> {
        let mut sysctls = Vec::new();
        if self.families.ipv4 {
            sysctls.push(Sysctl::new("net/ipv4/ip_forward", "1"));
        }
        if self.families.ipv6 {
            for uplink in &self.snapshot.facts.uplinks {
                let name = format!("net/ipv6/conf/{}/accept_ra", uplink.name);
                sysctls.push(Sysctl { only_if: Some("1".to_owned()), ..Sysctl::new(name, "2") });
            }
            sysctls.push(Sysctl::new("net/ipv6/conf/all/forwarding", "1"));
        }
        sysctls
    }

    /// Loose source check: what another node's host answers to a pod comes from its node address, whose route is the
    /// underlay. No link-local address: nobody beyond the tunnel would hear it.
    fn link_sysctls(&self) -> Vec<Sysctl> {
        let name = |family: &str, key: &str| format!("net/{family}/conf/{TUNNEL_LINK}/{key}");
        let mut sysctls = Vec::new();
        if self.families.ipv4 {
            sysctls.push(Sysctl::new(name("ipv4", "rp_filter"), "2"));
        }
        if self.families.ipv6 {
            sysctls.push(Sysctl::new(name("ipv6", "disable_ipv6"), "0"));
            sysctls.push(Sysctl::new(name("ipv6", "addr_gen_mode"), "1"));
            sysctls.push(Sysctl::new(name("ipv6", "accept_ra"), "0"));
        }
        sysctls
    }
}

/// Of the tunnel's device, and of new pods: the underlay's less what WireGuard adds.
pub fn mtu_bytes(snapshot: &Snapshot) -> u32 {
    let own: Vec<IpAddr> = snapshot.own_node().map(|node| node.primary_ips().collect()).unwrap_or_default();
    let underlay = snapshot.facts.underlay_mtu_bytes(&own);
    underlay.saturating_sub(WIREGUARD_OVERHEAD_BYTES).max(MIN_MTU_BYTES)
}

fn unreachable(destination: IpNet, table: Option<u32>) -> Route {
    let metric = Some(UNREACHABLE_METRIC);
    Route { destination, table, target: RouteTarget::Unreachable, source: None, metric, mtu_bytes: None }
}

/// `narrow` is what its path carries; IPv6 knows no less than 1280.
fn through_tunnel(
    destination: IpNet,
    table: Option<u32>,
    source: Option<IpAddr>,
    narrow: Option<u32>,
) -> Route {
    let target = RouteTarget::Link(TUNNEL_LINK.to_owned());
    let least = if destination.addr().is_ipv6() { MIN_MTU_BYTES } else { 0 };
    let mtu_bytes = narrow.map(|bytes| bytes.max(least));
    Route { destination, table, target, source, metric: None, mtu_bytes }
}

#[cfg(test)]
pub(super) mod tests;
