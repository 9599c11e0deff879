//! The vocabulary of Weft: what planners read and what they return.
//!
//! ```text
//!  objects (Node, Pod, Service, ...) + NodeFacts + ClusterConfig  =  Snapshot
//!  Snapshot --planner--> Plan (values of `ruleset`, `route`, `wireguard`, ...) + Problems
//!  Plan --applier--> outside world --> Report
//! ```
//!
//! Everything here is a plain ordered value. This crate does no IO and knows no async; its Cargo.toml
//! names no crate that could.

pub mod balancer;
pub mod config;
pub mod constants;
pub mod ids;
pub mod ingress;
pub mod node_facts;
pub mod notice;
pub mod objects;
pub mod policy;
pub mod problem;
pub mod report;
pub mod route;
pub mod ruleset;
pub mod services;
pub mod shared_map;
pub mod snapshot;
pub mod wireguard;

pub use config::{ClusterConfig, ProxyConfig};
pub use ids::{Generation, NamespacedName, NodeName, PodKey, PolicyKey, ServiceKey, WgPublicKey};
pub use ingress::{Front, IngressConfig, Observe};
pub use node_facts::NodeFacts;
pub use notice::{Notice, Severity};
pub use problem::{ObjectRef, Planned, Problem, Reason};
pub use report::{Health, Report};
pub use shared_map::SharedMap;
pub use snapshot::Snapshot;

/// Without room for more, for what stays. `shrink_to_fit` leaves up to half of it free: an allocator moves nothing for less.
pub fn exact<T>(items: Vec<T>) -> Vec<T> {
    if items.len() == items.capacity() {
        return items;
    }
    let mut exact = Vec::with_capacity(items.len());
    exact.extend(items);
    exact
}
