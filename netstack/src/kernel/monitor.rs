//! What the kernel tells of links, addresses and routes while it happens (rtnetlink(7), multicast groups), but for what comes and goes with
//! each pod: its link and the link-local addresses there. That is most of it, and nobody follows it.

use std::io;

use futures::stream::{self, BoxStream, StreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload, NlasIterator};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use weft_model::constants::POD_LINK_PREFIX;

/// Under memory pressure the kernel drops some. Ends when the socket does.
pub(super) type Messages = BoxStream<'static, RouteNetlinkMessage>;

/// Why a task ended that follows them.
pub(super) const ENDED: &str = "the rtnetlink monitor ended";
/// One datagram of the kernel's holds one message, of some KB at most.
const DATAGRAM_BYTES: usize = 32 << 10;
/// Of `struct ifinfomsg`; attributes follow.
const LINK_HEADER_BYTES: usize = 16;
/// `ifa_scope` in `struct ifaddrmsg`.
const ADDRESS_SCOPE_AT: usize = 3;

/// The messages from now on. Of the calling thread's namespace; must be called within a tokio runtime.
///
/// # Errors
/// When the kernel gives no socket.
pub(super) fn open(groups: &[MulticastGroup]) -> io::Result<Messages> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    let groups = groups.iter().fold(0, |all, group| all | 1 << (*group as u32 - 1));
    socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
    let datagram = Vec::with_capacity(DATAGRAM_BYTES);
    let messages = stream::unfold((socket, datagram), |(mut socket, mut datagram)| async move {
        let message = next(&mut socket, &mut datagram).await?;
        Some((message, (socket, datagram)))
    });
    Ok(messages.boxed())
}

async fn next(socket: &mut TokioSocket, datagram: &mut Vec<u8>) -> Option<RouteNetlinkMessage> {
    loop {
        datagram.clear();
        match socket.recv(datagram).await {
            Ok(()) => {
                if let Some(message) = read(datagram) {
                    return Some(message);
                }
            }
            // Some were dropped; the next are told again.
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
            Err(error) => {
                tracing::warn!(%error, "follow links, addresses and routes");
                return None;
            }
        }
    }
}

/// `None` of what nobody follows, and of what cannot be read.
fn read(datagram: &[u8]) -> Option<RouteNetlinkMessage> {
    let raw = NetlinkBuffer::new_checked(datagram).ok()?;
    if is_of_pod(raw.message_type(), raw.payload()) {
        return None;
    }
    match NetlinkMessage::deserialize(datagram).ok()?.payload {
        NetlinkPayload::InnerMessage(message) => Some(message),
        _ => None,
    }
}

/// Told from the first bytes: a whole message about a link takes long to read.
fn is_of_pod(kind: u16, payload: &[u8]) -> bool {
    match kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            let attributes = NlasIterator::new(payload.get(LINK_HEADER_BYTES..).unwrap_or_default());
            let mut names = attributes.flatten().filter(|attribute| attribute.kind() == libc::IFLA_IFNAME);
            names.next().is_some_and(|name| name.value().starts_with(POD_LINK_PREFIX.as_bytes()))
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => payload.get(ADDRESS_SCOPE_AT) == Some(&libc::RT_SCOPE_LINK),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use netlink_packet_route::link::LinkAttribute;
    use tokio::time::timeout;

    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    #[test]
    fn links_and_their_addresses_are_told_but_those_of_pods() {
        if !needs_root() {
            return;
        }
        let node = NamedNetns::new("node");
        node.block_on(async {
            use MulticastGroup::{Ipv4Ifaddr, Ipv4Route, Ipv6Ifaddr, Ipv6Route, Link};
            let mut messages = open(&[Ipv4Route, Ipv6Route, Link, Ipv4Ifaddr, Ipv6Ifaddr]).unwrap();
            for name in ["weftp1", "up0"] {
                node.must(&["ip", "link", "add", name, "type", "veth", "peer", "name", &format!("{name}x")]);
                node.must(&["ip", "link", "set", name, "up"]);
            }
            node.must(&["ip", "addr", "add", "192.0.2.1/24", "dev", "up0"]);
            node.must(&["ip", "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
            node.must(&["ip", "route", "add", "198.51.100.0/24", "dev", "up0"]);
            node.must(&["ip", "link", "del", "weftp1"]);
            node.must(&["ip", "link", "del", "up0"]);
            let (mut links, mut addresses, mut routes, mut gone) = (Vec::new(), 0, 0, Vec::new());
            while let Ok(Some(message)) = timeout(Duration::from_millis(500), messages.next()).await {
                let name = |attributes: Vec<LinkAttribute>| {
                    attributes.into_iter().find_map(|it| match it {
                        LinkAttribute::IfName(name) => Some(name),
                        _ => None,
                    })
                };
                match message {
                    RouteNetlinkMessage::NewLink(link) => links.extend(name(link.attributes)),
                    RouteNetlinkMessage::DelLink(link) => gone.extend(name(link.attributes)),
                    RouteNetlinkMessage::NewAddress(_) => addresses += 1,
                    RouteNetlinkMessage::NewRoute(_) => routes += 1,
                    _ => {}
                }
            }
            links.dedup();
            assert!(
                links.contains(&"up0".to_owned()) && links.iter().all(|name| name.starts_with("up0")),
                "{links:?}"
            );
            assert!(
                gone.contains(&"up0".to_owned()) && gone.iter().all(|name| name.starts_with("up0")),
                "{gone:?}"
            );
            assert_eq!(addresses, 2);
            assert!(routes >= 1);
        });
    }
}
