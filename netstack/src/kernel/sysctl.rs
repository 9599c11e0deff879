//! Files under /proc/sys of the calling thread's network namespace, and the memory of what those of the host held before.
//!
//! The memory is a file in the run directory: it ends with the boot, as the settings do.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::reconcile::Applied;

const JOURNAL_FILE: &str = "sysctls.json";
/// More than any of them holds.
const MOST_BYTES: usize = 256;

/// What `/proc/sys/NAME` (with `/`, not `.`) holds.
pub fn read(name: &str) -> io::Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/sys/{name}"))?.trim().to_owned())
}

/// Writes `value` to `/proc/sys/NAME` when it differs; returns the old value when it changed.
pub fn ensure(name: &str, value: &str) -> io::Result<Option<String>> {
    ensure_at(Path::new(&format!("/proc/sys/{name}")), value)
}

/// As [`ensure`], of the file at `path`.
pub fn ensure_at(path: &Path, value: &str) -> io::Result<Option<String>> {
    let mut old = [0; MOST_BYTES];
    let length = File::open(path)?.read(&mut old)?;
    let old = String::from_utf8_lossy(&old[..length]);
    if old.trim() == value {
        return Ok(None);
    }
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())?;
    Ok(Some(old.trim().to_owned()))
}

/// Settings of the host that were changed, so that clean-up can put them back. Several owners share the file.
#[derive(Clone, Debug)]
pub struct Journal {
    path: PathBuf,
}

/// One setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    before: String,
    after: String,
}

impl Journal {
    pub fn of(run_dir: &Path) -> Self {
        Self { path: run_dir.join(JOURNAL_FILE) }
    }

    /// As [`ensure`]; the old value is written down first, unless an older one is there.
    pub fn ensure(&self, name: &str, value: &str) -> io::Result<Option<String>> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let before = read(name)?;
        if before == value {
            return Ok(None);
        }
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = self.entries()?;
        if entries.iter().all(|entry| entry.name != name) {
            entries.push(Entry { name: name.to_owned(), before, after: value.to_owned() });
            std::fs::write(&self.path, serde_json::to_vec(&entries)?)?;
        }
        ensure(name, value)
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        match std::fs::read(&self.path) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Puts back what still has the value it was given, the latest change first, and forgets the file.
    pub fn restore(&self, applied: &mut Applied) {
        let entries = match self.entries() {
            Ok(entries) => entries,
            Err(error) => return applied.failed.push(format!("read {JOURNAL_FILE}: {error}")),
        };
        for Entry { name, before, after } in entries.iter().rev() {
            // A link that is gone took its settings with it; a value that someone else set stays.
            if !read(name).is_ok_and(|now| now == *after) {
                continue;
            }
            match ensure(name, before) {
                Ok(_) => applied.changed.push(format!("sysctl {name}: {after} -> {before}")),
                Err(error) => applied.failed.push(format!("sysctl {name} = {before}: {error}")),
            }
        }
        if !entries.is_empty()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            applied.failed.push(format!("remove {JOURNAL_FILE}: {error}"));
        }
    }
}
