//! The DNS room's applier: writes the plan's names and sees to the sockets.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use weft_netstack::reconcile::{Applied, Applier, Trust, chain};

use crate::custom::{Custom, Parts, PodMode, over};
use crate::diff::newly_triggered;
use crate::forward::Forwarder;
use crate::listen::Listeners;
use crate::serve::Resolver;
use crate::stats::Stats;
use crate::store::{PodNames, Store, Written};
use crate::zone::{DnsPlan, Groups};

/// Most changed groups that one pass names one by one.
const NAMED_CHANGES: usize = 16;

/// Owns the name store's content and the listening sockets.
pub struct DnsApplier {
    pub(crate) store: Arc<Store>,
    pub(crate) forwarder: Arc<Forwarder>,
    pub(crate) resolver: Arc<Resolver>,
    pub(crate) listeners: Listeners,
    pub(crate) stats: Arc<Stats>,
    /// What the store holds: nobody else writes it.
    pub(crate) written: Arc<Groups>,
    /// What users added that is in force.
    pub(crate) parts: Parts,
    /// Listening changes from before the first pass, told with it.
    pub(crate) early: Vec<String>,
}

impl Applier for DnsApplier {
    type Plan = DnsPlan;

    async fn apply(&mut self, plan: &DnsPlan, trust: Trust) -> Applied {
        if trust == Trust::Nothing {
            self.listeners.forget_ended();
        }
        let listen = &plan.listen | &plan.hosts;
        self.forwarder.set_own(listen.clone());
        let mut changed = std::mem::take(&mut self.early);
        let (opened, mut failed) = self.listeners.ensure(&listen, &plan.listen);
        failed.extend(self.listeners.silent());
        changed.extend(opened);
        let custom_changed = self.apply_custom(plan);
        changed.extend(named(&self.store.write(&self.written, plan)));
        self.count_programmed(plan);
        self.written = plan.groups.clone();
        changed.extend(custom_changed);
        Applied {
            changed,
            failed: failed.iter().map(|error| chain(error)).collect(),
            details: self.details(),
        }
    }
}

impl DnsApplier {
    /// What users added comes into force as a whole; what cannot be read stays as it is.
    fn apply_custom(&mut self, plan: &DnsPlan) -> Option<String> {
        self.parts = over(&plan.custom, &self.parts);
        let own = plan.zones.iter().flat_map(|zones| zones.apexes().cloned()).collect();
        let custom = Custom::new(&self.parts, &plan.nodes, own);
        self.store.set_pod_names(pod_names(custom.pod_mode(), plan));
        self.forwarder.set_ranges(plan.ranges.clone());
        self.forwarder.configure(custom.routes(), custom.cache_seconds());
        self.resolver.set_custom(custom).then(|| "zones, hosts and rules of users".to_owned())
    }

    /// Not of what was there when we came.
    fn count_programmed(&self, plan: &DnsPlan) {
        if self.written.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        for millis in newly_triggered(&self.written, &plan.groups) {
            let then = Duration::from_millis(u64::try_from(millis).unwrap_or_default());
            self.stats.count_programmed(now.saturating_sub(then));
        }
    }

    fn details(&self) -> Vec<(String, String)> {
        let list = |items: Vec<String>| if items.is_empty() { "none".to_owned() } else { items.join(" ") };
        let listening = self.listeners.addresses().iter().map(ToString::to_string).collect();
        let upstreams = self.forwarder.nameservers().iter().map(|server| server.ip().to_string()).collect();
        vec![
            ("names".to_owned(), self.store.len().to_string()),
            ("listening".to_owned(), list(listening)),
            ("upstreams".to_owned(), list(upstreams)),
            ("cached".to_owned(), self.forwarder.cached().to_string()),
            ("queries".to_owned(), self.stats.queries().to_string()),
        ]
    }
}

fn pod_names(mode: PodMode, plan: &DnsPlan) -> PodNames {
    match mode {
        PodMode::Disabled => PodNames::Disabled,
        PodMode::Insecure => PodNames::Insecure,
        PodMode::Verified => PodNames::Verified(plan.pods.clone().unwrap_or_default()),
    }
}

fn named(written: &[Written]) -> Vec<String> {
    let mut lines: Vec<String> = written.iter().take(NAMED_CHANGES).map(Written::to_string).collect();
    if written.len() > NAMED_CHANGES {
        lines.push(format!("and {} more objects", written.len() - NAMED_CHANGES));
    }
    lines
}
