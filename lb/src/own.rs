//! Services that are ours to answer for, among all others. In: Snapshots, one after the other. Out: LoadBalancers of our classes. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use weft_model::balancer::Balancer;
use weft_model::objects::Service;
use weft_model::snapshot::{Objects, changes};
use weft_model::{ServiceKey, Snapshot};

/// A big cluster has few of them: only what changes is looked at.
#[derive(Debug, Default)]
pub(crate) struct OwnServices {
    all: Objects<ServiceKey, Service>,
    own: BTreeMap<ServiceKey, Arc<Service>>,
}

impl OwnServices {
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        let mut services = Self::default();
        services.follow(snapshot);
        services
    }

    pub(crate) fn follow(&mut self, snapshot: &Snapshot) {
        let before = std::mem::replace(&mut self.all, snapshot.services.clone());
        for (key, _, service) in changes(&before, &self.all) {
            match service.filter(|service| service.balancer.as_deref().is_some_and(Balancer::is_ours)) {
                Some(service) => drop(self.own.insert(key.clone(), service.clone())),
                None => drop(self.own.remove(key)),
            }
        }
    }

    /// In the order of their keys.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<Service>, &Balancer)> {
        self.own.values().filter_map(|service| Some((service, service.balancer.as_deref()?)))
    }
}
