//! The last good Snapshot: JSON with a version number in front.

use serde::{Deserialize, Serialize};
use weft_model::Snapshot;

use super::{Store, StoreError};

/// Grows when a Snapshot of the version before would be read wrongly.
const VERSION: u32 = 1;
const KEY: &[u8] = b"last-good";

#[derive(Serialize)]
struct Saved<'a> {
    version: u32,
    snapshot: &'a Snapshot,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Loaded {
    snapshot: Snapshot,
}

/// What [`Store::load_snapshot`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRead {
    pub snapshot: Option<Snapshot>,
    /// Why a record that is there was not used, one sentence.
    pub unreadable: Option<String>,
}

impl Store {
    /// Replaces the last good Snapshot and waits until it is on the medium. The caller sees to it that this happens at
    /// most once a minute (SD cards).
    pub fn save_snapshot(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.ensure_writable()?;
        let bytes = serde_json::to_vec(&Saved { version: VERSION, snapshot })
            .map_err(|source| StoreError::Encode { path: self.path.clone(), source })?;
        self.snapshot.insert(KEY, bytes).map_err(self.error("write the last good Snapshot"))?;
        self.db.flush().map_err(self.error("flush the last good Snapshot"))?;
        Ok(())
    }

    /// The last good Snapshot with `from_store` set. An unreadable one is none, and said so.
    pub fn load_snapshot(&self) -> Result<SnapshotRead, StoreError> {
        let bytes = self.snapshot.get(KEY).map_err(self.error("read the last good Snapshot"))?;
        Ok(match bytes.as_deref().map(decode) {
            None => SnapshotRead::default(),
            Some(Ok(snapshot)) => SnapshotRead { snapshot: Some(snapshot), unreadable: None },
            Some(Err(reason)) => SnapshotRead { snapshot: None, unreadable: Some(reason) },
        })
    }
}

fn decode(bytes: &[u8]) -> Result<Snapshot, String> {
    let unreadable = |error| format!("the last good Snapshot in the store cannot be read: {error}");
    match serde_json::from_slice::<Version>(bytes).map_err(unreadable)?.version {
        VERSION => {}
        other => {
            return Err(format!(
                "the last good Snapshot in the store has version {other}, this program reads {VERSION}"
            ));
        }
    }
    let loaded: Loaded = serde_json::from_slice(bytes).map_err(unreadable)?;
    Ok(Snapshot { from_store: true, ..loaded.snapshot })
}
