//! The descriptors of the tunnel in the service manager's store: taken from it at start, left in it while we run.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::device::DeviceState;
use super::handover::{self, Unusable};
use crate::kernel::descriptor_store::Kept;
use crate::kernel::sealed;
use crate::kernel::tun::Tun;

const TUN: &str = "tunnel-tun";
const UDP_V4: &str = "tunnel-udp-v4";
const UDP_V6: &str = "tunnel-udp-v6";
const SESSIONS: &str = "tunnel-sessions";

pub(super) fn udp_name(ipv6: bool) -> &'static str {
    if ipv6 { UDP_V6 } else { UDP_V4 }
}

impl Kept {
    pub(super) fn tun(&mut self, link: &str) -> io::Result<Tun> {
        match self.adopt(TUN, |descriptor| Tun::adopt(descriptor, link)) {
            Some(tun) => Ok(tun),
            None => {
                let tun = Tun::open(link)?;
                self.keep(TUN, &tun);
                Ok(tun)
            }
        }
    }

    /// What the process before left, and how long ago. Whatever comes of it, nobody gets it after.
    pub(super) fn sessions(&mut self) -> Option<(DeviceState, Duration)> {
        let left = self.take(SESSIONS);
        if left.is_empty() {
            return None;
        }
        self.forget(SESSIONS);
        let read = |descriptor| -> Result<_, Unusable> {
            handover::decode(&sealed::take(descriptor)?.ok_or(Unusable::Taken)?)
        };
        left.into_iter().find_map(|descriptor| read(descriptor).inspect_err(refused).ok())
    }

    pub(super) fn leave_sessions(&self, state: DeviceState) {
        let outcome = handover::encode(state).and_then(|bytes| Ok(sealed::seal(&bytes)?));
        match outcome {
            Ok(memory) => self.keep(SESSIONS, memory),
            Err(error) => tracing::warn!(%error, "the sessions are not left to the next process"),
        }
    }

    /// The first descriptor of that name that is fit. The manager goes on keeping that one and no other.
    pub(super) fn adopt<T: AsFd>(
        &mut self,
        name: &str,
        mut adopt: impl FnMut(OwnedFd) -> io::Result<T>,
    ) -> Option<T> {
        let kept = self.take(name);
        let count = kept.len();
        let adopted = kept.into_iter().find_map(|descriptor| {
            adopt(descriptor).inspect_err(|error| tracing::warn!(name, %error, "what was kept is unfit")).ok()
        });
        if count > usize::from(adopted.is_some()) {
            self.forget(name);
            if let Some(adopted) = &adopted {
                self.keep(name, adopted);
            }
        }
        adopted
    }

    /// Lets go of what another version left and this one does not know.
    pub(super) fn forget_rest(&mut self) {
        for (name, _) in std::mem::take(&mut self.descriptors) {
            tracing::warn!(name, "what was kept under this name is nothing of ours");
            self.forget(&name);
        }
    }

    pub(super) fn keep(&self, name: &str, descriptor: impl AsFd) {
        if let Some(store) = &self.store {
            store.keep_or_warn(name, descriptor);
        }
    }

    pub(super) fn forget(&self, name: &str) {
        if let Some(store) = &self.store {
            store.forget_or_warn(name);
        }
    }
}

pub(super) fn refused(error: &Unusable) {
    let error = crate::reconcile::chain(error);
    tracing::warn!(error, "the sessions of the process before are not taken over, the peers are greeted");
}
