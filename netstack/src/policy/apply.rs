//! The applier: owner of the nft table `weft-policy`, and of established connections that it denies.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use weft_model::constants::TABLE_POLICY;

use super::judge::Judge;
use super::layout::{PEER_SETS, SubjectSet};
use super::meaning::Direction;
use super::plan::PolicyPlan;
use crate::kernel::conntrack::{ConntrackError, delete_flows};
use crate::kernel::nft::{NftError, NftTable};
use crate::reconcile::{Applied, Applier, Trust, chain};

/// Commits the table in one transaction, then ends what it no longer allows.
pub struct PolicyApplier {
    table: NftTable,
    /// Connections that are denied now may still stand: the last look at them failed, or there was none yet.
    unseen: bool,
    /// Passes for which rules of an earlier agent are still preferred to a plan from the Store; none once a plan was applied.
    patience: u32,
    /// For the last transaction that changed something.
    kernel_took: Option<Duration>,
    /// Of the rules in the kernel.
    judge: watch::Sender<Option<Arc<Judge>>>,
}

/// With the loop's pauses some seconds: the API server, when it is there, answers much sooner.
const PATIENCE_PASSES: u32 = 8;

impl Default for PolicyApplier {
    fn default() -> Self {
        Self::new()
    }
}

impl PolicyApplier {
    pub fn new() -> Self {
        Self {
            table: NftTable::new(TABLE_POLICY),
            unseen: true,
            patience: PATIENCE_PASSES,
            kernel_took: None,
            judge: watch::Sender::new(None),
        }
    }

    /// Decides as the rules in the kernel do; `None` before the first of this life are there.
    pub fn judge(&self) -> watch::Receiver<Option<Arc<Judge>>> {
        self.judge.subscribe()
    }
}

impl Applier for PolicyApplier {
    type Plan = PolicyPlan;

    async fn apply(&mut self, plan: &PolicyPlan, trust: Trust) -> Applied {
        let mut applied = Applied::default();
        if plan.provisional && self.stands_by_earlier_rules() {
            let waiting =
                "the rules of before the restart stay until the API server tells the policies of now";
            applied.failed.push(waiting.to_owned());
            return applied;
        }
        match self.table.apply(&plan.table, trust) {
            Ok(changed) => {
                self.patience = 0;
                self.kernel_took = self.table.kernel_took().or(self.kernel_took);
                self.judge.send_replace(Some(plan.judge.clone()));
                applied.changed = changed;
            }
            Err(error) => {
                // Under the old rules what is cut would come back.
                applied.failed.push(format!("table {TABLE_POLICY}: {}", chain(&error)));
                self.unseen = true;
                return applied;
            }
        }
        self.unseen |= applied.changed.iter().any(|change| !widens(change));
        if self.unseen {
            match cut(&plan.judge) {
                Ok(0) => self.unseen = false,
                Ok(ended) => {
                    self.unseen = false;
                    applied.changed.push(format!("{ended} established connections that are denied now"));
                }
                Err(error) => applied.failed.push(format!("established connections: {}", chain(&error))),
            }
        }
        applied.details = details(plan, self.kernel_took);
        applied
    }
}

impl PolicyApplier {
    /// An agent that starts anew finds rules that may deny more than the Store knows. They are replaced by what it knows only when
    /// the API server stays away; a node that has booted has none.
    fn stands_by_earlier_rules(&mut self) -> bool {
        if self.patience == 0 {
            return false;
        }
        self.patience -= 1;
        [false, true].into_iter().any(|ipv6| {
            let isolated = self.table.elements(&SubjectSet::Isolated.name(ipv6));
            isolated.is_ok_and(|isolated| !isolated.is_empty())
        })
    }
}

/// Only a peer more: nothing that is allowed can be denied by it. Everything else counts as a change that may deny.
fn widens(change: &str) -> bool {
    let name = change
        .strip_prefix("add element ")
        .or_else(|| change.strip_prefix("add ")?.split_once(" elements of ").map(|(_, name)| name));
    name.is_some_and(|name| PEER_SETS.iter().any(|prefix| name.starts_with(prefix)))
}

/// Reads the tracked connections once; with no isolated pod there is nothing to look for.
fn cut(judge: &Judge) -> Result<usize, ConntrackError> {
    if judge.subjects.is_empty() {
        return Ok(0);
    }
    delete_flows(|flow| judge.cuts(flow))
}

/// For `weft status`.
fn details(plan: &PolicyPlan, kernel_took: Option<Duration>) -> Vec<(String, String)> {
    let isolated = |direction, ipv6| {
        plan.table.sets.get(&SubjectSet::Side(direction).name(ipv6)).map_or(0, |set| set.groups.len())
    };
    let line = |direction| format!("{} IPv4, {} IPv6", isolated(direction, false), isolated(direction, true));
    let mut details = vec![
        ("isolated for ingress".to_owned(), line(Direction::Ingress)),
        ("isolated for egress".to_owned(), line(Direction::Egress)),
    ];
    let transaction =
        |took: Duration| ("last transaction".to_owned(), format!("{} us in the kernel", took.as_micros()));
    details.extend(kernel_took.map(transaction));
    details
}

/// Takes every rule away; true when there were some.
pub fn remove() -> Result<bool, NftError> {
    NftTable::delete(TABLE_POLICY)
}
