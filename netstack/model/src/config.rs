//! What the operator decided for the whole cluster; the same on every node.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterConfig {
    /// Pod ranges of the whole cluster, at most one a family (`--cluster-cidr`).
    pub cluster_cidrs: Vec<IpNet>,
    /// Service ranges, at most one a family (`--service-cidr`).
    pub service_cidrs: Vec<IpNet>,
    /// Cluster DNS addresses, at most one a family (`--cluster-dns`).
    pub cluster_dns: Vec<IpAddr>,
    /// Cluster domain without a trailing dot, lower case (`--cluster-domain`), usually `cluster.local`.
    pub cluster_domain: String,
    /// UDP port of WireGuard on every node.
    pub wireguard_port: u16,
}

impl ClusterConfig {
    /// Of pods and Services, which nothing else may use.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.cluster_cidrs.iter().chain(&self.service_cidrs).copied().collect()
    }
}
