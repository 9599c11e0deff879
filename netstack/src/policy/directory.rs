//! Who bears which address: pods as the API shows them, pods of this node as CNI attached them, and this node's resolver.
//! Pure; kept up to date by [`Directory::update`].
//!
//! An address of this node's own range is borne by whom CNI gave it, whatever the API still says, and by nobody before
//! and after. Of other nodes only the API tells; where two pods claim one address it may just have changed hands, so that a
//! selector has to select both.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weft_model::objects::{Labels, NamedPort, Namespace, Pod, Protocol, host_address, ingress_address};
use weft_model::snapshot::{Attachments, Objects, changes};
use weft_model::{PodKey, Snapshot};

/// Where the cluster's resolver lives for policies, though this node itself answers (decision 8).
const RESOLVER_NAMESPACE: &str = "kube-system";
/// As whom the ingress of a node counts (decision 8): namespace, name, and the label that people's policies select it by. Those of
/// ingress-nginx's charts and manifests, and of Traefik as k3s installs it.
const INGRESSES: [(&str, &str, &str, &str); 2] = [
    ("ingress-nginx", "ingress-nginx-controller", "app.kubernetes.io/name", "ingress-nginx"),
    ("kube-system", "traefik", "app.kubernetes.io/name", "traefik"),
];
/// Label that every Namespace has (well-known labels of the API).
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// What concerns every address: a change of it makes everything be planned anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// Pod ranges of this node.
    pub own_cidrs: Vec<IpNet>,
    /// This host's own addresses: what comes from them is the node itself.
    pub own_addresses: BTreeSet<IpAddr>,
    /// Of every node the `host` address of a podCIDR, with the addresses of that node: an ipBlock that covers the node covers
    /// what the node sends from there.
    pub hosts: BTreeMap<IpAddr, Vec<IpAddr>>,
    pub cluster_dns: Vec<IpAddr>,
    /// Where the nodes' ingresses listen and what they send from; empty where ingress is off.
    pub ingresses: BTreeSet<IpAddr>,
    /// Those of this node.
    pub own_ingresses: BTreeSet<IpAddr>,
}

impl Place {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let own = snapshot.own_node();
        let own_cidrs = own.map(|node| node.pod_cidrs.clone()).unwrap_or_default();
        let mut own_addresses: BTreeSet<IpAddr> =
            snapshot.facts.uplinks.iter().flat_map(|link| link.addresses.iter().copied()).collect();
        own_addresses.extend(own.iter().flat_map(|node| node.internal_ips.iter().copied()));
        own_addresses.extend(own_cidrs.iter().filter_map(host_address));
        let mut hosts = BTreeMap::new();
        for node in snapshot.nodes.values() {
            for host in node.hosts() {
                let same_family = node.internal_ips.iter().filter(|ip| ip.is_ipv6() == host.is_ipv6());
                hosts.insert(host, same_family.copied().collect());
            }
        }
        let on = snapshot.config.ingress.on;
        let ingresses_in = |cidrs: &[IpNet]| {
            cidrs.iter().filter(|_| on).filter_map(ingress_address).collect::<BTreeSet<_>>()
        };
        let ingresses = snapshot.nodes.values().flat_map(|node| ingresses_in(&node.pod_cidrs)).collect();
        let own_ingresses = ingresses_in(&own_cidrs);
        let cluster_dns = snapshot.config.resolver_addresses().collect();
        Self { own_cidrs, own_addresses, hosts, cluster_dns, ingresses, own_ingresses }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Directory {
    pub(super) place: Place,
    namespaces: Objects<String, Namespace>,
    pods: Objects<PodKey, Pod>,
    attachments: Attachments,
    /// Pods that the API shows with an address, unless their end or the host's network makes it another's.
    claims: Claims,
    resolver: Arc<Pod>,
    /// The node's ingress under each of its names.
    ingress: Vec<Arc<Pod>>,
    /// Labels of namespaces of these two where there is no such Namespace.
    virtual_namespaces: BTreeMap<&'static str, Labels>,
}

/// Pods by the addresses that they claim, in parts: what was handed out shares with what is changed after it all parts but those that
/// the change is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Claims(BTreeMap<IpNet, Arc<BTreeMap<IpAddr, BTreeSet<PodKey>>>>);

impl Claims {
    fn add(&mut self, address: IpAddr, pod: &PodKey) {
        let part = Arc::make_mut(self.0.entry(part_of(address)).or_default());
        part.entry(address).or_default().insert(pod.clone());
    }

    fn remove(&mut self, address: IpAddr, pod: &PodKey) {
        let Some(part) = self.0.get_mut(&part_of(address)) else { return };
        let part = Arc::make_mut(part);
        let Some(claimants) = part.get_mut(&address) else { return };
        claimants.remove(pod);
        if claimants.is_empty() {
            part.remove(&address);
        }
        if part.is_empty() {
            self.0.remove(&part_of(address));
        }
    }

    fn of(&self, address: IpAddr) -> impl Iterator<Item = &PodKey> {
        self.0.get(&part_of(address)).and_then(|part| part.get(&address)).into_iter().flatten()
    }
}

/// The range of a node's size that an address is in.
pub(super) fn part_of(address: IpAddr) -> IpNet {
    let prefix = if address.is_ipv6() { 120 } else { 24 };
    IpNet::new_assert(address, prefix).trunc()
}

/// A pod of this node as a subject of policies.
pub(super) enum Subject<'a> {
    Known(&'a Arc<Pod>),
    /// Attached, and the API has not shown this very pod yet; without a namespace where not even that is known.
    Unknown(Option<&'a str>),
    /// No pod of this node bears the address.
    Nobody,
}

impl Directory {
    pub(super) fn empty(place: Place) -> Self {
        let resolver = Arc::new(resolver(&place.cluster_dns));
        let addresses: Vec<IpAddr> = place.ingresses.iter().copied().collect();
        let ingress = INGRESSES.map(|as_whom| Arc::new(ingress(as_whom, &addresses)));
        let names = INGRESSES.iter().map(|(namespace, ..)| *namespace).filter(|_| !addresses.is_empty());
        let labels =
            |name: &'static str| (name, Labels::from([(NAMESPACE_NAME_LABEL.to_owned(), name.to_owned())]));
        let virtual_namespaces = names.chain([RESOLVER_NAMESPACE]).map(labels).collect();
        Self {
            place,
            namespaces: Objects::default(),
            pods: Objects::default(),
            attachments: Attachments::default(),
            claims: Claims::default(),
            resolver,
            ingress: ingress.into(),
            virtual_namespaces,
        }
    }

    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let mut directory = Self::empty(Place::of(snapshot));
        directory.update(snapshot);
        directory
    }

    /// Takes the Snapshot's pods, namespaces and attachments over; the addresses whose bearer, or something about it, is not
    /// what it was.
    pub(super) fn update(&mut self, snapshot: &Snapshot) -> BTreeSet<IpAddr> {
        let mut addresses = BTreeSet::new();
        let pods = std::mem::replace(&mut self.pods, snapshot.pods.clone());
        let mut changed_pods = BTreeSet::new();
        for (key, old, new) in changes(&pods, &snapshot.pods) {
            changed_pods.insert(key);
            for address in claimed(old) {
                addresses.insert(address);
                self.claims.remove(address, key);
            }
            for address in claimed(new) {
                addresses.insert(address);
                self.claims.add(address, key);
            }
        }
        let attachments = std::mem::replace(&mut self.attachments, snapshot.attachments.clone());
        addresses.extend(changes(&attachments, &snapshot.attachments).map(|(address, ..)| *address));
        let namespaces = std::mem::replace(&mut self.namespaces, snapshot.namespaces.clone());
        let relabelled: BTreeSet<&str> =
            changes(&namespaces, &snapshot.namespaces).map(|(name, ..)| name.as_str()).collect();
        let attached = snapshot.attachments.iter().filter(|(_, attached)| {
            let pod = attached.pod.as_ref();
            pod.is_some_and(|pod| changed_pods.contains(pod) || relabelled.contains(&*pod.namespace))
        });
        addresses.extend(attached.map(|(address, _)| *address));
        for namespace in relabelled {
            addresses.extend(self.pods_of(namespace).flat_map(|pod| claimed(Some(pod))));
            if namespace == RESOLVER_NAMESPACE {
                addresses.extend(self.place.cluster_dns.iter().copied());
            }
        }
        addresses
    }

    /// The pods that a selector has to select for this address to be meant; none: no selector means it.
    pub(super) fn bearers(&self, address: IpAddr) -> Vec<&Arc<Pod>> {
        if self.place.cluster_dns.contains(&address) {
            return vec![&self.resolver];
        }
        if let Some(attached) = self.attachments.get(&address)
            && let Some(key) = &attached.pod
        {
            return self.attached_pod(key, &attached.uid).into_iter().collect();
        }
        if self.place.ingresses.contains(&address) {
            return self.ingress.iter().collect();
        }
        let own = self.place.own_cidrs.iter().any(|cidr| cidr.contains(&address));
        if own && !self.attachments.contains_key(&address) {
            return Vec::new();
        }
        self.claimants(address).collect()
    }

    pub(super) fn subject(&self, address: IpAddr) -> Subject<'_> {
        let Some(attached) = self.attachments.get(&address) else { return Subject::Nobody };
        match &attached.pod {
            Some(key) => match self.attached_pod(key, &attached.uid) {
                Some(pod) => Subject::Known(pod),
                None => Subject::Unknown(Some(&key.namespace)),
            },
            None => match self.claimants(address).collect::<Vec<_>>()[..] {
                [pod] => Subject::Known(pod),
                _ => Subject::Unknown(None),
            },
        }
    }

    /// Whether one of the bearers being meant is enough: a node's ingress has several names. Else an address that is changing hands
    /// means nobody unless all are meant.
    pub(super) fn has_several_names(&self, address: IpAddr) -> bool {
        self.place.ingresses.contains(&address) && !self.attachments.contains_key(&address)
    }

    /// Every address that somebody of these namespaces may bear. Asks once a namespace.
    pub(super) fn addresses_in(&self, selected: impl Fn(&str) -> bool) -> BTreeSet<IpAddr> {
        let mut addresses = BTreeSet::new();
        let mut last: Option<(&str, bool)> = None;
        for (key, pod) in self.pods.iter() {
            let known = last.filter(|(name, _)| *name == &*key.namespace);
            let (_, is_selected) =
                *last.insert(known.unwrap_or_else(|| (&key.namespace, selected(&key.namespace))));
            addresses.extend(claimed(Some(pod)).filter(|_| is_selected));
        }
        let attached = self
            .attachments
            .iter()
            .filter(|(_, attached)| attached.pod.as_ref().is_some_and(|pod| selected(&pod.namespace)));
        addresses.extend(attached.map(|(address, _)| *address));
        if selected(RESOLVER_NAMESPACE) {
            addresses.extend(self.place.cluster_dns.iter().copied());
        }
        if INGRESSES.iter().any(|(namespace, ..)| selected(namespace)) {
            addresses.extend(self.place.ingresses.iter().copied());
        }
        addresses
    }

    /// The pod to which CNI gave the address, as far as the container runtime named it.
    pub(super) fn attached_name(&self, address: IpAddr) -> Option<&PodKey> {
        self.attachments.get(&address)?.pod.as_ref()
    }

    /// Addresses of pods of this node.
    pub(super) fn attached(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.attachments.keys().copied()
    }

    /// `None` while the Namespace is not known: then no selector of namespaces selects what is in it.
    pub(super) fn namespace_labels(&self, name: &str) -> Option<&Labels> {
        let known = self.namespaces.get(name).map(|namespace| &namespace.labels);
        known.or_else(|| self.virtual_namespaces.get(name))
    }

    /// Addresses at which the API or CNI shows this pod.
    pub(super) fn addresses_of(&self, key: &PodKey) -> BTreeSet<IpAddr> {
        let attached = self.attachments.iter().filter(|(_, attached)| attached.pod.as_ref() == Some(key));
        let claimed = claimed(self.pods.get(key));
        attached.map(|(address, _)| *address).chain(claimed).collect()
    }

    pub(super) fn pod(&self, key: &PodKey) -> Option<&Arc<Pod>> {
        self.pods.get(key)
    }

    fn claimants(&self, address: IpAddr) -> impl Iterator<Item = &Arc<Pod>> {
        self.claims.of(address).filter_map(|key| self.pods.get(key))
    }

    /// The attached pod itself, and not another one of the same name.
    fn attached_pod(&self, key: &PodKey, uid: &str) -> Option<&Arc<Pod>> {
        self.pods.get(key).filter(|pod| uid.is_empty() || pod.uid.is_empty() || pod.uid == uid)
    }

    fn pods_of<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Pod>> {
        let from = PodKey::new(namespace, "");
        self.pods.range(from..).take_while(move |(key, _)| *key.namespace == *namespace).map(|(_, pod)| pod)
    }
}

/// Addresses that are this pod's: not those of the host, and not those of a pod that has ended.
fn claimed(pod: Option<&Arc<Pod>>) -> impl Iterator<Item = IpAddr> {
    let pod = pod.filter(|pod| !pod.host_network && !pod.terminated);
    pod.into_iter().flat_map(|pod| pod.ips.iter().copied())
}

/// The node's ingress as another one's controller would be seen.
fn ingress((namespace, name, key, value): (&str, &str, &str, &str), addresses: &[IpAddr]) -> Pod {
    let labels = Labels::from([(key.to_owned(), value.to_owned())]);
    Pod { key: PodKey::new(namespace, name), labels, named_ports: Vec::new(), ..resolver(addresses) }
}

/// The node's resolver as CoreDNS would be seen: labels and names of ports of its usual Deployment.
fn resolver(addresses: &[IpAddr]) -> Pod {
    let port = |name: &str, protocol, port| NamedPort { name: name.to_owned(), protocol, port };
    Pod {
        key: PodKey::new(RESOLVER_NAMESPACE, "kube-dns"),
        uid: String::new(),
        labels: Labels::from([("k8s-app".to_owned(), "kube-dns".to_owned())]),
        node: None,
        host_network: false,
        ips: addresses.to_vec(),
        hostname: None,
        subdomain: None,
        terminated: false,
        bandwidth: weft_model::objects::Bandwidth::default(),
        named_ports: vec![
            port("dns", Protocol::Udp, 53),
            port("dns-tcp", Protocol::Tcp, 53),
            port("metrics", Protocol::Tcp, 9153),
        ],
    }
}
