//! rtnetlink without a runtime, for what the kernel does at once: the requests of a list go in one message, are worked off inside
//! `send`, one after another, and only what fails is answered, and the last.
//!
//! In: a namespace (a socket stays where it was opened, whichever thread uses it) and [`Requests`]. Out: links as they should be, or the
//! first refusal, which names its request.
//!
//! Source: rtnetlink(7), `linux/rtnetlink.h`, `linux/ip.h`.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_route::AddressFamily as Family;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{AfSpecInet, AfSpecUnspec, InfoData, InfoVeth, LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteType;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_ERROR,
    NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::link::{Link, LinkError, address_message, lower};
use super::netns::Netns;
use super::route::LinkRoute;

/// The kernel answers before `send` returns; a socket that is silent never answers.
const SILENCE_SECONDS: i64 = 10;
/// An answer about one link has 1.5 KB.
const ANSWER_BYTES: usize = 16 << 10;
/// linkwatch needs well under a millisecond, or a second when it is rate-limited.
const CARRIER_POLL: Duration = Duration::from_millis(1);
const CARRIER_PATIENCE: Duration = Duration::from_secs(5);
/// `IFLA_INET_CONF`.
const INET_CONF: u16 = 1;

/// IPv4 settings of one link, `/proc/sys/net/ipv4/conf/LINK/...`, by their numbers in netlink (`IPV4_DEVCONF_...`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Ipv4Setting {
    Forwarding = 1,
    ProxyArp = 3,
    AcceptRedirects = 4,
    SendRedirects = 6,
    RpFilter = 8,
    RouteLocalnet = 26,
}

/// A veth pair to be made: `name` here, `peer_name` in `peer_netns`. Both ends are down.
#[derive(Debug)]
pub struct VethPair<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
    pub peer_name: &'a str,
    pub peer_mac: [u8; 6],
    pub peer_netns: &'a Netns,
    pub mtu_bytes: u32,
}

/// What is to be done, in this order. Each names its link for the error.
#[derive(Debug, Default)]
pub struct Requests {
    message: Vec<u8>,
    /// Operation and link of each request; its place is its sequence number less one.
    named: Vec<(&'static str, String)>,
    /// Where the last one begins.
    last: usize,
}

impl Requests {
    /// Both ends at once, so that the peer is never seen in this namespace.
    pub fn add_veth(&mut self, pair: &VethPair<'_>) {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(pair.peer_name)
            .mtu(pair.mtu_bytes)
            .address(pair.peer_mac.to_vec())
            .setns_by_fd(pair.peer_netns.as_raw_fd())
            .build();
        let link = LinkVeth::new(pair.name, pair.peer_name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .mtu(pair.mtu_bytes)
            .address(pair.mac.to_vec())
            .build();
        self.add("create veth", pair.name, NLM_F_CREATE | NLM_F_EXCL, RouteNetlinkMessage::NewLink(link));
    }

    pub fn set_up(&mut self, name: &str, index: u32) {
        self.set("set up", name, LinkUnspec::new_with_index(index).up().build());
    }

    /// One request: the kernel sets the link up and then these, and lets nobody else change it meanwhile.
    pub fn set_up_with(&mut self, name: &str, index: u32, settings: &[(Ipv4Setting, u32)]) {
        let mut link = LinkUnspec::new_with_index(index).up().build();
        let mut values = Vec::with_capacity(settings.len() * 8);
        for (setting, value) in settings {
            // `struct rtattr` of eight bytes with the value.
            values.extend(8u16.to_ne_bytes());
            values.extend((*setting as u16).to_ne_bytes());
            values.extend(value.to_ne_bytes());
        }
        let inet = AfSpecUnspec::Inet(vec![AfSpecInet::Other(DefaultNla::new(INET_CONF, values))]);
        link.attributes.push(LinkAttribute::AfSpecUnspec(vec![inet]));
        self.set("set up", name, link);
    }

    fn set(&mut self, operation: &'static str, name: &str, link: LinkMessage) {
        self.add(operation, name, 0, RouteNetlinkMessage::SetLink(link));
    }

    /// Adds or keeps an address. IPv6 without duplicate-address detection, so that it is usable at once.
    pub fn ensure_address(&mut self, name: &str, index: u32, address: IpNet) {
        let message = address_message(index, address);
        let operation = "add an address to";
        self.add(operation, name, NLM_F_CREATE | NLM_F_REPLACE, RouteNetlinkMessage::NewAddress(message));
    }

    /// A permanent neighbour: `address` is always at `mac`, never asked for.
    pub fn ensure_neighbour(&mut self, name: &str, index: u32, address: IpAddr, mac: [u8; 6]) {
        let (family, destination) = match address {
            IpAddr::V4(address) => (Family::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (Family::Inet6, NeighbourAddress::Inet6(address)),
        };
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unspec;
        message.attributes.push(NeighbourAttribute::Destination(destination));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let operation = "add a neighbour to";
        self.add(operation, name, NLM_F_CREATE | NLM_F_REPLACE, RouteNetlinkMessage::NewNeighbour(message));
    }

    /// Adds the route, or replaces one with the same destination.
    pub fn ensure_route(&mut self, route: &LinkRoute) {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.add("add route", &route.to_string(), flags, RouteNetlinkMessage::NewRoute(route.message()));
    }

    fn add(&mut self, operation: &'static str, link: &str, flags: u16, request: RouteNetlinkMessage) {
        self.named.push((operation, link.to_owned()));
        self.last = self.message.len();
        append(&mut self.message, self.named.len(), flags, request);
    }
}

fn append(message: &mut Vec<u8>, sequence: usize, flags: u16, request: RouteNetlinkMessage) {
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | flags;
    request.header.sequence_number = u32::try_from(sequence).unwrap_or(u32::MAX);
    request.finalize();
    let at = message.len();
    // Attributes are padded to four bytes, and so is the whole (NLMSG_ALIGN).
    message.resize(at + request.buffer_len().next_multiple_of(4), 0);
    request.serialize(&mut message[at..]);
}

/// A socket to the kernel's links, addresses and routes of one namespace.
#[derive(Debug)]
pub struct Rtnl {
    fd: OwnedFd,
}

impl Rtnl {
    /// In the namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(SILENCE_SECONDS, 0))?;
        Ok(Self { fd })
    }

    /// Errors: the first refusal. What came after it has been tried nonetheless.
    pub fn apply(&self, mut requests: Requests) -> Result<(), LinkError> {
        let Some((operation, link)) = requests.named.last() else { return Ok(()) };
        let failed = |source: io::Error| LinkError { operation, link: link.clone(), source };
        let mut last = NetlinkBuffer::new(&mut requests.message[requests.last..]);
        last.set_flags(last.flags() | NLM_F_ACK);
        send(self.fd.as_raw_fd(), &requests.message, MsgFlags::empty())
            .map_err(|errno| failed(errno.into()))?;
        let mut refused = None;
        let mut answer = [0; ANSWER_BYTES];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut answer, MsgFlags::empty());
            let length = length.map_err(|errno| failed(errno.into()))?;
            let (sequence, errno) = acknowledgement(&answer[..length]).map_err(failed)?;
            let request = usize::try_from(sequence).ok().and_then(|n| n.checked_sub(1));
            let Some((operation, link)) = request.and_then(|n| requests.named.get(n)) else { continue };
            if errno != 0 && refused.is_none() {
                let source = io::Error::from_raw_os_error(-errno);
                refused = Some(LinkError { operation, link: link.clone(), source });
            }
            if request == Some(requests.named.len() - 1) {
                return refused.map_or(Ok(()), Err);
            }
        }
    }

    /// `None` when there is no such link.
    pub fn find(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let failed = |source| LinkError { operation: "find link", link: name.to_owned(), source };
        let link = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        let mut request = Vec::new();
        append(&mut request, 0, 0, RouteNetlinkMessage::GetLink(link));
        let mut answer = [0; ANSWER_BYTES];
        let asked = send(self.fd.as_raw_fd(), &request, MsgFlags::empty());
        let answered = asked.and_then(|_| recv(self.fd.as_raw_fd(), &mut answer, MsgFlags::empty()));
        let length = answered.map_err(|errno| failed(errno.into()))?;
        let unreadable = |error| failed(io::Error::new(io::ErrorKind::InvalidData, error));
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer[..length]);
        match answer.map_err(unreadable)?.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(lower(&link)),
            NetlinkPayload::Error(error) => match error.to_io() {
                missing if missing.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                source => Err(failed(source)),
            },
            _ => Err(failed(io::ErrorKind::InvalidData.into())),
        }
    }

    /// The index of a link that must be there.
    pub fn index(&self, name: &str) -> Result<u32, LinkError> {
        self.find(name)?.map(|link| link.index).ok_or_else(|| LinkError::missing("find link", name))
    }

    /// Waits until the link carries packets. The end of a veth pair that was set up first gets its carrier from a
    /// deferred task of the kernel (linkwatch, up to a second later) and drops what is sent before.
    pub async fn wait_until_running(&self, name: &str) -> Result<(), LinkError> {
        let mut waited = Duration::ZERO;
        loop {
            match self.find(name)? {
                None => return Err(LinkError::missing("wait for", name)),
                Some(link) if link.running => return Ok(()),
                Some(_) if waited >= CARRIER_PATIENCE => {
                    let source = io::Error::from(io::ErrorKind::TimedOut);
                    let operation = "wait for the carrier of";
                    return Err(LinkError { operation, link: name.to_owned(), source });
                }
                Some(_) => tokio::time::sleep(CARRIER_POLL).await,
            }
            waited += CARRIER_POLL;
        }
    }
}

/// Sequence number of the request, and 0 or a negative error number.
fn acknowledgement(answer: &[u8]) -> io::Result<(u32, i32)> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let answer = NetlinkBuffer::new_checked(answer).map_err(|_| invalid())?;
    let errno = answer.payload().first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    match errno {
        Some(errno) if answer.message_type() == NLMSG_ERROR => Ok((answer.sequence_number(), errno)),
        _ => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

    fn pair<'a>(netns: &'a Netns, name: &'a str) -> VethPair<'a> {
        VethPair { name, mac: MAC, peer_name: "eth0", peer_mac: MAC, peer_netns: netns, mtu_bytes: 1380 }
    }

    fn made(rtnl: &Rtnl, netns: &Netns) -> Result<(), LinkError> {
        let mut requests = Requests::default();
        requests.add_veth(&pair(netns, "weftp1"));
        rtnl.apply(requests)
    }

    #[test]
    fn a_veth_peer_is_born_in_the_other_namespace_and_comes_up_with_its_settings() {
        if !needs_root() {
            return;
        }
        let (node, pod) = (NamedNetns::new("node"), NamedNetns::new("pod"));
        node.block_on(async {
            let netns = Netns::open(pod.path()).unwrap();
            let (host, inside) = (Rtnl::open().unwrap(), netns.run(Rtnl::open).unwrap().unwrap());
            made(&host, &netns).unwrap();
            let peer = inside.find("eth0").unwrap().unwrap();
            assert_eq!((peer.mac.as_slice(), peer.mtu_bytes, peer.up), (MAC.as_slice(), 1380, false));
            assert_eq!(host.find("eth0").unwrap(), None);

            let mut requests = Requests::default();
            requests.set_up("eth0", peer.index);
            inside.apply(requests).unwrap();
            let mut requests = Requests::default();
            let index = host.index("weftp1").unwrap();
            let settings = [
                (Ipv4Setting::Forwarding, 1),
                (Ipv4Setting::ProxyArp, 1),
                (Ipv4Setting::AcceptRedirects, 0),
                (Ipv4Setting::SendRedirects, 0),
                (Ipv4Setting::RpFilter, 1),
                (Ipv4Setting::RouteLocalnet, 1),
            ];
            requests.set_up_with("weftp1", index, &settings);
            for text in ["fd00::1/128", "10.0.0.1/32"] {
                let address: IpNet = text.parse().unwrap();
                requests.ensure_address("weftp1", index, address);
                requests.ensure_address("weftp1", index, address);
                requests.ensure_neighbour("weftp1", index, address.addr(), MAC);
            }
            host.apply(requests).unwrap();
            for (name, value) in [
                ("forwarding", "1"),
                ("proxy_arp", "1"),
                ("accept_redirects", "0"),
                ("send_redirects", "0"),
                ("rp_filter", "1"),
                ("route_localnet", "1"),
            ] {
                let path = format!("/proc/sys/net/ipv4/conf/weftp1/{name}");
                assert_eq!(std::fs::read_to_string(path).unwrap().trim(), value, "{name}");
            }
            host.wait_until_running("weftp1").await.unwrap();
            inside.wait_until_running("eth0").await.unwrap();
        });
    }

    #[test]
    fn the_first_refusal_names_its_request_and_the_rest_is_done() {
        if !needs_root() {
            return;
        }
        let (node, pod) = (NamedNetns::new("node"), NamedNetns::new("pod"));
        node.block_on(async {
            let netns = Netns::open(pod.path()).unwrap();
            let host = Rtnl::open().unwrap();
            made(&host, &netns).unwrap();
            let error = made(&host, &netns).unwrap_err();
            assert_eq!(crate::reconcile::chain(&error), "create veth weftp1: File exists (os error 17)");

            let mut requests = Requests::default();
            requests.set_up("weftp1", host.index("weftp1").unwrap());
            requests.set_up("nowhere", 4711);
            requests.ensure_neighbour("nowhere", 4711, "fd00::1".parse().unwrap(), MAC);
            requests.set_up("lo", 1);
            let error = host.apply(requests).unwrap_err();
            assert_eq!(crate::reconcile::chain(&error), "set up nowhere: No such device (os error 19)");
            assert!(host.find("weftp1").unwrap().unwrap().up && host.find("lo").unwrap().unwrap().up);
            host.apply(Requests::default()).unwrap();
        });
    }
}
