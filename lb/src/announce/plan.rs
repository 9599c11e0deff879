//! Which nodes may answer for which address. In: a Snapshot. Out: every announced address with its candidates in order. Pure.
//!
//! Only addresses of pools, or that Weft gave from one, are announced: those of nodes are answered for anyhow, and what others wrote
//! into a status is not ours.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use weft_model::balancer::{AddressPool, L2Advertisement};
use weft_model::node_facts::LinkSubnets;
use weft_model::objects::{Node, Service};
use weft_model::{NodeName, ObjectRef, Planned, Problem, Reason, Snapshot};
use weft_netstack::reconcile::Planner;

use super::{Announced, Means, Peer, Plan};
use crate::allocate::{former_pool, service_ref};
use crate::nodes::{reluctant, with_endpoints};
use crate::own::OwnServices;
use crate::pools::Pools;

#[derive(Default)]
pub struct AnnouncePlanner {
    services: OwnServices,
}

impl Planner for AnnouncePlanner {
    type Plan = Plan;
    const FOLLOWS_ATTACHED_PODS: bool = false;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<Plan> {
        self.services.follow(snapshot);
        plan_of(&self.services, snapshot)
    }
}

pub fn plan(snapshot: &Snapshot) -> Planned<Plan> {
    plan_of(&OwnServices::of(snapshot), snapshot)
}

fn plan_of(services: &OwnServices, snapshot: &Snapshot) -> Planned<Plan> {
    // The allocation tells what is wrong with pools.
    let pools = Pools::of(snapshot, &mut Vec::new());
    let mut serving: BTreeMap<IpAddr, Vec<(&Arc<Service>, String)>> = BTreeMap::new();
    for (service, balancer) in services.iter() {
        for ip in service.load_balancer_ips.iter().filter(|ip| pools.node_of(**ip).is_none()) {
            let pool = pools.holding(*ip).map(|pool| pool.object.key.name.to_string());
            if let Some(pool) = pool.or_else(|| former_pool(balancer, *ip)) {
                serving.entry(*ip).or_default().push((service, pool));
            }
        }
    }
    let addresses = BTreeMap::new();
    let mut plan = Plan { node: snapshot.facts.name.clone(), peers: peers(snapshot), addresses };
    for (ip, services) in serving {
        let advertised = Advertised::of(snapshot, pools.named(&services[0].1).map(|pool| &pool.object));
        if let Some(advertised) = advertised {
            plan.addresses.insert(ip, announced(ip, &services, &advertised, snapshot));
        }
    }
    let mut problems = interfaces_that_are_not_there(snapshot);
    problems.extend(out_of_reach(&plan));
    Planned::new(plan, problems)
}

/// Addresses that this node is the first to answer for, and no link of it holds.
fn out_of_reach(plan: &Plan) -> impl Iterator<Item = Problem> {
    let mine = plan.addresses.iter().filter(|(_, announced)| {
        announced.links.is_empty() && announced.candidates.first() == Some(&plan.node)
    });
    mine.flat_map(|(ip, announced)| announced.services.iter().map(move |service| (ip, service))).map(|(ip, service)| {
        let message = format!(
            "status.loadBalancer.ingress {ip} is on no subnet of Node {}, which is to answer for it, so nobody does; take \
             addresses of the LAN into the IPAddressPool, or leave the node out with spec.nodeSelectors of an L2Advertisement",
            plan.node
        );
        Problem::new(service_ref(service), Reason::Missing, message)
    })
}

/// Why no node's links hold an address of a pool, if none do, by what the nodes say of them.
pub(crate) fn unreached(snapshot: &Snapshot, pools: &Pools, ip: IpAddr, pool: &str) -> Option<String> {
    let advertised = Advertised::of(snapshot, pools.named(pool).map(|pool| &pool.object))?;
    let mut selected = snapshot.nodes.values().filter(|node| advertised.lets(node)).peekable();
    let is_selected = selected.peek().is_some();
    if snapshot.nodes.is_empty() || selected.any(|node| advertised.reaches_by(node, node.links.as_ref(), ip))
    {
        return None;
    }
    let names: Vec<String> = advertised.0.iter().map(|one| one.key.to_string()).collect();
    let names = names.join(", ");
    Some(if !is_selected {
        format!(
            "spec.nodeSelectors of L2Advertisement {names} match no Node, so nobody answers for {ip}; correct them"
        )
    } else if advertised.0.iter().any(|one| !one.interfaces.is_empty()) {
        format!(
            "spec.interfaces of L2Advertisement {names} name on no Node a link with the subnet of {ip}, so nobody answers for it; \
             correct them, or take addresses of the LAN into IPAddressPool {pool}"
        )
    } else {
        format!(
            "{ip} is on no subnet of any Node's links, so nobody answers for it; take addresses of the LAN into IPAddressPool {pool}"
        )
    })
}

/// Who advertises a pool.
struct Advertised<'a>(Vec<&'a Arc<L2Advertisement>>);

impl<'a> Advertised<'a> {
    /// `None` when nobody is to answer for it. In a cluster without any L2Advertisement every pool is advertised everywhere, and so
    /// is a pool that is gone.
    fn of(snapshot: &'a Snapshot, pool: Option<&Arc<AddressPool>>) -> Option<Self> {
        let Some(pool) = pool.filter(|_| !snapshot.l2_advertisements.is_empty()) else {
            return Some(Self(Vec::new()));
        };
        let selects = |one: &&Arc<L2Advertisement>| {
            let all = one.pools.is_empty() && one.pool_selectors.is_empty();
            let by_labels = one.pool_selectors.iter().any(|selector| selector.matches(&pool.labels));
            all || one.pools.contains(&*pool.key.name) || by_labels
        };
        let selecting: Vec<_> = snapshot.l2_advertisements.values().filter(selects).collect();
        (!selecting.is_empty()).then_some(Self(selecting))
    }

    fn lets(&self, node: &Node) -> bool {
        self.0.is_empty() || self.0.iter().any(|one| is_for(one, Some(node)))
    }

    /// A link of it that may be used holds the subnet. A node that has not said what its links hold may.
    fn reaches(&self, node: &Arc<Node>, ip: IpAddr, snapshot: &Snapshot) -> bool {
        let own = (node.name == snapshot.facts.name).then(|| snapshot.facts.link_subnets());
        self.reaches_by(node, own.as_ref().or(node.links.as_ref()), ip)
    }

    fn reaches_by(&self, node: &Arc<Node>, links: Option<&LinkSubnets>, ip: IpAddr) -> bool {
        links.is_none_or(|links| {
            let mut holding = links.0.iter().filter(|(_, net)| net.contains(&ip));
            holding.any(|(link, _)| self.lets_link(Some(node), link))
        })
    }

    /// On a node with these labels.
    fn lets_link(&self, node: Option<&Arc<Node>>, link: &str) -> bool {
        let mut here = self.0.iter().filter(|one| is_for(one, node.map(Arc::as_ref)));
        self.0.is_empty() || here.any(|one| one.interfaces.is_empty() || one.interfaces.contains(link))
    }
}

/// Without selectors it is for every node.
fn is_for(one: &L2Advertisement, node: Option<&Node>) -> bool {
    let selects = |node: &Node| one.node_selectors.iter().any(|selector| selector.matches(&node.labels));
    one.node_selectors.is_empty() || node.is_some_and(selects)
}

fn announced(
    ip: IpAddr,
    services: &[(&Arc<Service>, String)],
    advertised: &Advertised<'_>,
    snapshot: &Snapshot,
) -> Announced {
    let selected: Vec<&Arc<Node>> = snapshot.nodes.values().filter(|node| advertised.lets(node)).collect();
    let reaching = |node: &&Arc<Node>| advertised.reaches(node, ip, snapshot);
    let nodes: Vec<&Arc<Node>> = match selected.iter().copied().filter(reaching).collect::<Vec<_>>() {
        // The first says that it is out of reach.
        none if none.is_empty() => selected,
        some => some,
    };
    let local: Vec<BTreeSet<NodeName>> =
        services.iter().filter_map(|(service, _)| with_endpoints(service, snapshot)).collect();
    // A node that serves all of them, if there is one; else one that serves some.
    let serves_all = |node: &&Arc<Node>| local.iter().all(|names| names.contains(&node.name));
    let serves_some =
        |node: &&Arc<Node>| local.is_empty() || local.iter().any(|names| names.contains(&node.name));
    let of_all: Vec<&Arc<Node>> = nodes.iter().copied().filter(serves_all).collect();
    let mut able: Vec<&Arc<Node>> =
        if of_all.is_empty() { nodes.into_iter().filter(serves_some).collect() } else { of_all };
    able.sort_by_cached_key(|node| {
        (reluctant(node), std::cmp::Reverse(weight(ip, &node.name)), node.name.clone())
    });
    let candidates = able.into_iter().map(|node| node.name.clone()).collect();
    let own = snapshot.own_node();
    let links = snapshot.facts.uplinks.iter().filter(|link| {
        link.subnets.iter().any(|net| net.contains(&ip)) && advertised.lets_link(own, &link.name)
    });
    Announced {
        services: services.iter().map(|(service, _)| service.key.clone()).collect(),
        means: Means::Layer2,
        candidates,
        links: links.map(|link| (link.name.clone(), link.index)).collect(),
    }
}

/// Rendezvous hashing: a node that comes or goes moves only the addresses that it wins or had.
fn weight(ip: IpAddr, node: &NodeName) -> [u8; 32] {
    Sha256::digest(format!("{ip} {node}")).into()
}

/// The other nodes that have a key (others are not in the overlay yet), each at the first of its `host` addresses.
fn peers(snapshot: &Snapshot) -> BTreeMap<NodeName, Peer> {
    let others = snapshot.nodes.values().filter(|node| node.name != snapshot.facts.name);
    let in_overlay = others.filter(|node| node.public_key.is_some());
    in_overlay
        .filter_map(|node| {
            let overlay = node.hosts().next()?;
            Some((node.name.clone(), Peer { overlay, lan: node.primary_ips().collect() }))
        })
        .collect()
}

fn interfaces_that_are_not_there(snapshot: &Snapshot) -> Vec<Problem> {
    let own = snapshot.own_node();
    let mut problems = Vec::new();
    for one in snapshot.l2_advertisements.values() {
        let here = is_for(one, own.map(Arc::as_ref));
        let there = |name: &str| snapshot.facts.uplinks.iter().any(|link| link.name == name);
        if here && !one.interfaces.is_empty() && !one.interfaces.iter().any(|name| there(name)) {
            let names: Vec<&str> = one.interfaces.iter().map(String::as_str).collect();
            problems.push(Problem::new(
                ObjectRef::new("L2Advertisement", &one.key.namespace, &one.key.name),
                Reason::Missing,
                format!(
                    "spec.interfaces {} is on Node {} neither up nor has it an address; correct it, or leave the node out \
                     with spec.nodeSelectors",
                    names.join(", "),
                    snapshot.facts.name
                ),
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests;
