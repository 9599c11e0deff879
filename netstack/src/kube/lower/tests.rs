//! What lowers to what, and what becomes of invalid fields.

use serde_json::json;
use weft_model::objects::{ServiceKind, TrafficPolicy};

use super::*;

fn messages<T>(lowered: &Lowered<T>) -> Vec<String> {
    lowered.problems.iter().map(ToString::to_string).collect()
}

#[test]
fn a_service_without_optional_fields_has_the_defaults_of_the_api() {
    let lowered = service(&json!({
        "metadata": {"name": "web", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"clusterIP": "10.96.0.5", "ports": [{"port": 80}]},
    }));
    assert_eq!(messages(&lowered), Vec::<String>::new());
    let service = lowered.value.unwrap();
    assert_eq!(service.kind, ServiceKind::ClusterIps(vec!["10.96.0.5".parse().unwrap()]));
    assert_eq!(service.created, 1_767_225_600);
    assert_eq!(service.internal_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.session_affinity_seconds, None);
    let port = ServicePort { name: String::new(), protocol: Protocol::Tcp, port: 80, node_port: None };
    assert_eq!(service.ports, vec![port]);
}

#[test]
fn an_invalid_field_is_named_and_the_rest_of_the_object_works() {
    let lowered = service(&json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "type": "NodePort",
            "clusterIPs": ["10.96.0.5", "fd00::300::1"],
            "internalTrafficPolicy": "Nearby",
            "ports": [
                {"port": 80, "nodePort": 30080},
                {"port": 70000},
                {"port": 53, "protocol": "QUIC"},
                {"port": 80, "name": "again"},
            ],
        },
    }));
    assert_eq!(
        messages(&lowered),
        [
            "Service shop/web: InvalidField: spec.clusterIPs[1] \"fd00::300::1\" is not an IP address; correct it",
            "Service shop/web: InvalidField: spec.ports[1].port 70000 is no port; use 1 to 65535",
            "Service shop/web: InvalidField: spec.ports[2].protocol \"QUIC\" is unknown; use TCP, UDP or SCTP",
            "Service shop/web: InvalidField: spec.ports[3] repeats port 80 of Tcp; remove one of the two",
            "Service shop/web: InvalidField: spec.internalTrafficPolicy \"Nearby\" is unknown; Cluster is used until it is \
             Cluster or Local",
        ]
    );
    let service = lowered.value.unwrap();
    assert_eq!(service.kind, ServiceKind::ClusterIps(vec!["10.96.0.5".parse().unwrap()]));
    assert_eq!(service.ports.len(), 1);
    assert_eq!(service.ports[0].node_port, Some(30_080));
}

#[test]
fn an_object_of_the_wrong_shape_is_refused_with_its_name() {
    let lowered =
        service(&json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": {"ports": "80"}}));
    assert_eq!(lowered.value, None);
    assert_eq!(
        messages(&lowered),
        [
            "Service shop/web: InvalidField: the object cannot be read (invalid type: string \"80\", expected a sequence); \
          correct that field"
        ]
    );
    for garbage in [json!(null), json!([1]), json!("x"), json!({"metadata": 7})] {
        assert_eq!(node(&garbage).value, None);
        assert_eq!(node(&garbage).problems.len(), 1);
    }
}

#[test]
fn addresses_that_would_hijack_the_host_are_refused() {
    for ip in [
        "127.0.0.1",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "fe80::1",
        "::ffff:10.0.0.1",
    ] {
        let lowered = service(&json!({"metadata": {"name": "evil"}, "spec": {"clusterIP": ip}}));
        assert_eq!(lowered.value.unwrap().kind, ServiceKind::ClusterIps(vec![]), "{ip}");
        assert_eq!(lowered.problems.len(), 1, "{ip}");
    }
}

#[test]
fn nil_conditions_mean_ready_and_serving() {
    let slice = |conditions: Value| {
        let lowered = endpoint_slice(&json!({
            "metadata": {"name": "web-x", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": null,
            "endpoints": [{"addresses": ["10.244.1.5"], "conditions": conditions}],
        }));
        let endpoint = lowered.value.unwrap().endpoints.remove(0);
        (endpoint.ready, endpoint.serving, endpoint.terminating)
    };
    assert_eq!(slice(json!(null)), (true, true, false));
    assert_eq!(slice(json!({"ready": false})), (false, false, false));
    assert_eq!(slice(json!({"ready": false, "serving": true, "terminating": true})), (false, true, true));
}

#[test]
fn slices_of_names_and_slices_of_no_service_are_not_lowered_and_are_no_problem() {
    let fqdn = json!({"metadata": {"name": "a", "labels": {"kubernetes.io/service-name": "a"}}, "addressType": "FQDN"});
    let orphan = json!({"metadata": {"name": "b"}, "addressType": "IPv6"});
    for document in [fqdn, orphan] {
        assert_eq!(endpoint_slice(&document), Lowered { value: None, problems: vec![] });
    }
}

#[test]
fn an_endpoint_of_the_other_family_is_left_out() {
    let lowered = endpoint_slice(&json!({
        "metadata": {"name": "s", "namespace": "d", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv6",
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": []}, {"addresses": ["fd00::1", "fd00::2"]}],
    }));
    assert_eq!(lowered.problems.len(), 2);
    let addresses: Vec<_> = lowered.value.unwrap().endpoints.iter().map(|e| e.address.to_string()).collect();
    assert_eq!(addresses, ["fd00::1"]);
}

#[test]
fn a_node_keeps_one_range_a_family_and_its_own_annotations() {
    let lowered = node(&json!({
        "metadata": {"name": "n1", "annotations": {
            "weft.network/public-key": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=",
            "weft.network/wireguard-port": "none",
        }},
        "spec": {"podCIDRs": ["10.244.1.7/24", "fd00:1::/64", "10.245.0.0/24"]},
        "status": {"addresses": [
            {"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "192.0.2.1"},
        ]},
    }));
    assert_eq!(lowered.problems.len(), 2);
    let node = lowered.value.unwrap();
    assert_eq!(node.pod_cidrs, ["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()]);
    assert_eq!(node.internal_ips, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert!(node.public_key.is_some());
    assert_eq!(node.wireguard_port, None);
}

#[test]
fn what_people_say_about_the_way_to_a_node_is_taken_or_named() {
    let with = |endpoint: &str, keepalive: &str| {
        node(&json!({
            "metadata": {"name": "n1", "annotations": {
                "weft.network/endpoint": endpoint, "weft.network/persistent-keepalive": keepalive,
            }},
            "status": {"addresses": [
                {"type": "ExternalIP", "address": "198.51.100.1"}, {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "ExternalIP", "address": "2001:db8::1"}, {"type": "ExternalDNS", "address": "n1.example"},
            ]},
        }))
    };
    let good = [
        ("edge.example.org", "edge.example.org"),
        ("Edge.example.org.:7000", "edge.example.org:7000"),
        (" 198.51.100.9 ", "198.51.100.9"),
        ("198.51.100.9:7000", "198.51.100.9:7000"),
        ("2001:db8::9", "2001:db8::9"),
        ("[2001:db8::9]:7000", "[2001:db8::9]:7000"),
    ];
    for (text, expected) in good {
        let lowered = with(text, "25");
        assert_eq!(lowered.problems, []);
        let reach = lowered.value.unwrap().reach;
        assert_eq!(reach.endpoint.unwrap().to_string(), expected);
        assert_eq!(reach.keepalive_seconds, Some(25));
        let external = ["198.51.100.1", "2001:db8::1"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!(reach.external_ips, external);
    }
    let long = "a".repeat(64);
    for text in [
        "",
        ":7000",
        "edge:0",
        "edge:70000",
        "198.51.100.9:0",
        "1.2.3",
        "999.1.1.1",
        "a b",
        "http://e",
        &long,
    ] {
        let lowered = with(text, "-1");
        let said: Vec<String> = lowered.problems.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 2, "{text}: {said:?}");
        assert!(
            said.iter().any(|line| line.contains("weft.network/endpoint") && line.contains("for example"))
        );
        assert_eq!(lowered.value.unwrap().reach.endpoint, None);
    }
}

#[test]
fn a_load_balancer_address_with_ip_mode_proxy_is_not_taken() {
    let lowered = service(&json!({
        "metadata": {"name": "lb"},
        "spec": {"type": "LoadBalancer", "clusterIP": "None"},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.1", "ipMode": "Proxy"}, {"ip": "198.51.100.2"}, {"hostname": "lb.example"},
        ]}},
    }));
    let service = lowered.value.unwrap();
    assert_eq!(service.kind, ServiceKind::Headless);
    assert_eq!(service.load_balancer_ips, ["198.51.100.2".parse::<IpAddr>().unwrap()]);
}

#[test]
fn a_source_range_that_is_none_lets_nobody_in_and_blanks_around_one_are_allowed() {
    let document = |kind: &str, ranges: &[&str]| json!({"metadata": {"name": "lb"}, "spec": {"type": kind, "clusterIP": "10.96.0.1", "loadBalancerSourceRanges": ranges}});
    let lowered = service(&document("LoadBalancer", &[" 192.0.2.7/24", "10.0.0.0/99"]));
    assert_eq!(
        lowered.value.unwrap().load_balancer_source_ranges,
        Some(vec!["192.0.2.0/24".parse().unwrap()])
    );
    assert_eq!(
        lowered.problems[0].message,
        "spec.loadBalancerSourceRanges[1] \"10.0.0.0/99\" is not a CIDR, so it lets nobody in; correct it"
    );
    let only_wrong = service(&document("LoadBalancer", &["everybody"]));
    assert_eq!(only_wrong.value.unwrap().load_balancer_source_ranges, Some(vec![]), "not open to all");
    for open in [document("LoadBalancer", &[]), document("ClusterIP", &["10.0.0.0/8"])] {
        assert_eq!(service(&open).value.unwrap().load_balancer_source_ranges, None);
    }
}

#[test]
fn a_health_check_port_belongs_to_load_balancers_with_the_local_policy() {
    let port = |kind: &str, policy: &str, number: i64| {
        let spec = json!({"type": kind, "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy, "healthCheckNodePort": number});
        service(&json!({"metadata": {"name": "lb"}, "spec": spec})).value.unwrap().health_check_node_port
    };
    assert_eq!(port("LoadBalancer", "Local", 31_000), Some(31_000));
    assert_eq!(port("LoadBalancer", "Local", 0), None);
    assert_eq!(port("LoadBalancer", "Local", 70_000), None);
    assert_eq!(port("LoadBalancer", "Cluster", 31_000), None);
    assert_eq!(port("NodePort", "Local", 31_000), None);
}

#[test]
fn hints_are_names_of_zones_and_nodes() {
    let lowered = endpoint_slice(&json!({
        "metadata": {"name": "s", "namespace": "d", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.1.0.1"], "hints": {"forZones": [{"name": "b"}, {"name": "a"}], "forNodes": [{"name": "n1"}]}},
            {"addresses": ["10.1.0.2"], "hints": {}},
            {"addresses": ["10.1.0.3"]},
        ],
    }));
    let hints: Vec<(Vec<String>, usize)> = lowered
        .value
        .unwrap()
        .endpoints
        .into_iter()
        .map(|endpoint| endpoint.hints.map(|hints| *hints).unwrap_or_default())
        .map(|hints| (hints.zones.into_iter().collect(), hints.nodes.len()))
        .collect();
    assert_eq!(hints, [(vec!["a".to_owned(), "b".to_owned()], 1), (vec![], 0), (vec![], 0)]);
}

#[test]
fn a_node_that_is_deleted_or_tainted_for_removal_is_leaving() {
    let leaving = |node: serde_json::Value| super::node(&node).value.unwrap().leaving;
    assert!(!leaving(
        json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "node.kubernetes.io/not-ready"}]}})
    ));
    assert!(leaving(json!({"metadata": {"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"}})));
    assert!(leaving(
        json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}})
    ));
}
