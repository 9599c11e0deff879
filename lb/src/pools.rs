//! The pools as they count. In: IPAddressPools, the cluster's ranges and the nodes' addresses. Out: which addresses may be
//! given to whom, and a Problem for each range that may not. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::balancer::{AddressPool, AddressRange};
use weft_model::objects::Service;
use weft_model::{NodeName, ObjectRef, Problem, Reason, Snapshot};

/// Every pool whose ranges nothing else claims.
#[derive(Debug, Default)]
pub struct Pools {
    /// By name; of two with one name the older.
    pools: BTreeMap<String, Pool>,
    /// Addresses of nodes, which no Service gets from a pool.
    nodes: BTreeMap<IpAddr, NodeName>,
}

#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) object: Arc<AddressPool>,
    pub(crate) ranges: Vec<AddressRange>,
    /// What is wrong with ranges of it that give nothing.
    pub(crate) refused: Vec<String>,
}

pub(crate) fn pool_ref(pool: &AddressPool) -> ObjectRef {
    ObjectRef::new("IPAddressPool", &pool.key.namespace, &pool.key.name)
}

impl Pools {
    pub fn of(snapshot: &Snapshot, problems: &mut Vec<Problem>) -> Self {
        let own = |node: &Arc<weft_model::objects::Node>| {
            node.internal_ips.iter().map(|ip| (*ip, node.name.clone())).collect::<Vec<_>>()
        };
        let mut all = Self { pools: BTreeMap::new(), nodes: snapshot.nodes.values().flat_map(own).collect() };
        let reserved: Vec<(AddressRange, String)> = snapshot
            .config
            .ranges()
            .iter()
            .map(|net| (AddressRange { first: net.network(), last: net.broadcast() }, net.to_string()))
            .collect();
        let mut objects: Vec<&Arc<AddressPool>> = snapshot.address_pools.values().collect();
        objects.sort_by_key(|pool| (pool.created, &pool.key));
        for object in objects {
            all.take(object, &reserved, problems);
        }
        all
    }

    fn take(
        &mut self,
        object: &Arc<AddressPool>,
        reserved: &[(AddressRange, String)],
        problems: &mut Vec<Problem>,
    ) {
        let name = object.key.name.to_string();
        let mut refused = Vec::new();
        let mut refuse = |reason, message: String| {
            refused.push(message.clone());
            problems.push(Problem::new(pool_ref(object), reason, message));
        };
        if let Some(other) = self.pools.get(&name) {
            let other = &other.object.key;
            refuse(
                Reason::Conflict,
                format!("metadata.name is that of the older IPAddressPool {other}; rename one of the two"),
            );
            return;
        }
        let mut ranges: Vec<AddressRange> = Vec::new();
        for range in &object.ranges {
            let rival = self.pools.values().find(|pool| pool.ranges.iter().any(|r| r.overlaps(range)));
            if let Some(rival) = rival {
                let rival = &rival.object.key;
                refuse(
                    Reason::Conflict,
                    format!(
                        "spec.addresses {range} overlaps the older IPAddressPool {rival}; give each address to one pool"
                    ),
                );
            } else if let Some((_, net)) = reserved.iter().find(|(net, _)| net.overlaps(range)) {
                refuse(
                    Reason::InvalidField,
                    format!(
                        "spec.addresses {range} is within the cluster's own range {net}; take addresses of the LAN"
                    ),
                );
            } else if ranges.iter().any(|known| known.overlaps(range)) {
                refuse(Reason::InvalidField, format!("spec.addresses {range} repeats an address; remove it"));
            } else {
                if let Some((ip, node)) = self.nodes.iter().find(|(ip, _)| range.contains(**ip)) {
                    refuse(
                        Reason::Conflict,
                        format!(
                            "spec.addresses {range} holds {ip}, Node {node}'s own, which no Service gets; \
                             take it out of the range"
                        ),
                    );
                }
                ranges.push(*range);
            }
        }
        self.pools.insert(name, Pool { object: object.clone(), ranges, refused });
    }

    /// Some pool gives addresses to Services that do not ask for one.
    pub fn assign_by_themselves(&self) -> bool {
        self.pools.values().any(|pool| pool.object.auto_assign && !pool.ranges.is_empty())
    }

    pub(crate) fn named(&self, name: &str) -> Option<&Pool> {
        self.pools.get(name)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Pool> {
        self.pools.values()
    }

    /// The pool that holds an address; an address of a node is of none.
    pub(crate) fn holding(&self, ip: IpAddr) -> Option<&Pool> {
        self.pools.values().find(|pool| pool.may_give(ip, &self.nodes))
    }

    pub(crate) fn node_of(&self, ip: IpAddr) -> Option<&NodeName> {
        self.nodes.get(&ip)
    }

    /// Pools that give to `service` by themselves, the preferred first.
    pub(crate) fn offering(&self, service: &Service, snapshot: &Snapshot) -> Vec<&Pool> {
        let fits = |pool: &&Pool| pool.object.auto_assign && pool.admits(service, snapshot);
        let mut offering: Vec<&Pool> = self.pools.values().filter(fits).collect();
        offering.sort_by_key(|pool| (pool.priority(), &pool.object.key.name));
        offering
    }

    /// Addresses of a pool in one family that may be given, in order.
    pub(crate) fn addresses<'a>(&'a self, pool: &'a Pool, ipv6: bool) -> impl Iterator<Item = IpAddr> + 'a {
        let ranges = pool.ranges.iter().filter(move |range| range.first.is_ipv6() == ipv6);
        ranges.flat_map(AddressRange::addresses).filter(|ip| pool.may_give(*ip, &self.nodes))
    }
}

impl Pool {
    fn may_give(&self, ip: IpAddr, nodes: &BTreeMap<IpAddr, NodeName>) -> bool {
        let buggy = matches!(ip, IpAddr::V4(ip) if matches!(ip.octets()[3], 0 | 255));
        self.ranges.iter().any(|range| range.contains(ip))
            && !(buggy && self.object.avoid_buggy_ips)
            && !nodes.contains_key(&ip)
    }

    /// 0 comes last.
    fn priority(&self) -> u32 {
        let priority = self.object.allocation.as_ref().map_or(0, |allocation| allocation.priority);
        priority.checked_sub(1).unwrap_or(u32::MAX)
    }

    /// `spec.serviceAllocation` lets it have an address.
    pub(crate) fn admits(&self, service: &Service, snapshot: &Snapshot) -> bool {
        let Some(allocation) = &self.object.allocation else {
            return true;
        };
        let namespace = &service.key.namespace;
        let labels = snapshot.namespaces.get(&**namespace).map(|namespace| &namespace.labels);
        let by_labels = |labels| allocation.namespace_selectors.iter().any(|one| one.matches(labels));
        let anywhere = allocation.namespaces.is_empty() && allocation.namespace_selectors.is_empty();
        let there = anywhere || allocation.namespaces.contains(&**namespace) || labels.is_some_and(by_labels);
        let selectors = &allocation.service_selectors;
        there && (selectors.is_empty() || selectors.iter().any(|one| one.matches(&service.labels)))
    }

    /// How many addresses it has, for its status: at most `i64::MAX` a family.
    pub(crate) fn size(&self, ipv6: bool, left_out: &BTreeSet<IpAddr>) -> i64 {
        let ranges = self.ranges.iter().filter(|range| range.first.is_ipv6() == ipv6);
        ranges
            .map(|range| {
                let nodes = left_out.iter().filter(|ip| range.contains(**ip)).count();
                let buggy = if self.object.avoid_buggy_ips { buggy(range) } else { 0 };
                range.count() - buggy - i64::try_from(nodes).unwrap_or(0)
            })
            .fold(0, i64::saturating_add)
    }

    pub(crate) fn nodes_within<'a>(&self, pools: &'a Pools) -> BTreeSet<IpAddr> {
        let within = |ip: &&'a IpAddr| self.ranges.iter().any(|range| range.contains(**ip));
        pools.nodes.keys().filter(within).copied().collect()
    }
}

/// Addresses of an IPv4 range that end in .0 or .255.
fn buggy(range: &AddressRange) -> i64 {
    let (IpAddr::V4(first), IpAddr::V4(last)) = (range.first, range.last) else { return 0 };
    let (first, last) = (i64::from(first.to_bits()), i64::from(last.to_bits()));
    let ending = |end: i64| (last - end).div_euclid(256) - (first - 1 - end).div_euclid(256);
    ending(0) + ending(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_end_in_0_or_255_are_counted_where_they_are() {
        let count = |text: &str| buggy(&AddressRange::parse(text).unwrap());
        assert_eq!(count("192.0.2.0/24"), 2);
        assert_eq!(count("192.0.2.1-192.0.2.254"), 0);
        assert_eq!(count("192.0.2.250-192.0.3.10"), 2);
        assert_eq!(count("192.0.2.0-192.0.2.0"), 1);
        assert_eq!(count("10.0.0.0/22"), 8);
        assert_eq!(count("2001:db8::/120"), 0);
    }
}
