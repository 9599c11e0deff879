//! ADD: a lease, then the kernel, then the anti-spoofing element; any failure undoes all of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weft_model::PodKey;
use weft_model::constants::POD_GATEWAY_MAC;

use super::attachment::{AttachError, Attachment, gateway, make_pod_side, pod_mac};
use super::node::NodeView;
use super::wire::{AddResult, CniError, CniRequest, Code};
use super::{Cni, ipam, locked, spoof};
use crate::kernel::link::Links;
use crate::kernel::netns::{Netns, Rtnetlink};
use crate::reconcile::chain;
use crate::store::{Boottime, Lease};

impl Cni {
    /// Attaches a container. On an error nothing is left behind, the lease included.
    ///
    /// Not cancel-safe: run it in a task of its own.
    pub async fn add(&self, request: &CniRequest) -> Result<AddResult, CniError> {
        let attachment = Attachment::of(request)?;
        if request.config.get("prevResult").is_some_and(|previous| !previous.is_null()) {
            let msg = "prevResult is given: weft must be the first plugin of its list";
            return Err(CniError::new(Code::InvalidConfig, msg));
        }
        let _held = self.locks.one(&attachment.link).await;
        let node = self.node_for_add()?;
        let netns = Netns::open(&request.netns).map_err(AttachError::from)?;
        let pod = netns.connect().map_err(AttachError::from)?;
        refuse_taken_name(&pod, &attachment, &request.netns).await?;
        let addresses = self.reserve(&attachment, request, &node)?;
        let attached = match self.verdicts_are_in_place(&addresses).await {
            Ok(()) => self.attach(&attachment, &netns, &pod, &addresses, &node).await.map_err(CniError::from),
            refused => refused,
        };
        match attached {
            Ok(()) => Ok(result(&attachment, &request.netns, &addresses, &node)),
            Err(error) => {
                self.undo(&attachment, &addresses).await;
                Err(error)
            }
        }
    }

    /// Leases one address a family, on the medium before it is used.
    fn reserve(
        &self,
        attachment: &Attachment,
        request: &CniRequest,
        node: &NodeView,
    ) -> Result<Vec<IpAddr>, CniError> {
        let failed = |error: crate::store::StoreError| CniError::new(Code::Store, chain(&error));
        let mut cursors = locked(&self.ipam);
        let leases = self.store.leases().map_err(failed)?;
        let mine = |lease: &&Lease| lease.link == attachment.link && lease.released.is_none();
        if leases.values().any(|lease| mine(&lease)) {
            let (id, ifname) = (&attachment.container_id, &attachment.ifname);
            return Err(CniError::new(
                Code::InvalidEnvironment,
                format!("container {id} has interface {ifname} already; DEL it first"),
            ));
        }
        let now = Boottime::now();
        let mut moved = cursors.clone();
        let given = ipam::allocate(&node.pod_cidrs, &leases, &mut moved, now)
            .map_err(|error| CniError::new(Code::Exhausted, error.to_string()))?;
        let mut changes: BTreeMap<IpAddr, Option<Lease>> =
            ipam::rested(&leases, now).map(|address| (address, None)).collect();
        changes.extend(given.iter().map(|address| (*address, Some(lease(attachment, request)))));
        self.store.write_leases(&changes).map_err(failed)?;
        *cursors = moved;
        self.tell_attachments(&cursors);
        Ok(given)
    }

    async fn attach(
        &self,
        attachment: &Attachment,
        netns: &Netns,
        pod: &Rtnetlink,
        addresses: &[IpAddr],
        node: &NodeView,
    ) -> Result<(), AttachError> {
        self.make_pair(attachment, netns, node.mtu_bytes).await?;
        self.ensure_host_side(&attachment.link, addresses, node).await?;
        make_pod_side(netns, &pod.handle, &attachment.ifname, addresses).await?;
        self.links().wait_until_running(&attachment.link).await?;
        Links::new(pod.handle.clone()).wait_until_running(&attachment.ifname).await?;
        self.guard_source(&attachment.link, addresses)
    }

    /// A set that is gone (somebody flushed the rule set) is made anew from the leases, this one among them.
    fn guard_source(&self, link: &str, addresses: &[IpAddr]) -> Result<(), AttachError> {
        let mut guard = locked(&self.source_guard);
        let Err(refused) = guard.allow(link, addresses) else { return Ok(()) };
        tracing::warn!(link, error = %chain(&refused), "make table weft-cni anew");
        let leases = self.store.leases()?;
        guard.ensure(&spoof::plan(&leases))?;
        Ok(())
    }

    /// An address that no packet ever bore needs no rest.
    async fn undo(&self, attachment: &Attachment, addresses: &[IpAddr]) {
        self.remove_from_kernel(&attachment.link, addresses).await.unwrap_or_else(|error| {
            tracing::warn!(link = attachment.link, error = %error, "undo a failed ADD");
        });
        let one_at_a_time = locked(&self.ipam);
        let changes = addresses.iter().map(|address| (*address, None)).collect();
        if let Err(error) = self.store.write_leases(&changes) {
            tracing::warn!(link = attachment.link, error = %chain(&error), "undo the lease of a failed ADD");
        }
        self.tell_attachments(&one_at_a_time);
    }
}

/// The specification: ADD must fail when the interface exists already.
async fn refuse_taken_name(pod: &Rtnetlink, attachment: &Attachment, netns: &str) -> Result<(), CniError> {
    let found = Links::new(pod.handle.clone()).find(&attachment.ifname).await.map_err(AttachError::from)?;
    match found {
        None => Ok(()),
        Some(_) => Err(CniError::new(
            Code::InvalidEnvironment,
            format!("CNI_IFNAME {} exists already in {netns}", attachment.ifname),
        )),
    }
}

fn lease(attachment: &Attachment, request: &CniRequest) -> Lease {
    let arg = |name: &str| request.args.get(name).cloned().unwrap_or_default();
    let (namespace, name) = (arg("K8S_POD_NAMESPACE"), arg("K8S_POD_NAME"));
    Lease {
        container_id: attachment.container_id.clone(),
        ifname: attachment.ifname.clone(),
        netns: request.netns.clone(),
        pod: (!name.is_empty()).then(|| PodKey::new(namespace, name)),
        pod_uid: arg("K8S_POD_UID"),
        link: attachment.link.clone(),
        released: None,
    }
}

fn result(attachment: &Attachment, netns: &str, addresses: &[IpAddr], node: &NodeView) -> AddResult {
    AddResult {
        host_link: attachment.link.clone(),
        host_mac: POD_GATEWAY_MAC,
        ifname: attachment.ifname.clone(),
        mac: pod_mac(&attachment.link),
        netns: netns.to_owned(),
        mtu_bytes: node.mtu_bytes,
        addresses: addresses.iter().map(|address| (*address, gateway(*address))).collect(),
    }
}
