//! Who answers for an address on the LAN, by which means.
//!
//! ```text
//!  Snapshot --plan (pure): who may, in order--> Plan --watch--> Announcer: who of them lives (echo through the overlay)
//!                                                                 | elect (pure)
//!                                              ask the LAN -> claim: kernel entries, then tell -> tell again now and then
//! ```
//!
//! The kernel answers ARP and neighbour solicitations, also while no agent lives; the agent asks before it claims an address, and
//! claims none that a stranger answers for. An address moves between two nodes that live in order: the new one claims it while the
//! old one still answers, the old one goes silent when it hears the claim, and connections that it knows go on there.

mod elect;
mod plan;
mod task;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use weft_model::{NodeName, ServiceKey};

pub use elect::{Alive, elect};
pub(crate) use plan::unreached;
pub use plan::{AnnouncePlanner, plan};
pub use task::{AnnounceApplier, Announcer, Malformed, Standing, announcer};

/// Every address that some node is to answer for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// This node.
    pub node: NodeName,
    pub addresses: BTreeMap<IpAddr, Announced>,
    /// The other nodes of the overlay.
    pub peers: BTreeMap<NodeName, Peer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What its kernel answers echo at, through the overlay.
    pub overlay: IpAddr,
    /// Its own addresses on the LAN, the first of each family.
    pub lan: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    pub services: Vec<ServiceKey>,
    pub means: Means,
    /// Nodes that may answer, the preferred first, those that serve only when nobody else can last.
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
