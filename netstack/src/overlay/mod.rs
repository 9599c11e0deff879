//! The encrypted overlay between nodes.
//!
//! ```text
//!  Snapshot --plan--> OverlayPlan --apply--> nft weft-host, sysctls, weft0, routes and rules
//!                                     |
//!                                     +-- kernel WireGuard, or tunnel.json + POST /apply --> `weft tunnel` (tunnel/)
//!  names, paths: what asking and trying found out --> Observed, part of the next Snapshot
//! ```
//!
//! Strictness (nothing of a pod range on the underlay in clear) stands in the nft table and the unreachable routes, so
//! it holds without peers, without the tunnel and without the agent.

pub mod apply;
mod cluster_dns;
mod detour;
pub mod endpoints;
mod names;
mod paths;
pub mod plan;
mod quarantine;
pub mod rotation;
mod rules;
mod standing;
mod sysctls;
pub mod tunnel;

use std::sync::Arc;

use tokio::sync::watch;
use weft_model::node_facts::{Observed, WireguardBackend};

use crate::host_socket::Snapshots;
use crate::reconcile::TaskGroup;

pub use apply::{OverlayApplier, OverlayError, cleanup, peers};
pub use plan::{OverlayPlan, OverlayPlanner, mtu_bytes};
pub use standing::{objections, overlaps};
pub use tunnel::{TunnelConfig, TunnelError, TunnelState};

/// Starts what finds out, beside the loop, how the peers are reached.
pub fn observe(
    tasks: &mut TaskGroup,
    snapshots: &Snapshots,
    observed: watch::Sender<Observed>,
    backend: WireguardBackend,
) {
    let observed = Arc::new(observed);
    tasks.start("endpoint names", names::follow(snapshots.clone(), observed.clone()));
    paths::start(tasks, snapshots, &observed);
    if backend == WireguardBackend::Kernel {
        tasks.start("detours", detour::follow(snapshots.clone()));
    }
}
