//! The applier: owner of the nft table `weft-proxy`, and of the UDP flows that went through it, and of the health check ports. The affinity of clients lives
//! in the table's dynamic maps and so outlives this process.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;

use weft_model::constants::TABLE_PROXY;

use super::affinity::AffinityTargets;
use super::health::{HealthPorts, ProxyHealth};
use super::kube_proxy::KubeProxy;
use super::layout::{Scope, SetName};
use super::metrics::ProxyMetrics;
use super::plan::ProxyPlan;
use super::stale::{UdpDestination, UdpTargets};
use crate::kernel::conntrack::{ConntrackError, delete_udp_flows};
use crate::kernel::memory::give_memory_back;
use crate::kernel::nft::{NftError, NftTable};
use crate::reconcile::{Applied, Applier, Trust, chain};

/// Commits the table in one transaction, then removes stale UDP flows.
pub struct ProxyApplier {
    table: NftTable,
    /// What the flows were last reconciled with; at first what an earlier process left in the table.
    udp: Option<Arc<UdpTargets>>,
    /// What the clients' affinity was last reconciled with.
    affinity: Option<Arc<AffinityTargets>>,
    health: Arc<ProxyHealth>,
    health_ports: HealthPorts,
    metrics: Arc<ProxyMetrics>,
    /// What `weft status` says of a kube-proxy on this node, from the last look at the kernel.
    kube_proxy: Option<String>,
}

impl Default for ProxyApplier {
    fn default() -> Self {
        Self::new()
    }
}

impl ProxyApplier {
    pub fn new() -> Self {
        let metrics = Arc::<ProxyMetrics>::default();
        Self {
            table: NftTable::new(TABLE_PROXY),
            udp: None,
            affinity: None,
            health: Arc::new(ProxyHealth::new(metrics.clone())),
            health_ports: HealthPorts::default(),
            metrics,
            kube_proxy: None,
        }
    }

    /// What load balancers are told; it follows what is applied.
    pub fn health(&self) -> Arc<ProxyHealth> {
        self.health.clone()
    }

    /// What is counted on the way.
    pub fn metrics(&self) -> Arc<ProxyMetrics> {
        self.metrics.clone()
    }
}

impl Applier for ProxyApplier {
    type Plan = ProxyPlan;

    async fn apply(&mut self, plan: &ProxyPlan, trust: Trust) -> Applied {
        let mut applied = Applied::default();
        if self.udp.is_none() {
            self.udp = Some(Arc::new(self.left_behind()));
        }
        let told = self.table.apply(&plan.table, trust);
        if trust == Trust::Nothing {
            // What the kernel has was read as a whole.
            give_memory_back();
        }
        match told {
            Ok(changed) => {
                applied.changed = changed;
                self.table.kernel_took().into_iter().for_each(|took| self.metrics.committed(took));
            }
            Err(error) => {
                // Flows are looked at only under rules that send the next packet to the right place.
                applied.failed.push(format!("table {TABLE_PROXY}: {}", chain(&error)));
                self.health.failed();
                return applied;
            }
        }
        let known = self.udp.as_ref().is_some_and(|known| Arc::ptr_eq(known, &plan.udp));
        if trust == Trust::Nothing || !known {
            match self.delete_stale(&plan.udp) {
                Ok(0) => self.udp = Some(plan.udp.clone()),
                Ok(deleted) => {
                    applied.changed.push(format!("{deleted} stale UDP flows"));
                    self.udp = Some(plan.udp.clone());
                }
                Err(error) => applied.failed.push(format!("stale UDP flows: {}", chain(&error))),
            }
        }
        let known = self.affinity.as_ref().is_some_and(|known| Arc::ptr_eq(known, &plan.affinity));
        if trust == Trust::Nothing || !known {
            match self.forget_stale(plan) {
                Ok(0) => self.affinity = Some(plan.affinity.clone()),
                Ok(forgotten) => {
                    applied.changed.push(format!("{forgotten} clients' affinity forgotten"));
                    self.affinity = Some(plan.affinity.clone());
                }
                Err(error) => applied.failed.push(format!("clients' affinity: {}", chain(&error))),
            }
        }
        self.metrics.programmed(plan);
        self.health.programmed(plan.health.clone(), Timestamp::now());
        applied.details = details(plan);
        if trust == Trust::Nothing {
            self.kube_proxy = match KubeProxy::look() {
                Ok(there) => there.sentence(),
                Err(error) => Some(format!("cannot be looked for: {}", chain(&error))),
            };
        }
        let beside = self.kube_proxy.iter().map(|said| ("kube-proxy".to_owned(), said.clone()));
        applied.details.extend(beside);
        let taken = self.health_ports.reconcile(&self.health, &plan.health).await;
        // Nothing but the load balancer's question depends on it, so that the node is no less ready.
        applied.details.extend(taken.into_iter().map(|line| ("not answered".to_owned(), line)));
        applied
    }
}

impl ProxyApplier {
    /// The UDP destinations of the table as it is in the kernel. Without one, or when it cannot be read, there are none: then
    /// flows of Services deleted meanwhile end by their own timeout.
    fn left_behind(&mut self) -> UdpTargets {
        let mut destinations = BTreeMap::new();
        for scope in [Scope::Vip, Scope::NodePort] {
            for ipv6 in [false, true] {
                let elements = self.table.elements(SetName::Frontends(scope).of(ipv6)).unwrap_or_default();
                let udp = elements.iter().filter_map(|(key, _)| UdpDestination::of_frontend(key, ipv6));
                destinations.extend(udp.map(|destination| (destination, BTreeSet::new())));
            }
        }
        let groups = BTreeMap::from([(String::new(), Arc::new(destinations))]);
        UdpTargets { groups, ..UdpTargets::default() }
    }

    /// Reads the tracked UDP flows once, whatever changed.
    fn delete_stale(&self, now: &UdpTargets) -> Result<usize, ConntrackError> {
        let index = now.index();
        let gone = self.udp.as_ref().map(|before| now.gone(before)).unwrap_or_default();
        let begun_at = Instant::now();
        let found = Cell::new([0; 2]);
        let deleted = delete_udp_flows(|flow| {
            let (sent_to, answered_by) = (flow.original.destination, flow.reply.source);
            let is_stale = now.is_stale(&index, &gone, sent_to, answered_by);
            let mut counts = found.get();
            counts[usize::from(sent_to.is_ipv6())] += u64::from(is_stale);
            found.set(counts);
            is_stale
        });
        self.metrics.reconciled(begun_at.elapsed(), if deleted.is_ok() { found.get() } else { [0; 2] });
        deleted
    }
}

impl ProxyApplier {
    /// Reads what the rules remember and deletes what they must not any more.
    fn forget_stale(&mut self, now: &ProxyPlan) -> Result<usize, NftError> {
        let index = now.affinity.index();
        let mut forgotten = 0;
        let maps = [false, true].map(|ipv6| SetName::Affinity.of(ipv6));
        for map in maps.into_iter().filter(|map| now.table.sets.contains_key(*map)) {
            let remembered = self.table.elements(map)?.into_iter();
            let stale: Vec<_> =
                remembered.filter(|(key, data)| index.is_stale(key, data)).map(|(key, _)| key).collect();
            self.table.remove(map, &stale)?;
            forgotten += stale.len();
        }
        Ok(forgotten)
    }
}

/// For `weft status`: how much is programmed. Counts groups, one a Service, as it runs on every pass.
fn details(plan: &ProxyPlan) -> Vec<(String, String)> {
    let services = |set: SetName, ipv6| plan.table.sets.get(set.of(ipv6)).map_or(0, |set| set.groups.len());
    [
        ("services IPv4", SetName::Frontends(Scope::Vip), false),
        ("services IPv6", SetName::Frontends(Scope::Vip), true),
        ("without endpoints IPv4", SetName::NoEndpoints, false),
        ("without endpoints IPv6", SetName::NoEndpoints, true),
    ]
    .map(|(name, set, ipv6)| (name.to_owned(), services(set, ipv6).to_string()))
    .to_vec()
}

#[cfg(test)]
mod tests;
