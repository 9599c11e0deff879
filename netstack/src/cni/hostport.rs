//! `hostPort`: ports of the node that lead to one of its pods. Pure.
//!
//! ```text
//!  prerouting, output (-104)  to an address of this node: hostIP . proto . port, else proto . port -> pod . port
//!  postrouting (95)           from the pod itself, or from loopback: masquerade, so that the answer comes back here
//! ```
//!
//! Part of table `weft-cni`. Meaning: as the `portmap` plugin, which the kubelet's runtimes know by the capability
//! `portMappings` (CNI conventions, "Dynamic Plugin specific fields"): no hostIP means every address of the node of
//! either family, an unspecified one every address of its family. The client's address is kept. `[::1]` leads nowhere: the
//! kernel routes no answer to it that comes from another link.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use weft_model::constants::{POD_LINK_PREFIX, PRIORITY_HOSTPORT, PRIORITY_SNAT};
use weft_model::objects::Protocol;
use weft_model::ruleset::{
    Base, Chain, ChainKind, Datum, ElementData, Field, Hook, KeyType, Rule, Set, SetData, Statement, Table,
    Verdict,
};
use weft_plugin::wire::{CniError, Code, lower_case};

use crate::kernel::conntrack::Flow;
use crate::store::{HostPort, Lease, LeaseRecords};

const PORTS: [&str; 2] = ["hostports4", "hostports6"];
const ADDRESS_PORTS: [&str; 2] = ["hostport-ips4", "hostport-ips6"];
const HAIRPIN: [&str; 2] = ["hostport-hairpin4", "hostport-hairpin6"];
/// Every map from host ports to pods.
pub(super) const MAPS: [&str; 4] = [PORTS[0], PORTS[1], ADDRESS_PORTS[0], ADDRESS_PORTS[1]];
const CHAIN: &str = "hostports";

/// An entry of `runtimeConfig.portMappings`, its names in lower case.
#[derive(Default, Deserialize)]
#[serde(default)]
struct PortMapping {
    #[serde(rename = "hostport")]
    host_port: i64,
    #[serde(rename = "containerport")]
    container_port: i64,
    protocol: String,
    #[serde(rename = "hostip")]
    host_ip: String,
}

/// What the runtime asks for, sorted; ports of the container without a hostPort are left out.
pub(super) fn requested(config: &Value) -> Result<Vec<HostPort>, CniError> {
    let Some(mappings) = config.pointer("/runtimeConfig/portMappings").filter(|value| !value.is_null())
    else {
        return Ok(Vec::new());
    };
    let mappings: Vec<PortMapping> =
        Deserialize::deserialize(lower_case(mappings)).map_err(|error| invalid(error.to_string()))?;
    let wanted = mappings.iter().filter(|mapping| mapping.host_port != 0);
    let mut ports = wanted.map(lower).collect::<Result<Vec<_>, _>>()?;
    ports.sort_unstable();
    ports.dedup();
    let same = |pair: &[HostPort]| {
        (pair[0].protocol, pair[0].host_ip, pair[0].host_port)
            == (pair[1].protocol, pair[1].host_ip, pair[1].host_port)
    };
    match ports.windows(2).find(|pair| same(pair)) {
        None => Ok(ports),
        Some(pair) => Err(invalid(format!("{} is asked for twice", text(&pair[0])))),
    }
}

fn lower(mapping: &PortMapping) -> Result<HostPort, CniError> {
    let port = |field: &str, value: i64| {
        let port = u16::try_from(value).ok().filter(|port| *port != 0);
        port.ok_or_else(|| invalid(format!("{field} {value} is no port, which is 1 to 65535")))
    };
    let protocol = match mapping.protocol.to_ascii_lowercase().as_str() {
        "" | "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(invalid(format!("protocol {other:?} is none of tcp, udp, sctp"))),
    };
    let host_ip = match mapping.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid(format!("hostIP {text:?} is no IP address")))?),
    };
    Ok(HostPort {
        protocol,
        host_ip,
        host_port: port("hostPort", mapping.host_port)?,
        container_port: port("containerPort", mapping.container_port)?,
    })
}

fn invalid(what: String) -> CniError {
    CniError::new(Code::InvalidConfig, format!("runtimeConfig.portMappings: {what}"))
}

/// Those of `ports` that lead to a pod address of this family.
pub(super) fn of_family(ports: &[HostPort], ipv6: bool) -> Vec<HostPort> {
    let fits = |port: &&HostPort| port.host_ip.is_none_or(|ip| ip.is_ipv6() == ipv6);
    ports.iter().filter(fits).copied().collect()
}

/// Why a pod cannot have these ports on this node: another one has them, or Weft itself.
pub(super) fn refusal(ports: &[HostPort], leases: &LeaseRecords, wireguard_port: u16) -> Option<CniError> {
    let of_tunnel = |port: &&HostPort| (port.protocol, port.host_port) == (Protocol::Udp, wireguard_port);
    if let Some(port) = ports.iter().find(of_tunnel) {
        let msg = format!("{} is WireGuard's on every node; give the container another hostPort", text(port));
        return Some(CniError::new(Code::InvalidConfig, msg));
    }
    let live = || leases.iter().filter(|(_, lease)| lease.released.is_none());
    ports.iter().find_map(|port| {
        let place = |ip: Option<IpAddr>, ipv6| Place::of(port.protocol, ip, port.host_port, ipv6);
        let holder = live().find(|(address, lease)| {
            let ipv6 = address.is_ipv6();
            let fits = port.host_ip.is_none_or(|ip| ip.is_ipv6() == ipv6);
            let wanted = place(port.host_ip, ipv6);
            let same =
                |held: &HostPort| Place::of(held.protocol, held.host_ip, held.host_port, ipv6) == wanted;
            fits && lease.host_ports.iter().any(same)
        });
        let (_, holder) = holder?;
        let pod = holder.pod.as_ref().map_or_else(|| holder.container_id.clone(), ToString::to_string);
        let msg = format!("{} is held by pod {pod}; it is free when that pod has ended", text(port));
        Some(CniError::new(Code::HostPortTaken, msg))
    })
}

/// For people: `hostPort 80/tcp on 192.0.2.1`.
fn text(port: &HostPort) -> String {
    let of = port.host_ip.map(|ip| format!(" on {ip}")).unwrap_or_default();
    format!("hostPort {}/{}{of}", port.host_port, port.protocol.name())
}

/// What one element stands for.
#[derive(PartialEq, Eq)]
struct Place {
    set: &'static str,
    key: Vec<Datum>,
}

impl Place {
    fn of(protocol: Protocol, host_ip: Option<IpAddr>, port: u16, ipv6: bool) -> Self {
        let mut key = vec![Datum::Protocol(protocol), Datum::Port(port)];
        match host_ip.filter(|ip| !ip.is_unspecified()) {
            None => Self { set: PORTS[usize::from(ipv6)], key },
            Some(ip) => {
                key.insert(0, Datum::Ip(ip));
                Self { set: ADDRESS_PORTS[usize::from(ipv6)], key }
            }
        }
    }
}

/// A live lease's host ports, and its pod as a client of itself.
pub(super) fn elements(
    address: IpAddr,
    lease: &Lease,
) -> impl Iterator<Item = (&'static str, Vec<Datum>, ElementData)> {
    let ipv6 = address.is_ipv6();
    let ports = lease.host_ports.iter().map(move |port| {
        let place = Place::of(port.protocol, port.host_ip, port.host_port, ipv6);
        (place.set, place.key, ElementData::AddressAndPort(address, port.container_port))
    });
    let pair = vec![Datum::Ip(address), Datum::Ip(address)];
    let hairpin = (HAIRPIN[usize::from(ipv6)], pair, ElementData::None);
    ports.chain((!lease.host_ports.is_empty()).then_some(hairpin))
}

/// The inverse of [`elements`] for one element of a map.
pub(super) fn read(key: &[Datum], data: &ElementData) -> Option<(IpAddr, HostPort)> {
    let (host_ip, rest) = match key {
        [Datum::Ip(ip), rest @ ..] => (Some(*ip), rest),
        rest => (None, rest),
    };
    match (rest, data) {
        (
            [Datum::Protocol(protocol), Datum::Port(host_port)],
            ElementData::AddressAndPort(pod, container_port),
        ) => {
            let (protocol, host_port, container_port) = (*protocol, *host_port, *container_port);
            Some((*pod, HostPort { protocol, host_ip, host_port, container_port }))
        }
        _ => None,
    }
}

/// Adds chains and empty sets.
pub(super) fn declare(table: &mut Table) {
    let to_node = || {
        Rule::new(vec![
            Statement::DestinationIsLocal { negated: false },
            Statement::Verdict(Verdict::Jump(CHAIN.into())),
        ])
    };
    let nat =
        |hook, priority, rules| Chain { base: Some(Base { kind: ChainKind::Nat, hook, priority }), rules };
    for (name, chain) in [
        ("hostport-prerouting", nat(Hook::Prerouting, PRIORITY_HOSTPORT, vec![to_node()])),
        ("hostport-output", nat(Hook::Output, PRIORITY_HOSTPORT, vec![to_node()])),
        (CHAIN, Chain { base: None, rules: translations() }),
        ("hostport-postrouting", nat(Hook::Postrouting, PRIORITY_SNAT, masquerades())),
    ] {
        table.chains.insert(name.to_owned(), chain);
    }
    let (protocol, port) = (KeyType::L4Protocol, KeyType::Port);
    for (family, address, pod) in [
        (0, KeyType::Ipv4Address, SetData::Ipv4AddressAndPort),
        (1, KeyType::Ipv6Address, SetData::Ipv6AddressAndPort),
    ] {
        for (name, set) in [
            (PORTS[family], Set::new(vec![protocol, port], pod)),
            (ADDRESS_PORTS[family], Set::new(vec![address, protocol, port], pod)),
            (HAIRPIN[family], Set::new(vec![address, address], SetData::None)),
        ] {
            table.sets.insert(name.to_owned(), set);
        }
    }
}

/// An address of the node before all of them.
fn translations() -> Vec<Rule> {
    let translate =
        |ipv6, key, map: &str| Rule::new(vec![Statement::DnatMap { ipv6, key, map: map.to_owned() }]);
    let ports = || vec![Field::L4Protocol, Field::DestinationPort];
    let of_address = |ipv6| {
        let key = [vec![Field::destination(ipv6)], ports()].concat();
        translate(ipv6, key, ADDRESS_PORTS[usize::from(ipv6)])
    };
    let of_any = |ipv6| translate(ipv6, ports(), PORTS[usize::from(ipv6)]);
    [false, true].map(of_address).into_iter().chain([false, true].map(of_any)).collect()
}

fn masquerades() -> Vec<Rule> {
    let hairpin = |ipv6: bool| {
        let set = HAIRPIN[usize::from(ipv6)].to_owned();
        let to_itself = Statement::Lookup {
            key: vec![Field::source(ipv6), Field::destination(ipv6)],
            negated: false,
            set,
        };
        Rule::new(vec![Statement::CtStatusDnat, to_itself, Statement::Masquerade])
            .comment("a pod sent to itself")
    };
    let loopback = Rule::new(vec![
        Statement::equals(Field::OutputLink, Datum::NamePrefix(POD_LINK_PREFIX.into())),
        Statement::equals(
            Field::Ip4Source,
            Datum::Net(IpNet::new_assert(Ipv4Addr::LOCALHOST.into(), 8).trunc()),
        ),
        Statement::Masquerade,
    ])
    .comment("loopback is no address to answer to");
    let hairpins = [false, true].map(hairpin);
    hairpins.into_iter().chain([loopback]).collect()
}

/// UDP flows keep what was true at their first packet: whether `flow` must go because these pods are new on the node.
/// `local`: every address of the node.
pub(super) fn missed(flow: &Flow, added: &LeaseRecords, local: &[IpAddr]) -> bool {
    let to = flow.original.destination;
    let untranslated = flow.reply.source == to;
    let leads_here = |(address, port): (&IpAddr, &HostPort)| {
        let on_address = match port.host_ip.filter(|ip| !ip.is_unspecified()) {
            Some(ip) => ip == to.ip(),
            None => address.is_ipv6() == to.is_ipv6() && local.contains(&to.ip()),
        };
        on_address && port.host_port == to.port()
    };
    untranslated && udp_ports(added).any(leads_here)
}

/// Whether `flow` must go because these pods have ended.
pub(super) fn orphaned(flow: &Flow, ended: &LeaseRecords) -> bool {
    let ends_at = |(address, port): (&IpAddr, &HostPort)| {
        SocketAddr::new(*address, port.container_port) == flow.reply.source
            && port.host_port == flow.original.destination.port()
    };
    flow.reply.source != flow.original.destination && udp_ports(ended).any(ends_at)
}

/// Whether there is any UDP host port, without which no flow need be looked at.
pub(super) fn has_udp(leases: &LeaseRecords) -> bool {
    udp_ports(leases).next().is_some()
}

fn udp_ports(leases: &LeaseRecords) -> impl Iterator<Item = (&IpAddr, &HostPort)> {
    let ports = leases.iter().flat_map(|(address, lease)| lease.host_ports.iter().map(move |p| (address, p)));
    ports.filter(|(_, port)| port.protocol == Protocol::Udp)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(mappings: &Value) -> Result<Vec<HostPort>, CniError> {
        requested(&json!({"runtimeConfig": {"portMappings": mappings}}))
    }

    #[test]
    fn containerds_spelling_means_the_same_as_the_conventions() {
        let dns = HostPort { protocol: Protocol::Udp, host_ip: None, host_port: 53, container_port: 5353 };
        let conventions = json!([{"hostPort": 53, "containerPort": 5353, "protocol": "udp"}]);
        let containerd = json!([{"HostPort": 53, "ContainerPort": 5353, "Protocol": "udp", "HostIP": ""}]);
        assert_eq!(asked(&conventions), Ok(vec![dns]));
        assert_eq!(asked(&containerd), Ok(vec![dns]));
    }

    #[test]
    fn a_runtime_may_say_nothing_and_name_ports_that_are_not_to_be_mapped() {
        assert_eq!(requested(&json!({})), Ok(vec![]));
        assert_eq!(asked(&Value::Null), Ok(vec![]));
        assert_eq!(asked(&json!([{"containerPort": 80}, {"hostPort": 0, "containerPort": 81}])), Ok(vec![]));
    }

    #[test]
    fn what_is_written_is_read_again() {
        for (pod, host_ip) in [
            ("10.244.1.2", None),
            ("fd00::2", None),
            ("10.244.1.2", Some("192.0.2.1")),
            ("fd00::2", Some("2001:db8::1")),
        ] {
            let host_ip = host_ip.map(|ip| ip.parse().unwrap());
            let port = HostPort { protocol: Protocol::Sctp, host_ip, host_port: 1, container_port: 2 };
            let pod: IpAddr = pod.parse().unwrap();
            let place = Place::of(port.protocol, host_ip, 1, pod.is_ipv6());
            assert_eq!(read(&place.key, &ElementData::AddressAndPort(pod, 2)), Some((pod, port)));
        }
    }
}
