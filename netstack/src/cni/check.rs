//! CHECK: is everything that ADD made still there? Verifies, repairs nothing.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use weft_model::constants::TABLE_CNI;
use weft_plugin::wire::{CniError, CniRequest, Code};

use super::attachment::{AttachError, Attachment};
use super::{Cni, bandwidth, locked};
use crate::kernel::link::{Link, Links};
use crate::kernel::netns::Netns;
use crate::kernel::route::link_routes;
use crate::store::LeaseRecords;

impl Cni {
    pub async fn check(&self, request: &CniRequest) -> Result<(), CniError> {
        let attachment = Attachment::of(request)?;
        let _held = self.locks.one(&attachment.link).await;
        let leases = self.leases_of(&attachment.link);
        let addresses: BTreeSet<IpAddr> = leases.keys().copied().collect();
        if addresses.is_empty() {
            let id = &attachment.container_id;
            return Err(CniError::new(
                Code::UnknownContainer,
                format!("container {id} has no address leased"),
            ));
        }
        compare_with_previous(&request.config, &addresses)?;
        self.check_rules(&leases)?;
        self.check_host_side(&attachment, &addresses).await?;
        self.check_limits(&attachment, &leases).await?;
        check_pod_side(request, &addresses).await
    }

    fn check_rules(&self, leases: &LeaseRecords) -> Result<(), CniError> {
        let lacking = locked(&self.rules).lacking(leases).map_err(AttachError::from)?;
        match lacking.first() {
            None => Ok(()),
            Some(set) => mismatch(format!("set {set} of table {TABLE_CNI} lacks what ADD put there")),
        }
    }

    async fn check_limits(&self, attachment: &Attachment, leases: &LeaseRecords) -> Result<(), CniError> {
        let Some(lease) = leases.values().next() else { return Ok(()) };
        let wanted = bandwidth::wanted(lease, self.snapshot().as_deref());
        let link = self.links().find(&attachment.link).await.map_err(AttachError::from)?;
        let link = must_be_up(link, &attachment.link)?;
        if self.shaped().await?.holds(&link, &wanted) {
            return Ok(());
        }
        mismatch(format!("the rate limits of {} are not what its pod asks for", link.name))
    }

    async fn check_host_side(
        &self,
        attachment: &Attachment,
        addresses: &BTreeSet<IpAddr>,
    ) -> Result<(), CniError> {
        let found = self.links().find(&attachment.link).await.map_err(AttachError::from)?;
        let link = must_be_up(found, &attachment.link)?;
        let routes = self.host_routes().await.map_err(AttachError::from)?;
        let has_route = |address: IpAddr| {
            routes.iter().any(|r| r.link_index == link.index && r.destination == IpNet::from(address))
        };
        let missing = addresses.iter().find(|address| !has_route(**address));
        missing.map_or(Ok(()), |address| mismatch(format!("the route to {address} by {} is gone", link.name)))
    }
}

async fn check_pod_side(request: &CniRequest, addresses: &BTreeSet<IpAddr>) -> Result<(), CniError> {
    let netns = Netns::open(&request.netns).map_err(AttachError::from)?;
    let pod = netns.connect().map_err(AttachError::from)?;
    let links = Links::new(pod.handle.clone());
    let link = must_be_up(links.find(&request.ifname).await.map_err(AttachError::from)?, &request.ifname)?;
    let present = links.addresses(Some(link.index)).await.map_err(AttachError::from)?;
    let routes = link_routes(&pod.handle).await.map_err(AttachError::from)?;
    for address in addresses {
        if !present.iter().any(|have| have.address.addr() == *address) {
            return mismatch(format!("{address} is not on {} in {}", link.name, request.netns));
        }
        let ipv6 = address.is_ipv6();
        let is_default = |net: &IpNet| net.prefix_len() == 0 && net.addr().is_ipv6() == ipv6;
        if !routes.iter().any(|route| route.link_index == link.index && is_default(&route.destination)) {
            return mismatch(format!("the default route for {address} is gone in {}", request.netns));
        }
    }
    Ok(())
}

fn must_be_up(link: Option<Link>, name: &str) -> Result<Link, CniError> {
    match link {
        Some(link) if link.up => Ok(link),
        Some(_) => mismatch(format!("link {name} is down")),
        None => mismatch(format!("link {name} is gone")),
    }
}

/// The runtime hands over what ADD answered; addresses must be those that we lease.
fn compare_with_previous(config: &Value, addresses: &BTreeSet<IpAddr>) -> Result<(), CniError> {
    let Some(ips) = config.pointer("/prevResult/ips").and_then(Value::as_array) else { return Ok(()) };
    for text in ips.iter().filter_map(|entry| entry.get("address").and_then(Value::as_str)) {
        let known = text.parse::<IpNet>().is_ok_and(|net| addresses.contains(&net.addr()));
        if !known {
            return mismatch(format!("prevResult has {text}, leased are {addresses:?}"));
        }
    }
    Ok(())
}

fn mismatch<T>(what: String) -> Result<T, CniError> {
    Err(CniError::new(Code::Mismatch, what))
}
