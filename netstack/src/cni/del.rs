//! DEL and GC: idempotent in every order; nothing about the container needs to exist any more.

use std::collections::{BTreeMap, BTreeSet};

use super::attachment::Attachment;
use super::bandwidth::ifb_of;
use super::wire::{CniError, CniRequest, Code, valid_attachments};
use super::{Caller, Cni, hostport, locked};
use crate::kernel::conntrack::delete_udp_flows;
use crate::reconcile::chain;
use crate::store::{Boottime, LeaseRecords};

impl Cni {
    /// Removes whatever is left of an attachment; absent things are no error. Deleting the host end deletes the pod's.
    pub async fn del(&self, request: &CniRequest, caller: &Caller) -> Result<(), CniError> {
        let attachment = Attachment::of(request)?;
        self.detach(&attachment.link, caller).await
    }

    /// Removes every attachment that is not in `cni.dev/valid-attachments`. Goes on after a failure; names them all.
    pub async fn gc(&self, request: &CniRequest, caller: &Caller) -> Result<(), CniError> {
        let valid: BTreeSet<String> = valid_attachments(&request.config)?
            .into_iter()
            .map(|(container_id, ifname)| Attachment::new(&container_id, &ifname).link)
            .collect();
        let mut present = self.links_with_leases()?;
        let links = self.pod_links().await;
        present.extend(links.map_err(|error| kernel(&error))?.into_iter().map(|link| link.name));
        let mut failed = Vec::new();
        for link in present.difference(&valid) {
            if let Err(error) = self.detach(link, caller).await {
                failed.push(format!("{link}: {error}"));
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(CniError::new(Code::Kernel, "some attachments could not be removed").details(failed.join("; ")))
    }

    fn links_with_leases(&self) -> Result<BTreeSet<String>, CniError> {
        let live = self.live_leases()?;
        Ok(live.into_values().map(|lease| lease.link).collect())
    }

    pub(super) fn live_leases(&self) -> Result<LeaseRecords, CniError> {
        let mut leases = self.store.leases().map_err(|error| CniError::new(Code::Store, chain(&error)))?;
        leases.retain(|_, lease| lease.released.is_none());
        Ok(leases)
    }

    async fn detach(&self, link: &str, caller: &Caller) -> Result<(), CniError> {
        let _held = self.locks.one(link).await;
        caller.must_wait()?;
        let mut leases = self.live_leases()?;
        leases.retain(|_, lease| lease.link == link);
        self.remove_from_kernel(link, &leases).await?;
        self.release(leases);
        Ok(())
    }

    /// A release that cannot be written is repaired by the next [`Cni::reconcile`], since the link is gone. It must not
    /// keep a pod from being deleted.
    fn release(&self, leases: LeaseRecords) {
        let now = Boottime::now();
        let one_at_a_time = locked(&self.ipam);
        let changes: BTreeMap<_, _> = leases
            .into_iter()
            .map(|(address, mut lease)| {
                lease.released = Some(now);
                (address, Some(lease))
            })
            .collect();
        if let Err(error) = self.store.write_leases(&changes) {
            tracing::warn!(error = %chain(&error), "release leases");
        }
        self.tell_attachments(&one_at_a_time);
    }

    /// The link first: an element without its link lets nobody in.
    pub(super) async fn remove_from_kernel(&self, link: &str, leases: &LeaseRecords) -> Result<(), CniError> {
        self.links().delete(link).await.map_err(|error| kernel(&error))?;
        self.links().delete(&ifb_of(link)).await.map_err(|error| kernel(&error))?;
        self.forget_rules_and_flows(leases);
        Ok(())
    }

    /// What the kernel leads to pods that have ended: the rules first, since they make flows, and all before their leases are
    /// released, since a released lease is looked at no more.
    pub(super) fn forget_rules_and_flows(&self, ended: &LeaseRecords) {
        if let Err(error) = locked(&self.rules).withdraw(ended) {
            tracing::warn!(error = %chain(&error), "remove elements of table weft-cni");
        }
        forget_flows(ended);
    }
}

/// UDP clients of a hostPort would go on being sent to the pod that has ended.
fn forget_flows(ended: &LeaseRecords) {
    if !hostport::has_udp(ended) {
        return;
    }
    if let Err(error) = delete_udp_flows(|flow| hostport::orphaned(flow, ended)) {
        tracing::warn!(error = %chain(&error), "delete flows to the host ports of a pod that has ended");
    }
}

fn kernel(error: &crate::kernel::link::LinkError) -> CniError {
    CniError::new(Code::Kernel, chain(error))
}
