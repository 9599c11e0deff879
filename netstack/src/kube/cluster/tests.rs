//! Events in, Snapshots out: what changes, what keeps its identity.

use serde_json::json;
use weft_model::node_facts::WireguardBackend;

use super::*;

fn service(name: &str, ip: &str) -> Document {
    Document::new(json!({
        "metadata": {"name": name, "namespace": "default", "resourceVersion": "1"},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
    }))
}

fn listed(services: Vec<Document>) -> Cluster {
    let mut cluster = Cluster::default();
    for kind in Kind::ALL {
        cluster.apply(kind, Event::Init);
    }
    for service in services {
        cluster.apply(Kind::Service, Event::InitApply(service));
    }
    for kind in Kind::ALL {
        cluster.apply(kind, Event::InitDone);
    }
    cluster
}

fn snapshot(cluster: &Cluster) -> Snapshot {
    let config = ClusterConfig::default();
    let facts = NodeFacts {
        name: "n1".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts))
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

#[test]
fn a_cluster_is_complete_when_every_kind_has_listed() {
    let mut cluster = Cluster::default();
    for (i, kind) in Kind::ALL.into_iter().enumerate() {
        assert!(!cluster.is_complete());
        cluster.apply(kind, Event::Init);
        assert!(cluster.apply(kind, Event::InitDone), "the first list counts, even an empty one");
        assert_eq!(cluster.is_complete(), i + 1 == Kind::ALL.len());
    }
}

#[test]
fn a_change_to_one_object_keeps_the_identity_of_the_others() {
    let mut cluster = listed(vec![service("a", "10.96.0.1"), service("b", "10.96.0.2")]);
    let before = snapshot(&cluster);
    assert!(cluster.apply(Kind::Service, Event::Apply(service("a", "10.96.0.9"))));
    let after = snapshot(&cluster);
    assert!(Arc::ptr_eq(&before.services[&key("b")], &after.services[&key("b")]));
    assert_ne!(before.services[&key("a")], after.services[&key("a")]);
    assert!(Arc::ptr_eq(&before.nodes, &after.nodes));
}

fn service_cidr(name: &str, cidrs: &[&str]) -> Event<Document> {
    Event::Apply(Document::new(json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}})))
}

/// Service ranges and Problems of a cluster whose operator gave 10.96.0.0/16 and fd00:96::/112.
fn ranges(cluster: &Cluster) -> (Vec<String>, Vec<String>) {
    let flags = ["10.96.0.0/16", "fd00:96::/112"].map(|range| range.parse().unwrap());
    let config = ClusterConfig { service_cidrs: flags.into(), ..ClusterConfig::default() };
    let Snapshot { config, problems, .. } =
        cluster.snapshot(Generation(1), Arc::new(config), snapshot(cluster).facts);
    let texts = config.service_cidrs.iter().map(ToString::to_string).collect();
    (texts, problems.iter().map(ToString::to_string).collect())
}

#[test]
fn service_ranges_are_those_of_the_api_server_and_of_the_flag_where_it_does_not_say() {
    let mut cluster = listed(vec![]);
    let flagged = ["10.96.0.0/16", "fd00:96::/112"].map(str::to_owned).to_vec();
    assert_eq!(ranges(&cluster), (flagged.clone(), vec![]), "a server of before 1.33");
    cluster.apply(Kind::ServiceCidr, service_cidr("kubernetes", &["10.96.0.0/16", "fd00:96::/112"]));
    assert_eq!(ranges(&cluster), (flagged.clone(), vec![]));
    assert!(cluster.apply(Kind::ServiceCidr, service_cidr("more", &["10.200.0.0/24"])));
    let more = ["10.96.0.0/16", "10.200.0.0/24", "fd00:96::/112"].map(str::to_owned).to_vec();
    assert_eq!(ranges(&cluster), (more, vec![]));
    assert!(
        cluster.apply(Kind::ServiceCidr, Event::Delete(Document::new(json!({"metadata": {"name": "more"}}))))
    );
    assert_eq!(ranges(&cluster), (flagged, vec![]));
}

#[test]
fn a_range_of_the_flag_that_the_api_server_does_not_have_is_named_and_not_used() {
    let mut cluster = listed(vec![]);
    cluster.apply(Kind::ServiceCidr, service_cidr("kubernetes", &["10.43.0.0/16", "fd00:96::/112"]));
    let problem = "ServiceCIDR kubernetes: InvalidField: spec.cidrs: the API server allocates from 10.43.0.0/16,fd00:96::/112, \
                   nothing from --service-cidr 10.96.0.0/16: Weft goes by the API server; give every agent the \
                   --service-cluster-ip-range of kube-apiserver";
    let told = ["10.43.0.0/16", "fd00:96::/112"].map(str::to_owned).to_vec();
    assert_eq!(ranges(&cluster), (told, vec![problem.to_owned()]));
    cluster.apply(Kind::ServiceCidr, service_cidr("broken", &["10.43.0.0/33"]));
    let (_, problems) = ranges(&cluster);
    assert!(
        problems.iter().any(|said| said.contains("broken") && said.contains("is not a CIDR")),
        "{problems:?}"
    );
}

#[test]
fn an_equal_event_and_an_equal_list_change_nothing() {
    let mut cluster = listed(vec![service("a", "10.96.0.1")]);
    let before = snapshot(&cluster);
    assert!(!cluster.apply(Kind::Service, Event::Apply(service("a", "10.96.0.1"))));
    assert!(!cluster.apply(Kind::Service, Event::Init));
    assert!(!cluster.apply(Kind::Service, Event::InitApply(service("a", "10.96.0.1"))));
    assert!(!cluster.apply(Kind::Service, Event::InitDone));
    assert!(Arc::ptr_eq(&before.services, &snapshot(&cluster).services));
}

#[test]
fn a_new_list_takes_effect_at_its_end_and_removes_what_it_does_not_hold() {
    let mut cluster = listed(vec![service("a", "10.96.0.1"), service("b", "10.96.0.2")]);
    let before = snapshot(&cluster);
    cluster.apply(Kind::Service, Event::Init);
    cluster.apply(Kind::Service, Event::InitApply(service("b", "10.96.0.2")));
    assert_eq!(snapshot(&cluster), before, "half a list is no list");
    assert!(cluster.apply(Kind::Service, Event::InitDone));
    let after = snapshot(&cluster);
    assert_eq!(after.services.keys().collect::<Vec<_>>(), [&key("b")]);
    assert!(Arc::ptr_eq(&before.services[&key("b")], &after.services[&key("b")]));
}

#[test]
fn a_list_that_breaks_off_leaves_nothing_in_the_next() {
    let mut cluster = listed(vec![]);
    cluster.apply(Kind::Service, Event::Init);
    cluster.apply(Kind::Service, Event::InitApply(service("ghost", "10.96.0.1")));
    cluster.apply(Kind::Service, Event::Init);
    assert!(!cluster.apply(Kind::Service, Event::InitDone));
    assert!(snapshot(&cluster).services.is_empty());
}

#[test]
fn an_unreadable_object_is_as_if_absent_and_named_until_it_is_mended() {
    let mut cluster = listed(vec![service("a", "10.96.0.1"), service("b", "10.96.0.2")]);
    let broken = Document::new(json!({"metadata": {"name": "a", "namespace": "default"}, "spec": 7}));
    assert!(cluster.apply(Kind::Service, Event::Apply(broken)));
    let during = snapshot(&cluster);
    assert_eq!(during.services.keys().collect::<Vec<_>>(), [&key("b")]);
    assert_eq!(during.problems.len(), 1);
    assert!(cluster.apply(Kind::Service, Event::Apply(service("a", "10.96.0.1"))));
    assert_eq!(snapshot(&cluster).problems.len(), 0);
    assert_eq!(snapshot(&cluster).services.len(), 2);
}

#[test]
fn objects_that_equal_the_stored_ones_keep_their_identity() {
    let stored = snapshot(&listed(vec![service("a", "10.96.0.1")]));
    let mut cluster = Cluster::from_stored(&stored);
    assert!(!cluster.is_complete());
    cluster.apply(Kind::Service, Event::Init);
    cluster.apply(Kind::Service, Event::InitApply(service("a", "10.96.0.1")));
    cluster.apply(Kind::Service, Event::InitApply(service("b", "10.96.0.2")));
    cluster.apply(Kind::Service, Event::InitDone);
    let now = snapshot(&cluster);
    assert!(Arc::ptr_eq(&stored.services[&key("a")], &now.services[&key("a")]));
    assert_eq!(now.services.len(), 2);
}
