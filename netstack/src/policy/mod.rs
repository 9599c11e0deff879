//! NetworkPolicies in the kernel: what reaches the pods of this node, and what leaves them.
//!
//! ```text
//!  pods, namespaces, attachments of CNI --> directory: who bears an address
//!  policies of a pod's namespace --------> meaning: one Side a direction (who and which ports are allowed)
//!  Side --layout--> chain in-HASH / out-HASH; its peers --> sets of addresses, shared by all that mean the same peers
//!
//!  forward (filter, after DNAT, before every masquerade)   established: accept;  a pod to itself: accept
//!     saddr vmap egress4/6 -> out-HASH (return allows);  daddr vmap ingress4/6 -> in-HASH
//!  input   from a pod's link only: the same for egress, for addresses of this node, its resolver, its API server
//!  output  what this node sends to its pods is allowed, but for what its ingress sends: daddr vmap ingress4/6
//!  denied  where all that is dropped ends: counted, copied to nflog once a flow and some seconds, dropped
//! ```
//!
//! Only pods of this node that a policy selects stand in the maps. Peers are addresses in hash sets, a set a distinct peer;
//! ipBlocks are interval sets. `plan` is memoised: a pod that comes or changes costs its own elements. `apply` commits
//! the difference in one transaction and then ends tracked connections that are no longer allowed. `explain` tells a decision
//! rule by rule. All of them ask [`meaning`] and [`directory`] and nobody else.
//!
//! Fail closed: a pod whose labels are not known yet is isolated by every policy of its namespace and allowed nothing.

mod apply;
mod directory;
pub mod explain;
mod judge;
mod layout;
mod meaning;
mod plan;
#[cfg(test)]
mod tests;

pub use apply::{PolicyApplier, remove};
pub use judge::{Judge, Ruling};
pub use layout::TOLD_OF_SERVICE;
pub use meaning::Direction;
pub use plan::{PolicyPlan, PolicyPlanner};
