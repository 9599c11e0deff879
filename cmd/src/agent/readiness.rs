//! Why pods cannot come to this node, and why the node does not call itself ready. In: Snapshot, the API server's state, the
//! reports of overlay and policy. Out: obstacles, a sentence each. Pure, but for the task that tells the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use weft_model::{Health, Report, Snapshot};
use weft_netstack::cni::Readiness;
use weft_netstack::kube::ApiStatus;
use weft_netstack::overlay;
use weft_netstack::reconcile::LoopHandle;

use super::keep::Configurations;

type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

/// One thing that keeps pods away.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Obstacle {
    /// One line: what is wrong and what to do.
    pub(super) sentence: String,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Part of every start, or of a restart of the tunnel: what is in place stays in place.
    Passing,
    /// Stays until somebody acts: the node is not to look as if it worked.
    Lasting,
    /// Lasting too, and told to the log by those who speak to the API server.
    ApiServer,
}

/// Everything that obstacles are read from.
#[derive(Clone)]
pub(super) struct Sources {
    pub(super) snapshots: Snapshots,
    pub(super) api: watch::Receiver<ApiStatus>,
    pub(super) overlay: LoopHandle,
    /// `None` where policies are switched off.
    pub(super) policy: Option<LoopHandle>,
}

impl Sources {
    pub(super) fn obstacles(&self) -> Vec<Obstacle> {
        let snapshot = self.snapshots.borrow().clone();
        self.obstacles_to(snapshot.as_deref())
    }

    /// What keeps a node that has not carried pods from beginning.
    pub(super) fn overlaps(&self) -> Vec<String> {
        self.snapshots.borrow().as_deref().map(overlay::overlaps).unwrap_or_default()
    }

    /// For CNI requests, which act on one Snapshot.
    pub(super) fn readiness(&self) -> Readiness {
        let sources = self.clone();
        Arc::new(move |snapshot| {
            let obstacles = sources.obstacles_to(snapshot);
            let sentences: Vec<String> = obstacles.into_iter().map(|obstacle| obstacle.sentence).collect();
            if sentences.is_empty() { Ok(()) } else { Err(sentences.join("; ")) }
        })
    }

    fn obstacles_to(&self, snapshot: Option<&Snapshot>) -> Vec<Obstacle> {
        let mut found = obstacles(snapshot, &self.api.borrow(), &self.overlay.report());
        let policy = self.policy.as_ref().filter(|_| snapshot.is_some());
        found.extend(policy.and_then(|policy| policy_obstacle(&policy.report())));
        found
    }
}

/// Losing the API server is none once there is a Snapshot, be it the last good one from disk.
fn obstacles(snapshot: Option<&Snapshot>, api: &ApiStatus, overlay: &Report) -> Vec<Obstacle> {
    let of = |kind: Kind| move |sentence: String| Obstacle { sentence, kind };
    let too_old = api.version.as_ref().and_then(|version| version.refusal(&api.server));
    let mut found: Vec<Obstacle> = too_old.map(of(Kind::Lasting)).into_iter().collect();
    let Some(snapshot) = snapshot else {
        found.push(api.refusal().map_or_else(
            || {
                of(Kind::Passing)(format!(
                    "the cluster's objects are being read from API server {}",
                    api.server
                ))
            },
            of(Kind::ApiServer),
        ));
        return found;
    };
    if api.version.is_none() && !snapshot.from_store {
        found.push(of(Kind::Passing)(format!("API server {} is being asked for its version", api.server)));
    }
    found.extend(overlay::objections(snapshot, &overlay.problems).into_iter().map(of(Kind::Lasting)));
    found.extend(overlay_obstacle(overlay).map(of(Kind::Passing)));
    found
}

/// Pods may come once the overlay's strict rules and routes are in place.
fn overlay_obstacle(report: &Report) -> Option<String> {
    match report.health() {
        Health::Starting => Some("the overlay is not programmed yet".to_owned()),
        Health::Failing => Some(format!("the overlay is not in place: {}", report.failures.join("; "))),
        Health::Ok => None,
    }
}

/// A node that cannot enforce policies is no place for pods that rely on them.
fn policy_obstacle(report: &Report) -> Option<Obstacle> {
    let sentence = match report.health() {
        Health::Starting => "network policies are not programmed yet".to_owned(),
        Health::Failing => format!("network policies are not in place: {}", report.failures.join("; ")),
        Health::Ok => return None,
    };
    Some(Obstacle { sentence, kind: Kind::Passing })
}

/// Between two comparisons of the obstacles with what the log knows.
const REST: Duration = Duration::from_millis(200);

/// Tells each lasting obstacle to the log once when it appears and once when it is gone.
pub(super) async fn tell(sources: Sources, mut found: watch::Receiver<Configurations>) -> Result<(), String> {
    let (mut snapshots, mut api) = (sources.snapshots.clone(), sources.api.clone());
    let mut overlay = sources.overlay.reports();
    let mut policy = sources.policy.as_ref().unwrap_or(&sources.overlay).reports();
    let mut told = BTreeSet::new();
    loop {
        snapshots.mark_unchanged();
        api.mark_unchanged();
        overlay.mark_unchanged();
        policy.mark_unchanged();
        found.mark_unchanged();
        let lasting = sources.obstacles().into_iter().filter(|obstacle| obstacle.kind == Kind::Lasting);
        let mut now: BTreeSet<String> = lasting.map(|obstacle| obstacle.sentence).collect();
        now.extend(found.borrow().objection.clone());
        for reason in now.difference(&told) {
            tracing::warn!(reason, "node not ready");
        }
        for reason in told.difference(&now) {
            tracing::info!(reason, "no longer keeps the node from being ready");
        }
        told = now;
        tokio::time::sleep(REST).await;
        tokio::select! {
            Ok(()) = snapshots.changed() => {}
            Ok(()) = api.changed() => {}
            Ok(()) = overlay.changed() => {}
            Ok(()) = policy.changed() => {}
            Ok(()) = found.changed() => {}
            // Nobody tells any more.
            else => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests;
