//! The last good Snapshot: a record of JSON for each object, and a head with all the rest and a version number in front.
//!
//! ```text
//!  last-good               {"version": 2, "snapshot": ..without objects..}
//!  services/"default/web"  {..}                          one write is one batch: the head and what differs from the write before
//! ```

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sled::Batch;
use weft_model::Snapshot;
use weft_model::snapshot::{Objects, changes};

use super::open::{Look, open};
use super::{Opened, Store, StoreError};
use crate::reconcile::chain;

/// Grows when a Snapshot of the version before would be read wrongly.
const VERSION: u32 = 2;
/// The head held the objects too.
const IN_ONE_PIECE: u32 = 1;
const HEAD: &[u8] = b"last-good";
/// Where there is nothing to lose yet, so many records are written at once, and the head last.
const AT_ONCE: usize = 512;

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

/// The last good Snapshot as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRead {
    pub snapshot: Option<Snapshot>,
    /// Why a record that is there was not used, one sentence.
    pub unreadable: Option<String>,
    /// It was written by a version that had no record for each object.
    in_one_piece: bool,
}

/// Does the same for every map of objects; each has records under its own name.
macro_rules! for_each_kind {
    ($do:ident) => {
        $do!(
            nodes config_maps namespaces services endpoint_slices pods policies ingress_classes ingresses service_cidrs
            address_pools l2_advertisements
        )
    };
}

/// The last good Snapshot in a store of its own.
#[derive(Debug)]
pub struct LastGood {
    path: PathBuf,
    /// What is in the store; `None` while nobody knows.
    saved: Mutex<Option<Snapshot>>,
}

/// What [`LastGood::read`] found.
#[derive(Debug)]
pub struct Found {
    pub last_good: LastGood,
    pub read: SnapshotRead,
    /// Where a damaged store is now; what it held is lost.
    pub set_aside: Option<PathBuf>,
}

impl LastGood {
    /// Opens or begins the store in the folder `path`, as [`Store::open`] does.
    ///
    /// # Errors
    /// Those of [`Store::open`]; what cannot be read is none and told in [`Found`].
    pub fn read(path: impl Into<PathBuf>) -> Result<Found, StoreError> {
        let path = path.into();
        let Opened { store, set_aside } = Store::open(&path)?;
        let read = store
            .load_snapshot()
            .unwrap_or_else(|error| SnapshotRead { unreadable: Some(chain(&error)), ..Default::default() });
        store.close();
        let saved = read.snapshot.clone().filter(|_| !read.in_one_piece);
        Ok(Found { last_good: Self { path, saved: Mutex::new(saved) }, read, set_aside })
    }

    /// Replaces the last good Snapshot by writing what differs, whole or not at all, and waits until it is on the medium. The
    /// caller sees to it that this happens at most once a minute (SD cards).
    ///
    /// # Errors
    /// Those of [`Store::open`], and what keeps it from being written; the one before is still there.
    pub fn save(&self, snapshot: &Snapshot) -> Result<(), StoreError> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Opened { store, set_aside } = open(&self.path, Look::AtNothing)?;
        // Put back when all is written: a write that failed may have written.
        let before = saved.take().filter(|_| set_aside.is_none());
        let written = store.save_snapshot(before.as_ref(), snapshot);
        store.close();
        written?;
        *saved = Some(snapshot.clone());
        Ok(())
    }
}

impl Store {
    /// Writes what differs from `before`, which is what the store holds, or all of it.
    pub(super) fn save_snapshot(
        &self,
        before: Option<&Snapshot>,
        snapshot: &Snapshot,
    ) -> Result<(), StoreError> {
        self.ensure_writable()?;
        let write =
            |batch| self.snapshot.apply_batch(batch).map_err(self.error("write the last good Snapshot"));
        let mut records = Records { store: self, count: 0, batch: Batch::default() };
        if let Some(before) = before {
            macro_rules! differences {
                ($($kind:ident)*) => { $(records.differences(stringify!($kind), &before.$kind, &snapshot.$kind)?;)* };
            }
            for_each_kind!(differences);
        } else {
            // What is there and was not read goes in the batch that takes its place.
            for name in self.snapshot.iter().keys() {
                records.batch.remove(name.map_err(self.error("read the last good Snapshot"))?);
            }
            let nothing_to_lose = self.snapshot.is_empty();
            macro_rules! all {
                ($($kind:ident)*) => { $(
                    for (key, value) in snapshot.$kind.iter() {
                        records.put(stringify!($kind), key, value)?;
                        if nothing_to_lose && records.count == AT_ONCE {
                            write(records.take())?;
                        }
                    }
                )* };
            }
            for_each_kind!(all);
        }
        let head = Saved { version: VERSION, snapshot: &head_of(snapshot) };
        records.batch.insert(HEAD, self.encode(&head)?);
        write(records.take())?;
        self.db.flush().map_err(self.error("flush the last good Snapshot"))?;
        Ok(())
    }

    /// The last good Snapshot with `from_store` set. An unreadable one is none, and said so.
    pub(super) fn load_snapshot(&self) -> Result<SnapshotRead, StoreError> {
        let bytes = self.snapshot.get(HEAD).map_err(self.error("read the last good Snapshot"))?;
        let Some(bytes) = bytes else { return Ok(SnapshotRead::default()) };
        let unreadable = |reason| SnapshotRead { unreadable: Some(reason), ..Default::default() };
        let (version, head) = match decode(&bytes) {
            Ok(decoded) => decoded,
            Err(reason) => return Ok(unreadable(reason)),
        };
        if version == IN_ONE_PIECE {
            return Ok(SnapshotRead { snapshot: Some(head), in_one_piece: true, ..Default::default() });
        }
        let mut snapshot = head;
        macro_rules! read {
            ($($kind:ident)*) => { std::thread::scope(|scope| {
                // Side by side: of a big cluster two kinds are much.
                $(let $kind = scope.spawn(|| self.read_kind(stringify!($kind)));)*
                $(
                    match $kind.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))? {
                        Ok(objects) => snapshot.$kind = objects,
                        Err(reason) => return Ok(unreadable(reason)),
                    }
                )*
                Ok(SnapshotRead { snapshot: Some(snapshot), ..Default::default() })
            }) };
        }
        for_each_kind!(read)
    }

    fn read_kind<K, V>(&self, kind: &str) -> Result<Result<Objects<K, V>, String>, StoreError>
    where
        K: DeserializeOwned + Ord + Send,
        V: DeserializeOwned + Send + Sync,
    {
        let prefix = format!("{kind}/");
        let mut objects = Vec::new();
        for record in self.snapshot.scan_prefix(&prefix) {
            let (name, bytes) = record.map_err(self.error("read the last good Snapshot"))?;
            let key = serde_json::from_slice(&name[prefix.len()..]);
            match key.and_then(|key| Ok((key, serde_json::from_slice(&bytes)?))) {
                Ok((key, value)) => objects.push((key, Arc::new(value))),
                Err(error) => return Ok(Err(unreadable(&error))),
            }
        }
        Ok(Ok(Arc::new(objects.into_iter().collect())))
    }

    fn encode(&self, value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(value).map_err(|source| StoreError::Encode { path: self.path.clone(), source })
    }
}

/// What is to be written.
struct Records<'a> {
    store: &'a Store,
    count: usize,
    batch: Batch,
}

impl Records<'_> {
    fn name<K: Serialize>(&self, kind: &str, key: &K) -> Result<Vec<u8>, StoreError> {
        Ok([kind.as_bytes(), b"/", &self.store.encode(key)?].concat())
    }

    fn put<K: Serialize, V: Serialize>(&mut self, kind: &str, key: &K, value: &V) -> Result<(), StoreError> {
        self.batch.insert(self.name(kind, key)?, self.store.encode(value)?);
        self.count += 1;
        Ok(())
    }

    fn differences<K, V>(
        &mut self,
        kind: &str,
        before: &Objects<K, V>,
        now: &Objects<K, V>,
    ) -> Result<(), StoreError>
    where
        K: Serialize + Ord,
        V: Serialize + PartialEq,
    {
        for (key, _, value) in changes(before, now) {
            match value {
                Some(value) => self.put(kind, key, value)?,
                None => self.batch.remove(self.name(kind, key)?),
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Batch {
        self.count = 0;
        std::mem::take(&mut self.batch)
    }
}

fn head_of(snapshot: &Snapshot) -> Snapshot {
    macro_rules! without {
        ($($kind:ident)*) => { Snapshot { $($kind: Arc::default(),)* ..snapshot.clone() } };
    }
    for_each_kind!(without)
}

fn decode(bytes: &[u8]) -> Result<(u32, Snapshot), String> {
    let version = serde_json::from_slice::<Version>(bytes).map_err(|error| unreadable(&error))?.version;
    if version != VERSION && version != IN_ONE_PIECE {
        return Err(format!(
            "the last good Snapshot in the store has version {version}, this program reads {VERSION}"
        ));
    }
    let loaded: Loaded = serde_json::from_slice(bytes).map_err(|error| unreadable(&error))?;
    Ok((version, Snapshot { from_store: true, ..loaded.snapshot }))
}

fn unreadable(error: &serde_json::Error) -> String {
    format!("the last good Snapshot in the store cannot be read: {error}")
}
