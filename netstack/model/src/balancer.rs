//! What LoadBalancer Services ask for, and what the operator gives: pools of addresses and who announces them on the LAN.
//! The objects are MetalLB's (`metallb.io/v1beta1`), the annotations also kube-vip's and Cilium's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::ids::NamespacedName;
use crate::objects::Labels;
use crate::policy::Selector;

/// `loadBalancerClass` of Services that Weft serves besides those without a class.
pub const CLASS: &str = "weft.network/load-balancer";
/// `loadBalancerClass` of Services that get the nodes' addresses although there are pools.
pub const CLASS_NODES: &str = "weft.network/node-addresses";

/// What a Service of type LoadBalancer asks for, and what its status says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balancer {
    /// `spec.loadBalancerClass`.
    pub class: Option<String>,
    /// The addresses it must have, at most one a family: from an annotation, or `spec.loadBalancerIP`.
    pub fixed: Vec<IpAddr>,
    /// It asked for an address that cannot be read, so it gets none.
    pub unreadable: bool,
    /// The pool that its address must be of.
    pub pool: Option<String>,
    /// Services with the same key may share an address.
    pub sharing_key: Option<String>,
    /// `spec.selector`.
    pub selector: Option<Labels>,
    /// `spec.ipFamilies` as "is IPv6", in order; never empty for a Service that exists.
    pub families: Vec<bool>,
    pub dual_stack: DualStack,
    /// Label `svccontroller.k3s.cattle.io/lbpool`: of the nodes with the same label.
    pub node_pool: Option<String>,
    /// `status.loadBalancer.ingress`, as it is.
    pub ingress: Vec<BalancerIngress>,
    /// `status.conditions`, as they are.
    pub conditions: Vec<Condition>,
}

impl Balancer {
    /// Services of another class are others' business.
    pub fn is_ours(&self) -> bool {
        self.class.as_deref().is_none_or(|class| class == CLASS || class == CLASS_NODES)
    }
}

/// `spec.ipFamilyPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DualStack {
    #[default]
    Single,
    Prefer,
    Require,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalancerIngress {
    pub ip: Option<IpAddr>,
    /// Of load balancers of clouds.
    pub hostname: Option<String>,
    /// `VIP` or `Proxy`; the API server sets it for every address.
    pub ip_mode: Option<String>,
}

/// A condition of meta/v1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub kind: String,
    pub status: String,
    pub reason: String,
    pub message: String,
    /// As the object has it.
    pub last_transition: Option<String>,
}

/// IPAddressPool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPool {
    pub key: NamespacedName,
    pub created: i64,
    pub labels: Labels,
    /// In the order of `spec.addresses`.
    pub ranges: Vec<AddressRange>,
    /// Whether Services that do not ask for it get its addresses.
    pub auto_assign: bool,
    /// Whether addresses that end in .0 and .255 are left out.
    pub avoid_buggy_ips: bool,
    /// Whom it is for; everybody by default.
    pub allocation: Option<PoolAllocation>,
    /// `status`, as it is.
    pub usage: PoolUsage,
}

/// `spec.serviceAllocation`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolAllocation {
    /// A lower number comes first; 0, the default, comes last.
    pub priority: u32,
    /// By name; together with the selectors below, either is enough. Both empty: every namespace.
    pub namespaces: BTreeSet<String>,
    pub namespace_selectors: Vec<Selector>,
    /// One of them has to match; empty: every Service.
    pub service_selectors: Vec<Selector>,
}

/// `status` of a pool: how many addresses are given and free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolUsage {
    pub assigned_v4: i64,
    pub assigned_v6: i64,
    pub available_v4: i64,
    pub available_v6: i64,
}

/// L2Advertisement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct L2Advertisement {
    pub key: NamespacedName,
    /// Names of pools, and selectors of their labels; both empty: every pool.
    pub pools: BTreeSet<String>,
    pub pool_selectors: Vec<Selector>,
    /// One of them has to match; empty: every node.
    pub node_selectors: Vec<Selector>,
    /// Links on which it answers; empty: every link that holds the address' subnet.
    pub interfaces: BTreeSet<String>,
}

/// Addresses that a node tells the others of: those that it answers for on the LAN, also when no Service has them any more, and those
/// that it is to answer for and that another machine has. As text `IP` or `IP=MAC` with blanks between.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswersFor {
    pub held: BTreeSet<IpAddr>,
    /// With the link-layer address of the other machine.
    pub contested: BTreeMap<IpAddr, String>,
}

impl AnswersFor {
    pub fn is_empty(&self) -> bool {
        self.held.is_empty() && self.contested.is_empty()
    }
}

impl std::fmt::Display for AnswersFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let contested = self.contested.iter().map(|(ip, mac)| format!("{ip}={mac}"));
        let words: Vec<String> = self.held.iter().map(IpAddr::to_string).chain(contested).collect();
        f.write_str(&words.join(" "))
    }
}

impl FromStr for AnswersFor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut read = Self::default();
        for word in text.split_whitespace() {
            match word.split_once('=') {
                Some((ip, mac)) => drop(read.contested.insert(ip.parse().map_err(drop)?, mac.to_owned())),
                None => drop(read.held.insert(word.parse().map_err(drop)?)),
            }
        }
        Ok(read)
    }
}

/// Addresses of one family from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AddressRange {
    pub first: IpAddr,
    pub last: IpAddr,
}

impl AddressRange {
    /// From a CIDR or `FIRST-LAST`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Ok(net) = text.parse::<IpNet>() {
            return Some(Self { first: net.network(), last: net.broadcast() });
        }
        let (first, last) = text.split_once('-')?;
        let (first, last): (IpAddr, IpAddr) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first.is_ipv6() == last.is_ipv6() && first <= last).then_some(Self { first, last })
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv6() == self.first.is_ipv6() && self.first <= ip && ip <= self.last
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.first.is_ipv6() == other.first.is_ipv6() && self.first <= other.last && other.first <= self.last
    }

    /// At most `i64::MAX`, as the API has no larger number.
    pub fn count(&self) -> i64 {
        let between = number(self.last).saturating_sub(number(self.first)).saturating_add(1);
        i64::try_from(between).unwrap_or(i64::MAX)
    }

    /// From the first to the last. A caller that looks for a free one stops early: an IPv6 range is long.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let ipv6 = self.first.is_ipv6();
        (number(self.first)..=number(self.last)).map(move |value| address(ipv6, value))
    }
}

impl std::fmt::Display for AddressRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn address(ipv6: bool, value: u128) -> IpAddr {
    match u32::try_from(value) {
        Ok(value) if !ipv6 => Ipv4Addr::from_bits(value).into(),
        _ => Ipv6Addr::from_bits(value).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_answers_for_is_understood_and_nothing_else() {
        let text = "192.0.2.1 2001:db8::1 192.0.2.9=02:00:00:00:00:07 2001:db8::9=02:00:00:00:00:07";
        assert_eq!(text.parse::<AnswersFor>().unwrap().to_string(), text);
        assert!("".parse::<AnswersFor>().unwrap().is_empty());
        for wrong in ["x", "192.0.2.0/24", "=02:00:00:00:00:07"] {
            assert_eq!(wrong.parse::<AnswersFor>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn a_range_is_a_cidr_or_two_addresses_of_one_family_in_order() {
        let read = |text: &str| AddressRange::parse(text).map(|range| range.to_string());
        assert_eq!(read("192.0.2.0/30").as_deref(), Some("192.0.2.0-192.0.2.3"));
        assert_eq!(read(" 192.0.2.7 - 192.0.2.9 ").as_deref(), Some("192.0.2.7-192.0.2.9"));
        assert_eq!(read("2001:db8::/127").as_deref(), Some("2001:db8::-2001:db8::1"));
        for wrong in ["", "x", "192.0.2.9-192.0.2.7", "192.0.2.1-2001:db8::1", "192.0.2.1"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_range_of_a_whole_family_is_walked_lazily_and_counted_within_bounds() {
        let all = AddressRange::parse("::/0").unwrap();
        assert_eq!(all.count(), i64::MAX);
        assert_eq!(all.addresses().next(), Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
        let few = AddressRange::parse("192.0.2.254-192.0.3.1").unwrap();
        let listed: Vec<String> = few.addresses().map(|ip| ip.to_string()).collect();
        assert_eq!(listed, ["192.0.2.254", "192.0.2.255", "192.0.3.0", "192.0.3.1"]);
        assert_eq!(few.count(), 4);
    }
}
