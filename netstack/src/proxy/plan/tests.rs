//! What planning remembers and what it touches. What the rules mean is tested in `weft-tests`.

use weft_model::node_facts::WireguardBackend;
use weft_model::objects::{
    Endpoint, EndpointPort, EndpointSlice, Node, Service, ServiceKind, ServicePort, TrafficPolicy,
};
use weft_model::ruleset::Set;
use weft_model::{ClusterConfig, Generation, NodeFacts, NodeName};

use super::*;
use crate::proxy::layout::Scope;

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn service(name: &str, vip: &str, node_port: Option<u16>) -> Service {
    Service {
        key: key(name),
        uid: String::new(),
        created: 0,
        labels: BTreeMap::new(),
        kind: ServiceKind::ClusterIps(vec![vip.parse().unwrap()]),
        ports: vec![ServicePort { name: String::new(), protocol: Protocol::Tcp, port: 80, node_port }],
        publish_not_ready_addresses: false,
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        session_affinity_seconds: None,
        load_balancer_ips: vec![],
        external_ips: vec![],
        load_balancer_source_ranges: None,
        health_check_node_port: None,
        balancer: None,
    }
}

fn slice(service: &str, addresses: &[&str]) -> EndpointSlice {
    let endpoint = |address: &&str| Endpoint {
        address: address.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        hostname: None,
        node: Some("node-a".into()),
        hints: None,
        target_pod: None,
    };
    EndpointSlice {
        key: key(&format!("{service}-1")),
        service: key(service),
        ipv6: false,
        ports: vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: addresses.iter().map(endpoint).collect(),
        triggered_millis: None,
    }
}

fn cluster(services: Vec<Service>, slices: Vec<EndpointSlice>) -> Snapshot {
    let node = Node {
        name: "node-a".into(),
        uid: String::new(),
        created: 0,
        labels: BTreeMap::new(),
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        internal_ips: vec!["192.0.2.1".parse().unwrap()],
        leaving: false,
        cordoned: false,
        links: None,
        public_key: None,
        next_public_key: None,
        answers_for: Default::default(),
        unready: false,
        reach: Default::default(),
        wireguard_port: None,
    };
    let config = ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
        ..ClusterConfig::default()
    };
    let facts = NodeFacts {
        name: "node-a".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    Snapshot {
        generation: Generation(1),
        config: Arc::new(config),
        facts: Arc::new(facts),
        nodes: Arc::new([(NodeName::from("node-a"), Arc::new(node))].into()),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::new(services.into_iter().map(|s| (s.key.clone(), Arc::new(s))).collect()),
        endpoint_slices: Arc::new(slices.into_iter().map(|s| (s.key.clone(), Arc::new(s))).collect()),
        pods: Arc::default(),
        policies: Arc::default(),
        ingress_classes: Arc::default(),
        ingresses: Arc::default(),
        referred: Arc::default(),
        address_pools: Arc::default(),
        l2_advertisements: Arc::default(),
        service_cidrs: Arc::default(),
        attachments: Arc::default(),
        problems: Arc::default(),
        from_store: false,
    }
}

fn set(plan: &ProxyPlan, name: SetName) -> &Set {
    &plan.table.sets[name.of(false)]
}

/// Of a set that may be absent.
fn groups(plan: &ProxyPlan, name: SetName) -> impl Iterator<Item = (&Arc<str>, &Arc<Elements>)> {
    plan.table.sets.get(name.of(false)).into_iter().flat_map(|set| set.groups.iter())
}

fn with_slice(snapshot: &Snapshot, slice: EndpointSlice) -> Snapshot {
    let mut changed = snapshot.clone();
    Arc::make_mut(&mut changed.endpoint_slices).insert(slice.key.clone(), Arc::new(slice));
    changed
}

#[test]
fn one_changed_endpoint_touches_one_group_of_one_map() {
    let services = vec![service("a", "10.96.0.1", None), service("b", "10.96.0.2", None)];
    let slices = vec![slice("a", &["10.244.0.1", "10.244.0.2"]), slice("b", &["10.244.0.3", "10.244.0.4"])];
    let first = cluster(services, slices);
    let mut planner = ProxyPlanner::default();
    let before = planner.plan(&first).plan;
    let after = planner.plan(&with_slice(&first, slice("a", &["10.244.0.1", "10.244.0.9"]))).plan;
    for name in SetName::all().into_iter().filter(|name| *name != SetName::Hairpin) {
        for (group, elements) in groups(&after, name) {
            let same = Arc::ptr_eq(elements, &set(&before, name).groups[group]);
            assert_eq!(
                same,
                !(name == SetName::Endpoints(Scope::Vip) && **group == *"default/a"),
                "{name:?} {group}"
            );
        }
    }
    assert_eq!(before.table.chains, after.table.chains);
}

#[test]
fn a_plan_nobody_holds_is_edited_in_place() {
    let first = cluster(vec![service("a", "10.96.0.1", None)], vec![slice("a", &["10.244.0.1"])]);
    let mut planner = ProxyPlanner::default();
    let before = Arc::as_ptr(&planner.plan(&first).plan.table);
    let after = planner.plan(&with_slice(&first, slice("a", &["10.244.0.2"]))).plan;
    assert_eq!(before, Arc::as_ptr(&after.table));
}

#[test]
fn everything_of_a_deleted_service_goes() {
    let service = Service {
        session_affinity_seconds: Some(10),
        load_balancer_ips: vec!["198.51.100.1".parse().unwrap()],
        load_balancer_source_ranges: Some(vec!["203.0.113.0/24".parse().unwrap()]),
        ..service("a", "10.96.0.1", Some(30_080))
    };
    let full = cluster(vec![service], vec![slice("a", &["10.244.0.1"])]);
    let mut planner = ProxyPlanner::default();
    let planned = planner.plan(&full).plan;
    assert!(planned.table.sets.contains_key("sources4-default/a") && !planned.affinity.groups.is_empty());
    let empty = cluster(vec![], vec![]);
    assert_eq!(planner.plan(&empty), ProxyPlanner::default().plan(&empty));
    assert!(planner.known.is_empty() && planner.claims.is_empty());
    assert!(planner.shared.is_empty() && planner.hairpins.is_empty());
}

#[test]
fn a_type_or_label_that_changes_frees_ports_and_rules() {
    let slices = || vec![slice("a", &["10.244.0.1"])];
    let mut planner = ProxyPlanner::default();
    let node_port = service("a", "10.96.0.1", Some(30_080));
    let plain = service("a", "10.96.0.1", None);
    let external = Service { kind: ServiceKind::ExternalName("x.example".to_owned()), ..plain.clone() };
    let label = ("service.kubernetes.io/service-proxy-name".to_owned(), "other".to_owned());
    let foreign = Service { labels: BTreeMap::from([label]), ..plain.clone() };
    for (service, vips, ports) in [
        (&node_port, 1, 1),
        (&plain, 1, 0),
        (&external, 0, 0),
        (&node_port, 1, 1),
        (&foreign, 0, 0),
        (&plain, 1, 0),
    ] {
        let planned = planner.plan(&cluster(vec![service.clone()], slices()));
        assert_eq!(set(&planned.plan, SetName::Frontends(Scope::Vip)).groups.len(), vips, "{service:?}");
        let node_ports = groups(&planned.plan, SetName::Frontends(Scope::NodePort));
        assert_eq!(node_ports.count(), ports, "{service:?}");
    }
}

#[test]
fn the_younger_of_two_claimants_takes_over_when_the_older_goes() {
    let old = service("old", "10.96.0.1", Some(30_080));
    let young = Service { created: 9, ..service("young", "10.96.0.2", Some(30_080)) };
    let slices = || vec![slice("old", &["10.244.0.1"]), slice("young", &["10.244.0.2"])];
    let mut planner = ProxyPlanner::default();
    let both = planner.plan(&cluster(vec![old, young.clone()], slices()));
    assert_eq!(
        set(&both.plan, SetName::Frontends(Scope::NodePort))
            .groups
            .keys()
            .map(AsRef::as_ref)
            .collect::<Vec<&str>>(),
        ["default/old"]
    );
    let named: Vec<String> = both.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        named,
        [
            "Service default/young: Conflict: IPv4 tcp nodePort 30080 belongs to Service default/old; give one of \
          the two another"
        ]
    );
    let alone = planner.plan(&cluster(vec![young], slices()));
    assert_eq!(
        set(&alone.plan, SetName::Frontends(Scope::NodePort))
            .groups
            .keys()
            .map(AsRef::as_ref)
            .collect::<Vec<&str>>(),
        ["default/young"]
    );
    assert_eq!(alone.problems, vec![]);
}

#[test]
fn a_pod_behind_two_services_has_one_hairpin_element_until_both_are_gone() {
    let services = |names: &[&str]| -> Vec<Service> {
        names
            .iter()
            .map(|name| service(name, if *name == "a" { "10.96.0.1" } else { "10.96.0.2" }, None))
            .collect()
    };
    let slices = || vec![slice("a", &["10.244.0.1"]), slice("b", &["10.244.0.1"])];
    let mut planner = ProxyPlanner::default();
    for (names, elements) in [(&["a", "b"][..], 1), (&["b"][..], 1), (&[][..], 0)] {
        let plan = planner.plan(&cluster(services(names), slices())).plan;
        assert_eq!(set(&plan, SetName::Hairpin).elements().count(), elements, "{names:?}");
    }
}

#[test]
fn a_node_that_is_not_registered_has_no_node_ports_and_says_so() {
    let mut snapshot = cluster(vec![service("a", "10.96.0.1", Some(30_080))], vec![]);
    snapshot.nodes = Arc::default();
    let planned = ProxyPlanner::default().plan(&snapshot);
    assert!(set(&planned.plan, SetName::NodeIps).groups.is_empty());
    assert_eq!(planned.problems.len(), 1);
    assert_eq!(planned.problems[0].object.to_string(), "Node node-a");
}

fn in_namespace(namespace: &str, service: Service) -> Service {
    Service { key: ServiceKey::new(namespace, &service.key.name), ..service }
}

#[test]
fn an_address_outside_the_service_range_is_named_with_the_flag() {
    let services = vec![service("a", "10.96.0.1", None), service("b", "192.168.9.9", None)];
    let planned = ProxyPlanner::default().plan(&cluster(services, vec![]));
    let named: Vec<String> = planned.problems.iter().map(ToString::to_string).collect();
    let expected = "Service default/b: InvalidField: spec.clusterIPs 192.168.9.9 is outside the service ranges 10.96.0.0/12; \
                    give every agent the --service-cluster-ip-range of kube-apiserver as --service-cidr";
    assert_eq!(named, [expected]);
    let with_one = vec![service("b", "192.168.9.9", None)];
    let planned = ProxyPlanner::default().plan(&cluster(with_one, vec![slice("b", &["10.244.1.5"])])).plan;
    let frontends = planned.table.sets["service-ips4"].elements().count();
    assert_eq!(frontends, 1, "as of a ServiceCIDR added later, it is served all the same");
}

#[test]
fn a_wrong_service_range_is_said_once_and_not_for_every_service() {
    let services = |ip: &str| vec![service("kubernetes", ip, None), service("a", "10.43.0.7", None)];
    let mut planner = ProxyPlanner::default();
    let planned = planner.plan(&cluster(services("10.43.0.1"), vec![]));
    let named: Vec<String> = planned.problems.iter().map(|problem| problem.object.to_string()).collect();
    assert_eq!(named, ["Service default/kubernetes"]);
    let planned = planner.plan(&cluster(services("10.96.0.1"), vec![]));
    let named: Vec<String> = planned.problems.iter().map(|problem| problem.object.to_string()).collect();
    assert_eq!(named, ["Service default/a"]);
}

#[test]
fn a_dns_service_at_another_address_than_the_flag_is_named() {
    let dns = in_namespace("kube-system", service("kube-dns", "10.96.0.10", None));
    let mut snapshot = cluster(vec![dns], vec![]);
    let said = |snapshot: &Snapshot| -> Vec<String> {
        ProxyPlanner::default().plan(snapshot).problems.iter().map(ToString::to_string).collect()
    };
    Arc::make_mut(&mut snapshot.config).cluster_dns = vec!["10.96.0.11".parse().unwrap()];
    let expected = "Service kube-system/kube-dns: InvalidField: spec.clusterIPs 10.96.0.10 is not --cluster-dns 10.96.0.11: \
                    pods may ask an address that Weft does not answer on; give every agent the clusterDNS of the kubelets as \
                    --cluster-dns";
    assert_eq!(said(&snapshot), [expected]);
    Arc::make_mut(&mut snapshot.config).cluster_dns.push("10.96.0.10".parse().unwrap());
    assert_eq!(said(&snapshot), [""; 0]);
}

#[test]
fn a_load_balancer_s_address_that_becomes_a_cluster_ip_is_the_cluster_ip_s_however_young() {
    let balanced = Service {
        load_balancer_ips: vec!["198.51.100.1".parse().unwrap()],
        ..service("balanced", "10.96.0.1", None)
    };
    let owner = Service { created: 9, ..service("owner", "198.51.100.1", None) };
    let slices = || vec![slice("balanced", &["10.244.0.1"])];
    let elements = |planned: &weft_model::Planned<ProxyPlan>, group: &str| {
        set(&planned.plan, SetName::Frontends(Scope::Vip)).groups.get(group).map_or(0, |group| group.len())
    };
    let mut planner = ProxyPlanner::default();
    let alone = planner.plan(&cluster(vec![balanced.clone()], slices()));
    assert_eq!(elements(&alone, "default/balanced"), 2);
    let both = planner.plan(&cluster(vec![balanced.clone(), owner], slices()));
    assert_eq!(elements(&both, "default/balanced"), 1, "its ClusterIP is left");
    let said: Vec<String> = both.problems.iter().map(ToString::to_string).collect();
    let conflict = "Service default/balanced: Conflict: address 198.51.100.1 belongs to Service default/owner; give one of the \
                    two another";
    assert_eq!(said.iter().filter(|line| line.contains("default/balanced")).collect::<Vec<_>>(), [conflict]);
    assert_eq!(planner.plan(&cluster(vec![balanced], slices())), alone);
}

#[test]
fn services_that_share_an_address_outside_are_planned_one_by_one() {
    let at = |name: &str, vip: &str, port: u16| {
        let mut service = service(name, vip, None);
        service.load_balancer_ips = vec!["198.51.100.1".parse().unwrap()];
        service.ports[0].port = port;
        service
    };
    let services = vec![at("a", "10.96.0.1", 80), at("b", "10.96.0.2", 81)];
    let slices = vec![slice("a", &["10.244.0.1"]), slice("b", &["10.244.0.2"])];
    let mut planner = ProxyPlanner::default();
    let first = cluster(services, slices);
    let planned = planner.plan(&first);
    assert_eq!(planned.problems, vec![]);
    let again = planner.plan_of(&key("a"));
    let mut others = BTreeSet::new();
    planner.claim(&key("a"), again.as_ref(), &mut others);
    assert_eq!(others, BTreeSet::new());
}

#[test]
fn node_ports_answer_on_the_addresses_of_the_flag() {
    let mut snapshot = cluster(vec![], vec![]);
    let node_ips = |snapshot: &Snapshot| {
        let plan = ProxyPlanner::default().plan(snapshot).plan;
        set(&plan, SetName::NodeIps)
            .elements()
            .map(|(key, _)| key.to_vec()[0].to_string())
            .collect::<Vec<_>>()
    };
    let uplink = |addresses: &[&str]| weft_model::node_facts::Uplink {
        name: "eth1".to_owned(),
        index: 3,
        mtu_bytes: 1500,
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        subnets: vec![],
    };
    Arc::make_mut(&mut snapshot.facts).uplinks = vec![uplink(&["198.18.0.1", "203.0.113.1"])];
    assert_eq!(node_ips(&snapshot), ["192.0.2.1"]);
    Arc::make_mut(&mut snapshot.config).proxy.node_port_ranges = vec!["198.18.0.0/15".parse().unwrap()];
    assert_eq!(node_ips(&snapshot), ["198.18.0.1"]);
    Arc::make_mut(&mut snapshot.config).proxy.node_port_ranges = vec!["0.0.0.0/0".parse().unwrap()];
    assert_eq!(node_ips(&snapshot), ["192.0.2.1", "198.18.0.1", "203.0.113.1"]);
}

#[test]
fn a_set_has_room_for_twice_what_it_holds_however_that_came() {
    let of = |count: u8| {
        let names: Vec<String> = (1..=count).map(|number| format!("s{number}")).collect();
        let services =
            names.iter().enumerate().map(|(n, name)| service(name, &format!("10.96.0.{}", n + 1), None));
        let slices = names.iter().map(|name| slice(name, &["10.245.0.1", "10.245.0.2", "10.245.0.3"]));
        cluster(services.collect(), slices.collect())
    };
    let mut planner = ProxyPlanner::default();
    for (count, frontends, endpoints) in [(10, 256, 256), (129, 512, 1024), (200, 512, 2048), (0, 256, 256)] {
        let plan = planner.plan(&of(count)).plan;
        let names = [SetName::Frontends(Scope::Vip), SetName::Endpoints(Scope::Vip)];
        let rooms = names.map(|name| set(&plan, name).room);
        assert_eq!(rooms, [Some(frontends), Some(endpoints)], "{count}");
        assert_eq!(plan.table, ProxyPlanner::default().plan(&of(count)).plan.table, "{count}");
    }
}

#[test]
fn maps_that_few_clusters_fill_and_their_rules_are_there_while_something_is_in_them() {
    let plain = || service("a", "10.96.0.1", None);
    let looks_into = |plan: &ProxyPlan, set: &str| {
        let mut statements =
            plan.table.chains.values().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.statements);
        statements.any(|statement| statement.set_name() == Some(set))
    };
    let rare = |plan: &ProxyPlan| {
        let optional = ["nodeports4", "nodeport-endpoints4", "sticky-endpoints4", "affinity4", "firewalls4"];
        let there = optional.into_iter().filter(|set| plan.table.sets.contains_key(*set)).collect::<Vec<_>>();
        for set in optional {
            assert_eq!(looks_into(plan, set), there.contains(&set), "{set}");
        }
        there
    };
    let slices = || vec![slice("a", &["10.244.0.1"])];
    let sticky = Service { session_affinity_seconds: Some(600), ..plain() };
    let mut planner = ProxyPlanner::default();
    for (service, there) in [
        (plain(), &[][..]),
        (service("a", "10.96.0.1", Some(30_080)), &["nodeports4", "nodeport-endpoints4"]),
        (sticky, &["sticky-endpoints4", "affinity4"]),
        (plain(), &[]),
    ] {
        let snapshot = cluster(vec![service], slices());
        let plan = planner.plan(&snapshot).plan;
        assert_eq!(rare(&plan), there);
        assert_eq!(plan.table, ProxyPlanner::default().plan(&snapshot).plan.table);
    }
    assert!(planner.plan(&cluster(vec![], vec![])).plan.table.sets.contains_key("service-ips6"));
}
