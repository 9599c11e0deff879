//! Which generations of the kernel's rule set this process made itself.
//!
//! The kernel counts every commit of a network namespace, whoever made it. An owner may trust its memory of its table as
//! long as every commit since its own last one came from this process: each owner changes its own table only. So the
//! refreshing of a timeout in one table does not make the owners of the others read theirs again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// An unbroken run of generations that this process made.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u32,
    last: u32,
}

/// The current run by network namespace (SO_NETNS_COOKIE).
static RUNS: Mutex<BTreeMap<u64, Run>> = Mutex::new(BTreeMap::new());

/// Owners of one network namespace take turns: else those that read a lot never finish before those that write a
/// little commit again.
static TURNS: Mutex<BTreeMap<u64, Arc<Mutex<()>>>> = Mutex::new(BTreeMap::new());

/// To be locked from reading the generation to the commit.
pub(super) fn turn(netns: u64) -> Arc<Mutex<()>> {
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(turns.entry(netns).or_default())
}

/// This process's commit made `generation` out of the one before.
pub(super) fn record(netns: u64, generation: u32) {
    let mut runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    let run = runs.entry(netns).or_insert(Run { first: generation, last: generation });
    if generation == run.last.wrapping_add(1) {
        run.last = generation;
    } else if generation != run.last {
        *run = Run { first: generation, last: generation };
    }
}

/// Everything after `since` up to `current` was made by this process.
pub(super) fn all_ours(netns: u64, since: u32, current: u32) -> bool {
    if since == current {
        return true;
    }
    let runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
    runs.get(&netns).is_some_and(|run| {
        let (begin, end) = (since.wrapping_sub(run.first), current.wrapping_sub(run.first));
        let begins_in_run = begin == u32::MAX || begin <= run.last.wrapping_sub(run.first);
        run.last == current && begins_in_run && begin.wrapping_add(1) <= end.wrapping_add(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_commit_breaks_the_run() {
        let netns = u64::MAX;
        record(netns, 10);
        record(netns, 11);
        record(netns, 12);
        assert!(all_ours(netns, 9, 12), "10 to 12 are ours");
        assert!(all_ours(netns, 11, 12));
        assert!(all_ours(netns, 12, 12));
        assert!(!all_ours(netns, 8, 12), "who made 9?");
        assert!(!all_ours(netns, 12, 13), "13 is foreign");
        record(netns, 14);
        assert!(!all_ours(netns, 12, 14), "13 is foreign");
        assert!(all_ours(netns, 13, 14));
    }
}
