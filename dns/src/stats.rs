//! What the DNS room counts, for metrics and status: plain atomics, read without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;
use hickory_server::net::xfer::Protocol;

/// Counters since the process started.
#[derive(Debug, Default)]
pub struct Stats {
    noerror: AtomicU64,
    formerr: AtomicU64,
    servfail: AtomicU64,
    nxdomain: AtomicU64,
    notimp: AtomicU64,
    refused: AtomicU64,
    other: AtomicU64,
    dropped: [AtomicU64; Dropped::NAMES.len()],
    refused_by: [AtomicU64; Refused::NAMES.len()],
    by_udp: AtomicU64,
    by_tcp: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    pub(crate) cache_hits: AtomicU64,
    pub(crate) upstream_failures: AtomicU64,
    pub(crate) served_stale: AtomicU64,
    pub(crate) prefetched: AtomicU64,
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
    /// Too many questions of one client, or of all, wait for an answer that is not at hand.
    Busy,
    /// The kernel did not take the reply.
    Unsent,
}

impl Dropped {
    const NAMES: [&str; 5] = ["short", "response", "source", "busy", "unsent"];
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
        let counter = if protocol == Protocol::Udp { &self.by_udp } else { &self.by_tcp };
        counter.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Messages that came, whatever became of them, by transport.
    pub fn requests(&self) -> [(&'static str, u64); 2] {
        [("udp", &self.by_udp), ("tcp", &self.by_tcp)]
            .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }

    /// Datagrams without an answer, by reason, in a fixed order.
    pub fn dropped(&self) -> Vec<(&'static str, u64)> {
        let counts = self.dropped.iter().map(|counter| counter.load(Ordering::Relaxed));
        Dropped::NAMES.into_iter().zip(counts).collect()
    }

    pub(crate) fn count_response(&self, code: ResponseCode) {
        let counter = match code {
            ResponseCode::NoError => &self.noerror,
            ResponseCode::FormErr => &self.formerr,
            ResponseCode::ServFail => &self.servfail,
            ResponseCode::NXDomain => &self.nxdomain,
            ResponseCode::NotImp => &self.notimp,
            ResponseCode::Refused => &self.refused,
            _ => &self.other,
        };
        count(counter);
    }

    /// Answers by response code, in a fixed order; the names are those of the DNS (RFC 1035, RFC 2136).
    pub fn responses(&self) -> [(&'static str, u64); 7] {
        [
            ("NOERROR", &self.noerror),
            ("FORMERR", &self.formerr),
            ("SERVFAIL", &self.servfail),
            ("NXDOMAIN", &self.nxdomain),
            ("NOTIMP", &self.notimp),
            ("REFUSED", &self.refused),
            ("OTHER", &self.other),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }

    /// Answers of any code.
    pub fn queries(&self) -> u64 {
        self.responses().iter().map(|(_, count)| count).sum()
    }

    /// What became of questions for names outside the cluster, and of the upstreams that were asked, in a fixed order.
    pub fn outside(&self) -> [(&'static str, u64); 5] {
        [
            ("forwarded", self.forwarded()),
            ("cached", self.cache_hits()),
            ("stale", self.served_stale()),
            ("prefetched", self.prefetched()),
            ("upstream_failed", self.upstream_failures()),
        ]
    }

    /// Questions sent to a resolver of the host.
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }

    /// Questions answered from the cache of forwarded answers.
    pub fn cache_hits(&self) -> u64 {
        self.cache_hits.load(Ordering::Relaxed)
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

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
