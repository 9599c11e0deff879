//! One node at a time writes what every node knows: statuses of objects. A Lease of the API server says which.
//!
//! ```text
//!  Lease kube-system/weft-status-writer --read--> Election (pure): wait, or write --> create, replace
//!                                                                       |
//!                             Lead (is it this node, until when) <------+--> StatusWriter, before each write
//! ```
//!
//! The clocks of two nodes are never compared: a Lease has run out when this node saw it unchanged for its whole duration, by
//! this node's own monotonic clock (as client-go's leaderelection does). The holder stops writing well before that, counted from
//! before it sent its last renewal, so two nodes never write at once however slow an answer was. Who holds it changes nothing
//! else: all nodes plan the same statuses, and a new writer finds them written.

mod election;

use std::sync::Arc;
use std::time::Duration;

use kube::api::PostParams;
use kube::core::Request;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::NodeName;

use super::client::Access;
use crate::reconcile::{LoopHandle, TaskGroup};
use election::{Election, Record, Step};

/// Namespace and name of the Lease. Every cluster has this namespace, also one without our manifests.
const LEASE: (&str, &str) = ("kube-system", "weft-status-writer");
/// How long others wait for a silent holder: statuses may be late by this, no more.
const DURATION: Duration = Duration::from_secs(10);
/// How long after its last renewal a holder writes. The rest of `DURATION` is for a write that is on its way, and for the next
/// holder to see it.
const HOLD: Duration = Duration::from_secs(6);
/// Between two looks, and between two renewals.
const LOOK: Duration = Duration::from_secs(2);
/// No answer within this time is none.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether this node is the writer, for whoever writes.
#[derive(Clone)]
pub struct Lead(watch::Receiver<Standing>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Standing {
    /// This node may write until then.
    until: Option<Instant>,
    /// Who was last seen to hold the Lease.
    holder: Option<String>,
}

impl Lead {
    pub fn is_held(&self) -> bool {
        self.0.borrow().until.is_some_and(|until| Instant::now() < until)
    }

    /// Who holds it as far as this node knows, for `weft status`.
    pub fn holder(&self) -> Option<String> {
        self.0.borrow().holder.clone()
    }

    /// For `weft status`.
    pub fn text(&self) -> String {
        let holder = self.holder().unwrap_or_else(|| "no node yet".to_owned());
        format!("{holder} writes the statuses of objects{}", if self.is_held() { " (this node)" } else { "" })
    }

    /// A lead that is always held, for tests of writers.
    #[cfg(test)]
    pub(super) fn held() -> Self {
        let until = Instant::now() + Duration::from_secs(3600);
        Self(watch::channel(Standing { until: Some(until), holder: None }).1)
    }
}

/// Starts the task `lease`.
pub fn start(tasks: &mut TaskGroup, access: Arc<Access>, node: NodeName) -> Lead {
    let (standing_tx, standing) = watch::channel(Standing::default());
    tasks.start("lease", run(access, node, standing_tx));
    Lead(standing)
}

/// Wakes the loops whenever this node becomes the writer: what they left to another is theirs now.
///
/// # Errors
/// None; the signature is that of a task.
pub async fn wake(mut lead: Lead, loops: Vec<LoopHandle>) -> Result<(), String> {
    let mut held = false;
    loop {
        let now = lead.is_held();
        if now && !held {
            loops.iter().for_each(LoopHandle::nudge);
        }
        held = now;
        if lead.0.changed().await.is_err() {
            return Ok(());
        }
    }
}

async fn run(access: Arc<Access>, node: NodeName, standing: watch::Sender<Standing>) -> Result<(), String> {
    let mut election = Election::new(node.to_string());
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let asked = access.ask(async |client| campaign(&client, &mut election).await);
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(until)) => {
                let now = Standing { until, holder: election.holder().map(str::to_owned) };
                say(&standing.borrow(), &now, &node);
                standing.send_replace(now);
            }
            Ok(Err(failure)) => tracing::debug!(?failure, "the writer's lease"),
            Err(_) => tracing::debug!("the writer's lease: no answer"),
        }
    }
}

fn say(before: &Standing, now: &Standing, node: &NodeName) {
    if before.holder == now.holder {
        return;
    }
    match (&now.until, &now.holder) {
        (Some(_), _) => tracing::info!(%node, "this node writes the statuses of the cluster's objects"),
        (None, Some(holder)) => tracing::info!(holder, "another node writes the statuses of objects"),
        (None, None) => {}
    }
}

/// One look at the Lease and what follows from it: until when this node may write.
async fn campaign(client: &kube::Client, election: &mut Election) -> Result<Option<Instant>, kube::Error> {
    let started_at = Instant::now();
    let (namespace, name) = LEASE;
    let leases = Request::new(format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"));
    let read = leases.get(name, &kube::api::GetParams::default()).map_err(kube::Error::BuildRequest)?;
    let read: Option<Value> = match client.request(read).await {
        Ok(read) => Some(read),
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        Err(error) => return Err(error),
    };
    let step = election.step(read.as_ref().map(Record::of), started_at);
    let params = PostParams::default();
    let request = match step {
        Step::Wait => return Ok(None),
        Step::Create { spec } => {
            let object = lease(&spec, None);
            leases.create(&params, object.to_string().into_bytes())
        }
        Step::Replace { spec, version } => {
            let object = lease(&spec, Some(&version));
            leases.replace(name, &params, object.to_string().into_bytes())
        }
    };
    match client.request::<Value>(request.map_err(kube::Error::BuildRequest)?).await {
        Ok(written) => {
            election.observe(Some(Record::of(&written)), started_at);
            Ok(Some(started_at + HOLD))
        }
        // Another was faster: the next look shows who.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lease of coordination.k8s.io/v1. With `version` the write holds only if nobody wrote since.
fn lease(spec: &Record, version: Option<&str>) -> Value {
    let (namespace, name) = LEASE;
    let mut metadata = json!({"namespace": namespace, "name": name});
    if let Some(version) = version {
        metadata["resourceVersion"] = version.into();
    }
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata,
        "spec": {
            "holderIdentity": spec.holder,
            "leaseDurationSeconds": DURATION.as_secs(),
            "acquireTime": spec.acquired.as_deref().unwrap_or(&now),
            "renewTime": now,
            "leaseTransitions": spec.transitions,
        },
    })
}
