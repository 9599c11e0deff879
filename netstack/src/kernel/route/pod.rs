//! Routes of CNI: to pods on their links, and inside pods by their gateways.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType};

use super::RouteError;
use super::kernel_view::{base_message, destination, dump, output};
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

/// Every route of our protocol as (link index, destination).
pub async fn link_routes(handle: &rtnetlink::Handle) -> Result<Vec<(u32, IpNet)>, RouteError> {
    let messages = dump(handle).await?;
    Ok(messages.iter().filter_map(|message| Some((output(message)?, destination(message)?))).collect())
}
