//! The immutable picture of every input at one generation.
//!
//! It does not exist until every required watch has listed once, or the Store has given the last good one.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::ClusterConfig;
use crate::ids::{Generation, NamespacedName, NodeName, PodKey, ServiceKey, SliceKey};
use crate::node_facts::NodeFacts;
use crate::objects::{ConfigMap, EndpointSlice, Namespace, Node, Pod, Service};
use crate::problem::Problem;

/// Cluster objects by key. Values are `Arc`s: a planner may memoise by their identity (decision 16).
pub type Objects<K, V> = Arc<BTreeMap<K, Arc<V>>>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub generation: Generation,
    pub config: Arc<ClusterConfig>,
    pub facts: Arc<NodeFacts>,
    pub nodes: Objects<NodeName, Node>,
    /// `kube-system/coredns-custom`, where there is one.
    #[serde(default)]
    pub config_maps: Objects<NamespacedName, ConfigMap>,
    pub namespaces: Objects<String, Namespace>,
    pub services: Objects<ServiceKey, Service>,
    pub endpoint_slices: Objects<SliceKey, EndpointSlice>,
    /// Pods of this node only, until a domain needs others.
    pub local_pods: Objects<PodKey, Pod>,
    /// Objects that could not be lowered.
    pub problems: Arc<Vec<Problem>>,
    /// The cluster part came from the Store: the API server has not been seen since this process started.
    pub from_store: bool,
}

impl Snapshot {
    pub fn own_node(&self) -> Option<&Arc<Node>> {
        self.nodes.get(&self.facts.name)
    }
}
