//! What the own Node says of the policy engine: one condition, beside those of the kubelet.
//!
//! In: the reports of the policy loop; none where policies are switched off. Out: strategic merge patches of the Node's
//! status, sent only while the Node says something else. Nothing waits for them. The Node's other conditions are not touched, and
//! an agent has no right to.

use std::sync::Arc;
use std::time::Duration;

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use weft_model::constants::CONDITION_NETWORK_POLICY;
use weft_model::{Health, NodeName, Report};

use super::client::Access;
use super::document::{Document, Kind};
use super::now;

/// How often the report is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A failure of less than this passes by itself: an agent that starts anew waits for the API server as long.
const LASTING: Duration = Duration::from_secs(5);
/// The Node is read anew after this time, since others may have written it, and after a write that failed.
const AGAIN: Duration = Duration::from_secs(60);

/// What is true of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    InPlace,
    /// One line: what the kernel said.
    Failing(String),
    /// There is no engine to speak of.
    Off,
}

impl Standing {
    /// `None` before the first pass: what the Node says of before the restart stays.
    fn of(report: Option<&Report>) -> Option<Self> {
        let Some(report) = report else { return Some(Self::Off) };
        match report.health() {
            Health::Starting => None,
            Health::Ok => Some(Self::InPlace),
            Health::Failing => Some(Self::Failing(report.failures.join("; "))),
        }
    }

    /// The item that turns the condition `said` of the Node into this one; `None` where it is so already.
    fn patch(&self, said: Option<&Value>, now: &str) -> Option<Value> {
        let (status, reason, message) = match self {
            Self::Off => {
                let gone = json!({"type": CONDITION_NETWORK_POLICY, "$patch": "delete"});
                return said.map(|_| gone);
            }
            Self::InPlace => {
                ("True", "RulesInPlace", "the kernel has the rules of network policies".to_owned())
            }
            Self::Failing(why) => {
                let message =
                    format!("network policies are not in place: {why}; no pod is started meanwhile");
                ("False", "RulesNotInPlace", message)
            }
        };
        let field = |name: &str| said.and_then(|said| said[name].as_str());
        if field("status") == Some(status) && field("message") == Some(&message) {
            return None;
        }
        let since = field("lastTransitionTime").filter(|_| field("status") == Some(status)).unwrap_or(now);
        Some(json!({
            "type": CONDITION_NETWORK_POLICY, "status": status, "reason": reason, "message": message,
            "lastTransitionTime": since, "lastHeartbeatTime": now,
        }))
    }
}

/// The task that keeps the condition true.
pub struct NodeCondition {
    pub access: Arc<Access>,
    pub node: NodeName,
    /// `None` where policies are switched off.
    pub policy: Option<watch::Receiver<Report>>,
}

impl NodeCondition {
    /// Runs as long as the agent.
    ///
    /// # Errors
    /// None; the signature is that of a task.
    pub async fn run(self) -> Result<(), String> {
        let mut look = tokio::time::interval(LOOK);
        let mut written: Option<(Standing, Instant)> = None;
        let mut failing_since = None;
        loop {
            look.tick().await;
            let Some(standing) =
                Standing::of(self.policy.as_ref().map(|policy| policy.borrow().clone()).as_ref())
            else {
                continue;
            };
            match standing {
                Standing::Failing(_) => {
                    if failing_since.get_or_insert_with(Instant::now).elapsed() < LASTING {
                        continue;
                    }
                }
                _ => failing_since = None,
            }
            let known = written.as_ref().is_some_and(|(said, at)| *said == standing && at.elapsed() < AGAIN);
            if known {
                continue;
            }
            if let Err(failure) = self.write(&standing).await {
                tracing::debug!(?failure, "condition of the Node");
            }
            written = Some((standing, Instant::now()));
        }
    }

    async fn write(&self, standing: &Standing) -> Result<(), super::ApiFailure> {
        let written = self.access.ask(async |client| {
            let found = Document::find(client.clone(), Kind::Node, ("", &self.node.0)).await?;
            let Some(node) = found else { return Ok(()) };
            let conditions = node.value["status"]["conditions"].as_array().into_iter().flatten();
            let said = conditions.into_iter().find(|condition| condition["type"] == CONDITION_NETWORK_POLICY);
            let Some(item) = standing.patch(said, &now()) else { return Ok(()) };
            let patch = Patch::Strategic(json!({"status": {"conditions": [item]}}));
            let nodes = Document::api(client, Kind::Node, "");
            nodes.patch_status(&self.node.0, &PatchParams::default(), &patch).await.map(drop)
        });
        written.await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::Generation;

    #[test]
    fn before_the_first_pass_nothing_is_said_and_without_an_engine_nothing_stays() {
        let report = Report::default();
        assert_eq!(Standing::of(Some(&report)), None);
        assert_eq!(Standing::of(None), Some(Standing::Off));
        assert_eq!(Standing::Off.patch(None, "now"), None);
        let said = json!({"type": CONDITION_NETWORK_POLICY, "status": "True"});
        assert_eq!(Standing::Off.patch(Some(&said), "now").unwrap()["$patch"], "delete");
        let applied = Report { generation: Generation(3), ..Report::default() };
        assert_eq!(Standing::of(Some(&applied)), Some(Standing::InPlace));
    }

    #[test]
    fn a_condition_is_written_when_it_changes_and_bears_the_time_of_that() {
        let failing = Report { failures: vec!["table weft-policy: EPERM".to_owned()], ..Report::default() };
        let standing = Standing::of(Some(&failing)).unwrap();
        let first = standing.patch(None, "then").unwrap();
        assert_eq!((&first["status"], &first["lastTransitionTime"]), (&json!("False"), &json!("then")));
        assert_eq!(
            first["message"],
            "network policies are not in place: table weft-policy: EPERM; no pod is started meanwhile"
        );
        assert_eq!(standing.patch(Some(&first), "now"), None, "it is said already");
        let other = Standing::Failing("another".to_owned()).patch(Some(&first), "now").unwrap();
        assert_eq!(other["lastTransitionTime"], "then", "still not in place");
        let mended = Standing::InPlace.patch(Some(&first), "now").unwrap();
        assert_eq!((&mended["status"], &mended["lastTransitionTime"]), (&json!("True"), &json!("now")));
    }
}
