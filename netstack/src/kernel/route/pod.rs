//! Routes of CNI: to pods on their links, and inside pods by their gateways.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType,
};

use super::RouteError;
use super::kernel_view::{base_message, destination, dump, ip, output};
use crate::kernel::link::cause;

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

/// Adds the route, or replaces one with the same destination.
pub async fn ensure_link_route(handle: &rtnetlink::Handle, route: &LinkRoute) -> Result<(), RouteError> {
    let put = handle.route().add(message(route)).replace().execute().await;
    put.map_err(|error| RouteError::Route {
        operation: "add",
        route: format!(
            "{}{}{}",
            route.destination,
            route.gateway.map_or(String::new(), |gateway| format!(" via {gateway}")),
            route.source.map_or(String::new(), |source| format!(" src {source}")),
        ),
        source: cause(error),
    })
}

fn message(route: &LinkRoute) -> RouteMessage {
    let scope = if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    let mut message = base_message(route.destination, TABLE_MAIN, RouteType::Unicast, scope);
    message.attributes.push(RouteAttribute::Oif(route.link_index));
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if let Some(gateway) = route.gateway {
        message.header.flags |= RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    message
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
