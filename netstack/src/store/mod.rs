//! What a node cannot recompute, and never desired state.
//!
//! Two lifetimes, so two places: boot-scoped files in `/run/weft` for CNI leases (sandboxes die with the boot) and a durable store (sled)
//! in `/var/lib/weft` for the last good Snapshot. What is damaged is moved aside or removed, reported and begun anew; it is never fatal.
//! The WireGuard key is a file of its own (see [`key`]).
//!
//! ```text
//!  cni ADD/DEL --Lease--> leases/ADDRESS (before the answer)      --at start--> cni reconcile
//!  Snapshot    --JSON of what changed---> snapshot (coalesced by the caller)    --at start--> kube
//! ```
//!
//! sled keeps in memory what it has read, whatever it is told (its cache of 256 parts looks at a part every 64th time that it is used), so
//! [`LastGood`] is open only while it is read or written. For leases it was slow: each flush woke eight threads, for files that need no
//! flush.

pub mod key;
mod lease;
mod open;
mod snapshot;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub use lease::{Boottime, HostPort, Lease, LeaseRecords, Leases};
use nix::sys::statvfs::{FsFlags, statvfs};
use open::Look;
use open::Opened;
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
    #[error("{path} is on a read-only file system")]
    ReadOnly { path: PathBuf },
    #[error("no space left for {path}: {free_bytes} bytes free, {needed_bytes} needed")]
    Full { path: PathBuf, free_bytes: u64, needed_bytes: u64 },
    #[error("look at the file system of {path}")]
    FileSystem { path: PathBuf, source: io::Error },
    #[error("write lease {path}")]
    Lease { path: PathBuf, source: io::Error },
    #[error("encode for {path}")]
    Encode { path: PathBuf, source: serde_json::Error },
}

/// An open store of sled's.
#[derive(Debug)]
struct Store {
    path: PathBuf,
    db: sled::Db,
    snapshot: sled::Tree,
}

impl Store {
    /// Opens or begins the store in the folder `path`; a damaged one is moved to `store.damaged-N` beside it.
    ///
    /// # Errors
    /// Only what is no damage: the folder cannot be made or read, or another process has the store open.
    fn open(path: impl AsRef<Path>) -> Result<Opened, StoreError> {
        open::open(path.as_ref(), Look::AtEveryRecord)
    }

    /// sled may fail half-way on a full disk, so every write asks first.
    fn ensure_writable(&self) -> Result<(), StoreError> {
        ensure_writable(&self.path, MIN_FREE_BYTES)
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

/// Whether so much could be written below `path` now.
fn ensure_writable(path: &Path, needed_bytes: u64) -> Result<(), StoreError> {
    let stat = statvfs(path)
        .map_err(|errno| StoreError::FileSystem { path: path.to_owned(), source: errno.into() })?;
    if stat.flags().contains(FsFlags::ST_RDONLY) {
        return Err(StoreError::ReadOnly { path: path.to_owned() });
    }
    let free_bytes = stat.blocks_available() * stat.fragment_size();
    if free_bytes < needed_bytes {
        return Err(StoreError::Full { path: path.to_owned(), free_bytes, needed_bytes });
    }
    Ok(())
}
