//! What the DNS room counts, for metrics and status: plain atomics, read without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;

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
    pub(crate) forwarded: AtomicU64,
    pub(crate) cache_hits: AtomicU64,
    pub(crate) upstream_failures: AtomicU64,
}

impl Stats {
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

    /// Questions sent to a resolver of the host.
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }

    /// Questions answered from the cache of forwarded answers.
    pub fn cache_hits(&self) -> u64 {
        self.cache_hits.load(Ordering::Relaxed)
    }

    /// Tries that a resolver of the host did not answer.
    pub fn upstream_failures(&self) -> u64 {
        self.upstream_failures.load(Ordering::Relaxed)
    }
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
