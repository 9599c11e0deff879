//! Owner of the statuses that Weft writes on objects: of Services, and of whatever other kind a planner names.
//!
//! In: the statuses that differ from what their objects say, as planners found them. Out: merge patches of the `status`
//! subresource, sent by the one node that holds the Lease. An object that is gone meanwhile needs none.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use futures::stream::{self, StreamExt as _};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use weft_model::{NamespacedName, ObjectRef};

use super::client::Access;
use super::document::{Document, Kind};
use super::failure::ApiFailure;
use super::lease::Lead;
use super::now;
use crate::reconcile::{Applied, Applier, Trust};

/// Requests on their way at once. API servers put writes that wait together to disk with one flush, so few at once make many flushes
/// of a long list; this is a tenth of what kube-apiserver lets in by default (`--max-requests-inflight` and its kin).
const AT_ONCE: usize = 48;

/// An object whose status is to be written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    pub kind: Kind,
    /// Its namespace is empty for an object without one.
    pub key: NamespacedName,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let object = ObjectRef::new(self.kind.name(), &self.key.namespace, &self.key.name);
        write!(f, "status of {object}")
    }
}

/// Merge patches of `status`, only for objects whose status is not so yet. A list in a patch replaces the list that was.
pub type Statuses = BTreeMap<Target, Value>;

pub struct StatusWriter {
    access: Arc<Access>,
    lead: Lead,
    /// What was written and is not in the Snapshot yet: the same is not written twice for one change.
    written: Statuses,
}

impl StatusWriter {
    pub fn new(access: Arc<Access>, lead: Lead) -> Self {
        Self { access, lead, written: Statuses::new() }
    }

    fn due(&mut self, plan: &Statuses, trust: Trust) -> Vec<(Target, Value)> {
        self.written.retain(|target, _| plan.contains_key(target));
        let said = |target: &Target, status: &Value| self.written.get(target) == Some(status);
        let due = plan.iter().filter(|(target, status)| trust == Trust::Nothing || !said(target, status));
        due.map(|(target, status)| (target.clone(), status.clone())).collect()
    }
}

impl Applier for StatusWriter {
    type Plan = Statuses;

    fn apply(&mut self, plan: &Statuses, trust: Trust) -> impl Future<Output = Applied> + Send {
        let due = if self.lead.is_held() { self.due(plan, trust) } else { Vec::new() };
        async move {
            let mut applied = Applied::default();
            let (access, lead) = (&self.access, &self.lead);
            let mut written = stream::iter(due)
                .map(|(target, status)| async move {
                    // A long list may outlive the lead.
                    let outcome = match lead.is_held() {
                        true => Some(write(access, &target, &status).await),
                        false => None,
                    };
                    (target, status, outcome)
                })
                .buffer_unordered(AT_ONCE);
            let mut done = Statuses::new();
            while let Some((target, status, outcome)) = written.next().await {
                match outcome {
                    None => {}
                    Some(Ok(was_there)) => {
                        applied.changed.extend(was_there.then(|| target.to_string()));
                        done.insert(target, status);
                    }
                    Some(Err(failure)) => {
                        let sentence = failure.sentence(&access.address());
                        applied.failed.push(format!("{target}: {sentence}"));
                    }
                }
            }
            drop(written);
            self.written.extend(done);
            applied.changed.sort();
            applied.failed.sort();
            let writer = self.lead.holder().unwrap_or_else(|| "nobody yet".to_owned());
            applied.details.push(("writer".to_owned(), writer));
            applied
        }
    }
}

/// False when there is no such object (any more).
async fn write(access: &Access, target: &Target, status: &Value) -> Result<bool, ApiFailure> {
    let Target { kind, key } = target;
    let patch = Patch::Merge(json!({ "status": stamped(status, &now()) }));
    let written = access.ask(async |client| {
        let api = Document::api(client, *kind, &key.namespace);
        match api.patch_status(&key.name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            outcome => outcome.map(|_| true),
        }
    });
    written.await
}

/// Conditions without `lastTransitionTime` changed just now; planners know no time.
fn stamped(status: &Value, now: &str) -> Value {
    let mut status = status.clone();
    let conditions = status.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten();
    for condition in conditions.filter_map(Value::as_object_mut) {
        condition.entry("lastTransitionTime").or_insert_with(|| now.into());
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::Endpoint;

    fn target(name: &str) -> Target {
        Target { kind: Kind::Service, key: NamespacedName::new("default", name) }
    }

    #[test]
    fn a_condition_bears_the_time_of_its_change_only() {
        let status =
            json!({"conditions": [{"type": "a", "lastTransitionTime": "then"}, {"type": "b"}], "x": 1});
        let expected = json!({"conditions": [{"type": "a", "lastTransitionTime": "then"},
            {"type": "b", "lastTransitionTime": "now"}], "x": 1});
        assert_eq!(stamped(&status, "now"), expected);
        assert_eq!(stamped(&json!({}), "now"), json!({}));
    }

    #[tokio::test]
    async fn a_status_is_written_once_until_it_differs_again() {
        let url = "http://192.0.2.1:1".to_owned();
        let access = Access::open(Endpoint::Server { url, token_file: None, ca_file: None }).await.unwrap();
        let mut writer = StatusWriter::new(Arc::new(access), Lead::held());
        let plan = Statuses::from([(target("web"), json!({"a": 1}))]);
        let due: Statuses = writer.due(&plan, Trust::Shadow).into_iter().collect();
        assert_eq!(due, plan);
        writer.written = due;
        assert_eq!(writer.due(&plan, Trust::Shadow), []);
        assert_eq!(writer.due(&plan, Trust::Nothing).len(), 1, "a drift check writes what is still not so");
        let other = Statuses::from([(target("web"), json!({"a": 2}))]);
        assert_eq!(writer.due(&other, Trust::Shadow).len(), 1);
        assert_eq!(writer.due(&Statuses::new(), Trust::Shadow), []);
        assert_eq!(writer.due(&plan, Trust::Shadow).len(), 1, "the object differed again");
    }
}
