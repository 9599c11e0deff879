//! Who answers for an address on the LAN, by which means.
//!
//! ```text
//!  Snapshot --plan (pure): who may, in order--> Plan --watch--> Announcer: who of them lives (echo through the overlay)
//!                                                                 | elect (pure)
//!                                              ask the LAN -> claim: kernel entries, then tell -> tell again now and then
//! ```
//!
//! The kernel answers ARP and neighbour solicitations, also while no agent lives; the agent asks before it claims an address, and
//! claims none that somebody answers for.

mod elect;
mod plan;
mod task;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use weft_model::{NodeName, ServiceKey};

pub use elect::elect;
pub use plan::{AnnouncePlanner, plan};
pub use task::{AnnounceApplier, Announcer, Standing, announcer};

/// Every address that some node is to answer for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// This node.
    pub node: NodeName,
    pub addresses: BTreeMap<IpAddr, Announced>,
    /// What the kernel of each other node answers echo at, through the overlay.
    pub peers: BTreeMap<NodeName, IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    pub services: Vec<ServiceKey>,
    pub means: Means,
    /// Nodes that may answer, the preferred first.
    pub candidates: Vec<NodeName>,
    /// Links of this node that hold the subnet, and may be used.
    pub links: BTreeMap<String, u32>,
}

/// How the network learns of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// ARP and neighbour discovery.
    Layer2,
}

/// Links by name.
pub(crate) fn names(links: &BTreeMap<String, u32>) -> BTreeSet<String> {
    links.keys().cloned().collect()
}
