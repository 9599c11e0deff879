//! CNI leases: one record per address, flushed before ADD answers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use weft_model::PodKey;
use weft_model::objects::{Bandwidth, Protocol};

use super::{Store, StoreError};
use crate::locked;

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

impl Store {
    /// Records that cannot be read are skipped and logged: the kernel shows them too.
    pub fn leases(&self) -> Result<Arc<LeaseRecords>, StoreError> {
        let mut known = locked(&self.known_leases);
        if let Some(leases) = &*known {
            return Ok(leases.clone());
        }
        let leases = Arc::new(self.read_leases()?);
        *known = Some(leases.clone());
        Ok(leases)
    }

    fn read_leases(&self) -> Result<LeaseRecords, StoreError> {
        let mut records = LeaseRecords::new();
        for record in self.leases.iter() {
            let (key, value) = record.map_err(self.error("read leases"))?;
            match (address(&key), serde_json::from_slice(&value)) {
                (Some(address), Ok(lease)) => {
                    records.insert(address, lease);
                }
                _ => tracing::warn!(key = ?key, "a lease cannot be read and is skipped"),
            }
        }
        Ok(records)
    }

    /// Whose address it is: the pod of its live lease, from ADD to DEL. `None` also for what cannot be read.
    pub fn pod_of(&self, address: IpAddr) -> Option<PodKey> {
        let leases = self.leases().ok()?;
        let lease = leases.get(&address).filter(|lease| lease.released.is_none())?;
        lease.pod.clone()
    }

    /// Writes and deletes (`None`) records as one change, and waits until it is on the medium.
    pub fn write_leases(&self, changes: &BTreeMap<IpAddr, Option<Lease>>) -> Result<(), StoreError> {
        self.put_leases(changes)?;
        self.flush_leases()
    }

    /// As [`Store::write_leases`], without waiting: whoever asks for leases sees the change at once, a new process only after
    /// [`Store::flush_leases`].
    pub fn put_leases(&self, changes: &BTreeMap<IpAddr, Option<Lease>>) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        self.ensure_writable()?;
        let mut batch = sled::Batch::default();
        for (address, lease) in changes {
            let key = address.to_string();
            match lease {
                None => batch.remove(key.as_bytes()),
                Some(lease) => batch.insert(
                    key.as_bytes(),
                    serde_json::to_vec(lease)
                        .map_err(|source| StoreError::Encode { path: self.path.clone(), source })?,
                ),
            }
        }
        let mut known = locked(&self.known_leases);
        let before = known.take();
        self.leases.apply_batch(batch).map_err(self.error("write leases"))?;
        *known = before.map(|mut leases| {
            change(Arc::make_mut(&mut leases), changes);
            leases
        });
        Ok(())
    }

    /// Waits until all that was put is on the medium. Calls from several threads share what they wait for.
    pub fn flush_leases(&self) -> Result<(), StoreError> {
        self.db.flush().map_err(self.error("flush leases"))?;
        Ok(())
    }
}

fn change(leases: &mut LeaseRecords, changes: &BTreeMap<IpAddr, Option<Lease>>) {
    for (address, lease) in changes {
        match lease {
            None => leases.remove(address),
            Some(lease) => leases.insert(*address, lease.clone()),
        };
    }
}

fn address(key: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(key).ok()?.parse().ok()
}
