//! The encrypted overlay between nodes.
//!
//! ```text
//!  Snapshot --plan--> OverlayPlan --apply--> nft weft-host, sysctls, weft0, routes and rules
//!                                     |
//!                                     +-- kernel WireGuard, or tunnel.json + POST /apply --> `weft tunnel` (tunnel/)
//! ```
//!
//! Strictness (nothing of a pod range on the underlay in clear) stands in the nft table and the unreachable routes, so
//! it holds without peers, without the tunnel and without the agent.

pub mod apply;
pub mod plan;
mod quarantine;
pub mod rotation;
mod rules;
mod standing;
mod sysctls;
pub mod tunnel;

pub use apply::{OverlayApplier, OverlayError, cleanup, peers};
pub use plan::{OverlayPlan, OverlayPlanner};
pub use standing::{objections, overlaps};
pub use tunnel::{TunnelConfig, TunnelError, TunnelState};
