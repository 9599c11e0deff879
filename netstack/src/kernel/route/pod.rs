//! Routes of CNI: to pods on their links, and inside pods by their gateways.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType,
};

use super::RouteError;
use super::kernel_view::{base_message, destination, dump, ip, output};

const TABLE_MAIN: u32 = 254;

/// A route in `main` with our protocol number out of a known link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkRoute {
    pub destination: IpNet,
    pub link_index: u32,
    /// Reached on the link itself, whatever the addresses say.
    pub gateway: Option<IpAddr>,
    /// Preferred source address; must be an address of this namespace.
    pub source: Option<IpAddr>,
}

impl fmt::Display for LinkRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.destination)?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))?;
        self.source.map_or(Ok(()), |source| write!(f, " src {source}"))
    }
}

impl LinkRoute {
    pub(in crate::kernel) fn message(&self) -> RouteMessage {
        let scope = if self.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
        let mut message = base_message(self.destination, TABLE_MAIN, RouteType::Unicast, scope);
        message.attributes.push(RouteAttribute::Oif(self.link_index));
        message.attributes.extend(self.source.map(|source| RouteAttribute::PrefSource(source.into())));
        if let Some(gateway) = self.gateway {
            message.header.flags |= RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        message
    }
}

/// Every route of our protocol that leaves by a link.
pub async fn link_routes(handle: &rtnetlink::Handle) -> Result<Vec<LinkRoute>, RouteError> {
    Ok(dump(handle).await?.iter().filter_map(lower).collect())
}

fn lower(message: &RouteMessage) -> Option<LinkRoute> {
    let find = |wanted: fn(&RouteAttribute) -> Option<&RouteAddress>| {
        message.attributes.iter().find_map(wanted).and_then(ip)
    };
    Some(LinkRoute {
        destination: destination(message)?,
        link_index: output(message)?,
        gateway: find(|attribute| match attribute {
            RouteAttribute::Gateway(address) => Some(address),
            _ => None,
        }),
        source: find(|attribute| match attribute {
            RouteAttribute::PrefSource(address) => Some(address),
            _ => None,
        }),
    })
}
