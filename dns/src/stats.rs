//! What the DNS room counts, for metrics and status: plain atomics, read without a lock.

mod histogram;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
pub(crate) use hickory_server::net::xfer::Protocol;

use histogram::{Histogram, Latency, Programming, Scale, Size};

/// Types that are counted by their names, with their numbers; CoreDNS's choice.
const TYPES: [(&str, u16); 18] = [
    ("A", 1),
    ("AAAA", 28),
    ("ANY", 255),
    ("CNAME", 5),
    ("DNSKEY", 48),
    ("DS", 43),
    ("HTTPS", 65),
    ("MX", 15),
    ("NS", 2),
    ("NSEC", 47),
    ("NSEC3", 50),
    ("PTR", 12),
    ("RRSIG", 46),
    ("SOA", 6),
    ("SRV", 33),
    ("SVCB", 64),
    ("TXT", 16),
    ("other", 0),
];
/// Response codes that are counted by their names, with their numbers (RFC 1035, RFC 2136).
const CODES: [(&str, u16); 7] = [
    ("NOERROR", 0),
    ("FORMERR", 1),
    ("SERVFAIL", 2),
    ("NXDOMAIN", 3),
    ("NOTIMP", 4),
    ("REFUSED", 5),
    ("OTHER", u16::MAX),
];
/// The transports, in the order of every counter that is kept for each.
const TRANSPORTS: [&str; 2] = ["udp", "tcp"];
/// Upstreams that are counted apart; more than anybody names at one time.
const MAX_UPSTREAMS: usize = 64;

/// Counters since the process started.
#[derive(Debug, Default)]
pub struct Stats {
    codes: [AtomicU64; CODES.len()],
    dropped: [AtomicU64; Dropped::NAMES.len()],
    refused_by: [AtomicU64; Refused::NAMES.len()],
    came: [AtomicU64; TRANSPORTS.len()],
    /// By transport, address family and type.
    asked: [[[AtomicU64; TYPES.len()]; 2]; TRANSPORTS.len()],
    asked_for_dnssec: AtomicU64,
    takes_bytes: [Histogram<Size>; TRANSPORTS.len()],
    sent_bytes: [Histogram<Size>; TRANSPORTS.len()],
    durations: Histogram<Latency>,
    programming: Histogram<Programming>,
    upstreams: Mutex<Upstreams>,
    pub(crate) forwarded: AtomicU64,
    /// Answers that say what there is, and those that say that there is nothing.
    hits: [AtomicU64; 2],
    pub(crate) misses: AtomicU64,
    pub(crate) rejected: AtomicU64,
    pub(crate) upstream_failures: AtomicU64,
    pub(crate) served_stale: AtomicU64,
    pub(crate) prefetched: AtomicU64,
    pub(crate) rebindings: AtomicU64,
}

/// A message that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Came {
    pub(crate) protocol: Protocol,
    pub(crate) ipv6: bool,
    /// `None` where the question cannot be read.
    pub(crate) record_type: Option<u16>,
    pub(crate) dnssec_ok: bool,
    /// Longest answer that the client takes.
    pub(crate) takes_bytes: u16,
}

/// What a histogram holds: the sum, and the number of values in each bucket by its upper bound.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) sum: f64,
    pub(crate) buckets: Vec<(f64, u64)>,
}

impl Sample {
    fn of<S: Scale>(histogram: &Histogram<S>) -> Self {
        let (sum, buckets) = histogram.read();
        Self { sum, buckets }
    }

    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }
}

/// Upstreams by address.
#[derive(Debug, Default)]
struct Upstreams {
    answers: BTreeMap<String, BTreeMap<&'static str, Histogram<Latency>>>,
    silent: BTreeMap<String, u64>,
}

/// What each upstream said and how long it took, by code, and how often it said nothing.
pub(crate) struct UpstreamSamples {
    pub(crate) answers: BTreeMap<String, BTreeMap<&'static str, Sample>>,
    pub(crate) silent: BTreeMap<String, u64>,
}

/// Why a datagram got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dropped {
    /// Shorter than a header.
    Short,
    /// A response sent as a query.
    Response,
    /// From an address that many hosts may have, or from port 0.
    Source,
    /// Its client has asked more often than it may.
    Rate,
    /// Too many questions of one client, or of all, wait for an answer that is not at hand.
    Busy,
    /// The kernel did not take the reply.
    Unsent,
}

impl Dropped {
    const NAMES: [&str; 6] = ["short", "response", "source", "rate", "busy", "unsent"];

    pub(crate) fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// Why a message was answered without being looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Cannot be read.
    Malformed,
    /// No question, or several (RFC 9619).
    Questions,
    /// Another operation than a query, such as an update (RFC 2136).
    Operation,
    /// EDNS of a version that is not there yet (RFC 6891 section 6.1.3).
    Version,
    /// Signed with TSIG (RFC 8945) or SIG(0) (RFC 2931): there are no keys here.
    Signed,
    /// Another class than IN.
    Class,
    /// A zone transfer (RFC 5936, RFC 1995).
    Transfer,
    /// OPT, which is no type to ask for (RFC 6891 section 6.1.1).
    Type,
}

impl Refused {
    const NAMES: [&str; 8] =
        ["malformed", "questions", "operation", "version", "signed", "class", "transfer", "type"];

    /// What the client is told.
    pub(crate) fn code(self) -> ResponseCode {
        match self {
            Self::Malformed | Self::Questions => ResponseCode::FormErr,
            Self::Operation => ResponseCode::NotImp,
            Self::Version => ResponseCode::BADVERS,
            Self::Signed | Self::Class | Self::Transfer | Self::Type => ResponseCode::Refused,
        }
    }
}

impl Stats {
    pub(crate) fn count_refused(&self, reason: Refused) {
        count(&self.refused_by[reason as usize]);
    }

    /// Messages answered without being looked up, by reason, in a fixed order.
    pub fn refused(&self) -> Vec<(&'static str, u64)> {
        let counts = self.refused_by.iter().map(|counter| counter.load(Ordering::Relaxed));
        Refused::NAMES.into_iter().zip(counts).collect()
    }

    pub(crate) fn count_dropped(&self, reason: Dropped) {
        self.count_many_dropped(reason, 1);
    }

    pub(crate) fn count_many_dropped(&self, reason: Dropped, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.dropped[reason as usize].fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn count_requests(&self, protocol: Protocol, count: usize) {
        self.came[transport(protocol)].fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Messages that came, whatever became of them, by transport.
    pub fn requests(&self) -> [(&'static str, u64); 2] {
        std::array::from_fn(|at| (TRANSPORTS[at], self.came[at].load(Ordering::Relaxed)))
    }

    /// Datagrams without an answer, by reason, in a fixed order.
    pub fn dropped(&self) -> Vec<(&'static str, u64)> {
        let counts = self.dropped.iter().map(|counter| counter.load(Ordering::Relaxed));
        Dropped::NAMES.into_iter().zip(counts).collect()
    }

    pub(crate) fn count_response(&self, code: ResponseCode) {
        self.count_responses(code, 1);
    }

    fn count_responses(&self, code: ResponseCode, times: u64) {
        count_many(&self.codes[code_at(u16::from(code))], times);
    }

    /// Answers by response code, in a fixed order; the names are those of the DNS (RFC 1035, RFC 2136).
    pub fn responses(&self) -> [(&'static str, u64); 7] {
        std::array::from_fn(|at| (CODES[at].0, self.codes[at].load(Ordering::Relaxed)))
    }

    pub(crate) fn count_asked(&self, came: &Came, times: u64) {
        let of_type = |number| TYPES.iter().position(|(_, known)| *known == number);
        let at = came.record_type.and_then(of_type).unwrap_or(TYPES.len() - 1);
        let protocol = transport(came.protocol);
        count_many(&self.asked[protocol][usize::from(came.ipv6)][at], times);
        if came.dnssec_ok {
            count_many(&self.asked_for_dnssec, times);
        }
        self.takes_bytes[protocol].count(u64::from(came.takes_bytes), times);
    }

    /// Messages that came by transport, address family (1: IPv4, 2: IPv6) and type; only what there was.
    pub(crate) fn asked(&self) -> Vec<(&'static str, &'static str, &'static str, u64)> {
        let mut all = Vec::new();
        for (proto, families) in TRANSPORTS.into_iter().zip(&self.asked) {
            for (family, types) in ["1", "2"].into_iter().zip(families) {
                let counts = types.iter().map(|counter| counter.load(Ordering::Relaxed));
                let counts = TYPES.iter().zip(counts).filter(|(_, count)| *count > 0);
                all.extend(counts.map(|((name, _), count)| (proto, family, *name, count)));
            }
        }
        all
    }

    pub(crate) fn asked_for_dnssec(&self) -> u64 {
        self.asked_for_dnssec.load(Ordering::Relaxed)
    }

    /// An answer of so many octets was sent.
    pub(crate) fn count_sent(&self, protocol: Protocol, bytes: usize, times: u64) {
        self.sent_bytes[transport(protocol)].count(u64::try_from(bytes).unwrap_or(u64::MAX), times);
    }

    /// So many answers took this long.
    pub(crate) fn count_duration(&self, took: Duration, answers: usize) {
        let answers = u64::try_from(answers).unwrap_or(u64::MAX);
        self.durations.count(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), answers);
    }

    /// A change of a headless Service is served, so long after it was made.
    pub(crate) fn count_programmed(&self, took: Duration) {
        self.programming.count(u64::try_from(took.as_millis()).unwrap_or(u64::MAX), 1);
    }

    /// How an exchange with an upstream ended: the code of its answer, or none.
    pub(crate) fn count_upstream(&self, to: &str, code: Option<u16>, took: Duration) {
        let mut upstreams = self.upstreams.lock().unwrap_or_else(PoisonError::into_inner);
        let Upstreams { answers, silent } = &mut *upstreams;
        let is_new = !answers.contains_key(to) && !silent.contains_key(to);
        if is_new && answers.len().max(silent.len()) >= MAX_UPSTREAMS {
            answers.clear();
            silent.clear();
        }
        match code {
            Some(code) => answers
                .entry(to.to_owned())
                .or_default()
                .entry(CODES[code_at(code)].0)
                .or_default()
                .count(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), 1),
            None => *silent.entry(to.to_owned()).or_default() += 1,
        }
    }

    pub(crate) fn upstreams(&self) -> UpstreamSamples {
        let upstreams = self.upstreams.lock().unwrap_or_else(PoisonError::into_inner);
        let of_codes = |codes: &BTreeMap<&'static str, Histogram<Latency>>| {
            codes.iter().map(|(code, histogram)| (*code, Sample::of(histogram))).collect()
        };
        let answers = upstreams.answers.iter().map(|(to, codes)| (to.clone(), of_codes(codes)));
        UpstreamSamples { answers: answers.collect(), silent: upstreams.silent.clone() }
    }

    pub(crate) fn durations(&self) -> Sample {
        Sample::of(&self.durations)
    }

    pub(crate) fn programming(&self) -> Sample {
        Sample::of(&self.programming)
    }

    /// How long the answers are that clients take, by transport.
    pub(crate) fn request_sizes(&self) -> [(&'static str, Sample); 2] {
        std::array::from_fn(|at| (TRANSPORTS[at], Sample::of(&self.takes_bytes[at])))
    }

    /// How long the answers are that were sent, by transport.
    pub(crate) fn response_sizes(&self) -> [(&'static str, Sample); 2] {
        std::array::from_fn(|at| (TRANSPORTS[at], Sample::of(&self.sent_bytes[at])))
    }

    /// An answer came from the cache; `denial`: it says that there is nothing.
    pub(crate) fn count_hit(&self, denial: bool) {
        count(&self.hits[usize::from(denial)]);
    }

    /// Answers from the cache that say what there is, and those that say that there is nothing.
    pub(crate) fn hits(&self) -> [u64; 2] {
        self.hits.each_ref().map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Questions that the cache had no answer to.
    pub(crate) fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    /// Questions refused because too many were under way.
    pub(crate) fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// Answers of any code.
    pub fn queries(&self) -> u64 {
        self.responses().iter().map(|(_, count)| count).sum()
    }

    /// What became of questions for names outside the cluster, and of the upstreams that were asked, in a fixed order.
    pub fn outside(&self) -> [(&'static str, u64); 6] {
        [
            ("forwarded", self.forwarded()),
            ("cached", self.cache_hits()),
            ("stale", self.served_stale()),
            ("prefetched", self.prefetched()),
            ("upstream_failed", self.upstream_failures()),
            ("rebinding", self.rebindings.load(Ordering::Relaxed)),
        ]
    }

    /// Questions sent to a resolver of the host.
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }

    /// Questions answered from the cache of forwarded answers.
    pub fn cache_hits(&self) -> u64 {
        self.hits().iter().sum()
    }

    /// Questions answered with an answer whose time is over, because no upstream gave a new one.
    pub fn served_stale(&self) -> u64 {
        self.served_stale.load(Ordering::Relaxed)
    }

    /// Answers fetched anew before they ended.
    pub fn prefetched(&self) -> u64 {
        self.prefetched.load(Ordering::Relaxed)
    }

    /// Tries that an upstream did not answer.
    pub fn upstream_failures(&self) -> u64 {
        self.upstream_failures.load(Ordering::Relaxed)
    }
}

/// What is counted of a batch of datagrams: equals in a row at once, because each counter is shared with other threads.
pub(crate) struct Tally<'a> {
    stats: &'a Stats,
    came: Run<Came>,
    answers: Run<(ResponseCode, usize)>,
}

impl<'a> Tally<'a> {
    /// Counts when it is dropped at the latest.
    pub(crate) fn of(stats: &'a Stats) -> Self {
        Self { stats, came: Run(None), answers: Run(None) }
    }

    pub(crate) fn came(&mut self, came: Came) {
        let before = self.came.add(came);
        self.count_came(before);
    }

    /// An answer with this code, in so many octets.
    pub(crate) fn answered(&mut self, code: ResponseCode, bytes: usize) {
        let before = self.answers.add((code, bytes));
        self.count_answers(before);
    }

    fn count_came(&self, equals: Option<(Came, u64)>) {
        if let Some((came, times)) = equals {
            self.stats.count_asked(&came, times);
        }
    }

    fn count_answers(&self, equals: Option<((ResponseCode, usize), u64)>) {
        if let Some(((code, bytes), times)) = equals {
            self.stats.count_responses(code, times);
            self.stats.count_sent(Protocol::Udp, bytes, times);
        }
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        let (came, answers) = (self.came.0.take(), self.answers.0.take());
        self.count_came(came);
        self.count_answers(answers);
    }
}

/// A value, and how often it came in a row.
struct Run<T>(Option<(T, u64)>);

impl<T: PartialEq> Run<T> {
    /// Returns the run before, when another begins.
    fn add(&mut self, value: T) -> Option<(T, u64)> {
        match &mut self.0 {
            Some((same, times)) if *same == value => {
                *times += 1;
                None
            }
            _ => self.0.replace((value, 1)),
        }
    }
}

fn transport(protocol: Protocol) -> usize {
    usize::from(protocol != Protocol::Udp)
}

/// Its place in [`CODES`].
fn code_at(code: u16) -> usize {
    CODES.iter().position(|(_, known)| *known == code).unwrap_or(CODES.len() - 1)
}

pub(crate) fn count(counter: &AtomicU64) {
    count_many(counter, 1);
}

fn count_many(counter: &AtomicU64, times: u64) {
    counter.fetch_add(times, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_counts_what_was_counted_one_by_one() {
        let came = |record_type, ipv6| Came {
            protocol: Protocol::Udp,
            ipv6,
            record_type: Some(record_type),
            dnssec_ok: ipv6,
            takes_bytes: 1232,
        };
        let questions = [came(1, false), came(1, false), came(28, false), came(1, false), came(1, true)];
        let answers =
            [(ResponseCode::NoError, 90), (ResponseCode::NoError, 90), (ResponseCode::NXDomain, 90)];
        let (one_by_one, together) = (Stats::default(), Stats::default());
        let mut tally = Tally::of(&together);
        for question in questions {
            one_by_one.count_asked(&question, 1);
            tally.came(question);
        }
        for (code, bytes) in answers {
            one_by_one.count_response(code);
            one_by_one.count_sent(Protocol::Udp, bytes, 1);
            tally.answered(code, bytes);
        }
        drop(tally);
        assert_eq!(format!("{together:?}"), format!("{one_by_one:?}"));
        assert_eq!(together.asked(), [("udp", "1", "A", 3), ("udp", "1", "AAAA", 1), ("udp", "2", "A", 1)]);
    }
}
