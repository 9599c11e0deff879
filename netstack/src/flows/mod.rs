//! Flows of this node's pods as they begin, allowed and denied, with names: for `weft flows` and Events.
//!
//! ```text
//!  nflog (denied packets, one a flow and some seconds) --+
//!                                                        +--> name (pure: Snapshot, Judge) --> Ring --> GET /flows
//!  conntrack (new flows, so allowed) --------------------+                                 \-> Event on the pod
//! ```
//!
//! Names are those of the moment, since addresses change hands. What comes faster than [`PER_SECOND`] is left in the kernel,
//! which drops it: a node that is flooded shows fewer flows and works on. Nothing is stored.

mod name;
mod record;
mod ring;
mod serve;
mod tell;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::Snapshot;
use weft_model::constants::LOG_GROUP_DENIED;

use crate::kernel::conntrack::NewFlows;
use crate::kernel::nflog::Nflog;
use crate::kube::Notices;
use crate::policy::Judge;
use crate::reconcile::chain;

pub use record::{End, Query, Record, Verdict};
pub use ring::Page;
pub use serve::{refusal, router};

use name::Names;
use ring::Ring;
use tell::Teller;

/// Flows that are named in a second, of each kind.
const PER_SECOND: usize = 1_000;
/// Until a socket that failed is opened again.
const REOPEN: Duration = Duration::from_secs(5);

/// What is recorded so far; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Recorded(Arc<Mutex<Ring>>);

impl Recorded {
    pub fn page(&self, query: &Query) -> Page {
        self.with(|ring| ring.page(query))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Ring) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who names the flows: the rules' own judge, and Services from the Snapshot.
#[derive(Clone)]
pub struct Sources {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub judge: watch::Receiver<Option<Arc<Judge>>>,
}

impl Sources {
    /// With the Services of `known` where they are still those of the Snapshot.
    fn names(&self, known: &mut Option<Names>) -> Option<Names> {
        let judge = self.judge.borrow().clone()?;
        let snapshot = self.snapshots.borrow().clone()?;
        let names = Names::of(&snapshot, judge, known.take());
        *known = Some(names.clone());
        Some(names)
    }
}

/// Records denied flows as long as the agent runs.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn record_denied(recorded: Recorded, sources: Sources, notices: Notices) -> Result<(), String> {
    let mut teller = Teller::default();
    let mut known = None;
    loop {
        match Nflog::open(LOG_GROUP_DENIED) {
            Err(error) => tracing::warn!(error = chain(&error), "denied flows are not recorded"),
            Ok(mut nflog) => {
                let mut pace = Pace::default();
                while let Ok(read) = nflog.next().await {
                    let Some(packets) = read else {
                        recorded.with(Ring::lose);
                        continue;
                    };
                    pace.take(packets.len()).await;
                    let Some(names) = sources.names(&mut known) else { continue };
                    for packet in packets {
                        let Some(record) = names.denied(&packet, now()) else { continue };
                        teller
                            .notice(&record, Instant::now())
                            .into_iter()
                            .for_each(|notice| notices.say(notice));
                        recorded.with(|ring| ring.push(record));
                    }
                }
            }
        }
        tokio::time::sleep(REOPEN).await;
    }
}

/// Records what conntrack begins to track and a pod has part in, as long as the agent runs.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn record_allowed(recorded: Recorded, sources: Sources) -> Result<(), String> {
    let mut known = None;
    loop {
        match NewFlows::open() {
            Err(error) => tracing::warn!(error = chain(&error), "allowed flows are not recorded"),
            Ok(mut flows) => {
                let mut pace = Pace::default();
                while let Ok(read) = flows.next().await {
                    let Some(begun) = read else {
                        recorded.with(Ring::lose);
                        continue;
                    };
                    pace.take(begun.len()).await;
                    let Some(names) = sources.names(&mut known) else { continue };
                    for record in begun.iter().filter_map(|flow| names.allowed(flow, now())) {
                        recorded.with(|ring| ring.push(record));
                    }
                }
            }
        }
        tokio::time::sleep(REOPEN).await;
    }
}

/// Milliseconds of Unix time.
fn now() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Waits before more than [`PER_SECOND`] are taken in a second.
struct Pace {
    since: Instant,
    taken: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { since: Instant::now(), taken: 0 }
    }
}

impl Pace {
    async fn take(&mut self, count: usize) {
        if self.since.elapsed() >= Duration::from_secs(1) {
            *self = Self::default();
        }
        if self.taken >= PER_SECOND {
            tokio::time::sleep_until(self.since + Duration::from_secs(1)).await;
            *self = Self::default();
        }
        self.taken += count;
    }
}
