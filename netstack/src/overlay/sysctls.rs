//! Kernel settings of the host: changed only where they differ, and remembered so that clean-up can put them back.
//!
//! The memory is a file in the run directory: it ends with the boot, as the settings do.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::plan::Sysctl;
use crate::kernel::sysctl;
use crate::reconcile::Applied;

const JOURNAL_FILE: &str = "sysctls.json";

/// One setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    before: String,
    after: String,
}

/// Applies in order. With a `run_dir` the old values are written there first.
pub(super) fn apply(sysctls: &[Sysctl], run_dir: Option<&Path>, applied: &mut Applied) {
    for wanted in sysctls {
        match apply_one(wanted, run_dir) {
            Ok(None) => {}
            Ok(Some(old)) => {
                applied.changed.push(format!("sysctl {}: {old} -> {}", wanted.name, wanted.value));
            }
            Err(error) => applied.failed.push(format!("sysctl {} = {}: {error}", wanted.name, wanted.value)),
        }
    }
}

fn apply_one(wanted: &Sysctl, run_dir: Option<&Path>) -> io::Result<Option<String>> {
    let before = std::fs::read_to_string(format!("/proc/sys/{}", wanted.name))?.trim().to_owned();
    let excluded = wanted.only_if.as_ref().is_some_and(|condition| *condition != before);
    if excluded || before == wanted.value {
        return Ok(None);
    }
    if let Some(run_dir) = run_dir {
        let mut journal = read(run_dir)?;
        if journal.iter().all(|entry| entry.name != wanted.name) {
            journal.push(Entry { name: wanted.name.clone(), before, after: wanted.value.clone() });
            std::fs::write(run_dir.join(JOURNAL_FILE), serde_json::to_vec(&journal)?)?;
        }
    }
    sysctl::ensure(&wanted.name, &wanted.value)
}

fn read(run_dir: &Path) -> io::Result<Vec<Entry>> {
    match std::fs::read(run_dir.join(JOURNAL_FILE)) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Puts back what still has the value it was given, the latest change first, and forgets the file.
pub(super) fn restore(run_dir: &Path, applied: &mut Applied) {
    let journal = match read(run_dir) {
        Ok(journal) => journal,
        Err(error) => return applied.failed.push(format!("read {JOURNAL_FILE}: {error}")),
    };
    for Entry { name, before, after } in journal.iter().rev() {
        let now = std::fs::read_to_string(format!("/proc/sys/{name}"));
        // A link that is gone took its settings with it; a value that someone else set stays.
        if !now.is_ok_and(|now| now.trim() == after) {
            continue;
        }
        match sysctl::ensure(name, before) {
            Ok(_) => applied.changed.push(format!("sysctl {name}: {after} -> {before}")),
            Err(error) => applied.failed.push(format!("sysctl {name} = {before}: {error}")),
        }
    }
    if !journal.is_empty()
        && let Err(error) = std::fs::remove_file(run_dir.join(JOURNAL_FILE))
    {
        applied.failed.push(format!("remove {JOURNAL_FILE}: {error}"));
    }
}
