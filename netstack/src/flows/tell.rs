//! Which denied flows become an Event on the pod whose policies deny them. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use weft_model::{Notice, ObjectRef, Severity};

use super::record::{End, Record, Verdict};
use crate::policy::Direction;

/// The same is told again after this time.
const AGAIN: Duration = Duration::from_secs(10 * 60);
/// Between two Events of this node.
const APART: Duration = Duration::from_secs(1);
/// What was told and is remembered; when there is more, nothing new is told until some is forgotten.
const REMEMBERED: usize = 1_024;
const REASON: &str = "PolicyDenied";

#[derive(Debug, Default)]
pub(super) struct Teller {
    told: BTreeMap<Notice, Instant>,
    last: Option<Instant>,
}

impl Teller {
    /// The Event that this flow is worth now.
    pub(super) fn notice(&mut self, record: &Record, now: Instant) -> Option<Notice> {
        if self.last.is_some_and(|last| now.duration_since(last) < APART) {
            return None;
        }
        let notice = notice(record)?;
        self.told.retain(|_, told| now.duration_since(*told) < AGAIN);
        if self.told.len() >= REMEMBERED || self.told.contains_key(&notice) {
            return None;
        }
        self.last = Some(now);
        self.told.insert(notice.clone(), now);
        Some(notice)
    }
}

/// Of a packet from the middle of a connection nobody has to know.
fn notice(record: &Record) -> Option<Notice> {
    let direction = record.direction?;
    let (subject, other, preposition) = match direction {
        Direction::Egress => (&record.source, &record.destination, "to"),
        Direction::Ingress => (&record.destination, &record.source, "from"),
    };
    let pod = subject.pod.as_ref().filter(|_| record.verdict == Verdict::Denied)?;
    let (namespace, name) = pod.split_once('/')?;
    let port = if record.port == 0 { String::new() } else { format!(" port {}", record.port) };
    let service = record.service.as_ref().map(|name| format!(" (Service {name})")).unwrap_or_default();
    let message = format!(
        "{} {preposition} {}{service}, {}{port}, is denied: {}; `weft policy explain` says more",
        direction.name(),
        title(other),
        record.protocol,
        record.decided_by
    );
    Some(Notice::new(ObjectRef::new("Pod", namespace, name), Severity::Warning, REASON, message))
}

fn title(end: &End) -> String {
    match &end.pod {
        Some(pod) => format!("{pod} ({})", end.address),
        None => end.address.to_string(),
    }
}
