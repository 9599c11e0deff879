//! The store's sled tree. One tree, so that one batch is one atomic transaction. Keys:
//! `o/<collection>\0<namespace>\0<name>` the object; `h/<revision>` its history, `+` or `-`, collection, `\0`, object;
//! `m/revision`, `m/reserved`, `m/clean` counters (big-endian u64). Values of objects are the JSON as served.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Bytes;

use super::view::{Event, EventKind, Key, Stored, View};
use super::{Record, StoreError};
use crate::object;
use crate::resources;

/// Revisions reserved ahead with one flush: an unclean end skips at most this many.
const RESERVATION: u64 = 10_000;
/// sled's page cache; every object is in memory anyway.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// sled lets go of its lock a moment after it was closed.
const CLOSING: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub(super) struct Disk {
    db: sled::Db,
    reserved: Arc<AtomicU64>,
}

impl Disk {
    pub(super) fn open(directory: &Path) -> Result<Self, StoreError> {
        let config = sled::Config::new().path(directory).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let deadline = Instant::now() + CLOSING;
        loop {
            match config.open() {
                Ok(db) => return Ok(Self { db, reserved: Arc::new(AtomicU64::new(0)) }),
                Err(sled::Error::Io(error)) if is_locked(&error) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(source) => {
                    return Err(StoreError::Open { path: directory.display().to_string(), source });
                }
            }
        }
    }

    /// Reads everything, and reserves the first block of revisions.
    pub(super) fn load(&self) -> Result<View, StoreError> {
        let last = self.counter("m/revision")?;
        let clean = self.db.remove("m/clean").map_err(StoreError::Write)?;
        let is_clean = last == 0 || clean.and_then(|it| number(&it)) == Some(last);
        let revision = if is_clean { last } else { self.counter("m/reserved")?.max(last) };
        let history = if is_clean { self.history()? } else { VecDeque::new() };
        if !is_clean {
            tracing::info!(last, revision, "the last end was not clean: watches start anew");
            self.drop_history()?;
        }
        self.reserve(revision)?;
        self.flush()?;
        Ok(View::restore(revision, self.objects()?, history))
    }

    fn counter(&self, key: &str) -> Result<u64, StoreError> {
        let value = self.db.get(key).map_err(StoreError::Read)?;
        Ok(value.and_then(|it| number(&it)).unwrap_or(0))
    }

    fn reserve(&self, revision: u64) -> Result<(), StoreError> {
        let reserved = revision + RESERVATION;
        self.db.insert("m/reserved", &reserved.to_be_bytes()).map_err(StoreError::Write)?;
        self.reserved.store(reserved, Ordering::Relaxed);
        Ok(())
    }

    fn objects(&self) -> Result<Vec<Stored>, StoreError> {
        let mut objects = Vec::new();
        for entry in self.db.scan_prefix("o/") {
            let (key, json) = entry.map_err(StoreError::Read)?;
            let stored = parse_object_key(&key)
                .and_then(|key| Stored::from_json(key, Bytes::copy_from_slice(&json)).ok());
            match stored {
                Some(stored) => objects.push(stored),
                None => tracing::error!(key = %String::from_utf8_lossy(&key), "unreadable object left out"),
            }
        }
        Ok(objects)
    }

    fn history(&self) -> Result<VecDeque<Event>, StoreError> {
        let mut history = VecDeque::new();
        for entry in self.db.scan_prefix("h/") {
            let (_, record) = entry.map_err(StoreError::Read)?;
            match parse_record(&record) {
                Some(event) => history.push_back(event),
                // A hole would hide a change: what is before it cannot be resumed from.
                None => history.clear(),
            }
        }
        Ok(history)
    }

    fn drop_history(&self) -> Result<(), StoreError> {
        for key in self.db.scan_prefix("h/").keys() {
            self.db.remove(key.map_err(StoreError::Read)?).map_err(StoreError::Write)?;
        }
        Ok(())
    }

    /// One transaction; `revision` is the last of its records.
    pub(super) fn write(&self, revision: u64, records: &[Record]) -> Result<(), StoreError> {
        if revision >= self.reserved.load(Ordering::Relaxed) {
            self.reserve(revision)?;
            self.flush()?;
        }
        let mut batch = sled::Batch::default();
        for (stored, deleted) in records {
            let key = object_key(&stored.key);
            if *deleted {
                batch.remove(key);
            } else {
                batch.insert(key, stored.json.as_ref());
            }
            batch.insert(history_key(stored.revision), history_record(stored, *deleted));
        }
        batch.insert("m/revision", &revision.to_be_bytes());
        self.db.apply_batch(batch).map_err(StoreError::Write)
    }

    /// Removes history entries; failing leaves garbage that the next start reads as older history.
    pub(super) fn forget(&self, revisions: &[u64]) {
        for revision in revisions {
            if let Err(error) = self.db.remove(history_key(*revision)) {
                tracing::warn!(%error, "trimming the history");
            }
        }
    }

    pub(super) fn flush(&self) -> Result<(), StoreError> {
        self.db.flush().map(|_| ()).map_err(StoreError::Write)
    }

    /// Marks a clean end at this revision.
    pub(super) fn close(&self, revision: u64) -> Result<(), StoreError> {
        self.flush()?;
        self.db.insert("m/clean", &revision.to_be_bytes()).map_err(StoreError::Write)?;
        self.db.insert("m/revision", &revision.to_be_bytes()).map_err(StoreError::Write)?;
        self.flush()
    }
}

/// sled makes an error of its own of what flock(2) says.
fn is_locked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Other && error.to_string().contains("could not acquire lock")
}

fn number(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_be_bytes)
}

fn object_key(key: &Key) -> Vec<u8> {
    format!("o/{}\0{}\0{}", key.collection, key.namespace, key.name).into_bytes()
}

fn parse_object_key(bytes: &[u8]) -> Option<Key> {
    let text = std::str::from_utf8(bytes.strip_prefix(b"o/")?).ok()?;
    let mut parts = text.split('\0');
    let collection = resources::stored(parts.next()?)?.collection();
    Some(Key::new(collection, parts.next()?, parts.next()?))
}

fn history_key(revision: u64) -> Vec<u8> {
    [b"h/".as_slice(), &revision.to_be_bytes()].concat()
}

fn history_record(stored: &Stored, deleted: bool) -> Vec<u8> {
    let sign = if deleted { b"-" } else { b"+" };
    [sign.as_slice(), stored.key.collection.as_bytes(), b"\0", &stored.json].concat()
}

fn parse_record(bytes: &[u8]) -> Option<Event> {
    let (sign, rest) = bytes.split_first()?;
    let end = rest.iter().position(|it| *it == 0)?;
    let collection = resources::stored(std::str::from_utf8(&rest[..end]).ok()?)?.collection();
    let json = Bytes::copy_from_slice(&rest[end + 1..]);
    let value: serde_json::Value = serde_json::from_slice(&json).ok()?;
    let key = Key::new(collection, object::namespace(&value), object::name(&value));
    let stored = Stored::from_json(key, json).ok()?;
    // Whether it was added or modified is not on disk: a modification without a known previous state says the same.
    let kind = if *sign == b'-' { EventKind::Deleted } else { EventKind::Modified };
    Some(Event { revision: stored.revision, kind, object: Arc::new(stored), previous: None })
}
