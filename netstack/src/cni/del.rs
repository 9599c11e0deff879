//! DEL and GC: idempotent in every order; nothing about the container needs to exist any more.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use tokio::try_join;
use weft_model::constants::ENDED_LINK_GROUP;
use weft_plugin::wire::{CniError, CniRequest, Code, valid_attachments};

use super::attachment::Attachment;
use super::bandwidth::ifb_of;
use super::{Caller, Cni, hostport, locked};
use crate::kernel::conntrack::delete_udp_flows;
use crate::kernel::link::{LinkError, Links};
use crate::kernel::netns::Rtnetlink;
use crate::reconcile::chain;
use crate::store::{Boottime, LeaseRecords};

impl Cni {
    /// Removes whatever is left of an attachment; absent things are no error. The links themselves may go a moment later: what
    /// is left of them passes nothing, and an ADD that needs the place waits for it.
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
        let mut present = self.links_with_leases();
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

    fn links_with_leases(&self) -> BTreeSet<String> {
        let leases = self.leases.records();
        let live = leases.values().filter(|lease| lease.released.is_none());
        live.map(|lease| lease.link.clone()).collect()
    }

    /// The live ones of a link.
    pub(super) fn leases_of(&self, link: &str) -> LeaseRecords {
        let leases = self.leases.records();
        let of_link = leases.iter().filter(|(_, lease)| lease.link == link && lease.released.is_none());
        of_link.map(|(address, lease)| (*address, lease.clone())).collect()
    }

    async fn detach(&self, link: &str, caller: &Caller) -> Result<(), CniError> {
        let _held = self.locks.one(link).await;
        caller.must_wait()?;
        let leases = self.leases_of(link);
        let ended = self.end_links(link).await.map_err(|error| kernel(&error))?;
        self.forget_rules_and_flows(&leases);
        self.release(leases);
        if ended {
            self.sweep_later();
        }
        Ok(())
    }

    /// Marks the link and its IFB device: nothing else knows them any more. True when there was one.
    pub(super) async fn end_links(&self, link: &str) -> Result<bool, LinkError> {
        let (links, shaper) = (self.links(), ifb_of(link));
        let marked =
            try_join!(links.set_group(link, ENDED_LINK_GROUP), links.set_group(&shaper, ENDED_LINK_GROUP));
        marked.map(|(link, shaper)| link || shaper)
    }

    /// Deletes the links that are marked, all at once; those that are marked meanwhile with the next call. The kernel holds its
    /// caller for its grace periods, tens of milliseconds, so the caller is a thread that has nothing else to do.
    pub(super) fn sweep(&self) -> impl Future<Output = Result<(), LinkError>> + use<> {
        let one_at_a_time = self.sweeping.clone();
        async move {
            let _alone = one_at_a_time.lock().await;
            let failed =
                |source| LinkError { operation: "delete", link: "links that ended".to_owned(), source };
            let swept = tokio::task::spawn_blocking(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
                runtime.map_err(failed)?.block_on(async {
                    let netlink = Rtnetlink::connect().map_err(failed)?;
                    Links::new(netlink.handle.clone()).delete_group(ENDED_LINK_GROUP).await.map(drop)
                })
            });
            swept.await.unwrap_or_else(|error| Err(failed(io::Error::other(error))))
        }
    }

    /// What fails now is tried again by [`Cni::reconcile`].
    fn sweep_later(&self) {
        let sweep = self.sweep();
        tokio::spawn(async move {
            if let Err(error) = sweep.await {
                tracing::warn!(error = %chain(&error), "delete the links of pods that have ended");
            }
        });
    }

    /// A release that cannot be written is repaired by the next [`Cni::reconcile`], since the link is gone. It must not
    /// keep a pod from being deleted.
    fn release(&self, leases: LeaseRecords) {
        let now = Boottime::now();
        let changes: BTreeMap<_, _> = leases
            .into_iter()
            .map(|(address, mut lease)| {
                lease.released = Some(now);
                (address, Some(lease))
            })
            .collect();
        let one_at_a_time = locked(&self.ipam);
        let written = self.leases.write(&changes);
        self.tell_attachments(&one_at_a_time);
        if let Err(error) = written {
            tracing::warn!(error = %chain(&error), "release leases");
        }
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

fn kernel(error: &LinkError) -> CniError {
    CniError::new(Code::Kernel, chain(error))
}
