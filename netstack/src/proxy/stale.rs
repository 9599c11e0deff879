//! Which UDP flows must go: those that still answer at a Service's address but lead to where the plan no longer sends
//! anyone. TCP ends by itself; UDP flows would be kept alive by the client's next packet for ever. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::objects::Protocol;
use weft_model::ruleset::Datum;

/// UDP destinations of all Services and who may answer there, by Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpTargets {
    pub groups: BTreeMap<String, Arc<BTreeMap<UdpDestination, BTreeSet<SocketAddr>>>>,
    pub node_ips: Vec<IpAddr>,
    pub service_cidrs: Vec<IpNet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UdpDestination {
    Vip(SocketAddr),
    /// At the node's address of that family.
    NodePort {
        ipv6: bool,
        port: u16,
    },
}

impl UdpDestination {
    /// From the key of a map of frontends; `None` for other protocols.
    pub(super) fn of_frontend(key: &[Datum], ipv6: bool) -> Option<Self> {
        match key {
            [Datum::Ip(ip), Datum::Protocol(Protocol::Udp), Datum::Port(port)] => {
                Some(Self::Vip(SocketAddr::new(*ip, *port)))
            }
            [Datum::Protocol(Protocol::Udp), Datum::Port(port)] => Some(Self::NodePort { ipv6, port: *port }),
            _ => None,
        }
    }
}

impl UdpTargets {
    /// What a packet to `address` may be addressed to, in the order in which the rules look.
    fn destinations(&self, address: SocketAddr) -> impl Iterator<Item = UdpDestination> {
        let node_port = UdpDestination::NodePort { ipv6: address.is_ipv6(), port: address.port() };
        let of_node = self.node_ips.contains(&address.ip());
        [UdpDestination::Vip(address)].into_iter().chain(of_node.then_some(node_port))
    }

    /// Destinations of `before` that are gone now: flows to them are stale whatever they lead to.
    pub(super) fn gone(&self, before: &Self) -> BTreeSet<UdpDestination> {
        let changed = before
            .groups
            .iter()
            .filter(|(name, old)| self.groups.get(*name).is_none_or(|new| !Arc::ptr_eq(new, old)));
        let mut gone: BTreeSet<UdpDestination> = changed.flat_map(|(_, old)| old.keys().copied()).collect();
        if !gone.is_empty() {
            for group in self.groups.values() {
                gone.retain(|destination| !group.contains_key(destination));
            }
        }
        gone
    }

    /// One map over all Services, for looking flows up.
    pub(super) fn index(&self) -> BTreeMap<UdpDestination, &BTreeSet<SocketAddr>> {
        self.groups
            .values()
            .flat_map(|group| group.iter().map(|(destination, targets)| (*destination, targets)))
            .collect()
    }

    /// Whether the flow that a client sent to `sent_to`, and that `answered_by` answers, must go.
    ///
    /// An address of the service range that no Service has (any more) is stale when it was translated, which also
    /// holds for what an earlier process left behind.
    pub(super) fn is_stale(
        &self,
        index: &BTreeMap<UdpDestination, &BTreeSet<SocketAddr>>,
        gone: &BTreeSet<UdpDestination>,
        sent_to: SocketAddr,
        answered_by: SocketAddr,
    ) -> bool {
        match self.destinations(sent_to).find_map(|destination| index.get(&destination)) {
            Some(targets) if targets.is_empty() => sent_to != answered_by,
            Some(targets) => !targets.contains(&answered_by),
            None => {
                let translated = sent_to != answered_by;
                let of_service_range = self.service_cidrs.iter().any(|cidr| cidr.contains(&sent_to.ip()));
                let is_gone = self.destinations(sent_to).any(|destination| gone.contains(&destination));
                is_gone || (translated && of_service_range)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    type Group<'a> = &'a [(UdpDestination, &'a [&'a str])];

    fn targets(groups: &[(&str, Group<'_>)]) -> UdpTargets {
        let group = |of: Group<'_>| {
            Arc::new(of.iter().map(|(d, t)| (*d, t.iter().map(|t| at(t)).collect())).collect())
        };
        UdpTargets {
            groups: groups.iter().map(|(name, of)| ((*name).to_owned(), group(of))).collect(),
            node_ips: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        }
    }

    fn is_stale(now: &UdpTargets, before: &UdpTargets, sent_to: &str, answered_by: &str) -> bool {
        now.is_stale(&now.index(), &now.gone(before), at(sent_to), at(answered_by))
    }

    #[test]
    fn a_flow_to_a_removed_endpoint_is_stale_and_one_to_a_kept_endpoint_is_not() {
        for (vip, kept, removed) in [
            ("10.96.0.5:5000", "10.244.1.2:50", "10.244.1.3:50"),
            ("[fd00:96::5]:5000", "[fd00::2]:50", "[fd00::3]:50"),
        ] {
            let vip_of = UdpDestination::Vip(at(vip));
            let before = targets(&[("default/a", &[(vip_of, &[kept, removed])])]);
            let now = targets(&[("default/a", &[(vip_of, &[kept])])]);
            assert!(is_stale(&now, &before, vip, removed));
            assert!(!is_stale(&now, &before, vip, kept));
        }
    }

    #[test]
    fn a_flow_from_before_the_first_endpoint_is_stale() {
        let vip = UdpDestination::Vip(at("10.96.0.5:5000"));
        let now = targets(&[("default/a", &[(vip, &["10.244.1.2:50"])])]);
        assert!(is_stale(&now, &targets(&[]), "10.96.0.5:5000", "10.96.0.5:5000"));
        let none_yet = targets(&[("default/a", &[(vip, &[])])]);
        assert!(!is_stale(&none_yet, &targets(&[]), "10.96.0.5:5000", "10.96.0.5:5000"));
    }

    #[test]
    fn flows_of_a_deleted_service_are_stale_after_a_restart_too() {
        let vip = UdpDestination::Vip(at("10.96.0.5:5000"));
        let port = UdpDestination::NodePort { ipv6: false, port: 30_053 };
        let before = targets(&[("default/a", &[(vip, &["10.244.1.2:50"]), (port, &["10.244.1.2:50"])])]);
        let now = targets(&[]);
        assert!(is_stale(&now, &before, "10.96.0.5:5000", "10.244.1.2:50"));
        assert!(is_stale(&now, &before, "192.0.2.1:30053", "10.244.1.2:50"));
        assert!(is_stale(&now, &targets(&[]), "10.96.0.5:5000", "10.244.1.2:50"));
    }

    #[test]
    fn flows_that_are_not_of_a_service_are_left_alone() {
        let vip = UdpDestination::Vip(at("10.96.0.5:5000"));
        let now = targets(&[("default/a", &[(vip, &["10.244.1.2:50"])])]);
        assert!(!is_stale(&now, &now, "192.0.2.1:53", "172.17.0.2:53"), "another tool's port forward");
        assert!(!is_stale(&now, &now, "10.96.0.10:53", "10.96.0.10:53"), "DNS answered on the node");
        assert!(!is_stale(&now, &now, "8.8.8.8:53", "8.8.8.8:53"));
        assert!(!is_stale(&now, &now, "10.244.1.2:50", "10.244.1.2:50"));
    }

    #[test]
    fn a_destination_that_moved_to_another_service_is_not_gone() {
        let vip = UdpDestination::Vip(at("10.96.0.5:5000"));
        let before = targets(&[("default/a", &[(vip, &["10.244.1.2:50"])])]);
        let now = targets(&[("default/b", &[(vip, &["10.244.1.2:50"])])]);
        assert_eq!(now.gone(&before), BTreeSet::new());
    }
}
