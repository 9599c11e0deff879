//! Services with their EndpointSlices, followed from Snapshot to Snapshot.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::ids::{ServiceKey, SliceKey};
use crate::objects::{EndpointSlice, Service};
use crate::shared_map::SharedMap;
use crate::snapshot::{Objects, Snapshot, changes};

/// What a planner saw last.
#[derive(Debug, Default)]
pub struct FollowedServices {
    services: Objects<ServiceKey, Service>,
    slices: Objects<SliceKey, EndpointSlice>,
    /// In the order of their keys.
    by_service: SharedMap<ServiceKey, SmallVec<[Arc<EndpointSlice>; 1]>>,
}

impl FollowedServices {
    /// Takes over what this Snapshot has. Returns the Services that came, went or changed, and those with such slices, each once and
    /// in order.
    pub fn follow(&mut self, snapshot: &Snapshot) -> Vec<ServiceKey> {
        let services = std::mem::replace(&mut self.services, snapshot.services.clone());
        let mut dirty: Vec<ServiceKey> =
            changes(&services, &snapshot.services).map(|(key, ..)| key.clone()).collect();
        let slices = std::mem::replace(&mut self.slices, snapshot.endpoint_slices.clone());
        for (key, old, new) in changes(&slices, &snapshot.endpoint_slices) {
            if let Some(old) = old {
                let siblings = self.by_service.get_or_default(old.service.clone());
                siblings.retain(|slice| slice.key != *key);
                if siblings.is_empty() {
                    self.by_service.remove(&old.service);
                }
                dirty.push(old.service.clone());
            }
            if let Some(new) = new {
                let siblings = self.by_service.get_or_default(new.service.clone());
                siblings.insert(siblings.partition_point(|slice| slice.key < *key), new.clone());
                dirty.push(new.service.clone());
            }
        }
        dirty.sort();
        dirty.dedup();
        dirty
    }

    pub fn get(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// In the order of their keys.
    pub fn slices(&self, key: &ServiceKey) -> impl Iterator<Item = &EndpointSlice> + Clone {
        self.by_service.get(key).into_iter().flatten().map(Arc::as_ref)
    }
}
