//! Notices when routes of the overlay or its device go: `ip route flush`, a network manager that takes foreign routes
//! for its own, a link that somebody took down. And when an address of the node goes, for however short a time: with it go the routes
//! that have it as their source, those to the node's pods, of which the kernel says nothing.

use std::future::Future;
use std::io;
use std::time::Duration;

use futures::StreamExt as _;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteMessage, RouteType};
use rtnetlink::MulticastGroup;
use weft_model::constants::TUNNEL_LINK;

use super::kernel_view::PROTOCOL;
use crate::kernel::monitor;

/// Losses come in bursts.
const QUIET: Duration = Duration::from_millis(100);

/// A task that calls `lost` after every burst of losses. It ends only with an error.
pub fn losses(
    lost: impl Fn() + Send + 'static,
) -> io::Result<impl Future<Output = Result<(), String>> + Send + 'static> {
    use MulticastGroup::{Ipv4Ifaddr, Ipv4Route, Ipv6Ifaddr, Ipv6Route, Link};
    let groups = [Ipv4Route, Ipv6Route, Link, Ipv4Ifaddr, Ipv6Ifaddr];
    let mut messages = monitor::open(&groups)?;
    Ok(async move {
        while let Some(message) = messages.next().await {
            if is_loss(&message) {
                while let Ok(Some(_)) = tokio::time::timeout(QUIET, messages.next()).await {}
                lost();
            }
        }
        Err(monitor::ENDED.to_owned())
    })
}

fn is_loss(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::DelRoute(route) => is_of_overlay(route),
        RouteNetlinkMessage::DelAddress(address) => is_of_node(address) || is_of_tunnel(address),
        RouteNetlinkMessage::DelLink(link) => is_tunnel(link),
        RouteNetlinkMessage::NewLink(link) => is_tunnel(link) && !link.header.flags.contains(LinkFlags::Up),
        _ => false,
    }
}

/// A pod's own route goes with the pod, many times a day: the drift check is enough for the day when another takes it.
fn is_of_overlay(route: &RouteMessage) -> bool {
    let whole = matches!(route.header.destination_prefix_length, 32 | 128);
    route.header.protocol == PROTOCOL && !(whole && route.header.kind == RouteType::Unicast)
}

/// Nothing but link-local addresses stands on the links of pods.
fn is_of_node(address: &AddressMessage) -> bool {
    address.header.scope == AddressScope::Universe
}

fn is_of_tunnel(address: &AddressMessage) -> bool {
    nix::net::if_::if_nametoindex(TUNNEL_LINK).is_ok_and(|index| index == address.header.index)
}

fn is_tunnel(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|it| matches!(it, LinkAttribute::IfName(name) if name == TUNNEL_LINK))
}
