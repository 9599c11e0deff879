//! The CNI plugin's other half, in the agent: addresses with leases, veth pairs, anti-spoofing, host ports.
//!
//! ```text
//!  container runtime --exec--> weft-plugin --HTTP over /run/weft/agent.sock--> server --> Cni
//!  Cni::add    lease in the Store -> told as attachment, until the pod's verdicts are in the kernel
//!              and meanwhile veth, the lease flushed -> addresses, rate limits
//!              -> routes -> nft elements -> answer
//!  Cni::del    link marked as ended -> nft elements -> lease released (quarantine) -> answer -> links deleted
//!  Cni::reconcile  leases <-> links of the kernel, before the first request
//!  Loop(plan, apply)  the same whenever this Node changes and at every drift check
//! ```
//!
//! Requests are imperative on purpose (request and response), the one exception from plan and apply. What is decided
//! without IO stands in [`plan`], [`ipam`], `rules`, `spoof`, `hostport`, `bandwidth` and [`conflist`], what travels in [`weft_plugin::wire`].

pub mod account;
mod add;
pub mod apply;
mod attachment;
mod bandwidth;
mod caller;
mod check;
pub mod cleanup;
pub mod conflist;
mod del;
mod gate;
mod hostport;
pub mod ipam;
mod lock;
mod node;
pub mod plan;
mod reconcile;
mod rules;
pub mod server;
mod spoof;
mod status;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;
use weft_model::snapshot::Attachments;
use weft_model::{Report, Snapshot};

use crate::kernel::netns::Rtnetlink;
use crate::locked;
use crate::store::Leases;
use lock::AttachmentLocks;
use rules::PodRules;

pub use attachment::Attachment;
pub use caller::Caller;
pub use gate::attachments;
pub use reconcile::Reconciled;

/// Says why this node cannot carry a pod (yet), on one line with the remedy; `Ok` when the rules of the given Snapshot are in
/// place. `None` while there is no Snapshot.
pub type Readiness = Arc<dyn Fn(Option<&Snapshot>) -> Result<(), String> + Send + Sync>;
/// MTU of pod links, bytes: what the overlay leaves of the underlay.
pub type PodMtu = Arc<dyn Fn(&Snapshot) -> u32 + Send + Sync>;

/// What the wiring gives.
pub struct Inputs {
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// The boot-scoped one.
    pub leases: Arc<Leases>,
    pub readiness: Readiness,
    pub pod_mtu_bytes: PodMtu,
    /// Where the addresses given are told; begins with [`attachments`] of the leases.
    pub attachments: watch::Sender<Attachments>,
    /// Reports of the loop that puts pods' verdicts into the kernel; `None` where policies are switched off.
    pub verdicts: Option<watch::Receiver<Report>>,
}

/// The plugin's server half. One per agent; every method may run in parallel with every other.
pub struct Cni {
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    leases: Arc<Leases>,
    readiness: Readiness,
    pod_mtu_bytes: PodMtu,
    netlink: Rtnetlink,
    /// For lists of the kernel's objects: a netlink socket makes one at a time and refuses others meanwhile (EBUSY).
    lists: tokio::sync::Mutex<Rtnetlink>,
    locks: AttachmentLocks,
    sweeping: Arc<tokio::sync::Mutex<()>>,
    /// One allocation at a time: from reading the leases to putting the new one.
    ipam: Mutex<ipam::Cursors>,
    rules: Mutex<PodRules>,
    attachments: watch::Sender<Attachments>,
    verdicts: Option<watch::Receiver<Report>>,
}

impl Cni {
    /// Opens rtnetlink connections in the namespace of the calling thread, within a tokio runtime.
    pub fn open(inputs: Inputs) -> io::Result<Self> {
        Ok(Self {
            snapshots: inputs.snapshots,
            leases: inputs.leases,
            readiness: inputs.readiness,
            pod_mtu_bytes: inputs.pod_mtu_bytes,
            netlink: Rtnetlink::connect()?,
            lists: tokio::sync::Mutex::new(Rtnetlink::connect()?),
            locks: AttachmentLocks::default(),
            sweeping: Arc::default(),
            ipam: Mutex::default(),
            rules: Mutex::new(PodRules::new()),
            attachments: inputs.attachments,
            verdicts: inputs.verdicts,
        })
    }
}
