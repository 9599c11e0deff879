//! The per-node embedded store (sled): what cannot be recomputed, and never desired state.
//!
//! Two of them exist, because two lifetimes do: a boot-scoped one in `/run/weft` for CNI leases (sandboxes die with
//! the boot) and a durable one in `/var/lib/weft` for the last good Snapshot. A damaged store is moved aside, reported
//! and begun anew; it is never fatal. The WireGuard key is a file of its own (see [`key`]).
//!
//! ```text
//!  cni ADD/DEL --Lease--> leases (flushed before the answer)      --at start--> cni reconcile
//!  Snapshot    --JSON of what changed---> snapshot (coalesced by the caller)    --at start--> kube
//! ```
//!
//! sled keeps in memory what it has read, whatever it is told (its cache of 256 parts looks at a part every 64th time that it is used).
//! Leases are few and always at hand; [`LastGood`] is open only while it is read or written.

pub mod key;
mod lease;
mod open;
mod snapshot;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub use lease::{Boottime, HostPort, Lease, LeaseRecords};
use nix::sys::statvfs::{FsFlags, statvfs};
use open::Look;
pub use open::Opened;
pub use snapshot::{Found, LastGood, SnapshotRead};

/// What sled is asked to keep in memory; see above.
const CACHE_BYTES: u64 = 8 << 20;
/// sled writes whole segments of 512 KiB and may need a few at once; below this a write could fail half-way.
const MIN_FREE_BYTES: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not damage: another process holds it, or the disk refuses.
    #[error("open the store {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("move the damaged store {path} aside")]
    SetAside { path: PathBuf, source: io::Error },
    #[error("{operation} in the store {path}")]
    Operation { operation: &'static str, path: PathBuf, source: sled::Error },
    #[error("the store {path} is on a read-only file system")]
    ReadOnly { path: PathBuf },
    #[error("no space left for the store {path}: {free_bytes} bytes free, {MIN_FREE_BYTES} needed")]
    Full { path: PathBuf, free_bytes: u64 },
    #[error("look at the file system of the store {path}")]
    FileSystem { path: PathBuf, source: io::Error },
    #[error("encode for the store {path}")]
    Encode { path: PathBuf, source: serde_json::Error },
}

/// An open store. Cheap to share behind an `Arc`; every method is synchronous.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    db: sled::Db,
    leases: sled::Tree,
    /// What `leases` holds, once it was read and while no write of it failed: nobody else writes there.
    known_leases: Mutex<Option<Arc<LeaseRecords>>>,
    snapshot: sled::Tree,
}

impl Store {
    /// Opens or begins the store in the folder `path`; a damaged one is moved to `store.damaged-N` beside it.
    ///
    /// # Errors
    /// Only what is no damage: the folder cannot be made or read, or another process has the store open.
    pub fn open(path: impl AsRef<Path>) -> Result<Opened, StoreError> {
        open::open(path.as_ref(), Look::AtEveryRecord)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a write would succeed now. sled may fail half-way on a full disk, so every write asks first.
    pub fn ensure_writable(&self) -> Result<(), StoreError> {
        let path = || self.path.clone();
        let stat = statvfs(&self.path)
            .map_err(|errno| StoreError::FileSystem { path: path(), source: errno.into() })?;
        if stat.flags().contains(FsFlags::ST_RDONLY) {
            return Err(StoreError::ReadOnly { path: path() });
        }
        let free_bytes = stat.blocks_available() * stat.fragment_size();
        if free_bytes < MIN_FREE_BYTES {
            return Err(StoreError::Full { path: path(), free_bytes });
        }
        Ok(())
    }

    /// What sled has replaced it keeps for readers that may still look at it, until some time later the store is used again:
    /// the records of a whole cluster, and a buffer of 512 KiB for each of that many bytes written. Now nobody looks.
    fn close(self) {
        const EPOCHS: usize = 256;
        drop(self);
        (0..EPOCHS).for_each(|_| crossbeam_epoch::pin().flush());
    }

    fn error(&self, operation: &'static str) -> impl FnOnce(sled::Error) -> StoreError + use<> {
        let path = self.path.clone();
        move |source| StoreError::Operation { operation, path, source }
    }
}
