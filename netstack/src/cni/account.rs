//! What `weft ipam` shows: which addresses are used, by whom, and what one address is. Pure, but for the reading of the
//! leases and the clock.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weft_model::Snapshot;
use weft_model::objects::{ServiceKind, host_address, ingress_address};

use super::Cni;
use super::ipam::{QUARANTINE_SECONDS, pod_addresses};
use crate::store::{Boottime, Lease, LeaseRecords};

/// Answer of `GET /ipam`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub ranges: Vec<RangeUse>,
    /// Every leased or resting address, in order.
    pub addresses: Vec<AddressUse>,
}

/// One podCIDR of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeUse {
    pub cidr: IpNet,
    pub used: u128,
    pub resting: u128,
    /// Without network, host and broadcast address.
    pub free: u128,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressUse {
    pub address: IpAddr,
    /// `namespace/name`; unknown where the runtime did not say it or the lease was rebuilt.
    pub pod: Option<String>,
    pub container: String,
    pub interface: String,
    /// Host end of the pod's link.
    pub link: String,
    /// Such as `192.0.2.1:80/tcp`; without an address: every one of the node.
    pub host_ports: Vec<String>,
    /// Seconds until the address is given again; `None` while it is used.
    pub resting_seconds: Option<u64>,
}

impl Cni {
    pub fn account(&self) -> Account {
        let cidrs = self.own_cidrs();
        let leases = self.leases.records();
        account(&cidrs, &leases, Boottime::now())
    }

    /// What `address` is, a sentence a line.
    pub fn explain(&self, address: IpAddr) -> Vec<String> {
        let leases = self.leases.records();
        explain(address, self.snapshot().as_deref(), &leases, Boottime::now())
    }

    fn own_cidrs(&self) -> Vec<IpNet> {
        let snapshot = self.snapshot();
        snapshot.and_then(|it| Some(it.own_node()?.pod_cidrs.clone())).unwrap_or_default()
    }
}

fn account(cidrs: &[IpNet], leases: &LeaseRecords, now: Boottime) -> Account {
    let addresses: Vec<AddressUse> = leases.iter().map(|(ip, lease)| address_use(*ip, lease, now)).collect();
    let range = |cidr: &IpNet| {
        let inside = || addresses.iter().filter(|it| cidr.contains(&it.address));
        let used = inside().filter(|it| it.resting_seconds.is_none()).count() as u128;
        let resting = inside().filter(|it| it.resting_seconds.is_some_and(|left| left > 0)).count() as u128;
        let free = pod_addresses(*cidr).saturating_sub(used + resting);
        RangeUse { cidr: *cidr, used, resting, free }
    };
    Account { ranges: cidrs.iter().map(range).collect(), addresses }
}

fn address_use(address: IpAddr, lease: &Lease, now: Boottime) -> AddressUse {
    let host_port = |port: &crate::store::HostPort| {
        let on = port.host_ip.map(|ip| if ip.is_ipv6() { format!("[{ip}]:") } else { format!("{ip}:") });
        format!("{}{}/{}", on.unwrap_or_default(), port.host_port, port.protocol.name())
    };
    let over = |released: Boottime| (released.0 + QUARANTINE_SECONDS).saturating_sub(now.0);
    AddressUse {
        address,
        pod: lease.pod.as_ref().map(ToString::to_string),
        container: lease.container_id.clone(),
        interface: lease.ifname.clone(),
        link: lease.link.clone(),
        host_ports: lease.host_ports.iter().map(host_port).collect(),
        resting_seconds: lease.released.map(over),
    }
}

fn explain(
    address: IpAddr,
    snapshot: Option<&Snapshot>,
    leases: &LeaseRecords,
    now: Boottime,
) -> Vec<String> {
    if let Some(lease) = leases.get(&address) {
        return leased(&address_use(address, lease, now));
    }
    let Some(snapshot) = snapshot else {
        return vec![format!(
            "{address} has no lease here; the agent has not read the cluster's objects yet"
        )];
    };
    let sentence = of_node(address, snapshot)
        .or_else(|| of_services(address, snapshot))
        .unwrap_or_else(|| format!("{address} is none of this cluster's: no pod, Service or Node has it"));
    vec![sentence]
}

fn leased(it: &AddressUse) -> Vec<String> {
    let AddressUse { address, container, interface, link, .. } = it;
    let pod = it
        .pod
        .as_ref()
        .map_or_else(|| "a pod whose name is not known".to_owned(), |pod| format!("pod {pod}"));
    match it.resting_seconds {
        Some(0) => vec![format!("{address} is free again; {pod} had it last")],
        Some(left) => {
            vec![format!("{address} rests for {left} s before another pod gets it; {pod} had it last")]
        }
        None => {
            let mut lines = vec![
                format!("{address} belongs to {pod}"),
                format!("container {container}, interface {interface} in it, {link} on the node"),
            ];
            lines
                .extend(it.host_ports.iter().map(|port| format!("hostPort {port} of this node leads to it")));
            lines
        }
    }
}

fn of_node(address: IpAddr, snapshot: &Snapshot) -> Option<String> {
    for node in snapshot.nodes.values() {
        let here = if node.name == snapshot.facts.name { "this Node" } else { "Node" };
        if node.internal_ips.contains(&address) {
            return Some(format!("{address} is an InternalIP of {here} {}", node.name));
        }
        let Some(cidr) = node.pod_cidrs.iter().find(|cidr| cidr.contains(&address)) else { continue };
        return Some(if host_address(cidr) == Some(address) {
            format!(
                "{address} is the host address of {here} {}: the source of what it sends to other nodes' pods",
                node.name
            )
        } else if ingress_address(cidr) == Some(address) {
            format!("{address} is kept for the ingress of {here} {}", node.name)
        } else if node.name == snapshot.facts.name {
            format!("{address} is free: no pod of this node has it (podCIDR {cidr})")
        } else {
            format!("{address} lies in podCIDR {cidr} of Node {}: ask its agent", node.name)
        });
    }
    let cluster = snapshot.config.cluster_cidrs.iter().find(|cidr| cidr.contains(&address))?;
    Some(format!("{address} lies in the pod range {cluster}, in no Node's podCIDR"))
}

fn of_services(address: IpAddr, snapshot: &Snapshot) -> Option<String> {
    if snapshot.config.resolver_addresses().any(|ip| ip == address) {
        return Some(format!("{address} is the cluster's DNS, answered by the node that asks"));
    }
    let has = |kind: &ServiceKind| matches!(kind, ServiceKind::ClusterIps(ips) if ips.contains(&address));
    let service = snapshot.services.values().find(|service| has(&service.kind));
    let range = snapshot.config.service_cidrs.iter().find(|cidr| cidr.contains(&address));
    match (service, range) {
        (Some(service), _) => Some(format!("{address} is a ClusterIP of Service {}", service.key)),
        (None, Some(range)) => {
            Some(format!("{address} lies in the Service range {range}; no Service has it"))
        }
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use weft_model::PodKey;
    use weft_model::objects::Protocol;

    use super::*;
    use crate::cni::tests::rig::snapshot;
    use crate::store::HostPort;

    fn lease(pod: &str, released: Option<u64>) -> Lease {
        Lease {
            container_id: "0123".to_owned(),
            ifname: "eth0".to_owned(),
            netns: String::new(),
            pod: Some(PodKey::new("default", pod)),
            pod_uid: String::new(),
            link: "weftp1".to_owned(),
            bandwidth: weft_model::objects::Bandwidth::default(),
            host_ports: vec![HostPort {
                protocol: Protocol::Tcp,
                host_ip: Some("2001:db8::1".parse().unwrap()),
                host_port: 80,
                container_port: 8080,
            }],
            released: released.map(Boottime),
        }
    }

    fn leases() -> LeaseRecords {
        BTreeMap::from([
            ("10.42.1.2".parse().unwrap(), lease("web", None)),
            ("10.42.1.3".parse().unwrap(), lease("gone", Some(100))),
            ("10.42.1.4".parse().unwrap(), lease("long-gone", Some(1))),
        ])
    }

    #[test]
    fn an_account_counts_every_address_once() {
        let cidrs = ["10.42.1.0/24".parse().unwrap(), "fd42::/64".parse().unwrap()];
        let Account { ranges, addresses } = account(&cidrs, &leases(), Boottime(110));
        assert_eq!(ranges[0], RangeUse { cidr: cidrs[0], used: 1, resting: 1, free: 250 });
        assert_eq!((ranges[1].used, ranges[1].free), (0, (1 << 64) - 3));
        let rest: Vec<_> = addresses.iter().map(|it| it.resting_seconds).collect();
        assert_eq!(rest, [None, Some(50), Some(0)]);
    }

    #[test]
    fn every_kind_of_address_is_explained() {
        let mut snapshot = snapshot(&["10.42.1.0/24", "fd42:0:0:1::/64"]);
        let mut other = (**snapshot.own_node().unwrap()).clone();
        other.name = "n2".into();
        other.pod_cidrs = vec!["10.42.2.0/24".parse().unwrap()];
        other.internal_ips = vec!["192.0.2.2".parse().unwrap()];
        let own = snapshot.own_node().unwrap().clone();
        snapshot.nodes = Arc::new([own, Arc::new(other)].map(|node| (node.name.clone(), node)).into());
        let mut config = (*snapshot.config).clone();
        config.cluster_cidrs = vec!["10.42.0.0/16".parse().unwrap()];
        config.service_cidrs = vec!["10.43.0.0/16".parse().unwrap()];
        config.cluster_dns = vec!["10.43.0.10".parse().unwrap()];
        snapshot.config = Arc::new(config);
        let said = |address: &str| {
            explain(address.parse().unwrap(), Some(&snapshot), &leases(), Boottime(110)).join("; ")
        };
        for (address, expected) in [
            (
                "10.42.1.2",
                "10.42.1.2 belongs to pod default/web; container 0123, interface eth0 in it, weftp1 on the node; hostPort [2001:db8::1]:80/tcp of this node leads to it",
            ),
            (
                "10.42.1.3",
                "10.42.1.3 rests for 50 s before another pod gets it; pod default/gone had it last",
            ),
            ("10.42.1.4", "10.42.1.4 is free again; pod default/long-gone had it last"),
            ("10.42.1.9", "10.42.1.9 is free: no pod of this node has it (podCIDR 10.42.1.0/24)"),
            (
                "fd42:0:0:1::1",
                "fd42:0:0:1::1 is the host address of this Node n1: the source of what it sends to other nodes' pods",
            ),
            ("10.42.2.7", "10.42.2.7 lies in podCIDR 10.42.2.0/24 of Node n2: ask its agent"),
            ("10.42.9.7", "10.42.9.7 lies in the pod range 10.42.0.0/16, in no Node's podCIDR"),
            ("192.0.2.2", "192.0.2.2 is an InternalIP of Node n2"),
            ("10.43.0.10", "10.43.0.10 is the cluster's DNS, answered by the node that asks"),
            ("10.43.0.11", "10.43.0.11 lies in the Service range 10.43.0.0/16; no Service has it"),
            ("8.8.8.8", "8.8.8.8 is none of this cluster's: no pod, Service or Node has it"),
        ] {
            assert_eq!(said(address), expected);
        }
    }
}
