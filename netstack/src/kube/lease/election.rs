//! Who may write, from what the Lease said and when this node saw it say so. Pure: time comes in as an argument.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

/// What a Lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Empty when nobody holds it.
    pub holder: String,
    pub duration: Duration,
    /// As it stands in the object, never compared with a clock.
    pub acquired: Option<String>,
    pub transitions: i64,
    /// `metadata.resourceVersion`: another one means that the holder lives.
    pub version: String,
}

/// A Lease without `leaseDurationSeconds` runs out after this.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);

impl Record {
    /// Fields that do not hold what their type promises count as absent.
    pub(super) fn of(lease: &Value) -> Self {
        let spec = &lease["spec"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let seconds = spec["leaseDurationSeconds"].as_u64().filter(|seconds| *seconds > 0);
        Self {
            holder: text(&spec["holderIdentity"]),
            duration: seconds.map_or(DEFAULT_DURATION, Duration::from_secs),
            acquired: spec["acquireTime"].as_str().map(str::to_owned),
            transitions: spec["leaseTransitions"].as_i64().unwrap_or(0),
            version: text(&lease["metadata"]["resourceVersion"]),
        }
    }
}

/// What is to be done after a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Another holds it.
    Wait,
    /// There is none yet.
    Create { spec: Record },
    /// Renewed, or taken over from one that fell silent; `version` is what was seen.
    Replace { spec: Record, version: String },
}

pub(super) struct Election {
    me: String,
    seen: Option<Seen>,
}

struct Seen {
    record: Record,
    /// When this node first saw this version.
    at: Instant,
}

impl Election {
    pub(super) fn new(me: String) -> Self {
        Self { me, seen: None }
    }

    pub(super) fn holder(&self) -> Option<&str> {
        self.seen.as_ref().map(|seen| seen.record.holder.as_str()).filter(|holder| !holder.is_empty())
    }

    /// `now` is a time before the read was sent.
    pub(super) fn step(&mut self, read: Option<Record>, now: Instant) -> Step {
        self.observe(read, now);
        let Some(Seen { record, at }) = &self.seen else {
            return Step::Create { spec: Record { holder: self.me.clone(), ..Record::default() } };
        };
        // Its own Lease from before a restart is this node's at once.
        let own = record.holder == self.me;
        let free = record.holder.is_empty() || now.duration_since(*at) >= record.duration;
        if !own && !free {
            return Step::Wait;
        }
        let spec = Record {
            holder: self.me.clone(),
            acquired: record.acquired.clone().filter(|_| own),
            transitions: record.transitions + i64::from(!own),
            ..Record::default()
        };
        Step::Replace { spec, version: record.version.clone() }
    }

    pub(super) fn observe(&mut self, read: Option<Record>, now: Instant) {
        let known = self.seen.as_ref().map(|seen| &seen.record.version);
        if known != read.as_ref().map(|record| &record.version) {
            self.seen = read.map(|record| Seen { record, at: now });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str, version: &str) -> Record {
        let duration = Duration::from_secs(10);
        Record { holder: holder.to_owned(), version: version.to_owned(), duration, ..Record::default() }
    }

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn the_first_node_makes_the_lease() {
        let mut election = Election::new("a".to_owned());
        let step = election.step(None, Instant::now());
        assert!(matches!(step, Step::Create { spec } if spec.holder == "a"));
    }

    #[test]
    fn a_holder_that_renews_is_never_replaced_whatever_its_clock_says() {
        let start = Instant::now();
        let mut election = Election::new("a".to_owned());
        for (look, version) in (0..100).zip(1..) {
            let read = Record {
                acquired: Some("1970-01-01T00:00:00Z".to_owned()),
                ..held_by("b", &version.to_string())
            };
            assert_eq!(election.step(Some(read), after(start, look * 9)), Step::Wait);
        }
    }

    #[test]
    fn a_silent_holder_is_replaced_after_the_whole_duration_since_it_was_seen() {
        let start = Instant::now();
        let mut election = Election::new("a".to_owned());
        assert_eq!(election.step(Some(held_by("b", "7")), start), Step::Wait);
        assert_eq!(election.step(Some(held_by("b", "7")), after(start, 9)), Step::Wait);
        let step = election.step(Some(held_by("b", "7")), after(start, 10));
        assert!(
            matches!(&step, Step::Replace { spec, version } if version == "7" && spec.holder == "a" && spec.transitions == 1),
            "{step:?}"
        );
    }

    #[test]
    fn a_node_that_just_started_waits_even_for_a_lease_that_looks_old() {
        let mut election = Election::new("a".to_owned());
        assert_eq!(election.step(Some(held_by("b", "7")), Instant::now()), Step::Wait);
    }

    #[test]
    fn a_restarted_holder_goes_on_at_once_without_a_transition() {
        let mut election = Election::new("a".to_owned());
        let read = Record { transitions: 3, acquired: Some("then".to_owned()), ..held_by("a", "7") };
        let step = election.step(Some(read), Instant::now());
        assert!(
            matches!(&step, Step::Replace { spec, .. } if spec.transitions == 3 && spec.acquired.as_deref() == Some("then")),
            "{step:?}"
        );
    }

    #[test]
    fn a_released_lease_is_taken_at_once() {
        let mut election = Election::new("a".to_owned());
        assert!(matches!(election.step(Some(held_by("", "7")), Instant::now()), Step::Replace { .. }));
    }

    #[test]
    fn a_lease_of_unreadable_fields_is_read_as_far_as_it_goes() {
        let lease = serde_json::json!({"metadata": {"resourceVersion": "9"},
            "spec": {"holderIdentity": 7, "leaseDurationSeconds": -1, "leaseTransitions": "x"}});
        let read = Record::of(&lease);
        assert_eq!((read.holder.as_str(), read.duration, read.transitions), ("", DEFAULT_DURATION, 0));
    }
}
