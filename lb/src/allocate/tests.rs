//! Allocation from real objects: `kubectl`'s JSON in, addresses and sentences out.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};
use weft_model::node_facts::WireguardBackend;
use weft_model::{ClusterConfig, Generation, NodeFacts};
use weft_netstack::kube::Cluster;

use super::*;
use crate::status;

pub(crate) fn snapshot(objects: &[Value]) -> Snapshot {
    let config = ClusterConfig {
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/56".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        ..ClusterConfig::default()
    };
    let facts = NodeFacts {
        name: "a".into(),
        uplinks: vec![],
        wireguard_backend: WireguardBackend::Userspace,
        foreign_routes: vec![],
        loopback: Default::default(),
        observed: Default::default(),
    };
    let namespaces = ["default", "shop"].map(|name| json!({"kind": "Namespace", "metadata": {"name": name}}));
    let all = objects.iter().cloned().chain(namespaces);
    Cluster::from_documents(all).snapshot(Generation(1), Arc::new(config), Arc::new(facts))
}

pub(crate) fn node(name: &str, number: u8) -> Value {
    let addresses = [format!("192.0.2.{number}"), format!("2001:db8::{number}")]
        .map(|address| json!({"type": "InternalIP", "address": address}));
    json!({"kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses}})
}

pub(crate) fn pool(name: &str, addresses: &[&str]) -> Value {
    json!({"kind": "IPAddressPool", "spec": {"addresses": addresses},
        "metadata": {"name": name, "namespace": "m", "creationTimestamp": "2026-01-01T00:00:00Z"}})
}

/// Of port 80; the lower the number the older.
pub(crate) fn service(number: u32) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"name": format!("s{number:03}"), "namespace": "default", "annotations": {},
            "creationTimestamp": format!("2026-01-{:02}T{:02}:00:00Z", number / 24 + 1, number % 24)},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}], "ipFamilies": ["IPv4"],
            "clusterIPs": ["10.96.0.1"], "selector": {"app": "a"}},
    })
}

fn annotated(mut service: Value, name: &str, text: &str) -> Value {
    service["metadata"]["annotations"][name] = text.into();
    service
}

fn with(mut object: Value, path: &str, value: Value) -> Value {
    *object.pointer_mut(path).unwrap() = value;
    object
}

fn addresses(objects: &[Value]) -> Vec<Vec<String>> {
    let grants = allocate(&snapshot(objects)).grants;
    grants.values().map(|grant| grant.addresses.iter().map(IpAddr::to_string).collect()).collect()
}

fn sentences(objects: &[Value]) -> Vec<String> {
    let mut problems = allocate(&snapshot(objects)).problems;
    problems.sort();
    problems.iter().map(Problem::to_string).collect()
}

/// The objects after the planned statuses were written.
fn written(objects: &[Value]) -> Vec<Value> {
    let plan = status::plan(&snapshot(objects)).plan;
    let mut objects = objects.to_vec();
    for (target, status) in plan.statuses {
        let is = |object: &&mut Value| {
            object["kind"] == target.kind.name() && object["metadata"]["name"] == *target.key.name
        };
        let object = objects.iter_mut().find(is).unwrap();
        for (field, value) in status.as_object().unwrap() {
            object["status"][field] = value.clone();
        }
    }
    objects
}

#[test]
fn without_pools_a_service_gets_every_nodes_address_and_others_share_them_by_port() {
    let other = with(service(2), "/spec/ports", json!([{"port": 443}]));
    let same = service(3);
    let objects = [node("a", 1), node("b", 2), service(1), other, same];
    let both = vec!["192.0.2.1".to_owned(), "192.0.2.2".to_owned()];
    assert_eq!(addresses(&objects), [both.clone(), both, vec![]]);
    let said = sentences(&objects);
    assert!(
        said[0].starts_with("Service default/s003") && said[0].contains("default/s001 has the same port")
    );
}

#[test]
fn a_cluster_of_one_excluded_node_still_serves() {
    let mut only = node("a", 1);
    only["metadata"]["labels"] = json!({"node.kubernetes.io/exclude-from-external-load-balancers": ""});
    assert_eq!(addresses(&[only.clone(), service(1)]), [["192.0.2.1"]]);
    assert_eq!(addresses(&[only, node("b", 2), service(1)]), [["192.0.2.2"]]);
}

#[test]
fn with_local_traffic_only_nodes_with_a_ready_endpoint_are_given_also_without_a_nodes_name() {
    let local = with(service(1), "/spec/selector", Value::Null);
    let mut local = local;
    local["spec"]["externalTrafficPolicy"] = "Local".into();
    let endpoint = |ip: &str, ready: bool| json!({"addresses": [ip], "conditions": {"ready": ready}});
    let slice = json!({"kind": "EndpointSlice", "addressType": "IPv4", "ports": [{"port": 80}],
        "metadata": {"name": "x", "namespace": "default", "labels": {"kubernetes.io/service-name": "s001"}},
        "endpoints": [endpoint("192.0.2.2", true), endpoint("192.0.2.3", false)]});
    let objects = [node("a", 1), node("b", 2), node("c", 3), local, slice];
    assert_eq!(addresses(&objects), [["192.0.2.2"]]);
}

#[test]
fn dual_stack_is_required_or_preferred() {
    let dual = |policy: &str| {
        let service = with(service(1), "/spec/ipFamilies", json!(["IPv6", "IPv4"]));
        let mut service = with(service, "/spec/clusterIPs", json!(["fd00:96::1", "10.96.0.1"]));
        service["spec"]["ipFamilyPolicy"] = policy.into();
        service
    };
    let both = pool("p", &["198.51.100.0/24", "2001:db8:1::/64"]);
    let one = pool("p", &["198.51.100.0/24"]);
    assert_eq!(addresses(&[both, dual("RequireDualStack")]), [["2001:db8:1::", "198.51.100.0"]]);
    assert_eq!(addresses(&[one.clone(), dual("PreferDualStack")]), [["198.51.100.0"]]);
    assert_eq!(addresses(&[one.clone(), dual("RequireDualStack")]), [[""; 0]]);
    let said = sentences(&[one, dual("RequireDualStack")]);
    assert!(said[0].contains("no IPv6 address is free in IPAddressPool p"), "{said:?}");
}

#[test]
fn pools_are_chosen_by_priority_namespace_selector_and_request() {
    let prioritised = |name: &str, range: &str, allocation: Value| {
        let mut pool = pool(name, &[range]);
        pool["spec"]["serviceAllocation"] = allocation;
        pool
    };
    let last = pool("aa-last", &["198.51.100.0/28"]);
    let shop = prioritised("shop", "198.51.101.0/28", json!({"priority": 5, "namespaces": ["shop"]}));
    let apps = {
        let selectors = json!([{"matchLabels": {"app": "x"}}]);
        prioritised("apps", "198.51.102.0/28", json!({"priority": 9, "serviceSelectors": selectors}))
    };
    let hidden = with(
        pool("hidden", &["198.51.103.0/28"]),
        "/spec",
        json!({"addresses": ["198.51.103.0/28"], "autoAssign": false}),
    );
    let of_shop = with(service(2), "/metadata/namespace", "shop".into());
    let mut of_app = service(3);
    of_app["metadata"]["labels"] = json!({"app": "x"});
    let asking = annotated(service(4), "metallb.io/address-pool", "hidden");
    let objects = [last, shop, apps, hidden, service(1), of_shop, of_app, asking];
    assert_eq!(
        addresses(&objects),
        [["198.51.100.0"], ["198.51.102.0"], ["198.51.103.0"], ["198.51.101.0"]],
        "default/s001, s003, s004, shop/s002"
    );
}

#[test]
fn addresses_of_nodes_and_buggy_ones_are_left_out() {
    let mut careful = pool("p", &["192.0.2.0-192.0.2.3"]);
    careful["spec"]["avoidBuggyIPs"] = true.into();
    let objects = [node("a", 1), careful, service(1), service(2), service(3)];
    assert_eq!(addresses(&objects), [vec!["192.0.2.2"], vec!["192.0.2.3"], vec![]]);
    let said = sentences(&objects).join("\n");
    assert!(
        said.contains(
            "IPAddressPool m/p: Conflict: spec.addresses 192.0.2.0-192.0.2.3 holds 192.0.2.1, Node a's own"
        ),
        "{said}"
    );
}

#[test]
fn a_fixed_address_is_given_or_the_sentence_says_why_not() {
    let p = pool("p", &["198.51.100.0/28"]);
    let ask = |number, ip| annotated(service(number), "metallb.io/loadBalancerIPs", ip);
    assert_eq!(addresses(&[p.clone(), ask(1, "198.51.100.7")]), [["198.51.100.7"]]);
    let cases = [
        ("203.0.113.9", "which is in no IPAddressPool"),
        ("192.0.2.1", "which is Node a's own"),
        ("198.51.100.0", "which Service default/s001 has"),
    ];
    for (ip, why) in cases {
        let objects = [node("a", 1), p.clone(), service(1), ask(2, ip)];
        let objects = written(&objects[..3]).into_iter().chain([ask(2, ip)]).collect::<Vec<_>>();
        assert_eq!(addresses(&objects), [vec!["198.51.100.0"], vec![]], "{ip}");
        let said = sentences(&objects).join("\n");
        assert!(said.contains(why), "{ip}: {said}");
    }
}

#[test]
fn services_share_an_address_by_key_with_other_ports_and_lose_it_when_they_no_longer_may() {
    let share = |number, port: u16| {
        let service = annotated(service(number), "metallb.io/allow-shared-ip", "k");
        with(service, "/spec/ports", json!([{"port": port}]))
    };
    let p = pool("p", &["198.51.100.0/28"]);
    let objects = written(&[p, share(1, 80), share(2, 443), share(3, 80)]);
    let given = addresses(&objects);
    assert_eq!(given, [["198.51.100.0"], ["198.51.100.0"], ["198.51.100.1"]]);
    let changed = with(objects[2].clone(), "/metadata/annotations", json!({}));
    let objects = [objects[0].clone(), objects[1].clone(), changed, objects[3].clone()];
    assert_eq!(addresses(&objects), [["198.51.100.0"], ["198.51.100.2"], ["198.51.100.1"]]);
}

#[test]
fn tcp_and_udp_of_one_port_share_and_local_traffic_only_with_the_same_pods() {
    let share = |number, protocol: &str, app: &str| {
        let mut service = annotated(service(number), "metallb.io/allow-shared-ip", "dns");
        service["spec"]["ports"] = json!([{"port": 53, "protocol": protocol}]);
        service["spec"]["externalTrafficPolicy"] = "Local".into();
        with(service, "/spec/selector", json!({"app": app}))
    };
    let p = pool("p", &["198.51.100.0/28"]);
    let same = [p.clone(), share(1, "TCP", "d"), share(2, "UDP", "d")];
    assert_eq!(addresses(&same), [["198.51.100.0"], ["198.51.100.0"]]);
    let different = [p, share(1, "TCP", "d"), share(2, "UDP", "e")];
    assert_eq!(addresses(&different), [["198.51.100.0"], ["198.51.100.1"]]);
}

#[test]
fn other_classes_and_types_are_left_alone_and_a_class_of_ours_takes_node_addresses() {
    let class = |number, class: &str| {
        let mut service = service(number);
        service["spec"]["loadBalancerClass"] = class.into();
        service
    };
    let p = pool("p", &["198.51.100.0/28"]);
    let plain = with(service(1), "/spec/type", "NodePort".into());
    let objects = [
        node("a", 1),
        p,
        plain,
        class(2, "x/y"),
        class(3, "weft.network/load-balancer"),
        class(4, "weft.network/node-addresses"),
    ];
    assert_eq!(addresses(&objects), [["198.51.100.0"], ["192.0.2.1"]]);
}

#[test]
fn shrinking_a_pool_under_a_live_service_moves_nothing_and_names_the_holder() {
    let objects = written(&[pool("p", &["198.51.100.0/30"]), service(1), service(2)]);
    let shrunk = with(objects[0].clone(), "/spec/addresses", json!(["198.51.100.0-198.51.100.0"]));
    let objects = [shrunk, objects[1].clone(), objects[2].clone(), service(3)];
    assert_eq!(addresses(&objects), [vec!["198.51.100.0"], vec!["198.51.100.1"], vec![]]);
    let said = sentences(&objects).join("\n");
    let expected = "IPAddressPool m/p: Conflict: spec.addresses of IPAddressPool p no longer holds 198.51.100.1, \
                    which Service default/s002 has and keeps";
    assert!(said.contains(expected), "{said}");
    let without = [objects[1].clone(), objects[2].clone(), pool("q", &["203.0.113.0/30"])];
    assert_eq!(addresses(&without), [["198.51.100.0"], ["198.51.100.1"]], "also when the pool is gone");
}

#[test]
fn an_address_that_somebody_else_wrote_into_a_status_is_not_ours() {
    let mut foreign = service(1);
    foreign["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.5", "ipMode": "VIP"}]}});
    assert_eq!(addresses(&[pool("p", &["198.51.100.0/28"]), foreign]), [["198.51.100.0"]]);
}

#[test]
fn overlapping_pools_and_ranges_of_the_cluster_are_named_and_the_rest_works() {
    let mut younger = pool("b", &["198.51.100.8-198.51.100.40", "203.0.113.0/30", "10.96.4.0/24"]);
    younger["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    let objects =
        [pool("a", &["198.51.100.0/28"]), younger, annotated(service(1), "metallb.io/address-pool", "b")];
    assert_eq!(addresses(&objects), [["203.0.113.0"]]);
    let said = sentences(&objects).join("\n");
    assert!(said.contains("IPAddressPool m/b: Conflict: spec.addresses 198.51.100.8-198.51.100.40 overlaps the older IPAddressPool m/a"));
    assert!(said.contains("is within the cluster's own range 10.96.0.0/16"), "{said}");
}

fn answering(mut node: Value, text: &str) -> Value {
    node["metadata"]["annotations"] = json!({"weft.network/answers-for": text});
    node
}

#[test]
fn an_address_is_given_again_only_when_no_node_answers_for_it_any_more() {
    let pool = pool("p", &["198.51.100.0-198.51.100.1"]);
    let still = answering(node("a", 1), "198.51.100.0 192.0.2.77");
    assert_eq!(addresses(&[pool.clone(), node("b", 2), still.clone(), service(1)]), [["198.51.100.1"]]);
    let both = answering(node("b", 2), "198.51.100.1");
    let waiting = [pool.clone(), still.clone(), both, service(1)];
    assert_eq!(addresses(&waiting), [[""; 0]]);
    let said = sentences(&waiting).join("\n");
    assert!(
        said.contains("198.51.100.0 is the next free IPv4 address, and is given when Node a no longer"),
        "{said}"
    );
    let fixed = annotated(service(1), "metallb.io/loadBalancerIPs", "198.51.100.0");
    let said = sentences(&[pool.clone(), still.clone(), fixed.clone()]).join("\n");
    assert!(said.contains("it asks for 198.51.100.0, which Node a still answers for"), "{said}");
    assert_eq!(addresses(&[pool.clone(), node("a", 1), fixed]), [["198.51.100.0"]], "withdrawn");
    let mut yesterday = still.clone();
    yesterday["status"]["conditions"] = json!([{"type": "Ready", "status": "Unknown"}]);
    assert_eq!(addresses(&[pool.clone(), yesterday, service(1)]), [["198.51.100.0"]], "its node is gone");
    let shared = |n| annotated(service(n), "metallb.io/allow-shared-ip", "k");
    let other_port = with(shared(2), "/spec/ports", json!([{"port": 443}]));
    assert_eq!(addresses(&[pool.clone(), still.clone(), shared(1), other_port]), [["198.51.100.1"]; 2]);
    let holding = written(&[pool, node("a", 1), service(1)]);
    assert_eq!(addresses(&[holding[0].clone(), still, holding[2].clone()]), [["198.51.100.0"]], "its own");
}

/// Status, reason and message of our condition on the last object, once all is written.
fn condition(objects: &[Value]) -> [String; 3] {
    let objects = written(objects);
    assert!(status::plan(&snapshot(&objects)).plan.statuses.is_empty(), "written once");
    let conditions = objects.last().unwrap()["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ours = conditions.iter().find(|it| it["type"] == CONDITION).cloned().unwrap_or_default();
    ["status", "reason", "message"].map(|field| ours[field].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_condition_of_the_service_says_that_a_stranger_has_its_address() {
    let contested = answering(node("a", 1), "198.51.100.0=02:00:00:00:00:07");
    let [status, reason, message] =
        condition(&[pool("p", &["198.51.100.0/28"]), contested.clone(), service(1)]);
    assert_eq!([status.as_str(), reason.as_str()], ["False", "Conflict"]);
    let expected = "198.51.100.0 of IPAddressPool p; 198.51.100.0 is answered for by the machine with MAC 02:00:00:00:00:07";
    assert!(message.starts_with(expected), "{message}");
    let claimed = answering(node("b", 2), "198.51.100.0");
    let had = written(&[pool("p", &["198.51.100.0/28"]), contested.clone(), service(1)]);
    let [_, reason, _] = condition(&[had[0].clone(), contested, claimed, had[2].clone()]);
    assert_eq!(reason, "Allocated", "another node has it meanwhile");
}

#[test]
fn a_condition_of_the_service_says_what_is_wrong_with_its_pool() {
    let mut younger = pool("b", &["198.51.100.8-198.51.100.40", "10.96.4.0/24"]);
    younger["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    let asking = annotated(service(1), "metallb.io/address-pool", "b");
    let [status, reason, message] = condition(&[pool("a", &["198.51.100.0/28"]), younger, asking]);
    assert_eq!([status.as_str(), reason.as_str()], ["False", "Pending"]);
    let expected = "no IPv4 address is free in IPAddressPool b: spec.addresses 198.51.100.8-198.51.100.40 overlaps the older \
                    IPAddressPool m/a";
    assert!(message.starts_with(expected), "{message}");
    let asking = annotated(service(1), "metallb.io/address-pool", "c");
    let over_nodes = pool("c", &["192.0.2.1-192.0.2.1"]);
    let [_, _, message] = condition(&[node("a", 1), over_nodes, asking.clone()]);
    assert!(message.contains("holds 192.0.2.1, Node a's own, which no Service gets"), "{message}");
    let [_, _, message] = condition(&[pool("c", &["10.96.4.0/24"]), asking]);
    assert!(message.contains("is within the cluster's own range 10.96.0.0/16"), "{message}");
}

#[test]
fn a_condition_of_the_service_names_the_pool_that_shrank_and_survives_it() {
    let objects = written(&[pool("p", &["198.51.100.0/30"]), service(1)]);
    let shrunk = with(objects[0].clone(), "/spec/addresses", json!(["198.51.100.3/32"]));
    let [status, reason, message] = condition(&[shrunk.clone(), objects[1].clone()]);
    assert_eq!([status.as_str(), reason.as_str()], ["True", "Kept"]);
    let expected = "198.51.100.0 of IPAddressPool p; spec.addresses of IPAddressPool p no longer holds 198.51.100.0, which \
                    Service default/s001 has and keeps";
    assert!(message.starts_with(expected), "{message}");
    let again = written(&[shrunk, objects[1].clone()]);
    assert_eq!(addresses(&again), [["198.51.100.0"]], "the condition is still the memory of its pool");
    let put_back = with(again[0].clone(), "/spec/addresses", json!(["198.51.100.0/30"]));
    assert_eq!(condition(&[put_back, again[1].clone()])[1], "Allocated");
}

#[test]
fn a_condition_of_the_service_says_that_no_node_can_answer() {
    let linked = |name, number, links: &str| {
        let mut node = node(name, number);
        node["metadata"]["annotations"] = json!({"weft.network/links": links});
        node
    };
    let advertisement = |spec: Value| json!({"kind": "L2Advertisement", "metadata": {"name": "l2", "namespace": "m"}, "spec": spec});
    let nodes =
        [linked("a", 1, "eth0=192.0.2.0/24"), linked("b", 2, "eth0=192.0.2.0/24 eth1=198.51.100.0/24")];
    let objects =
        |l2: Value| [nodes[0].clone(), nodes[1].clone(), pool("p", &["198.51.100.0/28"]), l2, service(1)];
    let said = |spec: Value| condition(&objects(advertisement(spec)));
    assert_eq!(said(json!({}))[1], "Allocated");
    let [status, reason, message] = said(json!({"interfaces": ["eth7"]}));
    assert_eq!([status.as_str(), reason.as_str()], ["False", "Unreachable"]);
    assert!(
        message
            .contains("; spec.interfaces of L2Advertisement m/l2 name on no Node a link with the subnet of"),
        "{message}"
    );
    let [_, _, message] = said(json!({"nodeSelectors": [{"matchLabels": {"lan": "yes"}}]}));
    assert!(message.contains("spec.nodeSelectors of L2Advertisement m/l2 match no Node"), "{message}");
    let elsewhere = [nodes[0].clone(), pool("p", &["203.0.113.0/28"]), service(1)];
    let [_, reason, message] = condition(&elsewhere);
    assert_eq!(reason, "Unreachable");
    assert!(message.contains("is on no subnet of any Node's links"), "{message}");
}

#[test]
fn a_written_plan_leaves_nothing_to_write_and_counts_the_pool() {
    let objects = written(&[pool("p", &["198.51.100.0/28"]), service(1), service(2)]);
    assert!(status::plan(&snapshot(&objects)).plan.statuses.is_empty());
    assert_eq!(objects[0]["status"]["assignedIPv4"], 2);
    assert_eq!(objects[0]["status"]["availableIPv4"], 14);
    let status = &objects[1]["status"];
    assert_eq!(status["loadBalancer"]["ingress"], json!([{"ip": "198.51.100.0", "ipMode": "VIP"}]));
    assert_eq!(status["conditions"][0]["message"], "198.51.100.0 of IPAddressPool p");
}

#[test]
fn conditions_of_others_are_kept() {
    let mut with_others = service(1);
    with_others["status"] = json!({"conditions": [{"type": "x", "status": "True", "reason": "R",
        "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    let objects = written(&[pool("p", &["198.51.100.0/28"]), with_others.clone()]);
    assert_eq!(objects[1]["status"]["conditions"][0], with_others["status"]["conditions"][0]);
    assert_eq!(objects[1]["status"]["conditions"][1]["reason"], "Allocated");
}

/// One edit of somebody.
#[derive(Clone, Debug)]
enum Edit {
    Add(u32),
    Remove(u32),
    Grow(u8),
    Shrink(u8),
    Share(u32),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (0..20u32).prop_map(Edit::Add),
        (0..20u32).prop_map(Edit::Remove),
        (1..30u8).prop_map(Edit::Grow),
        (1..30u8).prop_map(Edit::Shrink),
        (0..20u32).prop_map(Edit::Share),
    ]
}

fn apply(objects: &mut Vec<Value>, edit: &Edit) {
    let named = |number: &u32| format!("s{number:03}");
    match edit {
        Edit::Add(number) if objects.iter().all(|it| it["metadata"]["name"] != named(number).as_str()) => {
            objects.push(service(*number));
        }
        Edit::Add(_) => {}
        Edit::Remove(number) => objects.retain(|it| it["metadata"]["name"] != named(number).as_str()),
        Edit::Grow(size) | Edit::Shrink(size) => {
            objects[0]["spec"]["addresses"] = json!([format!("198.51.100.1-198.51.100.{size}")]);
        }
        Edit::Share(number) => {
            for it in objects.iter_mut().filter(|it| it["metadata"]["name"] == named(number).as_str()) {
                it["metadata"]["annotations"]["metallb.io/allow-shared-ip"] = "k".into();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is edited, in whatever order objects are listed, and whoever plans: a Service that has an address keeps it, and
    /// no two have one address.
    #[test]
    fn no_edit_restart_or_new_writer_moves_an_address(edits in prop::collection::vec(edit(), 1..25)) {
        let mut objects = vec![pool("p", &["198.51.100.1-198.51.100.10"])];
        for edit in &edits {
            let before = allocate(&snapshot(&objects)).grants;
            apply(&mut objects, edit);
            let mut listed_otherwise = objects.clone();
            listed_otherwise.reverse();
            let after = allocate(&snapshot(&objects)).grants;
            prop_assert_eq!(&after, &allocate(&snapshot(&listed_otherwise)).grants);
            for (key, grant) in before.iter().filter(|(_, grant)| !grant.addresses.is_empty()) {
                if let Some(now) = after.get(key) {
                    prop_assert_eq!(&now.addresses, &grant.addresses, "{} after {:?}", key, edit);
                }
            }
            let given: Vec<IpAddr> = after.values().flat_map(|grant| grant.addresses.clone()).collect();
            let distinct: BTreeSet<IpAddr> = given.iter().copied().collect();
            prop_assert_eq!(given.len(), distinct.len());
            objects = written(&objects);
            prop_assert!(status::plan(&snapshot(&objects)).plan.statuses.is_empty(), "settled at once");
        }
    }
}
