//! One pod's connection to this node: its names, and what stands on the host's side of it.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};
use weft_model::constants::{POD_GATEWAY_MAC, POD_GATEWAY_V4, POD_GATEWAY_V6, POD_LINK_PREFIX};

use super::Cni;
use super::node::NodeView;
use super::wire::{CniError, CniRequest, Code};
use crate::kernel::link::{Link, LinkAddress, LinkError, Links, VethPair};
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::nft::NftError;
use crate::kernel::route::{LinkRoute, RouteError, ensure_link_route, link_routes};
use crate::kernel::shaper::ShaperError;
use crate::kernel::sysctl;
use crate::reconcile::chain;
use crate::store::{LeaseRecords, StoreError};

/// Digits of the hash in the name of a link: IFNAMSIZ is 16 with the final NUL, [`POD_LINK_PREFIX`] takes 5.
const LINK_HASH_DIGITS: usize = 10;

/// Names of one (container, interface): everything else is found by them, even when the Store is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub container_id: String,
    pub ifname: String,
    /// Host end of the veth pair.
    pub link: String,
}

impl Attachment {
    /// Container ids hold no `/`, so no two pairs have the same text.
    pub fn new(container_id: &str, ifname: &str) -> Self {
        let digest = Sha256::digest(format!("{container_id}/{ifname}"));
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
            link: format!("{POD_LINK_PREFIX}{}", &hex[..LINK_HASH_DIGITS]),
        }
    }

    /// Checks the two names as the specification demands.
    pub(super) fn of(request: &CniRequest) -> Result<Self, CniError> {
        let invalid = |what: String| Err(CniError::new(Code::InvalidEnvironment, what));
        let (id, ifname) = (&request.container_id, &request.ifname);
        let id_ok = id.starts_with(|c: char| c.is_ascii_alphanumeric())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if !id_ok {
            return invalid(format!("CNI_CONTAINERID {id:?} must be alphanumeric, then also '_', '.', '-'"));
        }
        let ifname_ok = !matches!(ifname.as_str(), "" | "." | "..")
            && ifname.len() < libc::IFNAMSIZ
            && !ifname.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
        if !ifname_ok {
            return invalid(format!("CNI_IFNAME {ifname:?} is no name for a network interface"));
        }
        Ok(Self::new(id, ifname))
    }
}

/// MAC address of a pod's end, from the name of its host end: the permanent neighbour can be rebuilt from it.
/// Locally administered, unicast.
pub(super) fn pod_mac(link: &str) -> [u8; 6] {
    let digest = Sha256::digest(link);
    [0x02, 0x57, digest[0], digest[1], digest[2], digest[3]]
}

/// The link-local gateway of the address's family.
pub(super) fn gateway(address: IpAddr) -> IpAddr {
    if address.is_ipv6() { POD_GATEWAY_V6.into() } else { POD_GATEWAY_V4.into() }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Rules(#[from] NftError),
    #[error(transparent)]
    Shaper(#[from] ShaperError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("set {name} to {value}")]
    Sysctl { name: String, value: &'static str, source: io::Error },
}

impl From<AttachError> for CniError {
    fn from(error: AttachError) -> Self {
        let code = match error {
            AttachError::Netns(NetnsError::Gone { .. }) => Code::UnknownContainer,
            AttachError::Store(_) => Code::Store,
            _ => Code::Kernel,
        };
        CniError::new(code, chain(&error))
    }
}

/// `forwarding` per link, so that it does not hang on the host's default; strict reverse path as a second guard
/// against spoofing, for the moment when someone flushes the rule set; IPv6 silent: no router advertisements, no
/// duplicate-address detection, no address of its own beside the gateway's.
const HOST_IPV4: [(&str, &str); 5] = [
    ("forwarding", "1"),
    ("rp_filter", "1"),
    ("proxy_arp", "0"),
    ("send_redirects", "0"),
    ("accept_redirects", "0"),
];
const HOST_IPV6: [(&str, &str); 7] = [
    ("disable_ipv6", "0"),
    ("forwarding", "1"),
    ("accept_ra", "0"),
    ("accept_dad", "0"),
    ("proxy_ndp", "0"),
    ("accept_redirects", "0"),
    ("addr_gen_mode", "1"),
];
/// For clients on the node that call a hostPort at 127.0.0.1: lets the kernel send from there to the pod, and take the answer.
const HOST_PORT_IPV4: [(&str, &str); 1] = [("route_localnet", "1")];
const POD_IPV6: [(&str, &str); 3] = [("disable_ipv6", "0"), ("accept_ra", "0"), ("accept_dad", "0")];

/// Writes per-link sysctls of the calling thread's namespace.
fn set_sysctls(family: &str, link: &str, settings: &[(&str, &'static str)]) -> Result<(), AttachError> {
    for (setting, value) in settings {
        let name = format!("net/{family}/conf/{link}/{setting}");
        if let Err(source) = sysctl::ensure(&name, value) {
            return Err(AttachError::Sysctl { name, value, source });
        }
    }
    Ok(())
}

impl Cni {
    pub(super) fn links(&self) -> Links {
        Links::new(self.netlink.handle.clone())
    }

    /// Sorted by name.
    pub(super) async fn pod_links(&self) -> Result<Vec<Link>, LinkError> {
        let lists = self.lists.lock().await;
        Links::new(lists.handle.clone()).list_by_prefix(POD_LINK_PREFIX).await
    }

    /// Of the node, on all links.
    pub(super) async fn local_addresses(&self) -> Result<Vec<LinkAddress>, LinkError> {
        let lists = self.lists.lock().await;
        Links::new(lists.handle.clone()).addresses(None).await
    }

    /// Every route of our protocol on the node that leaves by a link.
    pub(super) async fn host_routes(&self) -> Result<Vec<LinkRoute>, RouteError> {
        link_routes(&self.lists.lock().await.handle).await
    }

    /// The pair, both ends down, the peer already in the pod's namespace.
    pub(super) async fn make_pair(
        &self,
        attachment: &Attachment,
        netns: &Netns,
        mtu_bytes: u32,
    ) -> Result<(), AttachError> {
        let pair = VethPair {
            name: &attachment.link,
            mac: POD_GATEWAY_MAC,
            peer_name: &attachment.ifname,
            peer_mac: pod_mac(&attachment.link),
            peer_netns: netns,
            mtu_bytes,
        };
        Ok(self.links().add_veth(&pair).await?)
    }

    /// Everything on the host's side of an existing link; does nothing that is done already.
    pub(super) async fn ensure_host_side(
        &self,
        link: &str,
        leases: &LeaseRecords,
        node: &NodeView,
    ) -> Result<(), AttachError> {
        let links = self.links();
        let index = links.index(link).await?;
        set_sysctls("ipv4", link, &HOST_IPV4)?;
        if leases.values().any(|lease| !lease.host_ports.is_empty()) {
            set_sysctls("ipv4", link, &HOST_PORT_IPV4)?;
        }
        if leases.keys().any(IpAddr::is_ipv6) {
            set_sysctls("ipv6", link, &HOST_IPV6)?;
            let gateway = IpNet::new_assert(POD_GATEWAY_V6.into(), 64);
            links.ensure_address(link, index, gateway).await?;
        }
        links.set_up(link, index).await?;
        for address in leases.keys() {
            links.ensure_neighbour(link, index, *address, pod_mac(link)).await?;
            ensure_link_route(&self.netlink.handle, &host_route(index, *address, node)).await?;
        }
        Ok(())
    }
}

/// Decision 11: what the node itself sends to its pod comes from the Node's address.
pub(super) fn host_route(link_index: u32, address: IpAddr, node: &NodeView) -> LinkRoute {
    LinkRoute {
        destination: IpNet::from(address),
        link_index,
        gateway: None,
        source: node.source_for(address),
    }
}

/// Everything inside the pod: addresses, gateways as permanent neighbours, default routes.
pub(super) async fn make_pod_side(
    netns: &Netns,
    handle: &rtnetlink::Handle,
    ifname: &str,
    addresses: &[IpAddr],
) -> Result<(), AttachError> {
    let links = Links::new(handle.clone());
    let index = links.index(ifname).await?;
    if addresses.iter().any(IpAddr::is_ipv6) {
        netns.run(|| set_sysctls("ipv6", ifname, &POD_IPV6))??;
    }
    links.set_up("lo", links.index("lo").await?).await?;
    for address in addresses {
        links.ensure_address(ifname, index, IpNet::from(*address)).await?;
    }
    links.set_up(ifname, index).await?;
    for address in addresses {
        let gateway = gateway(*address);
        links.ensure_neighbour(ifname, index, gateway, POD_GATEWAY_MAC).await?;
        for route in pod_routes(index, gateway) {
            ensure_link_route(handle, &route).await?;
        }
    }
    Ok(())
}

/// IPv4 needs the gateway itself on the link first; IPv6 has `fe80::/64` there.
fn pod_routes(link_index: u32, gateway: IpAddr) -> Vec<LinkRoute> {
    let base = LinkRoute { destination: IpNet::from(gateway), link_index, gateway: None, source: None };
    let any: IpNet = if gateway.is_ipv6() {
        IpNet::new_assert(std::net::Ipv6Addr::UNSPECIFIED.into(), 0)
    } else {
        IpNet::new_assert(std::net::Ipv4Addr::UNSPECIFIED.into(), 0)
    };
    let default = LinkRoute { destination: any, gateway: Some(gateway), ..base };
    if gateway.is_ipv6() { vec![default] } else { vec![base, default] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let a = Attachment::new("4f1e", "eth0");
        assert!(a.link.starts_with("weftp") && a.link.len() < libc::IFNAMSIZ, "{}", a.link);
        assert_eq!(a, Attachment::new("4f1e", "eth0"));
        assert_ne!(a.link, Attachment::new("4f1e", "eth1").link);
        assert_ne!(Attachment::new("a", "be").link, Attachment::new("ab", "e").link);
        assert_eq!(pod_mac(&a.link)[0] & 3, 2);
    }

    #[test]
    fn names_that_would_be_trouble_are_refused() {
        for (id, ifname) in [
            ("", "eth0"),
            ("../x", "eth0"),
            ("a/b", "eth0"),
            ("a", ""),
            ("a", "seventeen-letters"),
            ("a", "e/0"),
        ] {
            let request = CniRequest {
                container_id: id.to_owned(),
                ifname: ifname.to_owned(),
                ..CniRequest::default()
            };
            assert_eq!(Attachment::of(&request).unwrap_err().code, 4, "{id} {ifname}");
        }
    }
}
