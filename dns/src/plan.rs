//! From the Snapshot to the names of the cluster: Kubernetes DNS-Based Service Discovery specification 1.1.0.
//!
//! Pure per Service, and planned anew when the Service or its EndpointSlices are others, so one changed endpoint costs one
//! Service. Pod names (`1-2-3-4.ns.pod.<zone>`) are not listed: `store` works them out from the
//! existing Namespaces, and from the pods' addresses where only those of existing pods are wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weft_model::objects::{ConfigMap, Endpoint, EndpointSlice, Namespace, Pod, Service, ServiceKind};
use weft_model::services::FollowedServices;
use weft_model::snapshot::{Attachments, Objects, changes};
use weft_model::{ClusterConfig, ObjectRef, Planned, PodKey, Problem, Reason, Snapshot};
use weft_netstack::reconcile::Planner;

use crate::custom::{self, Parts};
use crate::name::{InvalidName, Name};
use crate::zone::{Data, DnsPlan, Group, GroupKey, Groups, PodAddresses, SPECIFICATION_VERSION, Srv, Zones};

/// SRV priority: every target is as good as the other. The specification leaves both numbers to the implementation.
const SRV_PRIORITY: u16 = 0;
/// SRV weights of one name add up to about this.
const SRV_WEIGHT_TOTAL: u16 = 100;

/// Plans the names of the whole cluster.
#[derive(Default)]
pub struct DnsPlanner {
    /// The configuration that everything below was planned with.
    config: Option<Arc<ClusterConfig>>,
    namespaces: Objects<String, Namespace>,
    services: FollowedServices,
    groups: Arc<Groups>,
    /// By the object that they are of.
    problems: BTreeMap<GroupKey, Vec<Problem>>,
    custom: Option<CustomMemo>,
    pods: Option<PodsMemo>,
}

struct PodsMemo {
    of_api: Objects<PodKey, Pod>,
    of_node: Attachments,
    planned: Arc<PodAddresses>,
}

struct CustomMemo {
    config_map: Arc<ConfigMap>,
    planned: (Parts, Vec<Problem>),
}

impl Planner for DnsPlanner {
    type Plan = DnsPlan;

    fn plan(&mut self, snapshot: &Snapshot) -> Planned<DnsPlan> {
        let config = &snapshot.config;
        if self.config.as_ref() != Some(config) {
            *self = Self { config: Some(config.clone()), ..Self::default() };
        }
        let ranges = config.ranges();
        let listen = config.resolver_addresses().collect();
        let hosts = hosts(snapshot);
        let (custom, mut problems) = self.plan_custom(snapshot);
        let nodes = node_names(snapshot);
        let pods = self.plan_pods(snapshot, &custom);
        let zones = match Zones::new(config) {
            Ok(zones) => zones,
            Err(error) => {
                problems.push(bad_domain(config, &error));
                let plan = DnsPlan {
                    zones: None,
                    groups: Arc::default(),
                    ranges,
                    listen,
                    hosts,
                    custom,
                    nodes,
                    pods,
                };
                return Planned::new(plan, problems);
            }
        };
        self.plan_zone(&zones.domain, config);
        self.plan_namespaces(snapshot, &zones.domain);
        self.plan_services(snapshot, &zones.domain);
        problems.extend(self.problems.values().flatten().cloned());
        let groups = self.groups.clone();
        Planned::new(
            DnsPlan { zones: Some(zones), groups, ranges, listen, hosts, custom, nodes, pods },
            problems,
        )
    }
}

/// Of families in which there is an address for the cluster's pods to ask at all.
fn hosts(snapshot: &Snapshot) -> BTreeSet<IpAddr> {
    let asked = |host: &IpAddr| snapshot.config.resolver_addresses().any(|ip| ip.is_ipv4() == host.is_ipv4());
    snapshot.own_node().into_iter().flat_map(|node| node.hosts()).filter(asked).collect()
}

impl DnsPlanner {
    /// Reads the ConfigMap only when it is another one.
    fn plan_custom(&mut self, snapshot: &Snapshot) -> (Parts, Vec<Problem>) {
        let Some(config_map) = snapshot.config_maps.values().next() else {
            self.custom = None;
            return (Parts::new(), Vec::new());
        };
        let memo = self.custom.take().filter(|memo| Arc::ptr_eq(&memo.config_map, config_map));
        let memo = memo.unwrap_or_else(|| CustomMemo {
            config_map: config_map.clone(),
            planned: custom::plan(config_map),
        });
        self.custom.insert(memo).planned.clone()
    }

    /// Looks at the pods only when somebody wants to know, and when they are others than before.
    fn plan_pods(&mut self, snapshot: &Snapshot, custom: &Parts) -> Option<Arc<PodAddresses>> {
        if !custom::may_verify_pods(custom) {
            self.pods = None;
            return None;
        }
        let same = |memo: &PodsMemo| {
            Arc::ptr_eq(&memo.of_api, &snapshot.pods) && Arc::ptr_eq(&memo.of_node, &snapshot.attachments)
        };
        if !self.pods.as_ref().is_some_and(same) {
            let planned = pod_addresses(snapshot);
            let before = self.pods.take().map(|memo| memo.planned).filter(|before| **before == planned);
            self.pods = Some(PodsMemo {
                of_api: snapshot.pods.clone(),
                of_node: snapshot.attachments.clone(),
                planned: before.unwrap_or_else(|| Arc::new(planned)),
            });
        }
        self.pods.as_ref().map(|memo| memo.planned.clone())
    }

    /// What one object has; nothing where it is no more. Content equal to what was there keeps its identity, so that whoever compares
    /// plans sees at once that nothing changed.
    fn put(&mut self, key: GroupKey, planned: Option<Planned<Group>>) {
        let Planned { plan: group, problems } = planned.unwrap_or_default();
        if problems.is_empty() {
            self.problems.remove(&key);
        } else {
            self.problems.insert(key.clone(), problems);
        }
        let before = self.groups.get(&key);
        if before.map_or(group.is_empty(), |before| **before == group) {
            return;
        }
        let groups = Arc::make_mut(&mut self.groups);
        if group.is_empty() {
            groups.remove(&key);
        } else {
            // An entry that is there keeps its key.
            groups.insert(Arc::new(key), Arc::new(group));
        }
    }

    /// Once a configuration.
    fn plan_zone(&mut self, domain: &Name, config: &ClusterConfig) {
        if self.groups.contains_key(&GroupKey::Zone) || self.problems.contains_key(&GroupKey::Zone) {
            return;
        }
        let planned = match zone_group(domain, &config.cluster_dns) {
            Ok(group) => Planned::new(group, Vec::new()),
            Err(error) => Planned::new(Group::default(), vec![bad_domain(config, &error)]),
        };
        self.put(GroupKey::Zone, Some(planned));
    }

    fn plan_namespaces(&mut self, snapshot: &Snapshot, domain: &Name) {
        let before = std::mem::replace(&mut self.namespaces, snapshot.namespaces.clone());
        for (name, _, new) in changes(&before, &snapshot.namespaces) {
            self.put(GroupKey::Namespace(name.clone()), new.map(|_| plan_namespace(name, domain)));
        }
    }

    fn plan_services(&mut self, snapshot: &Snapshot, domain: &Name) {
        for key in self.services.follow(snapshot) {
            let service = self.services.get(&key);
            let planned = service.map(|service| plan_service(service, self.services.slices(&key), domain));
            self.put(GroupKey::Service(key), planned);
        }
    }
}

/// Of pods that run or will; those of this node count from the moment they are attached.
fn pod_addresses(snapshot: &Snapshot) -> PodAddresses {
    let mut addresses = PodAddresses::new();
    let alive = snapshot.pods.values().filter(|pod| !pod.terminated);
    let of_api = alive.flat_map(|pod| pod.ips.iter().map(|ip| (*ip, &pod.key)));
    let of_node =
        snapshot.attachments.iter().filter_map(|(ip, attached)| Some((*ip, attached.pod.as_ref()?)));
    for (address, key) in of_api.chain(of_node) {
        addresses.entry(address).or_default().insert(key.namespace.to_string());
    }
    addresses
}

/// Nodes by their names, as k3s and others let pods find them. A name that is no domain name is left out: it was valid to
/// Kubernetes, and nobody could ask for it.
fn node_names(snapshot: &Snapshot) -> BTreeMap<Name, BTreeSet<IpAddr>> {
    let named = snapshot.nodes.values().filter(|node| !node.internal_ips.is_empty());
    named
        .filter_map(|node| {
            let name = Name::parse(&node.name.0).ok()?;
            Some((name, node.internal_ips.iter().copied().collect()))
        })
        .collect()
}

fn bad_domain(config: &ClusterConfig, error: &InvalidName) -> Problem {
    let message = format!("cluster domain {:?}: {error}; set --cluster-domain", config.cluster_domain);
    Problem::new(ObjectRef::new("ClusterConfig", "", "cluster-domain"), Reason::InvalidField, message)
}

/// The zone's own names. "There must be a TXT record `dns-version.<zone>.`" (2.2); `ns.dns` names this server, as
/// CoreDNS does.
fn zone_group(domain: &Name, cluster_dns: &[IpAddr]) -> Result<Group, InvalidName> {
    let server = domain.child("dns")?.child("ns")?;
    let mut records = vec![
        (domain.child("dns-version")?, Data::Txt(SPECIFICATION_VERSION.to_owned())),
        (domain.clone(), Data::Ns(server.clone())),
    ];
    records.extend(cluster_dns.iter().map(|address| (server.clone(), Data::from(*address))));
    Ok(records.into_iter().collect())
}

/// A Namespace's names exist without records: `<ns>.svc.<zone>` and, as the parent of pod names, `<ns>.pod.<zone>`.
fn plan_namespace(name: &str, domain: &Name) -> Planned<Group> {
    let names = || -> Result<Group, InvalidName> {
        let names = ["svc", "pod"].map(|kind| Ok((domain.child(kind)?.child(name)?, BTreeSet::new())));
        Ok(Group::new(&names.into_iter().collect::<Result<_, InvalidName>>()?))
    };
    match names() {
        Ok(group) => Planned::new(group, Vec::new()),
        Err(error) => {
            let object = ObjectRef::new("Namespace", "", name);
            let message = format!("metadata.name: {error}; no DNS names for it");
            Planned::new(Group::default(), vec![Problem::new(object, Reason::InvalidField, message)])
        }
    }
}

/// All names of one Service under `domain`, the reverse ones included: pure, the unit that is memoised.
pub fn plan_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    domain: &Name,
) -> Planned<Group> {
    let mut draft = Draft::new(service);
    let name = domain
        .child("svc")
        .and_then(|svc| svc.child(&service.key.namespace))
        .and_then(|namespace| namespace.child(&service.key.name));
    match (name, &service.kind) {
        (Err(error), _) => draft.problem("metadata.name", &error),
        (Ok(name), ServiceKind::ClusterIps(addresses)) => draft.cluster_ips(&name, addresses),
        (Ok(name), ServiceKind::Headless) => draft.headless(&name, slices),
        (Ok(name), ServiceKind::ExternalName(target)) => draft.external_name(&name, target),
    }
    let mut group: Group = draft.records.into_iter().collect();
    group.triggered_millis = draft.triggered_millis;
    Planned::new(group, draft.problems)
}

/// One published endpoint of a headless Service.
struct Published<'a> {
    name: Name,
    slice: &'a EndpointSlice,
}

struct Draft<'a> {
    service: &'a Service,
    records: Vec<(Name, Data)>,
    triggered_millis: Option<i64>,
    problems: Vec<Problem>,
}

impl<'a> Draft<'a> {
    fn new(service: &'a Service) -> Self {
        Self { service, records: Vec::new(), triggered_millis: None, problems: Vec::new() }
    }

    fn problem(&mut self, field: &str, error: &InvalidName) {
        let key = &self.service.key;
        let object = ObjectRef::new("Service", &key.namespace, &key.name);
        let message = format!("{field}: {error}; no DNS name for it");
        self.problems.push(Problem::new(object, Reason::InvalidField, message));
    }

    /// 2.3: A or AAAA, SRV for each named port, PTR.
    fn cluster_ips(&mut self, name: &Name, addresses: &[IpAddr]) {
        for address in addresses {
            self.records.push((name.clone(), Data::from(*address)));
            self.records.push((Name::reverse(*address), Data::Ptr(name.clone())));
        }
        if addresses.is_empty() {
            return;
        }
        for port in &self.service.ports {
            let target = Target { name, port: port.port, weight: SRV_WEIGHT_TOTAL };
            self.srv(name, &port.name, port.protocol.name(), &target);
        }
    }

    /// 2.4: A or AAAA of every published endpoint, an own name, SRV and PTR for each.
    fn headless<'s>(&mut self, name: &Name, slices: impl Iterator<Item = &'s EndpointSlice>) {
        let mut published = Vec::new();
        for slice in slices {
            self.triggered_millis = self.triggered_millis.max(slice.triggered_millis);
            for endpoint in &slice.endpoints {
                // "ready" or, for a Service that publishes them, not ready addresses (2.1, 2.4.1).
                if !endpoint.ready && !self.service.publish_not_ready_addresses {
                    continue;
                }
                self.records.push((name.clone(), Data::from(endpoint.address)));
                match name.child(&endpoint_label(endpoint)) {
                    Ok(own) => {
                        self.records.push((own.clone(), Data::from(endpoint.address)));
                        self.records.push((Name::reverse(endpoint.address), Data::Ptr(own.clone())));
                        published.push(Published { name: own, slice });
                    }
                    Err(error) => self.problem(&format!("hostname of endpoint {}", endpoint.address), &error),
                }
            }
        }
        self.headless_srv(name, &published);
    }

    fn headless_srv(&mut self, name: &Name, published: &[Published<'_>]) {
        let mut targets: BTreeMap<(&str, &str), BTreeSet<(&Name, u16)>> = BTreeMap::new();
        for Published { name: own, slice } in published {
            for port in &slice.ports {
                let port_key = (port.name.as_str(), port.protocol.name());
                targets.entry(port_key).or_default().insert((own, port.port));
            }
        }
        for ((port_name, protocol), targets) in targets {
            let count = u16::try_from(targets.len()).unwrap_or(u16::MAX);
            let weight = (SRV_WEIGHT_TOTAL / count).max(1);
            for (own, port) in targets {
                self.srv(name, port_name, protocol, &Target { name: own, port, weight });
            }
        }
    }

    /// `_<port>._<protocol>.<name>`; "unnamed ports do not have an SRV record" (2.3.2, 2.4.2).
    fn srv(&mut self, name: &Name, port_name: &str, protocol: &str, target: &Target<'_>) {
        if port_name.is_empty() {
            return;
        }
        let owner =
            name.child(&format!("_{protocol}")).and_then(|parent| parent.child(&format!("_{port_name}")));
        match owner {
            Ok(owner) => {
                let srv = Srv {
                    priority: SRV_PRIORITY,
                    weight: target.weight,
                    port: target.port,
                    target: target.name.clone(),
                };
                self.records.push((owner, Data::Srv(srv)));
            }
            Err(error) => self.problem(&format!("name of port {port_name:?}"), &error),
        }
    }

    /// 2.5: a CNAME and nothing else. An address is not a name that an alias could lead to.
    fn external_name(&mut self, name: &Name, target: &str) {
        let target = match target.trim_end_matches('.').parse::<IpAddr>() {
            Ok(_) => Err(InvalidName::Address(target.to_owned())),
            Err(_) if target.trim_end_matches('.').is_empty() => Err(InvalidName::Label(String::new())),
            Err(_) => Name::parse(target),
        };
        match target {
            Ok(target) => self.records.push((name.clone(), Data::Cname(target))),
            Err(error) => self.problem("spec.externalName", &error),
        }
    }
}

struct Target<'a> {
    name: &'a Name,
    port: u16,
    weight: u16,
}

/// The endpoint's hostname, else its address with dashes: "a unique, system-generated identifier" (2.4.1).
fn endpoint_label(endpoint: &Endpoint) -> String {
    match &endpoint.hostname {
        Some(hostname) if !hostname.is_empty() => hostname.to_string(),
        _ => endpoint.address.to_string().replace(['.', ':'], "-"),
    }
}
