//! Between our [`Route`]s and rules and the kernel's messages, both ways. Pure, but for the two dumps.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::IpVersion;
use weft_model::constants::{POD_LINK_PREFIX, ROUTE_PROTOCOL};
use weft_model::route::{Route, RouteTarget, SourceRule};

use super::RouteError;
use crate::kernel::link::{LinkError, Links, cause};

pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(ROUTE_PROTOCOL);
const TABLE_MAIN: u32 = 254;
const TABLE_LOCAL: u32 = 255;
/// What the kernel gives an IPv6 route that asks for no metric (`IP6_RT_PRIO_USER`).
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// Link names and indexes of one moment.
pub(super) struct LinkIndexes {
    by_name: BTreeMap<String, u32>,
    by_index: BTreeMap<u32, String>,
}

impl LinkIndexes {
    pub(super) async fn observe(links: &Links) -> Result<Self, LinkError> {
        let links = links.list().await?;
        Ok(Self {
            by_name: links.iter().map(|link| (link.name.clone(), link.index)).collect(),
            by_index: links.into_iter().map(|link| (link.index, link.name)).collect(),
        })
    }
}

/// What the kernel distinguishes routes by: destination, table, effective metric.
pub(super) type Key = (IpNet, u32, u32);

pub(super) fn key(route: &Route) -> Key {
    (route.destination.trunc(), table(route), metric(route.destination, route.metric))
}

fn table(route: &Route) -> u32 {
    route.table.unwrap_or(match route.target {
        RouteTarget::Local => TABLE_LOCAL,
        RouteTarget::Link(_) | RouteTarget::Unreachable => TABLE_MAIN,
    })
}

fn metric(destination: IpNet, metric: Option<u32>) -> u32 {
    let default = if destination.addr().is_ipv6() { IPV6_DEFAULT_METRIC } else { 0 };
    metric.filter(|metric| *metric != 0).unwrap_or(default)
}

/// A route of our protocol in the kernel; `lowered` is `None` when it has a shape that we never make.
pub(super) struct Seen {
    pub(super) message: RouteMessage,
    lowered: Option<Lowered>,
}

struct Lowered {
    key: Key,
    target: RouteTarget,
    source: Option<IpAddr>,
    mtu_bytes: Option<u32>,
}

impl Seen {
    pub(super) fn key(&self) -> Option<Key> {
        self.lowered.as_ref().map(|lowered| lowered.key)
    }

    pub(super) fn is(&self, route: &Route) -> bool {
        self.lowered.as_ref().is_some_and(|Lowered { key, target, source, mtu_bytes }| {
            (*key, target, *source, *mtu_bytes)
                == (self::key(route), &route.target, route.source, route.mtu_bytes)
        })
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Lowered { key: (destination, table, metric), target, source, mtu_bytes }) = &self.lowered
        else {
            return write!(f, "{:?}", self.message);
        };
        let route = Route {
            destination: *destination,
            table: Some(*table),
            target: target.clone(),
            source: *source,
            metric: Some(*metric),
            mtu_bytes: *mtu_bytes,
        };
        route.fmt(f)
    }
}

/// Every route of our protocol, in every table, but those to pod links and those to links that came after `links` were
/// listed: a pod may be attached between the two dumps, and whose link it is only the next look can tell.
pub(super) async fn routes(handle: &rtnetlink::Handle, links: &LinkIndexes) -> Result<Vec<Seen>, RouteError> {
    let mut seen = Vec::new();
    for message in dump(handle).await? {
        let index = output(&message);
        let link = index.and_then(|index| links.by_index.get(&index));
        let too_new = index.is_some() && link.is_none();
        if too_new || link.is_some_and(|name| name.starts_with(POD_LINK_PREFIX)) {
            continue;
        }
        let lowered = lower(&message, link);
        seen.push(Seen { message, lowered });
    }
    Ok(seen)
}

/// Every route of our protocol of both families.
pub(super) async fn dump(handle: &rtnetlink::Handle) -> Result<Vec<RouteMessage>, RouteError> {
    let mut all = dump_all(handle).await?;
    all.retain(|message| message.header.protocol == PROTOCOL);
    Ok(all)
}

/// Every route of both families.
pub(super) async fn dump_all(handle: &rtnetlink::Handle) -> Result<Vec<RouteMessage>, RouteError> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        let dumped: Vec<RouteMessage> = handle
            .route()
            .get(filter)
            .execute()
            .try_collect()
            .await
            .map_err(|error| RouteError::Observe { operation: "list routes", source: cause(error) })?;
        all.extend(dumped);
    }
    Ok(all)
}

pub(super) fn output(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn lower(message: &RouteMessage, link: Option<&String>) -> Option<Lowered> {
    let destination = destination(message)?;
    let mut table = u32::from(message.header.table);
    let (mut source, mut priority, mut mtu_bytes) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Priority(metric) => priority = Some(*metric),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu_bytes = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(bytes) => Some(*bytes),
                    _ => None,
                });
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
                return None;
            }
            _ => {}
        }
    }
    let target = match message.header.kind {
        RouteType::Unicast => RouteTarget::Link(link?.clone()),
        RouteType::Unreachable => RouteTarget::Unreachable,
        RouteType::Local => RouteTarget::Local,
        _ => return None,
    };
    let key = (destination, table, metric(destination, priority));
    Some(Lowered { key, target, source, mtu_bytes })
}

/// A dump leaves `RTA_DST` out of a default route.
pub(super) fn destination(message: &RouteMessage) -> Option<IpNet> {
    let given = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    let address = given.or(match message.header.address_family {
        AddressFamily::Inet => Some(Ipv4Addr::UNSPECIFIED.into()),
        AddressFamily::Inet6 => Some(Ipv6Addr::UNSPECIFIED.into()),
        _ => None,
    })?;
    IpNet::new(address, message.header.destination_prefix_length).ok()
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// `None` when the route's link is not there.
pub(super) fn route_message(route: &Route, links: &LinkIndexes) -> Option<RouteMessage> {
    let (destination, table, metric) = key(route);
    let (kind, scope, link) = match &route.target {
        RouteTarget::Link(link) => (RouteType::Unicast, RouteScope::Link, Some(link.as_str())),
        RouteTarget::Unreachable => (RouteType::Unreachable, RouteScope::Universe, None),
        RouteTarget::Local => (RouteType::Local, RouteScope::Host, Some("lo")),
    };
    let output = match link {
        Some(link) => Some(*links.by_name.get(link)?),
        None => None,
    };
    let mut message = base_message(destination, table, kind, scope);
    message.attributes.extend(output.map(RouteAttribute::Oif));
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    message.attributes.extend((metric != 0).then_some(RouteAttribute::Priority(metric)));
    let mtu = route.mtu_bytes.map(|bytes| RouteAttribute::Metrics(vec![RouteMetric::Mtu(bytes)]));
    message.attributes.extend(mtu);
    Some(message)
}

/// Our protocol number, a destination and a table; IPv6 knows no scopes and wants universe.
pub(super) fn base_message(
    destination: IpNet,
    table: u32,
    kind: RouteType,
    scope: RouteScope,
) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    let ipv6 = destination.addr().is_ipv6();
    header.address_family = family(destination);
    header.destination_prefix_length = destination.prefix_len();
    header.protocol = PROTOCOL;
    header.kind = kind;
    header.scope = if ipv6 { RouteScope::Universe } else { scope };
    if let Ok(small) = u8::try_from(table) {
        header.table = small;
    }
    message.attributes.push(RouteAttribute::Destination(destination.network().into()));
    message.attributes.push(RouteAttribute::Table(table));
    message
}

fn family(net: IpNet) -> AddressFamily {
    if net.addr().is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

/// Every rule of our protocol; the value is `None` when it has a shape that we never make.
pub(super) async fn rules(
    handle: &rtnetlink::Handle,
) -> Result<Vec<(Option<SourceRule>, RuleMessage)>, RouteError> {
    let ours = RuleAttribute::Protocol(PROTOCOL);
    let mut all = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let dumped: Vec<RuleMessage> = handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(|error| RouteError::Observe { operation: "list rules", source: cause(error) })?;
        all.extend(dumped.into_iter().filter(|message| message.attributes.contains(&ours)));
    }
    Ok(all.into_iter().map(|message| (lower_rule(&message), message)).collect())
}

fn lower_rule(message: &RuleMessage) -> Option<SourceRule> {
    if message.header.action != RuleAction::ToTable || message.header.dst_len != 0 {
        return None;
    }
    let mut table = u32::from(message.header.table);
    let (mut source, mut priority) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => source = Some(*address),
            RuleAttribute::Priority(number) => priority = Some(*number),
            RuleAttribute::Table(id) => table = *id,
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            RuleAttribute::Other(_) => {}
            _ => return None,
        }
    }
    let source = IpNet::new(source?, message.header.src_len).ok()?;
    Some(SourceRule { source, table, priority: priority? })
}

pub(super) fn rule_message(rule: &SourceRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.source);
    message.header.src_len = rule.source.prefix_len();
    message.header.action = RuleAction::ToTable;
    if let Ok(small) = u8::try_from(rule.table) {
        message.header.table = small;
    }
    message.attributes = vec![
        RuleAttribute::Source(rule.source.network()),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Protocol(PROTOCOL),
    ];
    message
}
