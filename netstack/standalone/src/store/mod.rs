//! Objects on disk and in memory: one counter of revisions, one ordered history, every write a transaction.
//! In: decisions made under the write lock ([`Store::commit`]). Out: the [`View`], and a signal when it changed.
//!
//! Promises. A write is answered only after it is on disk ([`Store::durable`]; concurrent writes share one flush), so
//! `kill -9` loses nothing that was answered. Watches may see a write some milliseconds before it is on disk; so that no
//! revision ever means two things, revisions are reserved on disk in blocks before use, and after an unclean end the
//! counter jumps to the end of its block and older watches get 410 and list again. After a clean end they resume.

mod disk;
mod view;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};

use serde_json::Value;
use tokio::sync::watch;

pub(crate) use view::port_claim;
pub(crate) use view::{Event, EventKind, Key, Stored, View, selectable_fields};

use crate::status::ApiError;
use disk::Disk;

/// Changes a watch can fall behind before it must list again: some seconds of the busiest lab, a few megabytes.
pub const HISTORY_CAPACITY: usize = 4096;

/// The store cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("store {path}")]
    Open {
        path: String,
        #[source]
        source: sled::Error,
    },
    #[error("reading the store")]
    Read(#[source] sled::Error),
    #[error("writing the store")]
    Write(#[source] sled::Error),
    #[error("starting the store's writer")]
    Thread(#[source] std::io::Error),
}

/// One change of one object; a transaction is a list of them.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// The whole object; its `metadata.resourceVersion` is set by the store.
    Put(Key, Value),
    Delete(Key),
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Store {
    view: RwLock<View>,
    disk: Disk,
    capacity: usize,
    revisions: watch::Sender<u64>,
    /// The last revision that is on disk, or why writing failed.
    flushed: watch::Receiver<Result<u64, String>>,
    wake: Mutex<Option<mpsc::SyncSender<()>>>,
    flusher: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Store {
    /// Opens or makes the store in `directory`.
    ///
    /// # Errors
    /// When the directory cannot be used, another process has it open, or it is damaged.
    pub(crate) fn open(directory: &Path, capacity: usize) -> Result<Self, StoreError> {
        let disk = Disk::open(directory)?;
        let view = disk.load()?;
        let (revisions, current) = watch::channel(view.revision());
        let (wake, woken) = mpsc::sync_channel(1);
        let (flushed_sender, flushed) = watch::channel(Ok(view.revision()));
        let flusher = std::thread::Builder::new()
            .name("store-flush".to_owned())
            .spawn({
                let disk = disk.clone();
                move || flush_when_woken(&disk, &woken, &current, &flushed_sender)
            })
            .map_err(StoreError::Thread)?;
        Ok(Self {
            view: RwLock::new(view),
            disk,
            capacity,
            revisions,
            flushed,
            wake: Mutex::new(Some(wake)),
            flusher: Mutex::new(Some(flusher)),
        })
    }

    /// Looks at the latest revision. The lock is held meanwhile: keep it short.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Signals the latest revision after every transaction.
    #[must_use]
    pub(crate) fn revisions(&self) -> watch::Receiver<u64> {
        self.revisions.subscribe()
    }

    /// Decides under the write lock, then applies the changes as one transaction. Returns the objects after the change
    /// (a deleted one in its last state) in the order of the changes; await [`Store::durable`] before answering.
    ///
    /// # Errors
    /// What `decide` refused, or 500 when the disk cannot be written; nothing has changed then.
    pub(crate) fn commit(
        &self,
        decide: impl FnOnce(&View) -> Result<Vec<Change>, ApiError>,
    ) -> Result<Vec<Arc<Stored>>, ApiError> {
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        let changes = decide(&view)?;
        let mut records = Vec::with_capacity(changes.len());
        let mut revision = view.revision();
        for change in changes {
            revision += 1;
            if let Some(record) = record(&view, revision, change)? {
                records.push(record);
            }
        }
        if records.is_empty() {
            return Ok(Vec::new());
        }
        self.disk.write(revision, &records).map_err(|error| ApiError::internal(chain(&error)))?;
        let dropped: Vec<u64> = records
            .iter()
            .filter_map(|(stored, deleted)| view.record(stored.clone(), *deleted, self.capacity))
            .collect();
        self.disk.forget(&dropped);
        self.revisions.send_replace(revision);
        drop(view);
        if let Some(wake) = self.wake.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            // A full channel means the flusher is about to look anyway.
            let _ = wake.try_send(());
        }
        Ok(records.into_iter().map(|(stored, _)| stored).collect())
    }

    /// Waits until a revision is on disk.
    ///
    /// # Errors
    /// 500 when the disk cannot be written.
    pub(crate) async fn durable(&self, revision: u64) -> Result<(), ApiError> {
        let mut flushed = self.flushed.clone();
        let reached = flushed
            .wait_for(|state| state.as_ref().map_or(true, |it| *it >= revision))
            .await
            .map_err(|_| ApiError::internal("the store is closed"))?;
        reached.as_ref().map(|_| ()).map_err(|error| ApiError::internal(error.clone()))
    }

    /// Ends cleanly: everything on disk, the counter exact, so that watches can resume after the next start.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        self.stop_flusher();
        let view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        self.disk.close(view.revision())
    }

    fn stop_flusher(&self) {
        self.wake.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(flusher) = self.flusher.lock().unwrap_or_else(PoisonError::into_inner).take()
            && flusher.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stop_flusher();
    }
}

type Record = (Arc<Stored>, bool);

fn record(view: &View, revision: u64, change: Change) -> Result<Option<Record>, ApiError> {
    let (key, object, deleted) = match change {
        Change::Put(key, object) => (key, object, false),
        Change::Delete(key) => match view.get(&key) {
            Some(stored) => (key, stored.value(), true),
            None => return Ok(None),
        },
    };
    let stored = Stored::new(key, revision, object).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(Some((Arc::new(stored), deleted)))
}

fn flush_when_woken(
    disk: &Disk,
    woken: &mpsc::Receiver<()>,
    current: &watch::Receiver<u64>,
    flushed: &watch::Sender<Result<u64, String>>,
) {
    while woken.recv().is_ok() {
        let revision = *current.borrow();
        let state = disk.flush().map(|()| revision).map_err(|error| chain(&error));
        if let Err(error) = &state {
            tracing::error!(error, "flushing the store");
        }
        let _previous = flushed.send_replace(state);
    }
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
