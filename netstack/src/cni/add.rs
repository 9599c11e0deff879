//! ADD: a lease, then the kernel, then the nft elements; any failure undoes all of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::TryFutureExt as _;
use tokio::try_join;
use weft_model::PodKey;
use weft_model::constants::POD_GATEWAY_MAC;
use weft_model::objects::Bandwidth;
use weft_plugin::wire::{AddResult, CniError, CniRequest, Code};

use super::attachment::{
    AttachError, Attachment, PodSide, ensure_host_routes, ensure_host_side, gateway, make_pair, pod_mac,
};
use super::node::NodeView;
use super::{Caller, Cni, bandwidth, hostport, ipam, locked};
use crate::kernel::conntrack::delete_udp_flows;
use crate::kernel::link::LinkError;
use crate::kernel::rtnl::Rtnl;
use crate::reconcile::chain;
use crate::store::{Boottime, HostPort, Lease, LeaseRecords};

/// What the runtime wants beside addresses.
struct Asked {
    host_ports: Vec<HostPort>,
    bandwidth: Bandwidth,
}

impl Cni {
    /// Attaches a container. On an error nothing is left behind, the lease included.
    ///
    /// Not cancel-safe: run it in a task of its own.
    pub async fn add(&self, request: &CniRequest, caller: &Caller) -> Result<AddResult, CniError> {
        let attachment = Attachment::of(request)?;
        if request.config.get("prevResult").is_some_and(|previous| !previous.is_null()) {
            let msg = "prevResult is given: weft must be the first plugin of its list";
            return Err(CniError::new(Code::InvalidConfig, msg));
        }
        let asked = Asked {
            host_ports: hostport::requested(&request.config)?,
            bandwidth: bandwidth::requested(&request.config)?,
        };
        let _held = self.locks.one(&attachment.link).await;
        caller.must_wait()?;
        let node = self.node_for_add()?;
        let pod = self.pod_side(&attachment, request).await?;
        let given = self.reserve(&attachment, request, &asked, &node)?;
        match self.attach(&attachment, &pod, &given, &node).await {
            Ok(addresses) => Ok(result(&attachment, &request.netns, &addresses, &node)),
            Err(error) => {
                self.undo(&attachment, &given).await;
                Err(error)
            }
        }
    }

    /// Leases one address a family. Nobody else gets it from now on.
    fn reserve(
        &self,
        attachment: &Attachment,
        request: &CniRequest,
        asked: &Asked,
        node: &NodeView,
    ) -> Result<LeaseRecords, CniError> {
        let failed = |error: crate::store::StoreError| CniError::new(Code::Store, chain(&error));
        let mut cursors = locked(&self.ipam);
        let leases = self.leases.records();
        let mine = |lease: &&Lease| lease.link == attachment.link && lease.released.is_none();
        if leases.values().any(|lease| mine(&lease)) {
            let (id, ifname) = (&attachment.container_id, &attachment.ifname);
            return Err(CniError::new(
                Code::InvalidEnvironment,
                format!("container {id} has interface {ifname} already; DEL it first"),
            ));
        }
        if let Some(refused) = hostport::refusal(&asked.host_ports, &leases, node.wireguard_port) {
            return Err(refused);
        }
        let now = Boottime::now();
        let mut moved = cursors.clone();
        let given = ipam::allocate(&node.pod_cidrs, &leases, &mut moved, now)
            .map_err(|error| CniError::new(Code::Exhausted, error.to_string()))?;
        let mut changes: BTreeMap<IpAddr, Option<Lease>> =
            ipam::rested(&leases, now).map(|address| (address, None)).collect();
        let lease = |address: IpAddr| Lease {
            host_ports: hostport::of_family(&asked.host_ports, address.is_ipv6()),
            bandwidth: asked.bandwidth,
            ..lease(attachment, request)
        };
        let given: LeaseRecords = given.into_iter().map(|address| (address, lease(address))).collect();
        changes.extend(given.iter().map(|(address, lease)| (*address, Some(lease.clone()))));
        // They are changed in place then, instead of in a copy.
        drop(leases);
        self.leases.write(&changes).map_err(failed)?;
        *cursors = moved;
        self.tell_attachments(&cursors);
        Ok(given)
    }

    /// The specification: ADD must fail when the interface exists already. That of a pod that has just ended goes first.
    async fn pod_side(&self, attachment: &Attachment, request: &CniRequest) -> Result<PodSide, CniError> {
        let open = || PodSide::open(&request.netns, &attachment.ifname).map_err(AttachError::from);
        let mut pod = open()?;
        if pod.has_interface {
            self.sweep().await.map_err(AttachError::from)?;
            pod = open()?;
        }
        match pod.has_interface {
            false => Ok(pod),
            true => Err(CniError::new(
                Code::InvalidEnvironment,
                format!("CNI_IFNAME {} exists already in {}", attachment.ifname, request.netns),
            )),
        }
    }

    /// The links are made while the pod's verdicts are on their way to the kernel; nothing passes before these are there.
    async fn attach(
        &self,
        attachment: &Attachment,
        pod: &PodSide,
        given: &LeaseRecords,
        node: &NodeView,
    ) -> Result<Vec<IpAddr>, CniError> {
        let addresses = node.in_order(given);
        let host = Rtnl::open().map_err(AttachError::Socket)?;
        let (index, ()) = try_join!(
            self.link_up(&host, attachment, pod, given, &addresses, node).err_into(),
            self.verdicts_are_in_place(&addresses),
        )?;
        ensure_host_routes(&host, index, given, node).map_err(AttachError::from)?;
        self.admit(&attachment.link, given)?;
        self.take_over_flows(&attachment.link, given).await;
        Ok(addresses)
    }

    /// Both ends of the link, up. Returns the index of the host's.
    async fn link_up(
        &self,
        host: &Rtnl,
        attachment: &Attachment,
        pod: &PodSide,
        given: &LeaseRecords,
        addresses: &[IpAddr],
        node: &NodeView,
    ) -> Result<u32, AttachError> {
        let Attachment { link, ifname, .. } = attachment;
        self.pair(host, attachment, pod, node).await?;
        pod.make(ifname, addresses)?;
        let index = ensure_host_side(host, link, given)?;
        self.limit_new(link, given).await?;
        try_join!(host.wait_until_running(link), pod.rtnl.wait_until_running(ifname))?;
        Ok(index)
    }

    async fn pair(
        &self,
        host: &Rtnl,
        attachment: &Attachment,
        pod: &PodSide,
        node: &NodeView,
    ) -> Result<(), LinkError> {
        let make = || make_pair(host, attachment, &pod.netns, node.mtu_bytes);
        match make() {
            // The attachment has just ended.
            Err(error) if error.errno() == Some(libc::EEXIST) => {
                self.sweep().await?;
                make()
            }
            made => made,
        }
    }

    /// Pods without limits, nearly all, cost nothing here.
    async fn limit_new(&self, name: &str, given: &LeaseRecords) -> Result<(), AttachError> {
        let Some(lease) = given.values().next() else { return Ok(()) };
        let wanted = bandwidth::wanted(lease, self.snapshot().as_deref());
        if wanted == Bandwidth::default() {
            return Ok(());
        }
        let links = self.links();
        let link = links.find(name).await?.ok_or_else(|| LinkError::missing("find link", name))?;
        self.limit(&link, &wanted, &self.shaped().await?).await
    }

    /// A set that is gone (somebody flushed the rule set) is made anew from the leases, this one among them.
    fn admit(&self, link: &str, given: &LeaseRecords) -> Result<(), AttachError> {
        let mut rules = locked(&self.rules);
        let Err(refused) = rules.admit(given) else { return Ok(()) };
        tracing::warn!(link, error = %chain(&refused), "make table weft-cni anew");
        rules.ensure(&self.leases.records())?;
        Ok(())
    }

    /// Clients that were talking into the void find the pod with their next packet. Without it they would find it when they
    /// pause, so a failure keeps no pod from starting.
    async fn take_over_flows(&self, link: &str, given: &LeaseRecords) {
        if !hostport::has_udp(given) {
            return;
        }
        let local = match self.local_addresses().await {
            Ok(addresses) => addresses.iter().map(|local| local.address.addr()).collect::<Vec<_>>(),
            Err(error) => return tracing::warn!(link, error = %chain(&error), "list the node's addresses"),
        };
        if let Err(error) = delete_udp_flows(|flow| hostport::missed(flow, given, &local)) {
            tracing::warn!(link, error = %chain(&error), "delete flows from before the pod");
        }
    }

    /// An address that no packet ever bore needs no rest: the next may have it as soon as the link is gone.
    async fn undo(&self, attachment: &Attachment, given: &LeaseRecords) {
        let removed = async {
            self.end_links(&attachment.link).await?;
            self.sweep().await
        };
        if let Err(error) = removed.await {
            tracing::warn!(link = attachment.link, error = %chain(&error), "undo a failed ADD");
        }
        self.forget_rules_and_flows(given);
        let one_at_a_time = locked(&self.ipam);
        let changes = given.keys().map(|address| (*address, None)).collect();
        if let Err(error) = self.leases.write(&changes) {
            tracing::warn!(link = attachment.link, error = %chain(&error), "undo the lease of a failed ADD");
        }
        self.tell_attachments(&one_at_a_time);
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
        host_ports: Vec::new(),
        bandwidth: Bandwidth::default(),
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
