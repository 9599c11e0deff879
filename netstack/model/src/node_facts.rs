//! What the kernel of this node shows, as an input of planning: read by `netstack::kernel`, never guessed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::str::FromStr;

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
    /// Global addresses of the loopback link, where some keep the node's own.
    #[serde(default)]
    pub loopback: BTreeSet<IpAddr>,
    #[serde(default)]
    pub observed: Observed,
}

/// What this node found out by asking and trying.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Addresses of the names in endpoints of Nodes, sorted. A name that was never resolved is absent.
    pub names: BTreeMap<String, Vec<IpAddr>>,
    /// Bytes of the largest packet that the tunnel carries to a node, where that is less than its device takes.
    pub narrow_paths: BTreeMap<NodeName, u32>,
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

/// Which link of a node holds which subnet; as text `LINK=CIDR` with blanks between.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkSubnets(pub BTreeSet<(String, IpNet)>);

impl std::fmt::Display for LinkSubnets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pairs: Vec<String> = self.0.iter().map(|(link, net)| format!("{link}={net}")).collect();
        f.write_str(&pairs.join(" "))
    }
}

impl FromStr for LinkSubnets {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        // A link's name may hold any character but `/` and blanks.
        let pair = |word: &str| {
            let (link, net) = word.rsplit_once('=')?;
            Some((link.to_owned(), net.parse().ok()?))
        };
        text.split_whitespace().map(pair).collect::<Option<BTreeSet<_>>>().map(Self).ok_or(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireguardBackend {
    Kernel,
    Userspace,
}

impl NodeFacts {
    /// What other nodes are told of the uplinks.
    pub fn link_subnets(&self) -> LinkSubnets {
        let of_link =
            |link: &Uplink| link.subnets.iter().map(|net| (link.name.clone(), *net)).collect::<Vec<_>>();
        LinkSubnets(self.uplinks.iter().flat_map(of_link).collect())
    }

    /// Whether the host has this address now.
    pub fn has(&self, address: IpAddr) -> bool {
        let mut of_uplinks = self.uplinks.iter().flat_map(|uplink| &uplink.addresses);
        self.loopback.contains(&address) || of_uplinks.any(|own| *own == address)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_says_of_its_links_is_understood_and_nothing_else() {
        let text = "br=0=192.0.2.0/24 eth0=192.0.2.0/24 eth0=2001:db8::/64";
        assert_eq!(text.parse::<LinkSubnets>().unwrap().to_string(), text);
        assert_eq!("".parse(), Ok(LinkSubnets::default()));
        for wrong in ["eth0", "eth0=", "eth0=192.0.2.0/33", "eth0=192.0.2.0/24 x"] {
            assert_eq!(wrong.parse::<LinkSubnets>(), Err(()), "{wrong}");
        }
    }
}
