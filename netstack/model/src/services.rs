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
    /// Slices that are not [named after](is_named_after) their Service, by Service.
    named_otherwise: SharedMap<ServiceKey, SmallVec<[Arc<EndpointSlice>; 1]>>,
}

impl FollowedServices {
    /// Takes over what this Snapshot has. Returns the Services that came, went or changed, and those with such slices, each once and
    /// in order.
    pub fn follow(&mut self, snapshot: &Snapshot) -> Vec<ServiceKey> {
        let services = std::mem::replace(&mut self.services, snapshot.services.clone());
        let mut dirty: Vec<ServiceKey> =
            changes(&services, &snapshot.services).map(|(key, ..)| key.clone()).collect();
        let slices = std::mem::replace(&mut self.slices, snapshot.endpoint_slices.clone());
        for (_, old, new) in changes(&slices, &snapshot.endpoint_slices) {
            let otherwise = |slice: &&Arc<EndpointSlice>| !is_named_after(&slice.key, &slice.service);
            if let Some(slice) = old.filter(otherwise) {
                let siblings = self.named_otherwise.get_or_default(slice.service.clone());
                siblings.retain(|sibling| sibling.key != slice.key);
                if siblings.is_empty() {
                    self.named_otherwise.remove(&slice.service);
                }
            }
            if let Some(slice) = new.filter(otherwise) {
                self.named_otherwise.get_or_default(slice.service.clone()).push(slice.clone());
            }
            dirty.extend([old, new].into_iter().flatten().map(|slice| slice.service.clone()));
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
        let beside = self.slices.range(key.clone()..).take_while(|(slice, _)| is_named_after(slice, key));
        let of_service = beside.map(|(_, slice)| slice).filter(|slice| slice.service == *key);
        let named_otherwise = self.named_otherwise.get(key).into_iter().flatten();
        let mut slices: SmallVec<[&EndpointSlice; 2]> =
            of_service.chain(named_otherwise).map(Arc::as_ref).collect();
        slices.sort_by_key(|slice| &slice.key);
        slices.into_iter()
    }
}

/// As nearly all are, so that they stand beside each other: `web` has `web-x7k2p`. So may other Services' that begin alike; of all
/// slices one is met no more often than its name has letters.
fn is_named_after(slice: &SliceKey, service: &ServiceKey) -> bool {
    slice.namespace == service.namespace && slice.name.starts_with(&*service.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NodeFacts;
    use crate::node_facts::WireguardBackend;

    fn snapshot(slices: &[(&str, &str)]) -> Snapshot {
        let facts = NodeFacts {
            name: "n1".into(),
            uplinks: Vec::new(),
            wireguard_backend: WireguardBackend::Userspace,
            foreign_routes: Vec::new(),
            loopback: Default::default(),
            observed: Default::default(),
        };
        let slice = |(name, service): &(&str, &str)| {
            let key = |name: &str| SliceKey::new("default", name);
            let slice = EndpointSlice {
                key: key(name),
                service: key(service),
                ipv6: false,
                ports: Vec::new(),
                endpoints: Vec::new(),
                triggered_millis: None,
            };
            (slice.key.clone(), Arc::new(slice))
        };
        Snapshot {
            generation: Default::default(),
            config: Arc::default(),
            facts: Arc::new(facts),
            nodes: Arc::default(),
            config_maps: Arc::default(),
            namespaces: Arc::default(),
            services: Arc::default(),
            endpoint_slices: Arc::new(slices.iter().map(slice).collect()),
            pods: Arc::default(),
            policies: Arc::default(),
            ingress_classes: Arc::default(),
            ingresses: Arc::default(),
            referred: Arc::default(),
            service_cidrs: Arc::default(),
            address_pools: Arc::default(),
            l2_advertisements: Arc::default(),
            attachments: Arc::default(),
            problems: Arc::default(),
            from_store: false,
        }
    }

    fn slices<'a>(services: &'a FollowedServices, name: &str) -> Vec<&'a str> {
        services.slices(&ServiceKey::new("default", name)).map(|slice| &*slice.key.name).collect()
    }

    #[test]
    fn a_service_has_its_slices_whatever_they_are_called_and_no_others() {
        let mut services = FollowedServices::default();
        let all = [("a-b-x", "a-b"), ("a-x", "a"), ("a-y", "a-b"), ("by-hand", "a"), ("zz", "a")];
        let dirty = services.follow(&snapshot(&all));
        assert_eq!(dirty.iter().map(|key| &*key.name).collect::<Vec<_>>(), ["a", "a-b"]);
        assert_eq!(slices(&services, "a"), ["a-x", "by-hand", "zz"]);
        assert_eq!(slices(&services, "a-b"), ["a-b-x", "a-y"]);
        assert_eq!(slices(&services, ""), [""; 0]);
        services.follow(&snapshot(&[("a-y", "a-b"), ("by-hand", "a-b"), ("zz", "a")]));
        assert_eq!(slices(&services, "a"), ["zz"]);
        assert_eq!(slices(&services, "a-b"), ["a-y", "by-hand"]);
        services.follow(&snapshot(&[]));
        assert!(slices(&services, "a").is_empty() && services.named_otherwise.is_empty());
    }
}
