//! What a NetworkPolicy lowers to, and that what cannot be understood denies.

use serde_json::json;
use weft_model::objects::Protocol;

use super::*;

fn lowered(spec: Value) -> (NetworkPolicy, Vec<String>) {
    let document = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
    let Lowered { value, problems } = network_policy(&document);
    (value.unwrap(), problems.iter().map(|problem| problem.message.clone()).collect())
}

fn well(spec: Value) -> NetworkPolicy {
    let (policy, problems) = lowered(spec);
    assert_eq!(problems, Vec::<String>::new());
    policy
}

fn nobody() -> PolicyRule {
    PolicyRule { peers: Some(vec![]), ports: None }
}

#[test]
fn without_policy_types_ingress_counts_always_and_egress_when_it_has_rules() {
    let directions = |spec| {
        let policy = well(spec);
        (policy.ingress.is_some(), policy.egress.is_some())
    };
    assert_eq!(directions(json!({"podSelector": {}})), (true, false));
    assert_eq!(directions(json!({"podSelector": {}, "egress": []})), (true, false));
    assert_eq!(directions(json!({"podSelector": {}, "egress": [{}]})), (true, true));
    assert_eq!(
        directions(json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]})),
        (false, true)
    );
    assert_eq!(directions(json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})), (true, true));
}

#[test]
fn an_empty_rule_allows_everybody_and_no_rule_nobody() {
    let policy = well(json!({"podSelector": {}, "ingress": [{}], "policyTypes": ["Ingress", "Egress"]}));
    assert_eq!(policy.ingress, Some(vec![PolicyRule { peers: None, ports: None }]));
    assert_eq!(policy.egress, Some(vec![]));
    let empty_lists = well(json!({"podSelector": {}, "ingress": [{"from": [], "ports": []}]}));
    assert_eq!(empty_lists.ingress, policy.ingress, "empty lists are as if missing");
}

#[test]
fn selectors_in_one_peer_are_one_peer_and_in_two_are_two() {
    let one = |peers| {
        well(json!({"podSelector": {}, "ingress": [{"from": peers}]})).ingress.unwrap()[0].peers.clone()
    };
    let (ns, pod) = (json!({"matchLabels": {"team": "a"}}), json!({"matchLabels": {"app": "b"}}));
    let and = one(json!([{"namespaceSelector": ns, "podSelector": pod}])).unwrap();
    assert_eq!(and.len(), 1);
    let or = one(json!([{"namespaceSelector": ns}, {"podSelector": pod}])).unwrap();
    assert_eq!(or.len(), 2);
    let everybody = one(json!([{"namespaceSelector": {}}])).unwrap();
    assert_eq!(everybody, [Peer::Pods { namespaces: Some(Selector::default()), pods: Selector::default() }]);
    let own = one(json!([{"podSelector": {}}])).unwrap();
    assert_eq!(own, [Peer::Pods { namespaces: None, pods: Selector::default() }]);
}

#[test]
fn ports_are_numbers_names_ranges_or_a_whole_protocol() {
    let policy = well(json!({"podSelector": {}, "ingress": [{"ports": [
        {"port": 80}, {"protocol": "UDP", "port": "dns"}, {"protocol": "SCTP"}, {"port": 8000, "endPort": 8080},
    ]}]}));
    let port = |protocol, ports| PolicyPort { protocol, ports };
    assert_eq!(
        policy.ingress.unwrap()[0].ports,
        Some(vec![
            port(Protocol::Tcp, Ports::Range(80, 80)),
            port(Protocol::Tcp, Ports::Range(8000, 8080)),
            port(Protocol::Udp, Ports::Named("dns".into())),
            port(Protocol::Sctp, Ports::All),
        ])
    );
}

#[test]
fn what_a_peer_cannot_mean_allows_nobody_and_is_named() {
    let cases = [
        (json!({"ipBlock": {"cidr": "10.0.0.0/33"}}), "ipBlock.cidr \"10.0.0.0/33\" is not a CIDR"),
        (
            json!({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.1.0/28"]}}),
            "except[0] 10.0.1.0/28 is outside of cidr 10.0.0.0/24",
        ),
        (
            json!({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["fd00::/64"]}}),
            "except[0] fd00::/64 is outside",
        ),
        (json!({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["ten"]}}), "except[0] \"ten\" is not a CIDR"),
        (json!({"ipBlock": {"cidr": "10.0.0.0/24"}, "podSelector": {}}), "both ipBlock and a selector"),
        (json!({}), "names nobody"),
        (json!({"serviceSelector": {}}), "from[0].serviceSelector is not known to this version"),
        (json!({"podSelector": {}, "onlyOnSundays": true}), "from[0].onlyOnSundays is not known"),
        (
            json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}}),
            "matchExpressions[0] \"Gt\" with 1 values",
        ),
        (
            json!({"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
            "namespaceSelector.matchExpressions[0] \"In\" with 0 values",
        ),
    ];
    for (peer, said) in cases {
        let (policy, problems) = lowered(json!({"podSelector": {}, "ingress": [{"from": [peer]}]}));
        assert_eq!(policy.ingress, Some(vec![nobody()]), "{peer}");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].contains("spec.ingress[0].from[0]") && problems[0].contains(said),
            "{problems:?}"
        );
    }
}

#[test]
fn what_a_port_cannot_mean_allows_nothing_and_is_named() {
    let cases = [
        (json!({"port": 80, "endPort": 79}), "endPort 79 is below port 80"),
        (json!({"port": "http", "endPort": 90}), "endPort 90 cannot go with the name \"http\""),
        (json!({"endPort": 90}), "endPort 90 stands without port"),
        (json!({"port": 0}), "port 0 is no port"),
        (json!({"port": 80, "endPort": 70_000}), "endPort 70000 is no port"),
        (json!({"port": 80, "protocol": "QUIC"}), "protocol \"QUIC\" is unknown"),
        (json!({"port": true}), "port true is neither a number nor a name"),
        (json!({"port": 80, "appProtocol": "h2"}), "appProtocol is not known"),
    ];
    for (port, said) in cases {
        let (policy, problems) = lowered(json!({"podSelector": {}, "ingress": [{"ports": [port]}]}));
        assert_eq!(policy.ingress, Some(vec![PolicyRule { peers: None, ports: Some(vec![]) }]), "{port}");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].contains("spec.ingress[0].ports[0]") && problems[0].contains(said),
            "{problems:?}"
        );
    }
}

#[test]
fn a_rule_with_an_unknown_field_allows_nothing_and_its_neighbours_stand() {
    let (policy, problems) =
        lowered(json!({"podSelector": {}, "ingress": [{"when": "now"}, {"ports": [{"port": 80}]}]}));
    let rules = policy.ingress.unwrap();
    assert_eq!((&rules[0], rules[1].peers.is_none()), (&nobody(), true), "numbers of rules stay");
    assert!(problems[0].contains("spec.ingress[0].when is not known"), "{problems:?}");
    let (policy, problems) = lowered(json!({"podSelector": {}, "ingress": [{"to": [{"podSelector": {}}]}]}));
    assert_eq!(policy.ingress, Some(vec![nobody()]));
    assert!(problems[0].contains("spec.ingress[0].to has no place in ingress"), "{problems:?}");
}

#[test]
fn a_subject_that_cannot_be_understood_isolates_all_that_it_may_mean_and_allows_nothing() {
    let expressions = json!([{"key": "tier", "operator": "Near", "values": ["db"]}]);
    let (policy, problems) = lowered(json!({
        "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": expressions}, "ingress": [{}],
    }));
    assert!(policy.subject.matches(&[("app".to_owned(), "web".to_owned())].into()));
    assert!(!policy.subject.matches(&[("app".to_owned(), "db".to_owned())].into()));
    assert_eq!(policy.ingress, Some(vec![]));
    assert_eq!(problems.len(), 1, "{problems:?}");
}

#[test]
fn a_policy_that_cannot_be_read_isolates_its_namespace() {
    let (policy, problems) = lowered(json!({"podSelector": 7}));
    assert_eq!((&policy.ingress, &policy.egress), (&Some(vec![]), &Some(vec![])));
    assert_eq!((policy.key.to_string().as_str(), &policy.subject), ("shop/p", &Selector::default()));
    assert!(problems[0].ends_with("until then every pod of the namespace is isolated"), "{problems:?}");
}

#[test]
fn a_thousand_labels_and_a_million_addresses_are_no_trouble() {
    let labels: std::collections::BTreeMap<String, &str> =
        (0..1000).map(|i| (format!("l{i}"), "v")).collect();
    let policy = well(
        json!({"podSelector": {"matchLabels": labels}, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/12"}}]}]}),
    );
    assert_eq!(policy.subject.requirements.len(), 1000);
}

#[test]
fn the_annotation_says_what_becomes_of_established_connections() {
    let of = |value: &str| {
        let annotations = json!({ANNOTATION_ESTABLISHED: value});
        let document = json!({"metadata": {"name": "p", "namespace": "shop", "annotations": annotations}, "spec": {"podSelector": {}}});
        let lowered = network_policy(&document);
        (lowered.value.unwrap().keep_established, lowered.problems.len())
    };
    assert_eq!([of("keep"), of("cut"), of("perhaps")], [(true, 0), (false, 0), (false, 1)]);
}
