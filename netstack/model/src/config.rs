//! What the operator decided for the whole cluster; the same on every node.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::constants::WIREGUARD_PORT;
use crate::ingress::IngressConfig;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterConfig {
    /// Pod ranges of the whole cluster, at most one a family (`--cluster-cidr`).
    pub cluster_cidrs: Vec<IpNet>,
    /// Service ranges, at most one a family (`--service-cidr`).
    pub service_cidrs: Vec<IpNet>,
    /// Cluster DNS addresses, at most one a family (`--cluster-dns`).
    pub cluster_dns: Vec<IpAddr>,
    /// Outside the ranges, where a node's resolver answers too (`--node-local-dns`).
    #[serde(default)]
    pub node_local_dns: Vec<IpAddr>,
    /// Cluster domain without a trailing dot, lower case (`--cluster-domain`), usually `cluster.local`.
    pub cluster_domain: String,
    /// UDP port of WireGuard on every node.
    pub wireguard_port: u16,
    #[serde(default)]
    pub proxy: ProxyConfig,
    #[serde(default)]
    pub ingress: IngressConfig,
}

impl Default for ClusterConfig {
    /// What the flags say of themselves, without any range or address.
    fn default() -> Self {
        Self {
            cluster_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            cluster_dns: Vec::new(),
            node_local_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            wireguard_port: WIREGUARD_PORT,
            proxy: ProxyConfig::default(),
            ingress: IngressConfig::default(),
        }
    }
}

/// What Services may have outside the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyConfig {
    /// Where `spec.externalIPs` are honoured (`--external-ip-range`); nowhere when empty.
    pub external_ip_ranges: Vec<IpNet>,
    /// NodePorts answer on the node's addresses in these ranges (`--nodeport-addresses`), on its first InternalIP of each
    /// family when empty.
    pub node_port_ranges: Vec<IpNet>,
}

impl ClusterConfig {
    /// At which every node answers its own pods.
    pub fn resolver_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.cluster_dns.iter().chain(&self.node_local_dns).copied()
    }

    /// Of pods and Services, which nothing else may use.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.cluster_cidrs.iter().chain(&self.service_cidrs).copied().collect()
    }
}
