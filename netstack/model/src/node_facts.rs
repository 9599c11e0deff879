//! What the kernel of this node shows, as an input of planning: read by `netstack::kernel`, never guessed.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::NodeName;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Name of this node, equal to `metadata.name` of its Node.
    pub name: NodeName,
    /// Links other than ours and loopback, by name, that are up and carry a global address.
    pub uplinks: Vec<Uplink>,
    /// WireGuard in the kernel or in `weft tunnel`.
    pub wireguard_backend: WireguardBackend,
    /// Routes of others in table `main` within the cluster's ranges, sorted: they take packets away from pods and Services.
    #[serde(default)]
    pub foreign_routes: Vec<ForeignRoute>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ForeignRoute {
    pub destination: IpNet,
    /// `None` for one that leads nowhere (blackhole).
    pub link: Option<String>,
}

/// As `ip route` takes it.
impl std::fmt::Display for ForeignRoute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.destination)?;
        self.link.as_ref().map_or(Ok(()), |link| write!(f, " dev {link}"))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    pub name: String,
    pub index: u32,
    pub mtu_bytes: u32,
    pub addresses: Vec<IpAddr>,
    /// Of those addresses; others are reached through a gateway.
    #[serde(default)]
    pub subnets: Vec<IpNet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireguardBackend {
    Kernel,
    Userspace,
}

impl NodeFacts {
    /// MTU of the smallest uplink that carries one of `addresses`, else of the smallest uplink, else 1500.
    pub fn underlay_mtu_bytes(&self, addresses: &[IpAddr]) -> u32 {
        let carrying =
            self.uplinks.iter().filter(|link| link.addresses.iter().any(|a| addresses.contains(a)));
        carrying
            .map(|link| link.mtu_bytes)
            .min()
            .or_else(|| self.uplinks.iter().map(|link| link.mtu_bytes).min())
            .unwrap_or(1500)
    }
}
