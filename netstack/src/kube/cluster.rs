//! The cluster's objects as they are known now: watch events in, Snapshots out. Pure; `watch` feeds it.
//!
//! A value that lowers to what is already there keeps its `Arc`, so planners may memoise by identity, and an event
//! that changes nothing is told apart from one that does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use kube::runtime::watcher::Event;
use serde_json::Value;
use weft_model::balancer::{AddressPool, L2Advertisement};
use weft_model::ingress::{self, Answer, Ingress, IngressClass, IngressConfig, Reference, Referred};
use weft_model::objects::{ConfigMap, EndpointSlice, Namespace, Node, Pod, Service, ServiceCidr};
use weft_model::policy::NetworkPolicy;
use weft_model::snapshot::{Attachments, Objects};
use weft_model::{
    ClusterConfig, Generation, NamespacedName, NodeFacts, NodeName, ObjectRef, PodKey, PolicyKey, Problem,
    Reason, ServiceKey, Snapshot,
};

use super::document::{CONFIG_MAP, Document, Kind};
use super::lower::{self, Lowered};

/// Everything lowered so far.
#[derive(Debug, Default)]
pub struct Cluster {
    nodes: Collection<NodeName, Node>,
    config_maps: Collection<NamespacedName, ConfigMap>,
    namespaces: Collection<String, Namespace>,
    services: Collection<ServiceKey, Service>,
    endpoint_slices: Collection<NamespacedName, EndpointSlice>,
    pods: Collection<PodKey, Pod>,
    policies: Collection<PolicyKey, NetworkPolicy>,
    ingress_classes: Collection<String, IngressClass>,
    ingresses: Collection<NamespacedName, Ingress>,
    referred: Referred,
    service_cidrs: Collection<String, ServiceCidr>,
    address_pools: Collection<NamespacedName, AddressPool>,
    l2_advertisements: Collection<NamespacedName, L2Advertisement>,
    problems: Arc<Vec<Problem>>,
}

impl Cluster {
    /// Starts with the objects of a stored Snapshot, so that those that did not change keep their identity. Nothing
    /// counts as listed yet.
    pub fn from_stored(stored: &Snapshot) -> Self {
        Self {
            nodes: Collection::from_stored(&stored.nodes),
            config_maps: Collection::from_stored(&stored.config_maps),
            namespaces: Collection::from_stored(&stored.namespaces),
            services: Collection::from_stored(&stored.services),
            endpoint_slices: Collection::from_stored(&stored.endpoint_slices),
            pods: Collection::from_stored(&stored.pods),
            policies: Collection::from_stored(&stored.policies),
            ingress_classes: Collection::from_stored(&stored.ingress_classes),
            ingresses: Collection::from_stored(&stored.ingresses),
            referred: stored.referred.clone(),
            service_cidrs: Collection::from_stored(&stored.service_cidrs),
            address_pools: Collection::from_stored(&stored.address_pools),
            l2_advertisements: Collection::from_stored(&stored.l2_advertisements),
            problems: stored.problems.clone(),
        }
    }

    /// A whole cluster at once, as if every watch had just listed these objects, and every Secret and ConfigMap had been
    /// asked for; other kinds that are not watched are skipped.
    pub fn from_documents(documents: impl IntoIterator<Item = Value>) -> Self {
        let documents: Vec<Value> = documents.into_iter().collect();
        let referred = documents.iter().filter_map(lower::referred);
        let referred = referred.map(|(reference, data)| (reference, Arc::new(Answer::Found(data)))).collect();
        let mut cluster = Self { referred: Arc::new(referred), ..Self::default() };
        for kind in Kind::ALL {
            cluster.apply(kind, Event::Init);
        }
        for document in documents {
            let Some(kind) = document["kind"].as_str().and_then(Kind::from_name) else {
                continue;
            };
            let document = Document::new(document);
            let unread = kind == Kind::ConfigMap && (document.namespace(), document.name()) != CONFIG_MAP;
            if !unread {
                cluster.apply(kind, Event::InitApply(document));
            }
        }
        for kind in Kind::ALL {
            cluster.apply(kind, Event::InitDone);
        }
        cluster
    }

    /// Takes one event of one kind's watch; true when a Snapshot would differ.
    pub fn apply(&mut self, kind: Kind, event: Event<Document>) -> bool {
        let changed = match kind {
            Kind::Node => self.nodes.apply(event, lower::node),
            Kind::ConfigMap => self.config_maps.apply(event, lower::config_map),
            Kind::Namespace => self.namespaces.apply(event, lower::namespace),
            Kind::Service => self.services.apply(event, lower::service),
            Kind::EndpointSlice => self.endpoint_slices.apply(event, lower::endpoint_slice),
            Kind::Pod => self.pods.apply(event, lower::pod),
            Kind::NetworkPolicy => self.policies.apply(event, lower::network_policy),
            Kind::IngressClass => self.ingress_classes.apply(event, lower::ingress_class),
            Kind::Ingress => self.ingresses.apply(event, lower::ingress),
            Kind::ServiceCidr => self.service_cidrs.apply(event, lower::service_cidr),
            Kind::IpAddressPool => self.address_pools.apply(event, lower::address_pool),
            Kind::L2Advertisement => self.l2_advertisements.apply(event, lower::l2_advertisement),
        };
        if changed.problems {
            self.problems = Arc::new(self.all_problems());
        }
        changed.values || changed.problems || changed.first_list
    }

    /// What is to be read by name now; `None` until Ingresses and their classes have listed.
    pub fn references(&self, config: &IngressConfig) -> Option<BTreeSet<Reference>> {
        let listed = self.ingresses.listed && self.ingress_classes.listed;
        listed.then(|| ingress::references(&self.ingresses.values, &self.ingress_classes.values, config))
    }

    /// Takes what was read by name; true when a Snapshot would differ.
    pub fn refer(&mut self, referred: Referred) -> bool {
        let changed = self.referred != referred;
        self.referred = referred;
        changed
    }

    /// Every kind has listed at least once.
    pub fn is_complete(&self) -> bool {
        self.nodes.listed
            && self.config_maps.listed
            && self.namespaces.listed
            && self.services.listed
            && self.endpoint_slices.listed
            && self.pods.listed
            && self.policies.listed
            && self.ingress_classes.listed
            && self.ingresses.listed
            && self.service_cidrs.listed
            && self.address_pools.listed
            && self.l2_advertisements.listed
    }

    pub fn snapshot(
        &self,
        generation: Generation,
        config: Arc<ClusterConfig>,
        facts: Arc<NodeFacts>,
    ) -> Snapshot {
        let mut problems = self.problems.clone();
        if let Some(problem) = flag_that_the_server_denies(&config, &self.service_cidrs.values) {
            Arc::make_mut(&mut problems).push(problem);
        }
        Snapshot {
            generation,
            config: with_service_cidrs(config, &self.service_cidrs.values),
            facts,
            nodes: self.nodes.values.clone(),
            config_maps: self.config_maps.values.clone(),
            namespaces: self.namespaces.values.clone(),
            services: self.services.values.clone(),
            endpoint_slices: self.endpoint_slices.values.clone(),
            pods: self.pods.values.clone(),
            policies: self.policies.values.clone(),
            ingress_classes: self.ingress_classes.values.clone(),
            ingresses: self.ingresses.values.clone(),
            referred: self.referred.clone(),
            service_cidrs: self.service_cidrs.values.clone(),
            address_pools: self.address_pools.values.clone(),
            l2_advertisements: self.l2_advertisements.values.clone(),
            attachments: Attachments::default(),
            problems,
            from_store: false,
        }
    }

    fn all_problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self
            .nodes
            .problems()
            .chain(self.config_maps.problems())
            .chain(self.namespaces.problems())
            .chain(self.services.problems())
            .chain(self.endpoint_slices.problems())
            .chain(self.pods.problems())
            .chain(self.policies.problems())
            .chain(self.ingress_classes.problems())
            .chain(self.ingresses.problems())
            .chain(self.service_cidrs.problems())
            .chain(self.address_pools.problems())
            .chain(self.l2_advertisements.problems())
            .cloned()
            .collect();
        problems.sort();
        problems
    }
}

/// The API server knows best which ranges it allocates from: the flag holds where it does not say.
pub(super) fn with_service_cidrs(
    config: Arc<ClusterConfig>,
    objects: &Objects<String, ServiceCidr>,
) -> Arc<ClusterConfig> {
    let told: BTreeSet<IpNet> = objects.values().flat_map(|object| object.cidrs.iter().copied()).collect();
    let flagged: BTreeSet<IpNet> = config.service_cidrs.iter().copied().collect();
    if told.is_empty() || told == flagged {
        return config;
    }
    Arc::new(ClusterConfig { service_cidrs: told.into_iter().collect(), ..ClusterConfig::clone(&config) })
}

/// A service range that the operator gave and that the API server has nothing of.
fn flag_that_the_server_denies(
    config: &ClusterConfig,
    objects: &Objects<String, ServiceCidr>,
) -> Option<Problem> {
    let (name, _) = objects.first_key_value()?;
    let told: Vec<IpNet> = objects.values().flat_map(|object| object.cidrs.iter().copied()).collect();
    let overlaps = |flag: &IpNet| told.iter().any(|range| range.contains(flag) || flag.contains(range));
    let flag = config.service_cidrs.iter().find(|flag| !overlaps(flag))?;
    let ranges = told.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let message = format!(
        "spec.cidrs: the API server allocates from {ranges}, nothing from --service-cidr {flag}: Weft goes by the API server; give \
         every agent the --service-cluster-ip-range of kube-apiserver"
    );
    Some(Problem::new(ObjectRef::new("ServiceCIDR", "", name), Reason::InvalidField, message))
}

#[derive(Clone, Copy, Default)]
struct Changed {
    values: bool,
    problems: bool,
    /// The kind listed for the first time, even when the list equals what the Store had.
    first_list: bool,
}

/// The objects of one kind.
#[derive(Debug)]
struct Collection<K, V> {
    values: Objects<K, V>,
    problems: BTreeMap<K, Vec<Problem>>,
    listed: bool,
    /// The list that is being received.
    listing: Option<Listing<K, V>>,
}

#[derive(Debug)]
struct Listing<K, V> {
    values: BTreeMap<K, Arc<V>>,
    problems: BTreeMap<K, Vec<Problem>>,
}

impl<K, V> Default for Collection<K, V> {
    fn default() -> Self {
        Self { values: Objects::default(), problems: BTreeMap::new(), listed: false, listing: None }
    }
}

impl<K: ObjectKey, V: Eq> Collection<K, V> {
    fn from_stored(values: &Objects<K, V>) -> Self {
        Self { values: values.clone(), ..Self::default() }
    }

    fn apply(&mut self, event: Event<Document>, lower: fn(&Value) -> Lowered<V>) -> Changed {
        match event {
            Event::Init => {
                self.listing = Some(Listing { values: BTreeMap::new(), problems: BTreeMap::new() });
                Changed::default()
            }
            Event::InitApply(document) => {
                self.list_one(&document, lower);
                Changed::default()
            }
            Event::InitDone => self.end_list(),
            Event::Apply(document) => {
                let lowered = lower(&document.value);
                self.set(K::of(&document), lowered.value, lowered.problems)
            }
            Event::Delete(document) => self.set(K::of(&document), None, Vec::new()),
        }
    }

    fn list_one(&mut self, document: &Document, lower: fn(&Value) -> Lowered<V>) {
        let Some(listing) = &mut self.listing else {
            return;
        };
        let key = K::of(document);
        let Lowered { value, problems } = lower(&document.value);
        if let Some(value) = value {
            let value = match self.values.get(&key) {
                Some(known) if **known == value => known.clone(),
                _ => Arc::new(value),
            };
            listing.values.insert(key.clone(), value);
        }
        if !problems.is_empty() {
            listing.problems.insert(key, problems);
        }
    }

    fn end_list(&mut self) -> Changed {
        let Some(listing) = self.listing.take() else {
            return Changed::default();
        };
        let changed = Changed {
            values: !self.values.iter().eq(&listing.values),
            problems: self.problems != listing.problems,
            first_list: !std::mem::replace(&mut self.listed, true),
        };
        if changed.values {
            self.values = Arc::new(listing.values.into_iter().collect());
        }
        self.problems = listing.problems;
        changed
    }

    fn set(&mut self, key: K, value: Option<V>, problems: Vec<Problem>) -> Changed {
        let known = self.problems.get(&key).map(Vec::as_slice).unwrap_or_default();
        let problems_changed = known != problems;
        if problems.is_empty() {
            self.problems.remove(&key);
        } else {
            self.problems.insert(key.clone(), problems);
        }
        let values_changed = self.values.get(&key).map(Arc::as_ref) != value.as_ref();
        if values_changed {
            let values = Arc::make_mut(&mut self.values);
            match value {
                Some(value) => values.insert(key, Arc::new(value)),
                None => values.remove(&key),
            };
        }
        Changed { values: values_changed, problems: problems_changed, first_list: false }
    }

    fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }
}

trait ObjectKey: Ord + Clone {
    fn of(document: &Document) -> Self;
}

impl ObjectKey for NodeName {
    fn of(document: &Document) -> Self {
        Self(document.name().into())
    }
}

impl ObjectKey for String {
    fn of(document: &Document) -> Self {
        document.name().to_owned()
    }
}

impl ObjectKey for NamespacedName {
    fn of(document: &Document) -> Self {
        Self::new(document.namespace(), document.name())
    }
}

#[cfg(test)]
mod tests;
