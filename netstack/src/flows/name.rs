//! Names for what the kernel tells: whose addresses, which Service, which policy. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use weft_model::ids::SliceKey;
use weft_model::objects::{EndpointSlice, Protocol, Service, ServiceKind, ServicePort};
use weft_model::snapshot::{Objects, changes};
use weft_model::{ServiceKey, SharedMap, Snapshot};

use super::record::{End, Record, Verdict};
use crate::kernel::conntrack::Flow;
use crate::kernel::nflog::Copied;
use crate::policy::{Judge, Ruling, TOLD_OF_SERVICE};

/// A destination, with the IANA number of the protocol.
type Called = (SocketAddr, u8);

/// All that names come from.
#[derive(Clone)]
pub(super) struct Names {
    judge: Arc<Judge>,
    services: Arc<Services>,
}

/// Services by what is called. What is behind them is looked for when a denied packet asks, which is seldom: an index of
/// every endpoint of a big cluster would cost more than it gives.
#[derive(Clone, Default)]
struct Services {
    /// Addresses at which NodePorts answer.
    nodes: Vec<IpAddr>,
    all: Objects<ServiceKey, Service>,
    slices: Objects<SliceKey, EndpointSlice>,
    fronts: SharedMap<(Called, ServiceKey), ()>,
}

impl Names {
    pub(super) fn of(snapshot: &Snapshot, judge: Arc<Judge>, known: Option<Self>) -> Self {
        let mut services = known.map(|known| known.services).unwrap_or_default();
        Arc::make_mut(&mut services).follow(snapshot);
        Self { judge, services }
    }

    /// A packet that the rules drop, as they saw it.
    pub(super) fn denied(&self, packet: &Copied, millis: i64) -> Option<Record> {
        let (source, to) = (packet.source.ip(), packet.destination);
        let (direction, decided_by) = match self.judge.ruling(source, to.ip(), packet.protocol, to.port()) {
            _ if packet.mid_stream => (None, MID_STREAM.to_owned()),
            Ruling::Denied { direction, subject, policies } => {
                let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
                let (name, pod) = (direction.name(), self.title(subject));
                let text = format!("{name} of {pod}: isolated by {}, no rule allows it", names.join(", "));
                (Some(direction), text)
            }
            Ruling::Allowed { .. } => (None, CHANGED.to_owned()),
        };
        let behind = || self.services.behind(to, packet.protocol);
        let service = self.services.called(to, packet.protocol);
        let service = service.or_else(|| (packet.prefix == TOLD_OF_SERVICE).then(behind).flatten());
        let (source, destination) = (self.end(source), self.end(to.ip()));
        Some(Record {
            time: time(millis)?,
            verdict: Verdict::Denied,
            source,
            destination,
            protocol: protocol_name(packet.protocol),
            port: port(packet.protocol, to),
            service,
            direction,
            decided_by,
        })
    }

    /// A connection that the rules let through; `None` for one that no pod has part in.
    pub(super) fn allowed(&self, flow: &Flow, millis: i64) -> Option<Record> {
        let (source, to) = (flow.original.source.ip(), flow.reply.source);
        let decided_by = match self.judge.ruling(source, to.ip(), flow.protocol, to.port()) {
            Ruling::Allowed { by } if by.is_empty() => "no policy".to_owned(),
            Ruling::Allowed { by } => by.join(", "),
            Ruling::Denied { .. } => CHANGED.to_owned(),
        };
        let (source, destination) = (self.end(source), self.end(to.ip()));
        if source.pod.is_none() && destination.pod.is_none() {
            return None;
        }
        Some(Record {
            time: time(millis)?,
            verdict: Verdict::Allowed,
            source,
            destination,
            protocol: protocol_name(flow.protocol),
            port: port(flow.protocol, to),
            service: self.services.called(flow.original.destination, flow.protocol),
            direction: None,
            decided_by,
        })
    }

    fn end(&self, address: IpAddr) -> End {
        End { address, pod: self.judge.bearer(address).map(ToString::to_string) }
    }

    fn title(&self, address: IpAddr) -> String {
        self.judge.bearer(address).map_or_else(|| address.to_string(), ToString::to_string)
    }
}

const MID_STREAM: &str = "not the beginning of a connection: that one was cut, or began elsewhere";
/// The rules that judged it are no more.
const CHANGED: &str = "policies of before the last change";

fn time(millis: i64) -> Option<String> {
    let time = jiff::Timestamp::from_millisecond(millis).ok()?;
    Some(time.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string())
}

/// 0 for protocols without.
fn port(protocol: u8, to: SocketAddr) -> u16 {
    let has_ports = PROTOCOLS.iter().any(|known| known.number() == protocol);
    if has_ports { to.port() } else { 0 }
}

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn protocol_name(number: u8) -> String {
    let known = PROTOCOLS.iter().find(|protocol| protocol.number() == number).map(|protocol| protocol.name());
    match (known, number) {
        (Some(name), _) => name.to_owned(),
        (None, 1) => "icmp".to_owned(),
        (None, 58) => "icmpv6".to_owned(),
        (None, other) => other.to_string(),
    }
}

impl Services {
    /// Looks at the Services that changed.
    fn follow(&mut self, snapshot: &Snapshot) {
        let nodes = snapshot.own_node().map(|node| node.internal_ips.clone()).unwrap_or_default();
        if nodes != self.nodes {
            *self = Self { nodes, ..Self::default() };
        }
        let before = std::mem::replace(&mut self.all, snapshot.services.clone());
        for (key, old, new) in changes(&before, &self.all) {
            for front in old.into_iter().flat_map(|service| fronts(service, &self.nodes)) {
                self.fronts.remove(&(front, key.clone()));
            }
            for front in new.into_iter().flat_map(|service| fronts(service, &self.nodes)) {
                self.fronts.insert((front, key.clone()), ());
            }
        }
        self.slices = snapshot.endpoint_slices.clone();
    }

    /// The Service that has this address and port of its own.
    fn called(&self, front: SocketAddr, protocol: u8) -> Option<String> {
        let called = (front, protocol);
        let ((of, key), ()) = self.fronts.range((called, ServiceKey::new("", ""))..).next()?;
        (*of == called).then(|| key.to_string())
    }

    /// The Services of an endpoint; `None` for what is behind none.
    fn behind(&self, endpoint: SocketAddr, protocol: u8) -> Option<String> {
        let is_behind = |slice: &&Arc<EndpointSlice>| {
            let mut ports = slice.ports.iter();
            ports.any(|port| port.port == endpoint.port() && port.protocol.number() == protocol)
                && slice.endpoints.iter().any(|one| one.address == endpoint.ip())
        };
        let services: BTreeSet<&ServiceKey> =
            self.slices.values().filter(is_behind).map(|slice| &slice.service).collect();
        let names: Vec<String> = services.into_iter().map(ToString::to_string).collect();
        (!names.is_empty()).then(|| names.join(" or "))
    }
}

/// Where a Service answers.
fn fronts(service: &Service, nodes: &[IpAddr]) -> Vec<Called> {
    let own = match &service.kind {
        ServiceKind::ClusterIps(ips) => ips.as_slice(),
        ServiceKind::Headless | ServiceKind::ExternalName(_) => &[],
    };
    let addresses = [own, &service.load_balancer_ips, &service.external_ips].concat();
    let of_port = |port: &ServicePort| {
        let number = port.protocol.number();
        let vips = addresses.iter().map(|ip| SocketAddr::new(*ip, port.port));
        let node_port = |node_port| nodes.iter().map(move |ip| SocketAddr::new(*ip, node_port));
        let node_ports = port.node_port.into_iter().flat_map(node_port);
        vips.chain(node_ports).map(|front| (front, number)).collect::<Vec<Called>>()
    };
    service.ports.iter().flat_map(of_port).collect()
}
