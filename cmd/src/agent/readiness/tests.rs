use std::collections::BTreeMap;
use std::time::SystemTime;

use weft_model::node_facts::WireguardBackend;
use weft_model::objects::Node;
use weft_model::{ClusterConfig, Generation, NodeFacts, ObjectRef, Problem, Reason};
use weft_netstack::kube::{Address, ApiFailure, Endpoint, ServerVersion};

use super::*;

fn api() -> ApiStatus {
    let url = "https://192.0.2.1:6443".to_owned();
    let endpoint = Endpoint::Server { url: url.clone(), token_file: Some("/token".into()), ca_file: None };
    ApiStatus {
        server: Address { url, endpoint },
        connected: true,
        since: SystemTime::UNIX_EPOCH,
        failure: None,
        version: Some(ServerVersion::Supported("v1.37.0".to_owned())),
    }
}

fn away() -> ApiStatus {
    let failure = Some(ApiFailure::Unauthenticated("Unauthorized".to_owned()));
    ApiStatus { connected: false, failure, version: None, ..api() }
}

fn snapshot(from_store: bool) -> Snapshot {
    let node = Node {
        name: "n1".into(),
        uid: String::new(),
        created: 0,
        labels: BTreeMap::new(),
        pod_cidrs: vec!["10.42.0.0/24".parse().unwrap()],
        internal_ips: vec![],
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
    let config =
        ClusterConfig { cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap()], ..ClusterConfig::default() };
    let facts = NodeFacts {
        name: "n1".into(),
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
        nodes: Arc::new([(node.name.clone(), Arc::new(node))].into()),
        config_maps: Default::default(),
        namespaces: Arc::default(),
        services: Arc::default(),
        endpoint_slices: Arc::default(),
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
        from_store,
    }
}

fn report() -> Report {
    Report { name: "overlay".to_owned(), generation: Generation(1), ..Report::default() }
}

fn kinds(found: &[Obstacle]) -> Vec<Kind> {
    found.iter().map(|obstacle| obstacle.kind).collect()
}

#[test]
fn a_node_whose_overlay_is_programmed_may_have_pods() {
    assert_eq!(obstacles(Some(&snapshot(false)), &api(), &report()), []);
}

#[test]
fn without_a_snapshot_the_api_servers_refusal_is_the_reason() {
    let found = obstacles(None, &away(), &Report::default());
    assert_eq!(kinds(&found), [Kind::ApiServer]);
    assert_eq!(Some(found[0].sentence.clone()), away().refusal());
    let starting = ApiStatus { failure: None, ..away() };
    let found = obstacles(None, &starting, &Report::default());
    assert_eq!(kinds(&found), [Kind::Passing]);
    assert!(found[0].sentence.contains("https://192.0.2.1:6443"), "{found:?}");
}

#[test]
fn losing_the_api_server_is_no_reason_once_there_is_a_snapshot() {
    let lost = ApiStatus { version: api().version, ..away() };
    assert_eq!(obstacles(Some(&snapshot(false)), &lost, &report()), []);
    assert_eq!(obstacles(Some(&snapshot(true)), &away(), &report()), [], "after a reboot, from the Store");
}

#[test]
fn no_pod_comes_before_the_servers_version_is_known_or_while_it_is_too_old() {
    let unasked = ApiStatus { version: None, ..api() };
    assert_eq!(kinds(&obstacles(Some(&snapshot(false)), &unasked, &report())), [Kind::Passing]);
    let old = ApiStatus { version: Some(ServerVersion::TooOld("v1.29.1".to_owned())), ..api() };
    let found = obstacles(Some(&snapshot(false)), &old, &report());
    assert_eq!(kinds(&found), [Kind::Lasting]);
    assert!(found[0].sentence.contains("v1.29.1"), "{found:?}");
    let unknown = ApiStatus { version: Some(ServerVersion::Unknown("main".to_owned())), ..api() };
    assert_eq!(obstacles(Some(&snapshot(false)), &unknown, &report()), []);
}

#[test]
fn a_failing_overlay_passes_and_a_lost_claim_lasts() {
    let failing = Report { failures: vec!["is weft tunnel running?".to_owned()], ..report() };
    assert_eq!(kinds(&obstacles(Some(&snapshot(false)), &api(), &failing)), [Kind::Passing]);
    assert_eq!(kinds(&obstacles(Some(&snapshot(false)), &api(), &Report::default())), [Kind::Passing]);
    let problem =
        |node: &str| Problem::new(ObjectRef::new("Node", "", node), Reason::Conflict, "podCIDR ...");
    let quarantined = |node: &str| Report { problems: vec![problem(node)], ..report() };
    assert_eq!(kinds(&obstacles(Some(&snapshot(false)), &api(), &quarantined("n1"))), [Kind::Lasting]);
    assert_eq!(obstacles(Some(&snapshot(false)), &api(), &quarantined("n2")), []);
}

#[test]
fn policies_that_are_not_in_the_kernel_keep_pods_away() {
    let failing = Report { failures: vec!["table weft-policy: refused".to_owned()], ..report() };
    let said = |report: &Report| policy_obstacle(report).map(|obstacle| obstacle.sentence);
    assert_eq!(said(&failing).unwrap(), "network policies are not in place: table weft-policy: refused");
    assert_eq!(said(&Report::default()).unwrap(), "network policies are not programmed yet");
    assert_eq!(said(&report()), None);
}
