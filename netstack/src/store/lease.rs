//! CNI leases: a file for each address, in a folder that ends with the boot.
//!
//! ```text
//!  leases/10.244.1.2   {"container_id": ..}     written beside and renamed, so whole or absent
//! ```
//!
//! They are not flushed to a medium: what a process has written outlives it, and a power cut ends the boot.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use weft_model::PodKey;
use weft_model::objects::{Bandwidth, Protocol};

use super::open::{keep_private, move_aside};
use super::{StoreError, ensure_writable};
use crate::files::{self, Outlives};
use crate::locked;

/// Below this a lease could not be written.
const MIN_FREE_BYTES: u64 = 64 << 10;
/// Beginning of the name of a file that is being written; no address begins so.
const UNFINISHED: &str = "unfinished-";

/// Seconds since boot, sleep included: as boot-scoped as the leases, and no clock step can move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Boottime(pub u64);

impl Boottime {
    pub fn now() -> Self {
        // CLOCK_BOOTTIME is in every kernel since 2.6.39; without it quarantine would merely never end early.
        let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec());
        Self(u64::try_from(time).unwrap_or(0))
    }
}

/// Who has an address, or had it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Empty when the lease was rebuilt from what the kernel shows.
    pub container_id: String,
    pub ifname: String,
    pub netns: String,
    /// From `CNI_ARGS`, when the runtime gave it.
    pub pod: Option<PodKey>,
    pub pod_uid: String,
    /// Name of the host end of the pod's veth.
    pub link: String,
    /// Ports of the node that lead to this address.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// What ADD was told.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Set by DEL; the address stays unused for a while.
    pub released: Option<Boottime>,
}

/// `hostPort` of a container port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    pub protocol: Protocol,
    /// `None`: every address of the node.
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
}

/// Every lease of the node by address, live and released.
pub type LeaseRecords = BTreeMap<IpAddr, Lease>;

/// The leases of this boot. Cheap to share behind an `Arc`; every method is synchronous.
#[derive(Debug)]
pub struct Leases {
    folder: PathBuf,
    /// What is in the folder; nobody else writes there.
    known: Mutex<Arc<LeaseRecords>>,
    /// Held while files are written, so that whoever asks for a lease (DNS does at each question) does not wait for a disk.
    writing: Mutex<()>,
}

impl Leases {
    /// Opens or begins the leases in `folder`. A file in its place is moved to `leases.damaged-N` beside it. A record that cannot be read
    /// is removed and told to the log: the kernel shows whose the address is.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let folder = folder.into();
        let failed = |source| StoreError::Open { path: folder.clone(), source };
        if fs::symlink_metadata(&folder).is_ok_and(|found| !found.is_dir()) {
            let damaged = move_aside(&folder)?;
            tracing::error!(damaged = %damaged.display(), "no folder of leases: set aside, a new one is in use");
        }
        fs::create_dir_all(&folder).map_err(failed)?;
        keep_private(&folder);
        let mut records = LeaseRecords::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match read(&path) {
                Ok((address, lease)) => drop(records.insert(address, lease)),
                Err(reason) => {
                    // An agent that was killed in the middle leaves one, which says nothing of damage.
                    if !name(&path).starts_with(UNFINISHED) {
                        tracing::warn!(path = %path.display(), reason, "a lease cannot be read and is removed");
                    }
                    let _ = fs::remove_file(&path);
                }
            }
        }
        Ok(Self { folder, known: Mutex::new(Arc::new(records)), writing: Mutex::default() })
    }

    pub fn records(&self) -> Arc<LeaseRecords> {
        locked(&self.known).clone()
    }

    /// Whose address it is: the pod of its live lease, from ADD to DEL.
    pub fn pod_of(&self, address: IpAddr) -> Option<PodKey> {
        let known = locked(&self.known);
        let lease = known.get(&address).filter(|lease| lease.released.is_none())?;
        lease.pod.clone()
    }

    /// Writes and deletes (`None`) records: all of them, or none when one is refused. A process that ends in between may have written
    /// some.
    ///
    /// # Errors
    /// The file system takes no more, or is read-only.
    pub fn write(&self, changes: &BTreeMap<IpAddr, Option<Lease>>) -> Result<(), StoreError> {
        let _writing = locked(&self.writing);
        if changes.values().any(Option::is_some) {
            self.ensure_writable()?;
        }
        for (number, (address, lease)) in changes.iter().enumerate() {
            if let Err(error) = self.put(*address, lease.as_ref()) {
                let before = self.records();
                for address in changes.keys().take(number) {
                    let _ = self.put(*address, before.get(address));
                }
                return Err(error);
            }
        }
        let mut known = locked(&self.known);
        let records = Arc::make_mut(&mut known);
        for (address, lease) in changes {
            match lease {
                None => records.remove(address),
                Some(lease) => records.insert(*address, lease.clone()),
            };
        }
        Ok(())
    }

    fn put(&self, address: IpAddr, lease: Option<&Lease>) -> Result<(), StoreError> {
        let path = self.folder.join(address.to_string());
        let failed = |source| StoreError::Lease { path: path.clone(), source };
        let Some(lease) = lease else {
            return match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
                _ => Ok(()),
            };
        };
        let text =
            serde_json::to_vec(lease).map_err(|source| StoreError::Encode { path: path.clone(), source })?;
        let unfinished = self.folder.join(format!("{UNFINISHED}{address}"));
        files::replace(&path, &unfinished, 0o600, &text, Outlives::Process).map_err(failed)
    }

    /// Whether a write would succeed now.
    pub fn ensure_writable(&self) -> Result<(), StoreError> {
        ensure_writable(&self.folder, MIN_FREE_BYTES)
    }
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// An error says why it is no lease.
fn read(path: &Path) -> Result<(IpAddr, Lease), String> {
    let address = name(path).parse().map_err(|_| "its name is no address".to_owned())?;
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let lease = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    Ok((address, lease))
}

#[cfg(test)]
mod tests;
