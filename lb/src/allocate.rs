//! Which Service has which address. In: a Snapshot, whose statuses say who has what now. Out: the addresses of every Service that
//! is ours, and a Problem for whoever gets fewer than it asks for. Pure, and the only decider.
//!
//! ```text
//!  statuses --keep what is still legal, the older Service first--> held --give the rest, the older first--> grants
//! ```
//!
//! Nothing is remembered: the statuses are the memory. So a restart, another writer or an edit of a pool moves no address that is
//! still legal. An address that its Service gave up is free for others when no node answers for it any more, as the nodes say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::balancer::{Balancer, CLASS_NODES, DualStack};
use weft_model::objects::{Protocol, Service, TrafficPolicy};
use weft_model::{NodeName, ObjectRef, Problem, Reason, ServiceKey, Snapshot};

use crate::nodes::{self, NodePorts};
use crate::own::OwnServices;
use crate::pools::{Pool, Pools, pool_ref};
use crate::told::Told;

/// Condition of a Service whose address is of a pool; its message names the pool.
pub(crate) const CONDITION: &str = "weft.network/LoadBalancer";
const POOL_WORDS: &str = "of IPAddressPool ";

/// What one Service gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// In the order of its families; of node addresses in the order of the nodes.
    pub addresses: Vec<IpAddr>,
    /// Pools that the addresses are of, or were of; empty for addresses of nodes.
    pub pools: BTreeSet<String>,
    /// Why there are fewer than it asks for.
    pub refusal: Option<String>,
    /// What is wrong with an address that it keeps.
    pub warning: Option<String>,
}

#[derive(Debug, Default)]
pub struct Allocation {
    pub grants: BTreeMap<ServiceKey, Grant>,
    pub pools: Pools,
    pub problems: Vec<Problem>,
}

pub(crate) fn service_ref(key: &ServiceKey) -> ObjectRef {
    ObjectRef::new("Service", &key.namespace, &key.name)
}

/// Addresses of every LoadBalancer Service of our classes.
pub fn allocate(snapshot: &Snapshot) -> Allocation {
    allocate_to(&OwnServices::of(snapshot), snapshot)
}

/// To these Services of the Snapshot.
pub(crate) fn allocate_to(services: &OwnServices, snapshot: &Snapshot) -> Allocation {
    let mut problems = Vec::new();
    let pools = Pools::of(snapshot, &mut problems);
    let mut services: Vec<(&Arc<Service>, &Balancer)> = services.iter().collect();
    services.sort_by_key(|(service, _)| (service.created, &service.key));
    let of_nodes = |balancer: &Balancer| {
        let asks = !balancer.fixed.is_empty() || balancer.unreadable || balancer.pool.is_some();
        balancer.class.as_deref() == Some(CLASS_NODES) || !(asks || pools.assign_by_themselves())
    };
    let (by_nodes, by_pools): (Vec<_>, Vec<_>) =
        services.into_iter().partition(|(_, balancer)| of_nodes(balancer));

    let mut desk = Desk {
        snapshot,
        pools: &pools,
        told: Told::of(snapshot),
        holders: BTreeMap::new(),
        taken: BTreeMap::new(),
        problems: &mut problems,
    };
    let mut grants: BTreeMap<ServiceKey, Grant> = BTreeMap::new();
    for (service, balancer) in &by_pools {
        grants.insert(service.key.clone(), desk.keep(service, balancer));
    }
    for (service, balancer) in &by_pools {
        if let Some(grant) = grants.get_mut(&service.key) {
            desk.give(service, balancer, grant);
        }
    }
    let mut ports = NodePorts::default();
    // Who has the nodes' ports now comes before who wants them.
    let (having, wanting): (Vec<_>, Vec<_>) =
        by_nodes.into_iter().partition(|(_, balancer)| nodes::has_some(balancer, snapshot));
    for (service, balancer) in having.into_iter().chain(wanting) {
        let grant = nodes::grant(service, balancer, snapshot, &mut ports);
        grants.insert(service.key.clone(), grant);
    }
    for (key, grant) in &grants {
        let refusal = grant.refusal.iter().map(|why| Problem::new(service_ref(key), Reason::Missing, why));
        problems.extend(refusal);
    }
    Allocation { grants, pools, problems }
}

/// Where addresses of pools are given out.
struct Desk<'a> {
    snapshot: &'a Snapshot,
    pools: &'a Pools,
    told: Told<'a>,
    holders: BTreeMap<IpAddr, Vec<&'a Arc<Service>>>,
    /// By pool and family: how many of its first addresses are not free, so that each Service need not look at all.
    taken: BTreeMap<(&'a str, bool), usize>,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Desk<'a> {
    /// What it has and may keep, one a family.
    fn keep(&mut self, service: &'a Arc<Service>, balancer: &Balancer) -> Grant {
        let mut grant = Grant::default();
        if balancer.unreadable {
            return grant;
        }
        for ipv6 in wanted_families(balancer) {
            let current = balancer.ingress.iter().filter_map(|ingress| ingress.ip);
            let kept = current
                .filter(|ip| ip.is_ipv6() == ipv6)
                .find_map(|ip| Some((ip, self.legal(service, balancer, ip)?)));
            if let Some((ip, (pool, warning))) = kept {
                self.hold(service, ip, pool, &mut grant);
                grant.warning = grant.warning.or(warning);
            }
        }
        grant
    }

    fn hold(&mut self, service: &'a Arc<Service>, ip: IpAddr, pool: String, grant: &mut Grant) {
        self.holders.entry(ip).or_default().push(service);
        grant.addresses.push(ip);
        grant.pools.insert(pool);
    }

    /// The pool of an address that `service` has and may keep. One that left its pool stays with whom Weft gave it to, with a warning.
    fn legal(
        &mut self,
        service: &Arc<Service>,
        balancer: &Balancer,
        ip: IpAddr,
    ) -> Option<(String, Option<String>)> {
        let asked = balancer.fixed.iter().filter(|fixed| fixed.is_ipv6() == ip.is_ipv6());
        if asked.into_iter().any(|fixed| *fixed != ip) || !self.sharable(service, ip) {
            return None;
        }
        if let Some(pool) = self.pools.holding(ip) {
            let name = &pool.object.key.name;
            return balancer
                .pool
                .as_ref()
                .is_none_or(|asked| **asked == **name)
                .then(|| (name.to_string(), None));
        }
        let former = former_pool(balancer, ip).filter(|_| self.pools.node_of(ip).is_none())?;
        if balancer.pool.as_ref().is_some_and(|asked| *asked != former) {
            return None;
        }
        let object = match self.pools.named(&former) {
            Some(pool) => pool_ref(&pool.object),
            None => service_ref(&service.key),
        };
        let message = format!(
            "spec.addresses of IPAddressPool {former} no longer holds {ip}, which Service {} has and keeps; \
             put it back, or give the Service another address",
            service.key
        );
        self.problems.push(Problem::new(object, Reason::Conflict, message.clone()));
        Some((former, Some(message)))
    }

    /// Nobody has it, and no node answers for it.
    fn is_free(&self, ip: IpAddr) -> bool {
        !self.holders.contains_key(&ip) && self.told.holder(ip).is_none()
    }

    /// Somebody had it, and a node still answers for it.
    fn lingering(&self, ip: IpAddr) -> Option<&'a NodeName> {
        self.told.holder(ip).filter(|_| !self.holders.contains_key(&ip))
    }

    /// Nobody has it, or all that do share it with `service`.
    fn sharable(&self, service: &Service, ip: IpAddr) -> bool {
        self.holders.get(&ip).into_iter().flatten().all(|holder| may_share(holder, service))
    }

    /// Gives what `service` lacks.
    fn give(&mut self, service: &'a Arc<Service>, balancer: &Balancer, grant: &mut Grant) {
        let kept: Vec<IpAddr> = std::mem::take(&mut grant.addresses);
        let mut refusals = Vec::new();
        for ipv6 in wanted_families(balancer) {
            if let Some(ip) = kept.iter().find(|ip| ip.is_ipv6() == ipv6) {
                grant.addresses.push(*ip);
                continue;
            }
            match self.find(service, balancer, ipv6) {
                Ok((ip, pool)) => self.hold(service, ip, pool, grant),
                Err(why) => refusals.push(why),
            }
        }
        if balancer.fixed.iter().any(|ip| !balancer.families.contains(&ip.is_ipv6())) {
            refusals.push(
                "it asks for an address of a family that is not in spec.ipFamilies; add the family"
                    .to_owned(),
            );
        }
        let enough = match balancer.dual_stack {
            DualStack::Require => refusals.is_empty(),
            DualStack::Single | DualStack::Prefer => !grant.addresses.is_empty(),
        };
        // Half of what it requires is of no use to it, unless it has it already.
        if !enough && kept.is_empty() {
            for ip in std::mem::take(&mut grant.addresses) {
                self.release(service, ip);
            }
            grant.pools.clear();
        }
        let asked_in_vain = !balancer.fixed.is_empty() || balancer.dual_stack == DualStack::Require;
        if !enough || asked_in_vain {
            grant.refusal = refusals.into_iter().next();
        }
    }

    fn release(&mut self, service: &Arc<Service>, ip: IpAddr) {
        if let Some(holders) = self.holders.get_mut(&ip) {
            holders.retain(|holder| holder.key != service.key);
            if holders.is_empty() {
                self.holders.remove(&ip);
                self.taken.clear();
            }
        }
    }

    fn find(
        &mut self,
        service: &Service,
        balancer: &Balancer,
        ipv6: bool,
    ) -> Result<(IpAddr, String), String> {
        if balancer.unreadable {
            return Err("it asks for an address that cannot be read, so it gets none; correct it".to_owned());
        }
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        if let Some(ip) = balancer.fixed.iter().find(|ip| ip.is_ipv6() == ipv6) {
            return self.fixed(service, balancer, *ip);
        }
        if !balancer.fixed.is_empty() && balancer.dual_stack != DualStack::Require {
            return Err(format!("it asks for no {family} address"));
        }
        let candidates: Vec<&Pool> = match &balancer.pool {
            Some(name) => vec![self.admitting(name, service)?],
            None => self.pools.offering(service, self.snapshot),
        };
        let found = candidates.iter().find_map(|pool| {
            let ip = match balancer.sharing_key {
                Some(_) => {
                    let fits = |ip: &IpAddr| self.sharable(service, *ip) && self.lingering(*ip).is_none();
                    self.pools.addresses(pool, ipv6).find(fits)
                }
                None => self.first_free(pool, ipv6),
            };
            Some((ip?, pool.object.key.name.to_string()))
        });
        found.ok_or_else(|| {
            let named: Vec<&str> = candidates.iter().map(|pool| &*pool.object.key.name).collect();
            let mut of_pools = candidates.iter().flat_map(|pool| self.pools.addresses(pool, ipv6));
            let lingering = of_pools.find_map(|ip| Some((ip, self.lingering(ip)?)));
            let refused = candidates.iter().find_map(|pool| pool.refused.first());
            match (named.as_slice(), lingering, refused) {
                ([], _, _) => format!("no IPAddressPool gives it an {family} address; make one that does (autoAssign, serviceAllocation)"),
                (_, Some((ip, node)), _) => {
                    format!("{ip} is the next free {family} address, and is given when Node {node} no longer answers for it")
                }
                (named, None, None) => format!("no {family} address is free in IPAddressPool {}; add some to spec.addresses", named.join(", ")),
                (named, None, Some(refused)) => format!("no {family} address is free in IPAddressPool {}: {refused}", named.join(", ")),
            }
        })
    }

    fn first_free(&mut self, pool: &'a Pool, ipv6: bool) -> Option<IpAddr> {
        let slot = (&*pool.object.key.name, ipv6);
        let taken = self.taken.get(&slot).copied().unwrap_or(0);
        let mut rest = self.pools.addresses(pool, ipv6).enumerate().skip(taken);
        let (number, ip) = rest.find(|(_, ip)| self.is_free(*ip))?;
        self.taken.insert(slot, number);
        Some(ip)
    }

    fn admitting(&self, name: &str, service: &Service) -> Result<&'a Pool, String> {
        let pool = self
            .pools
            .named(name)
            .ok_or_else(|| format!("it asks for IPAddressPool {name}, which is not there; make it"))?;
        let admitted = pool.admits(service, self.snapshot);
        admitted.then_some(pool).ok_or_else(|| {
            format!("spec.serviceAllocation of IPAddressPool {name} does not let it in; change it, or ask for another")
        })
    }

    fn fixed(&self, service: &Service, balancer: &Balancer, ip: IpAddr) -> Result<(IpAddr, String), String> {
        if let Some(node) = self.pools.node_of(ip) {
            return Err(format!("it asks for {ip}, which is Node {node}'s own; ask for another"));
        }
        let pool = self.pools.holding(ip).ok_or_else(|| {
            format!("it asks for {ip}, which is in no IPAddressPool; add it to one, or ask for another")
        })?;
        let name = &pool.object.key.name;
        if balancer.pool.as_ref().is_some_and(|asked| **asked != **name) {
            return Err(format!("it asks for {ip}, which is of IPAddressPool {name}, and for another pool"));
        }
        self.admitting(name, service)?;
        let rival = self.holders.get(&ip).into_iter().flatten().find(|holder| !may_share(holder, service));
        if let Some(node) = self.lingering(ip) {
            return Err(format!(
                "it asks for {ip}, which Node {node} still answers for; it gets it when that ends"
            ));
        }
        match rival {
            Some(rival) => Err(format!(
                "it asks for {ip}, which Service {} has{}",
                rival.key,
                objection_to_sharing(rival, service)
            )),
            None => Ok((ip, name.to_string())),
        }
    }
}

/// Every family that it is to have an address of, in order.
fn wanted_families(balancer: &Balancer) -> Vec<bool> {
    balancer.families.clone()
}

/// The pool of which Weft gave it the address, as it wrote then.
pub(crate) fn former_pool(balancer: &Balancer, ip: IpAddr) -> Option<String> {
    let condition = balancer.conditions.iter().find(|condition| condition.kind == CONDITION)?;
    let (granted, _) = condition.message.split_once("; ").unwrap_or((&condition.message, ""));
    let parts = granted.split(", ");
    let mut of_pools = parts.filter_map(|part| part.split_once(&format!(" {POOL_WORDS}")));
    of_pools.find(|(address, _)| address.parse() == Ok(ip)).map(|(_, pool)| pool.to_owned())
}

/// What [`former_pool`] reads.
pub(crate) fn grant_message(grant: &Grant, pools: &Pools) -> String {
    let of_pool = |ip: &IpAddr| format!("{ip} {POOL_WORDS}{}", pool_of(grant, *ip, pools));
    grant.addresses.iter().map(of_pool).collect::<Vec<_>>().join(", ")
}

/// The pool that an address is of, or was.
pub(crate) fn pool_of(grant: &Grant, ip: IpAddr, pools: &Pools) -> String {
    let pool = pools.holding(ip).map(|pool| pool.object.key.name.to_string());
    pool.or_else(|| grant.pools.first().cloned()).unwrap_or_default()
}

fn may_share(a: &Service, b: &Service) -> bool {
    objection_to_sharing(a, b).is_empty()
}

/// MetalLB's rules: the same key, other ports, and packets that may come to any node, or to the same pods.
fn objection_to_sharing(a: &Service, b: &Service) -> String {
    let key = |service: &Service| service.balancer.as_ref().and_then(|balancer| balancer.sharing_key.clone());
    let ports = |service: &Service| -> BTreeSet<(Protocol, u16)> {
        service.ports.iter().map(|port| (port.protocol, port.port)).collect()
    };
    if key(a).is_none() || key(a) != key(b) {
        return "; give both the same annotation metallb.io/allow-shared-ip, or ask for another".to_owned();
    }
    if let Some((protocol, port)) = ports(a).intersection(&ports(b)).next() {
        return format!(" with {} port {port} too; give one of the two another port", protocol.name());
    }
    let everywhere = |service: &Service| service.external_traffic_policy == TrafficPolicy::Cluster;
    let selector =
        |service: &Service| service.balancer.as_ref().and_then(|balancer| balancer.selector.clone());
    if (everywhere(a) && everywhere(b)) || (selector(a).is_some() && selector(a) == selector(b)) {
        return String::new();
    }
    "; with externalTrafficPolicy Local only Services of the same pods share an address".to_owned()
}

#[cfg(test)]
pub(crate) mod tests;
