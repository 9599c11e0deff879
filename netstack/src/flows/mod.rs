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

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::Snapshot;
use weft_model::constants::LOG_GROUP_DENIED;

use crate::kernel::conntrack::{ConntrackError, Flow, NewFlows};
use crate::kernel::nflog::{Copied, Nflog, NflogError};
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

/// What the kernel tells of flows, some at a time.
trait Heard: Sized {
    type Item: Send;
    type Error: std::error::Error + Send + 'static;
    /// What is missing while it cannot be heard.
    const WHAT: &'static str;

    fn open() -> Result<Self, Self::Error>;

    /// `None` when the kernel lost some because we were slow.
    fn next(&mut self) -> impl Future<Output = Result<Option<Vec<Self::Item>>, Self::Error>> + Send;
}

impl Heard for Nflog {
    type Item = Copied;
    type Error = NflogError;
    const WHAT: &'static str = "denied";

    fn open() -> Result<Self, Self::Error> {
        Self::open(LOG_GROUP_DENIED)
    }

    fn next(&mut self) -> impl Future<Output = Result<Option<Vec<Copied>>, NflogError>> + Send {
        self.next()
    }
}

impl Heard for NewFlows {
    type Item = Flow;
    type Error = ConntrackError;
    const WHAT: &'static str = "allowed";

    fn open() -> Result<Self, Self::Error> {
        Self::open()
    }

    fn next(&mut self) -> impl Future<Output = Result<Option<Vec<Flow>>, ConntrackError>> + Send {
        self.next()
    }
}

/// Records denied flows as long as the agent runs.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn record_denied(recorded: Recorded, sources: Sources, notices: Notices) -> Result<(), String> {
    let mut teller = Teller::default();
    let name = |names: &Names, packet: &Copied| {
        let record = names.denied(packet, now())?;
        teller.notice(&record, Instant::now()).into_iter().for_each(|notice| notices.say(notice));
        Some(record)
    };
    follow::<Nflog>(recorded, sources, name).await
}

/// Records what conntrack begins to track and a pod has part in, as long as the agent runs.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn record_allowed(recorded: Recorded, sources: Sources) -> Result<(), String> {
    follow::<NewFlows>(recorded, sources, |names, flow| names.allowed(flow, now())).await
}

async fn follow<H: Heard>(
    recorded: Recorded,
    sources: Sources,
    mut name: impl FnMut(&Names, &H::Item) -> Option<Record>,
) -> Result<(), String> {
    let mut known = None;
    loop {
        match H::open() {
            Err(error) => tracing::warn!(error = chain(&error), "{} flows are not recorded", H::WHAT),
            Ok(mut heard) => {
                let mut pace = Pace::default();
                while let Ok(read) = heard.next().await {
                    let Some(items) = read else {
                        recorded.with(Ring::lose);
                        continue;
                    };
                    pace.take(items.len()).await;
                    let Some(names) = sources.names(&mut known) else { continue };
                    for record in items.iter().filter_map(|item| name(&names, item)) {
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
