//! Links and their addresses over rtnetlink, within a runtime. Every error names the operation and the link. Routes stand in `route`, what CNI
//! makes for a pod in [`rtnl`](super::rtnl).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, State};
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec};

#[derive(Debug, thiserror::Error)]
#[error("{operation} {link}")]
pub struct LinkError {
    pub operation: &'static str,
    pub link: String,
    pub source: io::Error,
}

impl LinkError {
    fn new(operation: &'static str, link: &str, error: rtnetlink::Error) -> Self {
        Self { operation, link: link.to_owned(), source: cause(error) }
    }

    /// A link that must be there is not.
    pub fn missing(operation: &'static str, link: &str) -> Self {
        Self { operation, link: link.to_owned(), source: io::Error::from_raw_os_error(libc::ENODEV) }
    }

    /// The kernel's error number.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// False where the kernel knows no such link.
fn there(
    operation: &'static str,
    link: &str,
    outcome: Result<(), rtnetlink::Error>,
) -> Result<bool, LinkError> {
    match outcome.map_err(|error| LinkError::new(operation, link, error)) {
        Err(missing) if missing.errno() == Some(libc::ENODEV) => Ok(false),
        other => other.map(|()| true),
    }
}

/// The kernel's own error where there is one.
pub fn cause(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// A link as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Vec<u8>,
    pub mtu_bytes: u32,
    /// Administratively up.
    pub up: bool,
    /// Operational state UP (RFC 2863): it carries packets.
    pub running: bool,
    pub loopback: bool,
    /// Zero unless somebody set it.
    pub group: u32,
}

/// The links of one namespace.
#[derive(Clone, Debug)]
pub struct Links {
    handle: rtnetlink::Handle,
}

impl Links {
    pub fn new(handle: rtnetlink::Handle) -> Self {
        Self { handle }
    }

    pub async fn list(&self) -> Result<Vec<Link>, LinkError> {
        let messages: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| LinkError::new("list", "links", error))?;
        Ok(messages.iter().filter_map(lower).collect())
    }

    /// Links whose name begins with `prefix`, sorted by name.
    pub async fn list_by_prefix(&self, prefix: &str) -> Result<Vec<Link>, LinkError> {
        let mut links = self.list().await?;
        links.retain(|link| link.name.starts_with(prefix));
        links.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(links)
    }

    /// `None` when there is no such link.
    pub async fn find(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        match found {
            Ok(message) => Ok(message.as_ref().and_then(lower)),
            Err(error) => match LinkError::new("find link", name, error) {
                missing if missing.errno() == Some(libc::ENODEV) => Ok(None),
                other => Err(other),
            },
        }
    }

    /// The index of a link that must be there.
    pub async fn index(&self, name: &str) -> Result<u32, LinkError> {
        self.find(name).await?.map(|link| link.index).ok_or_else(|| LinkError::missing("find link", name))
    }

    pub async fn set_up(&self, name: &str, index: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| LinkError::new("set up", name, error))
    }

    pub async fn set_mtu(&self, name: &str, index: u32, mtu_bytes: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu_bytes).build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| LinkError::new("set the MTU of", name, error))
    }

    /// True when it is there.
    pub async fn set_group(&self, name: &str, group: u32) -> Result<bool, LinkError> {
        let mut message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        message.attributes.push(LinkAttribute::Group(group));
        there("set the group of", name, self.handle.link().set(message).execute().await)
    }

    /// All links of the group at once: the kernel waits for its grace periods once, not for each. True when there was one.
    pub async fn delete_group(&self, group: u32) -> Result<bool, LinkError> {
        let mut request = self.handle.link().del(0);
        request.message_mut().attributes.push(LinkAttribute::Group(group));
        there("delete links of group", &group.to_string(), request.execute().await)
    }

    /// True when it was there.
    pub async fn delete(&self, name: &str) -> Result<bool, LinkError> {
        let Some(link) = self.find(name).await? else { return Ok(false) };
        there("delete link", name, self.handle.link().del(link.index).execute().await)
    }

    /// Adds or keeps an address. IPv6 without duplicate-address detection, so that it is usable at once.
    pub async fn ensure_address(&self, name: &str, index: u32, address: IpNet) -> Result<(), LinkError> {
        let mut request = self.handle.address().add(index, address.addr(), address.prefix_len()).replace();
        *request.message_mut() = address_message(index, address);
        let added = request.execute().await;
        added.map_err(|error| LinkError::new("add an address to", name, error))
    }

    /// Addresses of the link `index` (of every link when `None`), with their link index and whether their scope is global.
    pub async fn addresses(&self, index: Option<u32>) -> Result<Vec<LinkAddress>, LinkError> {
        let request = self.handle.address().get();
        let request = match index {
            Some(index) => request.set_link_index_filter(index),
            None => request,
        };
        let messages: Vec<AddressMessage> = request
            .execute()
            .try_collect()
            .await
            .map_err(|error| LinkError::new("list addresses of", "links", error))?;
        Ok(messages.iter().filter_map(lower_address).collect())
    }
}

/// IPv6 without duplicate-address detection.
pub(super) fn address_message(index: u32, address: IpNet) -> AddressMessage {
    match address.addr() {
        IpAddr::V4(addr) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(addr, address.prefix_len()).build()
        }
        IpAddr::V6(addr) => {
            let mut message = AddressMessageBuilder::<Ipv6Addr>::new()
                .index(index)
                .address(addr, address.prefix_len())
                .build();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            message
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    pub index: u32,
    pub address: IpNet,
    pub global: bool,
    /// Usable: not tentative, not failed.
    pub usable: bool,
}

pub(super) fn lower(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        mtu_bytes: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        running: message.attributes.contains(&LinkAttribute::OperState(State::Up)),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        group: 0,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::Mtu(mtu) => link.mtu_bytes = *mtu,
            LinkAttribute::Group(group) => link.group = *group,
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

/// `IFA_LOCAL` is the address itself where both are given (point-to-point IPv4); IPv6 gives `IFA_ADDRESS` only.
fn lower_address(message: &AddressMessage) -> Option<LinkAddress> {
    let mut address = None;
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => address = address.or(Some(*other)),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(LinkAddress {
        index: message.header.index,
        address: IpNet::new(address?, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        usable: !flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netns::Rtnetlink;
    use crate::kernel::testing::{NamedNetns, needs_root};

    #[test]
    fn an_ipv6_address_is_usable_at_once_and_a_link_that_is_gone_is_no_error() {
        if !needs_root() {
            return;
        }
        let node = NamedNetns::new("node");
        node.must(&["ip", "link", "add", "weftp1", "type", "veth", "peer", "name", "weftp2"]);
        node.block_on(async {
            let host = Rtnetlink::connect().unwrap();
            let links = Links::new(host.handle.clone());
            let index = links.index("weftp1").await.unwrap();
            for text in ["fd00::1/128", "10.0.0.1/32"] {
                let address: IpNet = text.parse().unwrap();
                links.ensure_address("weftp1", index, address).await.unwrap();
                links.ensure_address("weftp1", index, address).await.unwrap();
            }
            links.set_up("weftp1", index).await.unwrap();
            let global: Vec<_> =
                links.addresses(Some(index)).await.unwrap().into_iter().filter(|a| a.global).collect();
            assert_eq!(global.len(), 2, "{global:?}");
            assert!(global.iter().all(|a| a.usable));
            assert_eq!(links.list_by_prefix("weftp").await.unwrap().len(), 2);
            assert!(links.delete("weftp1").await.unwrap());
            assert!(!links.delete("weftp1").await.unwrap());
        });
    }
}
