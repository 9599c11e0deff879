//! DNS answered on the node that asks.
//!
//! ```text
//!  Snapshot --plan--> DnsPlan --apply--> Store (names in memory)  <--fast----------------- UDP sockets: a thread each
//!                                   \                             <--serve (hickory-server)-- what fast leaves, TCP
//!                                    \--> Listeners (sockets)              |
//!                                              resolv.conf's nameservers <-- Forwarder
//! ```
//!
//! The cluster's zones follow the Kubernetes DNS-Based Service Discovery specification 1.1.0; everything else is
//! forwarded to the host's resolvers. [`start`] is the one way in. The route that makes the cluster DNS address local
//! and the rules that keep it out of conntrack belong to the overlay room.

mod answer;
mod apply;
mod autopath;
mod custom;
mod diff;
mod explain;
mod fast;
mod forward;
mod listen;
mod log;
mod metrics;
mod name;
mod octets;
mod plan;
mod quota;
mod rate;
mod resolv_conf;
mod serve;
mod stats;
mod store;
mod zone;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

pub use answer::{Answer, Local, Question, Soa, SoaPlace};
pub use apply::DnsApplier;
pub use custom::{Block, Blocks, Part, Parts};
pub use explain::Explainer;
pub use listen::Handover;
pub use log::{Logged, Page};
pub use metrics::CorednsNames;
pub use name::{InvalidName, Name};
pub use plan::{DnsPlanner, plan_service};
pub use stats::Stats;
pub use store::{Store, Written};
use weft_model::ClusterConfig;
use weft_netstack::reconcile::chain;
pub use zone::{
    Data, DnsPlan, Group, GroupKey, Groups, PodAddresses, SPECIFICATION_VERSION, Srv, TTL_SECONDS, Zones,
};

/// The port of the DNS (RFC 1035 section 4.2).
pub const DNS_PORT: u16 = 53;

/// Questions that one client may ask in a second unless the user says otherwise: a few hundredths of what one core answers, and
/// many times what pods were seen to ask.
pub const QUERIES_PER_SECOND: u32 = 10_000;

/// The namespace of the pod that has an address on this node now, told by who gives the addresses out.
pub type Namespaces = Arc<dyn Fn(IpAddr) -> Option<String> + Send + Sync>;

/// Where the DNS room listens and whom it asks.
#[derive(Clone, Debug)]
pub struct Options {
    /// Port of every listening address; [`DNS_PORT`] outside tests.
    pub port: u16,
    /// The host's resolvers, usually `/etc/resolv.conf`; read again when it changes.
    pub resolv_conf: PathBuf,
    /// Replaces port 53 of the host's resolvers; `None` outside tests.
    pub upstream_port: Option<u16>,
    /// Questions that one client may ask in a second, by any transport; `None` or zero: as many as it likes.
    pub queries_per_second: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: DNS_PORT,
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            upstream_port: None,
            queries_per_second: Some(QUERIES_PER_SECOND),
        }
    }
}

/// The parts that the agent wires into its loops.
pub struct Dns {
    /// For the `dns` loop.
    pub planner: DnsPlanner,
    /// For the `dns` loop.
    pub applier: DnsApplier,
    /// For metrics.
    pub stats: Arc<Stats>,
    /// For metrics, under the names of CoreDNS.
    pub coredns_names: CorednsNames,
    /// For people.
    pub explainer: Explainer,
}

/// Opens the sockets on the configuration's DNS addresses and answers at once: what is asked for a name of
/// the cluster waits for the first plan, three seconds at most (then SERVFAIL), everything else comes from the host's resolvers. An address that cannot be
/// opened is logged here and tried again, and reported, with every failing pass of the loop. What `handover` brings is used
/// instead of a new socket; a UDP socket among it is read once there is a plan, or after a second.
///
/// Needs a tokio runtime: the sockets' tasks end when the applier is dropped.
pub fn start(config: &ClusterConfig, options: Options, handover: Handover, namespaces: Namespaces) -> Dns {
    let stats = Arc::new(Stats::default());
    let store = Arc::new(Store::new(Zones::new(config).ok()));
    let forwarder =
        Arc::new(forward::Forwarder::new(options.resolv_conf, options.upstream_port, stats.clone()));
    let listen: std::collections::BTreeSet<IpAddr> = config.resolver_addresses().collect();
    forwarder.set_own(listen.clone());
    forwarder.set_ranges(config.ranges());
    let rate = rate::Rate::new(options.queries_per_second);
    let resolver =
        Arc::new(serve::Resolver::new(store.clone(), forwarder.clone(), stats.clone(), namespaces, rate));
    let mut listeners = listen::Listeners::new(resolver.clone(), options.port, handover);
    let (early, failed) = listeners.ensure(&listen, &listen);
    for error in &failed {
        tracing::warn!(reason = chain(error), "DNS does not listen yet");
    }
    let applier = DnsApplier {
        store,
        forwarder: forwarder.clone(),
        resolver: resolver.clone(),
        listeners,
        stats: stats.clone(),
        written: Arc::default(),
        parts: Parts::new(),
        early,
    };
    let coredns_names = CorednsNames { stats: stats.clone(), forwarder };
    Dns { planner: DnsPlanner::default(), applier, stats, coredns_names, explainer: Explainer(resolver) }
}
