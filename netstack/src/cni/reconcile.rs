//! Leases and the kernel brought together: after a restart of the agent, after a crash between two steps, after a
//! damaged Store. Idempotent; no operation runs meanwhile.
//!
//! ```text
//!  link of a pod that ended    -> deleted (the agent died between DEL's answer and this)
//!  lease without link          -> released (the pod is gone)
//!  link without lease, routed  -> lease rebuilt from its host routes
//!  link without lease or route -> deleted (an ADD that died early; its pod was never told an address)
//!  lease with link             -> host side made complete, rate limits as the Pod asks for them now
//!  all live leases             -> table weft-cni
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::objects::Bandwidth;

use super::attachment::{AttachError, ensure_host_routes, ensure_host_side, host_route};
use super::node::NodeView;
use super::{Cni, locked};
use crate::kernel::link::Link;
use crate::kernel::route::LinkRoute;
use crate::kernel::rtnl::Rtnl;
use crate::reconcile::chain;
use crate::store::{Boottime, HostPort, Lease, LeaseRecords};

/// What [`Cni::reconcile`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Addresses whose link is gone.
    pub released: Vec<IpAddr>,
    /// Addresses found on links that had no lease.
    pub rebuilt: Vec<IpAddr>,
    /// Links whose host side was not what it should be.
    pub completed: Vec<String>,
    /// Links that belonged to nothing.
    pub removed_links: Vec<String>,
    /// Links whose rate limits were not what they should be.
    pub limited: Vec<String>,
    /// Changes to table `weft-cni`.
    pub rules: Vec<String>,
    /// One line each; the next call tries again.
    pub failed: Vec<String>,
}

impl Cni {
    /// To be called before the first request is served, and again whenever the Node's addresses change.
    pub async fn reconcile(&self) -> Reconciled {
        let _nothing_else = self.locks.everything().await;
        let mut done = Reconciled::default();
        // Of an agent that was killed before.
        done.failed.extend(self.sweep().await.err().map(|error| chain(&error)));
        match self.observe().await {
            Err(error) => done.failed.push(error),
            Ok((mut leases, links, routes)) => {
                let routed = links.iter().map(|link| (link.name.clone(), routed_to(link, &routes))).collect();
                self.reconcile_leases(&mut leases, &routed, &mut done).await;
                self.complete_host_sides(&leases, &links, &routes, &mut done);
                let (limited, failed) = self.reconcile_limits(&live_links(&leases), &links).await;
                done.limited = limited;
                done.failed.extend(failed);
                match locked(&self.rules).ensure(&leases) {
                    Ok(changes) => done.rules = changes,
                    Err(error) => done.failed.push(chain(&error)),
                }
            }
        }
        done
    }

    /// All leases, every pod link, every route of ours.
    async fn observe(&self) -> Result<(LeaseRecords, Vec<Link>, Vec<LinkRoute>), String> {
        let leases = Arc::unwrap_or_clone(self.leases.records());
        let links = self.pod_links().await.map_err(|error| chain(&error))?;
        let routes = self.host_routes().await.map_err(|error| chain(&error))?;
        Ok((leases, links, routes))
    }

    async fn reconcile_leases(
        &self,
        leases: &mut LeaseRecords,
        links: &BTreeMap<String, Vec<IpAddr>>,
        done: &mut Reconciled,
    ) {
        let mut changes = BTreeMap::new();
        let mut ended = LeaseRecords::new();
        let now = Boottime::now();
        for (address, lease) in leases.iter_mut().filter(|(_, lease)| lease.released.is_none()) {
            if !links.contains_key(&lease.link) {
                lease.released = Some(now);
                done.released.push(*address);
                ended.insert(*address, lease.clone());
                changes.insert(*address, Some(lease.clone()));
            }
        }
        let leased: BTreeSet<String> = leases
            .values()
            .filter(|lease| lease.released.is_none())
            .map(|lease| lease.link.clone())
            .collect();
        let strays: Vec<_> = links.iter().filter(|(link, _)| !leased.contains(*link)).collect();
        let mut host_ports = if strays.is_empty() { BTreeMap::new() } else { self.known_host_ports(done) };
        for (link, addresses) in strays {
            for address in addresses {
                let host_ports = host_ports.remove(address).unwrap_or_default();
                let lease = Lease { host_ports, ..rebuilt(link) };
                leases.insert(*address, lease.clone());
                changes.insert(*address, Some(lease));
                done.rebuilt.push(*address);
            }
            if addresses.is_empty() {
                self.remove_orphan(link, done).await;
            }
        }
        self.forget_rules_and_flows(&ended);
        if let Err(error) = self.leases.write(&changes) {
            done.failed.push(chain(&error));
        }
        self.tell_attachments(&locked(&self.ipam));
    }

    /// What the kernel still leads to pods, by their address.
    fn known_host_ports(&self, done: &mut Reconciled) -> BTreeMap<IpAddr, Vec<HostPort>> {
        locked(&self.rules).host_ports().unwrap_or_else(|error| {
            done.failed.push(chain(&error));
            BTreeMap::new()
        })
    }

    async fn remove_orphan(&self, link: &str, done: &mut Reconciled) {
        match self.links().delete(link).await {
            Ok(_) => done.removed_links.push(link.to_owned()),
            Err(error) => done.failed.push(chain(&error)),
        }
    }

    /// Without the Node's own addresses the routes' sources are unknown, and what stands is better than a guess.
    fn complete_host_sides(
        &self,
        leases: &LeaseRecords,
        links: &[Link],
        routes: &[LinkRoute],
        done: &mut Reconciled,
    ) {
        let Some(node) = self.snapshot().and_then(|snapshot| self.node_view(&snapshot).ok()) else { return };
        for (name, leases) in live_links(leases) {
            let link = links.iter().find(|link| link.name == name);
            if link.is_some_and(|link| is_complete(link, &leases, routes, &node)) {
                continue;
            }
            let complete = || {
                let host = Rtnl::open().map_err(AttachError::Socket)?;
                let index = ensure_host_side(&host, &name, &leases)?;
                Ok::<_, AttachError>(ensure_host_routes(&host, index, &leases, &node)?)
            };
            match complete() {
                Ok(()) => done.completed.push(name),
                Err(error) => done.failed.push(chain(&error)),
            }
        }
    }
}

/// The routes are made last, so a link that has them all is whole.
fn is_complete(link: &Link, leases: &LeaseRecords, routes: &[LinkRoute], node: &NodeView) -> bool {
    let wanted = |address: &IpAddr| host_route(link.index, *address, node);
    link.up && leases.keys().all(|address| routes.contains(&wanted(address)))
}

fn live_links(leases: &LeaseRecords) -> BTreeMap<String, LeaseRecords> {
    let mut links = BTreeMap::<_, LeaseRecords>::new();
    for (address, lease) in leases.iter().filter(|(_, lease)| lease.released.is_none()) {
        links.entry(lease.link.clone()).or_default().insert(*address, lease.clone());
    }
    links
}

/// Addresses that the host routes to this link: whole addresses only.
fn routed_to(link: &Link, routes: &[LinkRoute]) -> Vec<IpAddr> {
    let whole = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let here = routes.iter().filter(|route| route.link_index == link.index && whole(&route.destination));
    here.map(|route| route.destination.addr()).collect()
}

/// The runtime's names are lost; the link's name, which is made of them, is enough for DEL and GC.
fn rebuilt(link: &str) -> Lease {
    Lease {
        container_id: String::new(),
        ifname: String::new(),
        netns: String::new(),
        pod: None,
        pod_uid: String::new(),
        link: link.to_owned(),
        host_ports: Vec::new(),
        bandwidth: Bandwidth::default(),
        released: None,
    }
}
