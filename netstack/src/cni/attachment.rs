//! One pod's connection to this node: its names, and what stands on the host's side of it.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use futures::TryFutureExt as _;
use futures::future::try_join_all;
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use sha2::{Digest as _, Sha256};
use tokio::try_join;
use weft_model::constants::{
    ENDED_LINK_GROUP, POD_GATEWAY_MAC, POD_GATEWAY_V4, POD_GATEWAY_V6, POD_LINK_PREFIX,
};

use super::Cni;
use super::node::NodeView;
use crate::kernel::link::{Link, LinkAddress, LinkError, Links, VethPair};
use crate::kernel::netns::{Netns, NetnsError, Rtnetlink};
use crate::kernel::nft::NftError;
use crate::kernel::route::{LinkRoute, RouteError, ensure_link_route, link_routes};
use crate::kernel::shaper::ShaperError;
use crate::kernel::sysctl;
use crate::reconcile::chain;
use crate::store::{LeaseRecords, StoreError};
use weft_plugin::wire::{CniError, CniRequest, Code};

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
    #[error("the agent ends")]
    Ends,
}

impl From<AttachError> for CniError {
    fn from(error: AttachError) -> Self {
        let code = match error {
            AttachError::Netns(NetnsError::Gone { .. }) => Code::UnknownContainer,
            AttachError::Store(_) => Code::Store,
            AttachError::Ends => Code::TryAgainLater,
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
const SYSCTLS: [&str; 2] = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"];
/// In every namespace.
const LOOPBACK_INDEX: u32 = 1;
const POD_IPV6: [(&str, &str); 3] = [("disable_ipv6", "0"), ("accept_ra", "0"), ("accept_dad", "0")];

/// Per-link sysctls of one family in one network namespace.
struct LinkSysctls {
    folder: PathBuf,
    ipv6: bool,
}

impl LinkSysctls {
    /// Of the node.
    fn of_host(ipv6: bool) -> Self {
        Self { folder: SYSCTLS[usize::from(ipv6)].into(), ipv6 }
    }

    fn set(&self, link: &str, settings: &[(&str, &'static str)]) -> Result<(), AttachError> {
        for (setting, value) in settings {
            let path = self.folder.join(link).join(setting);
            if let Err(source) = sysctl::ensure_at(&path, value) {
                let family = if self.ipv6 { "ipv6" } else { "ipv4" };
                let name = format!("net/{family}/conf/{link}/{setting}");
                return Err(AttachError::Sysctl { name, value, source });
            }
        }
        Ok(())
    }
}

/// The pod's namespace as ADD needs it: entered once, by a thread that ends.
pub(super) struct PodSide {
    pub(super) netns: Netns,
    rtnetlink: Rtnetlink,
    /// Of IPv6, the folder; what is opened through it is the pod's, whoever opens it. `None` where the kernel has no IPv6.
    sysctls: Option<File>,
    /// The interface was there already.
    pub(super) has_interface: bool,
}

impl PodSide {
    /// Within a tokio runtime. Errors: the namespace is gone or cannot be entered.
    pub(super) fn open(path: &str, ifname: &str) -> Result<Self, NetnsError> {
        let netns = Netns::open(path)?;
        let (rtnetlink, (sysctls, has_interface)) =
            netns.connect_and(|| (File::open(SYSCTLS[1]), if_nametoindex(ifname).is_ok()))?;
        let sysctls = match sysctls {
            Ok(folder) => Some(folder),
            Err(absent) if absent.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(NetnsError::Sysctls { path: netns.path().to_owned(), source }),
        };
        Ok(Self { netns, rtnetlink, sysctls, has_interface })
    }

    /// Everything inside: addresses, gateways as permanent neighbours, default routes.
    pub(super) async fn make(&self, ifname: &str, addresses: &[IpAddr]) -> Result<(), AttachError> {
        let links = self.links();
        let index = links.index(ifname).await?;
        if let Some(folder) = &self.sysctls
            && addresses.iter().any(IpAddr::is_ipv6)
        {
            let folder = format!("/proc/self/fd/{}", folder.as_raw_fd()).into();
            LinkSysctls { folder, ipv6: true }.set(ifname, &POD_IPV6)?;
        }
        let addressed =
            addresses.iter().map(|address| links.ensure_address(ifname, index, IpNet::from(*address)));
        let reached = addresses.iter().map(|address| async {
            let gateway = gateway(*address);
            let neighbour = links.ensure_neighbour(ifname, index, gateway, POD_GATEWAY_MAC);
            let routes = pod_routes(index, gateway);
            let routed =
                try_join_all(routes.iter().map(|route| ensure_link_route(&self.rtnetlink.handle, route)));
            try_join!(neighbour.err_into(), routed.err_into())
        });
        // The kernel gets them one after another, in this order, without waiting for each answer.
        let linked = async {
            try_join!(
                links.set_up("lo", LOOPBACK_INDEX),
                try_join_all(addressed),
                links.set_up(ifname, index)
            )
        };
        try_join!(linked.err_into::<AttachError>(), try_join_all(reached))?;
        Ok(())
    }

    pub(super) fn links(&self) -> Links {
        Links::new(self.rtnetlink.handle.clone())
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

    /// The pair, both ends down, the peer already in the pod's namespace.
    pub(super) async fn make_pair(
        &self,
        attachment: &Attachment,
        netns: &Netns,
        mtu_bytes: u32,
    ) -> Result<(), LinkError> {
        let pair = VethPair {
            name: &attachment.link,
            mac: POD_GATEWAY_MAC,
            peer_name: &attachment.ifname,
            peer_mac: pod_mac(&attachment.link),
            peer_netns: netns,
            mtu_bytes,
        };
        self.links().add_veth(&pair).await
    }

    /// The host's side of an existing link but for its routes: nothing is led to the pod yet. Does nothing that is done
    /// already. Returns the link's index.
    pub(super) async fn ensure_host_side(
        &self,
        link: &str,
        leases: &LeaseRecords,
    ) -> Result<u32, AttachError> {
        let links = self.links();
        let index = links.index(link).await?;
        LinkSysctls::of_host(false).set(link, &HOST_IPV4)?;
        if leases.values().any(|lease| !lease.host_ports.is_empty()) {
            LinkSysctls::of_host(false).set(link, &HOST_PORT_IPV4)?;
        }
        let mac = pod_mac(link);
        let neighbours = leases.keys().map(|address| links.ensure_neighbour(link, index, *address, mac));
        let has_ipv6 = leases.keys().any(IpAddr::is_ipv6);
        if has_ipv6 {
            LinkSysctls::of_host(true).set(link, &HOST_IPV6)?;
        }
        let gateway = has_ipv6.then(|| IpNet::new_assert(POD_GATEWAY_V6.into(), 64));
        let addressed = gateway.into_iter().map(|gateway| links.ensure_address(link, index, gateway));
        try_join!(try_join_all(addressed), links.set_up(link, index), try_join_all(neighbours))?;
        Ok(index)
    }

    /// From now on the node leads packets to the pod.
    pub(super) async fn ensure_host_routes(
        &self,
        index: u32,
        leases: &LeaseRecords,
        node: &NodeView,
    ) -> Result<(), AttachError> {
        let routes: Vec<_> = leases.keys().map(|address| host_route(index, *address, node)).collect();
        let put = routes.iter().map(|route| ensure_link_route(&self.netlink.handle, route));
        try_join_all(put).await?;
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
