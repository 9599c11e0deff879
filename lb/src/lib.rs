//! Addresses for Services of type LoadBalancer on bare metal.
//!
//! ```text
//!  Services (with their statuses), IPAddressPools, Nodes --allocate (pure)--> grants --status (pure)--> StatusWriter --> API
//!  addresses in statuses, L2Advertisements, Nodes -------announce::plan (pure)--> Announcer --> kernel entries, ARP and ND
//! ```
//!
//! The service proxy learns of an address from `Service.status` like everybody else: this crate and the proxy never talk.

pub mod allocate;
pub mod announce;
mod nodes;
mod own;
mod pools;
pub mod status;
mod told;
pub mod trace;
