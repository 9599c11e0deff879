//! The one generic [`Loop`] and the [`TaskGroup`] everything runs in.
//!
//! ```text
//!  watch<Arc<Snapshot>> --+
//!  nudge, drift timer, ---+--> pass: snapshot -> Planner::plan -> Applier::apply -> Report
//!  retry timer -----------+
//!  vigil: others changed what a loop owns --nudge--^
//! ```
//!
//! A trigger carries no data: first start, change, retry and drift are one code path. This is the only room that knows
//! time, retry and backoff.

mod run;
mod tally;
mod tasks;
mod users;
mod vigil;

use std::future::Future;

use weft_model::{Planned, Snapshot};

pub use run::{Loop, LoopHandle, Pace};
pub use tally::{Moment, Tally};
pub use tasks::TaskGroup;
pub(crate) use tasks::sleep_until;
pub(crate) use users::Users;
pub use vigil::{Watchfulness, vigil};

/// Pure: from a Snapshot to the whole desired state of one domain. `&mut self` holds nothing but memoised results,
/// so two planners that were given the same Snapshot return equal plans.
pub trait Planner: Send + 'static {
    type Plan: Send + Sync + 'static;

    /// False where which pod of this node bears which address does not matter ([`Snapshot::differs_only_in_attached_pods`]): such a
    /// plan is spared the passes that every ADD and DEL would cause.
    const FOLLOWS_ATTACHED_PODS: bool = true;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<Self::Plan>;
}

/// Owner of exactly one outside thing.
pub trait Applier: Send + 'static {
    type Plan: Send + Sync + 'static;

    /// Makes the outside equal to `plan`. With [`Trust::Nothing`] it observes the outside first; with
    /// [`Trust::Shadow`] it may diff against what it applied last. Independent steps are all tried; failures are
    /// collected, never retried here.
    fn apply(&mut self, plan: &Self::Plan, trust: Trust) -> impl Future<Output = Applied> + Send;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// First pass, drift check, or the pass after a failure.
    Nothing,
    Shadow,
}

/// Outcome of one apply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// What changed outside, one short line each; empty when there was nothing to do.
    pub changed: Vec<String>,
    /// One line each: the operation, its object and the chain of causes.
    pub failed: Vec<String>,
    /// For `weft status`.
    pub details: Vec<(String, String)>,
}

/// The error and its sources on one line, `a: b: c`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
