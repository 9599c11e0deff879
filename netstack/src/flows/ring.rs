//! The latest flows, in bounded memory. Pure.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::record::{Query, Record, Verdict};

/// Of each verdict, so that a crowd of allowed flows does not push out the few that were denied. Both together stay below
/// 10 MB.
const BYTES: usize = 4 << 20;

/// Records for which room is made at once. Twice the room each time, as collections grow, could be all of the bound and empty.
const STEP: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Ring {
    allowed: Kept,
    denied: Kept,
    /// Number of the last record.
    last: u64,
    lost: u64,
}

#[derive(Debug, Default)]
struct Kept {
    records: VecDeque<(u64, Record)>,
    /// Of the records.
    bytes: usize,
}

impl Kept {
    /// With the room for records that there could be.
    fn held(&self) -> usize {
        self.bytes + (self.records.capacity() - self.records.len()) * size_of::<(u64, Record)>()
    }
}

/// What a query found, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    pub flows: Vec<Record>,
    /// To ask for what comes after.
    pub last: u64,
    /// How often flows came too fast and some are missing.
    pub lost: u64,
}

impl Ring {
    pub(super) fn push(&mut self, record: Record) {
        self.last += 1;
        let kept = match record.verdict {
            Verdict::Allowed => &mut self.allowed,
            Verdict::Denied => &mut self.denied,
        };
        kept.bytes += record.bytes();
        if kept.records.len() == kept.records.capacity() {
            kept.records.reserve_exact(STEP);
        }
        kept.records.push_back((self.last, record));
        while kept.held() > BYTES {
            let Some((_, oldest)) = kept.records.pop_front() else { break };
            kept.bytes -= oldest.bytes();
        }
    }

    /// Some could not be recorded.
    pub(super) fn lose(&mut self) {
        self.lost += 1;
    }

    /// A number that this life has not given yet is of an earlier one: then everything is new.
    pub(super) fn page(&self, query: &Query) -> Page {
        let after = query.after.filter(|after| *after <= self.last).unwrap_or(0);
        let kept = [&self.allowed, &self.denied].into_iter().flat_map(|kept| &kept.records);
        let mut found: Vec<&(u64, Record)> =
            kept.filter(|(number, record)| *number > after && query.means(record)).collect();
        found.sort_unstable_by_key(|(number, _)| *number);
        let skipped = query.last.map_or(0, |last| found.len().saturating_sub(last));
        let flows = found.into_iter().skip(skipped).map(|(_, record)| record.clone()).collect();
        Page { flows, last: self.last, lost: self.lost }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.allowed.held() + self.denied.held()
    }
}
