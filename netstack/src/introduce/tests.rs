//! What is said, what is heard, and what of it counts; that it arrives over the tunnel is tried on the cluster.

use serde_json::{Value, json};
use weft_model::node_facts::WireguardBackend;
use weft_model::objects::Bandwidth;
use weft_model::snapshot::AttachedPod;
use weft_model::{ClusterConfig, Generation, NodeFacts};

use super::*;
use crate::kube::Cluster;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn attachments(entries: &[(&str, &str, &str)]) -> Attachments {
    let attached = |(address, name, uid): &(&str, &str, &str)| {
        let pod = Some(PodKey::new("shop", *name));
        (ip(address), Arc::new(AttachedPod { pod, uid: (*uid).to_owned() }))
    };
    Arc::new(entries.iter().map(attached).collect())
}

fn node(number: u8, cidrs: &[&str]) -> Value {
    json!({"kind": "Node", "metadata": {"name": format!("node{number}")}, "spec": {"podCIDRs": cidrs}})
}

/// As node1 sees it.
fn snapshot(more: impl IntoIterator<Item = Value>) -> Snapshot {
    let config = ClusterConfig::default();
    let facts = NodeFacts {
        name: "node1".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let nodes = [node(1, &["10.0.1.0/24", "fd00:1::/64"]), node(2, &["10.0.2.0/24", "fd00:2::/64"])];
    let cluster = Cluster::from_documents(nodes.into_iter().chain(more));
    cluster.snapshot(Generation(1), Arc::new(config), Arc::new(facts))
}

fn nodes() -> Objects<NodeName, Node> {
    snapshot([]).nodes
}

fn pod(name: &str, uid: &str, ips: &[&str]) -> Pod {
    Pod {
        key: PodKey::new("shop", name),
        uid: uid.to_owned(),
        labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
        node: Some(NodeName("node2".into())),
        host_network: false,
        ips: ips.iter().map(|text| ip(text)).collect(),
        hostname: None,
        subdomain: None,
        terminated: false,
        named_ports: Vec::new(),
        bandwidth: Bandwidth::default(),
    }
}

fn pods(pods: &[Pod]) -> Objects<PodKey, Pod> {
    Arc::new(pods.iter().map(|pod| (pod.key.clone(), Arc::new(pod.clone()))).collect())
}

/// What node2 says of `shop/web` with uid `u`.
fn said(addresses: &[&str], from: &str) -> Introduced {
    let addresses = addresses.iter().map(|text| ip(text)).collect();
    let introductions = [Introduction { pod: PodKey::new("shop", "web"), uid: "u".to_owned(), addresses }];
    let mut introduced = Introduced::default();
    assert!(hear(&mut introduced, &datagrams(&introductions)[0], ip(from), Instant::now()));
    introduced
}

fn addresses_of_web(shown: &[Pod], introduced: &Introduced) -> Vec<String> {
    let all = with_introduced(&pods(shown), &nodes(), introduced, None);
    all[&PodKey::new("shop", "web")].ips.iter().map(ToString::to_string).collect()
}

#[test]
fn a_pod_is_introduced_with_all_its_addresses_when_it_is_attached_and_not_again() {
    let one = attachments(&[("10.0.1.5", "db", "d"), ("fd00:1::5", "db", "d")]);
    let two = attachments(&[
        ("10.0.1.5", "db", "d"),
        ("fd00:1::5", "db", "d"),
        ("10.0.1.6", "web", "w"),
        ("fd00:1::6", "web", "w"),
    ]);
    let new = newly_attached(&one, &two);
    assert_eq!(new.len(), 1);
    assert_eq!((&*new[0].pod.name, new[0].uid.as_str()), ("web", "w"));
    assert_eq!(new[0].addresses, [ip("10.0.1.6"), ip("fd00:1::6")]);
    assert_eq!(newly_attached(&two, &two), []);
    assert_eq!(newly_attached(&two, &one), [], "one that ended");
    let reused = attachments(&[("10.0.1.5", "cache", "c"), ("fd00:1::5", "cache", "c")]);
    assert_eq!(newly_attached(&one, &reused)[0].pod.name.as_ref(), "cache");
}

#[test]
fn who_the_runtime_did_not_name_is_not_introduced() {
    assert_eq!(newly_attached(&Attachments::default(), &attachments(&[("10.0.1.5", "db", "")])), []);
}

#[test]
fn many_are_said_in_datagrams_that_need_no_fragments_and_all_arrive() {
    let introductions: Vec<Introduction> = (0..100)
        .map(|i| Introduction {
            pod: PodKey::new("shop", format!("web-{i}")),
            uid: "8d2ccf0c-5b51-4b6f-8f0c-4f4fbc5f9f11".to_owned(),
            addresses: vec![ip("10.244.100.100"), ip("fd00:10:244:100::100")],
        })
        .collect();
    let datagrams = datagrams(&introductions);
    assert!(datagrams.len() > 1 && datagrams.iter().all(|datagram| datagram.len() <= DATAGRAM_BYTES));
    let mut introduced = Introduced::default();
    for datagram in &datagrams {
        assert!(hear(&mut introduced, datagram, ip("10.0.2.1"), Instant::now()));
    }
    assert_eq!(introduced.len(), 100);
}

#[test]
fn an_introduced_pod_has_its_addresses_before_the_api_shows_them() {
    for from in ["10.0.2.1", "fd00:2::1"] {
        let introduced = said(&["10.0.2.9", "fd00:2::9"], from);
        assert_eq!(addresses_of_web(&[pod("web", "u", &[])], &introduced), ["10.0.2.9", "fd00:2::9"]);
    }
}

#[test]
fn what_the_api_says_is_never_contradicted() {
    let introduced = said(&["10.0.2.9"], "10.0.2.1");
    assert_eq!(addresses_of_web(&[pod("web", "u", &["10.0.2.7"])], &introduced), ["10.0.2.7"]);
    assert!(addresses_of_web(&[pod("web", "another", &[])], &introduced).is_empty(), "its successor");
    let ended = Pod { terminated: true, ..pod("web", "u", &[]) };
    assert!(addresses_of_web(&[ended], &introduced).is_empty());
    let elsewhere = Pod { node: Some(NodeName("node1".into())), ..pod("web", "u", &[]) };
    assert!(addresses_of_web(&[elsewhere], &introduced).is_empty(), "another node's");
    let unplaced = Pod { node: None, ..pod("web", "u", &[]) };
    assert!(addresses_of_web(&[unplaced], &introduced).is_empty());
    let all = with_introduced(&pods(&[pod("db", "d", &[])]), &nodes(), &introduced, None);
    assert_eq!(all.len(), 1, "a pod that the API does not show is none");
}

#[test]
fn a_node_speaks_only_for_itself_and_for_its_own_ranges() {
    let shown = [pod("web", "u", &[])];
    assert!(addresses_of_web(&shown, &said(&["10.0.2.9"], "10.0.1.1")).is_empty(), "from another node");
    assert!(addresses_of_web(&shown, &said(&["10.0.2.9"], "10.0.2.9")).is_empty(), "from a pod");
    for foreign in ["10.0.1.9", "192.0.2.1", "10.0.2.1", "10.0.2.2", "fd00:2::1"] {
        assert!(addresses_of_web(&shown, &said(&["10.0.2.9", foreign], "10.0.2.1")).is_empty(), "{foreign}");
    }
}

#[test]
fn a_pod_that_stays_as_it_is_stays_the_same_object() {
    let (shown, introduced) = (pods(&[pod("web", "u", &[])]), said(&["10.0.2.9"], "10.0.2.1"));
    let first = with_introduced(&shown, &nodes(), &introduced, None);
    let second = with_introduced(&shown, &nodes(), &introduced, Some(&first));
    let web = PodKey::new("shop", "web");
    assert!(Arc::ptr_eq(&first[&web], &second[&web]));
    let nobody = Introduced::default();
    assert!(Arc::ptr_eq(&with_introduced(&shown, &nodes(), &nobody, None), &shown));
}

#[test]
fn nonsense_changes_nothing_and_a_crowd_pushes_out_the_oldest() {
    let mut introduced = said(&["10.0.2.9"], "10.0.2.1");
    let before = introduced.clone();
    for nonsense in [&b""[..], b"[", b"{}", b"[{\"pod\":7}]", b"\xff\xfe", b"[[[[[[[["] {
        assert!(!hear(&mut introduced, nonsense, ip("10.0.2.1"), Instant::now()));
    }
    assert_eq!(introduced, before);
    let later = Instant::now() + Duration::from_secs(1);
    for i in 0..KEPT {
        let pod = PodKey::new("shop", format!("crowd-{i}"));
        let one = [Introduction { pod, uid: "c".to_owned(), addresses: Vec::new() }];
        hear(&mut introduced, &datagrams(&one)[0], ip("10.0.2.1"), later);
    }
    assert_eq!(introduced.len(), KEPT);
    assert!(!introduced.contains_key(&PodKey::new("shop", "web")));
    hear(&mut introduced, b"[]", ip("10.0.2.1"), later + LASTS);
    assert!(introduced.is_empty(), "after a time nothing is kept");
}

#[test]
fn every_other_node_is_told_once_and_nobody_where_there_are_no_policies() {
    let third = node(3, &["fd00:3::/64"]);
    assert!(audience(&snapshot([third.clone()]), ip("10.0.1.1")).is_empty());
    let policy = json!({"kind": "NetworkPolicy", "metadata": {"name": "deny-all", "namespace": "shop"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}});
    let snapshot = snapshot([third, policy]);
    assert_eq!(audience(&snapshot, ip("10.0.1.1")), [ip("10.0.2.1")]);
    assert_eq!(audience(&snapshot, ip("fd00:1::1")), [ip("fd00:3::1")]);
}
