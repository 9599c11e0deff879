//! Notices become Kubernetes Events on the objects they speak of.
//!
//! ```text
//!  problems of the Snapshot and of every Report --> standing notices --+
//!                                                                      +--> Outbox (pure): what is due --> POST
//!  Notices::say, from anybody --> passing notices ---------------------+
//! ```
//!
//! All nodes see the same problems, so the Event of a standing notice has a name that its content gives: whoever comes first
//! makes it and the others are told that it exists. It is made anew after the API server forgot it, as long as it is true.
//! Nothing waits for an Event, and an API server that is away or refuses them harms nothing.

mod outbox;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kube::api::PostParams;
use kube::core::Request;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use weft_model::{NodeName, Notice, ObjectRef, Report, Severity, Snapshot};

use super::client::Access;
use super::document::{Document, Kind};
use super::failure::ApiFailure;
use super::now;
use outbox::{Due, Outbox};

/// How often the problems are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Between two Events, so that a thousand bad objects load no API server.
const APART: Duration = Duration::from_millis(100);
/// Until the next try after one that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(10);
/// Passing notices that wait at most; more are dropped.
const WAITING: usize = 256;
/// Longest message of an Event in bytes (core/v1 validation).
const MESSAGE_BYTES: usize = 1024;

/// Where anybody says a passing notice, once. Never waits.
#[derive(Clone, Debug)]
pub struct Notices(mpsc::Sender<Notice>);

impl Notices {
    /// The other end is for the [`Announcer`].
    pub fn channel() -> (Self, mpsc::Receiver<Notice>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    pub fn say(&self, notice: Notice) {
        if let Err(error) = self.0.try_send(notice) {
            tracing::debug!(%error, "an Event is dropped");
        }
    }
}

/// The task that writes Events.
pub struct Announcer {
    pub access: Arc<Access>,
    /// The node that speaks.
    pub node: NodeName,
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub reports: Vec<watch::Receiver<Report>>,
    pub passing: mpsc::Receiver<Notice>,
}

impl Announcer {
    /// Runs as long as the agent.
    ///
    /// # Errors
    /// None; the signature is that of a task.
    pub async fn run(mut self) -> Result<(), String> {
        let mut outbox = Outbox::new(rand::random());
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = look.tick() => {}
                Some(notice) = self.passing.recv() => outbox.pass(notice, Instant::now()),
            }
            // Before the API server was seen, its objects may be those of yesterday.
            if self.snapshots.borrow().as_ref().is_none_or(|snapshot| snapshot.from_store) {
                continue;
            }
            for due in outbox.due(&self.standing(), Instant::now()) {
                let outcome = self.write(&due).await;
                if let Err(failure) = &outcome {
                    tracing::debug!(?failure, object = %due.notice.object, "Event");
                }
                match outcome {
                    // What one Event is refused for, such as a namespace that is about to end, keeps no other back.
                    Ok(()) | Err(ApiFailure::Refused(_) | ApiFailure::Forbidden(_)) => {
                        outbox.done(&due, Instant::now());
                    }
                    Err(_) => {
                        outbox.wait(Instant::now() + AFTER_FAILURE);
                        break;
                    }
                }
                tokio::time::sleep(APART).await;
            }
        }
    }

    fn standing(&self) -> BTreeSet<Notice> {
        let snapshot = self.snapshots.borrow().clone();
        let of_objects = snapshot.iter().flat_map(|snapshot| snapshot.problems.iter()).map(Notice::from);
        let of_loops = self
            .reports
            .iter()
            .flat_map(|report| report.borrow().problems.iter().map(Notice::from).collect::<Vec<_>>());
        of_objects.chain(of_loops).collect()
    }

    /// An object that is no more, or of a kind that the API server does not have, needs no Event.
    async fn write(&self, due: &Due) -> Result<(), ApiFailure> {
        let Some(kind) = Kind::from_name(&due.notice.object.kind) else { return Ok(()) };
        let written = self.access.ask(async |client| {
            let Some(uid) = uid(&client, kind, &due.notice.object).await? else { return Ok(()) };
            match create(&client, &event(due, kind, &uid, &self.node)).await {
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
                outcome => outcome,
            }
        });
        written.await
    }
}

/// `kubectl describe` finds Events by it.
async fn uid(client: &kube::Client, kind: Kind, object: &ObjectRef) -> Result<Option<String>, kube::Error> {
    let found = Document::find(client.clone(), kind, (&object.namespace, &object.name)).await?;
    Ok(found.and_then(|document| document.value["metadata"]["uid"].as_str().map(str::to_owned)))
}

async fn create(client: &kube::Client, event: &Value) -> Result<(), kube::Error> {
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or(DEFAULT_NAMESPACE);
    let events = Request::new(format!("/api/v1/namespaces/{namespace}/events"));
    let request = events.create(&PostParams::default(), event.to_string().into_bytes());
    client.request::<Value>(request.map_err(kube::Error::BuildRequest)?).await.map(drop)
}

/// Where Events of objects without a namespace live.
const DEFAULT_NAMESPACE: &str = "default";

/// Event of core/v1, the form that every `kubectl` reads.
fn event(due: &Due, kind: Kind, uid: &str, node: &NodeName) -> Value {
    let Notice { object, severity, reason, message } = &due.notice;
    let name = due.name(uid);
    let namespace = match object.namespace.as_str() {
        "" => DEFAULT_NAMESPACE,
        namespace => namespace,
    };
    let now = now();
    let component = json!({"component": "weft", "host": node.0});
    json!({
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {
            "apiVersion": kind.api_version(), "kind": object.kind, "namespace": object.namespace,
            "name": object.name, "uid": uid,
        },
        "type": match severity { Severity::Normal => "Normal", Severity::Warning => "Warning" },
        "reason": reason,
        "message": cut(message),
        "source": component,
        "reportingComponent": "weft",
        "reportingInstance": node.0,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    })
}

/// At a character's border.
fn cut(message: &str) -> &str {
    let end = (0..=MESSAGE_BYTES.min(message.len())).rev().find(|end| message.is_char_boundary(*end));
    &message[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests;
