//! Which Events are due: notices and the time in, those to be written out. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;
use weft_model::Notice;

/// A problem that is gone before this time was the order in which objects came.
const SETTLES: Duration = Duration::from_secs(4);
/// An API server forgets Events after an hour (`--event-ttl`); until it has, it answers that there is one.
const AGAIN: Duration = Duration::from_secs(15 * 60);
/// Standing notices that are written at most; the first in their order.
const STANDING: usize = 500;
/// Passing notices that wait at most, as while the API server is away; more are dropped.
const PASSING: usize = 500;
/// Passing notices of one object and reason within [`PERIOD`]; more are dropped.
const OF_ONE_OBJECT: usize = 10;
const PERIOD: Duration = Duration::from_secs(10 * 60);

/// An Event to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub notice: Notice,
    /// Tells equal passing notices apart; empty for a standing one, which has one Event.
    salt: String,
}

impl Due {
    pub(super) fn standing(notice: Notice) -> Self {
        Self { notice, salt: String::new() }
    }

    /// Name of the Event, given the `uid` of the object: one that was deleted and made again is told anew.
    pub(super) fn name(&self, uid: &str) -> String {
        name(&self.notice, &format!("{uid}\n{}", self.salt))
    }
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Tells passing notices of this life from those of others.
    life: u64,
    standing: BTreeMap<Notice, Standing>,
    passing: VecDeque<Due>,
    /// When passing notices of an object (kind, namespace, name, reason) were taken.
    rates: BTreeMap<[String; 4], VecDeque<Instant>>,
    /// Counts passing notices: equal ones have different Events.
    taken: u64,
    not_before: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Standing {
    since: Instant,
    said: Option<Instant>,
}

impl Outbox {
    /// `life` is another one at every start.
    pub(super) fn new(life: u64) -> Self {
        Self { life, ..Self::default() }
    }

    /// Takes a passing notice.
    pub(super) fn pass(&mut self, notice: Notice, now: Instant) {
        self.rates.retain(|_, times| {
            times.retain(|time| now.duration_since(*time) < PERIOD);
            !times.is_empty()
        });
        let object = &notice.object;
        let key = [&object.kind, &object.namespace, &object.name, &notice.reason].map(Clone::clone);
        let times = self.rates.entry(key).or_default();
        if times.len() >= OF_ONE_OBJECT || self.passing.len() >= PASSING {
            return;
        }
        times.push_back(now);
        self.taken += 1;
        let salt = format!("{}/{}", self.life, self.taken);
        self.passing.push_back(Due { notice, salt });
    }

    /// What is to be written now, given the notices that stand.
    pub(super) fn due(&mut self, standing: &BTreeSet<Notice>, now: Instant) -> Vec<Due> {
        self.standing.retain(|notice, _| standing.contains(notice));
        for notice in standing.iter().take(STANDING) {
            self.standing.entry(notice.clone()).or_insert(Standing { since: now, said: None });
        }
        if self.not_before.is_some_and(|time| now < time) {
            return Vec::new();
        }
        let is_due = |state: &Standing| {
            now.duration_since(state.since) >= SETTLES
                && state.said.is_none_or(|said| now.duration_since(said) >= AGAIN)
        };
        let of_standing = self.standing.iter().filter(|(_, state)| is_due(state));
        let of_standing = of_standing.map(|(notice, _)| Due::standing(notice.clone()));
        self.passing.iter().cloned().chain(of_standing).collect()
    }

    /// `due` was written, or refused for good.
    pub(super) fn done(&mut self, due: &Due, now: Instant) {
        self.passing.retain(|waiting| waiting != due);
        if let Some(state) = self.standing.get_mut(&due.notice) {
            state.said = Some(now);
        }
    }

    /// Nothing is due before `time`.
    pub(super) fn wait(&mut self, time: Instant) {
        self.not_before = Some(time);
    }
}

/// Longest name of an object in bytes (DNS subdomain, RFC 1123).
const NAME_BYTES: usize = 253;

/// The object's name, then what the content gives.
fn name(notice: &Notice, salt: &str) -> String {
    let Notice { object, severity, reason, message } = notice;
    let content = format!("{object}\n{severity:?}\n{reason}\n{message}\n{salt}");
    let digest = Sha256::digest(content.as_bytes());
    let suffix = digest.iter().take(8).fold(String::from("."), |mut suffix, byte| {
        let _ = write!(suffix, "{byte:02x}");
        suffix
    });
    let kept: String = object.name.chars().take(NAME_BYTES - suffix.len()).collect();
    kept.trim_end_matches(['.', '-']).to_owned() + &suffix
}

#[cfg(test)]
mod tests;
