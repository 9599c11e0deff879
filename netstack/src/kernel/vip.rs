//! Addresses that this node answers for without bearing them on a link: a local route (AnyIP), which makes the kernel answer ARP and
//! ping, and for IPv6 a proxy entry of the neighbour table on each link, which makes it answer neighbour solicitations (RFC 4389).
//!
//! Both stay while nobody of ours runs. They bear `constants::ROUTE_PROTOCOL_LB`, by which they are found again.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::Handle;
use weft_model::constants::ROUTE_PROTOCOL_LB;

use super::link::{Links, cause};
use super::netns::Rtnetlink;
use super::nft::answers::{AnswerRules, Answers};
use super::sysctl::Journal;
use crate::reconcile::{Applied, chain};

const PROTOCOL: RouteProtocol = RouteProtocol::Other(ROUTE_PROTOCOL_LB);
const TABLE_LOCAL: u8 = 255;
const LOOPBACK: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum VipError {
    #[error("list the addresses that this node answers for")]
    List(#[source] io::Error),
    #[error("answer for {ip}")]
    Add { ip: IpAddr, source: io::Error },
    #[error("answer for {ip}: find link {link}")]
    Link { ip: IpAddr, link: String, source: io::Error },
    #[error("answer for {ip}: set {name}")]
    Sysctl { ip: IpAddr, name: String, source: io::Error },
    #[error("stop answering for {ip}")]
    Remove { ip: IpAddr, source: io::Error },
}

/// The kernel's entries over one connection, which lives as long as this; failures as one line each.
pub struct Answering {
    netlink: Rtnetlink,
    journal: Journal,
}

impl Answering {
    /// `journal` remembers settings of links that answering needs.
    pub fn connect(journal: Journal) -> io::Result<Self> {
        Ok(Self { netlink: Rtnetlink::connect()?, journal })
    }

    /// As [`observe`].
    pub async fn observe(&self) -> Result<BTreeSet<IpAddr>, String> {
        observe(&self.netlink.handle).await.map_err(|error| chain(&error))
    }

    /// Addresses for which all entries are there.
    pub async fn complete(&self) -> Result<BTreeSet<IpAddr>, String> {
        let mut complete = self.observe().await?;
        let proxies = proxies(&self.netlink.handle).await.map_err(|error| chain(&error))?;
        let proxied: BTreeSet<IpAddr> = proxies.iter().filter_map(proxied).collect();
        complete.retain(|ip| ip.is_ipv4() || proxied.contains(ip));
        Ok(complete)
    }

    /// As [`ensure`].
    pub async fn ensure(&self, ip: IpAddr, links: &BTreeSet<String>) -> Result<(), String> {
        ensure(&self.netlink.handle, ip, links, &self.journal).await.map_err(|error| chain(&error))
    }

    /// As [`remove`].
    pub async fn remove(&self, ip: IpAddr) -> Result<bool, String> {
        remove(&self.netlink.handle, ip).await.map_err(|error| chain(&error))
    }

    /// Link-layer address of an Ethernet link.
    pub async fn mac(&self, link: &str) -> Result<[u8; 6], String> {
        let found =
            Links::new(self.netlink.handle.clone()).find(link).await.map_err(|error| chain(&error))?;
        let mac = found.and_then(|link| link.mac.try_into().ok());
        mac.ok_or_else(|| format!("link {link} is no Ethernet link"))
    }
}

/// Takes all of ours away; one line for each address and each failure.
pub async fn remove_all(handle: &Handle) -> Applied {
    let mut applied = Applied::default();
    if let Err(error) = AnswerRules::default().apply(&Answers::default()) {
        applied.failed.push(chain(&error));
    }
    match observe(handle).await {
        Err(error) => applied.failed.push(chain(&error)),
        Ok(present) => {
            for ip in present {
                match remove(handle, ip).await {
                    Ok(_) => applied.changed.push(format!("no answer for {ip}")),
                    Err(error) => applied.failed.push(chain(&error)),
                }
            }
        }
    }
    applied
}

/// Addresses of ours that the kernel answers for now.
pub async fn observe(handle: &Handle) -> Result<BTreeSet<IpAddr>, VipError> {
    Ok(routes(handle).await?.iter().filter_map(destination).collect())
}

/// Answers for `ip` on `links`; what is there already stays.
pub async fn ensure(
    handle: &Handle,
    ip: IpAddr,
    links: &BTreeSet<String>,
    journal: &Journal,
) -> Result<(), VipError> {
    for link in links.iter().filter(|_| ip.is_ipv6()) {
        ensure_proxy(handle, ip, link, journal).await?;
    }
    let added = handle.route().add(route(ip)).execute().await;
    match added.map_err(cause) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(VipError::Add { ip, source: error }),
        _ => Ok(()),
    }
}

async fn ensure_proxy(handle: &Handle, ip: IpAddr, link: &str, journal: &Journal) -> Result<(), VipError> {
    // The kernel waits at random for up to 0.8 s before it answers for another, unless told not to.
    for (name, value) in [
        (format!("net/ipv6/conf/{link}/proxy_ndp"), "1"),
        (format!("net/ipv6/neigh/{link}/proxy_delay"), "0"),
    ] {
        journal.ensure(&name, value).map_err(|source| VipError::Sysctl { ip, name, source })?;
    }
    let index = Links::new(handle.clone()).index(link).await;
    let index = index.map_err(|error| VipError::Link { ip, link: link.to_owned(), source: error.source })?;
    let mut request = handle.neighbours().add(index, ip).flags(NeighbourFlags::Proxy);
    request.message_mut().attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
    match request.execute().await.map_err(cause) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(VipError::Add { ip, source: error }),
        _ => Ok(()),
    }
}

/// False when the kernel did not answer for it.
pub async fn remove(handle: &Handle, ip: IpAddr) -> Result<bool, VipError> {
    let gone = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT));
    let mut was_there = false;
    for proxy in proxies(handle).await?.into_iter().filter(|proxy| proxied(proxy) == Some(ip)) {
        match handle.neighbours().del(proxy).execute().await.map_err(cause) {
            Err(error) if !gone(&error) => return Err(VipError::Remove { ip, source: error }),
            outcome => was_there |= outcome.is_ok(),
        }
    }
    match handle.route().del(route(ip)).execute().await.map_err(cause) {
        Err(error) if !gone(&error) => Err(VipError::Remove { ip, source: error }),
        outcome => Ok(was_there | outcome.is_ok()),
    }
}

fn route(ip: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    let net = IpNet::from(ip);
    message.header.address_family = if ip.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.destination_prefix_length = net.prefix_len();
    message.header.table = TABLE_LOCAL;
    message.header.protocol = PROTOCOL;
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    let destination = match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    message.attributes.push(RouteAttribute::Destination(destination));
    message.attributes.push(RouteAttribute::Oif(LOOPBACK));
    message
}

async fn routes(handle: &Handle) -> Result<Vec<RouteMessage>, VipError> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        let listed: Vec<RouteMessage> = handle
            .route()
            .get(filter)
            .execute()
            .try_collect()
            .await
            .map_err(|error| VipError::List(cause(error)))?;
        all.extend(listed.into_iter().filter(|message| {
            message.header.protocol == PROTOCOL && message.header.kind == RouteType::Local
        }));
    }
    Ok(all)
}

fn destination(message: &RouteMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })
}

/// Proxy entries of ours.
async fn proxies(handle: &Handle) -> Result<Vec<NeighbourMessage>, VipError> {
    let listed: Vec<NeighbourMessage> = handle
        .neighbours()
        .get()
        .proxies()
        .set_address_family(AddressFamily::Inet6)
        .execute()
        .try_collect()
        .await
        .map_err(|error| VipError::List(cause(error)))?;
    let ours =
        |message: &NeighbourMessage| message.attributes.contains(&NeighbourAttribute::Protocol(PROTOCOL));
    Ok(listed.into_iter().filter(ours).collect())
}

fn proxied(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{NamedNetns, needs_root};

    #[test]
    fn the_kernel_answers_arp_neighbour_solicitations_and_ping_until_it_is_told_to_stop() {
        if !needs_root() {
            return;
        }
        let (node, client) = (NamedNetns::new("node"), NamedNetns::new("client"));
        node.must(&["ip", "link", "add", "up0", "type", "veth", "peer", "name", "c0", "netns", &client.name]);
        for (netns, link, number) in [(&node, "up0", 1), (&client, "c0", 2)] {
            netns.must(&["ip", "addr", "add", &format!("192.0.2.{number}/24"), "dev", link]);
            netns.must(&["ip", "addr", "add", &format!("2001:db8::{number}/64"), "dev", link, "nodad"]);
            netns.must(&["ip", "link", "set", link, "up"]);
        }
        node.must(&["ip", "link", "set", "lo", "up"]);
        node.must(&["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"]);
        let ips: [IpAddr; 2] = ["192.0.2.100".parse().unwrap(), "2001:db8::100".parse().unwrap()];
        let answers = |ip: IpAddr| {
            client.exec(&["ip", "neigh", "flush", "dev", "c0"]);
            client.exec(&["ping", "-c1", "-W1", &ip.to_string()]).0
        };
        let links = BTreeSet::from(["up0".to_owned()]);
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::of(folder.path());
        let settings = || {
            let names = ["net.ipv6.conf.up0.proxy_ndp", "net.ipv6.neigh.up0.proxy_delay"];
            names.map(|name| node.must(&["sysctl", "-n", name]).trim().to_owned())
        };
        let before = settings();
        for ip in ips {
            assert!(!answers(ip));
            node.block_on(async {
                let netlink = Rtnetlink::connect().unwrap();
                ensure(&netlink.handle, ip, &links, &journal).await.unwrap();
                ensure(&netlink.handle, ip, &links, &journal).await.unwrap();
                assert_eq!(observe(&netlink.handle).await.unwrap(), BTreeSet::from([ip]));
            });
            assert!(answers(ip), "{ip}: also when nobody runs");
            node.block_on(async {
                let netlink = Rtnetlink::connect().unwrap();
                assert!(remove(&netlink.handle, ip).await.unwrap());
                assert!(!remove(&netlink.handle, ip).await.unwrap());
                assert_eq!(observe(&netlink.handle).await.unwrap(), BTreeSet::new());
            });
            assert!(!answers(ip), "{ip}");
        }
        assert_eq!(settings(), ["1", "0"]);
        let mut put_back = Applied::default();
        node.block_on(async { journal.restore(&mut put_back) });
        assert_eq!((settings(), put_back.failed), (before, vec![]));
    }
}
