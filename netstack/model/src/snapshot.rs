//! The immutable picture of every input at one generation.
//!
//! It does not exist until every required watch has listed once, or the Store has given the last good one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::balancer::{AddressPool, L2Advertisement};
use crate::config::ClusterConfig;
use crate::ids::{Generation, NamespacedName, NodeName, PodKey, PolicyKey, ServiceKey, SliceKey};
use crate::ingress::{Ingress, IngressClass, Referred};
use crate::node_facts::NodeFacts;
use crate::objects::{
    ConfigMap, EndpointSlice, Namespace, Node, Pod, Service, ServiceCidr, host_address, ingress_address,
};
use crate::policy::NetworkPolicy;
use crate::problem::Problem;
use crate::shared_map::SharedMap;

/// Cluster objects by key. Values are `Arc`s: a planner may memoise by their identity (decision 16). What two Snapshots have in common
/// is there once.
pub type Objects<K, V> = Arc<SharedMap<K, Arc<V>>>;

/// Addresses of this node's pods. Known before the API shows them, and never out of date.
pub type Attachments = Objects<IpAddr, AttachedPod>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttachedPod {
    /// `None` where the container runtime did not say, or the lease was rebuilt from the kernel.
    pub pod: Option<PodKey>,
    /// Empty where the container runtime did not say.
    pub uid: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub generation: Generation,
    /// The flags, with the service ranges of [`Self::service_cidrs`] where there are any.
    pub config: Arc<ClusterConfig>,
    pub facts: Arc<NodeFacts>,
    pub nodes: Objects<NodeName, Node>,
    /// `kube-system/coredns-custom`, where there is one.
    #[serde(default)]
    pub config_maps: Objects<NamespacedName, ConfigMap>,
    pub namespaces: Objects<String, Namespace>,
    pub services: Objects<ServiceKey, Service>,
    pub endpoint_slices: Objects<SliceKey, EndpointSlice>,
    /// Pods of the whole cluster.
    pub pods: Objects<PodKey, Pod>,
    pub policies: Objects<PolicyKey, NetworkPolicy>,
    #[serde(default)]
    pub ingress_classes: Objects<String, IngressClass>,
    #[serde(default)]
    pub ingresses: Objects<NamespacedName, Ingress>,
    /// Secrets and ConfigMaps that our Ingresses refer to, as they were read by name.
    #[serde(default)]
    pub referred: Referred,
    #[serde(default)]
    pub service_cidrs: Objects<String, ServiceCidr>,
    #[serde(default)]
    pub address_pools: Objects<NamespacedName, AddressPool>,
    #[serde(default)]
    pub l2_advertisements: Objects<NamespacedName, L2Advertisement>,
    /// Which pod of this node bears which address, from the moment CNI gave it; never of an earlier boot, so not stored.
    #[serde(skip)]
    pub attachments: Attachments,
    /// Objects that could not be lowered.
    pub problems: Arc<Vec<Problem>>,
    /// The cluster part came from the Store: the API server has not been seen since this process started.
    pub from_store: bool,
}

impl Snapshot {
    pub fn own_node(&self) -> Option<&Arc<Node>> {
        self.nodes.get(&self.facts.name)
    }

    /// The slices of one Service, in the order of their keys; looks through its namespace.
    pub fn slices_of(&self, service: &ServiceKey) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        let begin = SliceKey { name: "".into(), ..service.clone() };
        let of_namespace = self.endpoint_slices.range(begin..).map(|(_, slice)| slice);
        of_namespace
            .take_while(|slice| slice.key.namespace == service.namespace)
            .filter(|slice| slice.service == *service)
    }

    /// The Node's own addresses, at most one a family, that this host has: after a change of address the Node may name the one
    /// before for a while.
    pub fn own_addresses(&self) -> Vec<IpAddr> {
        let named = self.own_node().into_iter().flat_map(|node| node.primary_ips());
        named.filter(|address| self.facts.has(*address)).collect()
    }

    /// Equal but for the generation.
    pub fn differs_only_in_generation(&self, other: &Self) -> bool {
        same(&self.attachments, &other.attachments) && self.is_same_elsewhere(other)
    }

    /// Other pods of this node bear addresses, or fewer, or more; all else is equal, the addresses among them that are kept for the
    /// node's own use.
    pub fn differs_only_in_attached_pods(&self, other: &Self) -> bool {
        // Most changes are elsewhere, and seen at once to be.
        if Arc::ptr_eq(&self.attachments, &other.attachments) {
            return false;
        }
        let ranges = self.own_node().into_iter().flat_map(|node| &node.pod_cidrs);
        let mut kept = ranges.flat_map(|range| [host_address(range), ingress_address(range)]).flatten();
        kept.all(|address| self.attachments.get(&address) == other.attachments.get(&address))
            && self.is_same_elsewhere(other)
    }

    fn is_same_elsewhere(&self, other: &Self) -> bool {
        // Named one by one, so that none is forgotten.
        let Self {
            generation: _,
            config,
            facts,
            nodes,
            config_maps,
            namespaces,
            services,
            endpoint_slices,
            pods,
            policies,
            ingress_classes,
            ingresses,
            referred,
            service_cidrs,
            address_pools,
            l2_advertisements,
            attachments: _,
            problems,
            from_store,
        } = self;
        *from_store == other.from_store
            && same(config, &other.config)
            && same(facts, &other.facts)
            && same(nodes, &other.nodes)
            && same(config_maps, &other.config_maps)
            && same(namespaces, &other.namespaces)
            && same(services, &other.services)
            && same(endpoint_slices, &other.endpoint_slices)
            && same(pods, &other.pods)
            && same(policies, &other.policies)
            && same(ingress_classes, &other.ingress_classes)
            && same(ingresses, &other.ingresses)
            && same(referred, &other.referred)
            && same(service_cidrs, &other.service_cidrs)
            && same(address_pools, &other.address_pools)
            && same(l2_advertisements, &other.l2_advertisements)
            && same(problems, &other.problems)
    }
}

/// Compares identities first: a whole-cluster comparison happens only where a map was rebuilt.
fn same<T: PartialEq>(a: &Arc<T>, b: &Arc<T>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

/// Builds a map anew that has grown much: one that grew in the order of its keys is half empty.
pub fn fill<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    *map = std::mem::take(map).into_iter().collect();
}

/// What came to a map since it was [filled](fill).
#[derive(Debug, Default)]
pub struct Loose(usize);

impl Loose {
    /// `count` more of the `all` that there are now; true when the map is to be filled.
    pub fn is_much(&mut self, count: usize, all: usize) -> bool {
        self.0 += count;
        let much = self.0 > all / 2;
        if much {
            self.0 = 0;
        }
        much
    }
}

/// A key whose value is not the same: `(key, old, new)`.
pub type Change<'a, K, V> = (&'a K, Option<&'a Arc<V>>, Option<&'a Arc<V>>);

/// Passes over what both maps share; values are compared by identity first.
pub fn changes<'a, K: Ord, V: PartialEq>(
    old: &'a Objects<K, V>,
    new: &'a Objects<K, V>,
) -> impl Iterator<Item = Change<'a, K, V>> {
    old.differences(new, |old, new| Arc::ptr_eq(old, new) || old == new)
}
