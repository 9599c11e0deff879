//! One operation at a time per attachment, many attachments in parallel, and reconcile alone.

use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// More than operations that a runtime has in flight; two attachments that share one only wait for each other.
const SHARDS: usize = 64;

pub(super) struct AttachmentLocks {
    shards: Vec<Mutex<()>>,
    all: RwLock<()>,
}

impl Default for AttachmentLocks {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::new(())).collect(), all: RwLock::new(()) }
    }
}

/// Held for the time of one operation.
pub(super) struct Held<'a> {
    _one: MutexGuard<'a, ()>,
    _all: RwLockReadGuard<'a, ()>,
}

impl AttachmentLocks {
    /// `link` is the name of the attachment's host link.
    pub(super) async fn one(&self, link: &str) -> Held<'_> {
        let shard = usize::from(Sha256::digest(link)[0]) % SHARDS;
        Held { _all: self.all.read().await, _one: self.shards[shard].lock().await }
    }

    pub(super) async fn everything(&self) -> RwLockWriteGuard<'_, ()> {
        self.all.write().await
    }
}
