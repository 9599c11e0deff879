//! What ADD must know of this node, taken from the Snapshot at one moment.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::Snapshot;
use weft_plugin::wire::{CniError, Code};

use super::Cni;
use crate::store::LeaseRecords;

/// The node as ADD sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeView {
    /// At most one a family, the primary one first.
    pub(super) pod_cidrs: Vec<IpNet>,
    /// The Node's own addresses that this host has, at most one a family: sources of what the node sends to its pods.
    pub(super) sources: Vec<IpAddr>,
    pub(super) mtu_bytes: u32,
    pub(super) wireguard_port: u16,
}

impl NodeView {
    /// Addresses leased to one pod, the Node's primary family first.
    pub(super) fn in_order(&self, leases: &LeaseRecords) -> Vec<IpAddr> {
        let of = |cidr: &IpNet| leases.keys().copied().find(|address| cidr.contains(address));
        self.pod_cidrs.iter().filter_map(of).collect()
    }

    /// The node's own address of the same family.
    pub(super) fn source_for(&self, address: IpAddr) -> Option<IpAddr> {
        self.sources.iter().copied().find(|source| source.is_ipv6() == address.is_ipv6())
    }
}

impl Cni {
    pub(super) fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }

    /// Why ADD cannot work yet is a sentence for whoever reads the Pod's events.
    pub(super) fn node_for_add(&self) -> Result<NodeView, CniError> {
        let later = |reason: String| CniError::new(Code::TryAgainLater, reason);
        let snapshot = self.snapshot();
        (self.readiness)(snapshot.as_deref()).map_err(later)?;
        let snapshot =
            snapshot.ok_or_else(|| later("the agent has not read this cluster's objects yet".to_owned()))?;
        self.node_view(&snapshot).map_err(later)
    }

    pub(super) fn node_view(&self, snapshot: &Snapshot) -> Result<NodeView, String> {
        let name = &snapshot.facts.name;
        let node =
            snapshot.own_node().ok_or_else(|| format!("there is no Node {name} in the cluster yet"))?;
        if node.pod_cidrs.is_empty() {
            return Err(format!("Node {name} has no spec.podCIDRs yet; the controller manager assigns them"));
        }
        Ok(NodeView {
            pod_cidrs: node.pod_cidrs.clone(),
            sources: snapshot.own_addresses(),
            mtu_bytes: (self.pod_mtu_bytes)(snapshot),
            wireguard_port: snapshot.config.wireguard_port,
        })
    }
}
