//! The lab's shape as a value: families, names and addresses of the LAN, the nodes and the client. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Pod and service ranges of the lab's cluster; the sizes are those of a usual cluster.
const CLUSTER_CIDR: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/56"];
const SERVICE_CIDR: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
const CLUSTER_DNS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];
pub(super) const CLUSTER_DOMAIN: &str = "cluster.local";
/// Port of the API server on the LAN.
pub(super) const API_PORT: u16 = 6443;
/// Last number of a node's address is this plus its index from 1: node1 is .11.
const FIRST_NODE: u16 = 10;
const CLIENT: u16 = 250;
/// So many nodes fit between the first node and the client.
pub(super) const MAX_NODES: u16 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
    Dual,
}

impl Family {
    /// Which of a pair (IPv4 first) this family uses.
    fn pick<T: Clone>(self, pair: &[T; 2]) -> Vec<T> {
        match self {
            Self::Ipv4 => vec![pair[0].clone()],
            Self::Ipv6 => vec![pair[1].clone()],
            Self::Dual => pair.to_vec(),
        }
    }

    pub(super) fn has_ipv4(self) -> bool {
        self != Self::Ipv6
    }

    pub(super) fn has_ipv6(self) -> bool {
        self != Self::Ipv4
    }
}

/// What `weft lab up` was asked for; kept in `lab.json` while the lab is up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Topology {
    pub(super) family: Family,
    pub(super) nodes: u16,
    /// Port of the API server on the loopback of the machine that runs the lab.
    pub(super) loopback_port: u16,
}

/// What stands behind a name on the lab's LAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The switch: the bridge, the LAN's gateway address and the API server's address.
    Lan,
    /// A host on the LAN that is not part of the cluster.
    Client,
    /// Node number, from 1.
    Node(u16),
}

impl Topology {
    pub(super) fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|index| format!("node{index}")).collect()
    }

    /// All machines in the order they start: the switch first.
    pub(super) fn machine_names(&self) -> Vec<String> {
        let mut names = vec!["lan".to_owned(), "client".to_owned()];
        names.extend(self.node_names());
        names
    }

    /// The role behind `name`; an error that lists the names there are.
    pub(super) fn role(&self, name: &str) -> anyhow::Result<Role> {
        match name {
            "lan" => return Ok(Role::Lan),
            "client" => return Ok(Role::Client),
            _ => {}
        }
        if let Some(index) = name.strip_prefix("node").and_then(|digits| digits.parse::<u16>().ok())
            && (1..=self.nodes).contains(&index)
        {
            return Ok(Role::Node(index));
        }
        bail!("no machine {name:?} in the lab; there are {}", self.machine_names().join(", "))
    }

    /// The node names only, for commands that make no sense elsewhere.
    pub(super) fn expect_node(&self, name: &str) -> anyhow::Result<()> {
        ensure!(
            matches!(self.role(name), Ok(Role::Node(_))),
            "{name:?} is not a node of the lab; nodes are {}",
            self.node_names().join(", ")
        );
        Ok(())
    }

    /// LAN addresses of a machine with their prefix lengths, IPv4 first.
    pub(super) fn lan_addresses(&self, role: Role) -> Vec<(IpAddr, u8)> {
        let number = match role {
            Role::Lan => 1,
            Role::Client => CLIENT,
            Role::Node(index) => FIRST_NODE + index,
        };
        let v4 = Ipv4Addr::new(172, 30, 99, number.to_be_bytes()[1]);
        let v6 = Ipv6Addr::new(0xfd00, 0x30, 0x99, 0, 0, 0, 0, digits_as_hex(number));
        self.family.pick(&[(IpAddr::V4(v4), 24), (IpAddr::V6(v6), 64)])
    }

    pub(super) fn gateways(&self) -> Vec<IpAddr> {
        self.lan_addresses(Role::Lan).into_iter().map(|(address, _)| address).collect()
    }

    pub(super) fn cluster_cidrs(&self) -> Vec<&'static str> {
        self.family.pick(&CLUSTER_CIDR)
    }

    pub(super) fn service_cidrs(&self) -> Vec<&'static str> {
        self.family.pick(&SERVICE_CIDR)
    }

    pub(super) fn cluster_dns(&self) -> Vec<&'static str> {
        self.family.pick(&CLUSTER_DNS)
    }
}

/// 11 becomes 0x11, so that an IPv6 address ends in the digits of its IPv4 twin.
fn digits_as_hex(number: u16) -> u16 {
    u16::from_str_radix(&number.to_string(), 16).unwrap_or(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab(family: Family) -> Topology {
        Topology { family, nodes: 3, loopback_port: 1 }
    }

    #[test]
    fn addresses_of_both_families_end_in_the_same_digits() {
        let addresses = lab(Family::Dual).lan_addresses(Role::Node(2));
        let text: Vec<String> = addresses.iter().map(|(a, p)| format!("{a}/{p}")).collect();
        assert_eq!(text, ["172.30.99.12/24", "fd00:30:99::12/64"]);
    }

    #[test]
    fn a_single_family_lab_has_only_that_family() {
        assert_eq!(lab(Family::Ipv6).gateways(), ["fd00:30:99::1".parse::<IpAddr>().unwrap()]);
        assert_eq!(lab(Family::Ipv4).cluster_cidrs(), ["10.244.0.0/16"]);
    }

    #[test]
    fn no_node_address_meets_the_clients() {
        let many = Topology { family: Family::Dual, nodes: MAX_NODES, loopback_port: 1 };
        assert_ne!(many.lan_addresses(Role::Node(MAX_NODES)), many.lan_addresses(Role::Client));
        const { assert!(FIRST_NODE + MAX_NODES < CLIENT) };
    }

    #[test]
    fn an_unknown_machine_is_refused_with_the_names_there_are() {
        let error = lab(Family::Dual).role("node4").unwrap_err().to_string();
        assert!(error.contains("lan, client, node1, node2, node3"), "{error}");
    }
}
