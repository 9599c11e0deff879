//! The DNS room's applier: writes the plan's names and sees to the sockets.

use std::sync::Arc;

use weft_netstack::reconcile::{Applied, Applier, Trust, chain};

use crate::custom::{Custom, Parts, over};
use crate::forward::Forwarder;
use crate::listen::Listeners;
use crate::serve::Resolver;
use crate::stats::Stats;
use crate::store::Store;
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
    pub(crate) written: Groups,
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
        self.forwarder.set_own(plan.listen.clone());
        let mut changed = std::mem::take(&mut self.early);
        let (opened, failed) = self.listeners.ensure(&plan.listen);
        changed.extend(opened);
        changed.extend(shortened(self.store.write(&self.written, plan)));
        self.written.clone_from(&plan.groups);
        changed.extend(self.apply_custom(plan));
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
        self.forwarder.configure(custom.routes(), custom.cache_seconds());
        self.resolver.set_custom(custom).then(|| "zones, hosts and rules of users".to_owned())
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

fn shortened(mut changed: Vec<String>) -> Vec<String> {
    if changed.len() > NAMED_CHANGES {
        let more = changed.len() - NAMED_CHANGES;
        changed.truncate(NAMED_CHANGES);
        changed.push(format!("and {more} more objects"));
    }
    changed
}
