//! What single clients ask and hear, kept only while somebody looks: for people who want to see a pod's DNS.
//!
//! ```text
//!  who looks --page--> watched addresses (for a few seconds) <--wants-- every message that was dealt with
//!                      ring of the latest entries            <--note--- those of a watched address
//! ```
//!
//! When nobody looks, a message costs one read of a flag.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::op::Message;

use crate::explain::said;
use crate::stats::{Dropped, Protocol};

/// Who asked for a page looks on for this long.
const LOOKED_AT: Duration = Duration::from_secs(5);
/// Entries that are kept, of all watched clients together: what comes between two pages of somebody who asks often.
const MAX_ENTRIES: usize = 4096;
/// Addresses that are watched at one time.
const MAX_WATCHED: usize = 256;

/// One question and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// When the answer was there.
    pub at: SystemTime,
    /// Who asked.
    pub client: IpAddr,
    /// `udp`, `tcp`.
    pub transport: &'static str,
    /// As it was spelled; what cannot be read is told so.
    pub name: String,
    /// Empty when the question cannot be read.
    pub record_type: String,
    /// The code by its name; empty when there was no answer.
    pub code: String,
    /// The answer in a few words, or why there was none.
    pub answer: String,
    /// From the question's arrival on.
    pub took: Duration,
}

/// Entries of some clients, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// What came since the page before.
    pub entries: Vec<Logged>,
    /// To ask for what comes after.
    pub last: u64,
    /// There were more than are kept.
    pub lost: bool,
}

/// What became of a question.
#[derive(Clone, Copy)]
pub(crate) enum Heard<'a> {
    Answer(&'a [u8]),
    Nothing(Dropped),
}

/// See the file's header.
#[derive(Default)]
pub(crate) struct QueryLog {
    looked_at: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    watched: HashMap<IpAddr, Instant>,
    entries: VecDeque<(u64, Logged)>,
    last: u64,
}

impl QueryLog {
    /// What the clients asked after the entry `after`; without it nothing yet. They are watched from now on for a while.
    pub(crate) fn page(&self, clients: &[IpAddr], after: Option<u64>, now: Instant) -> Page {
        let mut state = self.state();
        for client in clients.iter().take(MAX_WATCHED) {
            state.watched.insert(client.to_canonical(), now);
        }
        state.forget(now);
        self.looked_at.store(true, Ordering::Relaxed);
        let after = after.filter(|after| *after <= state.last).unwrap_or(state.last);
        let kept_from = state.entries.front().map_or(state.last + 1, |(number, _)| *number);
        let newer = state.entries.iter().filter(|(number, _)| *number > after);
        let theirs = newer.filter(|(_, entry)| clients.contains(&entry.client));
        Page {
            entries: theirs.map(|(_, entry)| entry.clone()).collect(),
            last: state.last,
            lost: after + 1 < kept_from,
        }
    }

    /// Whether a question has to be remembered until it is answered.
    pub(crate) fn is_looked_at(&self) -> bool {
        self.looked_at.load(Ordering::Relaxed)
    }

    /// Keeps the question if somebody looks at its client.
    pub(crate) fn note(
        &self,
        client: SocketAddr,
        protocol: Protocol,
        question: &[u8],
        heard: Heard<'_>,
        came_at: Instant,
    ) {
        if !self.is_looked_at() {
            return;
        }
        let (now, client) = (Instant::now(), client.ip().to_canonical());
        let mut state = self.state();
        state.forget(now);
        if state.watched.is_empty() {
            self.looked_at.store(false, Ordering::Relaxed);
            state.entries = VecDeque::new();
            return;
        }
        if state.watched.contains_key(&client) {
            state.keep(entry(client, protocol, question, heard, now.saturating_duration_since(came_at)));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, now: Instant) {
        self.watched.retain(|_, since| now.saturating_duration_since(*since) < LOOKED_AT);
    }

    fn keep(&mut self, entry: Logged) {
        self.last += 1;
        self.entries.push_back((self.last, entry));
        if self.entries.len() > MAX_ENTRIES {
            self.entries.pop_front();
        }
    }
}

fn entry(client: IpAddr, protocol: Protocol, question: &[u8], heard: Heard<'_>, took: Duration) -> Logged {
    let asked = Message::from_vec(question).ok().and_then(|message| message.queries.into_iter().next());
    let (name, record_type) = asked.map_or_else(
        || (format!("unreadable, {} octets", question.len()), String::new()),
        |query| (query.name.to_ascii(), query.query_type.to_string()),
    );
    let (code, answer) = match heard {
        Heard::Nothing(reason) => (String::new(), format!("no answer ({})", reason.name())),
        Heard::Answer(bytes) => match Message::from_vec(bytes) {
            Ok(message) => (message.metadata.response_code.to_string(), said(&message)),
            Err(_) => (String::new(), format!("an answer of {} octets", bytes.len())),
        },
    };
    let transport = if protocol == Protocol::Udp { "udp" } else { "tcp" };
    Logged { at: SystemTime::now(), client, transport, name, record_type, code, answer, took }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "10.42.0.7:40000";

    fn note(log: &QueryLog, client: &str) {
        let heard = Heard::Nothing(Dropped::Rate);
        log.note(client.parse().unwrap(), Protocol::Udp, b"?", heard, Instant::now());
    }

    fn page(log: &QueryLog, after: Option<u64>) -> Page {
        log.page(&["10.42.0.7".parse().unwrap()], after, Instant::now())
    }

    #[test]
    fn only_what_a_watched_client_asks_is_kept_and_told_once() {
        let log = QueryLog::default();
        note(&log, POD);
        let first = page(&log, None);
        assert_eq!(first, Page::default(), "nobody looked before");
        note(&log, POD);
        note(&log, "10.42.0.8:40000");
        let second = page(&log, Some(first.last));
        assert_eq!((second.entries.len(), second.last, second.lost), (1, 1, false));
        let entry = &second.entries[0];
        assert_eq!(
            (entry.name.as_str(), entry.answer.as_str()),
            ("unreadable, 1 octets", "no answer (rate)")
        );
        assert_eq!(page(&log, Some(second.last)).entries, []);
    }

    #[test]
    fn nothing_is_kept_when_nobody_has_looked_for_a_while() {
        let log = QueryLog::default();
        let long_ago = Instant::now().checked_sub(LOOKED_AT).unwrap();
        log.page(&["10.42.0.7".parse().unwrap()], None, long_ago);
        note(&log, POD);
        assert!(!log.looked_at.load(Ordering::Relaxed));
        assert_eq!(page(&log, Some(0)).entries, []);
    }

    #[test]
    fn what_is_kept_is_bounded_and_what_is_lost_is_told() {
        let log = QueryLog::default();
        let first = page(&log, None);
        (0..=MAX_ENTRIES).for_each(|_| note(&log, POD));
        let second = page(&log, Some(first.last));
        assert_eq!((second.entries.len(), second.lost), (MAX_ENTRIES, true));
        assert!(!page(&log, Some(second.last)).lost);
    }
}
