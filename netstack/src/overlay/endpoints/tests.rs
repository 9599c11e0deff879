//! Where node-1 calls node-2, in a dual-stack cluster.

use std::sync::Arc;

use weft_model::node_facts::Uplink;

use super::*;
use crate::overlay::plan::tests::{dual, snapshot};

/// With uplinks of node-1 (`address/length`) and what is changed at both Nodes.
fn called(
    uplinks: &[&str],
    change: impl Fn(&mut Node, &mut Node),
) -> (Vec<String>, Option<u16>, Vec<String>) {
    let (mut own, mut other) = (dual(1), dual(2));
    change(&mut own, &mut other);
    let mut snapshot = snapshot(vec![own, other]);
    let facts = Arc::make_mut(&mut snapshot.facts);
    facts.observed.names.insert("edge.example".to_owned(), vec![ip("198.51.100.7"), ip("2001:db8:7::7")]);
    if !uplinks.is_empty() {
        let nets: Vec<ipnet::IpNet> = uplinks.iter().map(|text| text.parse().unwrap()).collect();
        facts.uplinks = vec![Uplink {
            name: "eth0".to_owned(),
            index: 2,
            mtu_bytes: 1500,
            addresses: nets.iter().map(ipnet::IpNet::addr).collect(),
            subnets: nets.iter().map(ipnet::IpNet::trunc).collect(),
        }];
    }
    let (accepted, _) = quarantine::accept(snapshot.nodes.values(), &snapshot.config);
    let other = accepted.iter().find(|accepted| *accepted.node.name.0 == *"node-2").unwrap();
    let mut problems = Vec::new();
    let here = Here::of(&snapshot);
    let found = endpoints(&here, other, &mut problems);
    let keepalive = keepalive_seconds(&here, &found);
    let text = |endpoint: &Endpoint| format!("{} {}", endpoint.address, endpoint.kind);
    (found.iter().map(text).collect(), keepalive, problems.iter().map(ToString::to_string).collect())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_node_is_called_at_its_internal_ips_first_and_then_at_its_external_ones() {
    let (found, keepalive, problems) =
        called(&[], |_, other| other.reach.external_ips = vec![ip("198.51.100.2")]);
    let expected =
        ["192.0.2.2:51820 InternalIP", "[2001:db8::2]:51820 InternalIP", "198.51.100.2:51820 ExternalIP"];
    assert_eq!((found, keepalive, problems), (expected.map(str::to_owned).to_vec(), None, vec![]));
}

#[test]
fn an_address_in_a_subnet_of_this_node_comes_before_what_an_annotation_says() {
    let (found, ..) = called(&["192.0.2.1/24"], |_, other| {
        other.reach.endpoint = Some("198.51.100.2:7000".parse().unwrap());
    });
    assert_eq!(found, ["192.0.2.2:51820 same subnet", "198.51.100.2:7000 annotation"]);
}

#[test]
fn a_family_that_this_node_has_not_is_not_called() {
    let (found, ..) = called(&["2001:db8:1::1/64"], |_, other| {
        other.reach.external_ips = vec![ip("198.51.100.2"), ip("2001:db8:9::2")];
    });
    assert_eq!(found, ["[2001:db8::2]:51820 InternalIP", "[2001:db8:9::2]:51820 ExternalIP"]);
}

#[test]
fn a_name_is_called_at_all_its_addresses_and_one_that_is_not_resolved_is_said() {
    let named = |name: &str| {
        let endpoint = Some(name.parse().unwrap());
        called(&["10.1.1.1/24", "2001:db8:1::1/64"], move |_, other| {
            other.reach.endpoint.clone_from(&endpoint)
        })
    };
    let (found, keepalive, problems) = named("Edge.example.:7000");
    let expected = [
        "198.51.100.7:7000 annotation",
        "[2001:db8:7::7]:7000 annotation",
        "192.0.2.2:51820 InternalIP",
        "[2001:db8::2]:51820 InternalIP",
    ];
    assert_eq!((found, problems), (expected.map(str::to_owned).to_vec(), vec![]));
    assert_eq!(keepalive, Some(25), "10.1.1.1 cannot cross the internet as it is");
    let (found, _, problems) = named("nowhere.example");
    assert_eq!(found, ["192.0.2.2:51820 InternalIP", "[2001:db8::2]:51820 InternalIP"]);
    assert!(problems[0].contains("nowhere.example cannot be resolved"), "{problems:?}");
}

#[test]
fn an_endpoint_among_pods_or_services_is_refused_by_name() {
    let (found, _, problems) = called(&[], |_, other| {
        other.reach.external_ips = vec![ip("10.42.2.9")];
        other.reach.endpoint = Some("10.43.0.1".parse().unwrap());
    });
    assert_eq!(found.len(), 2);
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("weft.network/endpoint: 10.43.0.1 lies inside a pod or Service range"));
    assert!(problems[1].contains("ExternalIP 10.42.2.9 lies inside"));
}

#[test]
fn an_external_address_that_two_nodes_share_is_that_of_their_nat() {
    let (found, ..) = called(&[], |own, other| {
        own.reach.external_ips = vec![ip("198.51.100.2")];
        other.reach.external_ips = vec![ip("198.51.100.2")];
    });
    assert!(!found.iter().any(|endpoint| endpoint.contains("198.51.100.2")), "{found:?}");
}

#[test]
fn a_nat_is_kept_open_only_where_there_must_be_one() {
    let with_external = |uplinks: &[&str], external: &str, said: Option<u16>| {
        let external = ip(external);
        let change = move |own: &mut Node, other: &mut Node| {
            other.internal_ips = vec![ip("10.9.0.2")];
            other.reach.external_ips = vec![external];
            own.reach.keepalive_seconds = said;
        };
        called(uplinks, change).1
    };
    for private in ["10.1.1.1/24", "172.16.0.1/24", "192.168.1.1/24", "100.64.0.1/10", "169.254.0.9/16"] {
        assert_eq!(with_external(&[private], "198.51.100.2", None), Some(25), "{private}");
    }
    assert_eq!(with_external(&["fd00::1/64"], "2001:db8:9::2", None), Some(25));
    assert_eq!(with_external(&["203.0.113.1/24"], "198.51.100.2", None), None, "a public address of its own");
    assert_eq!(with_external(&["10.1.1.1/24"], "10.8.0.2", None), None, "routed between sites");
    assert_eq!(with_external(&["10.9.0.1/24"], "198.51.100.2", None), None, "next door");
    assert_eq!(with_external(&["10.1.1.1/24"], "198.51.100.2", Some(0)), None);
    assert_eq!(with_external(&["203.0.113.1/24"], "198.51.100.2", Some(15)), Some(15));
}

#[test]
fn people_see_every_candidate_with_its_reason() {
    let snapshot = snapshot(vec![dual(1), dual(2)]);
    let status = PeerStatus {
        public_key: dual(2).public_key.unwrap(),
        own_key: None,
        endpoint: None,
        last_handshake_seconds: None,
        received_bytes: 0,
        sent_bytes: 0,
    };
    let seen = explain(Some(&snapshot), vec![status.clone()]);
    assert_eq!(seen[0].node.as_deref(), Some("node-2"));
    let kinds: Vec<&str> = seen[0].candidates.iter().map(|candidate| candidate.kind.as_str()).collect();
    assert_eq!(kinds, ["InternalIP", "InternalIP"]);
    assert_eq!(explain(None, vec![status])[0].candidates, []);
}
