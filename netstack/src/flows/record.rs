//! One flow as it is shown, and what is asked about flows.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::policy::Direction;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Allowed,
    Denied,
}

/// The first packet of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// RFC 3339, UTC, with milliseconds.
    pub time: String,
    pub verdict: Verdict,
    pub source: End,
    /// After translation: who is meant, not what was called.
    pub destination: End,
    /// `tcp`, `udp`, `sctp`, `icmp`, `icmpv6` or the IANA number.
    pub protocol: String,
    /// Of the destination; 0 for protocols without.
    pub port: u16,
    /// `NAMESPACE/NAME` of the Service that was called; several with ` or ` between them where the packet does not tell.
    pub service: Option<String>,
    /// Whose policies deny it: the source's (`egress`) or the destination's (`ingress`).
    pub direction: Option<Direction>,
    /// Rules and policies, or that there are none.
    pub decided_by: String,
}

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub address: IpAddr,
    /// `NAMESPACE/NAME`.
    pub pod: Option<String>,
}

impl End {
    fn is_of(&self, namespace: &str) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.split('/').next() == Some(namespace))
    }
}

/// What an allocator takes beside what was asked for, at most.
const ALLOCATION: usize = 24;

impl Record {
    /// Memory it takes, about.
    pub(super) fn bytes(&self) -> usize {
        let names = [&self.source.pod, &self.destination.pod, &self.service].into_iter().flatten();
        let texts = names.chain([&self.time, &self.protocol, &self.decided_by]);
        let of_texts: usize = texts.map(|text| text.capacity() + ALLOCATION).sum();
        size_of::<(u64, Self)>() + of_texts
    }
}

/// Which flows: those for which all that is given holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// `NAMESPACE/NAME` at either end.
    pub pod: Option<String>,
    /// Of a pod at either end.
    pub namespace: Option<String>,
    pub verdict: Option<Verdict>,
    pub port: Option<u16>,
    /// Only what came after this number of an earlier [`super::Page`].
    pub after: Option<u64>,
    /// The latest so many.
    pub last: Option<usize>,
}

impl Query {
    pub(super) fn means(&self, record: &Record) -> bool {
        let ends = [&record.source, &record.destination];
        self.verdict.is_none_or(|verdict| verdict == record.verdict)
            && self.port.is_none_or(|port| port == record.port)
            && self.pod.as_ref().is_none_or(|pod| ends.iter().any(|end| end.pod.as_ref() == Some(pod)))
            && self.namespace.as_ref().is_none_or(|name| ends.iter().any(|end| end.is_of(name)))
    }
}
