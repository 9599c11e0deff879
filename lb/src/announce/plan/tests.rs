//! Who may answer, from real objects.

use serde_json::{Value, json};
use weft_model::node_facts::Uplink;

use super::*;
use crate::allocate::tests::{node, pool, service, snapshot};

fn given(mut service: Value, ip: &str) -> Value {
    service["status"] = json!({"loadBalancer": {"ingress": [{"ip": ip, "ipMode": "VIP"}]}});
    service
}

fn advertisement(spec: Value) -> Value {
    json!({"kind": "L2Advertisement", "metadata": {"name": "l2", "namespace": "m"}, "spec": spec})
}

fn planned(objects: &[Value]) -> Planned<Plan> {
    let mut snapshot = snapshot(objects);
    let link = |name: &str, index, subnet: &str| Uplink {
        name: name.to_owned(),
        index,
        mtu_bytes: 1500,
        addresses: vec![],
        subnets: vec![subnet.parse().unwrap()],
    };
    let facts = Arc::make_mut(&mut snapshot.facts);
    facts.uplinks = vec![link("eth0", 2, "198.51.100.0/24"), link("eth1", 3, "203.0.113.0/24")];
    plan(&snapshot)
}

fn candidates(objects: &[Value]) -> BTreeSet<String> {
    let plan = planned(objects).plan;
    let names = plan.addresses.values().flat_map(|it| &it.candidates);
    names.map(ToString::to_string).collect()
}

fn texts(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn nodes() -> Vec<Value> {
    let mut labelled = node("b", 2);
    labelled["metadata"]["labels"] = json!({"lan": "yes"});
    vec![node("a", 1), labelled, node("c", 3)]
}

fn with(more: Vec<Value>) -> Vec<Value> {
    nodes().into_iter().chain([pool("p", &["198.51.100.0/28"])]).chain(more).collect()
}

#[test]
fn every_node_may_answer_on_links_that_hold_the_subnet() {
    let objects = with(vec![given(service(1), "198.51.100.1")]);
    assert_eq!(candidates(&objects), texts(&["a", "b", "c"]));
    let plan = planned(&objects).plan;
    let announced = plan.addresses.values().next().unwrap();
    assert_eq!(announced.links, BTreeMap::from([("eth0".to_owned(), 2)]));
}

#[test]
fn an_l2_advertisement_chooses_pools_nodes_and_links() {
    let service = given(service(1), "198.51.100.1");
    let spec = json!({"ipAddressPools": ["p"], "nodeSelectors": [{"matchLabels": {"lan": "yes"}}]});
    assert_eq!(candidates(&with(vec![service.clone(), advertisement(spec)])), texts(&["b"]));
    let other_pool = json!({"ipAddressPools": ["q"]});
    assert_eq!(candidates(&with(vec![service.clone(), advertisement(other_pool)])), texts(&[]));
    let elsewhere = json!({"interfaces": ["eth1"]});
    let objects = with(vec![service, advertisement(elsewhere)]);
    assert!(planned(&objects).plan.addresses.values().all(|announced| announced.links.is_empty()));
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    let problems = planned(&with(vec![advertisement(json!({"interfaces": ["wlan7"]}))])).problems;
    let said = problems[0].to_string();
    assert!(said.starts_with("L2Advertisement m/l2: Missing: spec.interfaces wlan7"), "{said}");
}

#[test]
fn local_traffic_leaves_nodes_with_ready_endpoints_only() {
    let mut local = given(service(1), "198.51.100.1");
    local["spec"]["externalTrafficPolicy"] = "Local".into();
    let slice = |namespace: &str, node: u8| {
        json!({"kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"port": 80}],
        "metadata": {"name": "x", "namespace": namespace, "labels": {"kubernetes.io/service-name": "s001"}},
        "endpoints": [{"addresses": [format!("192.0.2.{node}")], "conditions": {"ready": true}}]})
    };
    let others = ["d", "default-x", "e"].map(|namespace| slice(namespace, 1));
    let objects = with([vec![local, slice("default", 3)], others.into()].concat());
    assert_eq!(
        candidates(&objects),
        texts(&["c"]),
        "endpoints that are addresses of nodes, of this namespace"
    );
}

#[test]
fn addresses_of_nodes_and_of_strangers_are_never_announced() {
    for ip in ["192.0.2.1", "203.0.113.77"] {
        assert_eq!(candidates(&with(vec![given(service(1), ip)])), texts(&[]), "{ip}");
    }
}

#[test]
fn a_node_that_goes_moves_only_its_own_addresses() {
    let services = (1..15).map(|number| given(service(number), &format!("198.51.100.{number}")));
    let objects: Vec<Value> = with(services.collect());
    let first = |objects: &[Value]| -> BTreeMap<IpAddr, NodeName> {
        let plan = planned(objects).plan;
        plan.addresses.into_iter().map(|(ip, announced)| (ip, announced.candidates[0].clone())).collect()
    };
    let before = first(&objects);
    let used: BTreeSet<&NodeName> = before.values().collect();
    assert_eq!(used.len(), 3, "spread over all");
    let without_c: Vec<Value> =
        objects.into_iter().filter(|object| object["metadata"]["name"] != "c").collect();
    let after = first(&without_c);
    for (ip, node) in before.iter().filter(|(_, node)| *node.0 != *"c") {
        assert_eq!(after[ip], *node);
    }
}

#[test]
fn an_address_on_no_subnet_of_the_node_that_is_to_answer_is_told_there_only() {
    let pool = pool("p", &["100.64.0.0/28"]);
    // Of several nodes the first says it; with one node that is this one.
    let alone = |ip| [node("a", 1), pool.clone(), given(service(1), ip)];
    let said: Vec<String> = planned(&alone("100.64.0.1")).problems.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("Service "), "{said:?}");
    assert!(said[0].contains("100.64.0.1 is on no subnet of Node a") && said[0].contains("LAN"), "{said:?}");
    let told: Vec<bool> = (1..16)
        .map(|last| {
            let ip = format!("100.64.0.{last}");
            let elsewhere = nodes().into_iter().map(|mut node| {
                node["metadata"]["annotations"]["weft.network/links"] = "eth0=198.51.100.0/24".into();
                node
            });
            let objects = elsewhere.chain([pool.clone(), given(service(1), &ip)]).collect::<Vec<_>>();
            let planned = planned(&objects);
            let first = planned.plan.addresses.values().next().unwrap().candidates[0].clone();
            assert_eq!(planned.problems.is_empty(), *first.0 != *"a", "{ip}: {first}");
            *first.0 == *"a"
        })
        .collect();
    assert!(told.contains(&true) && told.contains(&false));
}

fn order(objects: &[Value]) -> Vec<String> {
    let plan = planned(objects).plan;
    plan.addresses.values().flat_map(|it| &it.candidates).map(ToString::to_string).collect()
}

#[test]
fn a_node_that_is_cordoned_leaves_or_is_labelled_to_be_left_out_serves_only_when_nobody_else_can() {
    let service = given(service(1), "198.51.100.1");
    let before = order(&with(vec![service.clone()]));
    let changes = [
        json!({"spec": {"unschedulable": true}}),
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        json!({"metadata": {"labels": {"node.kubernetes.io/exclude-from-external-load-balancers": ""}}}),
    ];
    for change in changes {
        let mut objects = with(vec![service.clone()]);
        let first =
            objects.iter_mut().find(|object| object["metadata"]["name"] == before[0].as_str()).unwrap();
        for (part, fields) in change.as_object().unwrap() {
            for (field, value) in fields.as_object().unwrap() {
                first[part][field] = value.clone();
            }
        }
        let expected = [before[1].clone(), before[2].clone(), before[0].clone()];
        assert_eq!(order(&objects), expected, "{change}");
    }
}

#[test]
fn of_nodes_that_say_what_their_links_hold_only_those_with_the_subnet_on_a_link_that_may_be_used_are_elected()
{
    let links = |objects: &mut Vec<Value>, name: &str, links: &str| {
        let node = objects.iter_mut().find(|object| object["metadata"]["name"] == name).unwrap();
        node["metadata"]["annotations"]["weft.network/links"] = links.into();
    };
    let mut objects = with(vec![given(service(1), "198.51.100.1")]);
    links(&mut objects, "b", "eth0=203.0.113.0/24 eth0=2001:db8::/64");
    links(&mut objects, "c", "eth7=198.51.100.0/24");
    assert_eq!(candidates(&objects), texts(&["a", "c"]), "a is this node, b is elsewhere");
    objects.push(advertisement(json!({"interfaces": ["eth7"]})));
    assert_eq!(candidates(&objects), texts(&["c"]), "this node has no eth7");
}
