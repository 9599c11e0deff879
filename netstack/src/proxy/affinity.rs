//! Which clients may stay with which endpoints (`sessionAffinity: ClientIP`). The rules remember by themselves, in the maps
//! `affinity4` and `affinity6`: client . address . protocol . port : endpoint. Here stands what of that must be forgotten: an
//! endpoint that a client may not reach any more, and all of a Service that does not ask for affinity (any more). Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::ruleset::{Datum, ElementData};

use super::service::{Claim, Frontend, Target};

/// Endpoints of all Services with affinity, by Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AffinityTargets {
    pub(super) groups: BTreeMap<String, Arc<BTreeMap<Claim, Sticky>>>,
    pub(super) node_ips: Vec<IpAddr>,
    /// Every address of this node.
    pub(super) own_ips: BTreeSet<IpAddr>,
    pub(super) cluster_cidrs: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sticky {
    outside: BTreeSet<SocketAddr>,
    /// For clients inside the cluster, where they are treated differently.
    inside: Option<BTreeSet<SocketAddr>>,
}

impl Sticky {
    /// `None` for a frontend without affinity.
    pub(super) fn of(frontend: &Frontend) -> Option<Self> {
        frontend.affinity_seconds?;
        let outside = match &frontend.target {
            Target::Endpoints(endpoints) => endpoints.iter().copied().collect(),
            Target::Reject | Target::Drop => BTreeSet::new(),
        };
        let inside = frontend.internal.as_ref().map(|endpoints| endpoints.iter().copied().collect());
        Some(Self { outside, inside })
    }
}

/// One map over all Services.
pub struct AffinityIndex<'a> {
    targets: &'a AffinityTargets,
    by_claim: BTreeMap<&'a Claim, &'a Sticky>,
}

impl AffinityTargets {
    pub fn index(&self) -> AffinityIndex<'_> {
        AffinityIndex {
            targets: self,
            by_claim: self.groups.values().flat_map(|group| group.iter()).collect(),
        }
    }
}

impl AffinityIndex<'_> {
    /// Whether what the rules remember of a client must be forgotten; also what cannot be read.
    pub fn is_stale(&self, key: &[Datum], data: &ElementData) -> bool {
        let (
            [Datum::Ip(client), Datum::Ip(address), Datum::Protocol(protocol), Datum::Port(port)],
            ElementData::AddressAndPort(ip, endpoint_port),
        ) = (key, data)
        else {
            return true;
        };
        let node_port = || Claim::NodePort { ipv6: address.is_ipv6(), protocol: *protocol, port: *port };
        let vip = self.by_claim.get(&Claim::Vip(*address, *protocol, *port));
        let of_node =
            || self.targets.node_ips.contains(address).then(|| self.by_claim.get(&node_port())).flatten();
        let Some(sticky) = vip.or_else(of_node) else { return true };
        let allowed = match &sticky.inside {
            Some(inside) if self.is_inside(*client) => inside,
            _ => &sticky.outside,
        };
        !allowed.contains(&SocketAddr::new(*ip, *endpoint_port))
    }

    fn is_inside(&self, client: IpAddr) -> bool {
        let targets = self.targets;
        targets.own_ips.contains(&client) || targets.cluster_cidrs.iter().any(|cidr| cidr.contains(&client))
    }
}

#[cfg(test)]
mod tests {
    use weft_model::objects::Protocol;

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn targets(claim: Claim, outside: &[&str], inside: Option<&[&str]>) -> AffinityTargets {
        let all = |texts: &[&str]| texts.iter().map(|text| at(text)).collect();
        let sticky = Sticky { outside: all(outside), inside: inside.map(all) };
        AffinityTargets {
            groups: BTreeMap::from([("default/a".to_owned(), Arc::new(BTreeMap::from([(claim, sticky)])))]),
            node_ips: vec!["192.0.2.1".parse().unwrap()],
            own_ips: BTreeSet::from(["192.0.2.1".parse().unwrap()]),
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        }
    }

    fn is_stale(targets: &AffinityTargets, client: &str, to: &str, endpoint: &str) -> bool {
        let (to, endpoint) = (at(to), at(endpoint));
        let key = [
            Datum::Ip(client.parse().unwrap()),
            Datum::Ip(to.ip()),
            Datum::Protocol(Protocol::Tcp),
            Datum::Port(to.port()),
        ];
        targets.index().is_stale(&key, &ElementData::AddressAndPort(endpoint.ip(), endpoint.port()))
    }

    #[test]
    fn a_client_stays_while_its_endpoint_is_there_and_is_forgotten_when_it_goes() {
        let vip = Claim::Vip("10.96.0.1".parse().unwrap(), Protocol::Tcp, 80);
        let targets = targets(vip, &["10.244.1.5:8080"], None);
        assert!(!is_stale(&targets, "10.244.2.9", "10.96.0.1:80", "10.244.1.5:8080"));
        assert!(is_stale(&targets, "10.244.2.9", "10.96.0.1:80", "10.244.1.6:8080"), "another endpoint");
        assert!(
            is_stale(&targets, "10.244.2.9", "10.96.0.1:81", "10.244.1.5:8080"),
            "a port without affinity"
        );
        assert!(is_stale(&AffinityTargets::default(), "10.244.2.9", "10.96.0.1:80", "10.244.1.5:8080"));
    }

    #[test]
    fn a_client_outside_may_not_stay_with_what_only_clients_inside_reach() {
        let port = Claim::NodePort { ipv6: false, protocol: Protocol::Tcp, port: 30_080 };
        let targets = targets(port, &["10.244.1.5:8080"], Some(&["10.244.1.5:8080", "10.244.2.5:8080"]));
        for (client, remote_is_stale) in [("203.0.113.9", true), ("10.244.7.7", false), ("192.0.2.1", false)]
        {
            assert!(!is_stale(&targets, client, "192.0.2.1:30080", "10.244.1.5:8080"), "{client}");
            assert_eq!(
                is_stale(&targets, client, "192.0.2.1:30080", "10.244.2.5:8080"),
                remote_is_stale,
                "{client}"
            );
        }
    }
}
