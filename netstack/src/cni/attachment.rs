//! One pod's connection to this node: its names, and what stands on the host's side of it.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use sha2::{Digest as _, Sha256};
use weft_model::constants::{
    ENDED_LINK_GROUP, POD_GATEWAY_MAC, POD_GATEWAY_V4, POD_GATEWAY_V6, POD_LINK_PREFIX,
};
use weft_plugin::wire::{CniError, CniRequest, Code};

use super::Cni;
use super::node::NodeView;
use crate::kernel::link::{Link, LinkAddress, LinkError, Links};
use crate::kernel::netns::{Netns, NetnsError};
use crate::kernel::nft::NftError;
use crate::kernel::route::{LinkRoute, RouteError, link_routes};
use crate::kernel::rtnl::{Ipv4Setting, Requests, Rtnl, VethPair};
use crate::kernel::shaper::ShaperError;
use crate::kernel::sysctl;
use crate::reconcile::chain;
use crate::store::LeaseRecords;

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
    #[error("set {name} to {value}")]
    Sysctl { name: String, value: &'static str, source: io::Error },
    #[error("open an rtnetlink socket")]
    Socket(#[source] io::Error),
}

impl From<AttachError> for CniError {
    fn from(error: AttachError) -> Self {
        let code = match error {
            AttachError::Netns(NetnsError::Gone { .. }) => Code::UnknownContainer,
            _ => Code::Kernel,
        };
        CniError::new(code, chain(&error))
    }
}

/// `forwarding` per link, so that it does not hang on the host's default; strict reverse path as a second guard
/// against spoofing, for the moment when someone flushes the rule set; IPv6 silent: no router advertisements, no
/// duplicate-address detection, no address of its own beside the gateway's.
const HOST_IPV4: [(Ipv4Setting, u32); 5] = [
    (Ipv4Setting::Forwarding, 1),
    (Ipv4Setting::RpFilter, 1),
    (Ipv4Setting::ProxyArp, 0),
    (Ipv4Setting::SendRedirects, 0),
    (Ipv4Setting::AcceptRedirects, 0),
];
/// For clients on the node that call a hostPort at 127.0.0.1: lets the kernel send from there to the pod, and take the answer.
const HOST_PORT_IPV4: (Ipv4Setting, u32) = (Ipv4Setting::RouteLocalnet, 1);
/// Netlink has none of these but the last.
const HOST_IPV6: [(&str, &str); 7] = [
    ("disable_ipv6", "0"),
    ("forwarding", "1"),
    ("accept_ra", "0"),
    ("accept_dad", "0"),
    ("proxy_ndp", "0"),
    ("accept_redirects", "0"),
    ("addr_gen_mode", "1"),
];
const IPV6_SYSCTLS: &str = "/proc/sys/net/ipv6/conf";
/// In every namespace.
const LOOPBACK_INDEX: u32 = 1;
const POD_IPV6: [(&str, &str); 3] = [("disable_ipv6", "0"), ("accept_ra", "0"), ("accept_dad", "0")];

/// `folder` is that of all links' IPv6 sysctls in one network namespace.
fn set_ipv6(folder: &Path, link: &str, settings: &[(&str, &'static str)]) -> Result<(), AttachError> {
    for (setting, value) in settings {
        if let Err(source) = sysctl::ensure_at(&folder.join(link).join(setting), value) {
            let name = format!("net/ipv6/conf/{link}/{setting}");
            return Err(AttachError::Sysctl { name, value, source });
        }
    }
    Ok(())
}

/// The pod's namespace as ADD needs it: entered once, for as long as it takes to open what is here.
pub(super) struct PodSide {
    pub(super) netns: Netns,
    pub(super) rtnl: Rtnl,
    /// Of IPv6, the folder; what is opened through it is the pod's, whoever opens it. `None` where the kernel has no IPv6.
    sysctls: Option<File>,
    /// The interface was there already.
    pub(super) has_interface: bool,
}

impl PodSide {
    /// Errors: the namespace is gone or cannot be entered.
    pub(super) fn open(path: &str, ifname: &str) -> Result<Self, NetnsError> {
        let netns = Netns::open(path)?;
        let path = || netns.path().to_owned();
        let (rtnl, sysctls, has_interface) =
            netns.visit(|| (Rtnl::open(), File::open(IPV6_SYSCTLS), if_nametoindex(ifname).is_ok()))?;
        let rtnl = rtnl.map_err(|source| NetnsError::Socket { path: path(), source })?;
        let sysctls = match sysctls {
            Ok(folder) => Some(folder),
            Err(absent) if absent.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(NetnsError::Sysctls { path: path(), source }),
        };
        Ok(Self { netns, rtnl, sysctls, has_interface })
    }

    /// Everything inside: addresses, gateways as permanent neighbours, default routes.
    pub(super) fn make(&self, ifname: &str, addresses: &[IpAddr]) -> Result<(), AttachError> {
        let index = self.rtnl.index(ifname)?;
        if let Some(folder) = &self.sysctls
            && addresses.iter().any(IpAddr::is_ipv6)
        {
            let folder = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
            set_ipv6(&folder, ifname, &POD_IPV6)?;
        }
        let mut requests = Requests::default();
        requests.set_up("lo", LOOPBACK_INDEX);
        for address in addresses {
            requests.ensure_address(ifname, index, IpNet::from(*address));
        }
        requests.set_up(ifname, index);
        for address in addresses {
            let gateway = gateway(*address);
            requests.ensure_neighbour(ifname, index, gateway, POD_GATEWAY_MAC);
            for route in pod_routes(index, gateway) {
                requests.ensure_route(&route);
            }
        }
        Ok(self.rtnl.apply(requests)?)
    }
}

impl Cni {
    pub(super) fn links(&self) -> Links {
        Links::new(self.netlink.handle.clone())
    }

    /// Those of pods that have not ended, sorted by name.
    pub(super) async fn pod_links(&self) -> Result<Vec<Link>, LinkError> {
        let lists = self.lists.lock().await;
        let mut links = Links::new(lists.handle.clone()).list_by_prefix(POD_LINK_PREFIX).await?;
        links.retain(|link| link.group != ENDED_LINK_GROUP);
        Ok(links)
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
}

/// The pair, both ends down, the peer already in the pod's namespace.
pub(super) fn make_pair(
    host: &Rtnl,
    attachment: &Attachment,
    netns: &Netns,
    mtu_bytes: u32,
) -> Result<(), LinkError> {
    let mut requests = Requests::default();
    requests.add_veth(&VethPair {
        name: &attachment.link,
        mac: POD_GATEWAY_MAC,
        peer_name: &attachment.ifname,
        peer_mac: pod_mac(&attachment.link),
        peer_netns: netns,
        mtu_bytes,
    });
    host.apply(requests)
}

/// The host's side of an existing link but for its routes: nothing is led to the pod yet. Does nothing that is done
/// already. Returns the link's index.
pub(super) fn ensure_host_side(host: &Rtnl, link: &str, leases: &LeaseRecords) -> Result<u32, AttachError> {
    let index = host.index(link)?;
    let has_ipv6 = leases.keys().any(IpAddr::is_ipv6);
    if has_ipv6 {
        set_ipv6(Path::new(IPV6_SYSCTLS), link, &HOST_IPV6)?;
    }
    let has_host_ports = leases.values().any(|lease| !lease.host_ports.is_empty());
    let settings: Vec<_> = HOST_IPV4.into_iter().chain(has_host_ports.then_some(HOST_PORT_IPV4)).collect();
    let mut requests = Requests::default();
    if has_ipv6 {
        requests.ensure_address(link, index, IpNet::new_assert(POD_GATEWAY_V6.into(), 64));
    }
    requests.set_up_with(link, index, &settings);
    for address in leases.keys() {
        requests.ensure_neighbour(link, index, *address, pod_mac(link));
    }
    host.apply(requests)?;
    Ok(index)
}

/// From now on the node leads packets to the pod.
pub(super) fn ensure_host_routes(
    host: &Rtnl,
    index: u32,
    leases: &LeaseRecords,
    node: &NodeView,
) -> Result<(), LinkError> {
    let mut requests = Requests::default();
    for address in leases.keys() {
        requests.ensure_route(&host_route(index, *address, node));
    }
    host.apply(requests)
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
