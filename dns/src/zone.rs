//! The plan of the DNS room as values: names with their records, grouped by the object they come from.
//!
//! `plan` makes a [`DnsPlan`], `store` holds it for answering. It prints as zone text, names in canonical order.

mod group;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::rr::RecordType;
use ipnet::IpNet;
use weft_model::{ClusterConfig, ServiceKey, SharedMap};

pub use group::Group;

use crate::custom::{Part, Parts};
use crate::name::{InvalidName, Name};

/// TTL of every record of ours, and of our negative answers, in seconds. A pod that asks just before its Service
/// exists waits this long in a cache on its way; CoreDNS's own default is 5 too.
pub const TTL_SECONDS: u32 = 5;
/// Text of `dns-version.<zone>`: the version of the Kubernetes DNS-Based Service Discovery specification.
pub const SPECIFICATION_VERSION: &str = "1.1.0";

/// Data of one record; names in them are of type `N`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data<N = Name> {
    /// RFC 1035 section 3.4.1.
    A(Ipv4Addr),
    /// RFC 3596.
    Aaaa(Ipv6Addr),
    /// The only record of its name.
    Cname(N),
    /// At the apex of the cluster domain only.
    Ns(N),
    /// Of a reverse name.
    Ptr(N),
    /// Of a named port.
    Srv(Srv<N>),
    /// One string of at most 255 octets.
    Txt(String),
}

/// RFC 2782.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Srv<N = Name> {
    /// Lower first.
    pub priority: u16,
    /// Share among equal priorities.
    pub weight: u16,
    /// Of the target.
    pub port: u16,
    /// Has addresses, is no alias.
    pub target: N,
}

impl<N> Data<N> {
    /// The name in them.
    pub(crate) fn name(&self) -> Option<&N> {
        match self {
            Self::Cname(name) | Self::Ns(name) | Self::Ptr(name) => Some(name),
            Self::Srv(srv) => Some(&srv.target),
            Self::A(_) | Self::Aaaa(_) | Self::Txt(_) => None,
        }
    }

    /// The type that these data belong to.
    pub fn record_type(&self) -> RecordType {
        match self {
            Self::A(_) => RecordType::A,
            Self::Aaaa(_) => RecordType::AAAA,
            Self::Cname(_) => RecordType::CNAME,
            Self::Ns(_) => RecordType::NS,
            Self::Ptr(_) => RecordType::PTR,
            Self::Srv(_) => RecordType::SRV,
            Self::Txt(_) => RecordType::TXT,
        }
    }
}

impl<N> From<IpAddr> for Data<N> {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::A(v4),
            IpAddr::V6(v6) => Self::Aaaa(v6),
        }
    }
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::A(address) => write!(f, "A {address}"),
            Self::Aaaa(address) => write!(f, "AAAA {address}"),
            Self::Cname(name) => write!(f, "CNAME {name}"),
            Self::Ns(name) => write!(f, "NS {name}"),
            Self::Ptr(name) => write!(f, "PTR {name}"),
            Self::Srv(srv) => write!(f, "SRV {} {} {} {}", srv.priority, srv.weight, srv.port, srv.target),
            Self::Txt(text) => write!(f, "TXT {text:?}"),
        }
    }
}

/// The object that names come from. Names of different groups may coincide (a pod behind two headless Services has
/// two PTR records).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GroupKey {
    /// The zone's own names: its apex, `dns-version`, `ns.dns`.
    Zone,
    /// That the Namespace exists.
    Namespace(String),
    /// A Service with its endpoints.
    Service(ServiceKey),
}

impl fmt::Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zone => f.write_str("zone"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::Service(key) => write!(f, "Service {key}"),
        }
    }
}

/// All groups of a plan; unchanged ones are shared with the plan before (same `Arc`).
pub type Groups = SharedMap<Arc<GroupKey>, Arc<Group>>;

/// The names that we alone answer for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zones {
    /// The cluster domain.
    pub domain: Name,
    /// Apexes under `in-addr.arpa` and `ip6.arpa` that together cover the service and pod ranges.
    pub reverse: BTreeSet<Name>,
}

impl Zones {
    /// Errors when the cluster domain is no domain name or is the root.
    pub fn new(config: &ClusterConfig) -> Result<Self, InvalidName> {
        let domain = Name::parse(&config.cluster_domain)?;
        if domain.labels().next().is_none() {
            return Err(InvalidName::Label(String::new()));
        }
        let cuts: BTreeSet<Name> = config.ranges().into_iter().flat_map(reverse_zones).collect();
        let inside_another = |apex: &Name| cuts.iter().any(|other| other != apex && apex.is_in(other));
        let reverse = cuts.iter().filter(|apex| !inside_another(apex)).cloned().collect();
        Ok(Self { domain, reverse })
    }

    /// Every apex, the cluster domain first.
    pub fn apexes(&self) -> impl Iterator<Item = &Name> {
        std::iter::once(&self.domain).chain(&self.reverse)
    }
}

/// Reverse zones are cut at octets (IPv4) or hexadecimal digits (IPv6); a range between two cuts is several zones.
pub(crate) fn reverse_zones(range: IpNet) -> Vec<Name> {
    let bits_per_label = if range.addr().is_ipv4() { 8 } else { 4 };
    let cut = range.prefix_len().div_ceil(bits_per_label) * bits_per_label;
    let Ok(parts) = range.subnets(cut) else { return Vec::new() };
    let dropped_labels = usize::from((range.max_prefix_len() - cut) / bits_per_label);
    let apex = |part: IpNet| {
        let full = Name::reverse(part.network());
        Name::from_labels(full.labels().skip(dropped_labels)).expect("a parent of a name is a name")
    };
    parts.map(apex).collect()
}

/// The namespaces of the pods that have an address: several, where pods share their node's.
pub type PodAddresses = BTreeMap<IpAddr, BTreeSet<String>>;

/// Everything the DNS room is to know: what we answer for, with what, and where we listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsPlan {
    /// `None` when the cluster domain is not a domain name: nothing but forwarding then.
    pub zones: Option<Zones>,
    /// Names outside the zones are reverse names of endpoints beyond the cluster's ranges.
    pub groups: Arc<Groups>,
    /// Of pods and Services.
    pub ranges: Vec<IpNet>,
    /// Addresses to answer on, UDP and TCP.
    pub listen: BTreeSet<IpAddr>,
    /// This node's `host` addresses, on which other nodes' pods are answered while their own node does not.
    pub hosts: BTreeSet<IpAddr>,
    /// What users add, by key of their ConfigMap.
    pub custom: Parts,
    /// Addresses of the Nodes by name.
    pub nodes: BTreeMap<Name, BTreeSet<IpAddr>>,
    /// Which pods exist; only where somebody wants names of none but them.
    pub pods: Option<Arc<PodAddresses>>,
}

impl fmt::Display for DnsPlan {
    /// Zone text (RFC 1035 section 5.1) with the listening addresses and zone apexes as comments.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for address in &self.listen {
            writeln!(f, "; listen {address}")?;
        }
        for apex in self.zones.iter().flat_map(Zones::apexes) {
            writeln!(f, "; zone {apex}")?;
        }
        for (key, part) in &self.custom {
            match part {
                Part::Read(blocks) => {
                    let zones: Vec<String> = blocks.keys().map(Name::to_string).collect();
                    writeln!(f, "; {key}: {}", zones.join(" "))?;
                }
                Part::Unreadable => writeln!(f, "; {key}: as before")?,
            }
        }
        for (name, addresses) in &self.nodes {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            writeln!(f, "; node {name} {}", addresses.join(" "))?;
        }
        for (address, namespaces) in self.pods.iter().flat_map(|pods| pods.iter()) {
            let namespaces: Vec<&str> = namespaces.iter().map(String::as_str).collect();
            writeln!(f, "; pod {address} {}", namespaces.join(" "))?;
        }
        writeln!(f, "$TTL {TTL_SECONDS}")?;
        let mut names: BTreeMap<Name, Vec<(&GroupKey, Vec<Data>)>> = BTreeMap::new();
        for (key, group) in self.groups.iter() {
            for (name, records) in group.names() {
                names.entry(name).or_default().push((key, records));
            }
        }
        for (name, contributions) in names {
            for (key, records) in contributions {
                if records.is_empty() {
                    writeln!(f, "; {name} exists without records ({key})")?;
                }
                for data in records {
                    writeln!(f, "{name} IN {data} ; {key}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zones_of(range: &str) -> Vec<String> {
        reverse_zones(range.parse().unwrap()).iter().map(Name::to_string).collect()
    }

    #[test]
    fn a_range_on_a_cut_is_one_reverse_zone() {
        assert_eq!(zones_of("10.43.0.0/16"), ["43.10.in-addr.arpa."]);
        assert_eq!(zones_of("10.0.0.0/8"), ["10.in-addr.arpa."]);
        assert_eq!(zones_of("fd00:43::/32"), ["3.4.0.0.0.0.d.f.ip6.arpa."]);
    }

    #[test]
    fn a_range_between_cuts_is_as_many_zones_as_it_covers() {
        let zones = zones_of("10.96.0.0/12");
        assert_eq!(zones.len(), 16);
        assert_eq!(zones[0], "96.10.in-addr.arpa.");
        assert_eq!(zones[15], "111.10.in-addr.arpa.");
        assert_eq!(zones_of("fd00::/7"), ["c.f.ip6.arpa.", "d.f.ip6.arpa."]);
    }

    #[test]
    fn the_root_is_no_cluster_domain() {
        let config = ClusterConfig { cluster_domain: String::new(), ..ClusterConfig::default() };
        assert!(Zones::new(&config).is_err());
    }
}
